"""The rewards of all answers, and of the data's own responses, by one reward model per objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sipo.errors import InvalidRequest, SipoError
from sipo.evaluation.answers import Answer, Tell
from sipo.evaluation.folder import SCORES, EvaluationFolder, RowFile
from sipo.evaluation.plan import Plan, shown
from sipo.evaluation.reward_models import RewardFunction, open_reward_model
from sipo.models import model_folder
from sipo.record import Record

SAVED = 16
"""Prompts whose rewards are written together."""

OpenJudge = Callable[[str], RewardFunction]


class Scored(Record):
    """What one objective's judge gave to a method's answers to one prompt, in the order of its points; `method` None: to the two
    original responses."""

    method: str | None
    prompt: int
    rewards: list[float]


Rewards = dict[str | None, list[list[float]]]
"""By method (None: the originals), for each prompt those of its points."""


@dataclass(frozen=True)
class _Asked:
    method: str | None
    prompt: int
    texts: Sequence[str]


def open_judge(address: str) -> RewardFunction:
    """On the GPU, if there is one: it is free, as the decoder's engine has ended."""
    device = "cpu"
    if address.startswith("hf:"):
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_reward_model(address, device=device)


def check_judges(judges: Mapping[str, str]) -> None:
    """Raises InvalidRequest or NotFound for one that is not there, before hours of generation. A classifier is not loaded yet."""
    for objective, address in judges.items():
        kind, _, name = address.partition(":")
        try:
            if kind == "hf" and name:
                model_folder(name.partition("#")[0])
            else:
                open_reward_model(address)
        except SipoError as error:
            raise _failed(objective, address, error) from error


def judge(
    plan: Plan, answers: Mapping[str, Sequence[Answer]], folder: EvaluationFolder, tell: Tell, open_judge: OpenJudge = open_judge
) -> dict[str, Rewards]:
    """By objective, and by the names of further judges. The folder may have the first ones. Raises a SipoError that names judge,
    method and prompt if a judge fails or gives no finite number; what was judged before stays."""
    asked = list(_asked(plan, answers))
    return {
        objective: _by_method(_judge(plan, objective, asked, folder, tell=tell, open_judge=open_judge))
        for objective in plan.all_judges
    }


def _judge(
    plan: Plan, objective: str, asked: Sequence[_Asked], folder: EvaluationFolder, *, tell: Tell, open_judge: OpenJudge
) -> list[Scored]:
    """Of one judge, whose model lives here and no longer: the next one may need all of the memory."""
    stage, rows = f"rewards of {objective}", folder.rows(SCORES, objective, Scored)
    scored = _begun(rows, asked)
    model = _opened(plan, objective, open_judge) if len(scored) < len(asked) else None
    while model is not None and len(scored) < len(asked):
        tell(stage, len(scored), len(asked))
        with folder.timed(stage):
            new = [_score(plan, objective, model, one) for one in asked[len(scored) : len(scored) + SAVED]]
        rows.add(new)
        scored += new
    tell(stage, len(scored), len(asked))
    return scored


def _asked(plan: Plan, answers: Mapping[str, Sequence[Answer]]) -> Iterator[_Asked]:
    """In the order of the file."""
    for method in plan.methods:
        points, texts = len(method.points), [answer.text for answer in answers[method.name]]
        for index in range(len(plan.prompts)):
            yield _Asked(method.name, index, texts[index * points : (index + 1) * points])
    if plan.has_originals:
        for index, prompt in enumerate(plan.prompts):
            assert prompt.originals is not None
            yield _Asked(None, index, prompt.originals)


def _begun(rows: RowFile[Scored], asked: Sequence[_Asked]) -> list[Scored]:
    """What there is; a torn line at the end is cut off. Raises InvalidRequest if the file holds other rewards."""
    scored = rows.read()
    same = len(scored) <= len(asked) and all(
        (one.method, one.prompt, len(one.rewards)) == (wanted.method, wanted.prompt, len(wanted.texts))
        for one, wanted in zip(scored, asked, strict=False)
    )
    if not same:
        raise InvalidRequest(f"{rows.path} holds other rewards: remove it, and it is made again", param="out")
    rows.keep(scored)
    return scored


def _opened(plan: Plan, objective: str, open_judge: OpenJudge) -> RewardFunction:
    try:
        return open_judge(plan.all_judges[objective])
    except SipoError as error:
        raise _failed(objective, plan.all_judges[objective], error) from error


def _score(plan: Plan, objective: str, model: RewardFunction, asked: _Asked) -> Scored:
    try:
        rewards = model(plan.prompts[asked.prompt].prompt, asked.texts)
        if wrong := [reward for reward in rewards if not math.isfinite(reward)]:
            raise SipoError(f"it gave the reward {wrong[0]}, which is no finite number")
    except SipoError as error:
        of = "the original responses" if asked.method is None else f"the answers of {asked.method}"
        where = f", on {of} to prompt {asked.prompt}, counted from 0"
        raise _failed(objective, plan.all_judges[objective], error, where) from error
    return Scored(method=asked.method, prompt=asked.prompt, rewards=rewards)


def _by_method(scored: Sequence[Scored]) -> Rewards:
    rewards: Rewards = {}
    for one in scored:
        rewards.setdefault(one.method, []).append(one.rewards)
    return rewards


def _failed(objective: str, address: str, error: SipoError, where: str = "") -> SipoError:
    return type(error)(f"the judge of {objective} ({shown(address)}){where}: {error.message}")

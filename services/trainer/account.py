"""The candidates' account of a round: what its candidates are truly worth, and how well implicit rewards knew it.

True is what the ground-truth functions say. Where an objective has none, nobody knows what is truly better: then the account has
the number of candidates, how many are truncated, and the figures of the other objectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from services.common.contract.messages import PromptDecided, ScoredCandidate
from services.common.contract.reports import AcceptedAccount, BestAvailable, CandidatesAccount, ImplicitOrder, StageAccount
from sipo.conversation import as_text
from sipo.evaluation.ground_truth import REWARDS

Truth = Mapping[str, float]
"""By objective that has a ground-truth function."""

STAGES = ("sample", "rewrite", "distilled")


@dataclass(frozen=True)
class _Judged:
    """A candidate; `gain` is its ground truth over that of the better original."""

    scored: ScoredCandidate
    truth: Truth
    gain: Truth

    @property
    def stage(self) -> str:
        return self.scored.candidate.stage

    @property
    def truncated(self) -> bool:
        return self.scored.candidate.finish_reason == "length"

    def better(self, objectives: Iterable[str]) -> bool:
        """Than both originals on all these objectives."""
        return all(self.gain[objective] > 0 for objective in objectives)


@dataclass(frozen=True)
class _JudgedPrompt:
    decision: PromptDecided
    originals: tuple[Truth, Truth]
    candidates: list[_Judged]


def candidates_account(objectives: Sequence[str], decisions: Iterable[PromptDecided]) -> CandidatesAccount:
    """Of a round's decisions, in a job for these objectives."""
    known = [objective for objective in objectives if objective in REWARDS]
    prompts = [_judge(decision, known) for decision in decisions]
    all_known = len(known) == len(objectives)
    by_stage = {stage: [one for prompt in prompts for one in prompt.candidates if one.stage == stage] for stage in STAGES}
    return CandidatesAccount(
        stages={stage: _stage(made, known, all_known) for stage, made in by_stage.items() if made},
        accepted=_accepted(prompts, known, all_known),
        best_available=_best_available(prompts, known) if all_known else None,
        implicit_order={objective: _implicit_order(prompts, objective) for objective in known},
    )


def _judge(decision: PromptDecided, known: Sequence[str]) -> _JudgedPrompt:
    example = decision.example
    prompt = as_text(example.prompt)

    def truth(text: str) -> Truth:
        return {objective: REWARDS[objective](prompt, text) for objective in known}

    first, second = truth(example.response_0), truth(example.response_1)

    def judge(scored: ScoredCandidate) -> _Judged:
        own = truth(scored.candidate.text)
        return _Judged(scored, own, {name: own[name] - max(first[name], second[name]) for name in known})

    return _JudgedPrompt(decision, (first, second), [judge(scored) for scored in decision.candidates])


def _stage(made: Sequence[_Judged], known: Sequence[str], all_known: bool) -> StageAccount:
    return StageAccount(
        candidates=len(made),
        truncated=sum(one.truncated for one in made),
        truly_better=sum(one.better(known) for one in made) if all_known else None,
        ground_truth=_means([one.truth for one in made], known),
    )


def _accepted(prompts: Sequence[_JudgedPrompt], known: Sequence[str], all_known: bool) -> AcceptedAccount:
    chosen = [
        (prompt.candidates[choice.candidate], known if choice.objective is None else [choice.objective])
        for prompt in prompts
        for choice in prompt.decision.chosen
    ]
    gains = [{name: one.gain[name] for name in known if name in chosen_for} for one, chosen_for in chosen]
    return AcceptedAccount(
        responses=len(chosen),
        truly_better=sum(one.better(chosen_for) for one, chosen_for in chosen) if all_known else None,
        gain=_means(gains, known),
    )


def _best_available(prompts: Sequence[_JudgedPrompt], known: Sequence[str]) -> BestAvailable:
    whole = [[one for one in prompt.candidates if not one.truncated and one.better(known)] for prompt in prompts]
    best = [max(candidates, key=lambda one: sum(one.gain.values())) for candidates in whole if candidates]
    return BestAvailable(prompts=len(best), gain=_means([one.gain for one in best], known))


def _implicit_order(prompts: Sequence[_JudgedPrompt], objective: str) -> ImplicitOrder:
    right = [
        true * implicit > 0
        for prompt in prompts
        for one in prompt.candidates
        for true, implicit in _differences(prompt, one, objective)
        # An equal ground truth has no order, and a reward that is not finite is none. Equal implicit rewards order nothing rightly.
        if true and isfinite(implicit)
    ]
    return ImplicitOrder(comparisons=len(right), right=sum(right))


def _differences(prompt: _JudgedPrompt, one: _Judged, objective: str) -> Iterator[tuple[float, float]]:
    """A candidate's ground truth and implicit reward, each less that of an original; none where a filter had no such reward."""
    for original, rewards in zip(prompt.originals, (prompt.decision.rewards_0, prompt.decision.rewards_1), strict=True):
        if one.scored.rewards and rewards and objective in rewards:
            yield one.truth[objective] - original[objective], one.scored.rewards[objective] - rewards[objective]


def _means(rows: Sequence[Truth], names: Iterable[str]) -> dict[str, float]:
    """Of the rows that have the name; a name that none has is left out."""
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: fmean(column) for name, column in columns.items() if column}

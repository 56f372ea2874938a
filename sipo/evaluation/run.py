"""An evaluation from its plan to its report, in a folder of its own: stopped, it goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sipo.evaluation.answers import OpenDecoder, Tell, generate, open_offline, prompt_ids
from sipo.evaluation.comparing import comparisons
from sipo.evaluation.divergence import diverge
from sipo.evaluation.folder import EvaluationFolder
from sipo.evaluation.judging import OpenJudge, Rewards, check_judges, judge, open_judge
from sipo.evaluation.plan import Plan
from sipo.evaluation.prompts import check_unseen
from sipo.evaluation.report import EvaluationReport
from sipo.evaluation.summary import Context, summarise


def evaluate(
    plan: Plan,
    folder: Path,
    tell: Tell,
    *,
    against: Sequence[str] = (),
    seed: int = 0,
    divergence: bool = False,
    context: Context | None = None,
    open_decoder: OpenDecoder = open_offline,
    open_judge: OpenJudge = open_judge,
) -> EvaluationReport:
    """Generates, judges, and at the end writes report.json and its page, index.html. `against` names the methods (without seeds)
    that all others are compared with, `seed` is the bootstrap's, `divergence` measures how far policies moved, `context` is shown
    beside: all may change when a report is made again from the same answers.

    Raises InvalidRequest and NotFound for what cannot be evaluated, with nothing written; InvalidRequest for a folder of another
    plan; Conflict while another process works in it; and whatever a judge that fails raises.
    """
    from sipo.evaluation.page import write_page  # with matplotlib, which takes a second to import

    ids, validated = check_plan(plan, against), plan.validated
    home = EvaluationFolder(folder)
    home.prepare(plan)
    with home.claimed():
        answers = generate(plan, ids, home, tell, open_decoder)
        validation = None
        if validated is not None:
            validation = _validate(validated, home.validation, tell, open_decoder=open_decoder, open_judge=open_judge)
        rewards = judge(plan, answers, home, tell, open_judge)
        divergences = diverge(plan, ids, answers, home, tell) if divergence else None
        report = summarise(
            plan,
            answers,
            rewards,
            validation=validation,
            divergences=divergences,
            context=context,
            against=against,
            seed=seed,
            seconds=home.seconds() | {_validating(stage): seconds for stage, seconds in home.validation.seconds().items()},
        )
        home.finish(report)
        write_page(report, folder)
    return report


def check_plan(plan: Plan, against: Sequence[str] = ()) -> dict[str, list[list[int]]]:
    """All that can be known of a plan before anything is generated; returns every prompt's tokens, by method. Raises InvalidRequest
    and NotFound for what cannot be evaluated, or be compared with `against`."""
    comparisons([method.name for method in plan.methods], against)
    for method in plan.methods:
        for where, trained in method.trained.items():
            check_unseen(plan.prompts, trained, where)
    check_judges(plan.all_judges)
    if plan.validated is not None:
        prompt_ids(plan.validated)
    return prompt_ids(plan)


def _validate(
    plan: Plan, home: EvaluationFolder, tell: Tell, *, open_decoder: OpenDecoder, open_judge: OpenJudge
) -> dict[str, Rewards]:
    """The rewards of the base's answers to the validation prompts."""

    def tell_of(stage: str, done: int, of: int) -> None:
        tell(_validating(stage), done, of)

    home.prepare(plan)
    with home.claimed():
        answers = generate(plan, prompt_ids(plan), home, tell_of, open_decoder)
        return judge(plan, answers, home, tell_of, open_judge)


def _validating(stage: str) -> str:
    return f"validation, {stage}"

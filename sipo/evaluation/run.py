"""An evaluation from its plan to its report, in a folder of its own: stopped, it goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sipo.evaluation.answers import OpenDecoder, Tell, generate, open_offline, prompt_ids
from sipo.evaluation.folder import EvaluationFolder
from sipo.evaluation.judging import OpenJudge, check_judges, judge, open_judge
from sipo.evaluation.plan import Plan
from sipo.evaluation.prompts import check_unseen
from sipo.evaluation.report import EvaluationReport
from sipo.evaluation.summary import comparisons, summarise


def evaluate(
    plan: Plan,
    folder: Path,
    tell: Tell,
    *,
    against: Sequence[str] = (),
    seed: int = 0,
    open_decoder: OpenDecoder = open_offline,
    open_judge: OpenJudge = open_judge,
) -> EvaluationReport:
    """Generates, judges, and at the end writes report.json and its page, index.html. `against` names the methods that all others
    are compared with, `seed` is the bootstrap's: both may change when a report is made again from the same answers.

    Raises InvalidRequest and NotFound for what cannot be evaluated, with nothing written; InvalidRequest for a folder of another
    plan; Conflict while another process works in it; and whatever a judge that fails raises.
    """
    from sipo.evaluation.page import write_page  # with matplotlib, which takes a second to import

    comparisons(plan.methods, against)
    for method in plan.methods:
        for where, trained in method.trained.items():
            check_unseen(plan.prompts, trained, where)
    check_judges(plan.judges)
    ids = prompt_ids(plan)
    home = EvaluationFolder(folder)
    home.prepare(plan)
    with home.claimed():
        answers = generate(plan, ids, home, tell, open_decoder)
        rewards = judge(plan, answers, home, tell, open_judge)
        report = summarise(plan, answers, rewards, against=against, seed=seed, seconds=home.seconds())
        home.finish(report)
        write_page(report, folder)
    return report

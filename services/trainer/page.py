"""A job's page: its report for people."""

from __future__ import annotations

from collections.abc import Mapping

from services.common.contract.job_account import context_of
from services.common.contract.job_files import JobFiles
from services.common.contract.reports import Report, RoundEvaluation
from sipo.evaluation.page import Evaluated, write_job_page
from sipo.evaluation.report import Comparison


def write_report_page(report: Report, files: JobFiles, reward_models: Mapping[str, str]) -> None:
    """`reward_models`: this system's, address by name."""
    context = context_of(report, files, reward_models)
    evaluations = [_evaluated(one.round, one.evaluation) for one in report.rounds if one.evaluation is not None]
    write_job_page(context.jobs[0], files.page, data=context.data, evaluations=evaluations)


def _evaluated(round_: int, evaluation: RoundEvaluation) -> Evaluated:
    if evaluation.difference is None or evaluation.p_value is None:
        return Evaluated(round_, evaluation.prompts, evaluation.error or "nothing was found", link=None)
    found = Comparison(method="after", against="before", difference=evaluation.difference, p_value=evaluation.p_value)
    # As the gateway has both pages: this one at /v1/jobs/ID/report.html.
    return Evaluated(round_, evaluation.prompts, found, link=f"evaluations/{round_}/index.html")

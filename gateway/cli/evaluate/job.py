"""The job that an evaluation's page is to show, from its report or its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from services.common.contract.job_account import account_of
from services.common.contract.job_files import JobFiles
from services.common.contract.reports import Report
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.job_account import JobAccount
from sipo.validation import explain


def read_job(path: Path, reward_models: Mapping[str, str]) -> JobAccount:
    """`path`: a job's report.json, or its folder. Curves are known, and which external models filtered, if the report lies in
    the job's folder; `reward_models` are this system's, by name. Raises NotFound and InvalidRequest."""
    file = JobFiles(path).report if path.is_dir() else path
    if not file.is_file():
        raise NotFound(f"there is no report {file}", param="job")
    try:
        report = Report.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise InvalidRequest(f"{file} is no report of a job: {explain(error)[1]}", param="job") from error
    return account_of(report, JobFiles(file.parent), reward_models)

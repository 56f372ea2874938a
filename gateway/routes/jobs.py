"""The job endpoints: create (input uploaded or inline, never a path of ours), look, cancel, and fetch what came out.

The gateway creates jobs and asks for their end; all else about a job is the trainer's. Artifacts are read from the job's folder,
where the trainer writes them.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import UploadFile

from gateway.jobs.decisions import read_decisions, whole_lines
from gateway.jobs.input import settle_spec, store_input
from gateway.settings import GatewaySettings
from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job, JobStore, new_job_id
from services.common.contract.jobs import JobSpec
from services.common.web.app import JSONL
from sipo.datasets import read_lines
from sipo.errors import InvalidRequest, NotFound
from sipo.policies import PolicyStore
from sipo.selection import pareto_pairs

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


M = TypeVar("M", bound=BaseModel)


class InlineJob(BaseModel):
    """A job with its input in the body: rows of our schema, as a JSONL file would have them."""

    model_config = ConfigDict(extra="forbid")

    spec: JobSpec
    examples: list[dict[str, Any]]


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Job]


_BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": InlineJob.model_json_schema(ref_template="#/components/schemas/{model}")},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["spec", "file"],
                    "properties": {
                        "spec": {"type": "string", "description": "a JobSpec as JSON"},
                        "file": {"type": "string", "format": "binary", "description": "JSONL in our schema"},
                    },
                }
            },
        },
    }
}


@router.post("", status_code=201, openapi_extra=_BODIES)
async def create_job(request: Request) -> Job:
    """Takes the input whole, checks all of it, and queues the job; or refuses it and keeps nothing."""
    job_id = new_job_id()
    folder = _folder(request, job_id)
    take_in = partial(_take_in, request.app.state.policies, request.app.state.settings, folder)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form() as form:
            spec, file = form.get("spec"), form.get("file")
            if not isinstance(spec, str):
                raise InvalidRequest("the form needs a field `spec`: the job's specification as JSON", param="spec")
            if not isinstance(file, UploadFile):
                raise InvalidRequest("the form needs a file `file`: the job's input as JSONL", param="file")
            settled = await asyncio.to_thread(take_in, _parse(JobSpec, spec, "spec"), file.file)
    else:
        inline = _parse(InlineJob, await request.body())
        lines = (json.dumps(example).encode() for example in inline.examples)
        settled = await asyncio.to_thread(take_in, inline.spec, lines)
    try:
        return await _jobs(request).create(settled, id=job_id)
    except BaseException:
        shutil.rmtree(folder)
        raise


@router.get("")
async def list_jobs(request: Request) -> JobList:
    """All jobs that this release can read, newest first."""
    return JobList(data=await _jobs(request).list())


@router.get("/{job}")
async def get_job(job: str, request: Request) -> Job:
    """State, round, the round's counts per stage, and what went wrong if something did."""
    return await _jobs(request).get(job)


@router.post("/{job}/cancel")
async def cancel_job(job: str, request: Request) -> Job:
    """Ends a job; its prompts in the queue are dropped, its artifacts so far stay."""
    return await _jobs(request).cancel(job)


@router.get("/{job}/pairs", response_class=StreamingResponse)
async def get_pairs(job: str, request: Request) -> Response:
    """The Pareto pairs of all rounds so far (D^c of section 3.3, whatever `preferences` the job trains on), as JSONL in TRL's
    columns: prompt, chosen, rejected.

    Then round, and objective where a pair is for one only.
    """
    files = await _files(request, job)
    return StreamingResponse(_pairs(files.decisions), media_type=JSONL)


@router.get("/{job}/candidates", response_class=StreamingResponse)
async def get_candidates(job: str, request: Request) -> Response:
    """The decisions so far, as JSONL: per prompt and round all candidates with their rewards and why they were rejected."""
    files = await _files(request, job)
    return StreamingResponse(whole_lines(files.decisions), media_type=JSONL)


@router.get("/{job}/report", response_class=FileResponse)
async def get_report(job: str, request: Request) -> Response:
    """What the job came to so far, round by round, as JSON."""
    report = (await _files(request, job)).report
    if not report.is_file():
        raise NotFound(f"{job} has no report yet: it is written when every prompt of the first round is decided")
    return FileResponse(report, media_type="application/json")


def _jobs(request: Request) -> JobStore:
    jobs: JobStore = request.app.state.jobs
    return jobs


def _folder(request: Request, job: str) -> Path:
    settings: GatewaySettings = request.app.state.settings
    return settings.jobs_dir / job


async def _files(request: Request, job: str) -> JobFiles:
    known = await _jobs(request).get(job)  # so that no path is made of what a caller wrote
    return JobFiles(_folder(request, known.id))


def _parse(model: type[M], text: str | bytes, param: str = "") -> M:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in (param, *first["loc"]) if part != "")
        raise InvalidRequest(f"{path}: {first['msg']}" if path else first["msg"], param=path or None) from error


def _take_in(policies: PolicyStore, settings: GatewaySettings, folder: Path, spec: JobSpec, lines: Iterable[bytes]) -> JobSpec:
    examples = list(read_lines(lines))
    settled = settle_spec(spec, examples, policies, settings.reward_models, settings.teachers)
    store_input(folder, examples)
    return settled


def _pairs(decisions: Path) -> Iterator[str]:
    for decision in read_decisions(decisions):
        for candidate, objective in decision.accepted():
            only = {} if objective is None else {"objective": objective}
            for pair in pareto_pairs(decision.example, candidate.text, objective):
                yield json.dumps(asdict(pair) | {"round": decision.round} | only) + "\n"

"""The job endpoints: create (input uploaded or inline, never a path of ours), look, cancel, fetch what came out, and forget.

The gateway creates jobs and asks for their end; all else about a job is the trainer's. Artifacts are read from the job's folder,
where the trainer writes them.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import FormData, UploadFile

from gateway.folders import remove_folder
from gateway.jobs.account import account
from gateway.jobs.decisions import read_decisions, whole_lines
from gateway.jobs.held_out import held_out_prompts
from gateway.jobs.input import settle_spec, store_input
from gateway.jobs.limits import check_limits, decoder_limits
from gateway.routes.bodies import parse
from gateway.routes.queue import STREAMS_BY_NAME
from gateway.settings import GatewaySettings
from services.common.contract.evaluation_store import EvaluationStore
from services.common.contract.evaluations import shown_files
from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job, JobStore, new_job_id
from services.common.contract.jobs import JobSpec
from services.common.queue import Queue
from services.common.web.app import JSONL
from sipo.datasets import Dataset, joined
from sipo.datasets.files import rows_of
from sipo.datasets.formats import dataset_of
from sipo.datasets.rows import Row
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.prompts import TestPrompt
from sipo.evaluation.task import TaskFolder
from sipo.preferences import Example
from sipo.selection import pareto_pairs

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class Read(Protocol):
    """Reads the data of a body; `held_out`: with the rows that their `split` holds out of training. Raises InvalidData."""

    def __call__(self, *, held_out: bool = False) -> Dataset: ...


class InlineJob(BaseModel):
    """A job with its input in the body: rows as a JSONL file would have them, in any format that is known."""

    model_config = ConfigDict(extra="forbid")

    spec: JobSpec
    examples: list[Any]


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
                    "required": ["spec"],
                    "properties": {
                        "spec": {"type": "string", "description": "a JobSpec as JSON, as text or as a file"},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL, a JSON array, CSV or Parquet. Or a file of pairs for each objective, each under "
                            "the objective's name.",
                        },
                    },
                    "additionalProperties": {"type": "string", "format": "binary"},
                }
            },
        },
    }
}


@router.post("", status_code=201, openapi_extra=_BODIES)
async def create_job(request: Request) -> Job:
    """Takes the input whole, checks all of it, and queues the job; or refuses it and keeps nothing. The job's `notes` say what was
    left out of the input, and what looks wrong in it."""
    settings: GatewaySettings = request.app.state.settings
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form() as form:
            spec, read = await _of_form(form)
    else:
        inline = _inline(await request.body())
        spec, read = inline.spec, partial(_of_rows, inline.examples)
    dataset = await asyncio.to_thread(read)
    examples = dataset.labelled()
    settled = await asyncio.to_thread(
        settle_spec, spec, examples, request.app.state.policies, settings.reward_models, settings.teachers
    )
    limits = await decoder_limits(request.app.state.decoder)
    notes = check_limits(settled, limits)
    notes += await asyncio.to_thread(account, settled, examples, dataset.left_out, settings, limits)
    held_out: list[TestPrompt] = []
    if settled.evaluation is not None:
        every = (await asyncio.to_thread(read, held_out=True)).labelled()
        machine = await _evaluations(request).machine()
        held_out = await asyncio.to_thread(held_out_prompts, settled, examples, every, settings, machine)
    job_id = new_job_id()
    folder = _folder(request, job_id)
    await asyncio.to_thread(store_input, folder, examples, held_out)
    try:
        return await _jobs(request).create(settled, id=job_id, notes=notes)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _inline(body: bytes) -> InlineJob:
    try:
        return parse(InlineJob, body)
    except InvalidRequest as error:
        if "." in (error.param or ""):  # within the specification or a row: the body's form is right
            raise
        raise InvalidRequest(
            f"{error.message}; a job is JSON with `spec` and `examples`, or a form (multipart/form-data) with the field `spec` and "
            "the file `file`",
            param=error.param,
        ) from error


async def _of_form(form: FormData) -> tuple[JobSpec, Read]:
    """The field `spec`, as text or as a file, and either one file `file` or a file of pairs for each objective, by its name."""
    spec, files = "", []
    for name, part in form.multi_items():
        if name == "spec":
            spec = part if isinstance(part, str) else (await part.read()).decode("utf-8-sig", errors="replace")
        elif isinstance(part, UploadFile):
            files.append((name, part.filename or "", await part.read()))
        else:
            raise InvalidRequest(f"the form's field {name!r} is a text: data comes as a file, in curl -F {name}=@FILE", param=name)
    if not spec:
        raise InvalidRequest("the form needs a field `spec`: the job's specification as JSON", param="spec")
    if not files:
        raise InvalidRequest("the form needs a file `file`: the job's data, or a file of pairs for each objective", param="file")
    return parse(JobSpec, spec, "spec"), partial(_of_files, files)


def _of_rows(rows: Sequence[object], *, held_out: bool = False) -> Dataset:
    return dataset_of([Row.checked(number, row) for number, row in enumerate(rows, start=1)], held_out=held_out)


def _of_files(files: Sequence[tuple[str, str, bytes]], *, held_out: bool = False) -> Dataset:
    parts = []
    for name, filename, content in files:
        dataset = dataset_of(rows_of(content, filename), held_out=held_out)
        parts.append(dataset if name == "file" else dataset.of_objective(name))
    return joined(parts)


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


@router.delete("/{job}", status_code=204)
async def delete_job(job: str, request: Request) -> None:
    """Forgets a job that has ended: its messages, its folder and, last, its record, so that one that was interrupted is done by
    asking again. The policy sets that it published stay."""
    known = await _jobs(request).deletable(job)
    queue: Queue = request.app.state.queue
    await queue.discard(known.id, dict(STREAMS_BY_NAME.values()))
    await asyncio.to_thread(remove_folder, _folder(request, known.id))
    await _jobs(request).delete(known.id)


@router.get("/{job}/pairs", response_class=StreamingResponse)
async def get_pairs(job: str, request: Request) -> Response:
    """The Pareto pairs of all rounds so far (D^c of section 3.3, whatever `preferences` the job trains on), as JSONL in TRL's
    columns: prompt, chosen, rejected; as lists of messages where one of the job's prompts is a conversation.

    Then round, and objective where a pair is for one only.
    """
    files = await _files(request, job)
    return StreamingResponse(_pairs(files), media_type=JSONL)


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


@router.get("/{job}/report.html", response_class=FileResponse)
async def get_page(job: str, request: Request) -> Response:
    """The same for people, and the trainings' curves: a page that stands alone."""
    page = (await _files(request, job)).page
    if not page.is_file():
        raise NotFound(f"{job} has no page yet: it is written when every prompt of the first round is decided")
    return FileResponse(page, media_type="text/html")


@router.get("/{job}/evaluations/{round}/{file}", response_class=FileResponse)
async def get_evaluation_file(job: str, round: int, file: str, request: Request) -> Response:
    """Of the evaluation of a round: report.json, index.html, which stands alone, or a picture."""
    files = await _files(request, job)
    front = TaskFolder(files.evaluation(round)).front
    shown = shown_files(front) if files.evaluation_outcome(round).exists() and front.is_dir() else []
    if file not in shown:
        there = ", ".join(shown) or "none"
        raise NotFound(f"the evaluation of round {round} of {job} has no file {file!r}: its files are {there}")
    return FileResponse(front / file)


def _evaluations(request: Request) -> EvaluationStore:
    store: EvaluationStore = request.app.state.evaluations
    return store


def _jobs(request: Request) -> JobStore:
    jobs: JobStore = request.app.state.jobs
    return jobs


def _folder(request: Request, job: str) -> Path:
    settings: GatewaySettings = request.app.state.settings
    return settings.jobs_dir / job


async def _files(request: Request, job: str) -> JobFiles:
    known = await _jobs(request).get(job)  # so that no path is made of what a caller wrote
    return JobFiles(_folder(request, known.id))


def _pairs(files: JobFiles) -> Iterator[str]:
    with files.input.open() as file:
        conversational = any(not isinstance(Example.model_validate_json(line).prompt, str) for line in file)
    for decision in read_decisions(files.decisions):
        for candidate, objective in decision.accepted():
            only = {} if objective is None else {"objective": objective}
            for pair in pareto_pairs(decision.example, candidate.text, objective):
                yield json.dumps(pair.columns(conversational=conversational) | {"round": decision.round} | only) + "\n"

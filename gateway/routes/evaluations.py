"""The evaluation endpoints: ask for fronts of policy sets, look, cancel, fetch the report and its page, and forget.

The gateway checks an evaluation and writes its prompts; all else is the trainer's, which has the machine.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile

from gateway.evaluations.prompts import inline_prompts, uploaded_prompts
from gateway.evaluations.settle import settle
from gateway.folders import remove_folder, write_folder
from gateway.routes.bodies import parse
from gateway.settings import GatewaySettings
from services.common.contract.evaluation_store import KIND, Evaluation, EvaluationStore
from services.common.contract.evaluations import EvaluationSpec
from sipo.conversation import Prompt
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.prompts import TestPrompt
from sipo.evaluation.task import TaskFolder

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"])


class InlineEvaluation(BaseModel):
    """An evaluation with its prompts in the body."""

    model_config = ConfigDict(extra="forbid")

    spec: EvaluationSpec
    prompts: Literal["bundled"] | list[Prompt] = Field(
        description="texts or conversations; bundled: the evaluation prompts that ship with the project"
    )


class EvaluationList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Evaluation]


_BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": InlineEvaluation.model_json_schema(ref_template="#/components/schemas/{model}")},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["spec", "file"],
                    "properties": {
                        "spec": {"type": "string", "description": "an EvaluationSpec as JSON, as text or as a file"},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "a text file with a prompt a line, rows with a `prompt`, or any data",
                        },
                    },
                }
            },
        },
    }
}


@router.post("", status_code=201, openapi_extra=_BODIES)
async def create_evaluation(request: Request) -> Evaluation:
    """Checks all that can be known before anything is generated, and queues it; or refuses it and keeps nothing. `runs_on` says on
    what it will run, and what it needs of the memory there."""
    settings: GatewaySettings = request.app.state.settings
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form() as form:
            spec, prompts = await _of_form(form)
    else:
        inline = parse(InlineEvaluation, await request.body())
        spec, prompts = inline.spec, await asyncio.to_thread(inline_prompts, inline.prompts)
    prompts = prompts[: spec.max_prompts]
    machine = await _store(request).machine()
    settled, needs = await asyncio.to_thread(settle, spec, prompts, settings, machine)
    folder = _folder(request, KIND.new_id())
    await asyncio.to_thread(write_folder, folder.path, {folder.prompts_file.name: prompts})
    try:
        return await _store(request).create(settled, id=folder.path.name, prompts=len(prompts), runs_on=needs)
    except BaseException:
        shutil.rmtree(folder.path)
        raise


async def _of_form(form: FormData) -> tuple[EvaluationSpec, list[TestPrompt]]:
    spec, file = form.get("spec"), form.get("file")
    if isinstance(spec, UploadFile):
        spec = (await spec.read()).decode("utf-8-sig", errors="replace")
    if not spec:
        raise InvalidRequest("the form needs a field `spec`: the evaluation's specification as JSON", param="spec")
    if not isinstance(file, UploadFile):
        raise InvalidRequest("the form needs a file `file`: the prompts, in curl -F file=@FILE", param="file")
    parsed = parse(EvaluationSpec, spec, "spec")
    return parsed, await asyncio.to_thread(uploaded_prompts, await file.read(), file.filename or "")


@router.get("")
async def list_evaluations(request: Request) -> EvaluationList:
    """All evaluations that this release can read, newest first."""
    return EvaluationList(data=await _store(request).list())


@router.get("/{evaluation}")
async def get_evaluation(evaluation: str, request: Request) -> Evaluation:
    """State, progress, and what went wrong if something did."""
    return await _store(request).get(evaluation)


@router.post("/{evaluation}/cancel")
async def cancel_evaluation(evaluation: str, request: Request) -> Evaluation:
    """Ends an evaluation; its process is told within a second."""
    return await _store(request).cancel(evaluation)


@router.delete("/{evaluation}", status_code=204)
async def delete_evaluation(evaluation: str, request: Request) -> None:
    """Forgets an evaluation that has ended: its folder and, last, its record."""
    known = await _store(request).deletable(evaluation)
    await asyncio.to_thread(remove_folder, _folder(request, known.id).path)
    await _store(request).delete(known.id)


@router.get("/{evaluation}/{file}", response_class=FileResponse)
async def get_file(evaluation: str, file: str, request: Request) -> Response:
    """One of the artifacts of a completed evaluation: report.json, index.html, which stands alone, or a picture."""
    known = await _store(request).get(evaluation)  # so that no path is made of what a caller wrote
    if file not in known.artifacts:
        there = ", ".join(known.artifacts) or "none before it is completed"
        raise NotFound(f"{known.id} is {known.state} and has no file {file!r}: its files are {there}")
    return FileResponse(_folder(request, known.id).front / known.artifacts[file])


def _store(request: Request) -> EvaluationStore:
    store: EvaluationStore = request.app.state.evaluations
    return store


def _folder(request: Request, evaluation: str) -> TaskFolder:
    settings: GatewaySettings = request.app.state.settings
    return TaskFolder(Path(settings.evaluations_dir, evaluation))

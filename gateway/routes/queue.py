"""The queue endpoints, for operators: how much lies where, which messages are dead and why, and another try for those that count.

A dead message has gone on as a failed decision already. Put back and decided, it takes that decision's place, as long as its
round is open; one that can change nothing any more stays where it is. What a message holds is shown nowhere here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.common.contract.job_store import Job, JobStore
from services.common.contract.jobs import JobState
from services.common.contract.keys import CANDIDATES, DECISIONS, PROMPTS
from services.common.contract.messages import Message, PromptDecided, PromptQueued, PromptSampled
from services.common.queue import DeadLetter, Queue
from sipo.errors import InvalidRequest, NotFound

router = APIRouter(prefix="/v1/queue", tags=["queue"])

StreamName = Literal["prompts", "candidates", "decisions"]
STREAMS_BY_NAME: Final[dict[StreamName, tuple[str, type[Message]]]] = {
    "prompts": (PROMPTS, PromptQueued),
    "candidates": (CANDIDATES, PromptSampled),
    "decisions": (DECISIONS, PromptDecided),
}


class StreamDepth(BaseModel):
    """Messages of a stream, by where they are."""

    waiting: int
    held: int = Field(description="in some consumer's hands")
    dead: int


class DeadMessage(BaseModel):
    """`job`, `round` and `prompt` are None where the message cannot be read."""

    stream: StreamName = Field(description="where it died, and where it goes when it is put back")
    entry: str = Field(
        description="its id among the stream's dead messages: when it died, in ms, and a number", examples=["1759300000000-0"]
    )
    job: str | None = None
    round: int | None = None
    prompt: str | None = None
    reason: str
    tries: int


class DeadMessages(BaseModel):
    object: Literal["list"] = "list"
    data: list[DeadMessage]


class Requeue(BaseModel):
    """Which dead messages to put back: those that all given fields match; `{}` means all."""

    model_config = ConfigDict(extra="forbid")

    stream: StreamName | None = None
    job: str | None = None
    entries: list[str] | None = Field(default=None, min_length=1, examples=[["1759300000000-0"]])


class Stayed(BaseModel):
    stream: StreamName
    entry: str
    why: str


class Requeued(BaseModel):
    requeued: int
    left: int = Field(description="those that matched and stayed dead")
    stayed: list[Stayed] = Field(description="why, one for each that is left")


@router.get("")
async def get_queue(request: Request) -> dict[StreamName, StreamDepth]:
    """How many messages of each stream wait, are held, and are dead."""
    depths = await _queue(request).depths()
    return {name: StreamDepth(**depths[stream]._asdict()) for name, (stream, _) in STREAMS_BY_NAME.items()}


@router.get("/dead")
async def list_dead(request: Request, job: str | None = None) -> DeadMessages:
    """The dead messages, oldest first; all, or those of a job."""
    return DeadMessages(data=await _dead(request, Requeue(job=job)))


@router.post("/requeue")
async def requeue(body: Requeue, request: Request) -> Requeued:
    """Puts dead messages back, untried. Those stay that would only die again, or whose decision would come too late."""
    queue = _queue(request)
    chosen = await _dead(request, body)
    _check_entries(body.entries or [], chosen)
    jobs = {job.id: job for job in await _jobs(request).list()}
    reasons = [why_it_stays(message, jobs) for message in chosen]
    stayed = [_stayed(message, why) for message, why in zip(chosen, reasons, strict=True) if why]
    requeued = 0
    for name, (stream, _) in STREAMS_BY_NAME.items():
        going = [message for message, why in zip(chosen, reasons, strict=True) if message.stream == name and not why]
        moved = await queue.requeue(stream, [message.entry for message in going])
        if moved < len(going):  # those that are there no more, another operator has put back
            still_dead = {entry for entry, _ in await queue.dead(stream)}
            full = f"there is no room in {name}: try again when some of it is done"
            stayed += [_stayed(message, full) for message in going if message.entry in still_dead]
        requeued += moved
    return Requeued(requeued=requeued, left=len(stayed), stayed=stayed)


def why_it_stays(message: DeadMessage, jobs: Mapping[str, Job]) -> str | None:
    """None if it can still become a decision that counts."""
    if message.job is None:
        return "it cannot be read, so it would only die again"
    job = jobs.get(message.job)
    if job is None:
        return f"there is no job {message.job} that this release reads"
    if job.state.ended:
        return f"{job.id} is {job.state}, so it would be dropped"
    if job.state != JobState.GENERATING or job.round != message.round:
        return f"round {message.round} of {job.id} is closed, so its decision would come too late"
    return None


def _check_entries(entries: Sequence[str], chosen: Sequence[DeadMessage]) -> None:
    times = Counter(message.entry for message in chosen)
    if unknown := [entry for entry in entries if not times[entry]]:
        hint = "GET /v1/queue/dead lists what there is"
        raise NotFound(f"not among the dead messages that were asked for: {', '.join(unknown)}; {hint}", param="entries")
    if shared := [entry for entry in entries if times[entry] > 1]:  # what dies in the same ms has the same id in each stream
        raise InvalidRequest(f"more than one stream has a dead message {', '.join(shared)}: give the stream too", param="stream")


def _stayed(message: DeadMessage, why: str) -> Stayed:
    return Stayed(stream=message.stream, entry=message.entry, why=why)


async def _dead(request: Request, wanted: Requeue) -> list[DeadMessage]:
    """Those that match, oldest first. NotFound for a job that nobody knows, so that a slip is not taken for good news."""
    if wanted.job is not None:
        await _jobs(request).get(wanted.job)
    messages = [
        _describe(name, entry, letter)
        for name, (stream, _) in STREAMS_BY_NAME.items()
        if wanted.stream in (None, name)
        for entry, letter in await _queue(request).dead(stream)
        if wanted.entries is None or entry in wanted.entries
    ]
    matching = [message for message in messages if wanted.job in (None, message.job)]
    return sorted(matching, key=lambda message: tuple(map(int, message.entry.split("-"))))


def _describe(name: StreamName, entry: str, letter: DeadLetter) -> DeadMessage:
    dead = DeadMessage(stream=name, entry=entry, reason=letter.reason, tries=letter.tries)
    _, model = STREAMS_BY_NAME[name]
    try:
        message = model.model_validate_json(letter.data)
    except ValidationError:
        return dead
    return dead.model_copy(update={"job": message.job, "round": message.round, "prompt": message.prompt})


def _queue(request: Request) -> Queue:
    queue: Queue = request.app.state.queue
    return queue


def _jobs(request: Request) -> JobStore:
    jobs: JobStore = request.app.state.jobs
    return jobs

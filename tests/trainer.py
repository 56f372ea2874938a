"""Jobs through the trainer on a real queue server, with a quick stand-in for the training process: see `stand_in`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from redis.asyncio import Redis
from safetensors.torch import save_file

from services.common.background import end_tasks
from services.common.contract.job_store import Job, JobStore
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.keys import DECISIONS
from services.common.contract.messages import Candidate, PromptDecided, ScoredCandidate
from services.common.contract.reports import Report
from services.common.local.training import Tell
from services.common.queue import Consumer, Queue
from services.common.web.clients import DecoderClient
from services.trainer.lifecycle import Lifecycle
from services.trainer.rounds import Stages
from sipo.policies import Draft
from sipo.preferences import Example, uniform_weights
from sipo.selection import Chosen
from sipo.training.run_folder import RECIPE, RunFolder, read_any_run
from sipo.training.settings import Measure, Progress, SftMetrics, SftRun, TrainMetrics, TrainSettings
from support import PATIENCE

OBJECTIVES = ["concise", "warm"]
QUICK = TrainSettings(lora_rank=4, lora_alpha=8, batch_size=2)
PROMPTS = 3


def example(row: int) -> Example:
    return Example(prompt=f"q{row}", response_0=f"a{row}", response_1=f"b{row}", labels={"concise": 0, "warm": 1})


def decision(job: str, row: int, *, accepted: bool = True, objective: str | None = None, round_: int = 1) -> PromptDecided:
    candidate = Candidate(
        text=f"best {row}", token_ids=[5, 6, row, 0], finish_reason="stop", weights=uniform_weights(OBJECTIVES), stage="sample"
    )
    rejected = None if accepted else "worse_than_original: warm -0.1 against response_0"
    return PromptDecided(
        job=job,
        round=round_,
        prompt=str(row),
        outcome="accepted" if accepted else "none",
        example=example(row),
        chosen=[Chosen(candidate=0, objective=objective)] if accepted else [],
        candidates=[ScoredCandidate(candidate=candidate, rewards=None, rejected=rejected)],
    )


def write_adapter(folder: Path) -> Path:
    """A PEFT adapter for the tiny base, with random values."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    halves = {"A": (4, 32), "B": (32, 4)}
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight": torch.randn(shape) / 8
        for layer in range(2)
        for half, shape in halves.items()
    }
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


TUNED = SftMetrics(
    rows=6,
    validation_rows=0,
    prompts_too_long=0,
    responses_cut=0,
    steps=1,
    best_step=1,
    micro_batch_size=1,
    seconds=0,
    dtype="float32",
    loss_before=2,
    loss_after=1,
)
"""What stand_in says of a fine-tuning."""


def stand_in(adapter: Path, made: list[str]) -> Callable[[Path, Tell], Awaitable[TrainMetrics | None]]:
    """A training process that copies an adapter, and adds its run to `made`, as "round-0/warm"."""

    async def run_child(path: Path, tell: Tell, *_: Any) -> TrainMetrics | None:
        folder = RunFolder(path.parent)
        run = read_any_run(path)
        made.append(f"{path.parent.parent.name}/{path.parent.name}")
        if isinstance(run, SftRun):
            await tell(Progress(objective="sft", stage="training", step=1, of=1, seconds_left=0, loss=0.5))
            await asyncio.to_thread(_copy, adapter, folder.adapter)
            (folder.adapter / RECIPE).write_text(TUNED.model_dump_json())
            return None
        await tell(Progress(objective=run.objective, stage="training", step=1, of=1, seconds_left=0, loss=0.5))
        await asyncio.to_thread(_copy, adapter, folder.adapter)
        measure = Measure(loss=0.5, margin=0, accuracy=1)
        metrics = TrainMetrics(
            objective=run.objective,
            pairs=1,
            validation_pairs=1,
            held_out=False,
            prompts_too_long=0,
            identical=0,
            responses_cut=0,
            steps=1,
            best_step=1,
            micro_batch_size=1,
            seconds=0,
            dtype="float32",
            before=measure,
            after=measure,
        )
        folder.finish(metrics)
        return metrics

    return run_child


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def policies(stages: Stages, adapter: Path, objectives: Sequence[str] = OBJECTIVES, **fields: Any) -> str:
    """The next set of "demo", made current."""
    base = stages.base
    draft = Draft(name="demo", base=base.ref, prompt_format=base.prompt_format, objectives=list(objectives), beta=0.1, **fields)
    return stages.store.publish(draft, dict.fromkeys(objectives, adapter), base.folder, activate=True).id


async def submit(
    redis: Redis, stages: Stages, *, objectives: Sequence[str] = OBJECTIVES, total: int | None = PROMPTS, **spec: Any
) -> Job:
    """`total` is the feeder's to tell: None where one runs."""
    settled = JobSpec(policy="demo", objectives=list(objectives), alignment=QUICK, training=QUICK, **spec)
    job = await JobStore(redis).create(settled, total=total)
    files = stages.files(job)
    await asyncio.to_thread(files.folder.mkdir, parents=True)
    files.input.write_text("".join(example(row).model_dump_json() + "\n" for row in range(PROMPTS)))
    return job


async def decide(redis: Redis, job: Job, *, accepted: bool = True) -> None:
    for row in range(PROMPTS):
        await Queue(redis).put(DECISIONS, decision(job.id, row, accepted=accepted))


@asynccontextmanager
async def trainer(redis: Redis, stages: Stages, decoders: Sequence[DecoderClient] = ()) -> AsyncIterator[None]:
    jobs = JobStore(redis)
    async with jobs.lease("trainer", 60) as lease:
        lifecycle = Lifecycle(stages, jobs, lease, decoders)
        async with Consumer(redis, DECISIONS, model=PromptDecided, batch=8).running(lifecycle.keep):
            task = asyncio.create_task(lifecycle.run())
            try:
                yield
            finally:
                await end_tasks(task)


async def until(redis: Redis, job: Job, *states: JobState, seconds: float = PATIENCE) -> Job:
    async with asyncio.timeout(seconds):
        while (found := await JobStore(redis).get(job.id)).state not in states:
            assert not found.state.ended, found.error
            await asyncio.sleep(0.05)
    return found


def report_of(stages: Stages, job: Job) -> Report:
    return Report.model_validate_json(stages.files(job).report.read_text())

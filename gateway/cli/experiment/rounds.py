"""A round step: the whole system on a data folder of the step's own, and one job on it, from the policies of an earlier step."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from gateway.cli.client import Gateway
from gateway.cli.console import console
from gateway.cli.data import tell
from gateway.cli.experiment.training import round_runs, trained_tokens
from gateway.cli.experiment.workplace import Made, Workplace, policy_set, store, take_over
from gateway.cli.jobs import submit_files
from gateway.cli.progress import watch_job
from gateway.cli.up import announce
from gateway.experiments.definition import Round
from gateway.experiments.plan import Step
from gateway.experiments.published import DATA, JOB_REPORT
from gateway.experiments.result import Tokens
from gateway.jobs.limits import slots_needed
from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job
from services.common.contract.jobs import JobSpec, JobState
from services.common.contract.messages import PromptDecided
from services.common.local.processes import free_ports
from services.common.local.stack import stack_specs
from services.common.local.supervisor import ProcessSpec, Supervisor
from sipo.conversation import Prompt
from sipo.errors import InvalidRequest, SipoError


def run_round(at: Workplace, step: Step, stage: Round) -> Made:
    """Raises SipoError for a job that published nothing, with its reason."""
    start = policy_set(step.uses["start"])
    take_over(start, store(step))
    spec = at.plan.experiment.job(stage, step.training_seed).model_copy(update={"sampling_set": start.id})
    job, states = asyncio.run(_with_system(at, step, stage, spec))
    files = JobFiles(step.folder / DATA / "jobs" / job.id)
    if job.state != JobState.COMPLETED or job.policy_set is None:
        why = job.error or job.reason
        raise SipoError(f"{step.name}: {job.id} {job.state}, no policies were published: {why}; see {files.folder}")
    shutil.copy(files.report, step.folder / JOB_REPORT)
    with files.decisions.open() as lines:
        counted = decided_tokens(at, (PromptDecided.model_validate_json(line) for line in lines))
    runs = [run for objective in start.objectives for run in round_runs(step, objective)]
    tokens = counted.model_copy(update={"trained": sum(trained_tokens(at, run) for run in runs)})
    return Made(tokens, states, job.policy_set)


async def _with_system(at: Workplace, step: Step, stage: Round, spec: JobSpec) -> tuple[Job, dict[str, float]]:
    """Starts the system, sees the job to its end, and stops the system."""
    if "redis_url" in at.settings.model_fields_set:
        raise InvalidRequest("each round of an experiment has a queue of its own: unset SIPO_REDIS_URL", param="redis_url")
    [port] = free_ports(1)
    settings = at.settings.model_copy(
        update={"data_dir": step.folder / DATA, "host": "127.0.0.1", "model": at.plan.experiment.base}
    )
    specs = _with_own(stack_specs(settings, gateway_port=port), stage, spec)
    url = f"http://{settings.host}:{port}"
    async with Supervisor(specs, settings.data_dir, on_progress=announce(specs, f"the system runs at {url}")) as system:
        # The job is watched with blocking calls, beside the supervisor that keeps the processes.
        work = asyncio.create_task(asyncio.to_thread(see_through, Gateway(url), spec, at.data_file(step)))
        work.add_done_callback(lambda task: task.cancelled() or task.exception())
        ended = asyncio.create_task(system.wait())
        await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()  # raises why
        ended.cancel()
        return await work


def _with_own(specs: Sequence[ProcessSpec], stage: Round, spec: JobSpec) -> list[ProcessSpec]:
    """With the reward models of the stage, and a slot for each policy."""
    assert spec.objectives is not None
    own = {
        "SIPO_REWARD_MODELS": json.dumps(stage.reward_models),
        "SIPO_DECODER_SLOTS": str(slots_needed(spec.objectives, spec.mode)),
    }
    return [replace(one, env={**one.env, **own}) for one in specs]


def see_through(gateway: Gateway, spec: JobSpec, data: Path, *, every: float = 1.0) -> tuple[Job, dict[str, float]]:
    """Posts the job, or finds the one that was posted before the step was stopped, and waits for its end. Returns it with the
    seconds that it was seen in each state."""
    known = [Job.model_validate(row) for row in gateway.get("/v1/jobs")["data"]]
    job = next((one for one in known if one.state not in (JobState.FAILED, JobState.CANCELLED)), None)
    if job is None:
        job = submit_files(gateway, spec, [str(data)])
        tell(job.notes)
    console.print(f"job {job.id}", markup=False)
    seconds: Counter[str] = Counter()
    seen, at = job, time.monotonic()

    def fetch() -> Job:
        nonlocal seen, at
        now = time.monotonic()
        seconds[seen.state] += now - at  # type: ignore[assignment]  # a counter of seconds
        seen, at = gateway.job(job.id), now
        return seen

    ended = watch_job(fetch, every=every)
    return ended, {str(state): round(spent, 1) for state, spent in seconds.items()}


def decided_tokens(at: Workplace, decisions: Iterable[PromptDecided]) -> Tokens:
    """Generated: candidates that the policies made, and reviews. Scored: prompt, originals and candidates with rewards, by every
    policy, every soup and the reference."""
    tokenizer, template = at.base.tokenizer, at.base.prompt_format

    def length(text: str) -> int:
        return len(template.response_ids(text, tokenizer))

    def of_prompt(prompt: Prompt) -> int:
        return len(template.prompt_ids(prompt, tokenizer))

    generated = scored = 0
    for decision in decisions:
        made = [one.candidate for one in decision.candidates if one.candidate.stage != "distilled"]
        generated += sum(len(one.token_ids) + (length(one.review) if one.review else 0) for one in made)
        if decision.rewards_0 is not None:
            whole = [one.candidate for one in decision.candidates if one.rewards is not None]
            texts = length(decision.example.response_0) + length(decision.example.response_1)
            read = of_prompt(decision.example.prompt) + texts + sum(len(one.token_ids) for one in whole)
            scored += read * (len(decision.rewards_0) + 1)
    return Tokens(generated=generated, scored=scored)

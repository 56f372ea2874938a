"""`sipo demo`: one round of self-improvement, end to end on the real system; at the end stands what changed."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.client import Gateway
from gateway.cli.console import console
from gateway.cli.data import tell
from gateway.cli.demo.input import DemoInput, bundled_input, own_input
from gateway.cli.demo.results import show_answers, show_fronts, show_report
from gateway.cli.jobs import submit_files, tell_current
from gateway.cli.progress import watch_job
from gateway.cli.up import announce
from gateway.settings import GatewaySettings
from services.common.contract.job_files import JobFiles
from services.common.contract.job_store import Job
from services.common.contract.jobs import JobState
from services.common.contract.reports import Report
from services.common.local.processes import free_ports
from services.common.local.stack import stack_specs
from services.common.local.supervisor import Supervisor
from services.common.settings import load
from sipo.errors import InvalidRequest, NotFound


def demo(
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Any data of `sipo conflicts`. Default: bundled.")] = None,
    objectives: Annotated[str | None, typer.Option(help="With --data: a,b. Default: all labels of the file.")] = None,
    max_pairs: Annotated[int, typer.Option(min=1, help="With --data: training pairs per objective for the first policies.")] = 160,
) -> None:
    """Run one SIPO round on conflicting prompts with the whole system, and print what came of it.

    Starts everything on free ports, posts a job to the gateway, and stops everything at the end. On the bundled data the fronts of
    the policies before and after are measured, on prompts that nothing was trained on. With --data one policy per objective is
    aligned first. Exits 1 if no prompt gave a pair.

    Examples:

      sipo demo

      sipo demo --data pairs.jsonl --objectives quality,conciseness --max-pairs 160
    """
    began = time.monotonic()
    settings = load(GatewaySettings, writes=True).model_copy(update={"host": "127.0.0.1"})
    if data is None and objectives is not None:
        raise InvalidRequest("--objectives goes with --data: the bundled data has its own")
    names = objectives and [name.strip() for name in objectives.split(",")]
    source = own_input(settings, data, names or None, max_pairs) if data else bundled_input(settings)
    console.print(
        f"conflicts found: {source.conflicting} of {source.offered} examples conflict on {', '.join(source.objectives)}; "
        f"the round runs on {source.round_prompts} of them"
    )
    job = asyncio.run(run_round(settings, source))
    console.print(f"wall time: {time.monotonic() - began:.0f} s")
    if job.state != JobState.COMPLETED or not job.counts.accepted:
        raise typer.Exit(1)


async def run_round(settings: GatewaySettings, source: DemoInput) -> Job:
    """Starts the system, runs the job on it, shows what came of it, and stops the system."""
    [port] = free_ports(1)
    specs = stack_specs(settings, gateway_port=port)
    url = f"http://{settings.host}:{port}"
    async with Supervisor(specs, settings.data_dir, on_progress=announce(specs, f"the system runs at {url}")) as system:
        # The round is watched with blocking calls, beside the supervisor that keeps the processes.
        round_ = asyncio.create_task(asyncio.to_thread(_round, Gateway(url), settings, source))
        # If the system ends first, by Ctrl-C or a failure, the round can only add that the gateway is gone: nobody hears it.
        round_.add_done_callback(lambda task: task.cancelled() or task.exception())
        ended = asyncio.create_task(system.wait())
        await asyncio.wait({round_, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()  # raises why
        ended.cancel()
        return await round_


def _round(gateway: Gateway, settings: GatewaySettings, source: DemoInput) -> Job:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "examples.jsonl"
        rows = [example.model_dump(mode="json") for example in source.examples]
        rows += [example.model_dump(mode="json") | {"split": "test"} for example in source.held_out]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        job = submit_files(gateway, source.spec, [str(file)])
    console.print(f"posted as {job.id}")
    tell(job.notes)
    job = watch_job(lambda: gateway.job(job.id))
    report = None
    try:
        report = Report.model_validate(gateway.get(f"/v1/jobs/{job.id}/report"))
        show_report(report)
    except NotFound:  # it failed before there was anything to report
        console.print(f"logs: {settings.data_dir / 'logs'}")
    if job.error:
        console.print(f"{job.id} {job.state}: {job.error}", style="red", markup=False)
    if job.policy_set:
        prompt = next(example.prompt for example in source.examples if example.conflicting(source.objectives))
        show_answers(gateway, job.policy_set, source.objectives, prompt)
        tell_current(gateway, job.policy_set)
    files = JobFiles(settings.data_dir / "jobs" / job.id)
    console.print(f"\nartifacts: {files.folder} (decisions, report, training runs)", markup=False)
    console.print(f"policies:  {settings.data_dir / 'policies' / job.spec.policy}", markup=False)
    if report is not None:
        show_fronts(report, files)
    return job

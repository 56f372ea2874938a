"""`sipo jobs …`: submit, look at, watch and cancel jobs of a running gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from gateway.cli.client import DEFAULT_URL, Gateway, GatewayUrl
from gateway.cli.console import console
from gateway.cli.progress import watch_job
from services.common.contract.job_store import Job
from services.common.contract.jobs import JobSpec, JobState
from sipo.errors import InvalidRequest
from sipo.training.presets import Preset, read_preset

app = typer.Typer(no_args_is_help=True, help="Submit, watch and cancel jobs of a running gateway.")

JobId = Annotated[str, typer.Argument(help="As `sipo jobs list` prints it.")]


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL in our schema; it is uploaded.")],
    *,
    policy: Annotated[str | None, typer.Option(help="Policies to improve; aligned first if the name is new.")] = None,
    objectives: Annotated[str | None, typer.Option(help="concise,warm. Default: the policies', or the labels found.")] = None,
    examples: Annotated[str | None, typer.Option(help="conflicting (default), all or non_conflicting.")] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Only the first so many of the chosen examples.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds, each from the policies of the one before. Default: 1.")] = None,
    activate: Annotated[bool, typer.Option("--activate", help="Make the new policies current when they are done.")] = False,
    stop_after_pairs: Annotated[bool, typer.Option("--stop-after-pairs", help="Do not train: look at the pairs first.")] = False,
    preset: Annotated[
        str | None, typer.Option(help="Training settings: small, the default, or the paper's: beavertails, helpsteer.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="YAML or JSON with any field of a job.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show the progress.")] = False,
    url: GatewayUrl = DEFAULT_URL,
) -> None:
    """Submit a data set as a job and print the job's id. Options win over --spec, and --spec wins over --preset.

    Examples:

      sipo jobs submit pairs.jsonl --policy demo --max-prompts 16 --watch

      sipo jobs submit pairs.jsonl --policy mine --spec job.yaml
    """
    fields = _read_spec(spec)
    given = {
        "policy": policy,
        "objectives": objectives and [name.strip() for name in objectives.split(",")],
        "examples": examples,
        "max_prompts": max_prompts,
        "rounds": rounds,
        "activate": activate or None,
        "stop_after": "pairs" if stop_after_pairs else None,
    }
    wanted = JobSpec.model_validate(fields | {name: value for name, value in given.items() if value is not None})
    if preset is not None:
        wanted = _on_preset(read_preset(preset), wanted)
    gateway = Gateway(url)
    job = submit_file(gateway, wanted, file)
    console.print(job.id)
    if watch:
        _watch(gateway, job.id)


def submit_file(gateway: Gateway, spec: JobSpec, file: Path) -> Job:
    fields = {"spec": spec.model_dump_json(exclude_unset=True)}
    with file.open("rb") as content:
        return Job.model_validate(gateway.post("/v1/jobs", data=fields, files={"file": (file.name, content)}))


def _read_spec(spec: Path | None) -> dict[str, Any]:
    if spec is None:
        return {}
    try:
        fields = yaml.safe_load(spec.read_text())
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{spec} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{spec} holds no mapping of job fields")
    return fields


def _on_preset(preset: Preset, spec: JobSpec) -> JobSpec:
    """`spec` with the preset's settings, where it has none of its own."""
    given = spec.model_dump(exclude_unset=True)
    alignment, training = given.get("alignment", {}), given.get("training", {})
    rates = {} if "learning_rate" in training else preset.sipo_learning_rates  # those would win over it
    settings = {
        "alignment": preset.alignment.model_dump(exclude_unset=True) | alignment,
        "training": preset.sipo.model_dump(exclude_unset=True) | training,
    }
    return JobSpec.model_validate({"learning_rates": rates} | given | settings)


@app.command("list")
def list_jobs(url: GatewayUrl = DEFAULT_URL) -> None:
    """List all jobs, newest first."""
    table = Table("job", "state", "policy", "prompts", "accepted", "created", "result", box=None, header_style="bold")
    for entry in Gateway(url).get("/v1/jobs")["data"]:
        job = Job.model_validate(entry)
        prompts = "" if job.total is None else f"{job.counts.decided}/{job.total}"
        created, result = f"{job.created:%Y-%m-%d %H:%M}", job.policy_set or job.error or ""
        state = job.state if job.spec.rounds == 1 else f"{job.state} {job.round}/{job.spec.rounds}"
        table.add_row(job.id, state, job.spec.policy, prompts, str(job.counts.accepted), created, result)
    console.print(table if table.row_count else "no jobs yet: `sipo jobs submit FILE --policy NAME`")


@app.command()
def show(job: JobId, url: GatewayUrl = DEFAULT_URL) -> None:
    """Print all that is known about a job, as JSON."""
    console.print_json(Gateway(url).job(job).model_dump_json())


@app.command()
def watch(job: JobId, url: GatewayUrl = DEFAULT_URL) -> None:
    """Show a job's progress until it has ended. Exits 1 if it failed or was cancelled."""
    _watch(Gateway(url), job)


@app.command()
def cancel(job: JobId, url: GatewayUrl = DEFAULT_URL) -> None:
    """Stop a job; what it has written so far stays."""
    console.print(f"{job} is {Job.model_validate(Gateway(url).post(f'/v1/jobs/{job}/cancel')).state}")


def _watch(gateway: Gateway, job: str) -> None:
    ended = watch_job(lambda: gateway.job(job))
    outcome = ended.error or "; ".join(filter(None, (ended.policy_set, ended.reason)))
    console.print(f"{ended.id} {ended.state}: {outcome}", markup=False)
    if ended.state != JobState.COMPLETED:
        raise typer.Exit(1)

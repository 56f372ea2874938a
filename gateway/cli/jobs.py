"""`sipo jobs …`: submit, look at, watch, cancel and delete jobs of a running gateway, and fetch what they left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import IO, Annotated, Any

import typer
import yaml
from rich.table import Table

from gateway.cli.client import DEFAULT_URL, Gateway, GatewayUrl, job_path
from gateway.cli.console import complaints, console, printable
from gateway.cli.data import SOURCES, SOURCES_HELP, objective_and_file, tell
from gateway.cli.progress import watch_job
from services.common.contract.job_store import Job
from services.common.contract.jobs import JobSpec, JobState
from sipo.datasets import read
from sipo.errors import InvalidRequest, NotFound
from sipo.files import expanded
from sipo.training.presets import Preset, read_preset

app = typer.Typer(no_args_is_help=True, help="Submit, watch, cancel and delete jobs of a running gateway, and fetch their results.")

JobId = Annotated[str, typer.Argument(help="As `sipo jobs list` prints it.")]
Out = Annotated[Path | None, typer.Option(dir_okay=False, help="The file to write. Default: standard output.")]


@app.command()
def submit(
    files: Annotated[list[str], typer.Argument(metavar=SOURCES, help=SOURCES_HELP)],
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
    sft: Annotated[
        bool, typer.Option("--sft", help="Fine-tune on all responses before policies are aligned, with the preset's settings.")
    ] = False,
    spec: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="YAML or JSON with any field of a job.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show the progress.")] = False,
    url: GatewayUrl = DEFAULT_URL,
) -> None:
    """Submit a data set as a job and print the job's id; on stderr, what of the data will be left out or looks wrong. Options win
    over --spec, and --spec wins over --preset.

    Examples:

      sipo jobs submit pairs.jsonl --policy demo --max-prompts 16 --watch

      sipo jobs submit helpful=a.jsonl harmless=b.jsonl --policy mine --examples all --spec job.yaml
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
    if policy is None and "policy" not in fields and fields.keys() <= JobSpec.model_fields.keys():
        raise InvalidRequest("name the policies to improve, or those to align: --policy NAME", param="policy")
    wanted = JobSpec.model_validate(fields | {name: value for name, value in given.items() if value is not None})
    if sft or (preset is not None and wanted.sft is not None):
        wanted = _with_sft(read_preset(preset or "small"), wanted)
    if preset is not None:
        wanted = _on_preset(read_preset(preset), wanted)
    gateway = Gateway(url)
    job = submit_files(gateway, wanted, files)
    console.print(job.id)
    tell(job.notes)
    if watch:
        _watch(gateway, job.id)


def submit_files(gateway: Gateway, spec: JobSpec, sources: Sequence[str]) -> Job:
    """Files, or hub names, as objective_and_file reads them: what has an objective is uploaded under its name."""
    fields = {"spec": spec.model_dump_json(exclude_unset=True)}
    with ExitStack() as opened:
        files = [(objective or "file", _upload(name, opened)) for objective, name in map(objective_and_file, sources)]
        return Job.model_validate(gateway.post("/v1/jobs", data=fields, files=files))


def _upload(source: str, opened: ExitStack) -> tuple[str, IO[bytes]]:
    """A file as it is; what is at the hub, as the rows that were read."""
    path = expanded(source)
    if path.is_file():
        return path.name, opened.enter_context(path.open("rb"))
    rows = read(source).rows
    return "rows.jsonl", BytesIO("".join(f"{row.model_dump_json(exclude_none=True)}\n" for row in rows).encode())


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


def _with_sft(preset: Preset, spec: JobSpec) -> JobSpec:
    """`spec` with a fine-tuning: the preset's, where it has no settings of its own."""
    given = spec.model_dump(exclude_unset=True)
    return JobSpec.model_validate(given | {"sft": preset.sft.model_dump(exclude_unset=True) | (given.get("sft") or {})})


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
        created, result = f"{job.created:%Y-%m-%d %H:%M}", printable(job.policy_set or job.error or "")
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
    console.print(f"{job} is {Job.model_validate(Gateway(url).post(job_path(job, 'cancel'))).state}", markup=False)


@app.command()
def delete(job: JobId, url: GatewayUrl = DEFAULT_URL) -> None:
    """Forget a job that has ended, with its input, decisions and training runs. The policies that it published stay.

    Example:

      sipo jobs delete job-0123456789ab
    """
    Gateway(url).delete(job_path(job))
    console.print(f"{job} is deleted", markup=False)


@app.command()
def pairs(job: JobId, out: Out = None, url: GatewayUrl = DEFAULT_URL) -> None:
    """Write the pairs that a job has made so far, as JSONL in TRL's columns: prompt, chosen, rejected.

    Example:

      sipo jobs pairs job-0123456789ab --out pairs.jsonl
    """
    _fetch(Gateway(url), job_path(job, "pairs"), out)


@app.command()
def candidates(job: JobId, out: Out = None, url: GatewayUrl = DEFAULT_URL) -> None:
    """Write a job's decisions so far, as JSONL: of each prompt all candidates with their rewards, and why they were rejected.

    Example:

      sipo jobs candidates job-0123456789ab --out candidates.jsonl
    """
    _fetch(Gateway(url), job_path(job, "candidates"), out)


@app.command()
def report(job: JobId, out: Out = None, url: GatewayUrl = DEFAULT_URL) -> None:
    """Write what a job came to so far, round by round, as JSON.

    Example:

      sipo jobs report job-0123456789ab
    """
    _fetch(Gateway(url), job_path(job, "report"), out)


def tell_current(gateway: Gateway, policy_set: str) -> None:
    """Whether callers who give the name alone get this set, and otherwise how they come to."""
    try:
        current = gateway.get(f"/v1/models/{policy_set}")["current"]
    except NotFound:  # deleted since
        return
    how = "is current" if current else f"is not current: `sipo policies activate {policy_set}` makes it so"
    console.print(f"{policy_set} {how}", markup=False)


def _fetch(gateway: Gateway, path: str, out: Path | None) -> None:
    """To standard output, or to a file that is there only when it is whole."""
    if out is None:
        for chunk in gateway.stream(path):
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        return
    if not out.parent.is_dir():
        raise InvalidRequest(f"--out {out}: there is no folder {out.parent}")
    aside = out.with_name(f".{out.name}.part")
    try:
        with aside.open("wb") as file:
            file.writelines(gateway.stream(path))
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    complaints.print(f"wrote {out}", markup=False)


def _watch(gateway: Gateway, job: str) -> None:
    ended = watch_job(lambda: gateway.job(job))
    outcome = ended.error or "; ".join(filter(None, (ended.policy_set, ended.reason)))
    console.print(f"{ended.id} {ended.state}: {outcome}", markup=False)
    if ended.policy_set:
        tell_current(gateway, ended.policy_set)
    if ended.state != JobState.COMPLETED:
        raise typer.Exit(1)

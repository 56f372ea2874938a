"""`sipo policies …`: the policy sets in this machine's data directory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.console import complaints, console
from services.common.settings import CommonSettings, load
from sipo.errors import InvalidRequest
from sipo.models import BUNDLED_MODEL, Base
from sipo.policies import Draft, PolicyStore
from sipo.preferences import format_weights, normalize_weights, parse_weights
from sipo.prompts import PromptFormat

_BUNDLED_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

app = typer.Typer(no_args_is_help=True, help="List, inspect, activate, import and merge policy sets (in SIPO_DATA_DIR).")


@app.command("list")
def list_sets() -> None:
    """List all policy sets; * marks the current one of each name."""
    store = _store()
    table = Table("set", "current", "objectives", "base", "round", "parent", "created", box=None, header_style="bold")
    current = {policy_set.id for name in store.names() if (policy_set := store.current(name))}
    for policy_set in store.sets():
        manifest = policy_set.manifest
        table.add_row(
            policy_set.id,
            "*" if policy_set.id in current else "",
            ", ".join(policy_set.objectives),
            manifest.base.name,
            str(manifest.round),
            manifest.parent or "",
            f"{manifest.created:%Y-%m-%d %H:%M}",
        )
    if table.row_count:
        console.print(table)
    else:
        console.print(f"no policy sets in {store.root} yet: `sipo policies import`, or let a job align some")


@app.command()
def show(policy_set: Annotated[str, typer.Argument(help="demo (its current set) or demo:2.")]) -> None:
    """Print a set's manifest and where its adapters lie.

    Example:

      sipo policies show demo:1
    """
    chosen = _store().get(policy_set)
    console.print_json(chosen.manifest.model_dump_json())
    for objective in chosen.objectives:
        console.print(f"{objective}: {chosen.adapter_dir(objective)}", markup=False)


@app.command()
def activate(policy_set: Annotated[str, typer.Argument(help="NAME:VERSION.")]) -> None:
    """Make a version the one that requests for its name get. Running requests finish on theirs.

    Example:

      sipo policies activate demo:1
    """
    console.print(f"{_store().activate(policy_set).id} is current")


@app.command("import")
def import_adapters(
    adapters: Annotated[list[str], typer.Argument(metavar="OBJECTIVE=DIR...", help="One PEFT LoRA adapter folder per objective.")],
    *,
    name: Annotated[str, typer.Option(help="Policy name; a new version is made if it exists.")],
    model: Annotated[str | None, typer.Option(help="The base they were trained on. Default: SIPO_MODEL.")] = None,
    system: Annotated[str | None, typer.Option(help="System text that they were trained with.")] = None,
    beta: Annotated[float, typer.Option(help="beta of the DPO loss they were trained with: the scale of their rewards.")] = 0.1,
    activate: Annotated[bool, typer.Option("--activate", help="Make the new set current.")] = False,
) -> None:
    """Publish existing adapters as a policy set.

    Example:

      sipo policies import helpful=out/helpful harmless=out/harmless --name mine --activate
    """
    folders: dict[str, Path] = {}
    for argument in adapters:
        objective, equals, folder = argument.partition("=")
        if not (objective and equals and folder):
            raise InvalidRequest(f"cannot read {argument!r}: write helpful=DIR harmless=DIR")
        # Few shells expand the ~ after an equals sign.
        path = _expanded(folder)
        if not path.is_dir():
            raise InvalidRequest(f"{folder} is no folder")
        folders[objective] = path
    settings = load(CommonSettings)
    base = Base.open(model or settings.model, settings.cache_dir)
    draft = Draft(
        name=name,
        base=base.ref,
        prompt_format=PromptFormat.of(base.tokenizer, system=system),
        objectives=list(folders),
        beta=beta,
    )
    published = _store().publish(draft, folders, base.folder, activate=activate)
    for objective, path in folders.items():
        if named := _another_base(path, base):
            complaints.print(
                f"note: {objective} ({path}) names the base {named}, and was imported for {base.ref.name}: if that is "
                "another model of the same shape, its rewards are wrong",
                markup=False,
            )
    hint = "it is current" if activate else f"make it current with `sipo policies activate {published.id}`"
    console.print(f"published {published.id}; {hint}")


@app.command()
def soup(
    policy_set: Annotated[str, typer.Argument(help="demo (its current set) or demo:2.")],
    *,
    weights: Annotated[str, typer.Option(help="Such as concise=0.7,warm=0.3.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="A folder that is not there yet.")],
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="A and B apart, as the paper's code merges; otherwise exactly.")
    ] = False,
) -> None:
    """Merge a set's policies at weights into one PEFT adapter, to be used anywhere.

    Here it is not needed: a request with "mode": "soup" gets the exact merge at any weights.

    Example:

      sipo policies soup demo --weights concise=0.7,warm=0.3 --out soup
    """
    chosen = _store().get(policy_set)
    wanted = normalize_weights(parse_weights(weights, param="weights"), chosen.objectives, param="weights")
    if out.exists():
        raise InvalidRequest(f"{out} is there already: name another folder")

    from sipo.lora import load_adapter
    from sipo.soups import exact_soup, interpolated_soup, save_adapter

    adapters = {objective: load_adapter(chosen.adapter_dir(objective)) for objective in chosen.objectives}
    merged = (interpolated_soup if interpolate else exact_soup)(adapters, wanted)
    save_adapter(merged, out, chosen.manifest.base.name)
    console.print(f"wrote the soup of {chosen.id} at {format_weights(wanted)} to {out}", markup=False)


def _store() -> PolicyStore:
    return load(CommonSettings).policies


def _expanded(folder: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # ~somebody who is not on this machine
        return Path(folder)


def _another_base(folder: Path, base: Base) -> str | None:
    """The base that a PEFT adapter names, if that is none of this one's names.

    Folders and hub accounts differ from place to place, so only the last parts are compared; in their case, which alone tells the
    bundled model's name from that of its pretrained sibling.
    """
    named = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    known = [base.ref.name, str(base.folder), *([_BUNDLED_ON_THE_HUB] if base.ref.name == BUNDLED_MODEL else [])]
    if not isinstance(named, str) or not named or _last_part(named) in map(_last_part, known):
        return None
    return named


def _last_part(name: str) -> str:
    """Of a folder or a hub name; of a folder in the hub's cache, the model's."""
    cached = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots/", name)
    return cached[1] if cached else Path(name).name

"""`sipo policies …`: the policy sets in this machine's data directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from gateway.cli.console import complaints, console
from gateway.cli.data import tell_slots
from services.common.settings import CommonSettings, load
from sipo.errors import InvalidRequest
from sipo.files import expanded
from sipo.models import BUNDLED_MODEL, Base
from sipo.policies import REFERENCE, Draft, PolicyStore
from sipo.preferences import format_weights, normalize_weights, parse_weights
from sipo.prompts import PromptFormat
from sipo.resources import check, needed_by_publishing

_BUNDLED_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

app = typer.Typer(no_args_is_help=True, help="List, inspect, activate, delete, import and merge policy sets (in SIPO_DATA_DIR).")


@app.command("list")
def list_sets() -> None:
    """List all policy sets; * marks the current one of each name."""
    store = _store()
    table = Table("set", "current", "objectives", "base", "round", "parent", "created", box=None, header_style="bold")
    current = {policy_set.id for policy_set in store.current_sets()}
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
    for name, folder in chosen.folders.items():
        console.print(f"{'reference' if name == REFERENCE else name}: {folder}", markup=False)


@app.command()
def activate(policy_set: Annotated[str, typer.Argument(help="NAME:VERSION.")]) -> None:
    """Make a version the one that requests for its name get. Running requests finish on theirs.

    Example:

      sipo policies activate demo:1
    """
    console.print(f"{_store().activate(policy_set).id} is current")


@app.command()
def delete(policy_set: Annotated[str, typer.Argument(help="NAME:VERSION.")]) -> None:
    """Remove a version for good; no other gets its number. No job may be at work with it, and no later set descend from it.

    Example:

      sipo policies delete demo:1
    """
    console.print(f"deleted {_store().delete(policy_set).id}")


@app.command("import")
def import_adapters(
    adapters: Annotated[list[str], typer.Argument(metavar="OBJECTIVE=DIR...", help="One PEFT LoRA adapter folder per objective.")],
    *,
    name: Annotated[str, typer.Option(help="Policy name; a new version is made if it exists.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="The PEFT adapter of the base that they were trained on top of, as `sipo sft` leaves it."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base they were trained on. Default: SIPO_MODEL.")] = None,
    system: Annotated[str | None, typer.Option(help="System text that they were trained with.")] = None,
    beta: Annotated[float, typer.Option(help="beta of the DPO loss they were trained with: the scale of their rewards.")] = 0.1,
    chat_template: Annotated[
        Literal["adapter", "base"],
        typer.Option(help="Whose to ask and score with, where an adapter's folder has another chat template than the base."),
    ] = "base",
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
        path = expanded(folder)
        if not path.is_dir():
            raise InvalidRequest(f"{folder} is no folder")
        folders[objective] = path
    beneath = None if reference is None else expanded(reference)
    copied = folders if beneath is None else folders | {"reference": beneath}
    settings = load(CommonSettings)
    check(needed_by_publishing(copied.values()), settings.policies.root)
    base = Base.open(model or settings.model, settings.cache_dir)
    own = {objective: template for objective, path in folders.items() if (template := _own_template(path, base)) is not None}
    draft = Draft(
        name=name,
        base=base.ref,
        prompt_format=_prompt_format(base, folders, own if chat_template == "adapter" else {}, system),
        objectives=list(folders),
        beta=beta,
    )
    published = settings.policies.publish(draft, folders, base.folder, reference=beneath, activate=activate)
    for note in [*_notes_on_base(copied, base), *_notes_on_prompts(folders, base, own if chat_template == "base" else {})]:
        complaints.print(f"note: {note}", markup=False)
    tell_slots(len(folders))
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
    """Merge a set's policies at weights into one PEFT adapter of the base, to be used anywhere. A reference of the set is in it.

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
    if chosen.reference_dir is not None:
        merged = exact_soup({"soup": merged, "reference": load_adapter(chosen.reference_dir)}, {"soup": 1.0, "reference": 1.0})
    save_adapter(merged, out, chosen.manifest.base.name)
    console.print(f"wrote the soup of {chosen.id} at {format_weights(wanted)} to {out}", markup=False)


def _store() -> PolicyStore:
    return load(CommonSettings).policies


def _own_template(folder: Path, base: Base) -> str | None:
    """The chat template beside an adapter, if it has one that is not the base's."""
    from sipo.adapters import read_chat_template

    template = read_chat_template(folder)
    ours = base.tokenizer.chat_template
    if isinstance(ours, dict):
        ours = ours.get("default")
    # Jinja leaves out a line break at the end, which editors add.
    return None if template is None or template.removesuffix("\n") == (ours or "").removesuffix("\n") else template


def _prompt_format(base: Base, folders: Mapping[str, Path], own: Mapping[str, str], system: str | None) -> PromptFormat:
    """The base's; or with the template in `own`, which must be that of all who have one beside them."""
    from sipo.adapters import read_chat_template

    templates = [own.get(objective) for objective, path in folders.items() if read_chat_template(path) is not None]
    if own and any(template != templates[0] for template in templates):
        raise InvalidRequest(
            f"the chat templates of {' and '.join(folders)} differ, and a set has one: put the right one into each folder, or "
            "import with --chat-template base",
            param="chat_template",
        )
    made = PromptFormat.of(base.tokenizer, system=system, chat_template=next(iter(own.values()), None))
    made.text("Hello", base.tokenizer)  # a template that cannot be read is refused now
    return made


def _notes_on_base(folders: Mapping[str, Path], base: Base) -> list[str]:
    return [
        f"{objective} ({path}) names the base {named}, and was imported for {base.ref.name}: if that is another model of the same "
        "shape, its rewards are wrong"
        for objective, path in folders.items()
        if (named := _another_base(path, base))
    ]


def _notes_on_prompts(folders: Mapping[str, Path], base: Base, untaken: Mapping[str, str]) -> list[str]:
    """`untaken`: the objectives whose adapters have a chat template that is not used."""
    from sipo.adapters import read_end_token

    notes = []
    if untaken:
        have = "has a chat template of its own" if len(untaken) == 1 else "have a chat template of their own"
        notes.append(
            f"{', '.join(untaken)} {have}, and {base.ref.name}'s is used: if the training used theirs, import again with "
            "--chat-template adapter"
        )
    end = base.tokenizer.eos_token
    for objective, path in folders.items():
        token = read_end_token(path)
        if token not in (None, end):
            notes.append(
                f"the tokenizer of {objective} ({path}) ends with {token!r}, and responses end with the base's {end!r}: if the "
                "training used the other, they may not end in time"
            )
    return notes


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

"""Makes docs/configuration.md from the settings classes: `make docs`.

A process's variables are the fields of its settings class, so the tables come from there, and a test holds the file in step. Only
what no class has is written by hand, in ELSEWHERE. Nothing here reads the environment or asks the machine: the file is everybody's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

# The settings classes, all of them; a test looks for others. When one moves, this is the place to follow.
from gateway.settings import GatewaySettings
from gateway.worker.settings import WorkerSettings
from services.common.settings import PREFIX, CommonSettings
from services.decoder.settings import DecoderSettings
from services.reviewer.settings import ReviewerSettings
from services.scorer.settings import ScorerSettings
from services.trainer.settings import TrainerSettings

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "configuration.md"


@dataclass(frozen=True)
class Process:
    name: str
    command: str
    settings: type[CommonSettings]


PROCESSES = (
    Process("Gateway", "python -m gateway", GatewaySettings),
    Process("Generation worker", "python -m gateway.worker", WorkerSettings),
    Process("Decoder", "python -m services.decoder", DecoderSettings),
    Process("Reviewer", "python -m services.reviewer", ReviewerSettings),
    Process("Scorer", "python -m services.scorer", ScorerSettings),
    Process("Trainer", "python -m services.trainer", TrainerSettings),
)

FIELDS = {name for process in PROCESSES for name in process.settings.model_fields}
MADE_WHEN_READ = {"scorer_threads": "all cores"}
"""Defaults that depend on the machine, in words."""


@dataclass(frozen=True)
class Elsewhere:
    """A variable that no settings class has. `read_by` is who looks at it."""

    name: str
    read_by: str
    values: str
    default: str
    description: str


ELSEWHERE = (
    Elsewhere(
        "SIPO_GATEWAY_URL",
        "`sipo generate`, `sipo jobs`, `sipo queue`",
        "URL",
        "`http://127.0.0.1:8000`",
        "the gateway that they talk to; `--url` comes first",
    ),
    Elsewhere("SIPO_VERSION", "docker-compose.yml", "text", "`latest`", "the tag of the image that is built and run"),
    Elsewhere(
        "SIPO_BIND",
        "docker-compose.yml",
        "address",
        "`127.0.0.1`",
        "where the gateway is published, at SIPO_GATEWAY_PORT; read SECURITY.md before you say `0.0.0.0`",
    ),
    Elsewhere("SIPO_GPU", "docker-compose.yml", "a device id", "`0`", "the GPU that decoder, scorer and trainer share"),
    Elsewhere(
        "SIPO_TEST_DATA",
        "tests",
        "folder",
        "unset: those tests are skipped",
        "human-labelled preference data; `.ci/run` sets it where such a folder lies beside the project",
    ),
    Elsewhere(
        "SIPO_NATURAL_DTYPE",
        "decoder, training, tests",
        "`float32` or `bfloat16`",
        "what the processor computes well",
        "a switch for tests: what `auto` means for a dtype, whatever the processor would be best at",
    ),
)

INTRODUCTION = """\
<!-- Made by `make docs` from the settings classes. Change those, or scripts/make_configuration_docs.py, and not this file. -->

# Configuration

Settings are environment variables. Each process reads its own once, when it starts. A value that it cannot use stops it with
status 2 and one sentence that names the variable; an empty value counts as none. Variables that a process does not know belong to
its neighbours and are passed over: one environment serves them all, and nobody notices a misspelt name.

What a request or a job asks for is no setting: see [decoding.md](decoding.md), [scoring.md](scoring.md) and
[training.md](training.md).
"""

COMMON = """\
## All processes

The commands of `sipo` read these too. Not every process has a use for each.
"""

TOGETHER = """\
## Under `sipo up` and in containers

`sipo up` and `sipo demo` start the processes with the environment that they have themselves, and tell them where they find each
other: they set the URLs of decoder and reviewer, all ports but the gateway's, and SIPO_HOST for all but the gateway, whatever these
were. SIPO_REDIS_URL unset means a queue server of their own, in `SIPO_DATA_DIR/queue`; SIPO_DECODER_THREADS unset means all cores
but one, as the decoder has company.
"""

COMPOSE = """\
docker-compose.yml takes these from `.env` or the shell:

{variables}

Others reach a container only if you write them under its `environment`. What is the default in containers stands in `.env.example`;
SIPO_GATEWAY_PORT is the port at which the gateway is published there.

Variables of the libraries beneath stay as you set them. `HF_HOME` is where models of the hub are kept, `CUDA_VISIBLE_DEVICES` says
which GPUs there are (training in one process takes the first), and `OMP_NUM_THREADS` is how many threads training has on a CPU, and
comes before SIPO_DECODER_THREADS. Of vLLM's own (`VLLM_…`) the decoder sets those that it needs, where you have not.
"""


def document() -> str:
    common, _ = _schema(CommonSettings)
    parts = [INTRODUCTION, COMMON, _table(_rows(CommonSettings, CommonSettings.model_fields))]
    for process in PROCESSES:
        schema, _ = _schema(process.settings)
        # A class may repeat a common field as it is; what it changes is its own.
        own = [name for name in process.settings.model_fields if schema[name] != common.get(name)]
        parts += [f"## {process.name}\n\n`{process.command}`\n", _table(_rows(process.settings, own))]
    parts += ["## Read elsewhere\n\nBy something else than a settings class.\n", _elsewhere(), TOGETHER]
    names = ", ".join(map(_code, _of_compose((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))))
    parts.append(COMPOSE.format(variables=names))
    return "\n".join(parts)


def _schema(settings: type[CommonSettings]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields as JSON schema says them, and the classes that they refer to. It is the same for every version of Python."""
    whole = settings.model_json_schema(by_alias=False)
    return whole["properties"], whole.get("$defs", {})


def _rows(settings: type[CommonSettings], names: Iterable[str]) -> list[tuple[str, str, str, str]]:
    properties, definitions = _schema(settings)
    rows = []
    for name in names:
        field = settings.model_fields[name]
        values = _in_words(properties[name], definitions, url=name.endswith("_url"))
        read_from = ", or else ".join(map(_code, variables(name, field)))
        rows.append((read_from, values, _default(name, field, properties[name]), _description(name, field)))
    return rows


def variables(name: str, field: FieldInfo) -> list[str]:
    """Those that a field is read from: the first of them that is set."""
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [PREFIX + name.upper() if alias is None else alias]
    return [choice for choice in choices if isinstance(choice, str) and choice.startswith(PREFIX)]


def _in_words(schema: Mapping[str, Any], definitions: Mapping[str, Any], *, url: bool = False) -> str:
    if choices := schema.get("anyOf"):  # with null for what may stay unset
        return " or ".join(_in_words(choice, definitions, url=url) for choice in choices if choice.get("type") != "null")
    if values := schema.get("enum"):
        return _alternatives(_code(value) for value in values)
    match schema["type"]:
        case "boolean":
            words = "`true` or `false`"
        case "integer":
            words = "whole number" + _bounds(schema)
        case "number":
            words = "number" + _bounds(schema)
        case "object":
            words = f"JSON, {_code(f'{{NAME: {_shape(_values(schema), definitions)}}}')}"
        case "string" if schema.get("format") == "path":
            words = "folder"  # paths in settings are of the type Folder
        case "string" if url:
            words = "URL" + (f", {_code(schema['pattern'])}" if "pattern" in schema else "")
        case "string":
            words = "text"
        case other:
            raise ValueError(f"no words for {other} in {schema}")
    return words


def _bounds(schema: Mapping[str, Any]) -> str:
    least, above, most = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if least is not None and most is not None:
        return f", {least} to {most}"
    if least is not None:
        return f", {least} or more"
    if above is not None:
        return f" above {above}" + (f", {most} at most" if most is not None else "")
    return ""


def _values(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of an object's values; where its names have a pattern, they stand under that."""
    found: Mapping[str, Any] = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")][0]
    return found


def _shape(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A value inside JSON: TEXT, or the fields of a class, those in brackets that may be left out."""
    if "$ref" not in schema:
        return "TEXT"
    referred = definitions[schema["$ref"].rpartition("/")[2]]
    fields = (name if name in referred["required"] else f"[{name}]" for name in referred["properties"])
    return f"{{{', '.join(fields)}}}"


def _default(name: str, field: FieldInfo, schema: Mapping[str, Any]) -> str:
    if field.default_factory is not None:
        return MADE_WHEN_READ[name]
    default = schema["default"]
    if default is None or default == {}:
        return "unset"
    # As the class writes it: ~ is the home of whoever runs the process.
    return _code(default if isinstance(default, str) else json.dumps(default))


def _description(name: str, field: FieldInfo) -> str:
    assert field.description, f"{name} says nothing about itself"
    # It may mean another setting by its field's name; readers of the document know variables.
    text = re.sub(r"\w+_\w+", lambda word: PREFIX + word[0].upper() if word[0] in FIELDS else word[0], field.description)
    return re.sub(r"\{.+\}", lambda example: _code(example[0]), text)  # JSON


def _elsewhere() -> str:
    rows = [(_code(one.name), one.read_by, one.values, one.default, one.description) for one in ELSEWHERE]
    return _table(rows, ("variable", "read by", "values", "default", "what it does"))


def _of_compose(compose: str) -> list[str]:
    return sorted(set(re.findall(rf"\$\{{({PREFIX}[A-Z0-9_]+)", compose)))


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("variable", "values", "default", "what it does")) -> str:
    def line(cells: Sequence[str]) -> str:
        escaped = (cell.replace("|", "\\|") for cell in cells)  # a bar would end a cell, inside backticks too
        return f"| {' | '.join(escaped)} |\n"

    return "".join(map(line, [head, ["---"] * len(head), *rows]))


def _alternatives(words: Iterable[str]) -> str:
    *some, last = words
    return f"{', '.join(some)} or {last}" if some else last


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")

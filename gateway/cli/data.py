"""What the commands take as data: files or hub names, or a file of pairs for each objective. sipo.datasets reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gateway.cli.console import complaints
from services.common.limits import MixingSettings, slots_for
from services.common.settings import load
from sipo.datasets import Dataset, joined, read
from sipo.files import expanded

SOURCES = "FILE or OBJECTIVE=FILE..."
SOURCES_HELP = (
    "JSONL, a JSON array, CSV or Parquet, gzipped or not, or a hub name: labelled pairs (ours, PKU-SafeRLHF, BeaverTails, "
    "HelpSteer, UltraFeedback), or pairs of chosen and rejected, of one objective each as helpful=FILE harmless=FILE."
)

_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


def objective_and_file(source: str) -> tuple[str | None, str]:
    """("helpful", "a.jsonl") of "helpful=a.jsonl"; a file whose own name is so is one."""
    named = _NAMED.fullmatch(source)
    if named is None or expanded(source).exists():
        return None, source
    return named[1], named[2]


def read_sources(sources: Sequence[str], *, held_out: bool = False) -> Dataset:
    """All of them as one. Tells what was left out; `held_out` keeps the rows whose `split` holds them out of training.

    Raises InvalidData for the first wrong line, NotFound if there is no such file or hub name.
    """
    parts = []
    for source in sources:
        objective, file = objective_and_file(source)
        dataset = read(file, held_out=held_out)
        tell(f"left out of {file}: {reason} ({count})" for reason, count in dataset.left_out.items())
        parts.append(dataset if objective is None else dataset.of_objective(objective))
    return joined(parts)


def tell_slots(objectives: int) -> None:
    """Whether a decoder of this environment could mix so many policies: told to who publishes them."""
    slots = load(MixingSettings).decoder_slots
    if objectives > slots:
        tell([f"note: {objectives} objectives cannot be mixed as things are: {slots_for(objectives, slots)}"])


def tell(sentences: Iterable[str]) -> None:
    """On stderr, as stdout may be what the command makes."""
    for sentence in sentences:
        complaints.print(sentence, markup=False)

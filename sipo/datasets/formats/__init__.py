"""The formats that data sets come in, told by the columns of the first row.

To add one: a reader of rows, and its entry here; and in sipo.datasets.tables, which of its columns are not text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sipo.datasets.dataset import Answers, Dataset, Pair
from sipo.datasets.formats.labelled import SAFETY_LABELS, read_labelled, read_safe_rlhf
from sipo.datasets.formats.pairs import read_answers, read_pairs
from sipo.datasets.formats.preferences import read_helpsteer2_preference, read_helpsteer3
from sipo.datasets.formats.scored import HELPSTEER_SCORES, read_beavertails, read_helpsteer, read_ultrafeedback
from sipo.datasets.rows import Row
from sipo.datasets.turns import TRANSCRIPT
from sipo.errors import InvalidData
from sipo.preferences import Example

HELD_OUT_SPLITS = {"test", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "held_out"}

OUR_SCHEMA = 'prompt, response_0, response_1 and labels, such as {"helpful": 1, "harmless": 0}'

Reader = Callable[[list[Row], Counter[str]], Iterator[tuple[int, Example | Pair | Answers]]]
"""From rows to examples, pairs or answers with their lines; counts what it leaves out, by reason."""


@dataclass(frozen=True)
class Format:
    """Recognised by all columns of any of `telling`; `needs` describes it to people."""

    name: str
    telling: tuple[set[str], ...]
    read: Reader
    needs: str


FORMATS = (
    Format("sipo", ({"response_0", "labels"}, {"response_1", "labels"}), read_labelled, f"ours ({OUR_SCHEMA})"),
    Format(
        "safe-rlhf",
        tuple({"response_0", column} for column in SAFETY_LABELS),
        read_safe_rlhf,
        f"PKU-SafeRLHF (prompt, response_0, response_1, {', '.join(SAFETY_LABELS)})",
    ),
    Format("beavertails", ({"response", "is_safe"},), read_beavertails, "BeaverTails (prompt, response, is_safe)"),
    Format(
        "helpsteer",
        tuple({"response", score} for score in HELPSTEER_SCORES),
        read_helpsteer,
        f"HelpSteer and HelpSteer2 (prompt, response and scores: {', '.join(HELPSTEER_SCORES)})",
    ),
    Format(
        "helpsteer2-preference",
        ({"response_1", "response_2", "preference_strength"},),
        read_helpsteer2_preference,
        "HelpSteer2-Preference (prompt, response_1, response_2, preference_strength)",
    ),
    Format(
        "helpsteer3",
        ({"response1", "response2", "overall_preference"},),
        read_helpsteer3,
        "HelpSteer3 (context, response1, response2, overall_preference)",
    ),
    Format(
        "ultrafeedback",
        ({"completions"},),
        read_ultrafeedback,
        'rated completions as UltraFeedback has them (instruction or prompt, and completions: a list of {"response": …, '
        '"annotations": {"helpfulness": {"Rating": 4}, …}})',
    ),
    Format(
        "pairs",
        ({"chosen", "rejected"},),
        read_pairs,
        f"pairs (prompt, chosen, rejected, as texts or message lists, and perhaps objective; or transcripts {TRANSCRIPT} as chosen "
        "and rejected)",
    ),
    Format("answers", ({"prompt", "responses"},), read_answers, "answers to score (prompt, responses)"),
)


def dataset_of(rows: Iterable[Row], *, held_out: bool) -> Dataset:
    """Raises InvalidData for the first wrong row, and if nothing is left."""
    every = list(rows)
    if not every:
        raise InvalidData(f"the data set is empty: give at least one row with {OUR_SCHEMA}", param="data")
    left_out: Counter[str] = Counter()
    kept = [row for row in every if held_out or not _is_held_out(row)]
    if len(kept) < len(every):
        left_out["rows whose `split` holds them out of training"] = len(every) - len(kept)
    known = _format_of(every[0])
    read = list(known.read(kept, left_out))
    if not read:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise InvalidData(f"nothing is left of the data set, read as {known.name}: left out were {reasons}", param="data")
    return Dataset(known.name, [row for _, row in read], [line for line, _ in read], dict(left_out))  # type: ignore[arg-type]


def _is_held_out(row: Row) -> bool:
    split = row.get("split")
    return isinstance(split, str) and split.strip().lower() in HELD_OUT_SPLITS


def _format_of(first: Row) -> Format:
    columns = first.values.keys()
    for known in FORMATS:
        if any(telling <= columns for telling in known.telling):
            return known
    raise first.wrong(
        f"the columns {', '.join(map(repr, columns)) or '(none)'} belong to no format known here. Known are "
        f"{'; '.join(known.needs for known in FORMATS)}"
    )

"""Preference data: read from files, uploads and the hub in our schema and two public ones, and its conflicts counted.

It knows nothing of jobs or models. Everything is read and checked before anything is handed on: a data set is right as a whole, or
InvalidData names its first wrong line.
"""

from sipo.datasets.bundled import bundled_eval_prompts, bundled_examples
from sipo.datasets.conflicts import ConflictReport, PairConflict, conflict_report, subset
from sipo.datasets.formats import Reading
from sipo.datasets.readers import read_examples, read_lines, read_source

__all__ = [
    "ConflictReport",
    "PairConflict",
    "Reading",
    "bundled_eval_prompts",
    "bundled_examples",
    "conflict_report",
    "read_examples",
    "read_lines",
    "read_source",
    "subset",
]

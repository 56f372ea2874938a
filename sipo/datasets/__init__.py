"""Preference data: read from files, uploads and the hub, in our schema and the public ones, and its conflicts counted.

It knows nothing of jobs or models. Everything is read and checked before anything is handed on: a data set is right as a whole, or
InvalidData names its first wrong line.
"""

from sipo.datasets.bundled import bundled_eval_prompts, bundled_examples, bundled_on_policy_examples, bundled_test_prompts
from sipo.datasets.conflicts import ConflictReport, PairConflict, conflict_report, subset
from sipo.datasets.dataset import Answers, Dataset, Pair, answers_of, joined
from sipo.datasets.reading import read, read_rows, read_upload

__all__ = [
    "Answers",
    "ConflictReport",
    "Dataset",
    "Pair",
    "PairConflict",
    "answers_of",
    "bundled_eval_prompts",
    "bundled_examples",
    "bundled_on_policy_examples",
    "bundled_test_prompts",
    "conflict_report",
    "joined",
    "read",
    "read_rows",
    "read_upload",
    "subset",
]

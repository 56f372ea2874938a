"""The prompts of an evaluation: those of any data set, or bare ones; and none that anything was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sipo.conversation import Prompt, as_text
from sipo.datasets import Dataset, read
from sipo.datasets.files import rows_of
from sipo.datasets.formats import FORMATS
from sipo.datasets.rows import Row, short
from sipo.datasets.turns import prompt_in
from sipo.errors import InvalidData, InvalidRequest
from sipo.files import expanded
from sipo.preferences import Example
from sipo.record import Record
from sipo.words import share


class TestPrompt(Record):
    """What every method answers once at each weight. `originals`: the two responses that the data has, if it is labelled."""

    __test__ = False  # pytest takes classes of such names for tests

    prompt: Prompt
    originals: tuple[str, str] | None = None


def read_prompts(source: str | Path, *, held_out: bool = True) -> list[TestPrompt]:
    """Of a text file (.txt), a prompt a line; of rows that have a `prompt` and are of no format known; or of any data set that
    sipo.datasets reads. In order, each prompt once. `held_out` keeps the rows whose `split` holds them out of training.

    Raises InvalidData for the first wrong line and where there is no prompt, NotFound if there is no such file or hub name.
    """
    path = expanded(source)
    rows = _lines(path) if path.suffix == ".txt" and path.is_file() else _bare_rows(path)
    bare = (TestPrompt(prompt=prompt_in(row)) for row in rows)
    return unique(bare if rows else _of_dataset(read(source, held_out=held_out)))


def unique(prompts: Iterable[TestPrompt]) -> list[TestPrompt]:
    """The first of each prompt."""
    by_prompt: dict[Prompt, TestPrompt] = {}
    for one in prompts:
        by_prompt.setdefault(one.prompt, one)
    return list(by_prompt.values())


def check_unseen(prompts: Sequence[TestPrompt], trained: Iterable[Prompt], where: str) -> None:
    """Raises InvalidRequest, with their number, if any were trained on: `trained` are the prompts of `where`. Capitals and spaces
    make no difference."""
    _refuse(prompts, trained, f"in the training data {where}", "give prompts that nothing was trained on", "prompts")


def check_apart(prompts: Sequence[TestPrompt], validation: Sequence[TestPrompt]) -> None:
    """Raises InvalidRequest, with their number, if any are among the validation prompts, too."""
    others = [one.prompt for one in validation]
    _refuse(prompts, others, "among the prompts to standardise on", "these must be others", "standardise_on")


def _refuse(prompts: Sequence[TestPrompt], others: Iterable[Prompt], where: str, advice: str, param: str) -> None:
    known = {_words(prompt) for prompt in others}
    if seen := [one.prompt for one in prompts if _words(one.prompt) in known]:
        raise InvalidRequest(
            f"{share(len(seen), len(prompts), 'test prompt')} {'is' if len(seen) == 1 else 'are'} {where}, "
            f"such as {short(as_text(seen[0]))}: {advice}",
            param=param,
        )


def _words(prompt: Prompt) -> str:
    return " ".join(as_text(prompt).casefold().split())


def _lines(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    rows = [Row.checked(number, {"prompt": line.strip()}) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise InvalidData(f"{path} is empty: write a prompt a line")
    return rows


def _bare_rows(path: Path) -> list[Row]:
    """None of a data set."""
    if not path.is_file():
        return []
    rows = list(rows_of(path.read_bytes(), path.name))
    columns = rows[0].values.keys() if rows else set[str]()
    known = any(telling <= columns for form in FORMATS for telling in form.telling)
    return rows if "prompt" in columns and not known else []


def _of_dataset(dataset: Dataset) -> Iterable[TestPrompt]:
    for row in dataset.rows:
        originals = (row.response_0, row.response_1) if isinstance(row, Example) else None
        yield TestPrompt(prompt=row.prompt, originals=originals)

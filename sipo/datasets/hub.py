"""Data sets by their name on the hub, through Hugging Face's `datasets`.

The hub is asked once, briefly, before that library is: it would try again for half a minute, and say so on every line.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from sipo.datasets.rows import Row
from sipo.errors import InvalidRequest, NotFound, SipoError, Unavailable

if TYPE_CHECKING:
    from datasets import DatasetBuilder

TIMEOUT = 5.0
"""Seconds, of the request that tells whether the hub can be reached."""

_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?::(?P<split>[^/]+))?", re.ASCII)


def is_hub_name(source: str) -> bool:
    """NAME or NAME:SPLIT, NAME with one slash at most."""
    return _NAME.fullmatch(source) is not None


def hub_rows(source: str) -> Iterator[Row]:
    """Of the split `train` if none is named. A data set that was loaded before is read without the hub, if that cannot be reached.

    Raises NotFound, Unavailable if there is no hub and nothing was loaded before, InvalidRequest for what cannot be read as it is.
    """
    found = _NAME.fullmatch(source)
    assert found
    name, split = found["name"], found["split"] or "train"
    if Path(name).exists():  # which `datasets` would take for the data set
        raise InvalidRequest(f"{name} is a file or folder here, and has no split {split!r}: give a file alone", param="data")
    unreachable = _unreachable(name)
    if unreachable and "/" not in name:  # json, text: `datasets` would look at the files here
        raise unreachable
    with _quiet(), _offline(unreachable is not None):
        builder = _builder(name, unreachable)
        known = list(builder.info.splits or getattr(builder.config, "data_files", None) or [])
        if known and re.split(r"[\[+]", split)[0] not in known:  # a split may be cut, as train[:10%]
            raise NotFound(
                f"the data set {name} has no split {split!r}: give one of {', '.join(f'{name}:{one}' for one in known)}",
                param="data",
            )
        try:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        except Exception as error:
            raise _explained(name, error) from error
        return (Row.checked(number, row) for number, row in enumerate(rows, start=1))


def _unreachable(name: str) -> Unavailable | None:
    """None if the hub answers for this data set. Raises NotFound or InvalidRequest if it says that it may not be had."""
    import datasets
    from huggingface_hub import constants, get_token

    hub = constants.ENDPOINT
    headers = {"authorization": f"Bearer {token}"} if (token := get_token()) else {}
    if datasets.config.HF_HUB_OFFLINE:
        return Unavailable(f"there is no file {name}, and HF_HUB_OFFLINE keeps from asking the hub for a data set of that name")
    try:
        answer = httpx.get(f"{hub}/api/datasets/{name}", headers=headers, timeout=TIMEOUT, follow_redirects=True)
    # What proxy variables hold may need a package that is not there, or be no URL.
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:
        reason = str(error) or type(error).__name__
        return Unavailable(f"there is no file {name}, and the hub ({hub}) cannot be asked for a data set of that name: {reason}")
    code = answer.headers.get("x-error-code", "")
    if code == "GatedRepo" or answer.status_code == httpx.codes.FORBIDDEN:
        raise _gated(name)
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.NOT_FOUND):
        raise NotFound(
            f"there is no file {name}, and no data set of that name at {hub}; a private one needs a token, HF_TOKEN", param="data"
        )
    if answer.is_error:
        return Unavailable(f"there is no file {name}, and the hub ({hub}) answers with status {answer.status_code}")
    return None


def _builder(name: str, unreachable: Unavailable | None) -> DatasetBuilder:
    import datasets

    try:
        return datasets.load_dataset_builder(name)
    except Exception as error:
        explained = _explained(name, error)
        raise explained if unreachable is None or isinstance(explained, _SeveralConfigurations) else unreachable from error


class _SeveralConfigurations(InvalidRequest):
    """Nothing tells which one is meant."""


def _explained(name: str, error: Exception) -> SipoError:
    """`datasets` and what it calls raise whatever went wrong, of dozens of types; their sentences say which it was."""
    words = str(error)
    if configurations := re.search(r"available configs: \[(.*?)\]|configurations in the cache: (.*)", words):
        several = (configurations[1] or configurations[2]).replace("'", "")
        return _SeveralConfigurations(
            f"the data set {name} has several configurations ({several}): download the file of the one meant and give that",
            param="data",
        )
    if "gated" in words:
        return _gated(name)
    reason, _, _ = words.strip().partition("\n")
    return InvalidRequest(f"the data set {name} cannot be loaded from the hub: {reason or type(error).__name__}", param="data")


def _gated(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"the data set {name} is gated: accept its terms on its page at the hub, and set HF_TOKEN to a token of that account",
        param="data",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Whatever the libraries would say is said in our errors; a progress bar is for somebody who looks."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
    logs = (datasets.logging, hub_logging)
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)


@contextlib.contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """`datasets` looks only at what it has loaded before."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before

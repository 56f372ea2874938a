"""Folders of jobs and evaluations: there whole or not at all, and gone as a whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel


def write_folder(folder: Path, files: Mapping[str, Iterable[BaseModel]]) -> None:
    """With these files of a record a line, by name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        for name, records in files.items():
            with (aside / name).open("w", encoding="utf-8") as file:
                file.writelines(f"{record.model_dump_json()}\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
        aside.chmod(0o755)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Renamed first, so that a process that is being ended there makes nothing new. One that an earlier try has left is none."""
    gone = folder.with_name(f".gone-{folder.name}")
    with suppress(FileNotFoundError):
        folder.rename(gone)
    with suppress(FileNotFoundError):
        shutil.rmtree(gone)

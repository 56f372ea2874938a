"""Files by the names that people give them, and files that are whole or not there, after a crash too."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """With ~ as the home folder; as it is where there is none, or nobody of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one, after a power cut too."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def sync_tree(folder: Path) -> None:
    """`sync` for a folder with all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """After it, a file's content, or what was made or renamed in a folder, is there even if the machine stops."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

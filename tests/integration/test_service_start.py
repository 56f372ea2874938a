"""What a service was given and cannot work with ends its start in one sentence, with the status after which nobody tries again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.background import BAD_SETTINGS


def start(module: str, **env: str) -> tuple[int, str]:
    """The status and the last line of a start that ends by itself."""
    ended = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, check=False, env=os.environ | env)
    assert "Traceback" not in ended.stdout + ended.stderr
    return ended.returncode, ended.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["services.scorer", "services.trainer", "services.decoder", "services.reviewer"])
def test_a_folder_that_is_no_model_is_told(data_dir: Path, tmp_path: Path, module: str) -> None:
    (tmp_path / "empty").mkdir()
    status, said = start(module, SIPO_DATA_DIR=str(data_dir), SIPO_MODEL=str(tmp_path / "empty"))
    assert (status, said) == (BAD_SETTINGS, f"{tmp_path / 'empty'} holds no config.json: give the folder of a Hugging Face model")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["gateway", "gateway.worker", "services.decoder", "services.trainer"])
def test_a_data_folder_that_is_a_file_is_told(tmp_path: Path, module: str) -> None:
    (tmp_path / "file").touch()
    status, said = start(module, SIPO_DATA_DIR=str(tmp_path / "file"))
    assert status == BAD_SETTINGS
    assert said.startswith(f"SIPO_DATA_DIR={tmp_path / 'file'} cannot be used (it is no folder)")

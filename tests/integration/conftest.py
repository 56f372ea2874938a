"""Parts that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from services.trainer.rounds import Stages


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    from tests.trainer import write_adapter

    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def stages(tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, data_dir: Path) -> Stages:
    from services.trainer.rounds import Base, Stages
    from sipo.policies import BaseModelRef, PolicyStore
    from sipo.prompts import PromptFormat

    base = Base(tiny_base, BaseModelRef(name="tiny", sha256="0" * 64), PromptFormat.of(tiny_tokenizer))
    return Stages(base, PolicyStore(data_dir / "policies"), data_dir / "jobs")


@pytest.fixture
def runs(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the training process by tests.trainer.stand_in; lists the runs, as "round-0/warm"."""
    from services.trainer import rounds
    from tests.trainer import stand_in

    made: list[str] = []
    monkeypatch.setattr(rounds, "run_child", stand_in(adapter, made))
    return made

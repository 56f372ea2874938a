"""Parts that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from services.trainer.rounds import Stages


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    from tests.trainer import write_adapter

    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def runs() -> list[str]:
    """What `stages` has trained, as "round-0/warm"."""
    return []


@pytest.fixture
def stages(tiny_base: Path, data_dir: Path, adapter: Path, runs: list[str]) -> Stages:
    """With tests.trainer.stand_in in place of the training processes."""
    from services.trainer.rounds import Stages
    from sipo.models import Base, BaseModelRef
    from sipo.policies import PolicyStore
    from tests.trainer import stand_in

    base = Base(tiny_base, BaseModelRef(name="tiny", sha256="0" * 64))
    return Stages(base, PolicyStore(data_dir / "policies"), data_dir / "jobs", stand_in(adapter, runs))

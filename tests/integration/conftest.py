"""Parts that the tests of the trainer share, and those of callers of a gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from services.trainer.rounds import Stages
    from tests.fakes import FakeDecoder


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
    from services.trainer.evaluator import Evaluator
    from services.trainer.rounds import Stages
    from services.trainer.settings import TrainerSettings
    from sipo.models import Base, BaseModelRef
    from sipo.policies import PolicyStore
    from tests.trainer import stand_in

    base = Base(tiny_base, BaseModelRef(name="tiny", sha256="0" * 64))
    evaluator = Evaluator(TrainerSettings(data_dir=data_dir, model=str(tiny_base)))
    return Stages(base, PolicyStore(data_dir / "policies"), data_dir / "jobs", stand_in(adapter, runs), evaluator=evaluator)


@pytest.fixture
def decoder() -> FakeDecoder:
    """That of gateway_url."""
    from tests.fakes import FakeDecoder

    return FakeDecoder()


@pytest.fixture
def gateway_url(tmp_path: Path, redis_url: str, redis: Redis, decoder: FakeDecoder) -> Iterator[str]:
    """A gateway for callers that block. Its data lie in tmp_path; "demo" has policies for concise and warm."""
    import httpx

    from gateway.app import create_app
    from gateway.settings import GatewaySettings
    from services.common.queue import connect
    from tests.fakes import write_policy_set
    from tests.serving import in_a_thread

    write_policy_set(tmp_path / "policies", "demo:1", ["concise", "warm"], current=True)
    upstream = httpx.AsyncClient(transport=httpx.ASGITransport(decoder.app), base_url="http://decoder")
    with in_a_thread(create_app(GatewaySettings(data_dir=tmp_path), upstream, connect(redis_url))) as url:
        yield url

"""Parts that many tests share. Models are made or loaded once per run."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from transformers import PreTrainedTokenizerFast

    from support.decoder import ServedDecoder


os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Of torch, here and in the services that tests start: two processes with as many threads as cores would wait for each other."""

SERVED_DECODER = ("test_decoder.py", "test_decoder_fuzz.py", "test_decoder_parity.py", "test_decoder_sampling.py")
"""The files whose tests share one running decoder, which takes most of a minute to start."""
LONGEST = (
    *SERVED_DECODER,
    "test_stack.py",
    "test_decoder_architectures.py",
    "test_cli_train.py",
    "test_training_run.py",
    "test_trainer_service.py",
    "test_cli_evaluate.py",
)


class FilesTogether(LoadScopeScheduling):
    """Two processes share the tests: each file stays in one of them, as do the files with the served decoder."""

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.partition("::")[0]).name
        return "served decoder" if name in SERVED_DECODER else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that the two end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte; its chat template writes a line break after the end token, as many do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<end>", *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_base(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer Llama over tiny_tokenizer, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("tiny-base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bundled_base() -> Path:
    """The folder of the bundled model."""
    from sipo.models import BUNDLED_MODEL, resolve_model

    return resolve_model(BUNDLED_MODEL, Path("~/.cache/sipo").expanduser())


@pytest.fixture(scope="session")
def served_decoder(bundled_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDecoder]:
    """The real decoder on the bundled model in float32, for whole sets of random adapters: see ServedDecoder.publish."""
    from support.decoder import ServedDecoder

    with ServedDecoder.start(bundled_base, tmp_path_factory.mktemp("decoder"), SIPO_DECODER_SLEEPS="true") as decoder:
        yield decoder


@pytest.fixture(scope="session", autouse=True)
def logs_to_pytest() -> None:
    """Our log lines go where pytest shows those of a failed test, and without structlog's slow pictures of tracebacks."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """An empty SIPO_DATA_DIR."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real embedded Valkey, one for all tests."""
    from services.common.local.valkey import server

    with server(tmp_path_factory.mktemp("queue")) as url:
        yield url


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client of the Valkey, which is empty at the start of each test."""
    from services.common.queue import connect

    client = connect(redis_url)
    await client.flushall()
    yield client
    await client.aclose()

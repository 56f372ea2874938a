"""What cannot work on a model or a machine is said in a sentence before the decoder starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.decoder import start
from services.decoder.settings import DecoderSettings
from services.decoder.start import settle
from sipo.errors import InvalidRequest


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> Path:
    """tiny_base (4 heads, 2 for keys and values, 48 columns of an MLP, 256 tokens), with a configuration of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_base / "config.json").read_text())
    (folder / "model.safetensors").symlink_to(tiny_base / "model.safetensors")
    return folder


def configure(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"decoder_max_model_len": 257}, "SIPO_DECODER_MAX_MODEL_LEN=257 .* must be 256 tokens or less"),
        ({"decoder_tensor_parallel": 3}, "SIPO_DECODER_TENSOR_PARALLEL=3 does not divide the model's 4 attention heads"),
        ({"decoder_kv_cache_gib": 10**6}, "SIPO_DECODER_KV_CACHE_GIB=1000000 and .* more than this machine's memory"),
    ],
)
def test_what_cannot_work_names_its_variable(model: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        settle(DecoderSettings(**settings), model)


def test_a_request_needs_room_for_its_keys_and_values(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 (keys and values) · 64 layers · 2 heads · 64 · 4 bytes · 8 slots · 2^16 tokens are 32 GiB."""
    configure(model, num_hidden_layers=64, head_dim=64, max_position_embeddings=2**16)
    monkeypatch.setattr(start, "physical_memory", lambda: 2**40)
    wanted = {"decoder_dtype": "float32", "decoder_slots": 8, "decoder_max_model_len": 2**16}
    with pytest.raises(InvalidRequest, match=r"SIPO_DECODER_KV_CACHE_GIB=31 has no room .* needs 32\.0 GiB"):
        settle(DecoderSettings(**wanted, decoder_kv_cache_gib=31), model)
    settle(DecoderSettings(**wanted, decoder_kv_cache_gib=32), model)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 256),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, 1024),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 256),
    ],
)
def test_unset_the_context_is_the_models_own_where_that_is_shorter(model: Path, rope: dict[str, Any], context: int) -> None:
    configure(model, **rope)
    assert settle(DecoderSettings(), model).decoder_max_model_len == context
    assert settle(DecoderSettings(decoder_max_model_len=100), model).decoder_max_model_len == 100


@pytest.mark.slow
def test_the_process_ends_with_status_2_and_one_sentence(tiny_base: Path, data_dir: Path) -> None:
    wrong = {"SIPO_DATA_DIR": str(data_dir), "SIPO_MODEL": str(tiny_base), "SIPO_DECODER_TOOL_PARSER": "nonsense"}
    ended = subprocess.run(
        [sys.executable, "-m", "services.decoder"], env=os.environ | wrong, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr.splitlines()[-1][:52]) == (2, "SIPO_DECODER_TOOL_PARSER=nonsense is none of vLLM's:")
    assert "Traceback" not in ended.stderr

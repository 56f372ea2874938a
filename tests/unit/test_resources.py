"""What a training needs is counted from the heads of the weights' files, and refused where the machine has less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sipo import resources
from sipo.errors import InvalidRequest
from sipo.precision import NATURAL_DTYPE
from sipo.resources import Needs, check, lora_parameters, needed_by_publishing, needed_by_sft, needed_by_training, parameters
from sipo.training.arguments import TRAINED_MODULES, fresh_lora
from sipo.training.settings import TrainSettings

RANK_8 = TrainSettings(lora_rank=8)


@pytest.fixture
def sharded(tiny_base: Path, tmp_path: Path) -> Path:
    """tiny_base in two files, and once more in another layout, as some models of the hub come."""
    tensors = load_file(tiny_base / "model.safetensors")
    names = [f"model-{shard}-of-2.safetensors" for shard in (1, 2)]
    for shard, name in enumerate(names):
        save_file({key: tensors[key] for key in list(tensors)[shard::2]}, tmp_path / name)
    save_file({f"other.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "consolidated.safetensors")
    weight_map = {key: names[index % 2] for index, key in enumerate(tensors)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_parameters_are_those_that_torch_and_peft_count(tiny_base: Path, sharded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert parameters(tiny_base) == parameters(sharded) == counted
    trained = sum(p.numel() for p in get_peft_model(model, fresh_lora(RANK_8)).parameters() if p.requires_grad)
    assert lora_parameters(tiny_base, 8) == lora_parameters(sharded, 8) == trained
    assert list(resources.TRAINED_MODULES) == TRAINED_MODULES


@pytest.mark.skipif(torch.accelerator.is_available(), reason="memory is counted on a CPU only")
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_needs_are_weights_and_what_belongs_to_them(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, size: int
) -> None:
    monkeypatch.setenv(NATURAL_DTYPE, dtype)
    weights, lora = parameters(tiny_base), lora_parameters(tiny_base, 8)

    sft, merged = needed_by_sft(tiny_base, RANK_8), needed_by_sft(tiny_base, RANK_8, merged=True)
    training = needed_by_training(tiny_base, RANK_8, 2)

    assert (sft.memory, sft.disk) == (weights * size + lora * 16, lora * (4 + 36))
    assert merged.memory == weights * (size + 4) + lora * 16
    assert merged.disk == int(weights * 4.4) + lora * (4 + 36)
    assert training.memory == weights * size + lora * 16
    assert training.disk == lora * (16 + 36)


def test_a_publication_needs_its_adapters_size(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(size))
    assert needed_by_publishing([tmp_path / "a", tmp_path / "b"]).disk == 30


def test_what_the_machine_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    check(Needs("a fine-tuning", memory=2**20, disk=2**10), folder)
    with pytest.raises(InvalidRequest, match=r"a fine-tuning writes 1073741824\.0 GiB to .*yet, where .* GiB are free: make room"):
        check(Needs("a fine-tuning", memory=0, disk=2**60), folder)
    limit = tmp_path / "memory.max"
    limit.write_text(f"{2**29}\n")
    monkeypatch.setattr(resources, "CGROUP_LIMITS", [limit])
    with pytest.raises(InvalidRequest, match=r"needs 1\.0 GiB of memory for the weights alone, and this machine has 0\.5 GiB"):
        check(Needs("a fine-tuning", memory=2**30, disk=0), folder)
    limit.write_text("max\n")
    check(Needs("a fine-tuning", memory=2**29, disk=0), folder)


def test_a_model_that_is_not_whole_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(InvalidRequest, match=r"model\.safetensors is no whole safetensors file"):
        parameters(tmp_path)

"""What an undertaking needs of this machine, and whether the machine has it: said before anything begins.

Only what is certain is counted, so that nothing is refused that would have worked: weights and what belongs to them, no activations
and nothing that other processes take.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from sipo.errors import InvalidRequest, SipoError
from sipo.record import Record

if TYPE_CHECKING:
    from sipo.training.settings import TrainSettings

FLOAT32 = 4
TRAINED_WITH_ADAM = 4 * FLOAT32
"""Bytes of a trained parameter in memory: itself, its gradient, and two moments."""
CHECKPOINTED = 3 * FLOAT32
"""Bytes of a trained parameter in a checkpoint: itself and two moments."""
CHECKPOINTS_KEPT = 3
TRAINED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
KV_CACHE_GIB = 2
"""Of an engine without a service, on a CPU: it is taken whole at the start."""
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Machine(Record):
    """What a process computes on. `device` is for people, `memory` what it may take there, in bytes, `bytes_per_weight` what a
    model's weights have in its natural precision."""

    device: str
    gpu: bool
    memory: int
    bytes_per_weight: int


def this_machine(gpu_memory: float = 1.0) -> Machine:
    """With the first GPU, if there is one, of whose memory the part `gpu_memory` may be taken. This process keeps some of a GPU's
    memory from then on, just for having asked: see machine_told."""
    import torch

    if not torch.cuda.is_available():
        return Machine(device="CPU", gpu=False, memory=physical_memory(), bytes_per_weight=_bytes_per_weight())
    device = torch.cuda.get_device_properties(0)
    memory = int(gpu_memory * device.total_memory)
    return Machine(device=device.name, gpu=True, memory=memory, bytes_per_weight=_bytes_per_weight())


def machine_told(gpu_memory: float = 1.0) -> Machine:
    """As this_machine, asked by a process of its own, for one that computes nothing itself."""
    command = [sys.executable, "-m", "sipo.resources", str(gpu_memory)]
    try:
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise SipoError(f"what this machine computes on cannot be told: {error.stderr.strip()}") from error
    return Machine.model_validate_json(told.stdout)


def engine_memory(base: Path, machine: Machine, *, slots: int, tokens: int) -> int:
    """In bytes: a base's weights, and a KV cache for one request of so many tokens and models. A CPU's has a size of its own."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    kv_per_token = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_size
    cache = slots * tokens * kv_per_token * machine.bytes_per_weight if machine.gpu else KV_CACHE_GIB * 2**30
    return parameters(base) * machine.bytes_per_weight + cache


def classifier_memory(folder: Path) -> int:
    """In bytes: the weights of a judge, which computes in float32 wherever it runs."""
    return parameters(folder) * FLOAT32


@dataclass(frozen=True)
class Needs:
    """Of `what`, in bytes. `memory`: of a process that computes on a CPU, 0 on a GPU; `disk`: at the most at a time."""

    what: str
    memory: int
    disk: int


def needed_by_sft(base: Path, settings: TrainSettings, *, merged: bool = False) -> Needs:
    """Of supervised fine-tuning that leaves an adapter; `merged`: a whole model, from a float32 copy beside the trained one."""
    weights, lora = parameters(base), lora_parameters(base, settings.lora_rank)
    copied = weights if merged else 0
    return Needs(
        f"a fine-tuning of {base.name}",
        memory=_on_a_cpu(weights * _bytes_per_weight() + copied * FLOAT32 + lora * TRAINED_WITH_ADAM),
        disk=int(1.1 * copied * FLOAT32) + lora * (FLOAT32 + CHECKPOINTED * CHECKPOINTS_KEPT),
    )


def needed_by_training(base: Path, settings: TrainSettings, runs: int) -> Needs:
    """Of so many runs in this machine's memory, one after the other, whose adapters are published."""
    lora = lora_parameters(base, settings.lora_rank)
    memory = _on_a_cpu(parameters(base) * _bytes_per_weight() + lora * TRAINED_WITH_ADAM)
    return replace(needed_by_job(base, settings, runs), memory=memory)


def needed_by_job(base: Path, settings: TrainSettings, runs: int, sft: TrainSettings | None = None) -> Needs:
    """As needed_by_training, where another machine may train: only what is written. `sft`: of a fine-tuning before them, whose
    adapter is published too."""
    lora = lora_parameters(base, settings.lora_rank)
    reference = 0 if sft is None else lora_parameters(base, sft.lora_rank)
    return Needs(
        f"the training of {runs} {'policy' if runs == 1 else 'policies'} on {base.name}",
        memory=0,
        disk=lora * (2 * runs * FLOAT32 + CHECKPOINTED * CHECKPOINTS_KEPT) + 2 * reference * FLOAT32,
    )


def needed_by_publishing(adapters: Iterable[Path]) -> Needs:
    """Of a copy of these adapter folders' weights."""
    from sipo.adapters import WEIGHTS  # with torch, which takes seconds to import

    sizes = [path.stat().st_size for folder in adapters if (path := folder / WEIGHTS).is_file()]
    return Needs("a copy of the adapters", memory=0, disk=sum(sizes))


def check(needs: Needs, folder: Path) -> None:
    """`folder` is where it writes, which need not be there yet. Raises InvalidRequest for what the machine cannot give."""
    memory = physical_memory()
    if needs.memory > memory:
        raise InvalidRequest(
            f"{needs.what} needs {gib(needs.memory)} of memory for the weights alone, and this machine has {gib(memory)}: take a "
            "smaller base model, or a machine with more memory or a GPU",
            param="model",
        )
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needs.disk > free:
        raise InvalidRequest(
            f"{needs.what} writes {gib(needs.disk)} to {folder}, where {gib(free)} are free: make room, or name another folder"
        )


def parameters(base: Path) -> int:
    """Of a model's weights, by the heads of their files: nothing is loaded."""
    return sum(prod(shape) for shape in _shapes(base).values())


def lora_parameters(base: Path, rank: int) -> int:
    """Of a fresh adapter on q, k, v and o."""
    shapes = [shape for name, shape in _shapes(base).items() if name.endswith(tuple(f".{m}.weight" for m in TRAINED_MODULES))]
    return sum(rank * sum(shape) for shape in shapes)


def physical_memory() -> int:
    """In bytes: the machine's, or what a container may take of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.is_file()]
    return min([machine, *(int(limit) for limit in limits if limit.isdecimal())])


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _shapes(base: Path) -> dict[str, list[int]]:
    index = base / "model.safetensors.index.json"
    whole = base / "model.safetensors"
    if index.is_file():  # beside them there may be the same weights in another layout
        files = [base / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = [whole] if whole.is_file() else sorted(base.glob("*.safetensors"))
    shapes: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, "numpy") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (OSError, SafetensorError) as error:
            raise InvalidRequest(
                f"{path} is no whole safetensors file ({error}): copy or download it again", param="model"
            ) from error
    return shapes


def _bytes_per_weight() -> int:
    from sipo.precision import torch_dtype  # torch takes seconds to import

    return torch_dtype("auto").itemsize


def _on_a_cpu(size: int) -> int:
    import torch

    return 0 if torch.accelerator.is_available() else size


if __name__ == "__main__":
    print(this_machine(float(sys.argv[1])).model_dump_json())

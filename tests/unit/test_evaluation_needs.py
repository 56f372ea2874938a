"""What memory an evaluation needs is counted from the heads of the weights' files, and refused where the machine has less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sipo.errors import InvalidRequest
from sipo.evaluation.answers import prompt_ids
from sipo.evaluation.needs import needs_of
from sipo.models import Base, BaseModelRef
from sipo.resources import Machine, classifier_memory, engine_memory, parameters, physical_memory, this_machine
from tests.evaluation import method_of, plan_of

CPU = Machine(device="CPU", gpu=False, memory=2**32, bytes_per_weight=2)
GPU = Machine(device="A GPU", gpu=True, memory=2**32, bytes_per_weight=2)


def test_an_engine_takes_weights_and_a_cache(tiny_base: Path) -> None:
    weights = parameters(tiny_base) * 2
    assert engine_memory(tiny_base, CPU, slots=2, tokens=100) == weights + 2 * 2**30
    keys_and_values = 2 * 2 * (2 * 8) * 2  # of two layers with two heads of eight, in bfloat16
    assert engine_memory(tiny_base, GPU, slots=2, tokens=100) == weights + 2 * 100 * keys_and_values
    assert classifier_memory(tiny_base) == 2 * weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_machine_without_a_gpu_gives_its_memory() -> None:
    machine = this_machine(0.3)
    assert (machine.device, machine.gpu, machine.memory) == ("CPU", False, physical_memory())


def test_the_largest_engine_counts_and_each_classifier_by_itself(tiny_base: Path) -> None:
    base = Base(tiny_base, BaseModelRef(name="tiny", sha256="0" * 64))
    methods = [replace(method_of(tiny_base, kind), base=base) for kind in ("base", "mod")]
    judges = {"concise": f"hf:{tiny_base}#0", "warm": "python:warm"}
    plan = plan_of(methods, judges=judges)
    ids = prompt_ids(plan)
    longest = max(len(one) for one in ids["mod"]) + plan.max_tokens
    needs = needs_of(plan, ids, GPU)
    assert (needs.device, needs.memory) == ("A GPU", 2**32)
    assert needs.engine == engine_memory(tiny_base, GPU, slots=2, tokens=longest)
    assert needs.judges == {"concise": classifier_memory(tiny_base)}
    needs.check()
    with pytest.raises(InvalidRequest, match=r"the engine needs .* for its weights and KV cache, .* may take 0\.0 GiB on A GPU"):
        needs.model_copy(update={"memory": needs.engine - 1}).check()
    with pytest.raises(InvalidRequest, match=r"the judge of concise needs .* for its weights alone"):
        needs.model_copy(update={"memory": needs.engine, "judges": {"concise": needs.engine + 1}}).check()

"""Divergences from the reference against a computation with whole models, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sipo.errors import InvalidRequest
from sipo.evaluation import divergence
from sipo.evaluation.answers import Answer, prompt_ids
from sipo.evaluation.divergence import diverge
from sipo.evaluation.folder import DIVERGENCES, EvaluationFolder
from sipo.evaluation.methods import Adapter, Method
from sipo.evaluation.plan import Plan
from sipo.evaluation.report import Kind
from sipo.lora import LoraAdapter, load_adapter, merge
from sipo.preferences import format_weights
from sipo.soups import exact_soup
from tests.evaluation import OBJECTIVES, method_of, plan_of, silent
from tests.trainer import write_adapter

pytestmark = pytest.mark.slow

TEXTS = ["It is late", "", "Nothing of that kind"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters")
    return {name: Adapter(write_adapter(folder / name), name, 4) for name in (*OBJECTIVES, "reference")}


def method(base: Path, kind: Kind, adapters: dict[str, Adapter], *, reference: bool = False) -> Method:
    plain = method_of(base, kind)
    own = {name: adapters[name] for name in OBJECTIVES}
    if kind == "models":
        own = {format_weights(point): adapters["concise"] for point in plain.points if point}
    return replace(plain, adapters=own, reference=adapters["reference"] if reference else None)


def answered(plan: Plan, text: str | None = None) -> dict[str, list[Answer]]:
    """Every other answer was cut off."""
    return {
        method.name: [
            Answer(
                prompt=index,
                weights=point,
                text=TEXTS[(index + place) % 3] if text is None else text,
                tokens=3,
                finish_reason="stop" if place % 2 else "length",
            )
            for index in range(len(plan.prompts))
            for place, point in enumerate(method.points)
        ]
        for method in plan.methods
    }


def measured(plan: Plan, folder: Path, answers: dict[str, list[Answer]] | None = None) -> dict[str, list[list[float]]]:
    home = EvaluationFolder(folder)
    home.prepare(plan)
    return diverge(plan, prompt_ids(plan), answers or answered(plan), home, silent)


def log_probs(base: Path, adapters: Sequence[LoraAdapter], ids: list[int], prompt: int) -> Tensor:
    """What a model with all these adapters merged makes of every token behind the prompt, [tokens, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for adapter in adapters:
        merge(model, adapter)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("reference", [False, True])
def test_a_mixture_and_a_soup_are_as_far_from_their_reference_as_whole_models_say(
    reference: bool, tiny_base: Path, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    methods = [method(tiny_base, kind, adapters, reference=reference) for kind in ("mod", "soup")]
    plan = plan_of([method_of(tiny_base, "base"), *methods], prompts=2)
    found = measured(plan, tmp_path / "out")
    assert set(found) == {"mod", "soup"}
    own = {name: load_adapter(adapters[name].folder) for name in OBJECTIVES}
    beneath = [load_adapter(adapters["reference"].folder)] if reference else []
    tokenizer, weights = methods[0].base.tokenizer, {"concise": 0.5, "warm": 0.5}
    prompt = prompt_ids(plan)["mod"][1]
    response = methods[0].prompt_format.response_ids(TEXTS[2], tokenizer)
    ids = [*prompt, *response]
    of_reference = log_probs(tiny_base, beneath, ids, len(prompt))
    policies = [log_probs(tiny_base, [*beneath, adapter], ids, len(prompt)) for adapter in own.values()]
    mixed = torch.stack(policies).mean(0).log_softmax(-1)
    souped = log_probs(tiny_base, [*beneath, exact_soup(own, weights)], ids, len(prompt))
    for kind, exact in (("mod", mixed), ("soup", souped)):
        wanted = float((exact.exp() * (exact - of_reference)).sum(-1).mean())
        assert wanted > 1e-3
        assert found[kind][1][1] == pytest.approx(wanted, rel=1e-4)


def test_at_the_vertices_all_kinds_are_the_same_policies(tiny_base: Path, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    plan = plan_of([method(tiny_base, kind, adapters) for kind in ("mod", "soup", "models")], prompts=2)
    found = measured(plan, tmp_path / "out", answered(plan, TEXTS[0]))
    assert [row[2] for row in found["mod"]] == pytest.approx([row[2] for row in found["soup"]], rel=1e-4)
    assert [row[2] for row in found["mod"]] == pytest.approx([row[2] for row in found["models"]], rel=1e-4)
    assert [row[0] for row in found["mod"]] == pytest.approx([row[0] for row in found["soup"]], rel=1e-4)
    assert found["mod"][0][0] != pytest.approx(found["mod"][0][2], rel=1e-2)


def test_it_goes_on_where_it_was_stopped_and_looks_at_no_more_prompts_than_it_must(
    tiny_base: Path, adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "PROMPTS", 3)
    monkeypatch.setattr(divergence, "CHUNK", 2)
    unseen = [{"concise": 0.25, "warm": 0.75}]
    mod = method(tiny_base, "mod", adapters)
    plan = replace(plan_of([replace(mod, points=[*mod.points, *unseen])], prompts=5), unseen=unseen)
    found = measured(plan, tmp_path / "out")["mod"]
    assert [len(row) for row in found] == [3, 3, 3]
    file = tmp_path / "out" / DIVERGENCES / "mod.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    assert measured(plan, tmp_path / "out")["mod"] == found
    assert file.read_bytes() == whole
    file.write_bytes(whole.replace(b'"prompt":1', b'"prompt":2'))
    with pytest.raises(InvalidRequest, match=r"mod.jsonl holds other divergences: remove it"):
        measured(plan, tmp_path / "out")

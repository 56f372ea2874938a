"""Random policies for any base, and their rewards computed in the plainest way: one model and one response at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sipo.models import BaseModelRef
from sipo.policies import REFERENCE, Draft, PolicySet, PolicyStore
from sipo.preferences import Weights, format_weights
from sipo.prompts import PromptFormat

BETA = 0.1


def publish_random(
    store: PolicyStore,
    base: Path,
    workspace: Path,
    targets: Mapping[str, tuple[str, ...]],
    *,
    base_sha256: str,
    prompt_format: PromptFormat,
    seed: int = 0,
    scale: float = 0.1,
    reference: tuple[str, ...] = (),
) -> PolicySet:
    """The next version of "demo", made current: an adapter of its own rank for each objective, on the modules given for it, and one
    more on `reference` that makes their reference."""
    torch.manual_seed(seed)
    adapters = {}
    made = {**targets, REFERENCE: reference} if reference else targets
    for rank, (objective, modules) in enumerate(made.items(), start=2):
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM")
        adapted = get_peft_model(plain, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=scale)
        adapters[objective] = workspace / f"trained-{seed}" / objective
        adapted.save_pretrained(adapters[objective])
    draft = Draft(
        name="demo",
        base=BaseModelRef(name=base.name, sha256=base_sha256),
        prompt_format=prompt_format,
        objectives=list(targets),
        beta=BETA,
    )
    return store.publish(draft, adapters, base, reference=adapters.pop(REFERENCE, None), activate=True)


def log_prob(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> float:
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1)[range(len(response)), list(response)].sum())


def rewards_one_by_one(
    base: Path, policy_set: PolicySet, prompt: Sequence[int], answers: Sequence[Sequence[int]], soups: Sequence[Weights]
) -> list[dict[str, float]]:
    """Every model on its own, every response on its own: PEFT's active adapter, its exact merge for a soup, the plain reference."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if policy_set.reference_dir is not None:
        plain = PeftModel.from_pretrained(plain, policy_set.reference_dir).merge_and_unload()
    reference = [log_prob(plain, prompt, answer) for answer in answers]
    first, *others = policy_set.objectives
    model = PeftModel.from_pretrained(plain, policy_set.adapter_dir(first), adapter_name=first).eval()
    for objective in others:
        model.load_adapter(policy_set.adapter_dir(objective), adapter_name=objective)
    adapters = {objective: objective for objective in policy_set.objectives}
    for index, weights in enumerate(soups):
        model.add_weighted_adapter(list(weights), list(weights.values()), adapter_name=f"soup{index}", combination_type="cat")
        adapters[format_weights(weights)] = f"soup{index}"
    rewards: list[dict[str, float]] = [{} for _ in answers]
    for name, adapter in adapters.items():
        model.set_adapter(adapter)
        for index, answer in enumerate(answers):
            rewards[index][name] = policy_set.manifest.beta * (log_prob(model, prompt, answer) - reference[index])
    return rewards

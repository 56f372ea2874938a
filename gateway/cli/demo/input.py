"""What the demo runs on: the bundled data set with the shipped policies, or any file in our schema with policies yet to align."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.cli.console import console
from gateway.cli.data import read_sources
from gateway.jobs.limits import check_limits
from gateway.shipped import publish_shipped
from services.common.contract.evaluations import RoundEvaluationSpec
from services.common.contract.jobs import JobSpec
from services.common.limits import Limits, MixingSettings
from services.common.settings import CommonSettings, load
from sipo.conversation import Prompt
from sipo.datasets import bundled_on_policy_examples
from sipo.errors import InvalidRequest
from sipo.models import resolve_model
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.training.settings import TrainSettings
from sipo.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUND_PROMPTS = 16
"""Of a round on a caller's own data."""
BUNDLED_ROUND_PROMPTS = 40
"""Of a round on the bundled data, whose policies are there already."""
BUNDLED_WEIGHTS = (0.3, 0.7)
"""Of the first objective, at which the round samples: half of the usual ones, as scoring is what takes longest."""
BUNDLED_TRAINING = TrainSettings(epochs=2, batch_size=4)
"""Twice, and in smaller steps than in a round of hundreds of prompts: else there would be too few of them."""
EVALUATED_PROMPTS = 64
MAX_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class DemoInput:
    """What is posted to the gateway; `conflicting` of the `offered` examples conflict. `held_out` are not trained on: the policies
    are evaluated on their prompts, if the specification asks for it."""

    examples: list[Example]
    objectives: list[str]
    spec: JobSpec
    offered: int
    conflicting: int
    held_out: list[Example] = field(default_factory=list)

    @property
    def round_prompts(self) -> int:
        """How many prompts the round runs on."""
        return min(self.conflicting, self.spec.max_prompts or self.conflicting)


def bundled_input(settings: CommonSettings) -> DemoInput:
    """Conflicting prompts that the shipped policies were not trained on, and others to evaluate on. Those policies are current
    afterwards."""
    shipped = publish_shipped(settings)
    settings.policies.activate(shipped.id)
    offered = bundled_on_policy_examples("validation")
    conflicting = _one_of_each_prompt(example for example in offered if example.conflicting(shipped.objectives))
    evaluation = RoundEvaluationSpec(
        judges={objective: f"python:{objective}" for objective in shipped.objectives},
        weights=5,
        max_tokens=80,
        max_prompts=EVALUATED_PROMPTS,
    )
    spec = _spec(shipped.manifest.name, shipped.objectives).model_copy(
        update={
            "max_prompts": BUNDLED_ROUND_PROMPTS,
            "weights": [dict(zip(shipped.objectives, (weight, 1 - weight), strict=True)) for weight in BUNDLED_WEIGHTS],
            "evaluation": evaluation,
            "training": BUNDLED_TRAINING,
        }
    )
    return DemoInput(
        conflicting[:BUNDLED_ROUND_PROMPTS],
        shipped.objectives,
        spec,
        len(_one_of_each_prompt(offered)),
        len(conflicting),
        _one_of_each_prompt(bundled_on_policy_examples("test"))[:EVALUATED_PROMPTS],
    )


def _one_of_each_prompt(examples: Iterable[Example]) -> list[Example]:
    """The first."""
    by_prompt: dict[Prompt, Example] = {}
    for example in examples:
        by_prompt.setdefault(example.prompt, example)
    return list(by_prompt.values())


def _spec(policy: str, objectives: list[str]) -> JobSpec:
    """Short answers and reviews, so that a round takes minutes on two cores."""
    return JobSpec(
        policy=policy, objectives=objectives, max_prompts=ROUND_PROMPTS, max_tokens=80, review_max_tokens=48, activate=True
    )


def own_input(settings: CommonSettings, source: str | Path, objectives: list[str] | None, max_pairs: int) -> DemoInput:
    """The rows to train on, conflicting ones among them as the round's prompts. Long prompts are cut; prints what is left out.

    Policies that an earlier run aligned on the same rows are made current again, so that the round starts from them.
    """
    examples = _usable(settings, read_sources([str(source)]).labelled())
    objectives = objectives or list(dict.fromkeys(name for example in examples for name in example.labels))
    conflicting = sum(example.conflicting(objectives) for example in examples)
    if not conflicting:
        raise InvalidRequest(f"none of the {counted(len(examples), 'row')} of {source} conflicts on {', '.join(objectives)}")
    key = json.dumps([objectives, max_pairs, settings.model, *(example.model_dump() for example in examples)])
    stem = re.sub(r"[^a-z0-9]+", "-", Path(source).stem.lower()).strip("-")[:40]
    name = f"demo-{stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    store = settings.policies
    if aligned := [known for known in store.sets() if known.manifest.name == name and known.manifest.round == 0]:
        console.print(f"policies: {store.activate(aligned[0].id).id}, aligned by an earlier run")
    spec = _spec(name, objectives)
    mixing = load(MixingSettings)
    check_limits(spec, Limits(slots=mixing.decoder_slots, max_model_len=mixing.decoder_max_model_len))
    # One epoch in small steps, as there are few pairs.
    small = {"epochs": 1, "batch_size": 4, "max_pairs": max_pairs, "max_prompt_tokens": MAX_PROMPT_TOKENS}
    alignment = spec.alignment.model_copy(update=small)
    spec = spec.model_copy(update={"alignment": alignment})
    return DemoInput(examples, objectives, spec, len(examples), conflicting)


def _usable(settings: CommonSettings, examples: Sequence[Example]) -> list[Example]:
    """The examples with prompts that the demo has time for; prints what is cut and what is left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(settings.model, settings.cache_dir))
    prompt_format = PromptFormat.of(tokenizer)
    usable, cut = [], 0
    for example in examples:
        if isinstance(example.prompt, str):
            prompt = cut_middle(example.prompt, prompt_format, tokenizer)
            cut += prompt != example.prompt
            usable.append(example.model_copy(update={"prompt": prompt}))
        elif len(prompt_format.prompt_ids(example.prompt, tokenizer)) <= MAX_PROMPT_TOKENS:
            usable.append(example)
    if cut:
        console.print(f"cut in the middle: {counted(cut, 'prompt')} of more than {MAX_PROMPT_TOKENS} tokens")
    if long := len(examples) - len(usable):
        console.print(f"left out: {counted(long, 'conversation')} of more than {MAX_PROMPT_TOKENS} tokens")
    return usable


def cut_middle(prompt: str, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt within MAX_PROMPT_TOKENS, what the format adds included. Instructions stand at the beginning or at the end of a
    prompt, so both are kept."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    shorter, keep = prompt, len(ids)
    while (excess := len(prompt_format.prompt_ids(shorter, tokenizer)) - MAX_PROMPT_TOKENS) > 0:
        keep -= excess
        if keep < 2:
            raise InvalidRequest(f"the prompt format of this model alone takes {MAX_PROMPT_TOKENS} tokens or more")
        begin, end = ids[: keep // 2], ids[-(keep - keep // 2) :]
        shorter = f"{tokenizer.decode(begin)} … {tokenizer.decode(end)}"
    return shorter

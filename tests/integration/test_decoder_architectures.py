"""One mechanism serves several architectures: tiny random models of each, with adapters of different ranks on all linear layers,
through the offline engine, under every mixing rule in one batch, against the exact reference. The engine runs in a process of its
own: vLLM changes the one it is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sipo.decoding.reference import ReferenceDecoder
from sipo.decoding.request import MixingRule, Mixture, base_mixture, linear_mixture, mixture
from sipo.decoding.vllm.offline import POLICIES
from sipo.lora import ADAPTABLE_MODULES, load_adapter
from sipo.preferences import Weights

pytestmark = pytest.mark.slow

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),  # of which two ranks have a copy each
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),  # shorter than the prompts
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}
PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(length)] for i, length in enumerate((5, 90))]
TOKENS = 12
OBJECTIVES = ["a", "b"]
MOD: list[Weights] = [{"a": w, "b": 1 - w} for w in (1.0, 0.0, 0.5, 0.3)]
RULES: list[tuple[MixingRule, float | None]] = [("forward_kl", None), ("jensen_shannon", None), ("alpha_divergence", 0.4)]
LINEAR_COEFFICIENTS = [{"base": 1.0, "a": 1.5, "b": -0.5}, {"base": -0.5, "b": 1.2}, {"a": 2.0}]

ON_A_REFERENCE: list[tuple[Weights, MixingRule]] = [
    *((weights, "reverse_kl") for weights in MOD[1:3]),
    (MOD[2], "jensen_shannon"),
    ({"base": -0.5, "reference": 0.7, "b": 0.8}, "linear"),
]

SOUPS: list[Weights] = [{"a": 0.3, "b": 0.7}, {"a": 0.6, "b": 0.4}]
BLOCKS = 40
"""Of the key-value cache: too few for all requests at once, so some are preempted and computed again."""

OFFLINE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from sipo.decoding import OfflineDecoder
from sipo.decoding.request import Mixture

for base, options, prompts, mixtures, tokens, blocks, texts in json.load(sys.stdin):
    policies = {name: Path(base, name) for name in "ab"}
    with OfflineDecoder(
        base, policies, reference=Path(base, "reference"), slots=3, dtype="float32", max_model_len=128, threads=1,
        num_gpu_blocks_override=blocks, disable_log_stats=False, **options,
    ) as decoder:
        # The set that most mixtures name has no reference, and is a later one, beside the first and where another was.
        decoder.load("short-lived", {"b": policies["b"]})
        decoder.load("set", policies)
        decoder.unload("short-lived")
        mixtures = [Mixture.model_validate_json(text) for text in mixtures]
        twice = [
            decoder.generate_mixtures(prompts, mixtures, temperature=0, max_tokens=tokens, ignore_eos=True) for _ in range(2)
        ]
        counted = {metric.name: metric.value for metric in decoder.llm.get_metrics() if hasattr(metric, "value")}
        alone = decoder.generate_mixtures(prompts[:1], mixtures[:1], temperature=0, max_tokens=tokens, ignore_eos=True)
        responses = decoder.generate(*texts, mixing="linear", temperature=0, max_tokens=tokens, ignore_eos=True)
        result = {"twice": twice, "alone": alone, "counted": counted, "responses": [asdict(r) for r in responses]}
        print("RESULT", json.dumps(result))
"""

TEXTS: tuple[list[str], list[Weights]] = (["One text,", "another"], [{"a": 0.3, "b": 0.7}, {"a": 1.5, "base": -0.5}])

Answer = Callable[[list[int]], list[int]]


class Model:
    """A random base with two random adapters and another one as their reference on disk, and every mixture of them, on it or not,
    with what the exact decoder makes of a prompt."""

    def __init__(self, architecture: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        self.model_class, config_class, own = ARCHITECTURES[architecture]
        torch.manual_seed(1)
        self.folder = folder
        self._save(self.model_class(config_class(vocab_size=len(tokenizer), **(SHAPE | own))), folder, tokenizer)
        # Different ranks and scalings, and one adapter leaves out some layers that the other has.
        self._adapter("a", LoraConfig(r=3, lora_alpha=6, target_modules=list(ADAPTABLE_MODULES)))
        self._adapter("b", LoraConfig(r=5, lora_alpha=10, target_modules=["q_proj", "o_proj", "up_proj"], use_rslora=True))
        self._adapter("reference", LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        self.adapters = {name: folder / name for name in OBJECTIVES}
        self.references = {"set": None, POLICIES: folder / "reference"}
        self.exact = {
            name: ReferenceDecoder(folder, self.adapters, reference=reference) for name, reference in self.references.items()
        }
        self.tokenizer = tokenizer

    def _save(self, model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _adapter(self, name: str, config: LoraConfig) -> None:
        peft = get_peft_model(self.model_class.from_pretrained(self.folder, dtype=torch.float32), config)
        for key, parameter in peft.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        peft.save_pretrained(self.folder / name)

    def cases(self) -> Iterator[tuple[Mixture, Answer]]:
        for weights in MOD:
            yield mixture("set", OBJECTIVES, weights)[0], self.expected(weights)
        for rule, alpha in RULES:
            for weights in MOD[2:]:
                yield mixture("set", OBJECTIVES, weights, rule=rule, alpha=alpha)[0], self.expected(weights, rule, alpha)
        for coefficients in LINEAR_COEFFICIENTS:
            yield linear_mixture("set", OBJECTIVES, coefficients), self.expected(coefficients, "linear")
        for weights in SOUPS:
            yield mixture("set", OBJECTIVES, weights, mode="soup")[0], self._soup(weights, "set")
        yield base_mixture(), self.expected({"base": 1.0}, "linear")
        yield from self._cases_on_a_reference()

    def _cases_on_a_reference(self) -> Iterator[tuple[Mixture, Answer]]:
        for weights, rule in ON_A_REFERENCE:
            mixed = (
                linear_mixture(POLICIES, OBJECTIVES, weights)
                if rule == "linear"
                else mixture(POLICIES, OBJECTIVES, weights, rule=rule)[0]
            )
            yield mixed, self.expected(weights, rule, policy_set=POLICIES)
        yield mixture(POLICIES, OBJECTIVES, SOUPS[0], mode="soup")[0], self._soup(SOUPS[0], POLICIES)
        for mode in ("a", "reference"):
            yield mixture(POLICIES, OBJECTIVES, mode=mode)[0], self.expected({mode: 1.0}, "linear", policy_set=POLICIES)

    def expected(
        self, weights: Weights, rule: MixingRule = "reverse_kl", alpha: float | None = None, *, policy_set: str = "set"
    ) -> Answer:
        return lambda prompt: self.exact[policy_set].generate(prompt, weights, max_tokens=TOKENS, rule=rule, alpha=alpha)

    def _soup(self, weights: Weights, policy_set: str) -> Answer:
        """The base with the weighted sum of the deltas in its weights, which makes the soup of what is the reference without."""
        merged = self.model_class.from_pretrained(self.folder, dtype=torch.float32)
        for name, weight in weights.items():
            for module, (a, b) in load_adapter(self.adapters[name]).modules.items():
                merged.get_submodule(module).weight.data += weight * b @ a
        folder = self.folder / f"soup {weights['a']} of {policy_set}"
        self._save(merged, folder, self.tokenizer)
        soup = ReferenceDecoder(folder, self.adapters, reference=self.references[policy_set])
        return lambda prompt: soup.generate(prompt, {"reference": 1.0}, max_tokens=TOKENS, rule="linear")


@dataclass
class Run:
    """One engine's answers to all mixtures and prompts, twice, with its counters; and the reference's."""

    expected: list[list[int]]
    expected_responses: list[list[int]]
    twice: list[list[list[int]]]
    alone: list[list[int]]
    counted: dict[str, float]
    responses: list[dict[str, Any]]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two ranks": {"tensor_parallel": 2},
    "compiled": {"compiled": True},
}
RUNS = [*((architecture, "plain") for architecture in ARCHITECTURES), ("llama", "two ranks"), ("llama", "compiled")]


@pytest.fixture(scope="module")
def runs(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    """One process runs the engines one after the other: its imports take longer than any of them."""
    requests, expected = [], []
    for architecture in ARCHITECTURES:
        model = Model(architecture, tiny_tokenizer, tmp_path_factory.mktemp(architecture))
        rows = [(prompt, chosen, answer) for chosen, answer in model.cases() for prompt in PROMPTS]
        prompts = [prompt for prompt, *_ in rows]
        answers = [answer(prompt) for prompt, _, answer in rows]
        texts = zip(*TEXTS, strict=True)
        responses = [
            model.expected(weights, "linear", policy_set=POLICIES)(tiny_tokenizer(text)["input_ids"]) for text, weights in texts
        ]
        mixtures = [chosen.model_dump_json() for _, chosen, _ in rows]
        for variant in (variant for name, variant in RUNS if name == architecture):
            expected.append((answers, responses))
            requests.append([str(model.folder), VARIANTS[variant], prompts, mixtures, TOKENS, BLOCKS, TEXTS])
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        input=json.dumps(requests),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    results = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(requests), done.stdout[-2000:] + done.stderr[-2000:]
    keys = sorted(RUNS, key=lambda run: list(ARCHITECTURES).index(run[0]))
    return {key: Run(*answers, **result) for key, answers, result in zip(keys, expected, results, strict=True)}


@pytest.mark.parametrize(("architecture", "variant"), RUNS)
def test_offline_tokens_equal_the_reference(runs: dict[tuple[str, str], Run], architecture: str, variant: str) -> None:
    """All mixtures in one batch, some of them preempted in between; and again, when the prefix cache holds the prompts. With two
    ranks each has half of every layer, and of its deltas."""
    run = runs[architecture, variant]

    assert run.twice == [run.expected, run.expected]
    assert run.alone == run.expected[:1]
    assert len({tuple(tokens) for tokens in run.expected}) > len(run.expected) / 2
    assert run.counted["vllm:num_preemptions"] > 0
    assert run.counted["vllm:prefix_cache_hits"] > 0


def test_the_library_takes_texts_and_one_weight_each(runs: dict[tuple[str, str], Run]) -> None:
    run = runs["qwen3", "plain"]

    assert [response["tokens"] for response in run.responses] == run.expected_responses
    assert [response["weights"] for response in run.responses] == TEXTS[1]
    assert {response["finish_reason"] for response in run.responses} == {"length"}
    assert all(response["text"] for response in run.responses)

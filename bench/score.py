"""What rewards cost: `make bench-score`.

Two policies, four soups and the reference, in float32. Published: one merged model after the other, one response at a time, all
logits, and the reference again for each reward model. Ours: RewardModel. Floor: the same passes through the base alone, the
log-probabilities taken as well. Contestants are processes with their models in memory and the scorer's environment; they are
asked in turn, prompt after prompt. A ratio is the median over the prompts of the ratio for a prompt.

Prompts are those of the bundled data, responses are random tokens, policies are random too. Their SCALE makes the rewards of the
responses to a prompt differ by as much as those of policies trained for a short while (standard deviations of 0.5 to 1.1 at beta
0.1; the table tells the mean), because how many orders flip depends on that.
"""

from __future__ import annotations

import copy
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.decode import CACHE, Process, median_ratio
from bench.report import Figure, report
from services.common.local.stack import KEEP_MEMORY
from sipo.datasets.bundled import bundled_eval_prompts
from sipo.models import BUNDLED_MODEL, BaseModelRef, model_sha256, resolve_model
from sipo.policies import Draft, PolicyStore
from sipo.preferences import format_weights, sampling_weights
from sipo.prompts import PromptFormat
from sipo.rewards import Group, RewardModel, Rewards
from sipo.rewards.model import StackedSet
from support.decoder import random_adapter

OBJECTIVES = ["concise", "warm"]
SOUPS = sampling_weights(OBJECTIVES)
BETA = 0.1
RANK, SCALE = 16, 0.1
PROMPTS, RESPONSES = 16, 10
SHORTEST, LONGEST = 96, 160
MEMORY_BUDGET = 4096
THREADS = os.cpu_count() or 1
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BFLOAT16_PROMPTS = PROMPTS if GPU else 1  # most CPUs are slow at it

Shape = tuple[int, ...]


def load(base: Path) -> Any:
    torch.set_num_threads(THREADS)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(DEVICE).eval()


def forget_peak() -> None:
    """Loading takes more than a pass, and would hide it."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Of this whole process since `forget_peak`; on a GPU what tensors took there."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


# Contestants


class Published:
    """Each policy and each soup as a plain transformers model of its own."""

    def __init__(self, base: Path, store: PolicyStore) -> None:
        policies = store.get("bench")
        self.reference = load(base)
        self.adapted = PeftModel.from_pretrained(load(base), policies.adapter_dir(OBJECTIVES[0]), adapter_name=OBJECTIVES[0])
        for objective in OBJECTIVES[1:]:
            self.adapted.load_adapter(policies.adapter_dir(objective), objective)
        self.adapters = {objective: objective for objective in OBJECTIVES}
        for number, weights in enumerate(SOUPS):
            name = self.adapters[format_weights(weights)] = f"soup{number}"
            self.adapted.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
        self.merged = {name: self._merge(adapter) for name, adapter in self.adapters.items()}

    def _merge(self, adapter: str) -> Any:
        own = copy.deepcopy(self.adapted)
        own.set_adapter(adapter)
        return own.merge_and_unload()

    def score(self, group: Group) -> tuple[float, list[Rewards]]:
        start = time.perf_counter()
        rewards: list[Rewards] = [{} for _ in group.responses]
        for name, model in self.merged.items():
            for one, ids in zip(rewards, group.responses, strict=True):
                one[name] = BETA * (log_prob(model, group.prompt, ids) - log_prob(self.reference, group.prompt, ids))
        return time.perf_counter() - start, rewards

    def score_bfloat16(self, group: Group) -> list[Rewards]:
        """Base and adapters in bfloat16, unmerged: a delta added to a bfloat16 weight is mostly rounded away."""
        model = self.adapted.to(torch.bfloat16)
        with model.disable_adapter():
            references = [log_prob(model, group.prompt, ids) for ids in group.responses]
        rewards: list[Rewards] = [{} for _ in group.responses]
        for name, adapter in self.adapters.items():
            model.set_adapter(adapter)
            for one, ids, reference in zip(rewards, group.responses, references, strict=True):
                one[name] = BETA * (log_prob(model, group.prompt, ids) - reference)
        return rewards


@torch.inference_mode()
def log_prob(model: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    log_probs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    tokens = log_probs.gather(2, ids[:, 1:, None]).squeeze(2)
    return float(tokens[:, len(prompt) - 1 :].sum())


class Ours:
    """The set "bench" as it is, and the set "floor" without its deltas: the base alone, in the same passes."""

    def __init__(self, base: Path, store: PolicyStore, token_budget: int | None = None) -> None:
        torch.set_num_threads(THREADS)
        sha256 = model_sha256(base, CACHE)
        self.model = RewardModel.load(base, store, base_sha256=sha256, device="auto", token_budget=token_budget)
        floor = store.get("floor")
        self.model._resident[floor.id] = StackedSet(floor, stacks={})

    def score(self, policy_set: str, group: Group, precision: str = "highest") -> tuple[float, list[Rewards]]:
        torch.set_float32_matmul_precision(precision)
        start = time.perf_counter()
        (rewards,) = self.model.score(policy_set, [group], SOUPS)
        return time.perf_counter() - start, rewards

    def peak(self, groups: Sequence[Group]) -> tuple[int, list[Shape]]:
        """Peak memory, and the shapes [rows, length] of the passes."""
        forget_peak()
        shapes: list[Shape] = []

        def keep_shape(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
            shapes.append(tuple(inputs["input_ids"].shape))

        self.model._model.base_model.register_forward_pre_hook(keep_shape, with_kwargs=True)
        self.model.score("bench", groups, SOUPS)
        return peak_bytes(), shapes


class Base:
    """The base alone, up to the last hidden states."""

    def __init__(self, base: Path) -> None:
        self.model = load(base).base_model

    @torch.inference_mode()
    def peak(self, shapes: Sequence[Shape]) -> int:
        forget_peak()
        for shape in shapes:
            self.model(input_ids=torch.ones(shape, dtype=torch.long, device=DEVICE), use_cache=False)
        return peak_bytes()


# The comparison


def make_groups(base: Path) -> list[Group]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt_format = PromptFormat.of(tokenizer)
    drawn = random.Random(0)

    def response() -> list[int]:
        return [drawn.randrange(tokenizer.vocab_size) for _ in range(drawn.randint(SHORTEST, LONGEST))]

    prompts = [prompt_format.prompt_ids(prompt, tokenizer) for prompt in bundled_eval_prompts()[:PROMPTS]]
    return [Group(prompt, [response() for _ in range(RESPONSES)]) for prompt in prompts]


def publish(base: Path, folder: Path) -> PolicyStore:
    """Two random policies as "bench", and again as "floor"."""
    adapters = {
        name: random_adapter(base, folder / name, seed=seed, rank=RANK, scale=SCALE) for seed, name in enumerate(OBJECTIVES)
    }
    store = PolicyStore(folder / "policies")
    for name in ("bench", "floor"):
        draft = Draft(
            name=name,
            base=BaseModelRef(name=BUNDLED_MODEL, sha256=model_sha256(base, CACHE)),
            prompt_format=PromptFormat.of(AutoTokenizer.from_pretrained(base)),
            objectives=OBJECTIVES,
            beta=BETA,
        )
        store.publish(draft, adapters, base, activate=True)
    return store


def largest_difference(found: Sequence[list[Rewards]], wanted: Sequence[list[Rewards]]) -> float:
    return max(
        abs(one[name] - other[name])
        for some, others in zip(found, wanted, strict=True)
        for one, other in zip(some, others, strict=True)
        for name in one
    )


def flipped(found: Sequence[list[Rewards]], wanted: Sequence[list[Rewards]]) -> float:
    """The share of the pairs of responses to a prompt, each under each reward, that the two put in another order."""

    def orders(prompts: Sequence[list[Rewards]]) -> list[bool]:
        return [one[name] > other[name] for rewards in prompts for one, other in combinations(rewards, 2) for name in one]

    return statistics.mean(a != b for a, b in zip(orders(found), orders(wanted), strict=True))


def spread(prompts: Sequence[list[Rewards]]) -> float:
    """How far the rewards of a model for responses to one prompt lie apart: the mean of their standard deviations."""
    return statistics.mean(statistics.stdev(one[name] for one in rewards) for rewards in prompts for name in rewards[0])


def memory(base: Path, store: PolicyStore, groups: Sequence[Group]) -> list[Figure]:
    """Passes of long rows, a few models at a time, and of short rows, all models at once."""
    print("memory", flush=True)
    first, second = groups[:2]
    with Process.start(Ours, base, store, MEMORY_BUDGET) as ours:
        taken, shapes = ours.ask("peak", [first, Group(second.prompt, second.responses[:4])])
    with Process.start(Base, base) as alone:
        least = alone.ask("peak", shapes)
    largest = max(rows * length for rows, length in shapes)
    return [
        Figure(f"peak memory over the base's, passes of up to {largest} tokens", taken / least, "times", 1.5, at_most=True),
        Figure("peak memory", taken / 2**20, "MiB"),
    ]


def compare(base: Path, store: PolicyStore, groups: Sequence[Group]) -> list[Figure]:
    with ExitStack() as stack:
        published = stack.enter_context(Process.start(Published, base, store))
        ours = stack.enter_context(Process.start(Ours, base, store))
        asked: dict[str, Callable[[Group], Any]] = {
            "published": lambda group: published.ask("score", group),
            "ours": lambda group: ours.ask("score", "bench", group),
            "floor": lambda group: ours.ask("score", "floor", group),
        }
        if GPU:
            asked["tf32"] = lambda group: ours.ask("score", "bench", group, "high")
        for ask in asked.values():
            ask(Group(groups[0].prompt, groups[0].responses[:1]))

        seconds: dict[str, list[float]] = {name: [] for name in asked}
        rewards: dict[str, list[list[Rewards]]] = {name: [] for name in asked}
        for number, group in enumerate(groups, start=1):
            for name, ask in asked.items():
                taken, found = ask(group)
                seconds[name].append(taken)
                rewards[name].append(found)
            print(f"prompt {number} of {len(groups)}", {name: round(all_[-1], 2) for name, all_ in seconds.items()}, flush=True)
        print("bfloat16", flush=True)
        few = groups[:BFLOAT16_PROMPTS]
        bfloat16 = [published.ask("score_bfloat16", group) for group in few]

    tokens = [sum(map(len, group.responses)) for group in groups]
    figures = [
        Figure("published way over ours", median_ratio(seconds["published"], seconds["ours"]), "times", 6 if GPU else 1.8),
        Figure("floor over ours", median_ratio(seconds["floor"], seconds["ours"]), "", 0.8),
        Figure("largest difference of a reward", largest_difference(rewards["ours"], rewards["published"]), "", 1e-3, at_most=True),
        Figure("standard deviation of the rewards for a prompt", spread(rewards["ours"]), ""),
        Figure("response tokens a second, under all models", sum(tokens) / sum(seconds["ours"]), "1/s"),
        Figure("a prompt with its responses", statistics.median(seconds["ours"]), "s"),
        Figure(f"orders that flip in bfloat16, prompts: {len(few)}", flipped(bfloat16, rewards["ours"][: len(few)]), ""),
    ]
    if GPU:
        figures += [
            Figure("float32 over TF32", median_ratio(seconds["ours"], seconds["tf32"]), "times"),
            Figure("orders that flip in TF32", flipped(rewards["tf32"], rewards["ours"]), "", 0.005, at_most=True),
        ]
    return figures


def main() -> None:
    os.environ |= KEEP_MEMORY  # read when a process starts: of use to the contestants, not here
    base = resolve_model(BUNDLED_MODEL, CACHE)
    groups = make_groups(base)
    with tempfile.TemporaryDirectory() as folder:
        store = publish(base, Path(folder))
        figures = compare(base, store, groups) + memory(base, store, groups)
    how = torch.cuda.get_device_name() if GPU else f"{THREADS} cores"
    report("score", f"{platform.machine()}, {how}, SmolLM2-135M, {len(groups)} prompts with {RESPONSES} responses", figures)


if __name__ == "__main__":
    main()

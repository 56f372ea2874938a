"""What each method's policies have learned: `make bench-methods`.

Each trains on the bundled training split with the same few pairs; SIPO, from the shipped policies, on what one round of the real
system accepts. Then all of them score the labelled pairs that nobody was trained on. The reward accuracy for an objective is the
share of its pairs whose preferred response has the larger implicit reward (Eq. 6); one model for both objectives has one for each.
Everything is kept in build/methods: called again, it goes on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from bench.filters import decide
from bench.report import FOLDER as BENCH
from bench.report import Figure, report
from gateway.settings import GatewaySettings
from gateway.shipped import publish_shipped
from services.common.contract.messages import PromptDecided
from services.common.local.training import run_child
from services.trainer.pairs import pareto_pairs_of
from sipo.datasets import answers_of, bundled_examples
from sipo.lora import load_adapter
from sipo.models import BUNDLED_MODEL, Base
from sipo.policies import Draft, PolicySet, PolicyStore
from sipo.preferences import Example, Weights
from sipo.rewards import Group, RewardModel
from sipo.selection import Filter
from sipo.soups import interpolated_soup, save_adapter
from sipo.training.data import Design
from sipo.training.planning import PlannedRun, Planner
from sipo.training.presets import read_preset
from sipo.training.run_folder import RECIPE
from sipo.training.run_set import RunSet
from sipo.training.settings import Progress, SftRun
from sipo.training.sft import sft_rows, train_sft

FOLDER = BENCH.parent / "methods"
PROMPTS = 24
MAX_PAIRS = 48
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
EQUAL = {"concise": 0.5, "warm": 0.5}
PRESET = read_preset("small")
ALIGNMENT = PRESET.alignment.model_copy(
    update={"epochs": 1, "batch_size": 4, "max_pairs": MAX_PAIRS, "lora_rank": 8, "lora_alpha": 16}
)


@dataclass(frozen=True)
class Bundled:
    """What every run begins with."""

    base: Base
    shipped: PolicySet

    def adapters(self) -> dict[str, Path]:
        return {name: self.shipped.adapter_dir(name) for name in self.shipped.objectives}


def plan(bundled: Bundled, decisions: Sequence[PromptDecided]) -> list[PlannedRun]:
    """Named METHOD for one model of both objectives, METHOD-OBJECTIVE for a policy."""
    planner, examples = Planner(bundled.base, bundled.shipped), bundled_examples("train")
    runs = [planner.lw(EQUAL, examples, ALIGNMENT)]
    for name in bundled.shipped.objectives:
        runs.append(replace(planner.dpo(name, examples, ALIGNMENT), name=f"dpo-{name}"))
        for divergence in DIVERGENCES:
            settings = ALIGNMENT.model_copy(update={"divergence": divergence})
            runs.append(replace(planner.dpo(name, examples, settings), name=f"{divergence}-{name}"))
        runs.append(replace(planner.modpo(name, EQUAL, examples, ALIGNMENT), name=f"modpo_of_{name}"))
        for design in get_args(Design):
            settings = PRESET.sipo.model_copy(update={"batch_size": 4})
            pairs = pareto_pairs_of(decisions, name, design)
            runs.append(replace(planner.sipo(name, pairs, settings), name=f"sipo_{design}-{name}"))
    return runs


def train_all(planned: Sequence[PlannedRun]) -> dict[str, Path]:
    """The adapters, by name; what is finished is not trained again. Raises InvalidRequest if there are runs with other settings."""
    runs = RunSet(FOLDER / "runs", planned)
    runs.prepare()
    folders = {run.name: runs.run_folder(run) for run in planned}
    for name, folder in folders.items():
        if folder.finished() is None:
            asyncio.run(run_child(folder.run_file, _silent))
            metrics = folder.finished()
            assert metrics is not None
            print(f"{name}: {metrics.pairs} pairs, {metrics.steps} steps, {metrics.seconds:.0f} s", flush=True)
    return {name: folder.adapter for name, folder in folders.items()}


async def _silent(_progress: Progress) -> None:
    pass


def round_decisions() -> list[PromptDecided]:
    """Of one round on conflicting training prompts."""
    kept = FOLDER / "decisions.jsonl"
    if not kept.exists():
        conflicting = [example for example in bundled_examples("train") if example.conflicting()]
        decisions = decide(conflicting[:PROMPTS], Filter())
        FOLDER.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(one.model_dump_json() + "\n" for one in decisions))
    return [PromptDecided.model_validate_json(line) for line in kept.read_text().splitlines()]


# What they have learned


def accuracies(bundled: Bundled, adapters: Mapping[str, Path], soups: Sequence[Weights]) -> dict[str, dict[str, float]]:
    """By name (a soup's: its weights), by objective: the reward accuracy on the held-out pairs. All models score in one pass."""
    store = PolicyStore(FOLDER / "policies")
    draft = Draft(
        name="methods",
        base=bundled.base.ref,
        prompt_format=bundled.shipped.manifest.prompt_format,
        objectives=list(adapters),
        beta=ALIGNMENT.beta,
    )
    policy_set = store.publish(draft, adapters, bundled.base.folder)
    model = RewardModel.load(bundled.base.folder, store, base_sha256=bundled.base.ref.sha256, device="auto")
    examples = held_out()
    groups = [group(bundled, example) for example in examples]
    rewards = model.score(policy_set.id, groups, soups)
    found: dict[str, dict[str, float]] = {}
    for name in rewards[0][0]:
        for objective in EQUAL:
            pairs = [
                (theirs[example.labels[objective]][name], theirs[1 - example.labels[objective]][name])
                for example, theirs in zip(examples, rewards, strict=True)
                if objective in example.labels
            ]
            found.setdefault(name, {})[objective] = sum(chosen > rejected for chosen, rejected in pairs) / len(pairs)
    return found


def held_out() -> list[Example]:
    return [*bundled_examples("validation"), *bundled_examples("test")]


def group(bundled: Bundled, example: Example) -> Group:
    to_ids, tokenizer = bundled.shipped.manifest.prompt_format, bundled.base.tokenizer
    responses = [to_ids.response_ids(text, tokenizer) for text in (example.response_0, example.response_1)]
    return Group(to_ids.prompt_ids(example.prompt, tokenizer), responses)


def fine_tune(bundled: Bundled) -> tuple[float, float]:
    """Loss per token of the held-out responses before and after SFT on both responses of so many training pairs."""
    base = bundled.base
    run = SftRun(
        base=base.folder,
        base_name=base.ref.name,
        base_sha256=base.ref.sha256,
        prompt_format=bundled.shipped.manifest.prompt_format,
        settings=PRESET.sft,
    )
    out = FOLDER / "sft"
    if not (out / RECIPE).exists():
        train_sft(
            run,
            list(map(answers_of, bundled_examples("train")[:MAX_PAIRS])),
            out,
            lambda _progress: None,
            merged=True,
        )
    # Below 40 prompts sft_rows holds nothing out, above it some: here both parts are held out.
    rows = sft_rows(map(answers_of, held_out()), run.prompt_format, base.tokenizer, run.settings)
    return (_loss(base.folder, [*rows.train, *rows.validation]), _loss(out, [*rows.train, *rows.validation]))


@torch.inference_mode()
def _loss(folder: Path, rows: Iterable[Mapping[str, list[int]]]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        count = int((labels[:, 1:] >= 0).sum())
        total += float(model(torch.tensor([row["input_ids"]]), labels=labels).loss) * count
        tokens += count
    return total / tokens


def show(found: Mapping[str, Mapping[str, float]]) -> None:
    """A row a method: a policy is asked for its own objective, one model for both."""
    table = Table(title=f"reward accuracy on {len(held_out())} held-out pairs, {BUNDLED_MODEL}")
    for column in ("method", *EQUAL):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in dict.fromkeys(name.partition("-")[0] for name in found):
        own = {objective: found.get(f"{method}-{objective}", found.get(method, {}))[objective] for objective in EQUAL}
        table.add_row(method, *(f"{accuracy:.0%}" for accuracy in own.values()))
    Console(width=120).print(table)


def main() -> None:
    settings = GatewaySettings(data_dir=FOLDER / "data")
    bundled = Bundled(Base.open(BUNDLED_MODEL, settings.cache_dir), publish_shipped(settings))
    trained = train_all(plan(bundled, round_decisions()))
    before, after = fine_tune(bundled)

    shipped = {f"shipped-{name}": folder for name, folder in bundled.adapters().items()}
    merged = FOLDER / "interpolated"
    if not merged.exists():
        soup = interpolated_soup({name: load_adapter(folder) for name, folder in bundled.adapters().items()}, EQUAL)
        save_adapter(soup, merged, BUNDLED_MODEL)
    adapters = {**shipped, **trained, "interpolated_soup": merged}
    exact = {name: EQUAL.get(name.removeprefix("shipped-"), 0.0) if name in shipped else 0.0 for name in adapters}
    found = accuracies(bundled, adapters, [exact])
    found = {name if name in adapters else "exact_soup": one for name, one in found.items()}
    show(found)
    figures = [
        Figure(f"{name}: reward accuracy for {objective}", value, "share")
        for name, by_objective in found.items()
        for objective, value in by_objective.items()
        if name.endswith(f"-{objective}") or "-" not in name
    ]
    figures += [Figure("sft: perplexity before", math.exp(before), ""), Figure("sft: perplexity after", math.exp(after), "")]
    report("methods", "the bundled data", figures)


if __name__ == "__main__":
    main()

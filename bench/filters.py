"""What each filter lets through: `make bench-filter`.

One round on conflicting prompts that the shipped policies were not trained on, whose candidates are then chosen among by every
rule in turn. The bundled data's objectives are functions, so it can be told which chosen responses are truly better than both
originals on both objectives.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from bench.report import Figure, report
from gateway.cli.demo.command import run_round
from gateway.cli.demo.input import bundled_input
from gateway.settings import GatewaySettings
from services.common.contract.messages import PromptDecided, ScoredCandidate
from services.trainer.decisions import DecisionLog
from sipo.conversation import as_text
from sipo.datasets import bundled_on_policy_examples
from sipo.datasets.bundled import BUNDLED_OBJECTIVES
from sipo.evaluation.ground_truth import REWARDS
from sipo.models import BUNDLED_MODEL, resolve_model
from sipo.preferences import Example
from sipo.selection import CandidateText, Filter, Scored, keep_rewrites, screen, select

OPTIONS: dict[str, Filter] = {
    "Eq. 7": Filter(),
    "policies only (r_Π)": Filter(soups=False),
    "length-normalised": Filter(length_normalized=True),
    "margin 0.1": Filter(margin=0.1),
    "margin 0.5": Filter(margin=0.5),
    "the code's keep-rewrite rule": Filter(keep_rewrite=True),
    "truncated kept": Filter(keep_truncated=True),
    "top 3": Filter(top_k=3),
    "separate responses": Filter(rule="separate_responses"),
    "no filter (SIPO − filter)": Filter(rule="no_filter"),
    "ground truth as reward models": Filter(implicit=False, reward_models=list(BUNDLED_OBJECTIVES)),
    "ground truth beside r_Π and r_W": Filter(reward_models=list(BUNDLED_OBJECTIVES)),
}

PROMPTS = 24
Tokens = Callable[[str], int]


@dataclass
class Outcome:
    prompts: int = 0
    responses: int = 0
    better: int = 0
    """Responses that are truly better than the originals that they make pairs with: on all objectives, or on the one that they
    were chosen for."""


def rewards(example: Example, text: str, implicit: Mapping[str, float], tokens: int, by: Filter) -> dict[str, float]:
    """What the scorer would have computed for this filter, from what it did compute."""
    found = {name: value for name, value in implicit.items() if by.soups or name in example.labels} if by.implicit else {}
    if by.length_normalized:
        found = {name: value / tokens for name, value in found.items()}
    return found | {f"true {name}": REWARDS[name](as_text(example.prompt), text) for name in by.reward_models}


def outcome(decisions: Sequence[PromptDecided], by: Filter, tokens: Tokens) -> Outcome:
    total = Outcome()
    for decision in decisions:
        example = decision.example
        if decision.rewards_0 is None or decision.rewards_1 is None:
            continue  # nothing was left to be scored
        texts = (example.response_0, example.response_1)
        first, second = (
            rewards(example, text, implicit, tokens(text), by)
            for text, implicit in zip(texts, (decision.rewards_0, decision.rewards_1), strict=True)
        )
        made = [one.candidate for one in decision.candidates]
        rejections = screen(
            texts, [CandidateText(one.text, one.finish_reason != "stop") for one in made], keep_truncated=by.keep_truncated
        )
        candidates: list[Scored] = [
            rejection or rewards(example, one.candidate.text, _scored(one), len(one.candidate.token_ids), by)
            for rejection, one in zip(rejections, decision.candidates, strict=True)
        ]
        if by.keep_rewrite:
            rewrites = {index: index - 1 for index, one in enumerate(made) if one.stage == "rewrite"}
            candidates = keep_rewrites(candidates, rewrites, list(example.labels))
        chosen = select(example, (first, second), candidates, by, seed=decision.prompt).chosen
        total.prompts += bool(chosen)
        total.responses += len(chosen)
        total.better += sum(truly_better(example, made[one.candidate].text, one.objective) for one in chosen)
    return total


def _scored(one: ScoredCandidate) -> Mapping[str, float]:
    assert one.rewards is not None, "the round kept truncated responses, so all that screening leaves are scored"
    return one.rewards


def truly_better(example: Example, text: str, objective: str | None) -> bool:
    def better(name: str, original: str) -> bool:
        return REWARDS[name](as_text(example.prompt), text) > REWARDS[name](as_text(example.prompt), original)

    if objective is not None:
        return better(objective, example.chosen_rejected(objective)[0])
    return all(better(name, original) for name in BUNDLED_OBJECTIVES for original in (example.response_0, example.response_1))


def decide(examples: list[Example], by: Filter) -> list[PromptDecided]:
    """The decisions of a round of the shipped policies, in a data folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        settings = GatewaySettings(host="127.0.0.1", data_dir=Path(folder))
        source = bundled_input(settings)
        pairs_only = {"max_prompts": None, "stop_after": "pairs", "evaluation": None, "activate": False, "filter": by}
        spec = source.spec.model_copy(update=pairs_only)
        job = asyncio.run(run_round(settings, replace(source, spec=spec, examples=examples, held_out=[])))
        return DecisionLog(settings.data_dir / "jobs" / job.id).read(1)


def main() -> None:
    unseen = {example.prompt: example for example in bundled_on_policy_examples("validation") if example.conflicting()}
    decisions = decide(list(unseen.values())[:PROMPTS], Filter(keep_truncated=True))
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUNDLED_MODEL, GatewaySettings().cache_dir))

    def tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"]) + 1  # and the end token

    table = Table(title=f"{len(decisions)} conflicting prompts of the bundled data, {BUNDLED_MODEL}")
    for column in ("filter", "prompts with a pair", "responses chosen", "truly better"):
        table.add_column(column, justify="left" if column == "filter" else "right")
    figures = []
    for name, by in OPTIONS.items():
        found = outcome(decisions, by, tokens)
        share, precision = found.prompts / len(decisions), found.better / max(1, found.responses)
        table.add_row(name, f"{found.prompts} ({share:.0%})", str(found.responses), f"{precision:.0%}")
        figures += [Figure(f"{name}: prompts with a pair", share, "share"), Figure(f"{name}: truly better", precision, "share")]
    Console(width=120).print(table)
    report("filter", "one round on the bundled data", figures)


if __name__ == "__main__":
    main()

"""Makes sipo/data/bundled/train.jsonl again: two responses per prompt of prompts.txt, labelled by the ground-truth functions.

    python scripts/make_bundled_data.py [--headroom]

Same model, seeds and library versions give the same file. It knows nothing of policies: the responses are the bundled model's own,
and what makes the two differ is a system text and a length, which are used here only and never stored with the prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from sipo.datasets import conflict_report
from sipo.datasets.bundled import BUNDLED_OBJECTIVES, CLEAR
from sipo.evaluation.ground_truth import REWARDS
from sipo.models import BUNDLED_MODEL, resolve_model
from sipo.preferences import Example
from sipo.prompts import PromptFormat

FOLDER = Path(__file__).parents[1] / "sipo" / "data" / "bundled"
SEED = 20250214
BATCH = 50
TOP_K = 40
# Two responses must be whole and differ by CLEAR on both objectives. Otherwise the prompt gets two new ones, of the second pair of
# styles, until so many attempts have failed: then it is left out.
MIN_WORDS = 5
ATTEMPTS = 3


@dataclass(frozen=True)
class Style:
    """One way of asking the model: what it is told, how long it may go on, how freely it draws."""

    system: str | None
    max_tokens: int
    temperature: float = 0.7


STYLES = {
    "terse": Style("Answer in one short sentence.", 40),
    "warm": Style("You are a kind and cheerful friend. Answer in two or three warm, encouraging sentences.", 80),
    "kind": Style("You are a kind friend. Give a short, friendly answer.", 40),
    "formal": Style("Answer in a long, detailed, formal paragraph.", 80),
}
# The first pair mostly conflicts (one is shorter, the other warmer), the second mostly agrees (one is both).
PAIRS = (("terse", "warm"), ("kind", "formal"))
SHARE_OF_FIRST_PAIR = 0.6

# --headroom: eight more responses for every HEADROOM_STEPth prompt tell how often one beats both originals on both objectives.
HEADROOM_STEP = 10
HEADROOM_STYLES = [
    Style(system, 44, temperature)
    for system in (
        "You are a kind friend. Give a short, friendly answer.",
        "You are a proud and happy grandmother. Answer in one or two short sentences.",
        "You are a loving, cheerful friend. Answer in one short, warm sentence full of kindness and love.",
        "Wish the user well, and give one short tip.",
    )
    for temperature in (0.7, 1.0)
]


def pair_of(prompt: str, attempt: int) -> tuple[str, str]:
    """The styles of (response_0, response_1); which comes first is drawn, so that position carries no label."""
    draw = random.Random(f"{SEED} {prompt}")
    first, second = PAIRS[0] if draw.random() < SHARE_OF_FIRST_PAIR and attempt == 0 else PAIRS[1]
    return (first, second) if draw.random() < 0.5 else (second, first)


def split_of(prompt: str) -> str:
    """By the prompt alone, 80/10/10."""
    bucket = int(hashlib.sha1(prompt.encode()).hexdigest(), 16) % 100
    return "train" if bucket < 80 else "validation" if bucket < 90 else "test"


def batches(prompts: list[str], style: Style, attempt: int = 0) -> Iterator[tuple[list[str], int]]:
    """Prompts of about the same length together, each batch with its own seed: batches can be made in any order."""
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        yield batch, random.Random(f"{SEED + attempt} {style} {batch[0]}").getrandbits(32)


@torch.inference_mode()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], style: Style, seed: int) -> list[str]:
    """One response per prompt, from the distribution's TOP_K tokens. Rows that have ended leave the batch."""
    generator = torch.Generator().manual_seed(seed)
    form = PromptFormat.of(tokenizer, system=style.system)
    texts = [form.text(prompt, tokenizer) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], DynamicCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = torch.arange(len(prompts))
    tokens: list[list[int]] = [[] for _ in prompts]
    for _ in range(style.max_tokens + 1):
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        top, index = output.logits[:, -1].topk(TOP_K)
        drawn = index.gather(1, torch.multinomial((top / style.temperature).softmax(-1), 1, generator=generator))
        alive = drawn[:, 0] != tokenizer.eos_token_id
        for row, token in zip(rows[alive].tolist(), drawn[alive, 0].tolist(), strict=True):
            tokens[row].append(token)
        if not alive.any():
            break
        if not alive.all():
            cache.batch_select_indices(alive.nonzero()[:, 0])
        rows, ids = rows[alive], drawn[alive]
        mask = torch.cat([mask[alive], torch.ones_like(ids)], dim=1)
        positions = positions[alive, -1:] + 1
    return [
        complete_sentences(text) if len(line) > style.max_tokens else text.strip()
        for line, text in zip(tokens, tokenizer.batch_decode(tokens), strict=True)
    ]


def complete_sentences(text: str) -> str:
    """A response that went on beyond its length is cut after its last whole sentence, so that every response comes to an end."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s)", text)]
    while ends and re.fullmatch(r"\d+\.", text[: ends[-1]].rsplit(maxsplit=1)[-1]):  # the number of a list's next entry
        ends.pop()
    return text[: ends[-1]].strip() if ends else ""


def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = resolve_model(BUNDLED_MODEL, Path("~/.cache/sipo").expanduser())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def make_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for attempt in range(ATTEMPTS):
        left = [prompt for prompt in prompts if prompt not in rows]
        responses = {
            (prompt, name): response
            for name, style in STYLES.items()
            for batch, seed in batches([prompt for prompt in left if name in pair_of(prompt, attempt)], style, attempt)
            for prompt, response in zip(batch, sample(model, tokenizer, batch, style, seed), strict=True)
        }
        for prompt in left:
            styles = pair_of(prompt, attempt)
            row = labelled(prompt, *(responses[prompt, name] for name in styles), styles)
            if clear(row):
                rows[prompt] = row
    return [rows[prompt] for prompt in prompts if prompt in rows]


def clear(row: dict[str, Any]) -> bool:
    texts = (row["response_0"], row["response_1"])
    whole = all(len(text.split()) >= MIN_WORDS and text.count("(") == text.count(")") for text in texts)
    return whole and all(abs(first - second) >= CLEAR for first, second in row["scores"].values())


def labelled(prompt: str, response_0: str, response_1: str, styles: tuple[str, str]) -> dict[str, Any]:
    scores = {name: [round(REWARDS[name](prompt, text), 4) for text in (response_0, response_1)] for name in BUNDLED_OBJECTIVES}
    return {
        "prompt": prompt,
        "response_0": response_0,
        "response_1": response_1,
        "labels": {name: int(second > first) for name, (first, second) in scores.items()},
        "scores": scores,
        "styles": styles,
        "split": split_of(prompt),
    }


def headroom(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> str:
    """How many prompts have one response of the eight that beats both originals on both objectives."""
    by_prompt = {row["prompt"]: row for row in rows[::HEADROOM_STEP]}
    beaten: Counter[str] = Counter()
    for style in HEADROOM_STYLES:
        for batch, seed in batches(list(by_prompt), style):
            for prompt, response in zip(batch, sample(model, tokenizer, batch, style, seed), strict=True):
                best = {name: max(scores) for name, scores in by_prompt[prompt]["scores"].items()}
                beaten[prompt] += all(REWARDS[name](prompt, response) > score for name, score in best.items())
    conflicting = [prompt for prompt, row in by_prompt.items() if len(set(row["labels"].values())) > 1]
    won, won_conflicting = (sum(beaten[prompt] > 0 for prompt in some) for some in (by_prompt, conflicting))
    return (
        f"both originals beaten on both objectives by one of {len(HEADROOM_STYLES)} more responses: {won} of {len(by_prompt)} "
        f"prompts, {won_conflicting} of the {len(conflicting)} conflicting ones"
    )


def figures(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Iterator[str]:
    report = conflict_report([Example.model_validate(row) for row in rows])
    yield f"rows: {report.rows}, splits: {dict(Counter(row['split'] for row in rows))}"
    yield f"conflicting: {report.conflicting} ({report.ratio:.1%})"
    by_style: dict[str, list[tuple[str, str]]] = {name: [] for name in STYLES}
    for row in rows:
        for name, key in zip(row["styles"], ("response_0", "response_1"), strict=True):
            by_style[name].append((row["prompt"], row[key]))
    for name, pairs in by_style.items():
        tokens = sorted(len(tokenizer(text)["input_ids"]) for _, text in pairs)
        means = ", ".join(
            f"{objective} {fmean(REWARDS[objective](*pair) for pair in pairs):.3f}" for objective in BUNDLED_OBJECTIVES
        )
        yield f"{name}: {len(tokens)} responses, tokens {tokens[0]}-{tokens[-1]} (median {tokens[len(tokens) // 2]}), mean {means}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--headroom", action="store_true", help="also count how often further responses beat both originals")
    wants = parser.parse_args()
    prompts = (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()
    model, tokenizer = load_model()
    rows = make_rows(model, tokenizer, prompts)
    (FOLDER / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(*figures(tokenizer, rows), sep="\n", flush=True)
    if wants.headroom:
        print(headroom(model, tokenizer, rows))


if __name__ == "__main__":
    main()

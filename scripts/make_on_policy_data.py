"""Makes sipo/data/bundled/on_policy.jsonl again: pairs of answers that the fine-tuned model itself samples, labelled.

    python scripts/make_on_policy_data.py REFERENCE

REFERENCE is the adapter of a fine-tuning on the bundled training split: what `sipo sft`, or the stage sft of an experiment, leaves.
The prompts are those of train.jsonl and of more_prompts.txt. Each is answered SAMPLES times; a prompt's answers make up to PAIRS
pairs, none of which shares an answer with another. On such pairs policies learn to tell good from bad among answers like their own,
which is what they are asked when they judge a round's candidates.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_bundled_data import FOLDER, MIN_WORDS, split_of

from sipo.datasets.bundled import BUNDLED_OBJECTIVES, CLEAR
from sipo.decoding.vllm.offline import OfflineDecoder
from sipo.evaluation.ground_truth import REWARDS
from sipo.models import BUNDLED_MODEL, Base
from sipo.preferences import REFERENCE

SEED = 20260214
SAMPLES = 8
PAIRS = 3
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 80}
PROMPTS_AT_ONCE = 100
"""Between two lines of progress."""


def prompts() -> list[str]:
    labelled = [json.loads(line)["prompt"] for line in (FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return labelled + (FOLDER / "more_prompts.txt").read_text(encoding="utf-8").splitlines()


def sample(decoder: OfflineDecoder, base: Base, asked: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each prompt with its whole answers, different ones only. Each of a prompt's samples has a seed of its own: with one for all
    they would be the same."""
    for start in range(0, len(asked), PROMPTS_AT_ONCE):
        batch = asked[start : start + PROMPTS_AT_ONCE]
        answers: dict[str, list[str]] = {prompt: [] for prompt in batch}
        for number in range(SAMPLES):
            ids = [base.prompt_format.prompt_ids(prompt, base.tokenizer) for prompt in batch]
            seed = random.Random(f"{SEED} {start} {number}").getrandbits(32)
            for prompt, response in zip(batch, decoder.generate(ids, mode=REFERENCE, seed=seed, **SAMPLING), strict=True):
                text = response.text.strip()
                whole = response.finish_reason == "stop" and len(text.split()) >= MIN_WORDS
                if whole and text not in answers[prompt]:
                    answers[prompt].append(text)
        print(f"{start + len(batch)} of {len(asked)} prompts", flush=True)
        yield from answers.items()


def pairs(prompt: str, answers: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the data set: an answer with the first of the others from which it differs clearly on both objectives."""
    left = answers[:]
    made = 0
    while left and made < PAIRS:
        one = left.pop()
        row = next((row for other in left if (row := labelled(prompt, one, other))), None)
        if row is not None:
            left.remove(row["response_1"])
            made += 1
            yield row


def labelled(prompt: str, response_0: str, response_1: str) -> dict[str, Any] | None:
    """None if an objective does not tell the two apart."""
    rewards = {name: [REWARDS[name](prompt, text) for text in (response_0, response_1)] for name in BUNDLED_OBJECTIVES}
    if any(abs(first - second) < CLEAR for first, second in rewards.values()):
        return None
    labels = {name: int(second > first) for name, (first, second) in rewards.items()}
    return {"prompt": prompt, "response_0": response_0, "response_1": response_1, "labels": labels, "split": split_of(prompt)}


def figures(rows: list[dict[str, Any]]) -> Iterator[str]:
    conflicting = [row for row in rows if len(set(row["labels"].values())) > 1]
    for name, some in (("pairs", rows), ("conflicting", conflicting)):
        prompts_of = len({row["prompt"] for row in some})
        by_split = dict(Counter(row["split"] for row in some))
        yield f"{name}: {len(some)} ({len(some) / len(rows):.1%}) of {prompts_of} prompts, by split {by_split}"


def main(reference: Path) -> None:
    base = Base.open(BUNDLED_MODEL, Path("~/.cache/sipo").expanduser())
    # The engine wants a policy; the reference is asked alone, so any adapter will do for it.
    with OfflineDecoder(base.folder, {"reference": reference}, reference=reference, max_model_len=512, max_num_seqs=128) as decoder:
        rows = [row for prompt, answers in sample(decoder, base, prompts()) for row in pairs(prompt, answers)]
    (FOLDER / "on_policy.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(*figures(rows), sep="\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

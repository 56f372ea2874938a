"""Supervised fine-tuning of a tiny random Llama into a new base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sipo.errors import Conflict, InvalidRequest
from sipo.models import model_sha256
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.training.settings import Progress, TrainSettings
from sipo.training.sft import SftRun, sft_rows, train_sft

EXAMPLES = [Example(prompt=f"question {i}", response_0="yes, yes", response_1=f"no {i}", labels={"warm": 0}) for i in range(6)]
SETTINGS = TrainSettings(epochs=4, learning_rate=1e-2, batch_size=4, lora_rank=4, lora_alpha=8, checkpoint_steps=1)


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


def mean_nll(folder: Path, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerFast) -> float:
    """Of all responses, per token, the plain way."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for example in EXAMPLES:
        prompt = prompt_format.prompt_ids(example.prompt, tokenizer)
        for text in (example.response_0, example.response_1):
            ids = prompt_format.response_ids(text, tokenizer)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            total -= float(logits.log_softmax(-1)[range(len(ids)), ids].sum())
            count += len(ids)
    return total / count


def test_rows_are_every_different_response_with_labels_on_the_response_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [*EXAMPLES[:1], EXAMPLES[0].model_copy(update={"response_1": "yes, yes"}), EXAMPLES[1]]
    long = Example(prompt="p" * 300, response_0="a", response_1="b", labels={"warm": 0})
    rows = sft_rows([*examples, long], PromptFormat.of(tiny_tokenizer), tiny_tokenizer, SETTINGS)
    assert (len(rows.train), rows.validation, rows.left_out) == (4, [], 1)
    texts = set()
    for row in rows.train:
        response = [id_ for id_ in row["labels"] if id_ != -100]
        assert row["input_ids"][-len(response) :] == response
        texts.add((tiny_tokenizer.decode(row["input_ids"][: -len(response)]), tiny_tokenizer.decode(response)))
    assert texts == {
        (f"u:question {i}<end>\na:", f"{text}<end>") for i, text in ((0, "yes, yes"), (0, "no 0"), (1, "yes, yes"), (1, "no 1"))
    }


def test_a_killed_fine_tuning_goes_on_and_becomes_a_base_with_its_own_hash(
    tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prompt_format = PromptFormat.of(tiny_tokenizer)
    run = SftRun(tiny_base, "tiny", prompt_format, SETTINGS)
    steps: list[int] = []

    def kill_at_5(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 5 and steps.count(5) == 1:
            raise Killed

    def tune(out: Path) -> Path:
        return train_sft(run, EXAMPLES, out, kill_at_5, cache_dir=tmp_path / "cache")

    with pytest.raises(Killed):
        tune(tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
    tuned = tune(tmp_path / "tuned")
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12]

    before, after = (mean_nll(folder, prompt_format, tiny_tokenizer) for folder in (tiny_base, tuned))
    recipe = json.loads((tuned / "recipe.json").read_text())
    assert after < before - 1
    assert recipe["loss"] == pytest.approx(after, rel=0.02)  # TRL's is a mean of batches
    assert recipe["base"]["sha256"] == model_sha256(tiny_base, tmp_path / "cache") != recipe["sha256"]
    assert recipe["sha256"] == model_sha256(tuned, tmp_path / "cache")
    assert AutoModelForCausalLM.from_pretrained(tuned).dtype == torch.float32
    assert (tuned / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "cache"}

    again = tune(tmp_path / "again")  # without being killed
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tuned, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(Conflict, match="is there already"):
        tune(tmp_path / "again")


def test_nothing_to_train_on_is_told(tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_prompt_tokens": 3})
    with pytest.raises(InvalidRequest, match="6 prompts are longer than 3 tokens"):
        run = SftRun(tiny_base, "tiny", PromptFormat.of(tiny_tokenizer), settings)
        train_sft(run, EXAMPLES, tmp_path / "x", print, cache_dir=tmp_path)

"""Supervised fine-tuning of a tiny random Llama into a new base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTTrainer

from sipo.conversation import Message
from sipo.datasets import Answers, answers_of
from sipo.errors import Conflict, InvalidRequest, TrainingFailed
from sipo.models import model_sha256
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.training.settings import Progress, TrainSettings
from sipo.training.sft import SftRun, sft_rows, train_sft

EXAMPLES = [Example(prompt=f"question {i}", response_0="yes, yes", response_1=f"no {i}", labels={"warm": 0}) for i in range(6)]
SETTINGS = TrainSettings(epochs=4, learning_rate=1e-2, batch_size=4, lora_rank=4, lora_alpha=8, checkpoint_steps=1)


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


ANSWERED = list(map(answers_of, EXAMPLES))


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
    rows = sft_rows(map(answers_of, [*examples, long]), PromptFormat.of(tiny_tokenizer), tiny_tokenizer, SETTINGS)
    assert (len(rows.train), rows.validation, rows.left_out) == (4, [], 1)
    texts = set()
    for row in rows.train:
        response = [id_ for id_ in row["labels"] if id_ != -100]
        assert row["input_ids"][-len(response) :] == response
        texts.add((tiny_tokenizer.decode(row["input_ids"][: -len(response)]), tiny_tokenizer.decode(response)))
    assert texts == {
        (f"u:question {i}<end>\na:", f"{text}<end>") for i, text in ((0, "yes, yes"), (0, "no 0"), (1, "yes, yes"), (1, "no 1"))
    }


def test_the_responses_to_a_conversation_are_rows_of_one_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    talk = (Message(role="user", content="x"), Message(role="assistant", content="y"), Message(role="user", content="z"))
    answered = [Answers(prompt=talk, responses=["no", "yes"]), Answers(prompt=talk, responses=["no", "no!"])]
    rows = sft_rows(answered, PromptFormat.of(tiny_tokenizer), tiny_tokenizer, SETTINGS)
    before = "u:x<end>\na:y<end>\nu:z<end>\na:"
    assert [tiny_tokenizer.decode(row["input_ids"]) for row in rows.train] == [
        f"{before}{text}<end>" for text in ("no", "yes", "no!")
    ]


@pytest.mark.slow
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

    def tune(out: Path, run: SftRun = run, examples: list[Example] = EXAMPLES) -> Path:
        return train_sft(run, list(map(answers_of, examples)), out, kill_at_5, cache_dir=tmp_path / "cache")

    with pytest.raises(Killed):
        tune(tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
    slower = replace(run, settings=SETTINGS.model_copy(update={"learning_rate": 1e-3}))
    for other, examples, differs in ((run, EXAMPLES[1:], "data_sha256"), (slower, EXAMPLES, "settings")):
        with pytest.raises(Conflict, match=f"checkpoints of another fine-tuning, which differs in {differs}: name another folder"):
            tune(tmp_path / "tuned", other, examples)
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
    history = [json.loads(line) for line in (tuned / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [*range(1, 13)]
    assert any((tuned / "tensorboard").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "cache"}

    again = tune(tmp_path / "again")  # without being killed
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tuned, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(Conflict, match="is there already"):
        tune(tmp_path / "again")


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(
    tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, room = SFTTrainer.compute_loss, 2

    def with_little_memory(self: SFTTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, model, inputs, *args, **kwargs)

    def tune(micro_batch: int) -> tuple[list[float | None], list[str], dict[str, Any]]:
        settings = SETTINGS.model_copy(update={"epochs": 1, "micro_batch_size": micro_batch, "checkpoint_steps": 9})
        said: list[Progress] = []
        # In bfloat16 a sum over another micro-batch is another number.
        run = SftRun(tiny_base, "tiny", PromptFormat.of(tiny_tokenizer), settings, dtype="float32")
        out = train_sft(run, ANSWERED, tmp_path / f"at-{micro_batch}", said.append, cache_dir=tmp_path / "cache")
        losses = [progress.loss for progress in said if not progress.note]
        return losses, [progress.note for progress in said if progress.note], json.loads((out / "recipe.json").read_text())

    monkeypatch.setattr(SFTTrainer, "compute_loss", with_little_memory)
    losses, notes, recipe = tune(4)
    assert notes == ["out of memory at 4 responses in a forward: goes on with 2, at the same batch size"]
    assert (recipe["steps"], recipe["micro_batch_size"]) == (3, 2)
    assert losses == pytest.approx(tune(1)[0], abs=1e-5)

    room = 0
    with pytest.raises(TrainingFailed, match=r"at 1 responses in a forward: use gradient_checkpointing, .* max_response_tokens$"):
        tune(3)


def test_nothing_to_train_on_is_told(tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_prompt_tokens": 3})
    with pytest.raises(InvalidRequest, match="6 prompts of more than max_prompt_tokens = 3"):
        run = SftRun(tiny_base, "tiny", PromptFormat.of(tiny_tokenizer), settings)
        train_sft(run, ANSWERED, tmp_path / "x", print, cache_dir=tmp_path)

"""Supervised fine-tuning of a tiny random Llama: into an adapter, and into a new base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTTrainer

from sipo.conversation import Message
from sipo.datasets import Answers, answers_of
from sipo.errors import Conflict, InvalidRequest, TrainingFailed
from sipo.models import model_sha256
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.training.settings import Answered, Progress, SftRun, TrainSettings
from sipo.training.sft import Sampler, sft_rows, train_sft

EXAMPLES = [Example(prompt=f"question {i}", response_0="yes, yes", response_1=f"no {i}", labels={"warm": 0}) for i in range(6)]
SETTINGS = TrainSettings(epochs=4, learning_rate=1e-2, batch_size=4, lora_rank=4, lora_alpha=8, checkpoint_steps=1)


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


ANSWERED = list(map(answers_of, EXAMPLES))


@pytest.fixture
def run(tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> SftRun:
    # In bfloat16 a sum over another micro-batch is another number.
    return SftRun(
        base=tiny_base,
        base_name="tiny",
        base_sha256="0" * 64,
        prompt_format=PromptFormat.of(tiny_tokenizer),
        settings=SETTINGS,
        dtype="float32",
    )


def changed(run: SftRun, **settings: Any) -> SftRun:
    return run.model_copy(update={"settings": run.settings.model_copy(update=settings)})


def recipe_of(folder: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((folder / "recipe.json").read_text())
    return recipe


def mean_nll(model: torch.nn.Module, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerFast) -> float:
    """Of all responses, per token, the plain way."""
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
def test_a_killed_fine_tuning_goes_on_and_leaves_an_adapter_with_its_records(
    run: SftRun, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    steps: list[int] = []

    def kill_at_5(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 5 and steps.count(5) == 1:
            raise Killed

    def tune(out: Path, run: SftRun = run, answered: list[Answers] = ANSWERED, **how: bool) -> Path:
        return train_sft(run, answered, out, kill_at_5, **how)

    with pytest.raises(Killed):
        tune(tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
    slower = changed(run, learning_rate=1e-3)
    for other, answered, differs in ((run, ANSWERED[1:], "data_sha256"), (slower, ANSWERED, "settings")):
        with pytest.raises(Conflict, match=f"checkpoints of another fine-tuning, which differs in {differs}: name another folder"):
            tune(tmp_path / "tuned", other, answered)
    tuned = tune(tmp_path / "tuned")
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12]

    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), tuned).eval()
    before, after = (mean_nll(model, run.prompt_format, tiny_tokenizer) for model in (plain, adapted))
    recipe = recipe_of(tuned)
    assert after < before - 1
    assert (recipe["loss_before"], recipe["loss_after"]) == pytest.approx((before, after), rel=0.02)  # TRL's is a mean of batches
    assert (recipe["base"], recipe["rows"]) == ({"name": "tiny", "sha256": "0" * 64}, 12)
    assert "trained by supervised fine-tuning" in (tuned / "README.md").read_text()
    assert f"| loss | {recipe['loss_before']:.4f} | {recipe['loss_after']:.4f} |" in (tuned / "README.md").read_text()
    assert (tuned / "loss.png").read_bytes().startswith(b"\x89PNG")
    history = [json.loads(line) for line in (tuned / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [*range(1, 13)]
    assert any((tuned / "tensorboard").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"tuned"}

    merged = tune(tmp_path / "merged", merged=True)  # without being killed
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.float32
    for name, weight in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=1e-5)
    assert recipe_of(merged)["sha256"] == model_sha256(merged, tmp_path / "cache") != model_sha256(tiny_base, tmp_path / "cache")
    with pytest.raises(Conflict, match="is there already"):
        tune(tmp_path / "merged")


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(
    run: SftRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, room = SFTTrainer.compute_loss, 2

    def with_little_memory(self: SFTTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, model, inputs, *args, **kwargs)

    def tune(micro_batch: int) -> tuple[list[float | None], list[str], dict[str, Any]]:
        said: list[Progress] = []
        at = changed(run, epochs=1, micro_batch_size=micro_batch, checkpoint_steps=9)
        out = train_sft(at, ANSWERED, tmp_path / f"at-{micro_batch}", said.append)
        losses = [progress.loss for progress in said if not progress.note]
        return losses, [progress.note for progress in said if progress.note], recipe_of(out)

    monkeypatch.setattr(SFTTrainer, "compute_loss", with_little_memory)
    losses, notes, recipe = tune(4)
    assert notes == ["out of memory at 4 responses in a forward: goes on with 2, at the same batch size"]
    assert (recipe["steps"], recipe["micro_batch_size"]) == (3, 2)
    assert losses == pytest.approx(tune(1)[0], abs=1e-5)

    room = 0
    with pytest.raises(TrainingFailed, match=r"at 1 responses in a forward: use gradient_checkpointing, .* max_response_tokens$"):
        tune(3)


@pytest.mark.slow
def test_a_fine_tuning_that_has_spoilt_the_answers_leaves_nothing(
    run: SftRun, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(model: Any, prompts: list[list[int]], *, end_token: int) -> Answered:
        asked.append(set(map(tuple, prompts)))
        spoilt = any(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)
        return Answered(prompts=6, tokens=9.5, empty=4 if spoilt else 0, endless=0, distinct=3)

    monkeypatch.setattr("sipo.training.sft.answer", answer)
    with pytest.raises(TrainingFailed, match="went too far: 4 of 6 greedy answers are empty, and before the training 0 were; use"):
        train_sft(changed(run, epochs=1, checkpoint_steps=9), ANSWERED, tmp_path / "tuned", lambda progress: None)
    prompts = {tuple(run.prompt_format.prompt_ids(example.prompt, tiny_tokenizer)) for example in EXAMPLES}
    assert asked == [prompts, prompts]
    assert not [*tmp_path.iterdir()]


def test_rows_of_similar_lengths_come_together_and_in_the_same_order_again() -> None:
    lengths = [*range(1, 65)]
    rows = Dataset.from_list([{"input_ids": [0] * length} for length in lengths])
    sampler = Sampler(4, rows, seed=0)
    epochs = []
    for epoch in (0, 1, 1):
        sampler.set_epoch(epoch)
        epochs.append([*sampler])
    assert epochs[0] != epochs[1] == epochs[2] and all(sorted(order) == [*range(64)] for order in epochs)
    batches = [[lengths[row] for row in epochs[0][at : at + 4]] for at in range(0, 64, 4)]
    spread = [max(batch) - min(batch) for batch in batches]
    assert sorted(spread)[8] < 20, "random ones span 38 of 64 on average"


def test_nothing_to_train_on_is_told(run: SftRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="6 prompts of more than max_prompt_tokens = 3"):
        train_sft(changed(run, max_prompt_tokens=3), ANSWERED, tmp_path / "x", print)

"""Training runs on a tiny random Llama in float32, against losses computed here from the equations."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sipo.errors import IncompatiblePolicy, InvalidRequest, TrainingFailed
from sipo.lora import load_adapter
from sipo.prompts import PromptFormat
from sipo.training.data import TokenisedPairs, TokenPair, TrainingPair, tokenise
from sipo.training.dpo import Reporter, build_trainer, train
from sipo.training.settings import Failure, Progress, TrainMetrics, TrainRun, TrainSettings, write_run

PAIRS = [TrainingPair(prompt=f"question {i}", chosen="yes " * (1 + i % 3), rejected=f"no, not {i}") for i in range(6)]


@pytest.fixture
def run(tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> TrainRun:
    return TrainRun(
        objective="warm",
        base=tiny_base,
        base_name="tiny",
        prompt_format=PromptFormat.of(tiny_tokenizer),
        settings=TrainSettings(alpha=0, learning_rate=1e-2, batch_size=3, lora_rank=4, lora_alpha=8),
        dtype="float32",
    )


def go(run: TrainRun, folder: Path, pairs: list[TrainingPair] = PAIRS) -> tuple[TrainMetrics, list[Progress]]:
    write_run(folder, run)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    steps: list[Progress] = []
    metrics = train(run, folder, steps.append)
    return metrics, [step for step in steps if step.stage == "training"]


def changed(run: TrainRun, **settings: float) -> TrainRun:
    return run.model_copy(update={"settings": run.settings.model_copy(update=settings)})


def log_probs(base: Path, adapter: Path | None, prompt_ids: list[int], response_ids: list[int]) -> torch.Tensor:
    """log pi(y_t | x, y_<t) for every token of one response, the plain way."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    at = torch.arange(len(prompt_ids) - 1, len(prompt_ids) + len(response_ids) - 1)
    chosen: torch.Tensor = logits.log_softmax(-1)[at, torch.tensor(response_ids)]
    return chosen


def rows(run: TrainRun) -> list[TokenPair]:
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    return tokenise(
        PAIRS, run.prompt_format, tokenizer, max_prompt_tokens=256, max_response_tokens=256, max_pairs=None, seed=0
    ).train


def silent(data: TokenisedPairs) -> Reporter:
    return Reporter("warm", lambda progress: None, len(data.train))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_first_alignment_starts_at_ln_2_and_learns_its_pairs(run: TrainRun, tmp_path: Path) -> None:
    metrics, steps = go(changed(run, epochs=4), tmp_path)
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert metrics.before.loss == pytest.approx(math.log(2), abs=1e-6)
    assert (metrics.before.margin, metrics.before.accuracy) == (0, 0.5)
    assert metrics.after.loss < 0.6 and metrics.after.accuracy == 1
    assert [step.step for step in steps] == list(range(1, 9)) and steps[-1].of == 8 and steps[-1].seconds_left == 0
    assert TrainMetrics.model_validate_json((tmp_path / "metrics.json").read_text()) == metrics


def test_the_references_pass_reports_how_far_it_is(run: TrainRun, tmp_path: Path) -> None:
    write_run(tmp_path, run)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    said: list[Progress] = []
    train(run, tmp_path, said.append)
    assert said[0].stage == "reference" and (said[0].step, said[0].of) == (1, len(PAIRS)) and said[0].loss is None
    assert [progress.stage for progress in said] == ["reference", "training", "training"]


def test_the_loss_after_an_alignment_is_that_of_equation_2(run: TrainRun, tmp_path: Path) -> None:
    metrics, _ = go(run, tmp_path)
    losses, margins = [], []
    for row in rows(run):
        ratio = [
            (
                log_probs(run.base, tmp_path / "adapter", row["prompt_ids"], ids)
                - log_probs(run.base, None, row["prompt_ids"], ids)
            ).sum()
            for ids in (row["chosen_ids"], row["rejected_ids"])
        ]
        margins.append(float(run.settings.beta * (ratio[0] - ratio[1])))
        losses.append(-math.log(1 / (1 + math.exp(-margins[-1]))))
    assert metrics.after.loss == pytest.approx(mean(losses), abs=1e-5)
    assert metrics.after.margin == pytest.approx(mean(margins), abs=1e-4)


def test_a_sipo_round_starts_at_ln_2_plus_alpha_times_the_mean_nll_per_response(run: TrainRun, tmp_path: Path) -> None:
    go(run, tmp_path / "first")
    start = tmp_path / "first" / "adapter"
    metrics, steps = go(changed(run, alpha=0.3, batch_size=6).model_copy(update={"start": start}), tmp_path / "second")
    nll = mean([float(-log_probs(run.base, start, row["prompt_ids"], row["chosen_ids"]).mean()) for row in rows(run)])
    assert len({len(row["chosen_ids"]) for row in rows(run)}) > 1, "responses of one length could not tell the two means apart"
    assert steps[0].loss == pytest.approx(math.log(2) + 0.3 * nll, abs=1e-4)
    assert metrics.before.loss == pytest.approx(math.log(2) + 0.3 * nll, abs=1e-4)
    assert metrics.after.loss < metrics.before.loss


def test_a_sipo_round_moves_the_policy_and_keeps_its_reference(run: TrainRun, tmp_path: Path) -> None:
    go(run, tmp_path / "first")
    start = tmp_path / "first" / "adapter"
    second = changed(run, alpha=0.3).model_copy(update={"start": start})
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    data = tokenise(PAIRS, run.prompt_format, tokenizer, max_prompt_tokens=99, max_response_tokens=99, max_pairs=None, seed=0)
    trainer = build_trainer(second, tmp_path, data, tokenizer, silent(data))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(".default." in name for name in moved)
    for name, value in load_file(start / "adapter_model.safetensors").items():
        torch.testing.assert_close(before[name.replace(".weight", ".ref.weight")], value)


def test_what_trl_trains_on_are_our_tokens(run: TrainRun, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    data = tokenise(PAIRS, run.prompt_format, tokenizer, max_prompt_tokens=99, max_response_tokens=99, max_pairs=None, seed=0)
    batches = list(build_trainer(run, tmp_path, data, tokenizer, silent(data)).get_eval_dataloader())
    for batch, row in zip(batches, data.train, strict=True):
        for ids, mask, seen, response in zip(
            batch["input_ids"],
            batch["completion_mask"],
            batch["attention_mask"],
            (row["chosen_ids"], row["rejected_ids"]),
            strict=True,
        ):
            assert ids[seen.bool()].tolist() == row["prompt_ids"] + response
            assert ids[mask.bool()].tolist() == response


def test_objectives_of_one_seed_share_the_initial_a(run: TrainRun, tmp_path: Path) -> None:
    still = changed(run, learning_rate=1e-12)
    go(still, tmp_path / "warm")
    go(
        still.model_copy(update={"objective": "concise"}),
        tmp_path / "concise",
        [TrainingPair(prompt=pair["prompt"], chosen=pair["rejected"], rejected=pair["chosen"]) for pair in PAIRS],
    )
    one, two = (load_adapter(tmp_path / name / "adapter").modules for name in ("warm", "concise"))
    assert {name.rpartition(".")[2] for name in one} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name in one:
        torch.testing.assert_close(one[name][0], two[name][0], atol=1e-6, rtol=0)


def test_a_folder_holds_a_plain_adapter_that_does_not_tell_where_the_base_lies(run: TrainRun, tmp_path: Path) -> None:
    go(run, tmp_path)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert str(run.base) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_a_loss_that_is_no_number_ends_the_run_without_an_adapter(run: TrainRun, tmp_path: Path) -> None:
    go(run, tmp_path / "first")
    start = tmp_path / "first" / "adapter"
    weights = load_file(start / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file(weights | {name: torch.full_like(weights[name], math.nan)}, start / "adapter_model.safetensors")
    with pytest.raises(TrainingFailed, match=r"'warm' diverged at step 1: loss nan"):
        go(run.model_copy(update={"start": start}), tmp_path / "second")
    assert not (tmp_path / "second" / "adapter").exists() and not (tmp_path / "second" / "metrics.json").exists()


def test_no_usable_pair_is_told_with_the_reason(run: TrainRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="2 prompts are longer than max_prompt_tokens = 5"):
        go(changed(run, max_prompt_tokens=5), tmp_path, PAIRS[:2])


def test_an_adapter_of_another_base_is_refused(run: TrainRun, tmp_path: Path) -> None:
    go(run, tmp_path / "first")
    start = tmp_path / "first" / "adapter"
    weights = load_file(start / "adapter_model.safetensors")
    save_file({name: torch.cat([value, value], dim=1) for name, value in weights.items()}, start / "adapter_model.safetensors")
    with pytest.raises(IncompatiblePolicy, match="cannot go on with"):
        go(run.model_copy(update={"start": start}), tmp_path / "second")


def test_the_process_prints_only_json_and_ends_with_the_reason_of_a_failure(run: TrainRun, tmp_path: Path) -> None:
    path = write_run(tmp_path, run)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    command = [sys.executable, "-m", "sipo.training", str(path)]
    good = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [Progress.model_validate_json(line) for line in good.stdout.splitlines()]
    assert [(progress.stage, progress.step) for progress in said] == [("reference", 1), ("training", 1), ("training", 2)]
    (tmp_path / "pairs.jsonl").write_text("")
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert Failure.model_validate_json(bad.stdout).error == "no pair to train 'warm' on: there are no pairs"

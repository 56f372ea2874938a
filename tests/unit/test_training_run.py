"""Training runs on a tiny random Llama in float32, against losses computed here from the equations."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from services.common.local.training import run_child
from sipo.errors import Conflict, IncompatiblePolicy, InvalidRequest, TrainingFailed
from sipo.lora import load_adapter, merge
from sipo.policies import adapter_sha256
from sipo.prompts import PromptFormat
from sipo.training.arguments import TRAINED_MODULES
from sipo.training.data import TokenisedPairs, TokenPair, TrainingPair, tokenise
from sipo.training.methods import modpo_margins
from sipo.training.process import claim
from sipo.training.reporting import Reporter
from sipo.training.run import build_trainer, made_worse, train
from sipo.training.run_folder import RunFolder
from sipo.training.settings import Measure, Progress, TrainMetrics, TrainRun, TrainSettings
from sipo.training.trainer import PairTrainer

pytestmark = pytest.mark.slow

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png"}
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
    RunFolder(folder).prepare(run, pairs)
    steps: list[Progress] = []
    metrics = train(run, folder, steps.append)
    return metrics, [step for step in steps if step.stage == "training"]


def changed(run: TrainRun, **settings: Any) -> TrainRun:
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


def log_ratio(run: TrainRun, adapter: Path | None, row: TokenPair, ids: list[int]) -> float:
    """log pi(y|x) − log pi_base(y|x)."""
    return float((log_probs(run.base, adapter, row["prompt_ids"], ids) - log_probs(run.base, None, row["prompt_ids"], ids)).sum())


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
    RunFolder(tmp_path).prepare(run, PAIRS)
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
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == ADAPTER_FILES
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
    with pytest.raises(InvalidRequest, match="2 prompts longer than max_prompt_tokens = 5"):
        go(changed(run, max_prompt_tokens=5), tmp_path, PAIRS[:2])


def test_a_tracker_that_is_not_installed_is_named(run: TrainRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="the tracker wandb is not installed: pip install wandb, or tracker: none"):
        go(changed(run, tracker="wandb"), tmp_path)


def test_an_adapter_of_another_base_is_refused(run: TrainRun, tmp_path: Path) -> None:
    go(run, tmp_path / "first")
    start = tmp_path / "first" / "adapter"
    weights = load_file(start / "adapter_model.safetensors")
    save_file({name: torch.cat([value, value], dim=1) for name, value in weights.items()}, start / "adapter_model.safetensors")
    with pytest.raises(IncompatiblePolicy, match="cannot go on with"):
        go(run.model_copy(update={"start": start}), tmp_path / "second")


def test_a_run_on_a_reference_is_the_run_on_a_base_with_it_merged(run: TrainRun, tmp_path: Path) -> None:
    reference = random_adapter(run.base, tmp_path / "reference")
    merged = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    merge(merged, load_adapter(reference))
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(run.base).save_pretrained(tmp_path / "merged")
    beneath = run.model_copy(update={"reference": reference, "reference_sha256": adapter_sha256(reference)})
    on_merged = run.model_copy(update={"base": tmp_path / "merged"})
    for stage in ("first", "second"):
        folders = [tmp_path / stage / name for name in ("beneath", "merged")]
        (one, steps), (two, wanted) = (
            go(made_from, folder) for made_from, folder in zip((beneath, on_merged), folders, strict=True)
        )
        assert [step.loss for step in steps] == pytest.approx([step.loss for step in wanted], abs=1e-5)
        assert one.after.margin == pytest.approx(two.after.margin, abs=1e-4) and one.answered == two.answered
        weights, others = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
        for name, value in weights.items():
            torch.testing.assert_close(others[name], value, atol=1e-4, rtol=1e-3)
        # The second goes on from the first, itself frozen as reference of the loss.
        beneath, on_merged = (
            changed(made_from, alpha=0.2).model_copy(update={"start": folder / "adapter"})
            for made_from, folder in zip((beneath, on_merged), folders, strict=True)
        )


def test_a_reference_that_is_another_adapter_by_now_is_refused(run: TrainRun, tmp_path: Path) -> None:
    reference = random_adapter(run.base, tmp_path / "reference")
    run = run.model_copy(update={"reference": reference, "reference_sha256": "0" * 64})
    with pytest.raises(IncompatiblePolicy, match="is not the adapter any more that the training began with"):
        go(run, tmp_path / "run")


def random_adapter(base: Path, folder: Path) -> Path:
    """On modules that are trained and on others."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


# Against TRL as it is


def stock(run: TrainRun, data: TokenisedPairs, folder: Path, **settings: Any) -> list[float]:
    """The losses of TRL's own trainer, step by step, on the same rows from the same start."""
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    model = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    fresh = None
    if run.start is None:
        fresh = LoraConfig(
            r=run.settings.lora_rank, lora_alpha=run.settings.lora_alpha, target_modules=TRAINED_MODULES, task_type="CAUSAL_LM"
        )
    else:
        model = PeftModel.from_pretrained(model, run.start, is_trainable=True)
    # As text, which TRL tokenises to the same: a token a byte, and it adds the end token itself.
    texts = {"prompt": ("prompt_ids", None), "chosen": ("chosen_ids", -1), "rejected": ("rejected_ids", -1)}
    rows = [{name: tokenizer.decode(row[key][:end]) for name, (key, end) in texts.items()} for row in data.train]
    common = build_trainer(run, folder / "ours", data, tokenizer, silent(data)).args
    args = DPOConfig(
        output_dir=str(folder / "stock"),
        **{name: getattr(common, name) for name in ("beta", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")},
        **{name: getattr(common, name) for name in ("num_train_epochs", "seed", "use_cpu", "bf16", "logging_steps")},
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        max_length=None,
        **settings,
    )
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=fresh
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tokenised(run: TrainRun, pairs: list[TrainingPair] = PAIRS) -> TokenisedPairs:
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    return tokenise(pairs, run.prompt_format, tokenizer, max_prompt_tokens=256, max_response_tokens=256, max_pairs=None, seed=0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"micro_batch_size": 3}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}),
        ({"divergence": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
        ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
        (
            {"divergence": "alpha_divergence", "divergence_alpha": 0.3},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        ),
        # At one pair a micro-batch TRL's mean per token is Eq. 8's per response.
        ({"alpha": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    ],
)
def test_losses_are_those_of_trl_where_it_has_the_same(
    run: TrainRun, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    run = changed(run, epochs=2, **ours)
    _, steps = go(run, tmp_path / "run")
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    assert [step.loss for step in steps] == pytest.approx(stock(run, tokenised(run), tmp_path, **batches | theirs), abs=1e-5)
    assert steps[0].loss != steps[-1].loss


def test_equation_8_does_not_depend_on_micro_batches(run: TrainRun, tmp_path: Path) -> None:
    """Where TRL's own NLL term does."""
    losses = []
    for micro in (1, 2, 6):
        settings = {"alpha": 0.5, "batch_size": 6, "epochs": 2, "micro_batch_size": micro}
        metrics, steps = go(changed(run, **settings), tmp_path / str(micro))
        assert metrics.micro_batch_size == micro
        losses.append([step.loss for step in steps])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
    sft = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "per_device_train_batch_size": 6}
    run = changed(run, alpha=0.5, batch_size=6, epochs=2)
    per_token = stock(run, tokenised(run), tmp_path, gradient_accumulation_steps=1, **sft)
    assert abs(per_token[0] - (losses[0][0] or 0)) > 1e-3


# Baselines


def test_lw_is_the_weighted_loss_of_both_orders_and_with_one_weight_plain_dpo(run: TrainRun, tmp_path: Path) -> None:
    pairs = [TrainingPair(**pair, opposing_weight=0.2 * (index % 3)) for index, pair in enumerate(PAIRS)]
    metrics, steps = go(run, tmp_path / "lw", pairs)
    losses = []
    for row in tokenised(run, pairs).train:
        ratios = [log_ratio(run, tmp_path / "lw" / "adapter", row, ids) for ids in (row["chosen_ids"], row["rejected_ids"])]
        margin = run.settings.beta * (ratios[0] - ratios[1])
        weight = row["opposing_weight"]
        losses.append((1 - weight) * math.log(1 + math.exp(-margin)) + weight * math.log(1 + math.exp(margin)))
    assert metrics.after.loss == pytest.approx(mean(losses), abs=1e-5)
    assert metrics.before.loss == pytest.approx(math.log(2), abs=1e-6)
    _, alone = go(run, tmp_path / "one", [TrainingPair(**pair, opposing_weight=0.0) for pair in PAIRS])
    _, plain = go(run, tmp_path / "plain")
    assert [step.loss for step in alone] == [step.loss for step in plain] != [step.loss for step in steps]


def test_modpo_is_dpo_with_the_other_objectives_as_margins(run: TrainRun, tmp_path: Path) -> None:
    """For three objectives, the others' of another beta, against the equation with the frozen policies computed apart."""
    beta, theirs = run.settings.beta, 2 * run.settings.beta
    adapters = {}
    for index, name in enumerate(("concise", "safe")):
        shuffled = [TrainingPair(prompt=pair["prompt"], chosen=pair["rejected"], rejected=pair["chosen"]) for pair in PAIRS[index:]]
        go(changed(run, seed=index, beta=theirs), tmp_path / name, shuffled)
        adapters[name] = tmp_path / name / "adapter"
    weights = {"warm": 0.4, "concise": 0.35, "safe": 0.25}
    margins = modpo_margins(weights, "warm", adapters, beta_ratio=theirs / beta)
    modpo = run.model_copy(update={"method": "modpo", "weights": weights, "margins": margins})
    metrics, _ = go(modpo, tmp_path / "modpo")

    def loss(adapter: Path | None) -> float:
        losses = []
        for row in tokenised(run).train:
            sides = []
            for ids in (row["chosen_ids"], row["rejected_ids"]):
                others = sum(weights[name] * theirs * log_ratio(run, path, row, ids) for name, path in adapters.items())
                sides.append((beta * log_ratio(run, adapter, row, ids) - others) / weights["warm"])
            losses.append(math.log(1 + math.exp(sides[1] - sides[0])))
        return mean(losses)

    assert metrics.before.loss == pytest.approx(loss(None), abs=1e-5) != pytest.approx(math.log(2), abs=1e-3)
    assert metrics.after.loss == pytest.approx(loss(tmp_path / "modpo" / "adapter"), abs=1e-4)
    assert {path.name for path in (tmp_path / "modpo" / "adapter").iterdir()} == ADAPTER_FILES


# Runs that are interrupted


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


@pytest.mark.parametrize("start", [None, "first"])
def test_a_run_killed_at_any_step_goes_on_and_ends_the_same(run: TrainRun, tmp_path: Path, start: str | None) -> None:
    run = changed(run, epochs=3, checkpoint_steps=1, alpha=0.2)
    if start:
        go(run, tmp_path / "first")
        run = run.model_copy(update={"start": tmp_path / "first" / "adapter"})
    whole, _ = go(run, tmp_path / "whole")
    folder = tmp_path / "killed"
    RunFolder(folder).prepare(run, PAIRS)
    seen: list[int] = []

    def killer(at: int) -> Callable[[Progress], None]:
        def tell(progress: Progress) -> None:
            if progress.stage == "training":
                seen.append(progress.step)
                if progress.step == at:
                    raise Killed

        return tell

    for at in (1, 3, 4):
        with pytest.raises(Killed):
            train(run, folder, killer(at))
    torn = folder / "checkpoints" / "checkpoint-99"
    torn.mkdir()  # a kill in the middle of saving
    (torn / "trainer_state.json").write_text("{")
    again = train(run, folder, killer(0))
    assert seen == [1, 1, 2, 3, 3, 4, 4, 5, 6], "a step is lost at most: what it had told was not saved yet"
    assert again.model_dump(exclude={"seconds"}) == whole.model_dump(exclude={"seconds"})
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert not (folder / "checkpoints").exists()


def test_a_run_killed_while_an_epoch_is_measured_measures_it_again(
    run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a checkpoint before the epoch's validation that a resumed run would take for the end of the epoch."""
    pairs = [TrainingPair(prompt=f"question {i}", chosen="yes, yes", rejected="no") for i in range(48)]
    contrary = held_out_pairs(run, pairs)[0]  # the first epoch's adapter is the best, then
    contrary["chosen"], contrary["rejected"] = contrary["rejected"], contrary["chosen"]
    run = changed(run, epochs=3, batch_size=16, checkpoint_steps=1)
    whole, _ = go(run, tmp_path / "whole", pairs)
    evaluate, evaluations = PairTrainer.evaluate, 0

    def killed_at_first(self: PairTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        if evaluations == 1:
            raise Killed
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "evaluate", killed_at_first)
    with pytest.raises(Killed):
        go(run, tmp_path / "killed", pairs)
    again, _ = go(run, tmp_path / "killed", pairs)
    assert evaluations == 1 + 3 + 1
    assert again.model_dump(exclude={"seconds"}) == whole.model_dump(exclude={"seconds"})


def test_a_run_is_one_processs_at_a_time(run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(tmp_path).prepare(run, PAIRS)
    path = RunFolder(tmp_path).run_file
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    with claim(path), pytest.raises(Conflict, match="is another process's work already"):
        claim(path)
    claim(path).close()


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(
    run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = changed(run, batch_size=6, epochs=2)
    whole, wanted = go(run, tmp_path / "small")
    compute = PairTrainer._compute_loss

    def with_little_memory(self: PairTrainer, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if len(inputs["input_ids"]) > 2 * 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, model, inputs, return_outputs)

    monkeypatch.setattr(PairTrainer, "_compute_loss", with_little_memory)
    said: list[Progress] = []
    RunFolder(tmp_path / "large").prepare(changed(run, micro_batch_size=6), PAIRS)
    metrics = train(changed(run, micro_batch_size=6), tmp_path / "large", said.append)
    notes = [progress.note for progress in said if progress.note]
    assert notes == [
        "out of memory at 6 pairs in a forward: goes on with 3, at the same batch size",
        "out of memory at 3 pairs in a forward: goes on with 1, at the same batch size",
    ]
    assert (metrics.micro_batch_size, metrics.steps) == (1, whole.steps)
    losses = [progress.loss for progress in said if progress.stage == "training" and not progress.note]
    assert losses == pytest.approx([step.loss for step in wanted], abs=1e-5)

    def without_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PairTrainer, "_compute_loss", without_memory)
    with pytest.raises(
        TrainingFailed,
        match=r"at 1 pairs in a forward: use gradient_checkpointing, smaller max_prompt_tokens and max_response_tokens$",
    ):
        go(run, tmp_path / "none")


# Validation


def test_with_held_out_pairs_the_best_epochs_adapter_is_kept(run: TrainRun, tmp_path: Path) -> None:
    """One of the held-out pairs contradicts all others: the surer the policy, the worse for it."""
    pairs = [TrainingPair(prompt=f"question {i}", chosen="yes, yes", rejected="no") for i in range(48)]
    contrary = held_out_pairs(run, pairs)[0]
    contrary["chosen"], contrary["rejected"] = contrary["rejected"], contrary["chosen"]
    metrics, _ = go(changed(run, epochs=4, batch_size=8), tmp_path, pairs)
    assert metrics.held_out
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    checks = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    epochs = [metrics.steps * epoch // 4 for epoch in (1, 2, 3, 4)]
    best = min(epochs, key=checks.__getitem__)
    assert metrics.best_step == best != metrics.steps
    assert metrics.after.loss == pytest.approx(checks[best], abs=1e-4)
    held_out = tokenised(run, pairs).validation
    adapter = tmp_path / "adapter"
    ratios = [
        log_ratio(run, adapter, row, row["chosen_ids"]) - log_ratio(run, adapter, row, row["rejected_ids"]) for row in held_out
    ]
    assert metrics.after.margin == pytest.approx(run.settings.beta * mean(ratios), abs=1e-3)


def test_a_run_that_ends_below_chance_fails_and_leaves_no_adapter(run: TrainRun, tmp_path: Path) -> None:
    """The held-out pairs say the opposite of the others."""
    pairs = [TrainingPair(prompt=f"question {i}", chosen="yes, yes", rejected="no") for i in range(48)]
    held_out = {row["prompt"] for row in held_out_pairs(run, pairs)}
    for pair in pairs:
        if pair["prompt"] in held_out:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    with pytest.raises(TrainingFailed, match=r"on 5 validation pairs its reward accuracy is 0\.00, below chance"):
        go(changed(run, batch_size=8), tmp_path, pairs)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("accuracy", "margin", "pairs", "worse"),
    [
        (0.33, -0.04, 6, False),  # 2 of 6 by chance: one time in three
        (0.0, -0.04, 6, True),
        (0.38, -0.04, 16, False),
        (0.2, -0.04, 16, True),
        (0.43, -0.01, 300, True),
        (0.43, 0.01, 300, False),  # few large margins are right
        (0.0, -1.0, 3, False),  # one time in eight
    ],
)
def test_few_pairs_below_one_half_are_no_failure_yet(accuracy: float, margin: float, pairs: int, worse: bool) -> None:
    start = Measure(loss=0.693, margin=0, accuracy=0.5)
    found = made_worse("sipo", start, Measure(loss=0.7, margin=margin, accuracy=accuracy), pairs)
    assert (found is not None) == worse


def held_out_pairs(run: TrainRun, pairs: list[TrainingPair]) -> list[TrainingPair]:
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    found = [row["prompt_ids"] for row in tokenised(run, pairs).validation]
    return [pair for pair in pairs if run.prompt_format.prompt_ids(pair["prompt"], tokenizer) in found]


# What stays


def test_a_run_leaves_its_records_for_people(run: TrainRun, tmp_path: Path) -> None:
    metrics, steps = go(run, tmp_path)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx([step.loss for step in steps])
    assert (tmp_path / "adapter" / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "trained by DPO (Eq. 2) from a fresh LoRA" in card
    assert hashlib.sha256((tmp_path / "pairs.jsonl").read_bytes()).hexdigest() in card
    assert f"| loss | {metrics.before.loss:.4f} | {metrics.after.loss:.4f} |" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "tiny"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([step.loss for step in steps], abs=1e-5)


async def test_two_processes_train_as_one_does_though_one_is_killed(run: TrainRun, tmp_path: Path) -> None:
    run = changed(run, batch_size=2, epochs=2, alpha=0.2, checkpoint_steps=1)
    _, alone = go(run, tmp_path / "one")
    folder = RunFolder(tmp_path / "two")
    folder.prepare(run, PAIRS)
    path = folder.run_file
    steps: list[Progress] = []

    async def tell(progress: Progress) -> None:
        if progress.stage == "training":
            steps.append(progress)
            if len(steps) == 3:
                workers = [one for one in psutil.Process().children(recursive=True) if "torch.distributed.run" not in one.cmdline()]
                next(worker for worker in workers if str(path) in worker.cmdline()).kill()

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sipo.training"]
    await run_child(path, tell, launch)
    assert len(steps) > len(alone), "it went on from a checkpoint"
    together = {progress.step: progress.loss for progress in steps}
    assert list(together.values()) == pytest.approx([step.loss for step in alone], abs=1e-5)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_and_a_batch_larger_than_the_data_change_no_loss(run: TrainRun, tmp_path: Path) -> None:
    _, plain = go(changed(run, batch_size=6, epochs=2), tmp_path / "plain")
    checkpointed = changed(run, batch_size=32, micro_batch_size=2, epochs=2, gradient_checkpointing=True)
    metrics, steps = go(checkpointed, tmp_path / "large")
    assert metrics.steps == 2
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in plain], abs=1e-5)

"""One objective's training run on TRL's DPOTrainer: a first alignment (Eq. 2) or a SIPO round (Eq. 8). No training loop of our own.

Both minimise

    -log sigmoid(beta · [log pi(y_c|x)/pi_ref(y_c|x) - log pi(y_l|x)/pi_ref(y_l|x)]) + alpha · (-log pi(y_c|x) / |y_c|)

with alpha = 0 in a first alignment. TRL's "sft" term is the mean over all chosen tokens of a micro-batch, Eq. 8's is per response:
they are the same at one pair per micro-batch, so pairs are accumulated one by one up to the batch size.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from sipo.errors import IncompatiblePolicy, InvalidRequest, TrainingFailed
from sipo.training.data import TokenisedPairs, TrainingPair, tokenise
from sipo.training.settings import ADAPTER, METRICS, PAIRS, Measure, Progress, TrainMetrics, TrainRun
from sipo.training.shared_prompt import share_prompts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
WARMUP = 0.1
WEIGHT_DECAY = 0.05
REPORT_SECONDS = 1.0
"""Between two reports of the reference's pass; each step of training is reported."""


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer on rows with tokens: its own tokenisation would keep what a chat template writes after the end token.

    `on_reference` is called after each pair whose reference log-probabilities are computed.
    """

    def __init__(self, *, on_reference: Callable[[], None], **arguments: Any) -> None:
        self._on_reference = on_reference
        super().__init__(**arguments)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # Called when TRL has put its head on the model, and before anything is computed with it.
        if name == "train":
            share_prompts(self.model.get_base_model())
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        found = super().compute_ref_log_probs(model, inputs)
        self._on_reference()
        return found


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Reports each step, and the reference's pass before; a loss that is no number ends the run at once."""

    def __init__(self, objective: str, report: Callable[[Progress], None], pairs: int) -> None:
        """`pairs` are the reference's to do."""
        self.objective = objective
        self.report = report
        self.pairs = pairs
        self.known = 0
        self.said = 0.0
        self.started = time.monotonic()

    def on_reference(self) -> None:
        self.known += 1
        now = time.monotonic()
        if now - self.said >= REPORT_SECONDS:
            self.said = now
            self._report("reference", self.known, self.pairs, of_them=self.known)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.monotonic()
        self.first_step = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])):
            raise TrainingFailed(
                f"the training of {self.objective!r} diverged at step {state.global_step}: loss {logs['loss']}, gradient norm "
                f"{logs['grad_norm']}; use a smaller learning_rate"
            )
        self._report(
            "training",
            state.global_step,
            state.max_steps,
            of_them=state.global_step - self.first_step,
            loss=logs["loss"],
            margin=logs["rewards/margins"],
            accuracy=logs["rewards/accuracies"],
        )

    def _report(self, stage: Literal["reference", "training"], step: int, of: int, *, of_them: int, **measured: float) -> None:
        """`of_them` were done since `started`: the time left follows."""
        left = (time.monotonic() - self.started) / of_them * (of - step)
        self.report(Progress(objective=self.objective, stage=stage, step=step, of=of, seconds_left=round(left, 1), **measured))


def train(run: TrainRun, folder: Path, report: Callable[[Progress], None]) -> TrainMetrics:
    """Trains on `folder`/pairs.jsonl and leaves the adapter and, last, the metrics in `folder`.

    Raises InvalidRequest if no pair is usable, IncompatiblePolicy if the base or the start adapter does not fit, TrainingFailed if
    the loss diverges.
    """
    settings = run.settings
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    run.prompt_format.check(tokenizer)
    data = tokenise(
        _read_pairs(folder / PAIRS),
        run.prompt_format,
        tokenizer,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_response_tokens=settings.max_response_tokens,
        max_pairs=settings.max_pairs,
        seed=settings.seed,
    )
    if not data.train:
        raise InvalidRequest(f"no pair to train {run.objective!r} on: {_left_out(data, settings.max_prompt_tokens)}")

    reporter = Reporter(run.objective, report, len(data.train) + len(data.validation) * data.held_out)
    started = time.monotonic()
    trainer = build_trainer(run, folder, data, tokenizer, reporter)
    before = _at_the_start(trainer, settings.alpha)
    trainer.train()
    after = _measure(trainer)
    if not math.isfinite(after.loss):
        raise TrainingFailed(f"the training of {run.objective!r} diverged in its last step: use a smaller learning_rate")
    _save_adapter(trainer.model, folder / ADAPTER, run.base_name)
    metrics = TrainMetrics(
        objective=run.objective,
        pairs=len(data.train),
        validation_pairs=len(data.validation),
        held_out=data.held_out,
        prompts_too_long=data.left_out["prompts_too_long"],
        identical=data.left_out["identical"],
        responses_cut=data.left_out["responses_cut"],
        steps=trainer.state.global_step,
        seconds=round(time.monotonic() - started, 1),
        dtype=str(trainer.model.get_base_model().dtype).removeprefix("torch."),
        before=before,
        after=after,
    )
    aside = folder / f".{METRICS}"
    aside.write_text(metrics.model_dump_json(indent=1))
    aside.rename(folder / METRICS)
    return metrics


def build_trainer(run: TrainRun, folder: Path, data: TokenisedPairs, tokenizer: Any, reporter: Reporter) -> DPOTrainer:
    """The trainer with its model.

    With `run.start`, TRL keeps a frozen copy of that adapter as reference. Without, it makes a fresh LoRA (after seeding: policies
    of one seed share A's initial values) and its reference is the base.
    """
    settings = run.settings
    dtype = _dtype(run)
    model = AutoModelForCausalLM.from_pretrained(run.base, dtype=dtype)
    fresh = None
    if run.start is None:
        fresh = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
    else:
        try:
            model = PeftModel.from_pretrained(model, run.start, is_trainable=True)
        except (ValueError, RuntimeError) as error:
            raise IncompatiblePolicy(f"cannot go on with {run.start}: {error}") from error
    steps_per_epoch = math.ceil(len(data.train) / settings.batch_size)
    eq8 = settings.alpha > 0
    args = DPOConfig(
        output_dir=str(folder / "checkpoints"),
        loss_type=["sigmoid", "sft"] if eq8 else ["sigmoid"],
        loss_weights=[1.0, settings.alpha] if eq8 else None,
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        # Rounded down: a short run has no step to lose to a learning rate of 0.
        warmup_steps=int(WARMUP * settings.epochs * steps_per_epoch),
        weight_decay=WEIGHT_DECAY,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.batch_size,
        # Costs one pass per pair, as computing it on the way would, and saves one for each further look at a pair.
        precompute_ref_log_probs=True,
        max_length=None,  # lengths are cut in sipo.training.data
        use_cpu=not torch.accelerator.is_available(),
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        seed=settings.seed,
    )
    trainer = PairTrainer(
        on_reference=reporter.on_reference,
        callbacks=[reporter],
        model=model,
        args=args,
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.validation) if data.held_out else None,
        processing_class=tokenizer,
        peft_config=fresh,
    )
    if not data.held_out:
        trainer.eval_dataset = trainer.train_dataset  # with its reference log-probabilities
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _dtype(run: TrainRun) -> torch.dtype:
    """A CPU without bfloat16 instructions takes four times as long in bfloat16 as in float32."""
    if run.dtype != "auto":
        return torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
    fast = torch.accelerator.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _read_pairs(path: Path) -> list[TrainingPair]:
    with path.open() as file:
        return [json.loads(line) for line in file]


def _left_out(data: TokenisedPairs, max_prompt_tokens: int) -> str:
    counts = data.left_out
    if not counts:
        return "there are no pairs"
    return (
        f"{counts['prompts_too_long']} prompts are longer than max_prompt_tokens = {max_prompt_tokens}, "
        f"in {counts['identical']} pairs chosen and rejected are the same"
    )


def _at_the_start(trainer: DPOTrainer, alpha: float) -> Measure:
    """What `_measure` would say before the first step, without a pass over the pairs: the policy still is its reference, so every
    pair is a tie, and the reference's log-probabilities are known."""
    rows = trainer.eval_dataset
    nll = [-logp / len(ids) for logp, ids in zip(rows["ref_chosen_logps"], rows["chosen_ids"], strict=True)]
    return Measure(loss=math.log(2) + alpha * fmean(nll), margin=0.0, accuracy=0.5)


def _measure(trainer: DPOTrainer) -> Measure:
    logs = trainer.evaluate()
    return Measure(loss=logs["eval_loss"], margin=logs["eval_rewards/margins"], accuracy=logs["eval_rewards/accuracies"])


def _save_adapter(model: Any, target: Path, base_name: str) -> None:
    """Only the trained adapter: not the reference's copy, and not the place where this machine keeps the base."""
    shutil.rmtree(target, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = base_name
    # Only q, k, v and o are trained: no need for PEFT to look up whether the embeddings were.
    model.save_pretrained(target, selected_adapters=["default"], save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)  # PEFT's empty model card

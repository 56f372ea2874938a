"""What a training run costs against a plain script of TRL's: `make bench-train`.

Plain: TRL's DPOTrainer on rows of text, with the same model, LoRA, pairs, order, precision and settings, the reference computed in
every step, nothing saved or evaluated. Ours: build_trainer as the trainer service uses it, and then the same `train()`. Both are
processes with the trainer's environment; in each round each makes a whole run of one epoch. A ratio is the median over the
rounds of the ratio within a round.

What is counted where. Ours computes the reference in one pass before the first step, so a step of ours goes through the policy
alone, where a plain step goes through the policy and the reference. The ratio of these bare steps is only told; the bar is for
what an epoch costs,

    (our reference pass + our epoch) / plain epoch

with an epoch from the begin to the end of training: batches, steps, logs, and our checkpoint. Three epochs are counted from the
same measurements, since the pass is made once: (our reference pass + 3 · our epoch) / (3 · plain epoch). Loading is left out on
both sides.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from bench.decode import CACHE, Process, median_ratio
from bench.report import Figure, report
from bench.score import GPU, peak_bytes
from services.common.local.stack import KEEP_MEMORY
from sipo.datasets.bundled import bundled_examples
from sipo.models import BUNDLED_MODEL, Base
from sipo.precision import torch_dtype
from sipo.training.arguments import WEIGHT_DECAY, fresh_lora
from sipo.training.data import TokenisedPairs, tokenise
from sipo.training.planning import PlannedRun, Planner
from sipo.training.reporting import Reporter
from sipo.training.run import build_trainer
from sipo.training.settings import TrainRun, TrainSettings
from support.decoder import random_adapter

OBJECTIVE = "warm"
PAIRS, BATCH = 16, 4
ROUNDS = 3
ALPHA = 0.1
SETTINGS = TrainSettings(alpha=0, batch_size=BATCH, max_pairs=PAIRS)


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Epoch:
    """Of a run of one epoch. `reference`, `steps` and `whole` are seconds: of the reference's pass before it (0: it has none), of
    the optimizer steps, from the begin to the end of training. `losses` are of the steps; `peak` is the process's memory so far."""

    reference: float
    steps: list[float]
    whole: float
    losses: list[float]
    peak: int

    def seconds(self, epochs: int) -> float:
        return self.reference + epochs * self.whole


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = now()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step_began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(now() - self.step_began)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.whole = now() - self.began


class ReferenceClock(Reporter):
    """What a run reports goes nowhere; when the reference of a pair is known is kept."""

    def __init__(self, pairs: int) -> None:
        super().__init__(OBJECTIVE, lambda _progress: None, pairs)
        self.marks: list[float] = []

    def on_reference(self, pairs: int) -> None:
        super().on_reference(pairs)
        self.marks.append(now())

    @property
    def seconds(self) -> float:
        """Of the whole pass. The first pair has no mark before it: it counts as the mean of the others."""
        pairs = len(self.marks)
        return (self.marks[-1] - self.marks[0]) * pairs / (pairs - 1)


def train_epoch(trainer: DPOTrainer, reference: float) -> Epoch:
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Epoch(reference, clock.steps, clock.whole, losses, peak_bytes())


# Contestants


class Ours:
    def __init__(self, run: TrainRun, data: TokenisedPairs) -> None:
        self.run = run
        self.data = data

    def epoch(self) -> Epoch:
        gc.collect()  # the model of the run before
        clock = ReferenceClock(len(self.data.train))
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = AutoTokenizer.from_pretrained(self.run.base)
            trainer = build_trainer(self.run, Path(folder), self.data, tokenizer, clock)
            return train_epoch(trainer, clock.seconds)


class Plain:
    """As one would write it with TRL's documentation. `rows` are texts: prompt, chosen, rejected."""

    def __init__(self, run: TrainRun, rows: list[dict[str, str]]) -> None:
        self.run = run
        self.rows = rows

    def epoch(self) -> Epoch:
        gc.collect()
        with tempfile.TemporaryDirectory() as folder:
            return train_epoch(self._trainer(folder), reference=0)

    def _trainer(self, folder: str) -> DPOTrainer:
        settings = self.run.settings
        dtype = torch_dtype(self.run.dtype)
        model = AutoModelForCausalLM.from_pretrained(self.run.base, dtype=dtype)
        fresh = None
        if self.run.start is None:
            fresh = fresh_lora(settings)
        else:
            model = PeftModel.from_pretrained(model, self.run.start, is_trainable=True)
        args = DPOConfig(
            output_dir=folder,
            # At one pair a micro-batch TRL's mean over tokens is Eq. 8's over responses.
            loss_type=["sigmoid", "sft"] if settings.alpha else ["sigmoid"],
            loss_weights=[1.0, settings.alpha] if settings.alpha else None,
            beta=settings.beta,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            weight_decay=WEIGHT_DECAY,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings.batch_size,
            gradient_checkpointing=settings.gradient_checkpointing,
            use_cpu=not torch.accelerator.is_available(),
            bf16=dtype == torch.bfloat16,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            seed=settings.seed,
        )
        dataset = Dataset.from_list(self.rows)
        tokenizer = AutoTokenizer.from_pretrained(self.run.base)
        trainer = DPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=fresh)
        trainer.remove_callback(PrinterCallback)
        return trainer


# The comparison


def make_pairs(planned: PlannedRun, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenisedPairs, list[dict[str, str]]]:
    """The first pairs that the run would draw, and the same as texts, to which TRL adds the end token."""
    data = tokenise(
        planned.pairs,
        planned.run.prompt_format,
        tokenizer,
        max_prompt_tokens=SETTINGS.max_prompt_tokens,
        max_response_tokens=SETTINGS.max_response_tokens,
        max_pairs=SETTINGS.max_pairs,
        seed=SETTINGS.seed,
    )
    decode: Callable[[list[int]], str] = tokenizer.decode
    rows = [
        {
            "prompt": decode(pair["prompt_ids"]),
            "chosen": decode(pair["chosen_ids"][:-1]),
            "rejected": decode(pair["rejected_ids"][:-1]),
        }
        for pair in data.train
    ]
    return data, rows


def race(name: str, run: TrainRun, data: TokenisedPairs, rows: list[dict[str, str]]) -> list[list[Epoch]]:
    """Ours and the plain ones, an epoch a round."""
    with Process.start(Ours, run, data) as ours, Process.start(Plain, run, rows) as plain:
        epochs: list[list[Epoch]] = [[], []]
        for number in range(ROUNDS):
            for contestant, its in zip((ours, plain), epochs, strict=True):
                its.append(contestant.ask("epoch"))
            seconds = {"pass": epochs[0][-1].reference, "epoch": epochs[0][-1].whole, "plain epoch": epochs[1][-1].whole}
            print(f"{name}, round {number + 1} of {ROUNDS}", {key: round(value, 1) for key, value in seconds.items()}, flush=True)
    return epochs


def against_plain(name: str, ours: list[Epoch], plain: list[Epoch], *, barred: bool) -> list[Figure]:
    def ratio(of: Callable[[Epoch], float]) -> float:
        return median_ratio([of(epoch) for epoch in ours], [of(epoch) for epoch in plain])

    def figure(what: str, value: float, bar: float) -> Figure:
        return Figure(f"{name}: {what}", value, "times", bar if barred else None, at_most=True)

    return [
        figure("reference pass and 1 epoch over plain TRL's", ratio(lambda epoch: epoch.seconds(1)), 1.02),
        figure("reference pass and 3 epochs over plain TRL's", ratio(lambda epoch: epoch.seconds(3)), 0.90),
        figure("peak memory over plain TRL's", ours[0].peak / plain[0].peak, 1.0),
        Figure(f"{name}: bare training step over plain TRL's", ratio(lambda epoch: sum(epoch.steps)), "times"),
    ]


def speeds(name: str, epochs: list[Epoch], tokens: int) -> list[Figure]:
    seconds = statistics.median(epoch.seconds(1) for epoch in epochs)
    return [
        Figure(f"{name}: a pair, reference and training", seconds / PAIRS, "s"),
        Figure(f"{name}: tokens of both rows a second", tokens / seconds, "1/s"),
        Figure(f"{name}: peak memory", epochs[0].peak / 2**20, "MiB"),
    ]


def compare(base: Base) -> list[Figure]:
    planned = Planner(base).dpo(OBJECTIVE, bundled_examples("train"), SETTINGS)
    first = planned.run
    data, rows = make_pairs(planned, base.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        start = random_adapter(base.folder, Path(folder) / OBJECTIVE, seed=0, rank=SETTINGS.lora_rank, scale=0.02)
        again = first.model_copy(update={"start": start, "settings": SETTINGS.model_copy(update={"alpha": ALPHA})})
        ours, plain = race("DPO", first, data, rows)
        ours8, plain8 = race("Eq. 8", again, data, rows)

    tokens = sum(2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in data.train)
    losses = [[loss for epoch in epochs for loss in epoch.losses] for epochs in (ours + ours8, plain + plain8)]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    exact = 1e-4 if torch_dtype(first.dtype) == torch.float32 else None
    return [
        *against_plain("DPO", ours, plain, barred=True),
        *against_plain("Eq. 8", ours8, plain8, barred=False),
        Figure("largest difference of a loss", difference, "", exact, at_most=True),
        *speeds("DPO, ours", ours, tokens),
        *speeds("DPO, plain", plain, tokens),
    ]


def main() -> None:
    os.environ |= KEEP_MEMORY | {"TQDM_DISABLE": "1"}  # read when a process starts: of use to the contestants, not here
    base = Base.open(BUNDLED_MODEL, CACHE)
    how = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} cores"
    machine = f"{platform.machine()}, {how}, SmolLM2-135M, {PAIRS} pairs, {BATCH} a step, {ROUNDS} rounds"
    report("train", machine, compare(base))


if __name__ == "__main__":
    main()

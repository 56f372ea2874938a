"""Supervised fine-tuning on all responses (the paper's first step): an adapter that policies are aligned on top of, the reference
of their set; or, merged in float32, a whole new base with a hash of its own.

Trained as a LoRA by TRL's SFTTrainer.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from sipo.conversation import Prompt
from sipo.datasets import Answers
from sipo.errors import Conflict, InvalidRequest, TrainingFailed
from sipo.files import sync, sync_tree, write_atomically
from sipo.lora import load_adapter, merge
from sipo.models import model_sha256
from sipo.precision import torch_dtype
from sipo.prompts import PromptFormat
from sipo.training.adapters import save_trained
from sipo.training.answering import answer
from sipo.training.arguments import common_arguments, fresh_lora
from sipo.training.checkpoints import Checkpoints, last_checkpoint
from sipo.training.data import MIN_PAIRS_TO_HOLD_OUT, VALIDATION_SHARE
from sipo.training.memory import fitting
from sipo.training.presets import NOT_OF_SFT
from sipo.training.records import draw_curve, sft_card, write_history
from sipo.training.reporting import Reporter
from sipo.training.run_folder import ADAPTER, CARD, CURVE, HISTORY, RECIPE
from sipo.training.settings import Answered, Progress, SftMetrics, SftRun, TrainSettings
from sipo.training.shared_prompt import IGNORED
from sipo.words import counted, share

TENSORBOARD = "tensorboard"
WHOLE_MODEL = "merged"


@dataclass(frozen=True)
class SftRows:
    """Rows of input ids and labels (the response's ids, IGNORED before them)."""

    train: list[dict[str, list[int]]]
    validation: list[dict[str, list[int]]]
    prompts: int
    """Different ones, `left_out` of which are too long."""
    left_out: int
    cut: int
    """Responses that were too long."""


@dataclass(frozen=True)
class _Trained:
    metrics: SftMetrics
    history: Sequence[Mapping[str, Any]]
    """The trainer's log, a mapping a step or a validation."""


def sft_rows(answered: Iterable[Answers], prompt_format: PromptFormat, tokenizer: Any, settings: TrainSettings) -> SftRows:
    """Each different response of each prompt, in the prompt format, cut at max_response_tokens. A prompt's responses stay on one
    side of the split; prompts longer than max_prompt_tokens are left out and counted."""
    by_prompt: dict[Prompt, list[str]] = {}
    for row in answered:
        texts = by_prompt.setdefault(row.prompt, [])
        texts += [text for text in row.responses if text.strip() and text not in texts]
    prompts = list(by_prompt)
    random.Random(settings.seed).shuffle(prompts)
    groups: list[list[dict[str, list[int]]]] = []
    left_out = cut = 0
    for prompt in prompts:
        prompt_ids = prompt_format.prompt_ids(prompt, tokenizer)
        if len(prompt_ids) > settings.max_prompt_tokens:
            left_out += 1
            continue
        responses = [prompt_format.response_ids(text, tokenizer) for text in by_prompt[prompt]]
        cut += sum(len(ids) > settings.max_response_tokens for ids in responses)
        kept = [ids[: settings.max_response_tokens] for ids in responses]
        groups.append([{"input_ids": prompt_ids + ids, "labels": [IGNORED] * len(prompt_ids) + ids} for ids in kept])
    held_out = round(VALIDATION_SHARE * len(groups)) if len(groups) >= MIN_PAIRS_TO_HOLD_OUT else 0
    validation, train = groups[:held_out], groups[held_out:]
    return SftRows(
        [row for group in train for row in group], [row for group in validation for row in group], len(by_prompt), left_out, cut
    )


def account(answered: Sequence[Answers], prompt_format: PromptFormat, tokenizer: Any, settings: TrainSettings) -> list[str]:
    """What will be left out of a fine-tuning, and by which setting: a sentence each."""
    rows = sft_rows(answered, prompt_format, tokenizer, settings)
    empty = sum(not text.strip() for row in answered for text in row.responses)
    said = []
    if rows.left_out:
        longest = settings.max_prompt_tokens
        said.append(f"{share(rows.left_out, rows.prompts, 'prompt')} left out: longer than max_prompt_tokens = {longest}")
    if rows.cut:
        said.append(f"{counted(rows.cut, 'response')} cut: longer than max_response_tokens = {settings.max_response_tokens}")
    if empty:
        said.append(f"{counted(empty, 'response')} left out: empty")
    return said


def train_sft(
    run: SftRun, answered: Sequence[Answers], out: Path, report: Callable[[Progress], None], *, merged: bool = False
) -> Path:
    """Fine-tunes the base and leaves a plain PEFT adapter in `out`, with a model card, recipe.json, history.jsonl, loss.png and
    TensorBoard's files; or, `merged`, a whole float32 model with all of these but the card: a new base.

    A run that is killed goes on when it is started again with the same `out`, whose working files lie beside it. Raises Conflict if
    `out` is there already, or if those files are another run's, InvalidRequest if no row is usable, TrainingFailed if the run
    diverges, does not fit into memory, or has spoilt what the model answers.
    """
    if out.exists():
        raise Conflict(f"{out} is there already: name another folder")
    settings = run.settings
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    rows = sft_rows(answered, run.prompt_format, tokenizer, settings)
    if not rows.train:
        longest = settings.max_prompt_tokens
        raise InvalidRequest(
            f"no response to train on: {counted(rows.left_out, 'prompt')} of more than max_prompt_tokens = {longest}"
        )
    made_from: dict[str, Any] = {
        "base": {"name": run.base_name, "sha256": run.base_sha256},
        "prompt_format": run.prompt_format.model_dump(mode="json"),
        "data_sha256": hashlib.sha256("".join(row.model_dump_json() for row in answered).encode()).hexdigest(),
        "settings": settings.model_dump(mode="json", exclude=set(NOT_OF_SFT)),
    }
    work = out.with_name(f".{out.name}.training")
    of_several = PartialState()  # one where there is but one process
    if of_several.is_main_process:
        _begin(work, made_from)
    of_several.wait_for_everyone()
    reporter = Reporter("sft", report, 0)
    trained = fitting(
        settings,
        reporter,
        lambda micro_batch: _train(run, rows, tokenizer, work, reporter, micro_batch=micro_batch),
        what="the fine-tuning",
        of="responses",
    )
    metrics = trained.metrics
    if (fault := metrics.fault) is not None:
        shutil.rmtree(work)  # nobody goes on with it
        raise TrainingFailed(f"the fine-tuning went too far: {fault}; use a smaller learning_rate or fewer epochs")
    if of_several.is_main_process:
        recipe = made_from | metrics.model_dump(mode="json")
        if merged:
            # Beside the trained model, which may be in bfloat16: merged where nothing is lost.
            model = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
            merge(model, load_adapter(work / ADAPTER))
            shutil.rmtree(work / WHOLE_MODEL, ignore_errors=True)
            model.save_pretrained(work / WHOLE_MODEL)
            tokenizer.save_pretrained(work / WHOLE_MODEL)
            recipe["sha256"] = model_sha256(work / WHOLE_MODEL, work)
        else:
            (work / ADAPTER / CARD).write_text(sft_card(run, metrics, made_from["data_sha256"]))
        made = work / (WHOLE_MODEL if merged else ADAPTER)
        draw_curve(made / CURVE, "supervised fine-tuning", trained.history)
        write_history(made / HISTORY, trained.history)
        shutil.copytree(work / TENSORBOARD, made / TENSORBOARD)
        (made / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n")
        sync_tree(made)  # nothing it could be made from again is left then
        made.rename(out)
        sync(out.parent)
        shutil.rmtree(work)
    of_several.wait_for_everyone()
    return out


def _begin(work: Path, made_from: Mapping[str, Any]) -> None:
    """Writes down what the run is made from. Raises Conflict, with nothing touched, if there are checkpoints of a run that was made
    from something else."""
    path = work / RECIPE
    if last_checkpoint(work) is None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_atomically(path, json.dumps(made_from, indent=1) + "\n")
        sync(work)
        return
    begun = json.loads(path.read_text()) if path.exists() else {}
    if other := [name for name, value in made_from.items() if begun.get(name) != value]:
        raise Conflict(
            f"{work} has the checkpoints of another fine-tuning, which differs in {', '.join(other)}: name another folder, or "
            "remove that one"
        )


def _train(run: SftRun, rows: SftRows, tokenizer: Any, work: Path, reporter: Reporter, *, micro_batch: int) -> _Trained:
    """Leaves the adapter in `work`."""
    started = time.monotonic()
    trainer = _trainer(run, rows, tokenizer, work, reporter, micro_batch=micro_batch)
    before, answered_before = trainer.evaluate()["eval_loss"], _answered(trainer, run, rows, tokenizer)
    trainer.train(resume_from_checkpoint=last_checkpoint(work))
    after = trainer.evaluate()["eval_loss"]
    if not math.isfinite(after):
        raise TrainingFailed("the fine-tuning diverged in its last step: use a smaller learning_rate")
    answered = _answered(trainer, run, rows, tokenizer)
    save_trained(trainer, work / ADAPTER, run.base_name)
    state = trainer.state
    metrics = SftMetrics(
        rows=len(rows.train),
        validation_rows=len(rows.validation),
        prompts_too_long=rows.left_out,
        responses_cut=rows.cut,
        steps=state.global_step,
        best_step=state.best_global_step if rows.validation and state.best_global_step else state.global_step,
        micro_batch_size=micro_batch,
        seconds=round(time.monotonic() - started, 1),
        dtype=str(trainer.model.get_base_model().dtype).removeprefix("torch."),
        loss_before=before,
        loss_after=after,
        answered_before=answered_before,
        answered=answered,
    )
    return _Trained(metrics, state.log_history)


def _answered(trainer: SFTTrainer, run: SftRun, rows: SftRows, tokenizer: Any) -> Answered | None:
    """By the model as it is now; by one process alone, as in sipo.training.run."""
    if trainer.accelerator.num_processes > 1:
        return None
    prompts = [row["input_ids"][: row["labels"].count(IGNORED)] for row in rows.validation or rows.train]
    return answer(trainer.model, prompts, end_token=run.prompt_format.end_token_id(tokenizer))


class Sampler(LengthGroupedSampler):  # type: ignore[misc]
    """Rows of similar lengths together, so that little is padded; drawn by seed and epoch, so that a run that goes on in the middle
    of an epoch meets the rows that are left of it."""

    def __init__(self, batch_size: int, dataset: Dataset, seed: int) -> None:
        super().__init__(batch_size, lengths=[len(ids) for ids in dataset["input_ids"]])
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class _Trainer(SFTTrainer):  # type: ignore[misc]
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return Sampler(batch, train_dataset or self.train_dataset, self.args.seed)


def _trainer(run: SftRun, rows: SftRows, tokenizer: Any, work: Path, reporter: Reporter, *, micro_batch: int) -> SFTTrainer:
    settings, dtype = run.settings, torch_dtype(run.dtype)
    args = SFTConfig(
        **common_arguments(
            settings, work, rows=len(rows.train), micro_batch=micro_batch, dtype=dtype, held_out=bool(rows.validation)
        )
    )
    trainer = _Trainer(
        model=AutoModelForCausalLM.from_pretrained(run.base, dtype=dtype),
        args=args,
        train_dataset=Dataset.from_list(rows.train),
        eval_dataset=Dataset.from_list(rows.validation or rows.train),
        processing_class=tokenizer,
        peft_config=fresh_lora(settings),
        callbacks=[reporter, Checkpoints(settings.checkpoint_steps)],
    )
    # Otherwise it would look for the base's vocabulary at the hub, under the base's name.
    trainer.model.save_pretrained = partial(trainer.model.save_pretrained, save_embedding_layers=False)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer

"""Supervised fine-tuning on all responses (the paper's first step), published as a new base: a whole model in float32.

The policies of a set are deltas to one base, so a fine-tuned model is a base of its own, with its own hash: policies are aligned on
it anew. Trained as a LoRA by TRL's SFTTrainer, merged in float32: in bfloat16 most of a small delta would be lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from sipo.conversation import Prompt
from sipo.datasets import Answers
from sipo.errors import Conflict, InvalidRequest, TrainingFailed
from sipo.files import sync, sync_tree, write_atomically
from sipo.models import model_sha256
from sipo.precision import Precision, torch_dtype
from sipo.prompts import PromptFormat
from sipo.training.arguments import common_arguments, fresh_lora
from sipo.training.checkpoints import Checkpoints, last_checkpoint
from sipo.training.data import MIN_PAIRS_TO_HOLD_OUT, VALIDATION_SHARE
from sipo.training.memory import fitting
from sipo.training.presets import NOT_OF_SFT
from sipo.training.records import draw_curve, write_history
from sipo.training.reporting import Reporter
from sipo.training.run_folder import ADAPTER, CURVE, HISTORY
from sipo.training.settings import Progress, TrainSettings
from sipo.training.shared_prompt import IGNORED
from sipo.words import counted, share

RECIPE = "recipe.json"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class SftRun:
    """What is fine-tuned, and how; `base_name` is how the recipe names it."""

    base: Path
    base_name: str
    prompt_format: PromptFormat
    settings: TrainSettings
    dtype: Precision = "auto"


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
    steps: int
    micro_batch_size: int
    loss: float
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


def train_sft(run: SftRun, answered: Sequence[Answers], out: Path, report: Callable[[Progress], None], *, cache_dir: Path) -> Path:
    """Fine-tunes the base and leaves a whole float32 model in `out`: a new base, with recipe.json, history.jsonl, loss.png and
    TensorBoard's files beside its own.

    A run that is killed goes on when it is started again with the same `out`, whose working files lie beside it. Raises Conflict if
    `out` is there already, or if those files are another run's, InvalidRequest if no row is usable, TrainingFailed if the run
    diverges or does not fit into memory.
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
    recipe: dict[str, Any] = {
        "base": {"name": run.base_name, "sha256": model_sha256(run.base, cache_dir)},
        "prompt_format": run.prompt_format.model_dump(mode="json"),
        "data_sha256": hashlib.sha256("".join(row.model_dump_json() for row in answered).encode()).hexdigest(),
        "settings": settings.model_dump(mode="json", exclude=set(NOT_OF_SFT)),
    }
    work = out.with_name(f".{out.name}.training")
    _begin(work, recipe)
    reporter = Reporter("sft", report, 0)
    trained = fitting(
        settings,
        reporter,
        lambda micro_batch: _train(run, rows, tokenizer, work, reporter, micro_batch=micro_batch),
        what="the fine-tuning",
        of="responses",
    )

    # Beside the trained model, which may be in bfloat16: merged where nothing is lost.
    plain = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, work / ADAPTER).merge_and_unload()
    aside = work / "merged"
    shutil.rmtree(aside, ignore_errors=True)
    merged.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    draw_curve(aside / CURVE, "supervised fine-tuning", trained.history)
    write_history(aside / HISTORY, trained.history)
    shutil.copytree(work / TENSORBOARD, aside / TENSORBOARD)
    recipe |= {
        "rows": len(rows.train),
        "validation_rows": len(rows.validation),
        "prompts_too_long": rows.left_out,
        "steps": trained.steps,
        "micro_batch_size": trained.micro_batch_size,
        "loss": trained.loss,
        "sha256": model_sha256(aside, cache_dir),
    }
    (aside / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n")
    sync_tree(aside)  # nothing it could be made from again is left then
    aside.rename(out)
    sync(out.parent)
    shutil.rmtree(work)
    return out


def _begin(work: Path, recipe: Mapping[str, Any]) -> None:
    """Writes down what the run is made from, as far as it is known before it. Raises Conflict, with nothing touched, if there are
    checkpoints of a run that was made from something else."""
    path = work / RECIPE
    if last_checkpoint(work) is None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_atomically(path, json.dumps(recipe, indent=1) + "\n")
        sync(work)
        return
    begun = json.loads(path.read_text()) if path.exists() else {}
    if other := [name for name, value in recipe.items() if begun.get(name) != value]:
        raise Conflict(
            f"{work} has the checkpoints of another fine-tuning, which differs in {', '.join(other)}: name another folder, or "
            "remove that one"
        )


def _train(run: SftRun, rows: SftRows, tokenizer: Any, work: Path, reporter: Reporter, *, micro_batch: int) -> _Trained:
    """Leaves the adapter in `work`."""
    trainer = _trainer(run, rows, tokenizer, work, reporter, micro_batch=micro_batch)
    trainer.train(resume_from_checkpoint=last_checkpoint(work))
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        raise TrainingFailed("the fine-tuning diverged in its last step: use a smaller learning_rate")
    trainer.model.save_pretrained(work / ADAPTER)
    return _Trained(trainer.state.global_step, micro_batch, loss, trainer.state.log_history)


def _trainer(run: SftRun, rows: SftRows, tokenizer: Any, work: Path, reporter: Reporter, *, micro_batch: int) -> SFTTrainer:
    settings, dtype = run.settings, torch_dtype(run.dtype)
    args = SFTConfig(
        **common_arguments(
            settings, work, rows=len(rows.train), micro_batch=micro_batch, dtype=dtype, held_out=bool(rows.validation)
        )
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(run.base, dtype=dtype),
        args=args,
        train_dataset=Dataset.from_list(rows.train),
        eval_dataset=Dataset.from_list(rows.validation or rows.train),
        processing_class=tokenizer,
        peft_config=fresh_lora(settings),
        callbacks=[reporter, Checkpoints(settings.checkpoint_steps)],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer

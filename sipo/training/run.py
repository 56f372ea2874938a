"""One training run from its files to its files: a first alignment (Eq. 2), a SIPO round (Eq. 8), or a baseline of the paper's.

A run that is killed at any moment goes on from its last whole checkpoint when it is started again.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig

from sipo.errors import IncompatiblePolicy, InvalidRequest, TrainingFailed
from sipo.files import sync_tree
from sipo.lora import load_adapter
from sipo.precision import torch_dtype
from sipo.training.adapters import lay_beneath, save_trained
from sipo.training.answering import answer
from sipo.training.arguments import common_arguments, fresh_lora
from sipo.training.checkpoints import CHECKPOINTS, Checkpoints, last_checkpoint
from sipo.training.data import TokenisedPairs, TokenPair, tokenise
from sipo.training.memory import fitting
from sipo.training.records import write_records
from sipo.training.reporting import Reporter
from sipo.training.run_folder import RunFolder, reference_of
from sipo.training.settings import Answered, Measure, Method, Progress, TrainMetrics, TrainRun
from sipo.training.trainer import START, PairCollator, PairTrainer, reference_file
from sipo.words import counted

ROWS = "rows"


def train(run: TrainRun, folder: Path, report: Callable[[Progress], None]) -> TrainMetrics:
    """Trains on `folder`/pairs.jsonl and leaves the adapter, its records and, last, the metrics in `folder`.

    Raises InvalidRequest if no pair is usable, IncompatiblePolicy if the base or the start adapter does not fit, TrainingFailed if
    the run diverges or does not fit into memory.
    """
    settings = run.settings
    if settings.tracker != "none" and find_spec(settings.tracker) is None:
        raise InvalidRequest(f"the tracker {settings.tracker} is not installed: pip install {settings.tracker}, or tracker: none")
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    run.prompt_format.check(tokenizer)
    data = tokenise(
        RunFolder(folder).pairs(),
        run.prompt_format,
        tokenizer,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_response_tokens=settings.max_response_tokens,
        max_pairs=settings.max_pairs,
        seed=settings.seed,
    )
    if not data.train:
        raise InvalidRequest(f"no pair to train {run.objective!r} on: {_left_out(data, settings.max_prompt_tokens)}")
    passes = 1 + len(run.margins)
    reporter = Reporter(run.objective, report, passes * (len(data.train) + len(data.validation) * data.held_out))
    if len(data.train) < settings.batch_size:
        pairs = counted(len(data.train), "pair")
        reporter.note(f"{pairs}, less than a batch of {settings.batch_size}: an epoch is one smaller step")
    return fitting(
        settings,
        reporter,
        lambda micro_batch: _train(run, folder, data, tokenizer, reporter, micro_batch=micro_batch),
        what=f"the training of {run.objective!r}",
        of="pairs",
    )


def _train(
    run: TrainRun, folder: Path, data: TokenisedPairs, tokenizer: Any, reporter: Reporter, *, micro_batch: int
) -> TrainMetrics:
    started = time.monotonic()
    trainer = build_trainer(run, folder, data, tokenizer, reporter, micro_batch=micro_batch)
    before = measure_at_the_start(run, data, folder, trainer.beta)
    answered_before = _answered(trainer, run, data, tokenizer)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    after = _measure(trainer)
    if not math.isfinite(after.loss):
        raise TrainingFailed(f"the training of {run.objective!r} diverged in its last step: use a smaller learning_rate")
    if (worse := made_worse(run.method, before, after, len(data.validation))) is not None:
        kind = "validation" if data.held_out else "training"
        raise TrainingFailed(
            f"the training of {run.objective!r} made it worse: on {len(data.validation)} {kind} pairs its {worse}; look at the "
            "pairs, or use a smaller learning_rate"
        )
    best = trainer.state.best_global_step
    metrics = TrainMetrics(
        objective=run.objective,
        pairs=len(data.train),
        validation_pairs=len(data.validation),
        held_out=data.held_out,
        prompts_too_long=data.left_out["prompts_too_long"],
        identical=data.left_out["identical"],
        responses_cut=data.left_out["responses_cut"],
        steps=trainer.state.global_step,
        best_step=best if data.held_out and best else trainer.state.global_step,
        micro_batch_size=micro_batch,
        seconds=round(time.monotonic() - started, 1),
        dtype=str(trainer.model.get_base_model().dtype).removeprefix("torch."),
        before=before,
        after=after,
        answered_before=answered_before,
        answered=_answered(trainer, run, data, tokenizer),
    )
    run_folder = RunFolder(folder)
    save_trained(trainer, run_folder.adapter, run.base_name)
    if trainer.is_world_process_zero():
        write_records(run_folder, run, metrics, trainer.state.log_history)
        sync_tree(run_folder.adapter)  # nothing it could be made from again is left then
        run_folder.finish(metrics)
        for name in (CHECKPOINTS, ROWS):
            shutil.rmtree(folder / name, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return metrics


def build_trainer(
    run: TrainRun, folder: Path, data: TokenisedPairs, tokenizer: Any, reporter: Reporter, *, micro_batch: int = 1
) -> PairTrainer:
    """The trainer with its model.

    With `run.start`, TRL keeps a frozen copy of that adapter as reference. Without, it makes a fresh LoRA (after seeding: policies
    of one seed share A's initial values) and its reference is the model beneath: the base, with the set's reference if it has one.
    TRL's own NLL term is a mean over all tokens of a micro-batch; PairTrainer's is Eq. 8's.
    """
    settings = run.settings
    dtype = torch_dtype(run.dtype)
    model = AutoModelForCausalLM.from_pretrained(run.base, dtype=dtype)
    if (reference := reference_of(run)) is not None:
        lay_beneath(model, load_adapter(reference))
    fresh = None
    if run.start is None:
        fresh = fresh_lora(settings)
    else:
        try:
            # ZeRO-3 wants one dtype; TRL sees to that for a fresh LoRA only.
            one_dtype = is_deepspeed_zero3_enabled()
            model = PeftModel.from_pretrained(model, run.start, is_trainable=True, autocast_adapter_dtype=not one_dtype)
        except (ValueError, RuntimeError) as error:
            raise IncompatiblePolicy(f"cannot go on with {run.start}: {error}") from error
    args = DPOConfig(
        **common_arguments(settings, folder, rows=len(data.train), micro_batch=micro_batch, dtype=dtype, held_out=data.held_out),
        loss_type=["sigmoid"],
        f_divergence_type=settings.divergence,
        f_alpha_divergence_coef=settings.divergence_alpha,
        beta=run.beta,
    )
    trainer = PairTrainer(
        alpha=settings.alpha,
        margins=run.margins,
        folder=folder,
        on_reference=reporter.on_reference,
        callbacks=[reporter, Checkpoints(settings.checkpoint_steps)],
        model=model,
        args=args,
        data_collator=PairCollator(pad_token_id=_pad_token(tokenizer)),
        train_dataset=_rows(args, folder / ROWS / "train", data.train),
        eval_dataset=_rows(args, folder / ROWS / "validation", data.validation) if data.held_out else None,
        processing_class=tokenizer,
        peft_config=fresh,
    )
    if not data.held_out:
        trainer.eval_dataset = trainer.train_dataset  # with its reference log-probabilities
    unwanted: tuple[type[TrainerCallback], ...] = (PrinterCallback, ProgressCallback)
    for callback in unwanted:
        trainer.remove_callback(callback)
    return trainer


def _rows(args: DPOConfig, path: Path, rows: Sequence[TokenPair]) -> Dataset:
    """The rows as a data set on disk: TRL shares what it computes for them with the other processes beside it."""
    with args.main_process_first(local=False):
        if not path.exists():
            aside = path.with_name(f".{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            Dataset.from_list(list(rows)).save_to_disk(aside)
            aside.rename(path)
    return Dataset.load_from_disk(path)


def measure_at_the_start(run: TrainRun, data: TokenisedPairs, folder: Path, beta: float) -> Measure:
    """What a measurement would say before the first step, without a pass over the pairs: the policy's log-probabilities then are
    those of the model that it starts from, which the reference's pass has computed."""
    columns = load_file(reference_file(folder, "eval" if data.held_out else "train"))
    ratios = [columns[f"{START}{side}"] - columns[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
    margins = beta * (ratios[0] - ratios[1])
    lengths = torch.tensor([len(row["chosen_ids"]) for row in data.validation])
    opposing = torch.tensor([row["opposing_weight"] for row in data.validation])
    losses = F.softplus(-margins) + opposing * margins - run.settings.alpha * columns[f"{START}chosen"] / lengths
    hits = (margins > 0).double() + (margins == 0) / 2
    return Measure(loss=float(losses.mean()), margin=float(margins.mean()), accuracy=float(hits.mean()))


def _pad_token(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def _left_out(data: TokenisedPairs, max_prompt_tokens: int) -> str:
    counts = data.left_out
    if not counts:
        return "there are no pairs"
    return (
        f"{counted(counts['prompts_too_long'], 'prompt')} longer than max_prompt_tokens = {max_prompt_tokens}, "
        f"in {counts['identical']} pairs chosen and rejected are the same"
    )


def _measure(trainer: PairTrainer) -> Measure:
    logs = trainer.evaluate()
    return Measure(loss=logs["eval_loss"], margin=logs["eval_rewards/margins"], accuracy=logs["eval_rewards/accuracies"])


def _answered(trainer: PairTrainer, run: TrainRun, data: TokenisedPairs, tokenizer: Any) -> Answered | None:
    """By the policy as it is now. Where several processes share its weights, they would have to go through every token together."""
    if trainer.accelerator.num_processes > 1:
        return None
    prompts = [row["prompt_ids"] for row in data.validation]
    return answer(trainer.model, prompts, end_token=run.prompt_format.end_token_id(tokenizer))


def made_worse(method: Method, before: Measure, after: Measure, pairs: int) -> str | None:
    """What got worse, if it did. By chance half of the `pairs` are hits, but for DPO LW, whose pairs may be oriented either way,
    and MODPO, whose reference prefers by the other objectives: there the loss tells."""
    if method in ("lw", "modpo"):
        return f"loss went from {before.loss:.3f} to {after.loss:.3f}" if after.loss > before.loss else None
    # Ties alone, where nothing has moved, are no hits for TRL.
    # Two standard deviations below: of few pairs, less than half are often hits though nothing is wrong.
    below = after.accuracy < 0.5 - 1 / math.sqrt(pairs)
    return f"reward accuracy is {after.accuracy:.2f}, below chance" if below and after.margin < 0 else None

"""What all our training has in common: where it runs, in which precision, and the arguments of transformers' Trainer."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from sipo.errors import InvalidRequest
from sipo.training.checkpoints import CHECKPOINTS
from sipo.training.settings import TrainSettings

TRAINED_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
WARMUP = 0.1
WEIGHT_DECAY = 0.05


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def batch_per_process(settings: TrainSettings) -> int:
    """Raises InvalidRequest if the batch cannot be shared evenly."""
    each, rest = divmod(settings.batch_size, processes())
    if rest:
        raise InvalidRequest(f"batch_size is {settings.batch_size}: it must be a multiple of the {processes()} processes")
    return each


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, at least 1."""
    return next(one for one in range(min(limit, number), 0, -1) if number % one == 0)


def fresh_lora(settings: TrainSettings) -> LoraConfig:
    """What a policy begins with if it goes on from none."""
    return LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=TRAINED_MODULES, task_type="CAUSAL_LM")


def common_arguments(
    settings: TrainSettings, folder: Path, *, rows: int, micro_batch: int, dtype: torch.dtype, held_out: bool
) -> dict[str, Any]:
    """Of a run in `folder` on so many rows: optimizer, schedule, batches, logs, checkpoints; the best one is kept if rows are held
    out."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    steps_per_epoch = math.ceil(rows / settings.batch_size)
    accelerated = torch.accelerator.is_available()
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "run_name": "/".join(folder.absolute().parts[-3:]),  # in a tracker
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        # Rounded down: a short run has no step to lose to a learning rate of 0.
        "warmup_steps": int(WARMUP * settings.epochs * steps_per_epoch),
        "weight_decay": WEIGHT_DECAY,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": batch_per_process(settings) // micro_batch,
        "max_length": None,  # lengths are cut where rows are made
        "use_cpu": not accelerated,
        "bf16": dtype == torch.bfloat16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "dataloader_pin_memory": accelerated,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": ["tensorboard", *([settings.tracker] if settings.tracker != "none" else [])],
        "eval_strategy": "epoch" if held_out else "no",
        "save_strategy": "epoch",
        "save_total_limit": 3,  # the best, the newest, and one more while the newest is not marked whole
        "load_best_model_at_end": held_out,
        "metric_for_best_model": "eval_loss",
        "seed": settings.seed,
    }

"""Runs that do not fit into memory are tried again with a smaller micro-batch, at the same batch size."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from sipo.errors import TrainingFailed
from sipo.training.arguments import batch_per_process, largest_divisor, processes
from sipo.training.reporting import Reporter
from sipo.training.settings import TrainSettings

T = TypeVar("T")


def fitting(settings: TrainSettings, reporter: Reporter, attempt: Callable[[int], T], *, what: str, of: str) -> T:
    """What `attempt` gives at the largest micro-batch that fits, beginning with that of the settings. In words: `what` is it that
    does not fit, and a micro-batch is so many `of`.

    Raises TrainingFailed if one does not fit; of several processes at once, as they would not agree on a smaller one.
    """
    micro_batch = largest_divisor(batch_per_process(settings), settings.micro_batch_size)
    while True:
        try:
            return attempt(micro_batch)
        except torch.OutOfMemoryError as error:
            if micro_batch == 1 or processes() > 1:
                raise TrainingFailed(
                    f"{what} does not fit into memory at {micro_batch} {of} in a forward: use gradient_checkpointing, smaller "
                    "max_prompt_tokens and max_response_tokens" + (", or a smaller micro_batch_size" if micro_batch > 1 else "")
                ) from error
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        smaller = largest_divisor(batch_per_process(settings), micro_batch // 2)
        reporter.note(f"out of memory at {micro_batch} {of} in a forward: goes on with {smaller}, at the same batch size")
        micro_batch = smaller

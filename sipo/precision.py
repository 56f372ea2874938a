"""Which precision this machine computes in: the one answer to "auto", for whoever trains or serves."""

from __future__ import annotations

import os
from typing import Literal

import torch

from sipo.errors import InvalidRequest

Precision = Literal["auto", "bfloat16", "float32"]

NATURAL_DTYPE = "SIPO_NATURAL_DTYPE"
"""A switch for tests: float32 or bfloat16 is the natural one then, whatever the processor would be best at; child processes inherit
it."""


def torch_dtype(wanted: Precision) -> torch.dtype:
    """auto: bfloat16 on a GPU and on processors with instructions for it. Others would only emulate it, four times as slow as
    float32. Raises InvalidRequest if SIPO_NATURAL_DTYPE is neither."""
    if wanted == "auto":
        wanted = _natural()
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def _natural() -> Precision:
    match os.environ.get(NATURAL_DTYPE, ""):
        case "":
            has_bfloat16 = torch.accelerator.is_available() or torch.cpu._is_avx512_bf16_supported()
            return "bfloat16" if has_bfloat16 else "float32"
        case "bfloat16" | "float32" as forced:
            return forced
        case other:
            raise InvalidRequest(f"{NATURAL_DTYPE} is {other!r}: it must be float32 or bfloat16")

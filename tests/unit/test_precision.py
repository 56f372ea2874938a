"""Which precision "auto" means, on this machine and with the switch for tests."""

from __future__ import annotations

import pytest
import torch

from sipo.errors import InvalidRequest
from sipo.precision import NATURAL_DTYPE, torch_dtype


def test_what_is_wanted_wins_over_the_machine_and_the_switch_over_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for forced, natural in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv(NATURAL_DTYPE, forced)
        assert torch_dtype("auto") is natural
        assert (torch_dtype("float32"), torch_dtype("bfloat16")) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("instructions", "natural"), [(True, torch.bfloat16), (False, torch.float32)])
def test_without_the_switch_the_processor_tells(monkeypatch: pytest.MonkeyPatch, instructions: bool, natural: torch.dtype) -> None:
    monkeypatch.delenv(NATURAL_DTYPE, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert torch_dtype("auto") is natural


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATURAL_DTYPE, "float16")
    with pytest.raises(InvalidRequest, match="SIPO_NATURAL_DTYPE is 'float16': it must be float32 or bfloat16"):
        torch_dtype("auto")

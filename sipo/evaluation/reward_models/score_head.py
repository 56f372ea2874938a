"""Decoders with a linear score head of their own, which transformers does not know."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from sipo.errors import InvalidRequest, NotFound

EPSILON = 1e-8
"""Of safe-rlhf, beside a standard deviation."""


class ScoredDecoder(nn.Module):
    """Used like a sequence classifier of transformers, for one text of which nothing is padding: logits [1, outputs]."""

    def __init__(self, decoder: Any, head: nn.Linear, shift: Tensor, scale: Tensor) -> None:
        """shift, scale [outputs] or [1]: logits are (head(last hidden state) - shift) / scale."""
        super().__init__()
        self.decoder, self.head = decoder, head
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    @property
    def config(self) -> Any:
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Both [1, length]."""
        last = self.decoder(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1]
        return SequenceClassifierOutput(logits=(self.head(last) - self.shift) / self.scale)


def load_scored_decoder(name: str, folder: Path) -> ScoredDecoder:
    """In float32. The head is the one linear layer that lies beside the decoder's weights, whatever it is called.

    Raises OSError for files that are not there or cannot be read, InvalidRequest for weights that are no decoder with such a head.
    """
    decoder, loading = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    if missing := loading["missing_keys"]:
        raise InvalidRequest(f"{name} is no reward model: its weights lack {', '.join(sorted(missing))}")
    beside = _tensors(folder, loading["unexpected_keys"])
    normaliser = {part: beside.pop(f"normalizer.{part}", None) for part in ("mean", "var", "count")}
    layers = {key.rpartition(".")[0] for key in beside}
    layer = next(iter(layers), "")
    weight, bias = beside.get(f"{layer}.weight"), beside.get(f"{layer}.bias")
    linear = weight is not None and weight.ndim == 2 and weight.shape[1] == decoder.config.hidden_size
    if len(layers) != 1 or layer == "lm_head" or not linear:
        raise InvalidRequest(
            f"{name} is no reward model: beside its decoder it must hold one linear layer, such as score_head.weight, "
            f"and holds {', '.join(sorted(beside)) or 'none'}"
        )
    assert weight is not None
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return ScoredDecoder(decoder, head, *_normalisation(decoder.config, normaliser["mean"], normaliser["var"]))


def _tensors(folder: Path, keys: Collection[str]) -> dict[str, Tensor]:
    """Those of the weight files, in float32."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotFound(f"{folder} holds no *.safetensors: convert the model's weights first")
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key).float() for key in file.keys() if key in keys}  # noqa: SIM118
    return tensors


def _normalisation(config: Any, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shift and scale, by safe-rlhf's rules: rewards are standardised, costs only scaled, so that 0 stays the border of harm."""
    shift, scale = torch.zeros(1), torch.ones(1)
    if not getattr(config, "do_normalize", False):
        return shift, scale
    mean = torch.tensor(getattr(config, "mean", [0.0])) if mean is None else mean
    var = torch.tensor(getattr(config, "var", [1.0])) if var is None else var
    kind = getattr(config, "score_type", "reward")
    if kind == "reward":
        shift = mean
    if kind in ("reward", "cost"):
        scale = var.sqrt() + EPSILON
    return shift, scale

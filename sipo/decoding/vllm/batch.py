"""What the running requests ask for: each row's Mixture in the order of vLLM's batch, and the resident policy sets it refers to.

vLLM tells a logits processor about every change of its batch before each forward pass. That is all this one is for: the mixing
happens in the model, which reads `MixtureBatch` (one per engine) for coefficients and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from pydantic import ValidationError
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from sipo.decoding.request import EXTRA_ARG, LINEAR, REVERSE_KL, Entry, MixingRule, Mixture
from sipo.decoding.vllm.residents import Residents, ResidentSet

SLOTS = "sipo_slots"
RANKS = "sipo_ranks"
"""The keys of vLLM's additional_config for the number of rows per token, and for the columns of FixedResidents."""


class MixtureBatch:
    """The state that the logits processor writes and the model reads."""

    def __init__(self, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.slots = slots
        self.residents = Residents(device, dtype)
        self.requests: dict[int, Mixture] = {}
        """By row of vLLM's batch: 0 … n-1 while a batch runs."""
        self.active: list[tuple[ResidentSet, Tensor]] = []
        """For this forward pass: the sets in use, with each row's coefficients [tokens · slots, R]."""
        self._device = device
        self._weights: Tensor | None = None
        self._by_rule: dict[tuple[MixingRule, float | None], Tensor] = {}
        self._coefficients: list[tuple[ResidentSet, Tensor]] = []
        """As `active`, for one token of each request."""
        self._stale = True
        self._dummy = False

    def changed(self) -> None:
        """Requests came, went or moved: the tensors are made anew before the next forward pass."""
        self._stale = True

    def prepare(self) -> None:
        """Before each forward pass, and all there is before one that replays a CUDA graph: every request goes on by one token."""
        self._dummy = False
        if self._stale:
            self._rebuild()
            self._stale = False
        self.active = self.residents.place(self._coefficients)

    def start(self, query_start: Tensor | None, tokens: int) -> None:
        """In a forward pass: spreads the requests' coefficients over its rows where a request has several tokens.

        `query_start` [n + 1] are the boundaries of the requests' tokens, None in vLLM's own trial runs, where no request exists.
        """
        if query_start is None or not self.requests:
            self._dummy = True
            self.active = self.residents.place([])
            return
        counts = query_start.diff()
        if len(counts) != len(self.requests) or int(query_start[-1]) != tokens:
            covered = f"{len(counts)} requests, {int(query_start[-1])} of {tokens} tokens"
            raise RuntimeError(f"{len(self.requests)} mixtures for {covered}")
        if tokens != len(counts):
            # A request's slots are repeated together, once per token.
            self.active = self.residents.place(
                [
                    (chosen, table.view(len(counts), -1).repeat_interleave(counts, dim=0).view(tokens * self.slots, -1))
                    for chosen, table in self._coefficients
                ]
            )

    def weights(self, rows: int) -> Tensor:
        """The mixing weights [rows, slots] in float32 for the rows whose logits vLLM wants: one per request."""
        if self._dummy:
            return torch.full((rows, self.slots), 1 / self.slots, device=self._device)
        if self._weights is None or rows != len(self._weights):
            raise RuntimeError(f"{rows} rows of logits for {len(self.requests)} mixtures")
        return self._weights

    def by_rule(self) -> dict[tuple[MixingRule, float | None], Tensor]:
        """Rows of the batch by rule and alpha, for the rules that `mix_hidden_states` does not cover."""
        return {} if self._dummy else self._by_rule

    def _rebuild(self) -> None:
        if sorted(self.requests) != list(range(len(self.requests))):
            raise RuntimeError(f"rows {sorted(self.requests)} have mixtures: a request came without one")
        rows = [self._padded(self.requests[row]) for row in range(len(self.requests))]
        self._weights = torch.tensor([[entry.weight for entry in row] for row in rows], device=self._device)
        by_rule: dict[tuple[MixingRule, float | None], list[int]] = {}
        for row in range(len(rows)):
            mixture = self.requests[row]
            if mixture.rule not in (REVERSE_KL, LINEAR):
                by_rule.setdefault((mixture.rule, mixture.alpha), []).append(row)
        self._by_rule = {rule: torch.tensor(members, device=self._device) for rule, members in by_rule.items()}
        self._coefficients = self.residents.coefficients([entry for row in rows for entry in row])

    def _padded(self, mixture: Mixture) -> Sequence[Entry]:
        """One entry per slot: unused slots compute the base and have no weight."""
        if len(mixture.entries) > self.slots:
            raise RuntimeError(f"a request has {len(mixture.entries)} entries, this decoder has {self.slots} slots")
        return [*mixture.entries, *[Entry(weight=0.0)] * (self.slots - len(mixture.entries))]


_batches: WeakValueDictionary[str, MixtureBatch] = WeakValueDictionary()


def batch_of(config: VllmConfig) -> MixtureBatch:
    """The one batch of an engine: vLLM builds the logits processor and the model separately, each from the same configuration."""
    batch = _batches.get(config.instance_id)
    if batch is None:
        batch = MixtureBatch(config.additional_config[SLOTS], config.device_config.device, config.model_config.dtype)
        _batches[config.instance_id] = batch
    return batch


class MixtureProcessor(LogitsProcessor):  # type: ignore[misc]
    """Keeps the engine's MixtureBatch in step with vLLM's; the logits pass through unchanged."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Runs where a request enters the engine: what is refused here is the caller's error (HTTP 400)."""
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError("prompt_logprobs is not supported: policies are mixed for generated tokens only")
        read_mixture(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.batch = batch_of(vllm_config)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if process_dict_updates(self.batch.requests, batch_update, lambda params, *_: read_mixture(params)):
            self.batch.changed()
        self.batch.prepare()


def read_mixture(params: SamplingParams) -> Mixture:
    """The request's Mixture; raises a client error for a request that came past the layers that put it there."""
    extra: dict[str, Any] = params.extra_args or {}
    try:
        return Mixture.model_validate_json(extra[EXTRA_ARG])
    except (KeyError, ValidationError) as error:
        raise VLLMValidationError(f"the request carries no readable mixture of policies: {error}") from error

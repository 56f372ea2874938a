"""What the running requests ask for: each row's Mixture in the order of vLLM's batch, and the resident policy sets it refers to.

vLLM tells a logits processor about every change of its batch before each forward pass. That is all this one is for: the mixing
happens in the model, which reads `MixtureBatch` (one per engine) for coefficients and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

from sipo.decoding import Rule
from sipo.decoding.request import EXTRA_ARG, LINEAR, REVERSE_KL, Entry, Mixture

SLOTS = "sipo_slots"
"""The key of vLLM's additional_config that holds the number of rows per token."""


@dataclass(frozen=True)
class Delta:
    """All adapters of one set on one linear layer (vLLM's fused one): (x · a^T * coefficients) · b.

    `a` [parts · R, in] and `b` [parts · R, out], where a fused layer's parts (q, k and v) are blocks of `b`'s diagonal.
    """

    a: Tensor
    b: Tensor
    parts: int


@dataclass(frozen=True)
class ResidentSet:
    """A loaded policy set: `ranks` per adapter (sum R) and its deltas by the fused layer's name."""

    ranks: tuple[int, ...]
    deltas: dict[str, Delta]

    @property
    def parts(self) -> set[int]:
        return {delta.parts for delta in self.deltas.values()}


class MixtureBatch:
    """The state that the logits processor writes and the model reads."""

    def __init__(self, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.slots = slots
        self.sets: dict[str, ResidentSet] = {}
        self.requests: dict[int, Mixture] = {}
        """By row of vLLM's batch: 0 … n-1 while a batch runs."""
        self.active: list[tuple[ResidentSet, dict[int, Tensor]]] = []
        """For this forward pass: the sets in use, with each row's coefficients [tokens · slots, parts · R] by number of parts."""
        self._device = device
        self._dtype = dtype
        self._weights: Tensor | None = None
        self._by_rule: dict[tuple[Rule, float | None], Tensor] = {}
        self._coefficients: list[tuple[ResidentSet, dict[int, Tensor]]] = []
        self._stale = True
        self._dummy = False

    def changed(self) -> None:
        """Requests came, went or moved, or sets were loaded: the tensors are made anew when next needed."""
        self._stale = True

    def start(self, query_start: Tensor | None, tokens: int) -> None:
        """Spreads the requests' coefficients over the rows of a forward pass.

        `query_start` [n + 1] are the boundaries of the requests' tokens, None in vLLM's own trial runs, where no request exists.
        """
        self._dummy = query_start is None
        if query_start is None:
            self.active = []
            return
        if self._stale:
            self._rebuild()
        counts = query_start.diff()
        if len(counts) != len(self.requests) or int(query_start[-1]) != tokens:
            covered = f"{len(counts)} requests, {int(query_start[-1])} of {tokens} tokens"
            raise RuntimeError(f"{len(self.requests)} mixtures for {covered}")
        if tokens == len(counts):
            self.active = self._coefficients
        else:
            # A request's slots are repeated together, once per token.
            self.active = [
                (chosen, {parts: self._spread(table, counts, tokens) for parts, table in tables.items()})
                for chosen, tables in self._coefficients
            ]

    def _spread(self, table: Tensor, counts: Tensor, tokens: int) -> Tensor:
        return table.view(len(counts), -1).repeat_interleave(counts, dim=0).view(tokens * self.slots, -1)

    def weights(self, rows: int) -> Tensor:
        """The mixing weights [rows, slots] in float32 for the rows whose logits vLLM wants: one per request."""
        if self._dummy:
            return torch.full((rows, self.slots), 1 / self.slots, device=self._device)
        if self._weights is None or rows != len(self._weights):
            raise RuntimeError(f"{rows} rows of logits for {len(self.requests)} mixtures")
        return self._weights

    def by_rule(self) -> dict[tuple[Rule, float | None], Tensor]:
        """Rows of the batch by rule and alpha, for the rules that `mix_hidden_states` does not cover."""
        return {} if self._dummy else self._by_rule

    def _rebuild(self) -> None:
        if sorted(self.requests) != list(range(len(self.requests))):
            raise RuntimeError(f"rows {sorted(self.requests)} have mixtures: a request came without one")
        rows = [self._padded(self.requests[row]) for row in range(len(self.requests))]
        self._weights = torch.tensor([[entry.weight for entry in row] for row in rows], device=self._device)
        by_rule: dict[tuple[Rule, float | None], list[int]] = {}
        for row in range(len(rows)):
            mixture = self.requests[row]
            if mixture.rule not in (REVERSE_KL, LINEAR):
                by_rule.setdefault((mixture.rule, mixture.alpha), []).append(row)
        self._by_rule = {rule: torch.tensor(members, device=self._device) for rule, members in by_rule.items()}
        entries = [entry for row in rows for entry in row]
        self._coefficients = []
        for key in {entry.policy_set for entry in entries} - {""}:
            chosen = self.sets[key]
            zeros = (0.0,) * len(chosen.ranks)
            table = torch.tensor([entry.coefficients if entry.policy_set == key else zeros for entry in entries])
            expanded = table.repeat_interleave(torch.tensor(chosen.ranks), dim=1).to(self._device, self._dtype)
            self._coefficients.append((chosen, {parts: expanded.repeat(1, parts) for parts in chosen.parts}))
        self._stale = False

    def _padded(self, mixture: Mixture) -> Sequence[Entry]:
        """One entry per slot: unused slots compute the base and have no weight."""
        for entry in mixture.entries:
            if entry.policy_set and entry.policy_set not in self.sets:
                raise RuntimeError(f"a request names the policy set {entry.policy_set!r}, which is not loaded")
            if entry.policy_set and len(entry.coefficients) != len(self.sets[entry.policy_set].ranks):
                raise RuntimeError(f"{len(entry.coefficients)} coefficients for the adapters of {entry.policy_set!r}")
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


def read_mixture(params: SamplingParams) -> Mixture:
    """The request's Mixture; raises a client error for a request that came past the layers that put it there."""
    extra: dict[str, Any] = params.extra_args or {}
    try:
        return Mixture.model_validate_json(extra[EXTRA_ARG])
    except (KeyError, ValidationError) as error:
        raise VLLMValidationError(f"the request carries no readable mixture of policies: {error}") from error

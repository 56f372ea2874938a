"""What one request asks of the decoder: a list of entries, one per slot, each a coefficient per adapter and a mixing weight.

Modes are only coefficients: MOD has one entry per policy, a soup one entry with all coefficients, the base one entry without any.
This form crosses from the HTTP layer (or the offline class) to vLLM's worker; neither side knows of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from sipo.errors import InvalidRequest
from sipo.preferences import Weights, normalize_weights, one_hot_weights, uniform_weights

EXTRA_ARG = "sipo"
"""The key in vLLM's SamplingParams.extra_args (vllm_xargs in HTTP bodies) under which a Mixture travels, as JSON."""

MOD = "mod"
SOUP = "soup"
BASE = "base"


class Entry(BaseModel):
    """What one slot computes: the base plus sum_i coefficient_i · delta_i over the adapters of a resident set, in the set's order.

    No coefficients means the plain base; `policy_set` is empty then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy_set: str = ""
    coefficients: tuple[float, ...] = ()
    weight: float = Field(allow_inf_nan=False)


class Mixture(BaseModel):
    """One request's entries, for example MOD at 0.7 : 0.3 over the resident set "demo:1-3fa9":

    {"entries": [{"policy_set": "demo:1-3fa9", "coefficients": [1, 0], "weight": 0.7},
                 {"policy_set": "demo:1-3fa9", "coefficients": [0, 1], "weight": 0.3}]}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    entries: tuple[Entry, ...] = Field(min_length=1)

    def cache_salt(self, callers: str | None = None) -> str:
        """Keys and values depend on each slot's set and coefficients, not on the mixing weights: requests that differ only in these
        share their prefix. `callers` is the caller's own salt, which separates further."""
        slots = [(entry.policy_set, entry.coefficients) for entry in self.entries]
        return hashlib.sha256(f"{slots!r} {callers!r}".encode()).hexdigest()


def base_mixture() -> Mixture:
    return Mixture(entries=(Entry(weight=1.0),))


def mixture(
    policy_set: str, objectives: Sequence[str], weights: Mapping[str, float] | None = None, mode: str = MOD
) -> tuple[Mixture, Weights]:
    """A mode's entries over one set, and the weights in effect (uniform where none are given, one-hot for a single policy).

    `mode` is "mod", "soup" (the exact weighted sum of the deltas), or an objective's name for its policy alone. Raises
    InvalidWeights, or InvalidRequest for an unknown mode and for weights that the mode has no use for.
    """
    if mode not in (MOD, SOUP):
        if mode not in objectives:
            known = ", ".join(repr(name) for name in (MOD, SOUP, BASE, *objectives))
            raise InvalidRequest(f"unknown mode {mode!r}: this policy set has {known}", param="mode")
        if weights is not None:
            raise InvalidRequest(f"mode {mode!r} is a single policy: leave out preference_weights", param="preference_weights")
        weights = one_hot_weights(mode, objectives)
    effective = uniform_weights(objectives) if weights is None else normalize_weights(weights, objectives)
    if mode == MOD:
        entries = [
            Entry(policy_set=policy_set, coefficients=tuple(one_hot_weights(name, objectives).values()), weight=weight)
            for name, weight in effective.items()
        ]
    else:
        entries = [Entry(policy_set=policy_set, coefficients=tuple(effective.values()), weight=1.0)]
    return Mixture(entries=tuple(entries)), effective

"""What one request asks of the decoder: a list of entries, one per slot, each a coefficient per adapter and a mixing weight, and
the rule that mixes them.

Modes are only coefficients: MOD has one entry per policy, a soup one entry with all coefficients, the base one entry without any.
The reference of a set, which its policies lie on top of, is no matter of coefficients: each entry that names the set has it.
This form crosses from the HTTP layer (or the offline class) to vLLM's worker; neither side knows of the other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sipo.errors import InvalidRequest
from sipo.preferences import (
    BASE,
    MOD,
    MODES,
    REFERENCE,
    SOUP,
    Weights,
    is_finite_number,
    normalize_weights,
    one_hot_weights,
    uniform_weights,
)

EXTRA_ARG = "sipo"
"""The key in vLLM's SamplingParams.extra_args (vllm_xargs in HTTP bodies) under which a Mixture travels, as JSON."""

MixingRule = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence", "linear"]
"""How policies are mixed: each is a function of that name in sipo.decoding.mixing."""

REVERSE_KL: MixingRule = "reverse_kl"
LINEAR: MixingRule = "linear"


class Entry(BaseModel):
    """What one slot computes: the reference of a resident set plus sum_i coefficient_i · delta_i over its policies, in their order.

    An empty `policy_set` means the plain base; there are no coefficients then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy_set: str = ""
    coefficients: tuple[float, ...] = ()
    weight: float = Field(allow_inf_nan=False)


class Mixture(BaseModel):
    """One request's entries and rule, for example MOD at 0.7 : 0.3 over the resident set "demo:1-3fa9":

    {"entries": [{"policy_set": "demo:1-3fa9", "coefficients": [1, 0], "weight": 0.7},
                 {"policy_set": "demo:1-3fa9", "coefficients": [0, 1], "weight": 0.3}]}

    With the rule "jensen_shannon" the first entry is the set's reference, of weight 0; only "linear" may have negative weights,
    and any sum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    entries: tuple[Entry, ...] = Field(min_length=1)
    rule: MixingRule = REVERSE_KL
    alpha: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if (self.rule == "alpha_divergence") != (self.alpha is not None):
            raise ValueError("alpha belongs to alpha_divergence, which needs it")
        if self.rule != LINEAR and min(entry.weight for entry in self.entries) < 0:
            raise ValueError("only linear mixing has negative weights")
        if self.rule == "jensen_shannon" and self.entries[0].weight != 0:
            raise ValueError("the first entry of jensen_shannon is the reference, of weight 0")
        return self

    def cache_salt(self, callers: str | None = None) -> str:
        """Keys and values depend on each slot's set and coefficients, not on rule and mixing weights: requests that differ only in
        these share their prefix. `callers` is the caller's own salt, which separates further."""
        slots = [(entry.policy_set, entry.coefficients) for entry in self.entries]
        return hashlib.sha256(f"{slots!r} {callers!r}".encode()).hexdigest()


def base_mixture() -> Mixture:
    return Mixture(entries=(Entry(weight=1.0),))


def mixture(
    policy_set: str,
    objectives: Sequence[str],
    weights: Mapping[str, float] | None = None,
    mode: str = MOD,
    *,
    rule: str = REVERSE_KL,
    alpha: float | None = None,
) -> tuple[Mixture, Weights]:
    """As normalized_mixture, at weights as callers offline give them: raises InvalidWeights too."""
    checked = None if weights is None else normalize_weights(weights, objectives)
    return normalized_mixture(policy_set, objectives, checked, mode, rule=rule, alpha=alpha)


def normalized_mixture(
    policy_set: str,
    objectives: Sequence[str],
    weights: Weights | None = None,
    mode: str = MOD,
    *,
    rule: str = REVERSE_KL,
    alpha: float | None = None,
) -> tuple[Mixture, Weights]:
    """A mode's entries over one set, and the weights in effect (uniform where none are given, one-hot for a single policy).

    `mode` is "mod", "soup" (the exact weighted sum of the deltas), an objective's name for its policy alone, or "reference" for the
    set's reference alone, which has no weights; `rule` says how MOD mixes (sipo.decoding.mixing), `alpha` belongs to
    "alpha_divergence". Raises InvalidRequest for an unknown mode or rule, and for what the mode has no use for.
    """
    _check_mixing(mode, rule, alpha)
    if mode == REFERENCE:
        if weights is not None:
            message = "mode 'reference' has no policies to weigh: leave out preference_weights"
            raise InvalidRequest(message, param="preference_weights")
        return Mixture(entries=(reference_entry(policy_set, objectives, 1.0),)), {}
    if mode not in (MOD, SOUP):
        if mode not in objectives:
            known = ", ".join(repr(name) for name in (*MODES, *objectives))
            raise InvalidRequest(f"unknown mode {mode!r}: this policy set has {known}", param="mode")
        if weights is not None:
            raise InvalidRequest(f"mode {mode!r} is a single policy: leave out preference_weights", param="preference_weights")
        weights = one_hot_weights(mode, objectives)
    effective = uniform_weights(objectives) if weights is None else weights
    if mode == MOD:
        entries = [policy_entry(policy_set, objectives, name, weight) for name, weight in effective.items()]
        if rule == "jensen_shannon":
            entries.insert(0, reference_entry(policy_set, objectives, 0.0))
    else:
        entries = [Entry(policy_set=policy_set, coefficients=tuple(effective.values()), weight=1.0)]
    return Mixture.model_validate({"entries": entries, "rule": rule, "alpha": alpha}), effective


def policy_entry(policy_set: str, objectives: Sequence[str], objective: str, weight: float) -> Entry:
    """One policy of a resident set alone."""
    return Entry(policy_set=policy_set, coefficients=tuple(one_hot_weights(objective, objectives).values()), weight=weight)


def reference_entry(policy_set: str, objectives: Sequence[str], weight: float) -> Entry:
    """The reference of a resident set alone: the base, for a set without an adapter of its own for it."""
    return Entry(policy_set=policy_set, coefficients=(0.0,) * len(objectives), weight=weight)


def model_entry(policy_set: str, objectives: Sequence[str], name: str, weight: float) -> Entry:
    """A model of linear mixing by the name that it has there: the base, the set's reference, or one of its policies."""
    if name == BASE:
        return Entry(weight=weight)
    if name == REFERENCE:
        return reference_entry(policy_set, objectives, weight)
    return policy_entry(policy_set, objectives, name, weight)


def linear_mixture(policy_set: str, objectives: Sequence[str], coefficients: Mapping[str, float]) -> Mixture:
    """Linear mixing over the base, the reference and the policies of one set. Raises InvalidRequest for an unknown model or no
    finite number."""
    check_coefficients(coefficients, math.inf)
    models = (BASE, REFERENCE, *objectives)
    if unknown := sorted(coefficients.keys() - set(models)):
        raise InvalidRequest(f"unknown model {unknown[0]!r}: coefficients are for {', '.join(models)}", param="coefficients")
    entries = [model_entry(policy_set, objectives, name, coefficient) for name, coefficient in coefficients.items()]
    return Mixture(entries=tuple(entries), rule=LINEAR)


def check_coefficients(coefficients: Mapping[str, Any], limit: float) -> None:
    """Linear mixing's coefficients by model: finite numbers between -limit and limit, not all 0. Raises InvalidRequest."""
    for name, value in coefficients.items():
        if not is_finite_number(value) or abs(value) > limit:
            raise InvalidRequest(
                f"the coefficient of {name!r} is {value!r}: it must be a number between {-limit:g} and {limit:g}",
                param="coefficients",
            )
    if not any(coefficients.values()):
        raise InvalidRequest('give at least one coefficient that is not 0, as {"base": 1, "helpful": 0.5}', param="coefficients")


def _check_mixing(mode: str, rule: str, alpha: float | None) -> None:
    rules = get_args(MixingRule)
    if rule not in rules:
        raise InvalidRequest(f"unknown mixing {rule!r}: it is one of {', '.join(rules)}", param="mixing")
    if rule == LINEAR:
        raise InvalidRequest("linear mixing takes coefficients instead of weights and mode", param="mixing")
    if rule != REVERSE_KL and mode != MOD:
        raise InvalidRequest(f"mode {mode!r} is one model, there is nothing to mix: leave out mixing", param="mixing")
    if rule == "alpha_divergence":
        if alpha is None or not 0 < alpha < 1:
            raise InvalidRequest(f"mixing_alpha is {alpha!r}: alpha_divergence needs one between 0 and 1", param="mixing_alpha")
    elif alpha is not None:
        raise InvalidRequest("mixing_alpha belongs to mixing alpha_divergence: leave it out", param="mixing_alpha")

"""From a request's model name, policy set, mode and weights to the mixture that answers it. Everything that is wrong with them is
said here, before the engine sees the request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from services.decoder.residency import resident_key
from sipo.decoding.request import BASE, MOD, Mixture, base_mixture, mixture
from sipo.errors import InvalidRequest
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import Weights, parse_weights


class ChoiceFields(BaseModel):
    """The fields of a completion request that are ours; all others are vLLM's. For example

    {"model": "demo", "preference_weights": {"concise": 0.7, "warm": 0.3}}
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    policy_set: str | None = None
    preference_weights: dict[str, Any] | None = None
    mode: str | None = None
    cache_salt: str | None = None


@dataclass(frozen=True)
class Choice:
    """What answers a request: `policy_set` is None for the base, which has no weights."""

    mixture: Mixture
    policy_set: PolicySet | None
    weights: Weights

    def effective(self) -> dict[str, Any]:
        """The fields that every reply carries."""
        return {"policy_set": self.policy_set.id if self.policy_set else BASE, "preference_weights": self.weights}


class Chooser:
    def __init__(self, store: PolicyStore, base_name: str, base_sha256: str, slots: int) -> None:
        self._store = store
        self._base_name = base_name
        self._base_sha256 = base_sha256
        self._slots = slots

    def choose(self, fields: ChoiceFields) -> Choice:
        """Reads the store: a name means the set that is current at this moment. Raises the InvalidRequest family or NotFound."""
        name, at, inline = (fields.model or "").partition("@")
        weights = fields.preference_weights
        if at:
            if weights is not None:
                raise InvalidRequest("weights are given twice: in model and in preference_weights", param="preference_weights")
            weights = parse_weights(inline, param="model")
        reference = fields.policy_set or name
        if not reference:
            raise InvalidRequest("name a policy as model, for example demo or demo:2", param="model")
        if reference in (BASE, self._base_name) or fields.mode == BASE:
            if weights is not None:
                raise InvalidRequest("the base model has no objectives: leave out preference_weights", param="preference_weights")
            if fields.mode not in (None, BASE):
                raise InvalidRequest(f"mode {fields.mode!r} needs a policy set; {reference!r} is the base model", param="mode")
            return Choice(base_mixture(), None, {})
        policy_set = self._store.get(reference)
        policy_set.check_base(self._base_sha256)
        chosen, effective = mixture(resident_key(policy_set), policy_set.objectives, weights, fields.mode or MOD)
        if (needed := len(chosen.entries)) > self._slots:
            raise InvalidRequest(
                f"{policy_set.id} has {needed} policies to mix, this decoder has {self._slots} slots: start it with "
                f"SIPO_DECODER_SLOTS={needed}, or ask for mode soup",
                param="policy_set",
            )
        return Choice(chosen, policy_set, effective)

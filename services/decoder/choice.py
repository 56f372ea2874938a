"""From a request's model name, policy set, mode and weights to the mixture that answers it. Everything that is wrong with them is
said here, before the engine sees the request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from services.common.limits import MAX_SLOTS
from services.decoder.residency import resident_key
from services.decoder.settings import DecoderSettings
from sipo.decoding.request import (
    LINEAR,
    REVERSE_KL,
    Entry,
    Mixture,
    base_mixture,
    check_coefficients,
    model_entry,
    normalized_mixture,
)
from sipo.errors import InvalidRequest
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import BASE, MOD, REFERENCE
from sipo.targets import Target, resolve_target
from sipo.words import counted


class ChoiceFields(BaseModel):
    """The fields of a completion request that are ours; all others are vLLM's. For example

    {"model": "demo", "preference_weights": {"concise": 0.7, "warm": 0.3}}
    {"model": "demo@concise=0.7,warm=0.3", "mixing": "alpha_divergence", "mixing_alpha": 0.5}
    {"model": "demo", "mixing": "linear", "coefficients": {"base": 1, "warm": 1.5, "other:2/formal": -0.5}}
    {"model": "demo", "mode": "reference"}
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    policy_set: str | None = None
    preference_weights: dict[str, Any] | None = None
    mode: str | None = None
    mixing: str | None = None
    mixing_alpha: float | None = None
    coefficients: dict[str, Any] | None = None
    cache_salt: str | None = None


@dataclass(frozen=True)
class Choice:
    """What answers a request: the sets that must be in memory for it (none for the base), and the fields of every reply.
    `chat_template` is that of the set that the request names, if it has its own."""

    mixture: Mixture
    policy_sets: tuple[PolicySet, ...]
    effective: dict[str, Any]
    chat_template: str | None = None


class Chooser:
    def __init__(self, store: PolicyStore, settings: DecoderSettings, base_sha256: str) -> None:
        self._store = store
        self._settings = settings
        self._base_sha256 = base_sha256

    def choose(self, fields: ChoiceFields) -> Choice:
        """Reads the store: a name means the set that is current at this moment. Raises the InvalidRequest family or NotFound."""
        target = resolve_target(
            self._store,
            fields.model or "",
            fields.preference_weights,
            policy_set=fields.policy_set,
            base_names=(BASE, self._settings.model),
        )
        if target.policy_set is None:
            return self._mix(target, fields)
        target.policy_set.check_base(self._base_sha256)
        return replace(self._mix(target, fields), chat_template=target.policy_set.manifest.prompt_format.chat_template)

    def _mix(self, target: Target, fields: ChoiceFields) -> Choice:
        policy_set = target.policy_set
        if fields.mixing == LINEAR:
            return self._linear(target, fields)
        if fields.coefficients is not None:
            raise InvalidRequest("coefficients belong to mixing linear: leave them out, or add it", param="coefficients")
        if policy_set is None or fields.mode == BASE:
            return _base(target, fields)
        chosen, effective = normalized_mixture(
            resident_key(policy_set),
            policy_set.objectives,
            target.weights,
            fields.mode or MOD,
            rule=fields.mixing or REVERSE_KL,
            alpha=fields.mixing_alpha,
        )
        self._check_room(chosen, (policy_set,), "ask for mode soup")
        shown = {"policy_set": policy_set.id, "preference_weights": effective}
        if chosen.rule != REVERSE_KL:
            shown["mixing"] = chosen.rule
        return Choice(chosen, (policy_set,), shown)

    def _linear(self, target: Target, fields: ChoiceFields) -> Choice:
        """Free coefficients over "base", "reference" and the objectives of the request's own set, and "NAME:VERSION/OBJECTIVE" and
        "NAME:VERSION/reference" of any other."""
        policy_set = target.policy_set
        if target.weights is not None or fields.mode is not None or fields.mixing_alpha is not None:
            raise InvalidRequest("linear mixing has coefficients only: leave out weights, mode and mixing_alpha", param="mixing")
        if fields.coefficients is None:
            raise InvalidRequest('linear mixing needs coefficients, as {"base": 1, "helpful": 0.5}', param="coefficients")
        check_coefficients(fields.coefficients, self._settings.decoder_max_coefficient)
        used: dict[str, PolicySet] = {}
        entries: list[Entry] = []
        for name, coefficient in fields.coefficients.items():
            if name == BASE:
                entries.append(Entry(weight=coefficient))
                continue
            other, slash, model = name.rpartition("/")
            owner = self._get(other) if slash else policy_set
            if owner is None or model not in (REFERENCE, *owner.objectives):
                raise InvalidRequest(_unknown(name, owner), param="coefficients")
            used[owner.id] = owner
            entries.append(model_entry(resident_key(owner), owner.objectives, model, coefficient))
        chosen = Mixture(entries=tuple(entries), rule=LINEAR)
        self._check_room(chosen, tuple(used.values()))
        shown = {"policy_set": policy_set.id if policy_set else BASE, "mixing": LINEAR, "coefficients": fields.coefficients}
        return Choice(chosen, tuple(used.values()), shown)

    def _get(self, reference: str) -> PolicySet:
        policy_set = self._store.get(reference)
        policy_set.check_base(self._base_sha256)
        return policy_set

    def _check_room(self, chosen: Mixture, sets: tuple[PolicySet, ...], otherwise: str = "name fewer") -> None:
        slots, models = self._settings.decoder_slots, len(chosen.entries)
        if models > slots:
            more = f"start it with SIPO_DECODER_SLOTS={models}, or " if models <= MAX_SLOTS else ""
            raise InvalidRequest(
                f"this request mixes {models} models (with mixing {chosen.rule}), this decoder has {counted(slots, 'slot')}: "
                f"{more}{otherwise}",
                param="policy_set",
            )
        if len(sets) > self._settings.decoder_sets:
            raise InvalidRequest(
                f"this request needs {len(sets)} policy sets in memory: start the decoder with SIPO_DECODER_SETS={len(sets)}",
                param="coefficients",
            )


def _unknown(name: str, owner: PolicySet | None) -> str:
    own = (REFERENCE, *owner.objectives) if owner else ()
    known = ", ".join([BASE, *own, f"NAME:VERSION/OBJECTIVE and NAME:VERSION/{REFERENCE} of another set"])
    return f"unknown model {name!r}: {'' if owner else 'this request names no policy set, and '}coefficients are for {known}"


def _base(target: Target, fields: ChoiceFields) -> Choice:
    if target.weights is not None:
        raise InvalidRequest("mode 'base' has no policies to weigh: leave out preference_weights", param="preference_weights")
    if fields.mode not in (None, BASE):
        raise InvalidRequest(f"mode {fields.mode!r} needs a policy set, and this request names the base model", param="mode")
    if fields.mixing is not None or fields.mixing_alpha is not None:
        raise InvalidRequest("the base is one model, there is nothing to mix: leave out mixing", param="mixing")
    return Choice(base_mixture(), (), {"policy_set": BASE, "preference_weights": {}})

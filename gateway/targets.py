"""Which policies, at which weights, a request asks for: the model names of the API.

A model name is a policy name ("demo": its current set), a set's id ("demo:2"), either with weights appended
("demo@helpful=0.7,harmless=0.3"), or "base" for the base model unmixed. Nothing here knows HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sipo.errors import InvalidWeights, NotFound
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import BASE, Weights, normalize_weights, parse_weights


@dataclass(frozen=True)
class Target:
    """What will answer: a policy set, at weights over all its objectives or (None) its default ones; or the base model alone."""

    policy_set: PolicySet | None
    weights: Weights | None


def resolve_target(policies: PolicyStore, model: str, weights: Mapping[str, float] | None) -> Target:
    """The set and the weights that `model` and `preference_weights` mean together.

    Raises NotFound for an unknown name, and InvalidWeights for weights that do not fit the set, or that are given twice.
    """
    reference, at, appended = model.partition("@")
    if at and weights is not None:
        raise InvalidWeights("weights are in the model name and in preference_weights: give them once", param="preference_weights")
    param = "model" if at else "preference_weights"
    if at:
        weights = parse_weights(appended, param=param)
    if reference == BASE:
        if weights is not None:
            raise InvalidWeights("the base model has no objectives to weigh", param=param)
        return Target(None, None)
    try:
        policy_set = policies.get(reference)
    except NotFound as error:
        raise NotFound(error.message, param="model") from error
    if weights is None:
        return Target(policy_set, None)
    return Target(policy_set, normalize_weights(weights, policy_set.objectives, param=param))

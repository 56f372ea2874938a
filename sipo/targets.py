"""What a completion request asks for: which policies, at which weights, and a prompt that says something.

A model name is NAME[:VERSION][@WEIGHTS]: "demo" is the current set of that name, "demo:2" one for good, and
"demo@helpful=0.7,harmless=0.3" has weights with it. "base" is the base model unmixed. Gateway and decoder read requests with the
same functions; nothing here knows HTTP, or how policies are mixed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sipo.errors import InvalidRequest, InvalidWeights, NotFound
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import BASE, Weights, normalize_weights, parse_weights


@dataclass(frozen=True)
class Target:
    """What will answer: a policy set, at weights over all its objectives or (None) its default ones; or the base model alone."""

    policy_set: PolicySet | None
    weights: Weights | None


def parse_model_name(model: str) -> tuple[str, Weights | None]:
    """What is before the "@", and the weights behind it: for the store and for normalize_weights to check.

    Raises InvalidWeights for weights that cannot be read.
    """
    reference, at, weights = model.partition("@")
    return reference, parse_weights(weights, param="model") if at else None


def resolve_target(
    policies: PolicyStore,
    model: str,
    preference_weights: Mapping[str, Any] | None,
    *,
    policy_set: str | None = None,
    base_names: Collection[str] = (BASE,),
) -> Target:
    """The set and the weights that a request's fields mean together.

    `policy_set` goes before the name in `model`; `base_names` are the names of the base model. Reads the store: a name without a
    version means the set that is current at this moment. The errors' `param` is the field at fault. Raises NotFound for an unknown
    set, InvalidRequest where none is named, and InvalidWeights for weights that do not fit the set, or that are given twice.
    """
    name, appended = parse_model_name(model)
    if appended is not None and preference_weights is not None:
        raise InvalidWeights("weights are in the model name and in preference_weights: give them once", param="preference_weights")
    weights, weights_field = (preference_weights, "preference_weights") if appended is None else (appended, "model")
    reference, reference_field = (policy_set, "policy_set") if policy_set else (name, "model")
    if not reference:
        raise InvalidRequest("name a policy as model, for example demo or demo:2", param="model")
    if reference in base_names:
        if weights is not None:
            raise InvalidWeights("the base model has no objectives to weigh: leave out the weights", param=weights_field)
        return Target(None, None)
    try:
        chosen = policies.get(reference)
    except NotFound as error:
        raise NotFound(error.message, param=reference_field) from error
    if weights is None:
        return Target(chosen, None)
    return Target(chosen, normalize_weights(weights, chosen.objectives, param=weights_field))


def check_messages(messages: Any) -> None:
    """Raises InvalidRequest for chat messages without any content. What is no list of messages is not judged here."""
    if isinstance(messages, list) and not any(isinstance(message, dict) and message.get("content") for message in messages):
        raise InvalidRequest("the prompt is empty: no message has any content", param="messages")


def check_prompt(prompt: Any) -> None:
    """Raises InvalidRequest for an empty text or list of token ids, or a list with such a one in it. What is neither text nor list
    is not judged here."""
    prompts = prompt if isinstance(prompt, list) and prompt else [prompt]
    if "" in prompts or [] in prompts:
        raise InvalidRequest("the prompt is empty", param="prompt")

"""GET /v1/models: every policy name, every version and the base model, in OpenAI's form with what a caller needs for weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import BASE, Weights
from sipo.targets import resolve_target

router = APIRouter(tags=["models"])


class Model(BaseModel):
    """OpenAI's model object; the fields after `parent` are ours and empty for the base model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "sipo"
    root: str
    parent: str | None = None
    objectives: list[str] = []
    default_weights: Weights | None = None
    current: bool = False


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models")
def list_models(request: Request) -> ModelList:
    """A policy name stands for its current set; NAME:VERSION names one for good."""
    policies: PolicyStore = request.app.state.policies
    return ModelList(data=[*_policies(policies), _base(request)])


@router.get("/v1/models/{model:path}")
def get_model(model: str, request: Request) -> Model:
    """One model by any name that a completion request can give; weights within the name become its default weights."""
    policies: PolicyStore = request.app.state.policies
    target = resolve_target(policies, model, None)
    if target.policy_set is None:
        return _base(request)
    current = target.policy_set.id in {policy_set.id for policy_set in policies.current_sets()}
    described = _describe(target.policy_set, model, current=current)
    return described if target.weights is None else described.model_copy(update={"default_weights": target.weights})


def _policies(policies: PolicyStore) -> Iterator[Model]:
    current = policies.current_sets()
    ids = {policy_set.id for policy_set in current}
    for policy_set in current:
        yield _describe(policy_set, policy_set.manifest.name, current=True)
    for policy_set in policies.sets():
        yield _describe(policy_set, policy_set.id, current=policy_set.id in ids)


def _describe(policy_set: PolicySet, name: str, *, current: bool) -> Model:
    manifest = policy_set.manifest
    return Model(
        id=name,
        created=int(manifest.created.timestamp()),
        root=policy_set.id,
        parent=BASE,
        objectives=policy_set.objectives,
        default_weights=policy_set.default_weights,
        current=current,
    )


def _base(request: Request) -> Model:
    return Model(id=BASE, root=request.app.state.settings.model)

"""What every step of an experiment is made with: the plan, this machine's settings, the base, and what earlier steps left."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gateway.experiments.definition import POLICY, Sft
from gateway.experiments.plan import Plan, Step
from gateway.experiments.published import DATA
from gateway.experiments.result import Tokens
from gateway.settings import GatewaySettings
from services.common.local.training import launch_command
from sipo.datasets import read
from sipo.models import Base
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import Example
from sipo.training.run_folder import SftFolder


@dataclass(frozen=True)
class Made:
    """What a step came to, besides its files."""

    tokens: Tokens
    parts: dict[str, float]
    policy_set: str | None = None


@dataclass(frozen=True)
class Workplace:
    plan: Plan
    settings: GatewaySettings

    @cached_property
    def base(self) -> Base:
        return Base.open(self.plan.experiment.base, self.settings.cache_dir)

    @cached_property
    def command(self) -> list[str]:
        """That trains: see services.common.local.training."""
        return launch_command()

    def data_file(self, step: Step) -> Path:
        """What the step learns from, in a file."""
        return subset_file(step.uses["data"]) if "data" in step.uses else self.plan.data_file

    def examples(self, step: Step) -> list[Example]:
        if "data" in step.uses:
            return read(self.data_file(step)).labelled()
        return self.plan.demonstrations if isinstance(step.stage, Sft) else self.plan.examples


def subset_file(step: Step) -> Path:
    return step.folder / "data.jsonl"


def store(step: Step) -> PolicyStore:
    """The policy sets that a step has: its own, and for a round those that it went on from."""
    return PolicyStore(step.folder / DATA / "policies")


def policy_set(step: Step) -> PolicySet:
    result = step.result()
    assert result is not None and result.policy_set is not None, "steps run in order"
    return store(step).get(result.policy_set)


def take_over(start: PolicySet, into: PolicyStore) -> None:
    """All sets from which `start` descends, as they are, with their versions: whose rewards decide a round is found by them."""
    home = into.root / POLICY
    known = [one for one in PolicyStore(start.folder.parents[1]).sets() if one.manifest.version <= start.manifest.version]
    for one in known:
        if not (home / str(one.manifest.version)).exists():
            copied(one.folder, home / str(one.manifest.version))
    into.activate(start.id)


def copied(source: Path, target: Path) -> None:
    """A folder, that is there whole or not at all."""
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    aside.rename(target)


def fine_tuned(step: Step) -> SftFolder:
    return SftFolder(step.folder)


def reference_of(step: Step) -> Path | None:
    """The adapter that an alignment or LW lies on."""
    return fine_tuned(step.uses["reference"]).adapter if "reference" in step.uses else None

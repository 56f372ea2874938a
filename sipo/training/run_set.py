"""Runs that belong together: in one folder, and as one policy set when they are finished. Training itself is not done here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sipo.errors import InvalidRequest, TrainingFailed
from sipo.models import Base, BaseModelRef
from sipo.policies import Draft, MadeBy, PolicySet, PolicyStore, TrainedRuns, adapter_sha256, adapters_sha256
from sipo.training.planning import PlannedRun
from sipo.training.run_folder import RUN, RunFolder, data_sha256, reference_of


@dataclass(frozen=True)
class RunSet:
    folder: Path
    planned: Sequence[PlannedRun]

    def run_folder(self, planned: PlannedRun) -> RunFolder:
        return RunFolder(self.folder / planned.name)

    def prepare(self) -> None:
        """Writes what each run is made from. Raises InvalidRequest, with nothing touched, if there are runs that are not these."""
        names = {planned.name for planned in self.planned}
        foreign = [path.parent for path in sorted(self.folder.glob(f"[!.]*/{RUN}")) if path.parent.name not in names]
        for planned in self.planned:
            folder = self.run_folder(planned)
            if folder.path.exists() and not folder.is_made_from(planned.run, planned.pairs):
                foreign.append(folder.path)
        if foreign:
            raise InvalidRequest(f"{foreign[0]} was begun with other arguments or data: name another folder", param="out")
        for planned in self.planned:
            self.run_folder(planned).prepare(planned.run, planned.pairs)

    def publish(self, name: str, store: PolicyStore, base: Base, parent: PolicySet | None) -> PolicySet:
        """The adapters of the finished runs as the next version of `name`; once, however often this is called."""
        runs = {planned.name: self.run_folder(planned) for planned in self.planned}
        hashes = {objective: adapter_sha256(folder.adapter) for objective, folder in runs.items()}
        made_by = TrainedRuns(adapters_sha256=adapters_sha256(hashes))
        return publish_runs(store, name, runs, base=base, parent=parent, made_by=made_by)


def runs_sha256(planned: Iterable[PlannedRun]) -> str:
    """Of everything that they are made from: equal for the same runs, wherever their reference lies."""
    made_from = [(one.name, one.run.model_dump(mode="json", exclude={"reference"}), list(one.pairs)) for one in planned]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def publish_runs(
    store: PolicyStore,
    name: str,
    runs: Mapping[str, RunFolder],
    *,
    base: Base,
    parent: PolicySet | None,
    made_by: MadeBy,
    **settings: Any,
) -> PolicySet:
    """The adapters of finished `runs`, by objective, as the next version of `name`, with the reference that they lie on; or the set
    that was made by the same before.

    Raises TrainingFailed, with nothing published, for a policy whose answers the training has spoilt, and as reference_of does.
    """
    if (published := store.published_by(name, made_by)) is not None:
        return published
    for objective, folder in runs.items():
        if (metrics := folder.finished()) is not None and (fault := metrics.fault) is not None:
            raise TrainingFailed(
                f"the policy of {objective!r} is not published: {fault}. The training went too far: use a smaller learning_rate or "
                "fewer epochs, or a greater beta"
            )
    draft = draft_of(name, runs, base=base.ref, parent=parent, made_by=made_by, **settings)
    reference = reference_of(*(folder.run() for folder in runs.values()))
    return store.publish(draft, {objective: folder.adapter for objective, folder in runs.items()}, base.folder, reference=reference)


def draft_of(
    name: str,
    runs: Mapping[str, RunFolder],
    *,
    base: BaseModelRef,
    parent: PolicySet | None = None,
    made_by: MadeBy | None = None,
    **settings: Any,
) -> Draft:
    """What a manifest says of finished `runs`, by objective, whose settings differ in nothing but their learning rates. `settings`:
    what else there is to say of how the set was made."""
    made_from = {objective: folder.run() for objective, folder in runs.items()}
    first = next(iter(made_from.values()))
    rates = {objective: run.settings.learning_rate for objective, run in made_from.items()}
    return Draft(
        name=name,
        base=base,
        prompt_format=first.prompt_format,
        objectives=list(runs),
        beta=first.settings.beta,
        round=0 if parent is None else parent.manifest.round + 1,
        parent=None if parent is None else parent.id,
        data_sha256=data_sha256(runs.values()),
        made_by=made_by,
        settings=first.settings.model_dump(exclude={"learning_rate"})
        | {"method": first.method, **settings, "learning_rates": rates},
        metrics={objective: metrics.model_dump() for objective, folder in runs.items() if (metrics := folder.finished())},
    )

"""The folder of `sipo train`: what each run is made from, what is finished, and publishing it. Training itself is not done here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.cli.train.plan import Base, PlannedRun
from sipo.errors import InvalidRequest
from sipo.policies import POLICY_NAME, Draft, PolicySet, PolicyStore, adapter_sha256
from sipo.preferences import BASE
from sipo.training.settings import ADAPTER, METRICS, PAIRS, Method, TrainMetrics, read_run, write_run

RUN = "run.yaml"


@dataclass(frozen=True)
class Runs:
    out: Path
    planned: Sequence[PlannedRun]

    def folder(self, planned: PlannedRun) -> Path:
        return self.out / planned.name

    def prepare(self) -> None:
        """Writes what each run is made from. Raises InvalidRequest, with nothing touched, if there are runs that are not these."""
        names = {planned.name for planned in self.planned}
        others = [path.parent for path in sorted(self.out.glob(f"[!.]*/{RUN}")) if path.parent.name not in names]
        begun = [planned for planned in self.planned if self.folder(planned).exists()]
        if wrong := others + [self.folder(planned) for planned in begun if not self._is_there(planned)]:
            raise InvalidRequest(f"{wrong[0]} was begun with other arguments or data: name another folder with --out", param="out")
        for planned in self.planned:
            if planned not in begun:
                aside = self.out / f".{planned.name}"
                write_run(aside, planned.run)
                (aside / PAIRS).write_text(_lines(planned))
                aside.rename(self.folder(planned))

    def _is_there(self, planned: PlannedRun) -> bool:
        folder = self.folder(planned)
        try:
            return read_run(folder / RUN) == planned.run and (folder / PAIRS).read_text() == _lines(planned)
        except (InvalidRequest, OSError):
            return False

    def finished(self, planned: PlannedRun) -> TrainMetrics | None:
        path = self.folder(planned) / METRICS
        return TrainMetrics.model_validate_json(path.read_text()) if path.exists() else None

    def check_publishable(self, name: str) -> None:
        """Raises InvalidRequest for what publishing would refuse, before hours of training."""
        if not POLICY_NAME.fullmatch(name) or name == BASE:
            raise InvalidRequest(f"--publish {name!r} is no policy name: small letters, digits, - and _; not {BASE!r}")
        if len(self.planned) < 2:
            raise InvalidRequest(f"--publish needs two or more objectives, here is {self.planned[0].name} alone")

    def publish(self, name: str, method: Method, store: PolicyStore, base: Base, parent: PolicySet | None) -> PolicySet:
        """The adapters of the finished runs as the next version of `name`; once, however often this is called."""
        adapters = {planned.name: self.folder(planned) / ADAPTER for planned in self.planned}
        hashes = {objective: adapter_sha256(folder) for objective, folder in adapters.items()}
        for known in store.sets():
            if known.manifest.name == name and hashes == {key: one.sha256 for key, one in known.manifest.adapters.items()}:
                return known
        first = self.planned[0].run
        draft = Draft(
            name=name,
            base=base.ref,
            prompt_format=first.prompt_format,
            objectives=list(adapters),
            beta=first.settings.beta,
            round=0 if parent is None else parent.manifest.round + 1,
            parent=None if parent is None else parent.id,
            data_sha256=hashlib.sha256(b"".join((self.folder(one) / PAIRS).read_bytes() for one in self.planned)).hexdigest(),
            settings=first.settings.model_dump(exclude={"learning_rate"})
            | {"method": method, "learning_rates": {one.name: one.run.settings.learning_rate for one in self.planned}},
            metrics={one.name: metrics.model_dump() for one in self.planned if (metrics := self.finished(one))},
        )
        return store.publish(draft, adapters, base.folder)


def _lines(planned: PlannedRun) -> str:
    return "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in planned.pairs)

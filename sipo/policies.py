"""Policy sets: one LoRA adapter per objective on a shared base, in immutable versioned folders.

    <root>/demo/1/manifest.json, helpful/adapter_model.safetensors, …, _reference/adapter_model.safetensors if it has one
    <root>/demo/current -> 1

What the policies of a set were aligned from, its reference, is the base, or the base changed by one more adapter that supervised
fine-tuning left. The policies then lie on top of it: every model of the set has that adapter with coefficient 1.

A set is published by writing it aside, syncing it to disk and renaming it, and deleted by renaming it before its files go;
`current` moves by renaming a symbolic link. So at any moment, and after any crash, readers see the old state or the whole new one.
Nobody is told: services look at `current` again and again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from sipo.errors import Conflict, IncompatiblePolicy, InvalidRequest, NotFound
from sipo.files import sync, sync_tree
from sipo.models import BaseModelRef
from sipo.preferences import BASE, Weights, check_objectives, uniform_weights
from sipo.prompts import PromptFormat
from sipo.record import Record

POLICY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
SET_VERSION = re.compile(r"[0-9]{1,9}")
ASIDE = ".new-"
GONE = ".gone-"
"""How the folder of a deleted version is called. It stays, empty, so that no other set gets its number."""
ABANDONED = 3600.0
"""Seconds after which a set that is still aside is nobody's."""

REFERENCE = "_reference"
"""The folder of the reference's adapter in a set: no objective can be called so."""

_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (_CONFIG, "adapter_model.safetensors")
_FOR_PEOPLE = ("README.md", "loss.png")
"""A model card and a loss curve, where there are any."""


class JobRound(Record):
    """A round of a job; round 0 is its first alignment."""

    job: str
    round: int


class TrainedRuns(Record):
    """Training runs that belong to no job, by what they came to: see adapters_sha256."""

    adapters_sha256: str


MadeBy = JobRound | TrainedRuns
"""What a set was made by. Under one name there is one set for each."""


class AdapterRef(Record):
    sha256: str
    rank: int


class Draft(Record):
    """What a publisher knows about a set; `Manifest` adds what publishing determines."""

    name: str
    base: BaseModelRef
    prompt_format: PromptFormat
    objectives: list[str]
    beta: float
    round: int = 0
    """0 for a first alignment, k for the k-th SIPO round."""
    parent: str | None = None
    data_sha256: str | None = None
    made_by: MadeBy | None = None
    """None: adapters that come from elsewhere."""
    settings: dict[str, Any] = Field(default={})
    metrics: dict[str, Any] = Field(default={})


class Manifest(Draft):
    version: int
    created: datetime
    adapters: dict[str, AdapterRef]
    reference: AdapterRef | None = None
    """None: the base itself."""

    @property
    def id(self) -> str:
        return f"{self.name}:{self.version}"


class PolicySet:
    """A published set: its manifest and where its adapters lie."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def objectives(self) -> list[str]:
        return self.manifest.objectives

    @property
    def default_weights(self) -> Weights:
        return uniform_weights(self.objectives)

    def adapter_dir(self, objective: str) -> Path:
        """A plain PEFT adapter folder."""
        return self.folder / objective

    @property
    def reference_dir(self) -> Path | None:
        """The PEFT adapter that makes the reference of the base; None if the reference is the base."""
        return self.folder / REFERENCE if self.manifest.reference is not None else None

    @property
    def folders(self) -> dict[str, Path]:
        """All its adapters, by objective, the reference's by REFERENCE at the end if there is one."""
        folders = {objective: self.adapter_dir(objective) for objective in self.objectives}
        return folders if self.reference_dir is None else folders | {REFERENCE: self.reference_dir}

    def verify(self) -> None:
        """Raises IncompatiblePolicy if an adapter is not the one that was published, NotFound if the set was deleted meanwhile."""
        published = [(name, adapter.sha256) for name, adapter in self.manifest.adapters.items()]
        if self.manifest.reference is not None:
            published.append((REFERENCE, self.manifest.reference.sha256))
        for name, sha256 in published:
            try:
                found = adapter_sha256(self.folder / name)
            except FileNotFoundError:
                raise NotFound(f"the files of {self.id} are not there any more: name another set", param="policy_set") from None
            if found != sha256:
                raise IncompatiblePolicy(f"{self.id}: the files of {name!r} changed after publishing: publish the set again")

    def check_base(self, base_sha256: str) -> None:
        """Raises IncompatiblePolicy if the set belongs to another base than the one given by its hash."""
        base = self.manifest.base
        if base.sha256 != base_sha256:
            raise IncompatiblePolicy(
                f"{self.id} was trained on {base.name} ({base.sha256[:12]}), this service runs another base ({base_sha256[:12]}): "
                "start it with that model, or use a policy set made for this one",
                param="policy_set",
            )


class PolicyStore:
    """All policy sets under one folder. Safe for any number of readers and publishers on one file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        names = (folder.name for folder in self.root.iterdir())
        return sorted(name for name in names if POLICY_NAME.fullmatch(name) and self._versions(name))

    def sets(self) -> list[PolicySet]:
        """Every set, oldest version first within a name."""
        return [self.get(f"{name}:{version}") for name in self.names() for version in self._versions(name)]

    def get(self, reference: str) -> PolicySet:
        """The set "demo:2", or the current set of the name "demo". Raises NotFound, saying what there is."""
        name, colon, version = reference.partition(":")
        if not colon:
            current = self.current(name) if POLICY_NAME.fullmatch(name) else None
            if current is None:
                known = ", ".join(self.names()) or "none yet"
                versions = ", ".join(f"{name}:{v}" for v in self._versions(name)) if POLICY_NAME.fullmatch(name) else ""
                hint = f"it has {versions}, none of them activated" if versions else f"known names: {known}"
                raise NotFound(f"no current policy set named {name!r}: {hint}", param="policy_set")
            return current
        folder = self.root / name / version
        if not POLICY_NAME.fullmatch(name) or not SET_VERSION.fullmatch(version) or not folder.is_dir():
            known = ", ".join(f"{n}:{v}" for n in self.names() for v in self._versions(n)) or "none yet"
            raise NotFound(f"no policy set {reference!r}: known sets are {known}", param="policy_set")
        return self._read(folder)

    def current_sets(self) -> list[PolicySet]:
        """One of each name that has one. A name of which it cannot be told is left out here: who asks for it hears why."""
        found = []
        for name in self.names():
            with suppress(Conflict):
                if (current := self.current(name)) is not None:
                    found.append(current)
        return found

    def current(self, name: str) -> PolicySet | None:
        """The set that requests for this name get, or None if none was activated. Raises Conflict where that cannot be told."""
        home = self.root / name
        version = _pointed_at(home / "current")
        if version is None:
            return None
        if version not in map(str, self._versions(name)):
            known = ", ".join(f"{name}:{known}" for known in self._versions(name)) or "none yet"
            raise Conflict(
                f"{home / 'current'} names no version of {name!r}, whose sets are {known}: make one of them current with `sipo "
                f"policies activate {name}:VERSION`",
                param="policy_set",
            )
        return self._read(home / version)

    def published_by(self, name: str, made_by: MadeBy) -> PolicySet | None:
        """The set of this name that was made by it, if it is published: a crash may have kept its publisher from telling so."""
        policy_sets = (self.get(f"{name}:{version}") for version in self._versions(name))
        return next((policy_set for policy_set in policy_sets if _made_by(policy_set.manifest) == made_by), None)

    def activate(self, reference: str) -> PolicySet:
        """Makes "demo:2" the current set of "demo"."""
        if ":" not in reference:
            raise InvalidRequest(f"{reference!r} names no version: write {reference}:1", param="policy_set")
        chosen = self.get(reference)
        folder = chosen.folder.parent
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as aside:
            link = Path(aside) / "current"
            link.symlink_to(str(chosen.manifest.version))
            if _is_copy(folder / "current"):
                (folder / "current").rename(Path(aside) / "copy")
            link.rename(folder / "current")
        sync(folder)
        return chosen

    def delete(self, reference: str) -> PolicySet:
        """Removes "demo:1" for good; no set gets its number again. Raises Conflict while another set is its child (its line would
        be broken), and for the current set of a name that has others."""
        if ":" not in reference:
            raise InvalidRequest(f"{reference!r} names no version: write {reference}:1", param="policy_set")
        chosen = self.get(reference)
        if child := next((other.id for other in self.sets() if other.manifest.parent == chosen.id), None):
            raise Conflict(f"{child} descends from {chosen.id}, whose rewards may decide its jobs: delete {child} first")
        name, home = chosen.manifest.name, chosen.folder.parent
        others = [f"{name}:{version}" for version in self._versions(name) if version != chosen.manifest.version]
        if others and (current := self.current(name)) is not None and current.id == chosen.id:
            raise Conflict(f"{chosen.id} is current: first make another one so, as with `sipo policies activate {others[-1]}`")
        gone = home / f"{GONE}{chosen.manifest.version}"
        chosen.folder.rename(gone)
        if not others:
            _remove(home / "current")
        sync(home)
        for path in gone.iterdir():
            _remove(path)
        return chosen

    def publish(
        self,
        draft: Draft,
        adapters: Mapping[str, Path],
        base: Path,
        *,
        reference: Path | None = None,
        activate: bool = False,
    ) -> PolicySet:
        """Copies the adapters (objective → PEFT folder) into a new immutable version of `draft.name`; `base` is the folder of the
        model that they change, `reference` the adapter on it that they were trained on top of.

        Raises IncompatiblePolicy for an adapter that cannot be served, InvalidRequest for names that do not fit together; then
        nothing is left behind.
        """
        if not POLICY_NAME.fullmatch(draft.name) or draft.name == BASE:
            raise InvalidRequest(f"{draft.name!r} is no policy name: small letters, digits, - and _; not {BASE!r}", param="policy")
        if list(adapters) != draft.objectives or len(adapters) < 2:
            raise InvalidRequest(f"a policy set needs one adapter for each of two or more objectives, got {', '.join(adapters)}")
        check_objectives(draft.objectives)
        home = self.root / draft.name
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        aside = Path(tempfile.mkdtemp(dir=home, prefix=ASIDE))
        try:
            refs = {objective: _copy_adapter(source, aside / objective, base) for objective, source in adapters.items()}
            of_reference = None if reference is None else _copy_adapter(reference, aside / REFERENCE, base)
            while True:
                version = max([*self._versions(draft.name), *self._deleted(draft.name)], default=0) + 1
                manifest = Manifest(
                    **draft.model_dump(), version=version, created=datetime.now(UTC), adapters=refs, reference=of_reference
                )
                (aside / "manifest.json").write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
                sync_tree(aside)
                aside.chmod(0o755)
                try:
                    aside.rename(home / str(version))
                    break
                except OSError:
                    # Somebody else published this version in the meantime: take the next one.
                    if not (home / str(version)).is_dir():
                        raise
            sync(home)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return self.activate(manifest.id) if activate else self._read(home / str(version))

    def _versions(self, name: str) -> list[int]:
        folder = self.root / name
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []

    def _deleted(self, name: str) -> list[int]:
        numbers = (path.name.removeprefix(GONE) for path in (self.root / name).glob(f"{GONE}*"))
        return [int(number) for number in numbers if number.isdecimal()]

    def _read(self, folder: Path) -> PolicySet:
        try:
            return PolicySet(folder, Manifest.model_validate_json((folder / "manifest.json").read_bytes()))
        except (OSError, ValidationError) as error:
            raise Conflict(f"{folder} is no readable policy set: {error}") from error


def _pointed_at(current: Path) -> str | None:
    """The version that `current` means, whether there is such a one or not. Not every backup keeps links: some make a copy of the
    version of it, others a file with its name."""
    try:
        if current.is_symlink():
            return str(current.readlink())
        if current.is_dir():
            manifest = Manifest.model_validate_json((current / "manifest.json").read_bytes())
            return str(manifest.version) if manifest.name == current.parent.name else ""
        return current.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return "" if _is_copy(current) else None
    except (OSError, ValueError):  # of pydantic's, and of a text that is none
        return ""


def _is_copy(current: Path) -> bool:
    return current.is_dir() and not current.is_symlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def adapter_sha256(folder: Path) -> str:
    total = hashlib.sha256()
    for name in _ADAPTER_FILES:
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def adapters_sha256(adapters: Mapping[str, str]) -> str:
    """Of a set's adapters as a whole; `adapters`: the hash of each objective's."""
    return hashlib.sha256(json.dumps(adapters, sort_keys=True).encode()).hexdigest()


def _made_by(manifest: Manifest) -> MadeBy:
    """Manifests from before `made_by` had the job among the settings, and other sets were known by their adapters."""
    if manifest.made_by is not None:
        return manifest.made_by
    if "job" in manifest.settings:
        return JobRound(job=manifest.settings["job"], round=manifest.settings["job_round"])
    return TrainedRuns(adapters_sha256=adapters_sha256({name: adapter.sha256 for name, adapter in manifest.adapters.items()}))


def _copy_adapter(source: Path, target: Path, base: Path) -> AdapterRef:
    from sipo.lora import (  # torch takes seconds to import, and readers of manifests do without
        check_base,
        copy_weights,
        load_adapter,
    )

    adapter = load_adapter(source)
    check_base(adapter, base)
    target.mkdir()
    shutil.copyfile(source / _CONFIG, target / _CONFIG)
    copy_weights(source, target)
    for name in _FOR_PEOPLE:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return AdapterRef(sha256=adapter_sha256(target), rank=max(a.shape[0] for a, _ in adapter.modules.values()))


def _sweep(home: Path) -> None:
    """Removes what publishers that were killed left half-made; nobody publishes for so long."""
    for left in home.glob(f"{ASIDE}*"):
        with suppress(FileNotFoundError):  # its publisher lives, and has just finished
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)

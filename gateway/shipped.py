"""The policies that ship with the project for the bundled model: published at the first start, so there is something to serve."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from services.common.settings import CommonSettings
from sipo.errors import InvalidRequest
from sipo.models import BUNDLED_MODEL, Base
from sipo.policies import REFERENCE, Draft, Manifest, PolicySet

SHIPPED = "demo"
FOLDER = Path(str(files("sipo"))) / "data" / "policies" / SHIPPED


def publish_shipped(settings: CommonSettings) -> PolicySet:
    """The set in the store that has the shipped adapters, published and made current if there is none yet.

    Raises InvalidRequest if the system runs another base model.
    """
    if settings.model != BUNDLED_MODEL:
        raise InvalidRequest(f"the shipped policies belong to {BUNDLED_MODEL}: leave SIPO_MODEL unset, or give your own data")
    shipped = Manifest.model_validate_json((FOLDER / "manifest.json").read_text())
    store = settings.policies
    base = Base.open(settings.model, settings.cache_dir)
    for known in store.sets():
        same = known.manifest.adapters == shipped.adapters and known.manifest.reference == shipped.reference
        if same and known.manifest.base == base.ref:
            return known
    fields = {name: getattr(shipped, name) for name in Draft.model_fields} | {"base": base.ref}
    adapters = {name: FOLDER / name for name in shipped.objectives}
    reference = None if shipped.reference is None else FOLDER / REFERENCE
    current = store.current(shipped.name)
    return store.publish(Draft(**fields), adapters, base.folder, reference=reference, activate=current is None)


def get_set(settings: CommonSettings, reference: str) -> PolicySet:
    """The set of NAME or NAME:VERSION. The shipped policies are there before anything was ever started. Raises NotFound."""
    asked = reference.partition(":")[0] == SHIPPED
    if asked and settings.model == BUNDLED_MODEL and SHIPPED not in settings.policies.names():
        publish_shipped(settings)
    return settings.policies.get(reference)

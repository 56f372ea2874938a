"""Makes the shipped demo policies again, sipo/data/policies/demo: those that seed 0 of the experiment small-main aligned.

    sipo experiment run small-main --seed 0
    python scripts/make_demo_policies.py

The first command may be stopped after the stage align. The set has its reference, the adapter of the stage sft, beneath it. All
adapters are written in bfloat16, as the base is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gateway.cli.experiment.workplace import policy_set
from gateway.experiments.definition import find_experiment
from gateway.experiments.plan import Plan
from services.common.settings import CommonSettings
from sipo.policies import REFERENCE, AdapterRef, PolicySet, adapter_sha256

EXPERIMENT, STAGE, SEED = "small-main", "align", 0
TARGET = Path(__file__).parents[1] / "sipo" / "data" / "policies" / "demo"


def aligned() -> PolicySet:
    plan = Plan(find_experiment(EXPERIMENT), CommonSettings().data_dir / "experiments")
    [step] = [step for step in plan.steps_of([SEED]) if (step.stage.name, step.seed) == (STAGE, SEED)]
    if step.result() is None:
        raise SystemExit(f"there are no policies in {step.folder}: sipo experiment run {EXPERIMENT} --seed {SEED}")
    return policy_set(step)


def main() -> None:
    source = aligned()
    shutil.rmtree(TARGET, ignore_errors=True)
    for name, folder in source.folders.items():
        (TARGET / name).mkdir(parents=True)
        shutil.copy(folder / "adapter_config.json", TARGET / name)
        weights = load_file(folder / "adapter_model.safetensors")
        halved = {key: tensor.to(torch.bfloat16) for key, tensor in weights.items()}
        save_file(halved, TARGET / name / "adapter_model.safetensors", metadata={"format": "pt"})
    known = source.manifest

    def published(name: str, adapter: AdapterRef) -> AdapterRef:
        return AdapterRef(sha256=adapter_sha256(TARGET / name), rank=adapter.rank)

    manifest = known.model_copy(
        update={
            "name": "demo",
            "version": 1,
            "made_by": None,
            "adapters": {name: published(name, adapter) for name, adapter in known.adapters.items()},
            "reference": None if known.reference is None else published(REFERENCE, known.reference),
        }
    )
    (TARGET / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Trains the shipped demo policies again: sipo/data/policies/demo, one adapter per objective of the bundled data.

    python scripts/make_demo_policies.py [FOLDER]

A first alignment (Eq. 2) of the bundled model on the bundled training split, by the project's own trainer, objectives side by side.
FOLDER keeps the runs (settings, pairs, progress, metrics); a run that is finished there is not trained again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sipo.datasets import bundled_examples
from sipo.models import BUNDLED_MODEL, Base
from sipo.policies import AdapterRef, Manifest, adapter_sha256
from sipo.training.planning import Planner
from sipo.training.run_folder import RunFolder
from sipo.training.run_set import draft_of
from sipo.training.settings import TrainSettings

OBJECTIVES = ["concise", "warm"]
TARGET = Path(__file__).parents[1] / "sipo" / "data" / "policies" / "demo"
SETTINGS = TrainSettings(learning_rate=5e-4, batch_size=4, alpha=0, lora_rank=8, lora_alpha=16, max_pairs=144)


def main(folder: Path) -> None:
    base = Base.open(BUNDLED_MODEL, Path("~/.cache/sipo").expanduser())
    examples = bundled_examples("train")

    runs, running = {objective: RunFolder(folder / objective) for objective in OBJECTIVES}, {}
    for objective, run_folder in runs.items():
        planned = Planner(base).dpo(objective, examples, SETTINGS)
        run_folder.prepare(planned.run, planned.pairs)
        if run_folder.finished() is None:
            environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(OBJECTIVES)))}
            running[objective] = subprocess.Popen(
                [sys.executable, "-m", "sipo.training", str(run_folder.run_file)], env=environment
            )
    if failed := [objective for objective, process in running.items() if process.wait() != 0]:
        sys.exit(f"training failed for {', '.join(failed)}")

    shutil.rmtree(TARGET, ignore_errors=True)
    for objective, run_folder in runs.items():
        shutil.copytree(run_folder.adapter, TARGET / objective)
        _halve(TARGET / objective / "adapter_model.safetensors")
    manifest = Manifest(
        **draft_of("demo", runs, base=base.ref).model_dump(),
        version=1,
        created=datetime.now(UTC),
        adapters={
            objective: AdapterRef(sha256=adapter_sha256(TARGET / objective), rank=SETTINGS.lora_rank) for objective in OBJECTIVES
        },
    )
    (TARGET / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n")


def _halve(path: Path) -> None:
    """In bfloat16, as the base is: a few megabytes less in the repository."""
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/demo-policies"))

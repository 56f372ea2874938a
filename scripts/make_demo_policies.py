"""Trains the shipped demo policies again: sipo/data/policies/demo, one adapter per objective of the bundled data.

    python scripts/make_demo_policies.py [FOLDER]

A first alignment (Eq. 2) of the bundled model on the bundled training split, by the project's own trainer, objectives side by side.
FOLDER keeps the runs (settings, pairs, progress, metrics); a run that is finished there is not trained again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sipo.datasets import bundled_examples
from sipo.models import BUNDLED_MODEL, model_sha256, resolve_model
from sipo.policies import AdapterRef, BaseModelRef, Manifest, adapter_sha256
from sipo.prompts import PromptFormat
from sipo.training.data import alignment_pairs
from sipo.training.settings import ADAPTER, METRICS, PAIRS, TrainMetrics, TrainRun, TrainSettings, write_run

OBJECTIVES = ["concise", "warm"]
TARGET = Path(__file__).parents[1] / "sipo" / "data" / "policies" / "demo"
SETTINGS = TrainSettings(learning_rate=5e-4, batch_size=4, alpha=0, lora_rank=8, lora_alpha=16, max_pairs=144)


def main(folder: Path) -> None:
    cache = Path("~/.cache/sipo").expanduser()
    base = resolve_model(BUNDLED_MODEL, cache)
    prompt_format = PromptFormat.of(AutoTokenizer.from_pretrained(base))
    examples = bundled_examples("train")

    running = {}
    for objective in OBJECTIVES:
        run_folder = folder / objective
        run = TrainRun(objective=objective, base=base, base_name=BUNDLED_MODEL, prompt_format=prompt_format, settings=SETTINGS)
        path = write_run(run_folder, run)
        with (run_folder / PAIRS).open("w") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in alignment_pairs(examples, objective))
        if not (run_folder / METRICS).exists():
            environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(OBJECTIVES)))}
            running[objective] = subprocess.Popen([sys.executable, "-m", "sipo.training", str(path)], env=environment)
    if failed := [objective for objective, process in running.items() if process.wait() != 0]:
        sys.exit(f"training failed for {', '.join(failed)}")

    shutil.rmtree(TARGET, ignore_errors=True)
    for objective in OBJECTIVES:
        shutil.copytree(folder / objective / ADAPTER, TARGET / objective)
        _halve(TARGET / objective / "adapter_model.safetensors")
    manifest = Manifest(
        name="demo",
        version=1,
        created=datetime.now(UTC),
        base=BaseModelRef(name=BUNDLED_MODEL, sha256=model_sha256(base, cache)),
        prompt_format=prompt_format,
        objectives=OBJECTIVES,
        beta=SETTINGS.beta,
        data_sha256=sha256(b"".join((folder / objective / PAIRS).read_bytes() for objective in OBJECTIVES)).hexdigest(),
        settings=SETTINGS.model_dump(),
        metrics={
            objective: TrainMetrics.model_validate_json((folder / objective / METRICS).read_text()).model_dump()
            for objective in OBJECTIVES
        },
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

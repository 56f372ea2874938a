"""What is in the environment when torch, vLLM and TRL are loaded: they read it then, and never again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

FIRST_IMPORTS = """
import importlib, json, os, sys
watched, seen = ("torch", "huggingface_hub"), {}

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in watched:
            seen.setdefault(name, {key: os.environ.get(key) for key in ("OMP_WAIT_POLICY", "HF_HUB_DISABLE_TELEMETRY")})

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
import torch  # for those that load it when they begin to work
print(json.dumps(seen))
"""


def environment_at_first_import(module: str, **environment: str) -> dict[str, dict[str, str | None]]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "HF_HUB_DISABLE_TELEMETRY")}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IMPORTS, module],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seen: dict[str, dict[str, str | None]] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["services.scorer.main", "services.decoder.main", "sipo.decoding.vllm.offline", "sipo.training.__main__", "sipo.training.sft"],
)
def test_no_thread_spins_and_nothing_is_reported_in_whatever_computes(module: str) -> None:
    seen = environment_at_first_import(module)
    assert seen["torch"] == {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_TELEMETRY": "1"}
    assert all(variables["HF_HUB_DISABLE_TELEMETRY"] == "1" for variables in seen.values())


@pytest.mark.slow
def test_what_the_operator_has_set_stays() -> None:
    seen = environment_at_first_import("sipo.rewards", OMP_WAIT_POLICY="ACTIVE", HF_HUB_DISABLE_TELEMETRY="0")
    assert seen["torch"] == {"OMP_WAIT_POLICY": "ACTIVE", "HF_HUB_DISABLE_TELEMETRY": "0"}

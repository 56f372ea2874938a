"""`sipo evaluate` with a real engine on a tiny model and random policies: killed, begun again, and every kind of method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sipo.evaluation.answers import CHUNK
from sipo.evaluation.report import EvaluationReport
from sipo.lora import ADAPTABLE_MODULES
from sipo.models import model_sha256
from sipo.policies import PolicyStore
from sipo.prompts import PromptFormat
from support import PATIENCE
from tests.policies import publish_random

pytestmark = pytest.mark.slow

PROMPTS = CHUNK + 3
OBJECTIVES = ["concise", "warm"]


@pytest.fixture
def base(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """As tiny_base, with heads as wide as vLLM takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def environment(base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Mapping[str, str]:
    """Of a machine on which demo:1 is current, and models.yaml names its two adapters as models of their own."""
    policies = publish_random(
        PolicyStore(tmp_path / "data" / "policies"),
        base,
        tmp_path,
        dict.fromkeys(OBJECTIVES, ADAPTABLE_MODULES),
        base_sha256=model_sha256(base, tmp_path / "cache"),
        prompt_format=PromptFormat.of(tiny_tokenizer),
    )
    models = [
        {"weights": {"concise": float(own == "concise"), "warm": float(own == "warm")}, "adapter": str(policies.adapter_dir(own))}
        for own in ("warm", "concise")
    ]
    (tmp_path / "models.yaml").write_text(json.dumps(models))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(PROMPTS)))
    ours = {"SIPO_DATA_DIR": tmp_path / "data", "SIPO_CACHE_DIR": tmp_path / "cache", "SIPO_MODEL": base, "HF_HUB_OFFLINE": 1}
    return os.environ | {name: str(value) for name, value in ours.items()}


def test_a_killed_evaluation_goes_on_and_all_kinds_agree_where_they_are_the_same_model(
    environment: Mapping[str, str], tmp_path: Path
) -> None:
    """At the vertices mixed and merged policies are the policies themselves, as are the models here."""
    methods = ("base", "mod=mod:demo", "soup=soup:demo:1", "own=models:models.yaml")
    command = [
        *(
            sys.executable,
            "-m",
            "gateway.entry",
            "evaluate",
            "prompts.jsonl",
            "--out",
            "front",
            "--max-tokens",
            "8",
            "--weights",
            "2",
        ),
        *(part for method in methods for part in ("--method", method)),
        *("--judge", "concise=python:concise", "--judge", "warm=python:warm"),
    ]
    mod = tmp_path / "front" / "answers" / "mod.jsonl"
    with (tmp_path / "log").open("w") as log:
        killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        until = time.monotonic() + PATIENCE
        while not (mod.exists() and mod.stat().st_size) and killed.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        killed.kill()
        killed.wait()
    before = mod.read_bytes()
    assert before.count(b"\n") >= 2 * CHUNK, (tmp_path / "log").read_text()[-2000:]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert mod.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    texts = {
        name: [json.loads(line)["text"] for line in (tmp_path / "front" / "answers" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("base", "mod", "soup", "own")
    }
    assert texts["mod"] == texts["soup"] == texts["own"]
    assert len(texts["mod"]) == 2 * PROMPTS
    assert texts["base"] != texts["mod"][::2] != texts["mod"][1::2] != texts["base"]

    report = EvaluationReport.model_validate_json((tmp_path / "front" / "report.json").read_bytes())
    assert [method.kind for method in report.methods] == ["base", "mod", "soup", "models"]
    front = report.methods[1].hypervolume.value
    assert [method.hypervolume.value for method in report.methods[2:]] == [front, front]
    assert report.methods[1].points[0].tokens.value <= 8
    assert "hypervolume" in done.stdout

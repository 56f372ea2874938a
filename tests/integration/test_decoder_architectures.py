"""One mechanism serves several architectures: tiny random models of each, with adapters of different ranks on all linear layers,
through the offline engine, against the exact reference. The engine runs in a process of its own: vLLM changes the one it is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sipo.decoding.reference import ReferenceDecoder
from sipo.lora import TARGETS
from sipo.preferences import Weights

pytestmark = pytest.mark.slow

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),  # shorter than the prompts
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}
WEIGHTS: list[Weights] = [{"a": w, "b": 1 - w} for w in (1.0, 0.0, 0.5, 0.3)]
PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(length)] for i, length in enumerate((5, 40, 90))]
TOKENS = 12

OFFLINE = """
import json, sys
from pathlib import Path
from sipo.decoding.vllm import set_environment
set_environment(kv_cache_gib=1, threads=1)
from sipo.decoding.request import mixture
from sipo.decoding.vllm.engine import OfflineDecoder

base, prompts, weights, tokens = json.loads(sys.argv[1])
decoder = OfflineDecoder(Path(base), dtype="float32", max_model_len=128)
decoder.load("set", {name: Path(base, name) for name in "ab"})
pairs = [(prompt, mixture("set", ["a", "b"], w)[0]) for prompt in prompts for w in weights]
answers = decoder.generate([p for p, _ in pairs], [m for _, m in pairs], temperature=0, max_tokens=tokens, ignore_eos=True)
print("ANSWERS", json.dumps(answers))
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_offline_tokens_equal_the_reference(architecture: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model_class, config_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(1)
    config = config_class(vocab_size=len(tiny_tokenizer), **SHAPE, **own)
    model_class(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    for name, rank in (("a", 3), ("b", 5)):
        model = model_class.from_pretrained(tmp_path, dtype=torch.float32)
        # One adapter leaves out some layers that the other has.
        targets = TARGETS if name == "a" else ("q_proj", "o_proj", "up_proj")
        peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), use_rslora=name == "b"))
        for key, parameter in peft.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        peft.save_pretrained(tmp_path / name)
    reference = ReferenceDecoder(tmp_path, {name: tmp_path / name for name in "ab"})
    expected = [reference.generate(prompt, weights, max_tokens=TOKENS) for prompt in PROMPTS for weights in WEIGHTS]

    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps([str(tmp_path), PROMPTS, WEIGHTS, TOKENS])],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    answers = [line.removeprefix("ANSWERS ") for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert answers, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(answers[0]) == expected
    assert len({tuple(tokens) for tokens in expected}) > len(PROMPTS)

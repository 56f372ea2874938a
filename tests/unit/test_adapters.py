"""Adapters as people bring them: computed as PEFT computes them, or refused with what to do."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sipo.errors import IncompatiblePolicy
from sipo.lora import check_base, copy_weights, load_adapter
from tests.policies import log_prob

PROMPT, ANSWER = [1, 2, 3, 4], [10, 20, 30, 40, 50, 60]
Q = "model.layers.0.self_attn.q_proj"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."


@dataclass
class Kind:
    """What PEFT is told, what is then changed for PEFT and us alike, and how a tool would have named the tensors."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    settings: dict[str, Any] = field(default_factory=dict)
    rename: Callable[[str], str] | None = None


KINDS = [
    Kind("rank 1", {"r": 1, "lora_alpha": 1}),
    Kind("rank 16", {"r": 16, "lora_alpha": 32}),
    Kind("alpha below the rank", {"lora_alpha": 3}),
    Kind("rslora", {"use_rslora": True}),
    Kind("one module", {"target_modules": ["v_proj"]}),
    Kind("attention and MLP", {"target_modules": [*ATTENTION, *MLP]}),
    Kind("MLP only", {"target_modules": MLP}),
    Kind("all-linear", {"target_modules": "all-linear"}),
    Kind("targets by a regular expression", {"target_modules": r".*\.1\.(self_attn\.o_proj|mlp\.up_proj)"}),
    Kind("one layer only", {"layers_to_transform": [1]}),
    Kind("rank_pattern", {"rank_pattern": {"q_proj": 8}}),
    Kind("alpha_pattern", {"alpha_pattern": {"k_proj": 32}}),
    Kind("both patterns", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 32, "v_proj": 1}}),
    Kind("patterns by layer", {"rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {r"^model\.layers\.1\..*_proj": 24}}),
    Kind("the first pattern wins", {"alpha_pattern": {"layers.0.self_attn.q_proj": 1, "q_proj": 40}}),
    Kind("no pattern matches a part of a name", {"alpha_pattern": {"proj": 99, "q": 99, "model.layers": 99}}),
    Kind("patterns and rslora", {"use_rslora": True, "rank_pattern": {"(q|o)_proj": 9}, "alpha_pattern": {".*o_proj": 24}}),
    Kind("bfloat16", dtype=torch.bfloat16),
    Kind("float16", dtype=torch.float16),
    Kind("gaussian", {"init_lora_weights": "gaussian"}),
    Kind("orthogonal", {"init_lora_weights": "orthogonal"}),
    Kind("EVA", settings={"init_lora_weights": "eva", "eva_config": {}, "rank_pattern": {}}),
    Kind("dropout", {"lora_dropout": 0.5}),
    Kind("PEFT in PEFT", rename=lambda key: PREFIX + key),
    Kind("a compiled base", rename=lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod.")),
    Kind("a compiled model", {"alpha_pattern": {"^model.layers.0.*": 40}}, rename=lambda key: f"_orig_mod.{key}"),
    Kind("compiled layers", {"alpha_pattern": {"q_proj": 40}}, rename=lambda key: key.replace("self_attn", "_orig_mod.self_attn")),
    Kind("a state_dict", rename=lambda key: key.replace(".weight", ".default.weight")),
    Kind("a vision-language model", rename=lambda key: key.replace("model.layers", "model.language_model.layers")),
    Kind(
        "an older vision-language model",
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 40}, "rank_pattern": {"^model.layers.1.*": 2}},
        rename=lambda key: key.replace("model.layers", "language_model.model.layers"),
    ),
]


@pytest.fixture(scope="module")
def plain(tiny_base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def save_random(plain: torch.nn.Module, folder: Path, **config: Any) -> Path:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(**settings))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def with_deltas(plain: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The base with what we read of the adapter added to its weights."""
    model = copy.deepcopy(plain)
    with torch.no_grad():
        for module, (a, b) in load_adapter(folder).modules.items():
            model.get_submodule(module).weight += b @ a
    return model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(dict(change(load_file(path))), path)


def configure(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def good(plain: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(plain, tmp_path_factory.mktemp("good") / "adapter")
    assert load_adapter(folder).modules
    return folder


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_adapter_gives_the_log_probabilities_that_peft_gives(
    plain: torch.nn.Module, tiny_base: Path, tmp_path: Path, kind: Kind
) -> None:
    folder = save_random(plain, tmp_path / "adapter", **kind.config)
    configure(folder, **kind.settings)
    edit(folder, lambda tensors: {key: tensor.to(kind.dtype) for key, tensor in tensors.items()})
    theirs = log_prob(PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval(), PROMPT, ANSWER)

    if kind.rename:
        edit(folder, lambda tensors: {kind.rename(key): tensor for key, tensor in tensors.items()})
        assert not any(key.startswith(f"{PREFIX}{Q}.lora_A.weight") for key in load_file(folder / "adapter_model.safetensors"))
    check_base(load_adapter(folder), tiny_base)
    assert log_prob(with_deltas(plain, folder), PROMPT, ANSWER) == pytest.approx(theirs, abs=1e-3)
    assert abs(theirs - log_prob(plain, PROMPT, ANSWER)) > 0.01, "the adapter must say something"

    published = tmp_path / "published"
    published.mkdir()
    shutil.copyfile(folder / "adapter_config.json", published / "adapter_config.json")
    copy_weights(folder, published)
    again = PeftModel.from_pretrained(copy.deepcopy(plain), published).eval()
    assert log_prob(again, PROMPT, ANSWER) == pytest.approx(theirs, abs=1e-3), (
        "PEFT itself must find every tensor of a published one"
    )


def test_a_pattern_that_means_something_else_under_plain_names_is_refused_when_published(
    plain: torch.nn.Module, tmp_path: Path
) -> None:
    folder = save_random(plain, tmp_path / "adapter")
    configure(folder, alpha_pattern={"language_model.layers.0.self_attn.q_proj": 40})
    edit(folder, lambda tensors: {key.replace("model.layers", "model.language_model.layers"): t for key, t in tensors.items()})
    assert load_adapter(folder).modules
    with pytest.raises(
        IncompatiblePolicy, match=r"alpha_pattern for model\.language_model\.layers\.0.*write the base's name there"
    ):
        copy_weights(folder, tmp_path)


def without_b(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != f"{PREFIX}{Q}.lora_B.weight"}


def without_a(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != f"{PREFIX}{Q}.lora_A.weight"}


def with_value(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[f"{PREFIX}{Q}.lora_B.weight"][0, 0] = value
        return tensors

    return change


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def pointer(folder: Path) -> None:
    weights(folder).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")


def half_download(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-1000])


def as_bin(folder: Path) -> None:
    torch.save(load_file(weights(folder)), folder / "adapter_model.bin")
    weights(folder).unlink()


def into_subfolders(folder: Path) -> None:
    for step in (50, 100):
        (folder / f"checkpoint-{step}").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(folder / name, folder / f"checkpoint-{step}" / name)
    weights(folder).unlink()
    (folder / "adapter_config.json").unlink()


def as_checkpoint(folder: Path) -> None:
    weights(folder).rename(folder / "model.safetensors")
    (folder / "adapter_config.json").rename(folder / "trainer_state.json")


def without(*options: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in options}))

    return change


def sets(**changes: object) -> Callable[[Path], None]:
    return lambda folder: configure(folder, **changes)


def edits(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def adds(key: str, *shape: int) -> Callable[[Path], None]:
    return edits(lambda tensors: tensors | {f"{PREFIX}{key}": torch.ones(shape)})


def writes(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


CONVERSION = "path_initial_model_for_weight_conversion"

REFUSED: list[tuple[str, Callable[[Path], object], list[str]]] = [
    ("pointer", pointer, ["git-lfs pointer", "git lfs pull"]),
    ("half a download", half_download, ["no whole safetensors file", "again"]),
    ("a web page", writes("adapter_model.safetensors", "<!doctype html>"), ["no whole safetensors file", "again"]),
    ("empty file", writes("adapter_model.safetensors", ""), ["no whole safetensors file", "again"]),
    (
        "ZeRO-3",
        edits(lambda tensors: {key: tensor.new_zeros(0) for key, tensor in tensors.items()}),
        ["empty", "ZeRO-3", "gathered"],
    ),
    ("no tensors", edits(lambda tensors: {}), ["no tensors", "save the adapter again"]),
    ("no B", edits(without_b), [f"no lora_B of {Q}", "again"]),
    ("no A", edits(without_a), [f"no lora_A of {Q}", "again"]),
    ("twice", edits(lambda t: t | {f"{PREFIX}{key}": value.clone() for key, value in t.items()}), ["twice"]),
    ("bin", as_bin, ["adapter_model.bin only", "PeftModel.from_pretrained", "save_pretrained"]),
    ("no weights", lambda folder: weights(folder).unlink(), ["holds no adapter_model.safetensors", "download"]),
    ("subfolders", into_subfolders, ["its subfolder checkpoint-100 does", "checkpoint-50", "name that folder"]),
    ("a checkpoint", as_checkpoint, ["training checkpoint or a whole model", "save_pretrained"]),
    ("nothing", lambda folder: (folder / "adapter_config.json").unlink(), ["no PEFT adapter", "save_pretrained"]),
    ("half a config", writes("adapter_config.json", '{"peft_type": "LORA",'), ["adapter_config.json is no readable JSON", "again"]),
    ("a list for a config", writes("adapter_config.json", "[]"), ["no JSON object", "no PEFT adapter"]),
    ("NaN", edits(with_value(float("nan"))), ["not finite", f"lora_B of {Q}", "train it again"]),
    ("infinity", edits(with_value(float("inf"))), ["not finite", f"lora_B of {Q}", "train it again"]),
    ("PiSSA", sets(init_lora_weights="pissa"), ["init_lora_weights='pissa'", CONVERSION, "plain LoRA"]),
    ("fast PiSSA", sets(init_lora_weights="pissa_niter_16"), ["pissa_niter_16", CONVERSION]),
    ("OLoRA", sets(init_lora_weights="OLoRA"), ["OLoRA", CONVERSION]),
    ("CorDA", sets(init_lora_weights="corda"), ["corda", CONVERSION]),
    ("LoRA-GA", sets(init_lora_weights="lora_ga"), ["lora_ga", CONVERSION]),
    ("LoftQ", sets(init_lora_weights="loftq"), ["loftq", "train it again as a plain LoRA"]),
    ("DoRA", sets(use_dora=True), ["use_dora", "train it again"]),
    ("KaSA", sets(kasa_config={"r": 1}), ["kasa_config", "train it again"]),
    ("bias", sets(bias="all"), ["bias='all'", "bias='none'"]),
    ("lora_bias", sets(lora_bias=True), ["lora_bias", "lora_bias=False"]),
    ("a LoRA bias", adds(f"{Q}.lora_B.bias", 32), ["lora_B.bias", "lora_bias=False"]),
    ("embeddings", adds("model.embed_tokens.weight", 9, 32), ["embed_tokens", "added tokens?", "merge them into a new base"]),
    ("output head", adds("lm_head.weight", 9, 32), ["lm_head", "added tokens?", "merge them into a new base"]),
    ("a LoRA of the head", adds("lm_head.lora_A.weight", 4, 32), ["lm_head", "merge them into a new base"]),
    ("saved head", sets(modules_to_save=["lm_head"]), ["modules_to_save", "merge them into a new base"]),
    ("another saved module", sets(modules_to_save=["score"]), ["modules_to_save", "train it again"]),
    ("trained tokens", sets(trainable_token_indices=[1]), ["trainable_token_indices", "merge them into a new base"]),
    ("another layer", adds("model.layers.0.gate.lora_A.weight", 4, 32), ["model.layers.0.gate", "only q_proj"]),
    ("no prefix", edits(lambda t: {key.removeprefix(PREFIX): value for key, value in t.items()}), ["only q_proj"]),
    ("no alpha", without("lora_alpha"), ["lora_alpha=None", "a number"]),
    ("no rank", without("r"), ["r=None", "a number above 0"]),
    ("alpha in words", sets(lora_alpha="16"), ["lora_alpha='16'", "a number"]),
    ("rank 0", sets(r=0), ["r=0", "a number above 0"]),
    ("alpha NaN", sets(lora_alpha=float("nan")), ["lora_alpha=nan", "a number"]),
    ("a pattern's value", sets(alpha_pattern={"q_proj": None}), ["alpha_pattern['q_proj']=None", "a number"]),
    ("no mapping", sets(rank_pattern=["q_proj"]), ["rank_pattern", "no mapping"]),
    ("no regular expression", sets(alpha_pattern={"(q_proj": 1}), ["alpha_pattern", "no regular expression"]),
    ("another rank", sets(rank_pattern={"q_proj": 8}), ["of rank 4", "says 8", "not of one adapter"]),
    (
        "other shapes",
        edits(lambda t: t | {f"{PREFIX}{Q}.lora_B.weight": torch.ones(32, 3)}),
        ["[4, 32]", "[32, 3]", "fit together"],
    ),
    ("no LoRA", sets(peft_type="LOHA"), ["LOHA", "only LORA"]),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_served_is_refused_in_one_sentence_that_says_what_to_do(
    good: Path, tmp_path: Path, change: Callable[[Path], object], words: list[str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(IncompatiblePolicy) as refused:
        load_adapter(folder)
    message = refused.value.message
    assert not [word for word in words if word not in message], message
    assert str(folder) in message and "\n" not in message


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_the_way_out_for_pissa_gives_the_model_that_was_trained(plain: torch.nn.Module, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", "init_lora_weights": "pissa"}
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(**settings)).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it, for the adapter before training
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = log_prob(model, PROMPT, ANSWER)
    model.save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    assert log_prob(with_deltas(plain, tmp_path / "after"), PROMPT, ANSWER) == pytest.approx(trained, abs=1e-3)
    assert abs(trained - log_prob(plain, PROMPT, ANSWER)) > 0.01

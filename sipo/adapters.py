"""What PEFT, and the tools around it, leave in an adapter's folder: read, and refused in one sentence that says what to do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sipo.errors import IncompatiblePolicy

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_OTHER_KINDS = (
    "use_dora",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
"""Options of PEFT's LoRA whose models are no base plus B @ A."""

_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""How values of init_lora_weights begin that take from the base's weights what they put into A and B. EVA, MiCA, orthogonal and
Gaussian ones leave the base as it is."""

_EMBEDDINGS = ("embed_tokens", "lm_head")
_NO_EMBEDDINGS = (
    "trained embeddings or output head (added tokens?) cannot be mixed; merge them into a new base, or train it without"
)
_NO_LORA_BIAS = "biases of LoRA layers cannot be mixed; train it again with lora_bias=False"

_PATTERN = r"(.*\.)?({})$"
_WRAPPED = re.compile(r"^(?:model\.language_model|language_model\.model)\.(?=layers\.)")
_KEY = re.compile(r"(?:base_model\.model\.){1,2}(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class AdapterConfig:
    """What of adapter_config.json the delta depends on. The patterns map a regular expression to the value for its modules."""

    rank: float
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank_of(self, names: Sequence[str]) -> float:
        return _resolve(self.rank_pattern, names, self.rank)

    def scaling_of(self, names: Sequence[str], rank: int) -> float:
        """Of a module that goes by any of these names."""
        alpha = _resolve(self.alpha_pattern, names, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class LoraKey:
    """A tensor's name: the base's name of its module, the names that patterns may mean, and "A" or "B"."""

    module: str
    names: tuple[str, ...]
    half: str


def read_config(folder: Path) -> AdapterConfig:
    """Raises IncompatiblePolicy where the adapter is more than B @ A on this very base."""
    config = _read_json(folder)
    if config.get("peft_type") != "LORA":
        raise IncompatiblePolicy(f"{folder} is a {config.get('peft_type')} adapter: only LORA can be mixed")
    saved = config.get("modules_to_save") or []
    if config.get("trainable_token_indices") or any(str(name).rpartition(".")[2] in _EMBEDDINGS for name in saved):
        option = "modules_to_save" if saved else "trainable_token_indices"
        raise IncompatiblePolicy(f"{folder} sets {option}: {_NO_EMBEDDINGS}")
    for option in _OTHER_KINDS:
        if config.get(option):
            raise IncompatiblePolicy(f"{folder} sets {option}: only a plain LoRA can be mixed; train it again without")
    if config.get("bias", "none") != "none":
        raise IncompatiblePolicy(f"{folder} trains biases (bias={config['bias']!r}): train it again with bias='none'")
    if config.get("lora_bias"):
        raise IncompatiblePolicy(f"{folder} sets lora_bias: {_NO_LORA_BIAS}")
    _check_initialisation(folder, config.get("init_lora_weights"))
    return AdapterConfig(
        rank=_number(folder, "r", config.get("r"), positive=True),
        alpha=_number(folder, "lora_alpha", config.get("lora_alpha")),
        rank_pattern=_patterns(folder, "rank_pattern", config.get("rank_pattern"), positive=True),
        alpha_pattern=_patterns(folder, "alpha_pattern", config.get("alpha_pattern")),
        use_rslora=bool(config.get("use_rslora")),
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Raises IncompatiblePolicy unless the folder holds whole weights of an adapter."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise IncompatiblePolicy(_no_weights(folder))
    try:
        if _is_pointer(path):
            raise IncompatiblePolicy(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` where it was cloned")
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise IncompatiblePolicy(f"{path} is no whole safetensors file ({error}): copy or download it again") from error
    if not tensors:
        raise IncompatiblePolicy(f"{path} holds no tensors: save the adapter again, with the PEFT model's own save_pretrained")
    if empty := [key for key, tensor in tensors.items() if not tensor.numel()]:
        raise IncompatiblePolicy(
            f"{path} holds empty tensors ({len(empty)} of {len(tensors)}, such as {empty[0]}), as saved under DeepSpeed ZeRO-3 "
            "without gathering: save the adapter again with the weights gathered"
        )
    return tensors


def read_key(folder: Path, key: str) -> LoraKey | None:
    """What a tensor's name says, or None for no half of a LoRA.

    Tools wrap models before they save: PEFT in PEFT (the prefix doubled), torch.compile (`_orig_mod.`), a state_dict instead of
    save_pretrained (`.default`), a vision-language model (`language_model`). The base's own name of the module is what remains.
    """
    plain = key.replace("_orig_mod.", "")
    if any(part in _EMBEDDINGS for part in plain.split(".")):
        raise IncompatiblePolicy(f"{folder} changes {key}: {_NO_EMBEDDINGS}")
    if plain.endswith(".bias") and ".lora_" in plain:
        raise IncompatiblePolicy(f"{folder} changes {key}: {_NO_LORA_BIAS}")
    match = _KEY.fullmatch(plain)
    if not match:
        return None
    module = _WRAPPED.sub("model.", match["module"])
    # PEFT resolved the patterns on the names that the wrapped model had, which begin after the first prefix.
    wrapped = key.removeprefix("_orig_mod.").removeprefix("base_model.model.").partition(".lora_")[0]
    return LoraKey(module, tuple(dict.fromkeys((wrapped, module))), match["half"])


def read_chat_template(folder: Path) -> str | None:
    """Of the tokenizer that trainers save beside the adapter: the one that it renders conversations with, if it has any."""
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if (folder / name).is_file():
            return _text(folder / name)
    templates = _tokenizer_config(folder).get("chat_template")
    if isinstance(templates, list):
        named = {one.get("name"): one.get("template") for one in templates if isinstance(one, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else None


def read_end_token(folder: Path) -> str | None:
    """Of the tokenizer beside the adapter, if it names one."""
    token = _tokenizer_config(folder).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config = _json(path) if path.is_file() else {}
    return config if isinstance(config, dict) else {}


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise IncompatiblePolicy(_no_config(folder))
    config = _json(path)
    if not isinstance(config, dict):
        raise IncompatiblePolicy(f"{path} is no JSON object, so {folder} is no PEFT adapter: save the adapter again")
    return config


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise IncompatiblePolicy(f"{path} is no readable JSON ({error}): copy or download it again") from error


def _text(path: Path) -> str:
    try:
        if _is_pointer(path):
            raise IncompatiblePolicy(f"{path} is a git-lfs pointer: run `git lfs pull` where it was cloned")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise IncompatiblePolicy(f"{path} is no readable text ({error}): copy or download it again") from error


def _no_config(folder: Path) -> str:
    inside = _adapters_inside(folder)
    if inside:
        return f"{folder} holds no {CONFIG} itself, but {inside}: name that folder"
    if any(
        next(folder.glob(sign), None) for sign in ("trainer_state.json", "global_step*", "*.distcp", "optimizer*", "config.json")
    ):
        return (
            f"{folder} is a training checkpoint or a whole model, no PEFT adapter (no {CONFIG}): write the adapter with the PEFT "
            "model's save_pretrained, and name its folder"
        )
    return f"{folder} is no PEFT adapter (no {CONFIG}): name the folder that the PEFT model's save_pretrained wrote"


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return (
            f"{folder} holds its weights as adapter_model.bin only: convert them to safetensors, in PEFT with "
            f"PeftModel.from_pretrained(base, {str(folder)!r}).save_pretrained(NEW_FOLDER)"
        )
    inside = _adapters_inside(folder)
    if inside:
        return f"{folder} holds no {WEIGHTS} itself, but {inside}: name that folder"
    return f"{folder} holds no {WEIGHTS}: copy or download it, or write it with the PEFT model's save_pretrained"


def _adapters_inside(folder: Path) -> str:
    """Subfolders with an adapter, the last checkpoint first, for people; empty if there are none."""
    found = sorted(path.parent.relative_to(folder) for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}"))
    found.sort(key=lambda path: [int(part) if part.isdecimal() else -1 for part in re.split(r"(\d+)", str(path))], reverse=True)
    if not found:
        return ""
    others = f" (as {', '.join(map(str, found[1:4]))}{' …' if len(found) > 4 else ''} do)" if found[1:] else ""
    return f"its subfolder {found[0]} does{others}"


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _check_initialisation(folder: Path, initialisation: object) -> None:
    name = str(initialisation).lower()
    if not name.startswith(_CHANGES_BASE):
        return
    # PEFT converts the others, and has no way for LoftQ: its base is a quantised one.
    convert = "save it as a plain one with save_pretrained(…, path_initial_model_for_weight_conversion=THE ADAPTER BEFORE), or "
    if name.startswith("loftq"):
        convert = ""
    raise IncompatiblePolicy(
        f"{folder} sets init_lora_weights={initialisation!r}, so it belongs to a base whose weights that initialisation changed: "
        f"{convert}train it again as a plain LoRA (init_lora_weights=True)"
    )


def _number(folder: Path, option: str, value: object, *, positive: bool = False) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or (positive and float(str(value)) <= 0):
        wanted = "a number above 0" if positive else "a number"
        raise IncompatiblePolicy(
            f"{folder / CONFIG} has {option}={value!r} where {wanted} is needed: write the one that it was trained with"
        )
    return float(str(value))


def _patterns(folder: Path, option: str, patterns: Any, *, positive: bool = False) -> dict[str, float]:
    if not isinstance(patterns or {}, dict):
        raise IncompatiblePolicy(f"{folder / CONFIG} has a {option} that is no mapping: write the one that it was trained with")
    checked = {}
    for pattern, value in (patterns or {}).items():
        try:
            re.compile(_PATTERN.format(pattern))
        except re.error as error:
            raise IncompatiblePolicy(
                f"{folder / CONFIG} has a {option} that is no regular expression, {pattern!r}: {error}"
            ) from error
        checked[pattern] = _number(folder, f"{option}[{pattern!r}]", value, positive=positive)
    return checked


def _resolve(patterns: Mapping[str, float], names: Sequence[str], default: float) -> float:
    """As PEFT does (get_pattern_key): the first pattern that matches the name from the start of one of its parts to its end."""
    found = (value for name in names for pattern, value in patterns.items() if re.match(_PATTERN.format(pattern), name))
    return next(found, default)

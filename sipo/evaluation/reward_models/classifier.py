"""Reward models that run here: sequence classifiers of Hugging Face, and models that a preset knows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sipo.conversation import Prompt
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.judged_text import encode
from sipo.evaluation.reward_models.presets import Preset, find_preset, presets_of
from sipo.evaluation.reward_models.score_head import ScoredDecoder, load_scored_decoder
from sipo.models import model_folder


class Classifier:
    """Responses go through the model one by one: nothing is padded, so no value depends on the others or on a padding token."""

    def __init__(self, address: str, device: str) -> None:
        self._name, _, label = address.partition("#")
        minus, label = label.startswith("-"), label.removeprefix("-")
        folder = model_folder(self._name)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self._preset = _preset(self._name, config, label)
            model = _load(self._name, folder, config)
        except OSError as error:
            raise NotFound(f"the reward model {self._name} is not complete: {error}") from error
        except ValueError as error:
            raise InvalidRequest(f"{self._name} does not open as a sequence classifier: {error}") from error
        outputs = _outputs(self._name, model, self._preset)
        self._output = _output(self._name, outputs, label)
        if self._preset and self._preset.negative and minus:
            raise InvalidRequest(
                f"the reward model {self._name} counts {outputs[self._output]} negative by itself: leave out the minus"
            )
        self._sign = -1 if minus or (self._preset and self._preset.negative) else 1
        self._model = model.to(device).eval()
        self._inputs = inspect.signature(model.forward).parameters.keys()
        self._limit = min(self._tokenizer.model_max_length, _positions(model))
        self._lock = Lock()

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        with self._lock:  # a tokenizer belongs to one thread at a time
            return [self._reward(prompt, response, index) for index, response in enumerate(responses)]

    def _reward(self, prompt: Prompt, response: str, index: int) -> float:
        encoded = self._encode(prompt, response)
        length = encoded["input_ids"].shape[1]
        if length > self._limit:
            raise InvalidRequest(
                f"prompt and response {index} are too long for the reward model {self._name}: "
                f"{length} tokens, and it takes at most {self._limit}",
                param="responses",
            )
        with torch.inference_mode():
            # Some tokenizers make token types for models that know none.
            inputs = {name: ids.to(self._model.device) for name, ids in encoded.items() if name in self._inputs}
            logits = self._model(**inputs).logits[0]
        values = logits if self._preset else _values(logits, self._model.config.problem_type)
        return self._sign * float(values[self._output])

    def _encode(self, prompt: Prompt, response: str) -> Any:
        """The model's inputs, each [1, length]."""
        template = self._preset.template if self._preset else None
        return encode(self._tokenizer, prompt, response, name=self._name, template=template)


def _architecture(config: Any) -> str:
    architectures: list[str] | None = config.architectures
    return architectures[0] if architectures else ""


def _is_foreign(architecture: str) -> bool:
    """Transformers has no such class: the model has a head of its own."""
    return bool(architecture) and not hasattr(transformers, architecture)


def _preset(name: str, config: Any, label: str) -> Preset | None:
    architecture = _architecture(config)
    preset = find_preset(name, architecture, label, config.id2label.values())
    if preset or not _is_foreign(architecture):
        return preset
    known = presets_of(architecture)
    if len(known) == 1:
        return known[0]
    if not known:
        raise InvalidRequest(
            f"{name} is a {architecture}, which is no sequence classifier and has no preset: give one that has, or serve it as an "
            "endpoint, http(s)://HOST/score"
        )
    outputs = [output for preset in known for output in preset.outputs]
    raise InvalidRequest(
        f"{name} is a {architecture}, and its name does not tell what it scores: name one of {', '.join(outputs)}, "
        f"as in hf:{name}#{outputs[0]}"
    )


def _load(name: str, folder: Path, config: Any) -> Any:
    """In float32. Raises OSError and ValueError as transformers does."""
    if _is_foreign(_architecture(config)):
        return load_scored_decoder(name, folder)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    if missing := loading["missing_keys"]:
        # transformers only warns, and goes on with random weights.
        raise InvalidRequest(f"{name} is no sequence classifier: its weights lack {', '.join(sorted(missing))}")
    layers = dict(model.named_children())
    if lost := [key for key in loading["unexpected_keys"] if key.rpartition(".")[0] in layers]:
        # Such as a bias of its head, without which it scores otherwise.
        raise InvalidRequest(f"{name} is no {type(model).__name__}, as its config.json says: that has no {', '.join(sorted(lost))}")
    return model


def _outputs(name: str, model: Any, preset: Preset | None) -> Sequence[str]:
    """The names of the model's outputs, in their order."""
    if not preset:
        return [model.config.id2label[index] for index in range(model.config.num_labels)]
    count = model.head.out_features if isinstance(model, ScoredDecoder) else model.config.num_labels
    if count != len(preset.outputs):
        raise InvalidRequest(f"{name} has {count} outputs, and should have {len(preset.outputs)}: {', '.join(preset.outputs)}")
    return preset.outputs


def _output(name: str, outputs: Sequence[str], label: str) -> int:
    """Which of the model's outputs is meant."""
    if not label and len(outputs) == 1:
        return 0
    # Names come before indices: a label may be called "0" and not be the first.
    if label in outputs:
        return outputs.index(label)
    if label in (indices := [str(index) for index in range(len(outputs))]):
        return indices.index(label)
    problem = f"has no label {label!r}" if label else f"has {len(outputs)} outputs"
    raise InvalidRequest(f"the reward model {name} {problem}: name one of {', '.join(outputs)}, as in hf:{name}#LABEL")


def _values(logits: Tensor, problem_type: str | None) -> Tensor:
    """Of one response's logits, [labels]: themselves if there is but one or the model is a regression, otherwise log p."""
    if len(logits) == 1 or problem_type == "regression":
        return logits
    return F.logsigmoid(logits) if problem_type == "multi_label_classification" else F.log_softmax(logits, dim=-1)


def _positions(model: Any) -> float:
    """Most tokens for which the model has positions; infinite if they are relative."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1  # RoBERTa and its kin count from there
    return limit if limit > 0 else float("inf")

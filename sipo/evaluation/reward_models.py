"""External reward models by address: a Hugging Face classifier, an HTTP endpoint, or an installed Python function.

All of them map (prompt, response) to one number; higher is better. A classifier with a chat template reads a conversation as it is,
all others as one text. They know nothing of policies, queues or prompt formats. What a model says is passed on as it is, NaN
included: it is for the filter to refuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import entry_points
from numbers import Real
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from sipo.conversation import Prompt, as_messages, as_text
from sipo.errors import InvalidRequest, NotFound, SipoError
from sipo.http_errors import asking, endpoint_error, quoted
from sipo.models import model_folder

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINTS = "sipo.reward_models"
"""The group in which a package registers its functions (prompt: str, response: str) -> float."""

SCORE_TIMEOUT = httpx.Timeout(600, connect=5)  # seconds; a large model on a loaded server takes minutes


class RewardFunction(Protocol):
    """The rewards of the responses to one prompt, in their order. Safe to call from several threads."""

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]: ...


def open_reward_model(address: str, *, device: str = "cpu") -> RewardFunction:
    """The reward model at one of these addresses:

    - hf:FOLDER_OR_HUB_NAME, with #LABEL (a name or an index) if it has several outputs: a sequence classifier, run on `device`;
    - http://… or https://…: the whole URL of an endpoint like vLLM's /score. Its scores count as they are; vLLM passes them through
      a sigmoid, in which large ones become equal, unless it is started with --pooler-config '{"use_activation": false}';
    - python:NAME: an entry point of the group sipo.reward_models.

    Raises InvalidRequest for any other address and for a model that gives no reward, NotFound for what is not there. An endpoint is
    not asked before its first use.
    """
    kind, _, name = address.partition(":")
    if kind == "hf" and name:
        return _Classifier(name, device)
    if kind in ("http", "https"):
        return _Endpoint(address)
    if kind == "python" and name:
        return _InstalledFunction(name)
    raise _no_address(address)


class _Classifier:
    """Responses go through the model one by one: nothing is padded, so no value depends on the others or on a padding token."""

    def __init__(self, address: str, device: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._name, _, label = address.partition("#")
        folder = model_folder(self._name)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        except OSError as error:
            raise NotFound(f"the reward model {self._name} is not complete: {error}") from error
        except ValueError as error:
            raise InvalidRequest(f"{self._name} does not open as a sequence classifier: {error}") from error
        if missing := loading["missing_keys"]:
            # transformers only warns, and goes on with random weights.
            raise InvalidRequest(f"{self._name} is no sequence classifier: its weights lack {', '.join(sorted(missing))}")
        self._output = _output(self._name, model.config, label)
        self._model = model.to(device).eval()
        self._inputs = inspect.signature(model.forward).parameters.keys()
        self._limit = min(self._tokenizer.model_max_length, _positions(model))
        self._lock = Lock()

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        with self._lock:  # a tokenizer belongs to one thread at a time
            return [self._reward(prompt, response, index) for index, response in enumerate(responses)]

    def _reward(self, prompt: Prompt, response: str, index: int) -> float:
        import torch

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
            return _value(self._model(**inputs).logits[0], self._output, self._model.config.problem_type)

    def _encode(self, prompt: Prompt, response: str) -> Any:
        """The model's inputs, each [1, length]."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            # In lists, because an empty text on its own would count as no second text.
            return self._tokenizer([as_text(prompt)], [response], return_tensors="pt")
        conversation = [*as_messages(prompt), {"role": "assistant", "content": response}]
        try:
            return self._tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
        except TemplateError as error:
            raise InvalidRequest(f"the chat template of the reward model {self._name} refuses the conversation: {error}") from error


def _output(name: str, config: Any, label: str) -> int:
    """Which of the model's outputs is meant."""
    if not label and config.num_labels == 1:
        return 0
    # Names come before indices: a label may be called "0" and not be the first.
    outputs: dict[str, int] = {str(index): index for index in config.id2label} | {
        known: index for index, known in config.id2label.items()
    }
    if label in outputs:
        return outputs[label]
    problem = f"has no label {label!r}" if label else f"has {config.num_labels} outputs"
    raise InvalidRequest(
        f"the reward model {name} {problem}: name one of {', '.join(config.id2label.values())}, as in hf:{name}#LABEL"
    )


def _value(logits: Tensor, output: int, problem_type: str | None) -> float:
    """Of one response's logits, [labels]: the logit itself if there is but one or the model is a regression, otherwise log p."""
    import torch.nn.functional as F  # noqa: N812

    if len(logits) > 1 and problem_type != "regression":
        logits = F.logsigmoid(logits) if problem_type == "multi_label_classification" else F.log_softmax(logits, dim=-1)
    return float(logits[output])


def _positions(model: Any) -> float:
    """Most tokens for which the model has positions; infinite if they are relative."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1  # RoBERTa and its kin count from there
    return limit if limit > 0 else float("inf")


class _Score(BaseModel):
    model_config = ConfigDict(strict=True)

    index: int
    score: float


class _Scores(BaseModel):
    """What vLLM's /score answers."""

    data: list[_Score]


class _Endpoint:
    def __init__(self, address: str) -> None:
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise _no_address(address) from error
        if not url.host:
            raise _no_address(address)
        self._url = url
        self._name = f"the reward model at {url.copy_with(userinfo=b'', query=None)}"  # secrets stay out of messages
        self._http = httpx.Client(timeout=SCORE_TIMEOUT)

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        if not responses:
            return []
        with asking(self._name):
            reply = self._http.post(self._url, json={"text_1": as_text(prompt), "text_2": list(responses)})
        if not reply.is_success:
            raise endpoint_error(reply, self._name, refusal=InvalidRequest)
        try:
            scores = sorted(_Scores.model_validate_json(reply.content).data, key=lambda score: score.index)
        except ValidationError as error:
            raise SipoError(
                f'{self._name} sent {quoted(reply)!r}, not {{"data": [{{"index": 0, "score": 0.5}}, …]}} like vLLM\'s /score'
            ) from error
        indices = [score.index for score in scores]
        if indices != list(range(len(responses))):
            raise SipoError(f"{self._name} sent {len(scores)} scores, with the indices {indices}, for {len(responses)} responses")
        return [score.score for score in scores]


class _InstalledFunction:
    def __init__(self, name: str) -> None:
        installed = entry_points(group=ENTRY_POINTS)
        if name not in installed.names:
            raise NotFound(
                f"no reward model {name!r} is installed: the entry points of {ENTRY_POINTS} are "
                f"{', '.join(sorted(installed.names)) or 'none'}"
            )
        try:
            self._function = installed[name].load()
        except Exception as error:
            raise SipoError(f"the reward model python:{name} cannot be imported: {type(error).__name__}: {error}") from error
        self._name = name
        self._lock = Lock()

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        with self._lock:  # nobody asked its author about threads
            return [self._reward(as_text(prompt), response) for response in responses]

    def _reward(self, prompt: str, response: str) -> float:
        try:
            value = self._function(prompt, response)
        except Exception as error:
            raise SipoError(f"the reward model python:{self._name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(value, Real):
            raise SipoError(f"the reward model python:{self._name} returned {value!r}, which is no number")
        return float(value)


def _no_address(address: str) -> InvalidRequest:
    return InvalidRequest(
        f"{address!r} is no address of a reward model: give hf:FOLDER_OR_HUB_NAME (and #LABEL if it has several outputs), "
        "http(s)://HOST/score, or python:NAME"
    )

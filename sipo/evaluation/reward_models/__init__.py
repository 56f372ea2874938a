"""External reward models by address: a Hugging Face model, an HTTP endpoint, or an installed Python function.

All of them map (prompt, response) to one number; higher is better. A model with a chat template, its own or a preset's, reads a
conversation as it is, all others as one text. They know nothing of policies, queues or prompt formats. What a model says is passed
on as it is, NaN included: it is for the filter to refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import httpx

from sipo.conversation import Prompt
from sipo.errors import InvalidRequest
from sipo.evaluation.reward_models.endpoint import Endpoint
from sipo.evaluation.reward_models.installed import ENTRY_POINTS, InstalledFunction

__all__ = ["ENTRY_POINTS", "RewardFunction", "open_reward_model"]


class RewardFunction(Protocol):
    """The rewards of the responses to one prompt, in their order. Safe to call from several threads."""

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]: ...


def open_reward_model(address: str, *, device: str = "cpu") -> RewardFunction:
    """The reward model at one of these addresses:

    - hf:FOLDER_OR_HUB_NAME, with #LABEL (a name or an index) if it has several outputs, and with #-LABEL or #- if less of it is
      better: a sequence classifier, or a model that a preset knows (sipo.evaluation.reward_models.presets), run on `device`;
    - http://… or https://…: the whole URL of an endpoint like vLLM's /score. Its scores count as they are; vLLM passes them through
      a sigmoid, in which large ones become equal, unless it is started with --pooler-config '{"use_activation": false}';
    - python:NAME: an entry point of the group sipo.reward_models.

    Raises InvalidRequest for any other address and for a model that gives no reward, NotFound for what is not there. An endpoint is
    not asked before its first use.
    """
    kind, _, name = address.partition(":")
    if kind == "hf" and name:
        # torch and transformers take seconds to import, and only these models need them.
        from sipo.evaluation.reward_models.classifier import Classifier

        return Classifier(name, device)
    if kind in ("http", "https") and (url := _url(address)):
        return Endpoint(url)
    if kind == "python" and name:
        return InstalledFunction(name)
    raise InvalidRequest(
        f"{address!r} is no address of a reward model: give hf:FOLDER_OR_HUB_NAME (and #LABEL if it has several outputs), "
        "http(s)://HOST/score, or python:NAME"
    )


def _url(address: str) -> httpx.URL | None:
    """None if it names no host."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return None
    return url if url.host else None

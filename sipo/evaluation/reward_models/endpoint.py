"""Reward models behind an HTTP endpoint like vLLM's /score."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from sipo.conversation import Prompt, as_text
from sipo.errors import InvalidRequest, SipoError
from sipo.http_errors import asking, endpoint_error, quoted

SCORE_TIMEOUT = httpx.Timeout(600, connect=5)  # seconds; a large model on a loaded server takes minutes


class _Score(BaseModel):
    model_config = ConfigDict(strict=True)

    index: int
    score: float


class _Scores(BaseModel):
    """What vLLM's /score answers."""

    data: list[_Score]


class Endpoint:
    """All responses to a prompt in one request."""

    def __init__(self, url: httpx.URL) -> None:
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

"""The client of teachers: models elsewhere, behind OpenAI's API, which the operator names in the settings."""

from __future__ import annotations

import httpx
from pydantic import BaseModel, Field, ValidationError

from services.common.settings import Teacher
from services.common.web.clients import SERVICE_TIMEOUT, ChatMessages
from sipo.errors import SipoError
from sipo.http_errors import asking, endpoint_error, openai_error, quoted

TEACHER_AWAY = frozenset([408, 429, *range(500, 600)])
"""Statuses of an endpoint that is full or broken: of another's server, what the number after the 5 means is anybody's guess."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str


class _ChatCompletion(BaseModel):
    """As much of OpenAI's as is needed here."""

    choices: list[_Choice] = Field(min_length=1)


class TeacherClient:
    """An OpenAI-compatible endpoint of another. `name` is the operator's for it, and how errors call it."""

    def __init__(self, name: str, teacher: Teacher) -> None:
        self.name = f"the teacher {name!r}"
        self._model = teacher.model
        self._key = teacher.api_key.get_secret_value() if teacher.api_key else None
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else None
        # Not through replica_client: the way to another's endpoint may be a proxy, which httpx finds in the environment.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._http = httpx.AsyncClient(base_url=str(teacher.url), headers=headers, timeout=SERVICE_TIMEOUT, limits=limits)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def answer(self, messages: ChatMessages, *, max_tokens: int, temperature: float, seed: int) -> tuple[str, str]:
        """Text and finish reason. What cannot be used as an answer (filtered, a tool call) has its finish reason and no text.

        Raises Unavailable if the endpoint is away, full or broken, SipoError for anything else that is no chat completion: it is
        set up wrongly, or takes no such request.
        """
        body = {
            "model": self._model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        with asking(self.name):
            reply = await self._http.post("/chat/completions", json=body)
        if _filtered(reply):
            return "", "content_filter"
        if not reply.is_success:
            raise endpoint_error(reply, self.name, away=TEACHER_AWAY, secret=self._key)
        try:
            choice = _ChatCompletion.model_validate_json(reply.content).choices[0]
        except ValidationError as error:
            raise SipoError(f"{self.name} sent no chat completion: {quoted(reply, self._key)}") from error
        whole = choice.finish_reason in ("stop", "length")
        return (choice.message.content or "") if whole else "", choice.finish_reason


def _filtered(reply: httpx.Response) -> bool:
    """A prompt that the endpoint will not answer, as Azure says it: no answer, and nobody's mistake."""
    error = openai_error(reply)
    return reply.status_code == httpx.codes.BAD_REQUEST and error is not None and error.get("code") == "content_filter"

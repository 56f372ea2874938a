"""The commands' way to a running gateway: its HTTP API, whose errors become ours again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from services.common.contract.job_store import Job
from sipo.errors import Conflict, InvalidRequest, NotFound, SipoError, Unavailable

GatewayUrl = Annotated[str, typer.Option("--url", envvar="SIPO_GATEWAY_URL", help="Where the gateway listens.")]
DEFAULT_URL = "http://127.0.0.1:8000"

_ERRORS: dict[int, type[SipoError]] = {404: NotFound, 409: Conflict, 503: Unavailable}


class Gateway:
    """A blocking client: the command line does one thing at a time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(600, connect=5))

    def get(self, path: str) -> Any:
        return self._request("GET", path).json()

    def text(self, path: str) -> str:
        return self._request("GET", path).text

    def post(self, path: str, **content: Any) -> Any:
        return self._request("POST", path, **content).json()

    def job(self, job: str) -> Job:
        return Job.model_validate(self.get(f"/v1/jobs/{job}"))

    def stream_chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer as they come."""
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
                if reply.is_error:
                    reply.read()
                _raise_error(reply)
                for line in reply.iter_lines():
                    data = line.removeprefix("data: ")
                    if not data or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if error := chunk.get("error"):
                        raise SipoError(error["message"])
                    yield chunk
        except httpx.TransportError as error:
            raise self._unreachable() from error

    def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            reply = self._http.request(method, path, **content)
        except httpx.TransportError as error:
            raise self._unreachable() from error
        _raise_error(reply)
        return reply

    def _unreachable(self) -> Unavailable:
        return Unavailable(f"no gateway answers at {self.url}: start one with `sipo up`, or give --url")


def _raise_error(reply: httpx.Response) -> None:
    if not reply.is_error:
        return
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{reply.url} answered HTTP {reply.status_code}"
    fallback = InvalidRequest if reply.is_client_error else SipoError
    raise _ERRORS.get(reply.status_code, fallback)(message)

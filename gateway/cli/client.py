"""The commands' way to a running gateway: its HTTP API, whose errors become ours again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from services.common.contract.job_store import Job
from sipo.errors import SipoError, Unavailable
from sipo.http_errors import service_error

GatewayUrl = Annotated[str, typer.Option("--url", envvar="SIPO_GATEWAY_URL", help="Where the gateway listens.")]
DEFAULT_URL = "http://127.0.0.1:8000"


class Gateway:
    """A blocking client: the command line does one thing at a time."""

    def __init__(self, url: str) -> None:
        self.url = url
        # A connection ends with its request: commands ask a few times, and nobody closes the client at their end.
        self._http = httpx.Client(
            base_url=url, timeout=httpx.Timeout(600, connect=5), limits=httpx.Limits(max_keepalive_connections=0)
        )

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
                    raise self._error(reply)
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
        if reply.is_error:
            raise self._error(reply)
        return reply

    def _error(self, reply: httpx.Response) -> SipoError:
        return service_error(reply, f"the gateway at {self.url}")

    def _unreachable(self) -> Unavailable:
        return Unavailable(f"no gateway answers at {self.url}: start one with `sipo up`, or give --url")

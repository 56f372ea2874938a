"""The commands' way to a running gateway: its HTTP API, whose errors become ours again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from services.common.contract.job_store import Job
from sipo.errors import SipoError, Unavailable
from sipo.http_errors import service_error

GatewayUrl = Annotated[str, typer.Option("--url", envvar="SIPO_GATEWAY_URL", help="Where the gateway listens.")]
DEFAULT_URL = "http://127.0.0.1:8000"


def job_path(job: str, what: str = "") -> str:
    """Of a job, or of `what` it left. A caller's id stays one part of the path, whatever is in it."""
    return "/".join(("/v1/jobs", quote(job, safe=""), *([what] if what else [])))


class Gateway:
    """A blocking client: the command line does one thing at a time."""

    def __init__(self, url: str) -> None:
        self.url = url
        # A connection ends with its request: commands ask a few times, and nobody closes the client at their end.
        self._http = httpx.Client(
            base_url=url, timeout=httpx.Timeout(600, connect=5), limits=httpx.Limits(max_keepalive_connections=0)
        )

    def get(self, path: str) -> Any:
        return self._answer(self._request("GET", path))

    def post(self, path: str, **content: Any) -> Any:
        return self._answer(self._request("POST", path, **content))

    def delete(self, path: str) -> None:
        self._request("DELETE", path)

    def job(self, job: str) -> Job:
        return Job.model_validate(self.get(job_path(job)))

    def stream(self, path: str) -> Iterator[bytes]:
        """A file of the gateway's, as it comes."""
        try:
            with self._http.stream("GET", path) as reply:
                if reply.is_error:
                    reply.read()
                    raise self._error(reply)
                yield from reply.iter_bytes()
        except httpx.TransportError as error:
            raise self._unreachable() from error

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

    def _answer(self, reply: httpx.Response) -> Any:
        try:
            return reply.json()
        except ValueError:
            raise SipoError(f"what answers at {self.url} is no SIPO gateway: give --url") from None

    def _error(self, reply: httpx.Response) -> SipoError:
        return service_error(reply, f"the gateway at {self.url}")

    def _unreachable(self) -> Unavailable:
        return Unavailable(f"no gateway answers at {self.url}: start one with `sipo up`, or give --url")

"""The shared web application, as an OpenAI client meets it."""

from __future__ import annotations

import httpx
import openai
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from services.common.settings import CommonSettings
from services.common.web.app import create_app
from sipo.errors import Conflict, InvalidWeights, NotFound, SipoError, Unavailable

ERRORS: dict[str, Exception] = {
    "weights": InvalidWeights("the weights sum to 2", param="preference_weights"),
    "missing": NotFound("no policy 'x'"),
    "state": Conflict("it has ended"),
    "asleep": Unavailable("asleep", retry_after=7),
    "web": HTTPException(418, "a teapot"),
    "bug": ZeroDivisionError("secret detail"),
    "own": SipoError("the decoder failed"),
}


class Message(BaseModel):
    role: str


class Body(BaseModel):
    model: str
    messages: list[Message] = Field(min_length=1)


async def nothing_loaded() -> str | None:
    return "the model is being loaded"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = create_app("test", CommonSettings(), ready=nothing_loaded)

    @app.post("/v1/chat/completions")
    async def complete(body: Body) -> None:
        raise ERRORS[body.model]

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b"]))

    return app


@pytest.fixture(scope="module")
def web(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def openai_error(app: FastAPI, model: str, messages: object = None) -> openai.APIStatusError:
    import httpx2

    http = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False))
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", max_retries=0, http_client=http)
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(model=model, messages=messages or [{"role": "user", "content": "x"}])  # type: ignore[call-overload]
    return caught.value


@pytest.mark.parametrize(
    ("model", "status", "kind", "code", "param", "message"),
    [
        ("weights", 400, "invalid_request_error", "invalid_preference_weights", "preference_weights", "the weights sum to 2"),
        ("missing", 404, "not_found_error", "not_found", None, "no policy 'x'"),
        ("state", 409, "conflict_error", "conflict", None, "it has ended"),
        ("asleep", 503, "server_error", "unavailable", None, "asleep"),
        ("web", 418, "invalid_request_error", "im_a_teapot", None, "a teapot"),
        ("own", 500, "server_error", "internal_error", None, "the decoder failed"),
    ],
)
async def test_an_openai_client_sees_every_part_of_an_error(
    app: FastAPI, model: str, status: int, kind: str, code: str, param: str | None, message: str
) -> None:
    error = await openai_error(app, model)
    assert (error.status_code, error.type, error.code, error.param) == (status, kind, code, param)
    assert message in error.message
    assert error.request_id


async def test_an_unforeseen_error_tells_its_request_id_and_no_detail(app: FastAPI) -> None:
    error = await openai_error(app, "bug")
    assert (error.status_code, error.code) == (500, "internal_error")
    assert error.request_id
    assert error.request_id in error.message
    assert "secret" not in error.message


async def test_a_body_that_does_not_fit_is_a_400_naming_the_field(app: FastAPI, web: httpx.AsyncClient) -> None:
    error = await openai_error(app, "weights", [{"content": "x"}])
    assert (error.status_code, error.param, error.code) == (400, "messages.0.role", "invalid_request")
    assert "messages.0.role: Field required" in error.message
    for sent, says in (("{not json", "JSON"), ("", "Field required"), ("[]", "dictionary")):
        reply = await web.post("/v1/chat/completions", content=sent, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert says in reply.json()["error"]["message"]


async def test_unavailable_says_when_to_come_back(web: httpx.AsyncClient) -> None:
    reply = await web.post("/v1/chat/completions", json={"model": "asleep", "messages": [{"role": "user"}]})
    assert reply.headers["retry-after"] == "7"


async def test_an_unknown_path_has_the_same_shape(web: httpx.AsyncClient) -> None:
    reply = await web.get("/nowhere")
    assert reply.status_code == 404
    assert reply.json() == {"error": {"message": "Not Found", "type": "not_found_error", "param": None, "code": "not_found"}}


async def test_the_callers_request_id_is_echoed_if_it_is_a_plain_one(web: httpx.AsyncClient) -> None:
    assert (await web.get("/health", headers={"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"
    assert (await web.get("/health", headers={"x-request-id": "two words"})).headers["x-request-id"] != "two words"
    assert (await web.get("/nowhere")).headers["x-request-id"]


async def test_alive_is_not_ready(web: httpx.AsyncClient) -> None:
    assert (await web.get("/health")).json() == {"status": "alive", "service": "test"}
    reply = await web.get("/ready")
    assert reply.status_code == 503
    assert reply.json()["error"]["message"] == "the test is not ready: the model is being loaded"


async def test_requests_are_measured_by_route(web: httpx.AsyncClient) -> None:
    assert (await web.get("/stream")).text == "ab"
    metrics = (await web.get("/metrics")).text
    assert 'sipo_http_request_seconds_count{method="GET",route="/stream",status="200"} 1.0' in metrics
    assert 'route="/metrics"' not in metrics

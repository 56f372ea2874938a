"""How errors of servers elsewhere become ours; tests of each client have the rest."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sipo.errors import Conflict, InvalidRequest, NotFound, SipoError, Unavailable
from sipo.http_errors import LONGEST_WAIT, asking, endpoint_error, openai_error, quoted, retry_after, service_error

SHAPE = {"error": {"message": "said so", "param": "weights"}}


def reply(status: int, body: Any = SHAPE, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, InvalidRequest, "said so"),
        (422, InvalidRequest, "said so"),
        (404, NotFound, "said so"),
        (409, Conflict, "said so"),
        (429, Unavailable, "said so"),
        (502, Unavailable, "said so"),
        (503, Unavailable, "said so"),
        (504, Unavailable, "said so"),
        (500, SipoError, "the decoder failed: said so"),
        (507, SipoError, "the decoder failed: said so"),
    ],
)
def test_our_own_service_speaks_for_itself(status: int, kind: type[SipoError], message: str) -> None:
    error = service_error(reply(status), "the decoder")
    assert (type(error), error.message) == (kind, message)
    assert error.param == ("weights" if isinstance(error, InvalidRequest | NotFound | Conflict) else None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, SipoError), (404, SipoError), (409, SipoError), (500, SipoError), (429, Unavailable), (503, Unavailable)],
)
def test_what_is_not_in_its_shape_is_no_fault_of_the_caller(status: int, kind: type[SipoError]) -> None:
    error = service_error(reply(status, {"detail": "Not Found"}), "the decoder")
    assert type(error) is kind
    assert error.message.startswith(f"the decoder answered HTTP {status} ")


@pytest.mark.parametrize(
    ("status", "options", "kind"),
    [
        (400, {}, SipoError),
        (400, {"refusal": InvalidRequest}, InvalidRequest),
        (404, {"refusal": InvalidRequest}, InvalidRequest),
        (429, {"refusal": InvalidRequest}, Unavailable),
        (503, {}, Unavailable),
        (500, {"refusal": InvalidRequest}, SipoError),
        (500, {"away": {500}}, Unavailable),
        (503, {"away": {500}}, SipoError),
        (307, {"refusal": InvalidRequest}, SipoError),
    ],
)
def test_somebody_elses_endpoint_is_quoted(status: int, options: dict[str, Any], kind: type[SipoError]) -> None:
    error = endpoint_error(reply(status), "the teacher 'big'", **options)
    assert (type(error), error.message) == (kind, f"the teacher 'big' answered HTTP {status}: said so")


def test_a_quotation_is_one_short_line_without_the_secret() -> None:
    assert quoted(httpx.Response(401, text="<p>\n\n  key sk-1\t</p>"), "sk-1") == "<p> key ********** </p>"
    assert quoted(httpx.Response(401, json={"error": {"message": "key sk-1"}}), "sk-1") == "key **********"
    assert quoted(httpx.Response(401, json={"error": {"message": "key sk-1"}})) == "key sk-1"
    assert len(quoted(httpx.Response(401, text="x" * 1000))) == 300
    assert endpoint_error(httpx.Response(404), "it").message == "it answered HTTP 404: Not Found"


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"null", b"3", b'["error"]', b'{"error": null}', b'{"error": "x"}', b'{"error": {"message": 3}}']
)
def test_what_is_no_error_of_openais_shape_is_none(content: bytes) -> None:
    assert openai_error(httpx.Response(500, content=content)) is None


def errors_of(kind: type[httpx.RequestError]) -> list[type[httpx.RequestError]]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in errors_of(below))]


@pytest.mark.parametrize("kind", errors_of(httpx.RequestError))
def test_every_error_of_a_request_becomes_ours_and_keeps_its_cause(kind: type[httpx.RequestError]) -> None:
    cause = kind("broken")
    with (
        pytest.raises(SipoError, match=r"^the decoder (does not answer|sent what cannot be read)") as caught,
        asking("the decoder"),
    ):
        raise cause
    assert isinstance(caught.value, Unavailable) == issubclass(kind, httpx.TransportError)
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("1.5", 1.5),
        ("0", 0),
        ("86400", LONGEST_WAIT),
        ("1e300", LONGEST_WAIT),
        ("inf", LONGEST_WAIT),
        ("-1", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", None),
        ("Fri, 31 Dec 2999 23:59:59 GMT", LONGEST_WAIT),
        ("Fri, 31 Dec 2999 23:59:59 -0000", LONGEST_WAIT),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", None),
    ],
)
def test_only_a_sensible_time_to_come_back_is_believed(header: str, seconds: float | None) -> None:
    assert retry_after(reply(503, retry_after=header)) == seconds


def test_a_date_to_come_back_is_so_many_seconds_away() -> None:
    in_half_an_hour = format_datetime(datetime.now(UTC) + timedelta(minutes=30), usegmt=True)
    error = service_error(reply(503, retry_after=in_half_an_hour), "the decoder")
    assert isinstance(error, Unavailable)
    assert 0 < error.retry_after <= 1800


def test_without_a_time_to_come_back_it_is_ours() -> None:
    for answer in (reply(503), reply(503, retry_after="soon")):
        error = service_error(answer, "the decoder")
        assert isinstance(error, Unavailable)
        assert error.retry_after == Unavailable("").retry_after


@given(
    st.text(st.characters(max_codepoint=255))
    | st.from_regex(r"(Mon, )?[0-9]{1,25} Feb [0-9]{1,30} [0-9:]{1,30} ([+-][0-9]{1,30}|GMT)", fullmatch=True)
)
def test_no_header_however_odd_is_an_error(header: str) -> None:
    seconds = retry_after(httpx.Response(503, headers=[(b"retry-after", header.encode("latin-1"))]))
    assert seconds is None or 0 <= seconds <= LONGEST_WAIT

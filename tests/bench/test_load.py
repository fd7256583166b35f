"""The load client's parser and the report: a bug there would be a wrong number."""

from __future__ import annotations

import pytest

from tests.bench.load import Response, http_request, summary
from tests.bench.report import Row, brief, table

PLAIN = b"HTTP/1.1 201 \r\ndate: x\r\nContent-Length: 11\r\n\r\nhello world"
EMPTY = b"HTTP/1.1 204 \r\nconnection: close\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1;x=y\r\n \r\n5\r\nworld\r\n0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("raw", "status"), [(PLAIN, 201), (CHUNKED, 200)])
def test_response_is_whole_at_its_last_byte_however_it_is_cut(raw: bytes, status: int, size: int) -> None:
    response = Response()
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    assert [response.feed(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (response.status, response.body, response.close) == (status, b"hello world", False)


def test_response_without_body_that_closes() -> None:
    response = Response()
    assert response.feed(EMPTY)
    assert (response.status, response.body, response.close) == (204, b"", True)


def test_request_has_the_length_of_its_body() -> None:
    request = http_request("POST", "/tasks", b"{}", {"Authorization": "Bearer k"})
    head, body = request.split("\r\n\r\n")
    assert head.startswith("POST /tasks HTTP/1.1\r\n")
    assert "Content-Length: 2" in head
    assert "Authorization: Bearer k" in head
    assert body == "{}"


def test_summary_is_in_milliseconds() -> None:
    assert summary([]) == {}
    figures = summary([number / 1000 for number in range(1, 101)])
    assert figures == {"p50": 51.0, "p90": 91.0, "p99": 100.0, "mean": 50.5, "max": 100.0}


@pytest.mark.parametrize(
    ("ours", "reference", "goal", "met"),
    [
        (6.0, 10.0, "ratio>=0.5", True),
        (4.0, 10.0, "ratio>=0.5", False),
        (None, 10.0, "ratio>=0.5", None),
        (6.0, None, "ratio>=0.5", None),
        (79.0, None, "ours<=80", True),
        (81.0, 1.0, "ours<=80", False),
        (81.0, 1.0, "", None),
    ],
)
def test_goal(ours: float | None, reference: float | None, goal: str, met: bool | None) -> None:
    assert Row("x", ours, reference, goal=goal).met is met


def test_table_shows_what_is_missing_and_why_once() -> None:
    rows = [
        Row("a", None, 2.0, goal="ratio>=1", note="first\nmiddle\nlast"),
        Row("b", 3.0, note="first\nx\nlast"),
    ]
    shown = table(rows)
    assert "not measured [1]" in shown
    assert shown.count(brief(rows[0].note)) == 1
    assert "MISSED" not in shown

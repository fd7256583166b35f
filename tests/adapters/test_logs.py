"""Log lines: formats, levels at run time, request ids, nothing that should not be there; engines' output."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from peer import logs
from peer.adapters.processes.child_log import Lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def written(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    logs.setup("info", "auto", out)
    structlog.contextvars.bind_contextvars(request_id="r-1")
    structlog.get_logger("x").info("hello", number=1)
    logging.getLogger("other").warning("from %s", "elsewhere")
    first, second = written(out)
    assert (first["event"], first["number"], first["request_id"]) == ("hello", 1, "r-1")
    assert (first["level"], first["logger"]) == ("info", "x")
    assert first["timestamp"].endswith("Z")
    assert second["event"] == "from elsewhere"


def test_columns_on_a_terminal() -> None:
    out = Terminal()
    logs.setup("info", "auto", out)
    structlog.get_logger("x").warning("hello", number=1)
    assert "hello" in out.getvalue()
    assert not out.getvalue().startswith("{")


def test_the_level_changes_while_it_runs() -> None:
    out = io.StringIO()
    logs.setup("warning", "json", out)
    log = structlog.get_logger("x")
    log.info("one")
    logs.set_level("debug")
    log.debug("two")
    logs.set_level("error")
    log.warning("three")
    log.error("four")
    assert [line["event"] for line in written(out)] == ["two", "four"]


def test_secrets_and_prompts_are_not_logged_and_values_are_bounded() -> None:
    out = io.StringIO()
    logs.setup("info", "json", out)
    structlog.get_logger("x").info(
        "e", prompt="p", authorization="Bearer s", parameters={"prompt": "p"}, long="l" * 9999
    )
    (line,) = written(out)
    assert line["prompt"] == line["authorization"] == line["parameters"] == "[not logged]"
    assert len(line["long"]) < 4100


def test_an_exception_has_its_traceback_in_one_line() -> None:
    out = io.StringIO()
    logs.setup("info", "json", out)
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        structlog.get_logger("x").exception("failed")
    (line,) = written(out)
    assert "RuntimeError: boom" in line["exception"]


def test_lines_of_a_pipe_are_cut_and_joined() -> None:
    lines = Lines(bytes_max=10)
    assert lines.feed(b"one\ntw") == ["one"]
    assert lines.feed(b"o\n\nthree") == ["two"]
    assert lines.feed(b" is far too long") == ["three is f [cut]"]
    assert lines.feed(b" and goes on\nfour") == []
    assert lines.feed(b"\n\xff\n") == ["four", "\ufffd"]
    assert lines.feed(b"end") == []
    assert lines.end() == ["end"]
    assert Lines().end() == []


def test_any_split_gives_the_same_lines() -> None:
    data = b"alpha\nbeta gamma\n" + b"x" * 30 + b"\nlast\n"
    whole = Lines(20).feed(data)
    for size in range(1, 12):
        lines = Lines(20)
        found = [line for at in range(0, len(data), size) for line in lines.feed(data[at : at + size])]
        assert found == whole


def test_in_the_journal_each_line_has_its_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stream"
    with file.open("w") as out:
        found = os.fstat(out.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        logs.setup("debug", "auto", out)
        log = structlog.get_logger("x")
        for say in (log.debug, log.info, log.warning, log.error, log.critical):
            say("hello")
        logs.setup("info", "console", out)
        structlog.get_logger("x").info("two\nlines")
    lines = file.read_text().splitlines()
    assert [line[:3] for line in lines[:5]] == ["<7>", "<6>", "<4>", "<3>", "<2>"]
    assert json.loads(lines[1][3:])["event"] == "hello"
    assert all(line.startswith("<6>") for line in lines[5:])


def test_a_stream_that_is_not_the_journals_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    with (tmp_path / "stream").open("w") as out:
        logs.setup("info", "json", out)
        structlog.get_logger("x").info("hello")
    assert (tmp_path / "stream").read_text().startswith("{")

"""The report as one page that needs nothing but itself: numbers, what failed, and a picture of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

from peer.version import VERSION
from simulations import report
from simulations.campaign import Level, Shrunk
from simulations.outcome import Outcome
from simulations.picture import legend, timeline

PAGE_BYTES_MAX: Final = 2_000_000
_PICTURES_MAX: Final = 3  # of failures
_TAIL_LINES_MAX: Final = 200
_NEVER_MAX: Final = 200


def write_report(totals: report.Totals, folder: Path, shrunk: Sequence[Shrunk] = ()) -> Path:
    """Write index.html there and return its path. `shrunk`: what the first failures came down to. Raises OSError."""
    return write_page(folder, _headline(totals), _parts(totals, shrunk))


def write_page(folder: Path, headline: str, parts: Iterable[str]) -> Path:
    """A page of these parts; those that would make it too large are left out, which the page says."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    title = escape(f"bitinglip simulate: {headline}")
    kept, size, left_out = [], len(template), 0
    for part in parts:
        if size + len(part.encode()) > PAGE_BYTES_MAX - 1_000:
            left_out += 1
        else:
            kept.append(part)
            size += len(part.encode())
    if left_out:
        kept.append(f'<p class="soft">{left_out} parts are left out: the page would be too large.</p>')
    page = template.replace("@TITLE@", title).replace("@BODY@", "\n".join(kept))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As `peer.cli.common.table`: a column whose name begins with ">" is aligned to the right."""
    right = [column.startswith(">") for column in columns]
    classes = [' class="number"' if each else "" for each in right]
    head = "".join(
        f'<th scope="col"{of}>{escape(column.removeprefix(">"))}</th>'
        for column, of in zip(columns, classes, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(f"<td{of}>{escape(cell)}</td>" for cell, of in zip(row, classes, strict=True))
        + "</tr>"
        for row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def facts(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows]
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


# ------------------------------------------------------------------------------------------------ a series


def _headline(totals: report.Totals) -> str:
    if totals.failed:
        return f"{len(totals.failed)} of {totals.runs} runs failed"
    return f"all of {totals.runs} held" if totals.runs != 1 else "it held"


def _parts(totals: report.Totals, shrunk: Sequence[Shrunk]) -> Iterator[str]:
    state = "bad" if totals.failed else "good"
    yield f'<h1>Simulated bad days: <span class="{state}">{escape(_headline(totals))}</span></h1>'
    yield f'<p class="soft">bitinglip {VERSION}, {totals.level} level, virtual time</p>'
    yield facts(totals.numbers())
    number = 0
    for failed in totals.failed[:_PICTURES_MAX]:
        yield from _failed(failed, totals.level, shrunk, number)
        number += 2
    if len(totals.failed) > _PICTURES_MAX:
        seeds = ", ".join(str(each.seed) for each in totals.failed[_PICTURES_MAX:][:_NEVER_MAX])
        yield f"<p>Other seeds that failed: {seeds}</p>"
    if not totals.failed and totals.eventful is not None:
        yield heading(f"The most eventful run: seed {totals.eventful.seed}")
        yield _picture(totals.eventful, number)
    for broken in totals.broken[:_PICTURES_MAX]:
        yield heading(f"The simulator is at fault, not the product: seed {broken.job.seed}")
        yield f"<pre>{escape(broken.text)}</pre>"
    yield '<div class="columns">' + _counts("Faults injected", totals.faults)
    yield _counts("Invariants checked", totals.checks) + "</div>"
    yield from _reached(totals)


def _failed(failed: Outcome, level: Level, shrunk: Sequence[Shrunk], number: int) -> Iterator[str]:
    assert failed.failure is not None
    least = next((each for each in shrunk if each.outcome.seed == failed.seed), None)
    shown = least.outcome if least is not None else failed
    reason = shown.failure or failed.failure
    yield heading(f"Seed {failed.seed}: {reason.check}")
    yield f'<p class="bad">{escape(reason.message)}</p>'
    if least is not None:
        lines = [*report.history(shown.scenario), f"{reason.at_s:>9.3f} s  {reason.check}"]
        size = report.size(shown.scenario, level)
        yield f"<p>The shortest history found in {least.runs} runs: {escape(size)}</p>"
        yield f"<pre>{escape(chr(10).join(lines))}</pre>"
        yield _picture(shown, number)
        yield "<p>The whole run:</p>"
    yield _picture(failed, number + 1)
    if shown.trace_tail:
        tail = "\n".join(shown.trace_tail[-_TAIL_LINES_MAX:])
        yield f"<details><summary>The trace's last lines</summary><pre>{escape(tail)}</pre></details>"


def _picture(outcome: Outcome, number: int) -> str:
    if not outcome.timeline:
        return '<p class="soft">No timeline: only runs at the world level have one.</p>'
    hint = "Point at a mark to read it. Zoom with Ctrl and the wheel, drag to move, double-click to see all."
    return f'<div class="picture">{timeline(outcome, number)}</div>{legend()}<p class="soft">{hint}</p>'


def _counts(title: str, counts: Mapping[str, int]) -> str:
    return f"<div>{heading(title)}{table((title.split()[0], '>times'), report.counted(counts))}</div>"


def _reached(totals: report.Totals) -> Iterator[str]:
    if totals.sometimes:
        yield heading("Reached")
        yield table(("state", ">times"), report.counted(totals.sometimes))
    never = totals.never() if totals.runs > 1 else []
    if never:
        yield heading("Sometimes, but not in these runs")
        yield f"<p>{escape(', '.join(never[:_NEVER_MAX]))}</p>"

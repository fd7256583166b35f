"""Pictures of runs as SVG text: a timeline with a row for each peer, and curves. Nothing here reads or writes files.

Times are virtual seconds. What is drawn carries `data-a` and `data-b` (its times), by which the page's script zooms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from simulations.outcome import CLUSTER, Mark, Outcome

WIDTH, LEFT, RIGHT = 1120.0, 92.0, 16.0
ROWS_MAX: Final = 64
MARKS_MAX: Final = 6_000
_ROW, _TOP, _CURVE = 30.0, 34.0, 96.0
_POINTS_MAX = 1_200
_WORDS_MAX = 160
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)

# kind: (what the legend says, from the row's top, height)
LANES: Final[Mapping[str, tuple[str, float, float]]] = {
    "fault": ("a fault", 3.0, 6.0),
    "leader": ("leads", 11.0, 8.0),
    "down": ("is down", 10.0, 10.0),
    "frozen": ("is frozen", 10.0, 10.0),
    "partition": ("is cut off", 22.0, 5.0),
    "event": ("an event", 15.0, 0.0),
}


def timeline(outcome: Outcome, number: int) -> str:
    """Peers as rows, what happened to each, and below them how many tasks lived and ran. `number` makes ids unique."""
    end = max([outcome.virtual_s, 1.0, *(mark.at_s for mark in outcome.timeline)])
    rows = _rows(outcome)
    scale = _Scale(0.0, end)
    marks = _thinned([m for m in outcome.timeline if m.kind != "task" and m.row in rows], scale)
    bottom = _TOP + _ROW * len(rows)
    height = bottom + _CURVE + 30
    parts = [
        f'<svg class="timeline" viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        f'aria-labelledby="t{number} d{number}" data-end="{end:g}" data-left="{LEFT:g}" '
        f'data-right="{WIDTH - RIGHT:g}">',
        f'<title id="t{number}">Timeline of seed {outcome.seed}</title>',
        f'<desc id="d{number}">{escape(_description(outcome, rows))}</desc>',
        f'<clipPath id="c{number}"><rect x="{LEFT - 10:g}" y="0" width="{WIDTH - LEFT - RIGHT + 20:g}" '
        f'height="{height:g}"/></clipPath>',
    ]
    parts += _row_labels(rows)
    parts.append(f'<g clip-path="url(#c{number})">')
    parts += _ticks(scale, _TOP - 6, height - 24)
    parts += (_drawn(mark, rows[mark.row], scale) for mark in marks)
    parts += _moments(outcome, scale, height - 24)
    parts.append(_task_curves(outcome, scale, bottom + 12, _CURVE - 24))
    parts.append("</g></svg>")
    return "\n".join(parts)


def legend() -> str:
    items = [
        f'<span class="key"><svg width="18" height="12" aria-hidden="true">{_swatch(kind)}</svg> {words}</span>'
        for kind, (words, _, _) in LANES.items()
    ]
    items.append('<span class="key"><i class="swatch live"></i> tasks accepted and not ended</span>')
    items.append('<span class="key"><i class="swatch running"></i> tasks running</span>')
    return f'<p class="legend">{" ".join(items)}</p>'


def curves(
    title: str, unit: str, series: Mapping[str, Sequence[tuple[float, float]]], *, start_s: float, number: int
) -> str:
    """Lines of (seconds, value), one for each name, with times of day from `start_s`."""
    points = [point for line in series.values() for point in line]
    end = max([1.0, *(at for at, _ in points)])
    top = max([1.0, *(value for _, value in points)])
    scale = _Scale(0.0, end)
    height = 190.0
    worst = "; ".join(
        f"{name}: at most {max((v for _, v in line), default=0):.4g} {unit}" for name, line in series.items()
    )
    parts = [
        f'<svg class="curves" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-labelledby="t{number} d{number}">',
        f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(worst)}</desc>',
        *_ticks(scale, 12, height - 24, start_s),
        f'<text class="label" x="{LEFT - 8:g}" y="20" text-anchor="end">{top:.4g} {escape(unit)}</text>',
        f'<text class="label" x="{LEFT - 8:g}" y="{height - 26:g}" text-anchor="end">0</text>',
    ]
    for i, (name, line) in enumerate(series.items()):
        path = " ".join(
            f"{'L' if n else 'M'}{scale.x(at):.1f},{height - 30 - (height - 46) * value / top:.1f}"
            for n, (at, value) in enumerate(_fewer(line))
        )
        parts.append(f'<path class="line line{i}" d="{path}"><title>{escape(name)}</title></path>')
    parts.append("</svg>")
    keys = " ".join(
        f'<span class="key"><i class="swatch line{i}"></i> {escape(name)}</span>'
        for i, name in enumerate(series)
    )
    return "\n".join(parts) + f'<p class="legend">{keys}</p>'


# ------------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True, slots=True)
class _Scale:
    start: float
    end: float

    def x(self, at_s: float) -> float:
        share = (at_s - self.start) / (self.end - self.start)
        return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, share))


def _rows(outcome: Outcome) -> dict[str, float]:
    """The rows and where each begins: the cluster, then the peers; of very many those with most to see."""
    found = Counter(mark.row for mark in outcome.timeline if mark.kind != "task")
    peers = [f"h{n}" for n in range(1, outcome.scenario.hosts + 1)]
    peers += sorted(row for row in found if row not in peers and row != CLUSTER)
    if len(peers) > ROWS_MAX:
        seen = dict(sorted(found.items(), key=lambda item: -item[1])[:ROWS_MAX])
        peers = [peer for peer in peers if peer in seen]
    return {row: _TOP + _ROW * i for i, row in enumerate([CLUSTER, *peers])}


def _thinned(marks: list[Mark], scale: _Scale) -> list[Mark]:
    """Of several that would cover each other, the first one; then, if there are still too many, the longest."""
    last: dict[tuple[str, str], float] = {}
    kept = []
    for mark in sorted(marks, key=lambda m: m.at_s):
        x = scale.x(mark.at_s)
        wide = mark.until_s is not None and scale.x(mark.until_s) - x > 2
        if not wide and x - last.get((mark.row, mark.kind), -9.0) < 1.5:
            continue
        last[mark.row, mark.kind] = x
        kept.append(mark)
    if len(kept) > MARKS_MAX:
        kept.sort(key=lambda m: -((m.until_s or m.at_s) - m.at_s))
        kept = sorted(kept[:MARKS_MAX], key=lambda m: m.at_s)
    return kept


def _row_labels(rows: Mapping[str, float]) -> Iterator[str]:
    for i, (row, y) in enumerate(rows.items()):
        shade = "row odd" if i % 2 else "row"
        yield f'<rect class="{shade}" x="0" y="{y:g}" width="{WIDTH:g}" height="{_ROW:g}"/>'
        yield f'<text class="label" x="{LEFT - 8:g}" y="{y + 19:g}" text-anchor="end">{escape(row)}</text>'


def _drawn(mark: Mark, y: float, scale: _Scale) -> str:
    words, top, height = LANES[mark.kind]
    x = scale.x(mark.at_s)
    span = f"{mark.at_s:.3f} s" + (f" to {mark.until_s:.3f} s" if mark.until_s is not None else "")
    text = f"{mark.row} {words}, {span}" + (f": {mark.text}" if mark.text else "")
    title = f"<title>{escape(text[:_WORDS_MAX])}</title>"
    until = mark.until_s if mark.until_s is not None else mark.at_s
    data = f'data-a="{mark.at_s:.3f}" data-b="{until:.3f}"'
    if mark.until_s is None:
        shape = "M-4,2 L4,2 L0,9 Z" if mark.kind == "fault" else "M0,-4 L4,0 L0,4 L-4,0 Z"
        place = f"translate({x:.1f},{y + top:.1f})"
        return f'<path class="mark {mark.kind}" {data} d="{shape}" transform="{place}">{title}</path>'
    width = max(1.5, scale.x(until) - x)
    return (
        f'<rect class="mark {mark.kind}" {data} x="{x:.1f}" y="{y + top:.1f}" width="{width:.1f}" '
        f'height="{height or 4:g}" rx="1.5">{title}</rect>'
    )


def _swatch(kind: str) -> str:
    if kind == "fault":
        return '<path class="mark fault" d="M3,2 L13,2 L8,10 Z"/>'
    if kind == "event":
        return '<path class="mark event" d="M8,1 L13,6 L8,11 L3,6 Z"/>'
    return f'<rect class="mark {kind}" x="0" y="2" width="18" height="8" rx="1.5"/>'


def _ticks(scale: _Scale, top: float, bottom: float, start_s: float | None = None) -> Iterator[str]:
    span = scale.end - scale.start
    step = next((step for step in _STEPS if span / step <= 10), 86_400)
    at = 0.0
    while at <= scale.end:
        x = scale.x(at)
        words = _duration(at) if start_s is None else _of_day(start_s + at)
        yield f'<line class="grid" data-x="{at:g}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}"/>'
        yield f'<text class="tick" data-x="{at:g}" x="{x:.1f}" y="{bottom + 16:g}" text-anchor="middle">{words}</text>'
        at += step


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 7200 else f"{seconds / 3600:g} h"


def _of_day(seconds: float) -> str:
    return f"{int(seconds // 3600) % 24:02}:{int(seconds % 3600 // 60):02}"


def _moments(outcome: Outcome, scale: _Scale, bottom: float) -> Iterator[str]:
    """The end of the faults, and the failure."""
    lines = []
    if outcome.scenario.fault_s < scale.end:
        lines.append((outcome.scenario.fault_s, "calm", "faults end, all is mended"))
    if outcome.failure is not None:
        lines.append((outcome.failure.at_s, "failure", f"failed: {outcome.failure.check}"))
    for at, kind, words in lines:
        x = scale.x(at)
        anchor, shift = ("end", -5) if x > WIDTH / 2 else ("start", 5)
        yield f'<line class="{kind}" data-x="{at:g}" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{bottom:g}"/>'
        y = 14 if kind == "failure" else 26
        yield (
            f'<text class="{kind}" data-x="{at:g}" data-shift="{shift}" x="{x + shift:.1f}" y="{y}" '
            f'text-anchor="{anchor}">{escape(words)}</text>'
        )


def _task_curves(outcome: Outcome, scale: _Scale, top: float, height: float) -> str:
    live, running = task_counts(outcome.timeline)
    most = max([1, *(count for _, count in live), *(count for _, count in running)])
    if not live:
        return ""
    parts = []
    for name, counts in (("live", live), ("running", running)):
        if not any(count for _, count in counts):
            continue  # nothing says when tasks ran
        points, before = [(scale.x(0.0), top + height)], 0
        for at, count in _fewer(counts):
            x = scale.x(at)
            points += [(x, top + height * (1 - before / most)), (x, top + height * (1 - count / most))]
            before = int(count)
        points.append((scale.x(scale.end), top + height * (1 - before / most)))
        if name == "live":
            points.append((scale.x(scale.end), top + height))
        path = " ".join(f"{'L' if i else 'M'}{x:.1f},{y:.1f}" for i, (x, y) in enumerate(points))
        words = f"tasks {name}, at most {max([0, *(count for _, count in counts)]):g}"
        parts.append(f'<path class="tasks {name}" d="{path}"><title>{words}</title></path>')
    words = f"tasks, at most {most:g}"
    label = f'<text class="label zoomed" x="{LEFT + 4:g}" y="{top - 2:g}">{words}</text>'
    return f'<g class="stretch">{"".join(parts)}</g>{label}'


def task_counts(timeline: Sequence[Mark]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """How many tasks had been accepted and not ended, and how many ran, each time that it changed.

    An end without a task's name is one of a task that is not known further.
    """
    state: dict[str, str] = {}
    nameless = 0
    live: list[tuple[float, float]] = []
    running: list[tuple[float, float]] = []
    for mark in sorted((m for m in timeline if m.kind == "task"), key=lambda m: m.at_s):
        now, _, task = mark.text.partition(" ")
        if now in ("queued", "assigned", "running"):
            state[task] = now
        elif task:
            state.pop(task, None)
        else:
            nameless += 1
        counts = (max(0, len(state) - nameless), sum(each == "running" for each in state.values()))
        for line, count in zip((live, running), counts, strict=True):
            if not line or line[-1][1] != count:
                line.append((mark.at_s, count))
    return live, running


def _fewer(line: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Of too many points the first and the highest of each group: peaks stay."""
    group = max(1, -(-2 * len(line) // _POINTS_MAX))
    if group == 1:
        yield from line
        return
    for i in range(0, len(line), group):
        part = line[i : i + group]
        highest = max(part, key=lambda point: point[1])
        yield part[0]
        if highest is not part[0]:
            yield highest


def _description(outcome: Outcome, rows: Mapping[str, float]) -> str:
    """The picture in words, for those who do not see it."""
    kinds = Counter(mark.kind for mark in outcome.timeline)
    faults = ", ".join(f"{count} of {kind}" for kind, count in sorted(outcome.faults.items()))
    leaders = [f"{m.row} from {m.at_s:.1f} s" for m in outcome.timeline if m.kind == "leader"][:12]
    words = [
        f"{len(rows) - 1} peers over {outcome.virtual_s:.0f} virtual seconds",
        f"faults: {faults or 'none'}",
        f"leaders: {', '.join(leaders) or 'not recorded'}",
        f"{kinds['partition']} partitions, {kinds['frozen']} freezes, {kinds['down']} times down",
    ]
    if outcome.failure is not None:
        words.append(f"failed at {outcome.failure.at_s:.3f} s: {outcome.failure.check}")
    return ". ".join(words) + "."

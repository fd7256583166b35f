"""`bitinglip simulate --rehearse FILE`: the plan with and without its events, as a table and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path

from peer.cli.common import pairs, printable, say, table
from peer.cli.exits import CliError, Exit
from simulations import html, picture
from simulations.campaign import each_in_order
from simulations.errors import InvariantViolated, SimulatorError
from simulations.rehearsal import result
from simulations.rehearsal.cluster import Rehearsed, rehearse
from simulations.rehearsal.plan import Plan, expected_tasks, read_plan

EXIT_SIMULATOR = 3
COLUMNS = ("", ">without", ">with")


def main(path: Path, report: Path | None) -> int:
    """Raises ConfigError and CliError."""
    plan = read_plan(path)
    devices = sum(host.gpus for host in plan.hosts)
    pairs(
        [
            ("rehearsal", plan.about or str(path)),
            ("hosts", f"{len(plan.hosts)} with {devices} devices"),
            (
                "time",
                f"{clock(plan.from_s)} to {clock(plan.until_s)}, about {expected_tasks(plan):,.0f} tasks",
            ),
            *(("event", line) for line in events(plan)),
            *(("measured", line) for line in result.assumptions(plan)),
        ]
    )
    try:
        say("without the events, and with them ...")
        before, after = each_in_order(partial(_run, plan), (False, True), 2)
    except InvariantViolated as violated:
        print(printable(f"the product is at fault: {violated}"))
        return Exit.FAILED
    except SimulatorError as error:
        say(f"the rehearsal itself is at fault, not the product: {error}")
        return EXIT_SIMULATOR
    rows = list(
        result.table(
            result.figures(plan, before, with_events=False), result.figures(plan, after, with_events=True)
        )
    )
    print()
    table(COLUMNS, rows, empty="")
    virtual_s, real_s = before.virtual_s + after.virtual_s, before.real_s + after.real_s
    print(f"\n{virtual_s / 3600:.1f} virtual hours in {real_s:.1f} s")
    if report is not None:
        try:
            print(
                f"report  {html.write_page(report, plan.about or path.name, _parts(plan, before, after, rows))}"
            )
        except OSError as error:
            raise CliError(f"the report cannot be written: {error}", Exit.FAILED) from None
    return Exit.OK


def _run(plan: Plan, with_events: bool) -> Rehearsed:
    return rehearse(plan, with_events=with_events)


def events(plan: Plan) -> Iterator[str]:
    for event in plan.events:
        hosts = ", ".join(event.hosts)
        time = f"for {event.for_s / 60:g} min" if event.for_s else "for good"
        leads = ", which leads" if plan.leader in event.hosts else ""
        yield f"{clock(event.at_s)}  {hosts}{leads}: no power {time}"


def clock(of_day_s: float) -> str:
    return f"{int(of_day_s // 3600):02}:{int(of_day_s % 3600 // 60):02}"


def _parts(
    plan: Plan, before: Rehearsed, after: Rehearsed, rows: list[tuple[str, str, str]]
) -> Iterator[str]:
    yield f"<h1>{escape(plan.about or 'Rehearsal')}</h1>"
    yield html.facts([*(("event", line) for line in events(plan))])
    yield html.heading("Without the events, and with them")
    yield html.table(("figure", ">without", ">with"), rows)
    for number, (title, unit, of) in enumerate(
        (
            ("Tasks waiting", "tasks", result.waiting),
            ("Longest queue wait, by the time of submission", "s", result.longest_waits),
        )
    ):
        yield html.heading(title)
        series = {"without the events": of(plan, before), "with them": of(plan, after)}
        drawn = picture.curves(title, unit, series, start_s=plan.from_s, number=100 + number)
        yield f'<div class="picture">{drawn}</div>'
    yield html.heading("What it rests on")
    lines = "".join(f"<li>{escape(line)}</li>" for line in result.assumptions(plan))
    yield f"<ul>{lines}</ul>"

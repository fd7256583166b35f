"""`bitinglip simulate`: bad days of a whole cluster in virtual time, each repeatable by its seed.

0 all held · 1 the product violated an invariant · 2 wrong usage · 3 the simulator itself is at fault
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import pairs, printable, say, table
from peer.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from simulations.campaign import Job, Level, Shrunk
    from simulations.outcome import Outcome
    from simulations.report import Totals

EXIT_SIMULATOR = 3
SEEDS = 20
SEEDS_MAX = 10_000_000
WORLD_HOSTS_MAX = 200
SHRINK_FAILURES_MAX = 3  # of the failures of one series; the others are named by their seeds
FAILURES_TOLD_MAX = 20


@click.command()
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Run this one only, and print its hash.")
@click.option("--seeds", type=click.IntRange(1, SEEDS_MAX), metavar="N", help=f"How many runs ({SEEDS}).")
@click.option("--first", type=click.IntRange(0), default=0, metavar="N", help="The first run's seed (0).")
@click.option(
    "--level",
    type=click.Choice(("world", "policy")),
    default="world",
    show_default=True,
    help="Whole peers, or their decisions alone: simpler and much faster.",
)
@click.option("--hosts", type=click.IntRange(1, 5_000), metavar="N", help="Hosts; else as the seed draws.")
@click.option("--hours", type=click.FloatRange(0.0, min_open=True), metavar="H", help="Virtual, with faults.")
@click.option("--scenario", metavar="FILE", help="Run what this YAML file fixes.")
@click.option("--replay", metavar="TRACE", help="Run what a failure has left, again.")
@click.option("--report", metavar="DIR", help="Write a page with a timeline there, and traces.")
@click.option("--rehearse", metavar="FILE", help="Your own hosts, models and load: what an outage would do.")
@click.option("--bugs", is_flag=True, help="How many seeds each known bug takes to be found.")
@click.option("--bug", default="", metavar="NAME", help="Switch this known bug on.")
@click.option("--workers", type=click.IntRange(1, 64), metavar="K", help="Processes (one per core).")
def simulate(**options: Any) -> int:
    """Run the cluster through bad days in virtual time.

    \b
    bitinglip simulate --seeds 200
    bitinglip simulate --seed 17 --report out
    bitinglip simulate --rehearse rehearsal.yaml

    Exits with 0 if everything held, 1 if the product violated an invariant, 3 if the simulator itself is at fault.
    """
    from peer.errors import ConfigError

    _contradictions(options)
    try:
        from simulations.campaign import known_bugs
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("simulations"):
            raise
        hint = "install bitinglip again from its wheel, or in a checkout: make demo"
        raise CliError("this installation lacks the simulator", Exit.FAILED, hint) from None
    if options["bug"] and options["bug"] not in known_bugs(options["level"]):
        from peer.settings import nearest

        hint = nearest(options["bug"], known_bugs(options["level"]))
        raise click.UsageError(f"--bug: there is no known bug `{options['bug']}`{hint}")
    try:
        if options["rehearse"]:
            return _rehearse(Path(options["rehearse"]), options["report"])
        if options["bugs"]:
            return _bugs(options)
        if options["replay"]:
            return _replay(Path(options["replay"]), options["report"])
        return _series(options)
    except ConfigError as error:
        raise CliError(str(error), Exit.USAGE) from None


def _contradictions(options: dict[str, Any]) -> None:
    """What makes no sense together."""
    alone = [name for name in ("replay", "rehearse", "bugs") if options[name]]
    several = [name for name in ("seed", "seeds") if options[name] is not None]
    if len(alone) > 1 or len(several) > 1:
        names = " and ".join(f"--{name}" for name in (alone if len(alone) > 1 else several))
        raise click.UsageError(f"{names} do not go together")
    fixed = next((name for name in ("scenario", "replay", "rehearse") if options[name]), None)
    for name in ("hosts", "hours"):
        if fixed is not None and options[name] is not None:
            raise click.UsageError(f"--{name}: --{fixed} says it already")
    for name in ("seed", "seeds", "scenario", "bug"):
        if alone and options[name] not in (None, "") and (name, alone[0]) != ("bug", "bugs"):
            raise click.UsageError(f"--{name} and --{alone[0]} do not go together")
    if options["level"] == "world" and (options["hosts"] or 0) > WORLD_HOSTS_MAX:
        raise click.UsageError(f"--hosts: at most {WORLD_HOSTS_MAX} at the world level; try --level policy")
    if options["scenario"] and options["level"] == "policy":
        raise click.UsageError("--scenario is for --level world: the policy level draws its faults itself")


# ------------------------------------------------------------------------------------------------ many runs


def _series(options: dict[str, Any]) -> int:
    from simulations.campaign import cores

    jobs = _jobs(options)
    totals = _run(jobs, options["level"], options["workers"] or cores())
    _summary(totals)
    if options["seed"] is not None:
        pairs([("\ntrace hash", outcome.trace_hash) for outcome in _shown(totals)])
    shrunk = _failures(totals, options)
    if options["report"] and totals.runs:
        _page(totals, Path(options["report"]), shrunk)
    return _exit_code(totals)


def _jobs(options: dict[str, Any]) -> list[Job]:
    from msgspec.structs import replace

    from simulations.campaign import Job
    from simulations.scenario_file import read_scenario

    fixed = read_scenario(Path(options["scenario"])) if options["scenario"] else None
    first = options["first"]
    if options["seed"] is not None:
        seeds = range(options["seed"], options["seed"] + 1)
    elif fixed is not None and options["seeds"] is None:
        seeds = range(fixed.seed, fixed.seed + 1)
    else:
        seeds = range(first, first + (options["seeds"] or SEEDS))
    fault_s = options["hours"] * 3600 if options["hours"] is not None else None
    return [
        Job(
            options["level"],
            seed,
            hosts=options["hosts"],
            fault_s=fault_s,
            scenario=replace(fixed, seed=seed) if fixed is not None else None,
            bug=options["bug"],
        )
        for seed in seeds
    ]


def _run(jobs: Sequence[Job], level: Level, workers: int) -> Totals:
    """Ctrl-C prints what there is by then."""
    from simulations.campaign import perform_all
    from simulations.report import Totals

    totals = Totals(level)
    began = time.monotonic()
    try:
        with _progress(len(jobs), "seeds") as step:
            for outcome in perform_all(jobs, workers):
                totals.add(outcome)
                step()
    except KeyboardInterrupt:
        totals.wall_s = time.monotonic() - began
        _summary(totals)
        raise
    totals.wall_s = time.monotonic() - began
    return totals


@contextmanager
def _progress(count: int, label: str) -> Iterator[Any]:
    """A bar where somebody watches, else nothing."""
    if not sys.stderr.isatty() or count < 2:
        yield lambda: None
        return
    with click.progressbar(length=count, label=label, file=sys.stderr, show_pos=True) as bar:
        yield lambda: bar.update(1)


def _summary(totals: Totals) -> None:
    from simulations.report import counted

    pairs(totals.numbers())
    for title, counts in (("fault", totals.faults), ("invariant", totals.checks)):
        if counts:
            print()
            table((title, ">times"), counted(counts), empty="")
    never = totals.never() if totals.runs > 1 else []  # one run alone reaches little
    if never:
        print()
        print(f"sometimes, but not in these runs ({len(never)}): {', '.join(never)}")


# ------------------------------------------------------------------------------------------------ failures


def _failures(totals: Totals, options: dict[str, Any]) -> list[Shrunk]:
    by_text: dict[str, list[int]] = {}
    for broken in totals.broken:
        by_text.setdefault(broken.text, []).append(broken.job.seed)
    for text, seeds in list(by_text.items())[:FAILURES_TOLD_MAX]:
        more = f" (and {len(seeds) - 1} more)" if len(seeds) > 1 else ""
        say(f"\nseed {seeds[0]}{more}: the simulator is at fault, not the product\n{text}")
    folder = Path(options["report"] or ".")
    shrunk = [
        _failure(failed, totals.level, folder, options) for failed in totals.failed[:SHRINK_FAILURES_MAX]
    ]
    rest = totals.failed[SHRINK_FAILURES_MAX:]
    for failed in rest[:FAILURES_TOLD_MAX]:
        print(f"\nseed {failed.seed} failed: {failed.failure}\n  {_again(failed, totals.level, options)}")
    if len(rest) > FAILURES_TOLD_MAX:
        print(f"\nand {len(rest) - FAILURES_TOLD_MAX} more")
    return shrunk


def _failure(failed: Outcome, level: Level, folder: Path, options: dict[str, Any]) -> Shrunk:
    """Shrink it, write its trace, print all that somebody needs to take it up."""
    from simulations import report
    from simulations.campaign import shrunk
    from simulations.scenario_file import Trace, write_trace

    failure = failed.failure
    assert failure is not None
    print(f"\nseed {failed.seed}: the product is at fault")
    print(printable(f"  {failure.check}: {failure.message}"), flush=True)
    if sys.stderr.isatty():
        say("looking for a shorter history ...")
    least = shrunk(failed, level)
    outcome = least.outcome
    reason = outcome.failure
    assert reason is not None
    searched = f"{least.runs} runs" + (", stopped before all was tried" if least.exhausted else "")
    print(f"  shortest history found ({searched}): {report.size(outcome.scenario, level)}")
    for line in report.history(outcome.scenario):
        print(printable(f"  {line}"))
    print(printable(f"  {reason.at_s:>9.3f} s  {reason.check}: {reason.message}"))
    path = folder / f"{level}-seed-{failed.seed}.trace.json"
    trace = Trace(
        level=level,
        check=reason.check,
        message=reason.message,
        at_s=reason.at_s,
        bug=outcome.bug,
        trace_hash=outcome.trace_hash,
        scenario=outcome.scenario,
    )
    try:
        write_trace(path, trace)
    except OSError as error:
        say(f"  {path} cannot be written: {error.strerror}")
    else:
        print(f"  trace   {path}\n  replay  bitinglip simulate --replay {path}")
    print(f"  whole   {_again(failed, level, options)}", flush=True)
    return least


def _again(failed: Outcome, level: Level, options: dict[str, Any]) -> str:
    words = ["bitinglip simulate", f"--level {level}", f"--seed {failed.seed}"]
    words += [f"--{name} {options[name]:g}" for name in ("hosts", "hours") if options.get(name) is not None]
    words += [f"--{name} {options[name]}" for name in ("scenario", "bug") if options.get(name)]
    return " ".join(words)


def _exit_code(totals: Totals) -> int:
    """A violation that was found is one, whatever else went wrong."""
    if totals.failed:
        return Exit.FAILED
    return EXIT_SIMULATOR if totals.broken else Exit.OK


def _shown(totals: Totals) -> list[Outcome]:
    """The runs of which a person wants to see more: the failed ones, else the most eventful one."""
    return totals.failed or ([totals.eventful] if totals.eventful is not None else [])


def _page(totals: Totals, folder: Path, shrunk: Sequence[Shrunk] = ()) -> None:
    from simulations.html import write_report

    try:
        print(f"\nreport  {write_report(totals, folder, shrunk)}")
    except OSError as error:
        raise CliError(f"the report cannot be written to {folder}: {error.strerror}", Exit.FAILED) from None


# ------------------------------------------------------------------------------------------------ other modes


def _replay(path: Path, report: str | None) -> int:
    from peer.version import VERSION
    from simulations.campaign import Broken, Job, perform
    from simulations.report import Totals
    from simulations.scenario_file import read_trace

    trace = read_trace(path)
    if trace.level not in ("world", "policy"):
        raise CliError(f"{path}: there is no level `{trace.level}`", Exit.USAGE)
    if trace.product != VERSION:
        say(f"{path} was written by bitinglip {trace.product}, this is {VERSION}: it may not repeat")
    level: Level = "world" if trace.level == "world" else "policy"
    began = time.monotonic()
    outcome = perform(Job(level, trace.scenario.seed, scenario=trace.scenario, bug=trace.bug))
    totals = Totals(level, wall_s=time.monotonic() - began)
    totals.add(outcome)
    pairs([("expected", f"{trace.check}: {trace.message}" if trace.check else "all holds")])
    if isinstance(outcome, Broken):
        say(f"the simulator is at fault, not the product\n{outcome.text}")
        return EXIT_SIMULATOR
    found = outcome.failure
    pairs([("found   ", f"{found.check}: {found.message}" if found is not None else "all holds")])
    same = "the same" if outcome.trace_hash == trace.trace_hash else "another: the code has changed since"
    pairs([("trace   ", f"{outcome.trace_hash}, {same}")])
    for line in outcome.trace_tail if found is not None else ():
        print(printable(f"  {line}"))
    if report:
        _page(totals, Path(report))
    return Exit.FAILED if found is not None else Exit.OK


def _bugs(options: dict[str, Any]) -> int:
    from simulations.campaign import HUNT_SEEDS_MAX, Hunt, cores, each_in_order, hunt, known_bugs
    from simulations.errors import SimulatorError

    level, hours = options["level"], options["hours"]
    fault_s = hours * 3600 if hours is not None else None
    names = [options["bug"]] if options["bug"] else known_bugs(level)
    hunts = [Hunt(level, name, options["hosts"], fault_s) for name in names]
    found = []
    try:
        with _progress(len(hunts), "bugs") as step:
            for each in each_in_order(hunt, hunts, options["workers"] or cores()):
                found.append(each)
                step()
    except SimulatorError as error:
        say(f"the simulator is at fault, not the product\n{error}")
        return EXIT_SIMULATOR
    print("| bug | seeds | found by |\n|---|---|---|")
    for each in found:
        seeds = str(each.seeds) if each.seed is not None else f"not in {each.seeds}"
        print(f"| {each.bug} | {seeds} | {each.check} |")
    missed = sum(each.seed is None for each in found)
    print(f"\nfound {len(found) - missed} of {len(found)}, each within {HUNT_SEEDS_MAX} seeds")
    return Exit.FAILED if missed else Exit.OK


def _rehearse(path: Path, report: str | None) -> int:
    from simulations.rehearsal.command import main

    return main(path, Path(report) if report else None)

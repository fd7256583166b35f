"""`.venv/bin/python -m tests.bench`: run the measures, print a table, write the numbers as JSON.

    --only NAME     one of accept, noop, stream, model, footprint; may be repeated
    --seconds S     length of each measured window (3)
    --json FILE     all raw numbers, versions, the machine
    --quick         one short round of everything

Exit status 0 whatever the figures are; 1 when something of ours could not be measured; 128 + signal when ended.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version as package_version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from tests.bench.processes import REPOSITORY, Missing, adopt_orphans, end_all
from tests.bench.report import QUIET, Options, Result, Row, table

MEASURES = ("accept", "noop", "stream", "model", "footprint")
PACKAGES = ("trio", "hypercorn", "quart", "quart-trio", "msgspec", "tinygrad", "psutil")
SECONDS_MAX = 60.0


def arguments(package: str, measures: tuple[str, ...], purpose: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=purpose)
    parser.add_argument("--only", action="append", choices=measures, help="this measure; may be repeated")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measured window")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--quick", action="store_true", help="one short round of everything")
    given = parser.parse_args()
    if not 0.1 <= given.seconds <= SECONDS_MAX:
        parser.error(f"--seconds must be from 0.1 to {SECONDS_MAX:.0f}")
    return given


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "commit": commit.stdout.strip(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def run(package: str, names: tuple[str, ...], options: Options) -> tuple[dict[str, Result], dict[str, str]]:
    """Every measure's result, and how the broken ones broke."""
    results: dict[str, Result] = {}
    broken: dict[str, str] = {}
    for name in names:
        began = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results[name] = importlib.import_module(f"{package}.{name}").measure(options)
        except Missing as error:
            broken[name] = str(error)
        except Exception:  # one broken measure must not cost the others' numbers
            broken[name] = traceback.format_exc()
        finally:
            end_all()
        if name in broken:
            print(f"{name} broke: {broken[name]}", file=sys.stderr, flush=True)
            results[name] = Result([Row(name, None, note=broken[name].strip().splitlines()[-1])])
        results[name].raw["took_s"] = round(time.perf_counter() - began, 1)
    return results, broken


def foreign(raw: Any) -> Iterator[float]:
    """Every round's share of others, wherever it is in the numbers."""
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        if key == "foreign":
            yield value
        elif isinstance(value, dict | list):
            yield from foreign(value)


def stop(number: int, _: FrameType | None) -> NoReturn:
    """Unwinds every context, so that servers end and folders go."""
    raise SystemExit(128 + number)


def main(package: str, measures: tuple[str, ...], purpose: str) -> int:
    """Run those of the package's modules that the command line asks for; the exit status."""
    given = arguments(package, measures, purpose)
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    options = Options(given.seconds)
    if given.quick:
        options = Options(min(1.0, given.seconds), rounds=1, quick=True)
    about = machine()
    try:
        results, broken = run(package, tuple(given.only or measures), options)
    finally:
        end_all()
    rows = [row for result in results.values() for row in result.rows]
    raw = {name: result.raw for name, result in results.items()}
    others = sorted(foreign(raw))
    print(table(rows))
    print(f"\n{about['cpu']}, {about['cores']} cores, load {about['load_average'][0]:.1f}, {about['commit']}")
    if others:
        print(
            f"other processes took {statistics.median(others):.0%} of the cores in the middle one of"
            f" {len(others)} rounds, {others[-1]:.0%} in the worst; over {QUIET:.0%} only the quietest count"
        )
    if given.json:
        listed = [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows]
        whole = {
            "machine": about,
            "options": asdict(options),
            "rows": listed,
            "raw": raw,
            "broken": broken,
        }
        given.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 1 if broken or any(row.ours is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main("tests.bench", MEASURES, __doc__.split("\n")[0]))

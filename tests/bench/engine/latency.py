"""What streams and newcomers notice of each other in the engine.

The time to a first token while eight others decode; and the gaps between a stream's tokens while a prompt of a thousand
tokens joins, beside those before it came. Tokens that come in one step count as one. llama.cpp's first token, with
nothing else running, stands beside the first of these; beside the second, how much equal work varies on this machine.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack

from engine.protocol import Cancel
from engine.text.chat import prompt_tokens
from tests.bench.engine import limits
from tests.bench.engine.contenders import Engine, Llama, Stream, llama, ours
from tests.bench.engine.models import prompt, smollm2, story
from tests.bench.engine.samples import Samples
from tests.bench.processes import Missing
from tests.bench.report import Options, Result, Row, median

OTHERS = 8
NEWCOMER = 64  # tokens of its prompt
LONG = 1000
STREAM_TOKENS = 1700  # more than come while the long prompt is computed
SETTLED = 64  # steps of a stream before the others come
NEWCOMERS = 3
STREAMS = (1, 8)
SAME_STEP_S = 0.0005


class Latency:
    def __init__(self) -> None:
        self.model = smollm2()
        self.vocabulary = self.model.vocabulary()
        self.samples = Samples()
        self.gaps: dict[str, list[float]] = {}  # seconds, of all rounds: a 99th percentile needs many
        self.seed = 0

    def prompt(self, tokens: int) -> str:
        self.seed += 1
        return prompt(self.vocabulary, tokens, 10_000 + self.seed)

    def streams(self, engine: Engine, count: int) -> list[tuple[str, float]]:
        """So many that decode."""
        runs = []
        for _ in range(count):
            self.seed += 1
            runs.append(engine.start(story(self.seed), STREAM_TOKENS))
        for run_id, _ in runs:
            engine.wait_tokens(run_id, SETTLED)
        return runs

    def first_tokens(self, engine: Engine) -> None:
        """Of newcomers, alone and while others decode."""
        for name, others in (("alone", 0), ("busy", OTHERS)):
            runs = self.streams(engine, others)
            newcomers = []
            with self.samples.round() as figures:
                for _ in range(NEWCOMERS):
                    newcomers.append(engine.start(self.prompt(NEWCOMER), 1))
                    engine.wait_end(newcomers[-1][0])
                engine.send(*(Cancel(run_id=run_id) for run_id, _ in runs))
                streams = engine.finish([*newcomers, *runs])[:NEWCOMERS]
                figures[name] = median([stream.first_s for stream in streams]) or 0.0

    def of_llama(self, server: Llama) -> None:
        with self.samples.round() as figures:
            ids = [
                prompt_tokens(self.vocabulary, {"prompt": self.prompt(NEWCOMER)}) for _ in range(NEWCOMERS)
            ]
            figures["llama"] = median([server.generate([each], 1)["first_s"][0] for each in ids]) or 0.0

    def joining(self, engine: Engine, count: int) -> None:
        """Gaps of `count` streams before a long prompt comes, and until its first token."""
        with self.samples.round() as figures:
            runs = self.streams(engine, count)
            joined = engine.start(self.prompt(LONG), 1)
            engine.wait_end(joined[0])
            engine.send(*(Cancel(run_id=run_id) for run_id, _ in runs))
            newcomer, *streams = engine.finish([joined, *runs])
            came_s, until_s = newcomer.began_s, newcomer.began_s + newcomer.first_s
            for stream in streams:
                for at, gap in _gaps(stream):
                    if came_s < at <= until_s:
                        self.gaps.setdefault(f"{count} while", []).append(gap)
                    elif at <= came_s:
                        self.gaps.setdefault(f"{count} before", []).append(gap)
            figures[f"joins {count}"] = newcomer.first_s


def _gaps(stream: Stream) -> list[tuple[float, float]]:
    """(when it ended, its length), seconds, from the second step on."""
    times = [stream.began_s + step for step in stream.steps]
    pairs = [(after, after - before) for before, after in itertools.pairwise(times)]
    return [pair for pair in pairs if pair[1] > SAME_STEP_S]


def percentile(values: list[float], percent: int) -> float | None:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else None


def measure(options: Options) -> Result:
    latency = Latency()
    missing = ""
    with ExitStack() as stack:
        engine, _ = stack.enter_context(ours(latency.model))
        servers: list[Llama] = []
        try:
            servers.append(stack.enter_context(llama(latency.model)))
        except Missing as error:
            missing = f"llama.cpp missing: {error}"
        done = 0
        while not latency.samples.enough(done, options):
            done += 1
            latency.first_tokens(engine)
            for server in servers:
                latency.of_llama(server)
            for count in STREAMS:
                latency.joining(engine, count)
            latency.gaps.setdefault("pieces", []).extend(limits.pieces())
    return Result(_rows(latency, missing), {"rounds": latency.samples.raw(), "gaps_s": latency.gaps})


def _rows(latency: Latency, missing: str) -> list[Row]:
    samples = latency.samples
    rows = [
        Row(
            f"first token after {NEWCOMER} tokens, {name}",
            samples.middle(figure),
            samples.middle("llama"),
            "s",
            "llama.cpp, alone",
            note=missing or samples.note(figure),
        )
        for figure, name in (("alone", "alone"), ("busy", f"{OTHERS} others decoding"))
    ]
    for count in STREAMS:
        before, during = (latency.gaps.get(f"{count} {when}", []) for when in ("before", "while"))
        joining = f"a stream's gaps, {count} of them, while {LONG} tokens join"
        note = samples.note(f"joins {count}")
        usual, middle, longest = percentile(before, 50), percentile(during, 50), percentile(during, 99)
        rows += [
            _gap_row(f"{joining}: p99", longest, usual, "median gap before", "ratio<=3", note),
            _gap_row(f"{joining}: p99", longest, middle, "median gap meanwhile", note=note),
            _gap_row(f"{joining}: median", middle, usual, "median gap before"),
            Row(
                f"first token of the {LONG} tokens, {count} decoding",
                samples.middle(f"joins {count}"),
                None,
                "s",
            ),
        ]
    equal = latency.gaps.get("pieces", [])
    longest, middle = percentile(equal, 99), percentile(equal, 50)
    rows.append(_gap_row("machine: equal products one by one: p99", longest, middle, "median"))
    return rows


def _gap_row(
    name: str, seconds: float | None, other: float | None, what: str, goal: str = "", note: str = ""
) -> Row:
    mine, beside = (None if value is None else value * 1e3 for value in (seconds, other))
    return Row(name, mine, beside, "ms", what, goal, note)

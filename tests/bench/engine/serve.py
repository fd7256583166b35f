"""Requests together: eight at once, and a trace of arrivals, at the engine, llama.cpp and tinygrad's own server.

llama.cpp and tinygrad's server take one request after the other, in the order of arrival; the others wait. What is
counted is tokens that were generated, from the first arrival to the last token, prompts included. llama.cpp is asked
without HTTP and goes on past a text's end to the wanted length, both in its favour.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from engine.text.chat import prompt_tokens
from engine.text.tokenizer import Vocabulary
from tests.bench.engine.contenders import Engine, Llama, Stream, Tinygrad, llama, ours, tinygrad
from tests.bench.engine.models import WORDS, Model, smollm2, story
from tests.bench.engine.samples import Samples
from tests.bench.processes import Missing
from tests.bench.report import Options, Result, Row, median

AT_ONCE = 8
TOKENS = 24
ARRIVALS_PER_S = 4.0
REQUESTS, REQUESTS_QUICK = 12, 6
WORDS_MOST = 100
LENGTHS = (8, 16, 24, 32, 48)
SEED = 20


@dataclass(frozen=True)
class Request:
    """`at_s`: seconds after the first."""

    at_s: float
    prompt: str
    tokens: int


def trace(count: int) -> list[Request]:
    """Poisson arrivals of short and long prompts that want short and long texts: the same for everybody."""
    draw = random.Random(SEED)
    requests: list[Request] = []
    at_s = 0.0
    for index in range(count):
        words = " ".join(draw.choices(WORDS, k=draw.randrange(WORDS_MOST)))
        requests.append(Request(at_s, f"{story(500 + index)} {words}".strip(), draw.choice(LENGTHS)))
        at_s += draw.expovariate(ARRIVALS_PER_S)
    return requests


def together(first: int) -> list[Request]:
    return [Request(0.0, story(first + index), TOKENS) for index in range(AT_ONCE)]


def at_engine(engine: Engine, requests: Sequence[Request]) -> list[Stream]:
    """Sends each when it arrives, and reads meanwhile."""
    began, runs = time.perf_counter(), []
    for request in requests:
        while (left_s := began + request.at_s - time.perf_counter()) > 0:
            try:
                engine.receive(left_s)
            except TimeoutError:
                break
        runs.append(engine.start(request.prompt, request.tokens))
    return engine.finish(runs)


def at_llama(server: Llama, vocabulary: Vocabulary, requests: Sequence[Request]) -> list[Stream]:
    """One after the other, none before it arrives."""
    prompts = [prompt_tokens(vocabulary, {"prompt": request.prompt}) for request in requests]
    began, streams = time.perf_counter(), []
    for request, ids in zip(requests, prompts, strict=True):
        time.sleep(max(0.0, began + request.at_s - time.perf_counter()))
        asked_s, arrived_s = time.perf_counter(), began + request.at_s
        answer = server.generate([ids], request.tokens)
        steps = [asked_s + answer["first_s"][0] - arrived_s, time.perf_counter() - arrived_s]
        streams.append(Stream(request.tokens, len(ids), 0, steps, began_s=arrived_s))
    return streams


def at_tinygrad(server: Tinygrad, requests: Sequence[Request]) -> list[Stream]:
    prompts, tokens, delays = zip(*((each.prompt, each.tokens, each.at_s) for each in requests), strict=True)
    return server.together(prompts, tokens, delays)


class Serving:
    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options = model, options
        self.vocabulary = model.vocabulary()
        self.samples = Samples()
        self.missing: dict[str, str] = {}
        self.raw: dict[str, list[Any]] = {}

    def take(self, name: str, streams: Sequence[Stream], figures: dict[str, float]) -> None:
        spent_s = max(one.began_s + one.last_s for one in streams) - min(one.began_s for one in streams)
        figures[f"{name} rate"] = sum(one.tokens for one in streams) / spent_s
        figures[f"{name} first"] = median([one.first_s for one in streams]) or 0.0
        figures[f"{name} last"] = median([one.last_s for one in streams]) or 0.0
        self.raw.setdefault(name, []).append([one.raw() for one in streams])

    def run(self, stack: ExitStack) -> None:
        engine, _ = stack.enter_context(ours(self.model))
        servers: list[Llama] = []
        slow: list[Tinygrad] = []
        try:
            servers.append(stack.enter_context(llama(self.model)))
        except Missing as error:
            self.missing["llama.cpp"] = str(error)
        try:
            slow.append(stack.enter_context(tinygrad(self.model)))
        except Missing as error:
            self.missing["tinygrad's server"] = str(error)
        arrivals = trace(REQUESTS_QUICK if self.options.quick else REQUESTS)
        done = 0
        while not self.samples.enough(done, self.options):
            for kind, requests in (("together", together(100 * done)), ("trace", arrivals)):
                with self.samples.round() as figures:
                    self.take(f"ours {kind}", at_engine(engine, requests), figures)
                for server in servers:
                    with self.samples.round() as figures:
                        self.take(f"llama {kind}", at_llama(server, self.vocabulary, requests), figures)
                for each in slow if done == 0 else []:  # a minute or two: once
                    with self.samples.round() as figures:
                        self.take(f"tinygrad {kind}", at_tinygrad(each, requests), figures)
            done += 1


def measure(options: Options) -> Result:
    serving = Serving(smollm2(), options)
    with ExitStack() as stack:
        serving.run(stack)
    arrivals = [asdict(request) for request in trace(REQUESTS_QUICK if options.quick else REQUESTS)]
    raw = {
        "rounds": serving.samples.raw(),
        "streams": serving.raw,
        "trace": arrivals,
        "missing": serving.missing,
    }
    return Result(_rows(serving), raw)


def _rows(serving: Serving) -> list[Row]:
    samples = serving.samples
    missing = "; ".join(f"{name} missing: {why}" for name, why in serving.missing.items())
    rows = []
    for kind, name in (("together", f"{AT_ONCE} requests at once"), ("trace", "a trace of arrivals")):
        for other, beside in (("tinygrad", "tinygrad's server"), ("llama", "llama.cpp, one by one")):
            goal = "ratio>=10" if (kind, other) == ("together", "tinygrad") else ""
            note = missing or samples.note(f"ours {kind} rate", f"{other} {kind} rate")
            for figure, what, unit in (
                ("rate", "tokens generated", "tokens/s"),
                ("first", "median time to first token", "s"),
                ("last", "median time to last token", "s"),
            ):
                mine, theirs = (samples.middle(f"{who} {kind} {figure}") for who in ("ours", other))
                aim = goal if figure == "rate" else ""
                rows.append(
                    Row(f"{name}: {what}", mine, theirs, unit, beside, aim, note if figure == "rate" else "")
                )
    return rows

"""Prompts and decoding at full speed: the engine beside llama.cpp, tinygrad's own server and the machine's limits.

Rounds of all of them alternate. Decoding is counted while all streams decode, from the last first token to the first
end; prompts by the tokens that the cache did not have and the time to the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from engine.kernels.weights import weights_bytes
from engine.protocol import Cancel
from engine.text.chat import prompt_tokens
from engine.text.tokenizer import Vocabulary
from tests.bench.engine import limits
from tests.bench.engine.contenders import SLOTS, Engine, Llama, Stream, Tinygrad, llama, ours, tinygrad
from tests.bench.engine.models import Model, prompt, smollm2, story
from tests.bench.engine.samples import Samples
from tests.bench.processes import Missing
from tests.bench.report import Options, Result, Row

AT_ONCE = (1, 4, 8, 16)
PROMPTS = (128, 1024)
STEPS = 48  # that are counted, once all streams have begun
TOKENS_MOST = 512
TINYGRAD_PROMPT, TINYGRAD_TOKENS = 128, 16
LLAMA_CONTEXT = 512  # of each of its sequences when there are several


def decoding_rate(streams: Sequence[Stream]) -> float:
    """Tokens a second of all together while all of them decode. Raises Missing when there was no such time."""
    begin = max(stream.began_s + stream.first_s for stream in streams)
    until = min(stream.began_s + stream.last_s for stream in streams)
    steps = [
        step for stream in streams for at in stream.steps if begin < (step := stream.began_s + at) <= until
    ]
    if until <= begin or not steps:
        raise Missing("no time in which all streams decoded: one ended before another began")
    share = sum(stream.tokens for stream in streams) / sum(len(stream.steps) for stream in streams)
    return len(steps) * share / (until - begin)  # a step may bring several tokens


def prompt_rate(stream: Stream) -> float:
    return (stream.prompt_tokens - stream.cached_tokens) / stream.first_s


class Speed:
    """The contenders that could be had, and their rounds."""

    def __init__(self, model: Model, vocabulary: Vocabulary, options: Options) -> None:
        self.model, self.vocabulary, self.options = model, vocabulary, options
        self.samples = Samples()
        self.limits: list[limits.Limits] = []
        self.missing: dict[str, str] = {}
        self.seed = 0

    def prompt(self, tokens: int) -> str:
        """A new one every time: nobody has it cached."""
        self.seed += 1
        return prompt(self.vocabulary, tokens, self.seed)

    def story_tokens(self) -> list[int]:
        self.seed += 1
        return prompt_tokens(self.vocabulary, {"prompt": story(self.seed)})

    def of_engine(self, engine: Engine) -> None:
        for count in AT_ONCE:
            with self.samples.round() as figures:
                self.seed += count
                runs = [engine.start(story(self.seed + index), TOKENS_MOST) for index in range(count)]
                for run_id, _ in runs:
                    engine.wait_tokens(run_id, 1)
                engine.wait_tokens(runs[-1][0], STEPS)
                engine.send(*(Cancel(run_id=run_id) for run_id, _ in runs))
                figures[f"ours decode {count}"] = decoding_rate(engine.finish(runs))
        for tokens in PROMPTS:
            with self.samples.round() as figures:
                streams = engine.finish([engine.start(self.prompt(tokens), 1)])
                figures[f"ours prompt {tokens}"] = prompt_rate(streams[0])

    def of_llama(self, single: Llama, several: Llama) -> None:
        for tokens in PROMPTS:
            ids = prompt_tokens(self.vocabulary, {"prompt": self.prompt(tokens)})
            with self.samples.round() as figures:
                figures[f"llama prompt {tokens}"] = tokens / single.generate([ids], 1)["first_s"][0]
        for count in AT_ONCE:
            prompts = [self.story_tokens() for _ in range(count)]
            with self.samples.round() as figures:
                answer = (single if count == 1 else several).generate(prompts, STEPS)
                figures[f"llama decode {count}"] = count * (STEPS - 1) / answer["decode_s"]

    def of_tinygrad(self, server: Tinygrad) -> None:
        with self.samples.round() as figures:
            stream = server.generate(self.prompt(TINYGRAD_PROMPT), TINYGRAD_TOKENS)
            if stream.failure:
                raise Missing(f"tinygrad's server: {stream.failure}")
            figures[f"tinygrad prompt {TINYGRAD_PROMPT}"] = prompt_rate(stream)
            if len(stream.steps) > 1:
                figures["tinygrad decode 1"] = (len(stream.steps) - 1) / (stream.last_s - stream.first_s)

    def run(self, stack: ExitStack, model_bytes: int) -> None:
        engine, _ = stack.enter_context(ours(self.model))
        both: list[Llama] = []
        server: list[Tinygrad] = []
        try:
            both = [stack.enter_context(llama(self.model))]
            both.append(stack.enter_context(llama(self.model, SLOTS, LLAMA_CONTEXT)))
        except Missing as error:
            self.missing["llama.cpp"] = str(error)
        try:
            server = [stack.enter_context(tinygrad(self.model))]
        except Missing as error:
            self.missing["tinygrad's server"] = str(error)
        self.limits.append(limits.measure(model_bytes))
        done = 0
        while not self.samples.enough(done, self.options):
            done += 1
            self.of_engine(engine)
            if len(both) == 2:
                self.of_llama(*both)
            for each in server:
                self.of_tinygrad(each)
        self.limits.append(limits.measure(model_bytes))


def measure(options: Options) -> Result:
    model = smollm2()
    header = model.header()
    work = limits.work(header)
    speed = Speed(model, model.vocabulary(), options)
    with ExitStack() as stack:
        speed.run(stack, work.decode_bytes)
    best = limits.Limits(
        *(max(pair) for pair in zip(*(asdict(each).values() for each in speed.limits), strict=True))
    )
    kept = weights_bytes(header)
    raw: dict[str, Any] = {
        "rounds": speed.samples.raw(),
        "limits": [asdict(each) for each in speed.limits],
        "work": asdict(work) | {"weights_bytes_as_loaded": kept},
        "missing": speed.missing,
    }
    rows = [*_limit_rows(best, work, kept), *_rows(speed), *_bound_rows(speed, best, work)]
    return Result(rows, raw)


def _limit_rows(best: limits.Limits, work: limits.Work, kept: int) -> list[Row]:
    return [
        Row("machine: reading a large array", best.large_bytes_s / 1e9, None, "GB/s"),
        Row("machine: reading as much as the weights", best.model_bytes_s / 1e9, None, "GB/s"),
        Row("machine: float32 product of matrices", best.float32_s / 1e9, None, "GFLOP/s"),
        Row(
            "weights that a decoding step reads",
            kept / 1e6,
            work.decode_bytes / 1e6,
            "MB",
            "as the file has them",
        ),
        Row("operations of a prompt's token", work.prefill_operations / 1e6, None, "MFLOP"),
    ]


def _rows(speed: Speed) -> list[Row]:
    samples = speed.samples
    missing = "; ".join(f"{name} missing: {why}" for name, why in speed.missing.items())

    def row(name: str, mine: str, other: str, beside: str, goal: str = "", note: str = "") -> Row:
        note = missing or note or samples.note(mine, other)
        return Row(name, samples.middle(mine), samples.middle(other), "tokens/s", beside, goal, note)

    rows = []
    for tokens in PROMPTS:
        mine = f"ours prompt {tokens}"
        rows.append(
            row(f"prompt of {tokens} tokens", mine, f"llama prompt {tokens}", "llama.cpp", "ratio>=0.25")
        )
        if tokens == TINYGRAD_PROMPT:
            rows.append(
                row(f"prompt of {tokens} tokens", mine, f"tinygrad prompt {tokens}", "tinygrad's server")
            )
    rows.append(row("decoding, 1 stream", "ours decode 1", "llama decode 1", "llama.cpp", "ratio>=0.333"))
    rows.append(row("decoding, 1 stream", "ours decode 1", "tinygrad decode 1", "tinygrad's server"))
    for count in AT_ONCE[1:]:
        goal = "ratio>=1.0" if count == SLOTS else ""
        name, mine = f"decoding, {count} streams together", f"ours decode {count}"
        rows.append(row(name, mine, "llama decode 1", "llama.cpp, 1 stream", goal))
        rows.append(row(name, mine, f"llama decode {count}", f"llama.cpp, a batch of {count}"))
    return rows


def _bound_rows(speed: Speed, best: limits.Limits, work: limits.Work) -> list[Row]:
    """How near to what the machine allows a program that reads the weights as the file has them."""
    rows = []
    wanted = [(f"decoding, {count} together", f"decode {count}", count) for count in AT_ONCE]
    for name, figure, count in wanted:
        most, binds = work.rate_max(best, count)
        note = f"{binds} binds; llama.cpp: {_share(speed, figure, most)}"
        rows.append(
            Row(
                f"{name}: of what is possible",
                speed.samples.middle(f"ours {figure}"),
                most,
                "tokens/s",
                f"{binds}'s bound",
                note=note,
            )
        )
    most = best.float32_s / work.prefill_operations
    for tokens in PROMPTS:
        theirs = _share(speed, f"prompt {tokens}", most)
        note = f"attention not counted; llama.cpp, which multiplies 8-bit integers: {theirs}"
        mine = speed.samples.middle(f"ours prompt {tokens}")
        rows.append(
            Row(
                f"prompt of {tokens}: of what float32 allows",
                mine,
                most,
                "tokens/s",
                "arithmetic's bound",
                note=note,
            )
        )
    return rows


def _share(speed: Speed, figure: str, most: float) -> str:
    theirs = speed.samples.middle(f"llama {figure}")
    return "not measured" if theirs is None else f"{theirs / most:.2f}"

"""From a spawned process to its first token, and what each takes of the memory.

The engine with the catalogue's slots for this model, with an empty cache of kernels and with a filled one; llama.cpp
with one sequence; tinygrad's server with its kernels cached, unless the round is a quick one. Files are in the page
cache for all of them.
"""

from __future__ import annotations

import time

import psutil

from engine.text.chat import prompt_tokens
from tests.bench.engine.contenders import CACHE, CONTEXT, llama, ours, peak_mib, tinygrad
from tests.bench.engine.models import Model, smollm2, story
from tests.bench.engine.samples import Samples
from tests.bench.processes import Missing, memory_mib, temporary
from tests.bench.report import Options, Result, Row

SLOTS = 8  # as the catalogue has it
TOKENS = 16
TINYGRAD = "tinygrad's server"
LLAMA = "llama.cpp"


def _memory(name: str, process: psutil.Process, figures: dict[str, float]) -> None:
    steady = memory_mib(process)
    figures |= {f"{name} {kind}": size for kind, size in steady.items()} | {f"{name} peak": peak_mib(process)}


def _ours(model: Model, samples: Samples, cold: bool) -> None:
    name = "ours cold" if cold else "ours"
    with (
        temporary() as empty,
        samples.round() as figures,
        ours(model, SLOTS, CONTEXT, empty / "cache" if cold else CACHE) as (engine, loaded),
    ):
        (stream,) = engine.finish([engine.start(story(1), TOKENS)])
        figures[f"{name} first"] = stream.began_s + stream.first_s - engine.spawned_s
        figures[f"{name} load"] = loaded.load_s
        figures[f"{name} on the device"] = loaded.memory_bytes / 2**20
        _memory(name, psutil.Process(engine.process.pid), figures)


def _llama(model: Model, samples: Samples) -> None:
    ids = prompt_tokens(model.vocabulary(), {"prompt": story(1)})
    with samples.round() as figures:
        began = time.perf_counter()
        with llama(model) as server:
            asked = time.perf_counter()
            answer = server.generate([ids], TOKENS)
            figures["llama first"] = asked - began + answer["first_s"][0]
            _memory("llama", server.process, figures)


def _tinygrad(model: Model, samples: Samples) -> None:
    with samples.round() as figures, tinygrad(model) as server:
        stream = server.generate(story(1), TOKENS)
        if stream.failure:
            raise Missing(f"{TINYGRAD}: {stream.failure}")
        figures["tinygrad first"] = server.ready_s + stream.first_s
        _memory("tinygrad", server.server.process, figures)


def measure(options: Options) -> Result:
    model = smollm2()
    samples = Samples()
    missing: dict[str, str] = {}
    _ours(model, samples, cold=True)
    with ours(model, SLOTS):
        pass  # its kernels are cached from here on
    done = 0
    while not samples.enough(done, options):
        done += 1
        _ours(model, samples, cold=False)
        if LLAMA not in missing:
            try:
                _llama(model, samples)
            except Missing as error:
                missing[LLAMA] = str(error)
    if not options.quick:
        try:
            with tinygrad(model):
                pass  # its kernels are cached from here on
            _tinygrad(model, samples)
        except Missing as error:
            missing[TINYGRAD] = str(error)
    return Result(_rows(samples, missing), {"rounds": samples.raw(), "missing": missing})


def _rows(samples: Samples, missing: dict[str, str]) -> list[Row]:
    why = "; ".join(f"{name} missing: {text}" for name, text in missing.items())
    middle = samples.middle
    rows = [
        Row(
            "spawn to first token, kernels cached",
            middle("ours first"),
            middle("llama first"),
            "s",
            LLAMA,
            "ours<=5",
            why or samples.note("ours first"),
        ),
        Row(
            "spawn to first token, kernels cached",
            middle("ours first"),
            middle("tinygrad first"),
            "s",
            TINYGRAD,
        ),
        Row("of it, the load", middle("ours load"), None, "s"),
        Row(
            "spawn to first token, no kernel cached",
            middle("ours cold first"),
            None,
            "s",
            note=samples.note("ours cold first"),
        ),
    ]
    for kind, name in (
        ("peak", "most memory, RSS"),
        ("rss", "memory after serving, RSS"),
        ("pss", "memory after serving, PSS"),
    ):
        for other, beside in (("llama", f"{LLAMA}, 1 sequence"), ("tinygrad", f"{TINYGRAD}, 1 sequence")):
            mine, theirs = middle(f"ours {kind}"), middle(f"{other} {kind}")
            rows.append(Row(f"{name}, {SLOTS} slots of {CONTEXT} tokens", mine, theirs, "MiB", beside))
    rows.append(Row("weights, caches and steps of it", middle("ours on the device"), None, "MiB"))
    return rows

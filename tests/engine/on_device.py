"""A script: `python -m tests.engine.on_device OUT DEVICE [brief|full FIXTURE:FORMAT ...]`, as an engine opens a device.

It opens and tests the device (or several), loads each family's tiny model on it and compares it with its reference.
OUT gets a JSON object: "refused", or "name", "memory", "self_test_s", "models" and "searched", a number of kernels:
with ENGINE_BEAM, a width, they are searched, ENGINE_SEARCH_S seconds each. ENGINE_CACHE keeps them elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from engine import device
from engine.errors import DeviceUnusable, LoadError
from engine.self_test import open_devices, self_test
from tests.engine.conftest import CACHE

BRIEF = [1, 8]  # rows of a step


def main(word: str, extent: str, models: list[str]) -> dict[str, Any]:
    try:
        name = device.parse(word)
        facts = device.examine(name)
        device.choose(name, os.environ.get("ENGINE_CACHE", str(CACHE)))
        facts = open_devices(name) or facts
        found: dict[str, Any] = {"self_test_s": self_test(name)}
    except DeviceUnusable as error:
        return {"refused": [error.code, str(error)]}
    found |= {"name": facts.name, "memory": facts.memory_bytes, "models": {}}
    from engine.compilers import search

    search.KERNEL_S_MAX = float(os.environ.get("ENGINE_SEARCH_S", search.KERNEL_S_MAX))
    with search.searching(int(os.environ.get("ENGINE_BEAM", "0")), lambda _: None):
        for model in models:
            try:
                found["models"][model] = compared(name, extent, *model.split(":"))
            except LoadError as error:
                found["models"][model] = {"refused": [error.code, str(error)]}
    return found | {"searched": search.searched()}


def compared(name: device.DeviceName, extent: str, fixture: str, kind: str) -> dict[str, Any]:
    """A model beside its reference, and what memory each device gave for it."""
    import numpy as np
    from tinygrad.helpers import GlobalCounters

    from engine.kernels.weights import MATRIX
    from tests.engine import family_checks

    held = dict(GlobalCounters.mem_used_per_device)
    sizes = BRIEF if extent == "brief" else family_checks.SIZES
    model = family_checks.load(
        fixture, family_checks.FORMATS[kind], MATRIX, devices=name.devices, sizes=sizes
    )
    used = {each: GlobalCounters.mem_used_per_device[each] - held.get(each, 0) for each in name.devices}
    check = family_checks.Check(model, dict(np.load(family_checks.FIXTURES / fixture / "expected.npz")))
    result = brief(check) if extent == "brief" else check.run()
    model.free()
    return result | {"used": used}


def brief(check: Any) -> dict[str, Any]:
    """A prompt, a few tokens, and a shorter run in the slot that it left."""
    for index in (0, 1):
        check.expected[f"logits{index}"] = check.expected[f"logits{index}"][:4]
        check.expected[f"greedy{index}"] = check.expected[f"greedy{index}"][:3]
    first = check.decode("decode", 0, 0, check.prefill("prefill", 0, 0, 8))
    second = check.decode("churn", 0, 1, check.prefill("churn", 0, 1, 8))
    return {
        "worst": check.worst,
        "greedy": {"decode": check.greedy_equal(first, 0), "churn": check.greedy_equal(second, 1)},
    }


if __name__ == "__main__":
    out, word, *rest = sys.argv[1:]
    extent, models = (rest[0], rest[1:]) if rest else ("brief", [])
    Path(out).write_text(json.dumps(main(word, extent, models)))

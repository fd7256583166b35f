"""With one slot kernels need not know which slot a row is in: they must not be given it in another buffer's place."""

from __future__ import annotations

import pytest

from engine.protocol import Configure, Load, Loaded, LoadFailed, Ready
from tests.engine.conftest import CACHE, DEVICE
from tests.engine.family_checks import FIXTURES
from tests.engine.harness import EngineProcess


@pytest.mark.process
def test_one_slot_says_what_several_say() -> None:
    texts = []
    with EngineProcess(Configure(worker_id="w", device=DEVICE, cache_dir=str(CACHE))) as engine:
        engine.wait_type(Ready, timeout_s=120)
        for slots in (3, 1):
            name = f"q{slots}"
            at = len(engine.seen)
            engine.send(
                Load(model=name, path=str(FIXTURES / "qwen3"), family="qwen3", context=128, slots=slots)
            )
            assert isinstance(engine.wait_type(Loaded, LoadFailed, timeout_s=120, start=at), Loaded)
            for run in range(3):
                engine.run(f"{name}/{run}", model=name, prompt="the moon", max_tokens=12, temperature=0.0)
                engine.wait_end(f"{name}/{run}")
                texts.append(engine.text(f"{name}/{run}"))
    assert texts[0]
    assert set(texts) == {texts[0]}

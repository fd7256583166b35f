"""The device's thread: what ends a load, and what ends the engine during one."""

from __future__ import annotations

from typing import Any

import pytest

from engine import device
from engine.errors import LoadError
from engine.loading import LoadedModel
from engine.protocol import Configure, Load, LoadFailed, Message, RunFailed
from engine.runner import Engine
from tests.engine.family_checks import FIXTURES


class Short:
    """Stands for the runs of a loaded model: the memory ends in its step."""

    prefilling, active, busy = False, 1, True

    def step(self, room: int) -> list[Message]:
        raise MemoryError

    def fail_all(self, code: str, message: str) -> list[Message]:
        return [RunFailed(run_id="r", code=code, message=message, retryable=True)]


class Sent:
    """Stands for the peer."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, *messages: Message) -> None:
        self.messages += messages


def test_a_step_that_fails_during_a_load_is_not_the_loads_failure() -> None:
    """The step is half done: the engine ends, as it does of any step's failure, whatever the load made of it."""
    sent: Any = Sent()
    engine = Engine(Configure(worker_id="w", device="CPU"), device.parse("CPU"), 0, sent)
    serving: Any = Short()
    graphs: Any = None
    loaded: Any = None
    engine._models["other"] = LoadedModel(serving, graphs, loaded)
    load = Load(model="m", path=str(FIXTURES / "llama3"), family="llama", context=128, slots=1)
    with pytest.raises(LoadError, match="memory ended"):
        engine._load(load)
    assert not [message for message in sent.messages if isinstance(message, LoadFailed)]


def test_a_load_that_fails_by_itself_is_told() -> None:
    sent: Any = Sent()
    engine = Engine(Configure(worker_id="w", device="CPU"), device.parse("CPU"), 0, sent)
    engine._load(Load(model="m", path="/nowhere", family="llama"))
    (failed,) = sent.messages
    assert (failed.model, failed.code) == ("m", "bad_model_file")

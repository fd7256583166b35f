"""A peer's end of an engine process, blocking and small: for tests only."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from engine.protocol import SOCKET_ENV, Configure, Frames, Hello, Message, Run, encode

REPOSITORY = Path(__file__).resolve().parents[2]


class EngineProcess:
    """Starts `python -m engine` and talks to it. `seen` keeps every message in the order of arrival.

    Its log goes to `log`, else to a pipe that nobody reads: enough for a test's few lines.
    """

    def __init__(
        self, configure: Configure | None = None, hello: Hello | None = None, log: IO[bytes] | None = None
    ) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {SOCKET_ENV: str(theirs.fileno())}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine"],
            cwd=REPOSITORY,
            env=environment,
            pass_fds=[theirs.fileno()],
            stderr=log or subprocess.PIPE,
        )
        theirs.close()
        self.sock = ours
        self.frames = Frames("peer")
        self.seen: list[Any] = []
        self.send(hello or Hello(product="test"))
        if configure is not None:
            self.send(configure)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        try:
            self.process.wait(5)
        finally:
            self.process.kill()
            self.process.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()

    def send(self, *messages: Message) -> None:
        self.sock.sendall(b"".join(encode(message) for message in messages))

    def run(self, run_id: str, model: str = "m", **parameters: Any) -> None:
        self.send(Run(run_id=run_id, model=model, task_type="text_generation", parameters=parameters))

    def receive(self, timeout_s: float) -> bool:
        """Read once into `seen`. False at end of stream; TimeoutError when nothing came."""
        if not select.select([self.sock], [], [], max(0.0, timeout_s))[0]:
            raise TimeoutError(f"nothing in {timeout_s:.1f} s; seen {self.seen[-5:]}")
        data = self.sock.recv(65536)
        self.seen.extend(self.frames.feed(data))
        return bool(data)

    def wait_for(self, want: Callable[[Any], bool], timeout_s: float = 10.0, start: int = 0) -> Any:
        """The first message from `seen[start:]` on that `want` accepts."""
        deadline = time.monotonic() + timeout_s
        at = start
        while True:
            while at < len(self.seen):
                if want(self.seen[at]):
                    return self.seen[at]
                at += 1
            if not self.receive(deadline - time.monotonic()):
                raise EOFError(f"the engine left; seen {self.seen[-5:]}")

    def wait_type(self, *kinds: type, timeout_s: float = 10.0, start: int = 0) -> Any:
        return self.wait_for(lambda message: isinstance(message, kinds), timeout_s, start)

    def of_run(self, run_id: str) -> list[Any]:
        return [message for message in self.seen if getattr(message, "run_id", None) == run_id]

    def wait_end(self, run_id: str, timeout_s: float = 60.0) -> Any:
        """`Finished` or `RunFailed` of a run."""
        kinds = ("Finished", "RunFailed")
        return self.wait_for(lambda m: type(m).__name__ in kinds and m.run_id == run_id, timeout_s)

    def text(self, run_id: str) -> str:
        return "".join(m.text for m in self.of_run(run_id) if type(m).__name__ == "Tokens")

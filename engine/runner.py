"""The real engine's loop."""

from __future__ import annotations

import socket
from typing import NoReturn

from engine.process import refuse
from engine.protocol import Configure, Frames


def serve(sock: socket.socket, configure: Configure, frames: Frames, waiting: list[object]) -> NoReturn:
    """Serve one device."""
    refuse(sock, "not_built", "only the stand-in engine is here")

"""`python -m engine`: the process that owns one device. Started by a peer, see `engine.protocol`.

`Configure.device` decides which engine runs; "fake" never imports numpy or tinygrad.
"""

from __future__ import annotations

from engine.process import die_with_parent, greet, inherited_socket


def main() -> None:
    """Greet the peer, then serve it until it shuts the engine down or goes away."""
    die_with_parent()
    sock = inherited_socket()
    configure, frames, waiting = greet(sock, "bitinglip-engine")
    if configure.device == "fake":
        from engine.fake.engine import FakeEngine

        FakeEngine(sock, configure, frames).serve(waiting)
    else:
        from engine.runner import serve

        serve(sock, configure, frames, waiting)


if __name__ == "__main__":
    main()

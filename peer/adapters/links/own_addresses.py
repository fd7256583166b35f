"""How other hosts reach this one, as far as it can tell by itself: what a certificate is made for if nobody says."""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from typing import Final

import trio

from peer.state.enrol import is_address

RESOLVE_S_MAX: Final = 2.0
# Addresses for documentation: a route to them is one to the outside, and nothing is sent to find it.
_OUTSIDE: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def own_address() -> str:
    """The address that a connection to the outside would come from; 127.0.0.1 if there is no way out."""
    for family, outside in _OUTSIDE:
        with suppress(OSError), closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.connect((outside, 9))
            return str(probe.getsockname()[0])
    return "127.0.0.1"


async def own_names() -> tuple[str, ...]:
    """This host's name, if it resolves here; whether it does elsewhere is not known."""
    name = socket.gethostname()
    if name == "localhost" or not is_address(name):
        return ()
    with trio.move_on_after(RESOLVE_S_MAX), suppress(OSError):
        await trio.socket.getaddrinfo(name, None)
        return (name,)
    return ()

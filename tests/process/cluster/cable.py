"""A long cable between a host and the switch: every frame arrives later, in order: `python cable.py DELAY_S PORT END`.

In the switch's namespace PORT is the host's side and END the switch's, both unplugged from each other. This kernel has
no netem. With PACKET_VNET_HDR frames go on as they come, also those whose checksum is still to be made or which are
larger than what a wire carries.
"""

import contextlib
import select
import socket
import sys
import time
from collections import deque

SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
ETH_P_ALL = 3
FRAME_BYTES_MAX = 128 * 1024
QUEUE_FRAMES_MAX = 20_000


def opened(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * 1024 * 1024)
    end.bind((interface, ETH_P_ALL))
    end.setblocking(False)
    return end


def carry(delay_s: float, one: socket.socket, other: socket.socket) -> None:
    opposite = {one: other, other: one}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # the port is down or full: a lost frame
                target.send(frame)
        readable, _, _ = select.select([one, other], [], [], waiting[0][0] - now if waiting else None)
        due = time.monotonic() + delay_s
        for source in readable:
            try:
                frame = source.recv(FRAME_BYTES_MAX)
            except OSError:
                continue
            if len(waiting) < QUEUE_FRAMES_MAX:
                waiting.append((due, opposite[source], frame))


if __name__ == "__main__":
    ends = opened(sys.argv[2]), opened(sys.argv[3])
    print("carrying", flush=True)
    carry(float(sys.argv[1]), *ends)

"""Becomes another program that ends with the process that started it: `python -I -S child_start.py PID PROGRAM …`.

A file of its own, without imports of the product: it runs for some milliseconds before each start of a child. What
asks the kernel for the signal has to be the child itself, after it was made and before it is the other program.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it went in between
        os._exit(0)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

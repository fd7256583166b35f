"""python -m simulations: the same as `bitinglip simulate`."""

from __future__ import annotations

import sys

from peer.cli import main

if __name__ == "__main__":
    sys.exit(main(["simulate", *sys.argv[1:]]))

"""`.venv/bin/python -m tests.bench.cluster`: measure a cluster, print a table, write the numbers as JSON. Needs root.

    --only NAME     one of failover, loss, accept, footprint, soak; may be repeated
    --seconds S     length of each measured window of `accept` (3)
    --json FILE     all raw numbers, versions, the machine
    --quick         few rounds, and a soak of a minute

Exit status 0 whatever the figures are; 1 when something could not be measured; 128 + signal when ended.
"""

from __future__ import annotations

import sys

from tests.bench.__main__ import main

MEASURES = ("failover", "loss", "accept", "footprint", "soak")

if __name__ == "__main__":
    sys.exit(main("tests.bench.cluster", MEASURES, __doc__.split("\n")[0]))

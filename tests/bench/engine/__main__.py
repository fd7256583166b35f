"""`.venv/bin/python -m tests.bench.engine`: measure the engine, print a table, write the numbers as JSON.

    --only NAME     one of speed, latency, serve, start, perplexity; may be repeated
    --json FILE     all raw numbers, versions, the machine
    --quick         one short round of everything
    --seconds S     length of each measured window of the machine's own limits (3)

Exit status 0 whatever the figures are; 1 when something could not be measured; 128 + signal when ended.
"""

from __future__ import annotations

import sys

from tests.bench.__main__ import main

MEASURES = ("speed", "latency", "serve", "start", "perplexity")

if __name__ == "__main__":
    sys.exit(main("tests.bench.engine", MEASURES, __doc__.split("\n")[0]))

"""Peers for a test; they and their engines are gone when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.peers import Peers, running_peers


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    with running_peers(tmp_path) as made:
        yield made

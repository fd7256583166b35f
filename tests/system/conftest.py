"""One peer for a module's tests: the full product, over its real API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.process.peers import Peers, running_peers


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    with running_peers(tmp_path_factory.mktemp("peers")) as made:
        yield made

"""Real faults on a real cluster, while clients go on: no promise is broken. One cluster bears them one by one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.process.cluster import scenarios
from tests.process.cluster.cluster import Cluster, cluster
from tests.process.cluster.hosts import unusable
from tests.process.cluster.round import perform
from tests.process.cluster.scenarios import Scenario

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(unusable()), reason=unusable())]

SIZE = 3
SEED = 20_250_530


class Kept:
    """The cluster that goes from test to test. One that a test has left broken is made anew."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._stack = ExitStack()
        self._made: Cluster | None = None

    def take(self) -> Cluster:
        if self._made is None:
            made = self._stack.enter_context(cluster(self._folders.mktemp("cluster"), SIZE))
            made.begin_traffic(SEED)
            return made
        made, self._made = self._made, None
        return made

    def give_back(self, made: Cluster) -> None:
        """It is whole."""
        self._made = made

    def close(self) -> None:
        self._made = None
        self._stack.close()
        self._stack = ExitStack()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    made = Kept(tmp_path_factory)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def whole(kept: Kept, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = kept.take()
    failed = request.session.testsfailed
    yield made
    if request.session.testsfailed == failed:
        kept.give_back(made)
    else:
        kept.close()


@pytest.mark.parametrize("scenario", scenarios.ALL, ids=lambda scenario: scenario.name.replace(" ", "-"))
def test_no_promise_is_broken(whole: Cluster, scenario: Scenario) -> None:
    done = perform(whole, scenario, random.Random(f"{SEED}/{scenario.name}"))
    print(done)
    assert done.tasks > 0


def test_everything_is_there_at_the_end(whole: Cluster) -> None:
    whole.end_traffic()
    whole.check_all_kept()
    assert whole.history.acknowledged()

"""Whether a cluster kept its promises: of tasks, by what its clients were told; of leadership, by its peers' logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from simulations import linear
from simulations.errors import SimulatorError
from tests.process.cluster.history import History, Told

ATTEMPTS_MAX: Final = 3
ELECTED: Final = ("elected", "leading")


def tasks(history: History) -> tuple[int, int]:
    """Check what has ended, and close it: (tasks, of them attempts more than one each). Fails with what is wrong."""
    ended = history.ended()
    problems = list(history.broken)
    more = 0
    for told in ended:
        problems += of_task(told)
        assert told.final is not None
        more += max(0, told.final["attempt"] - 1)
        history.close(told)
    assert not problems, "\n".join(problems[:20])
    return len(ended), more


def of_task(told: Told) -> list[str]:
    """What is wrong with one that has ended."""
    final = told.final
    assert final is not None
    problems = []
    if final["attempt"] > ATTEMPTS_MAX:
        problems.append(f"{told.task_id}: {final['attempt']} attempts")
    if final["status"] == "completed" and final["result"]["generated_text"] != told.prompt:
        problems.append(f"{told.task_id} has another one's result: {final}")
    if final["status"] == "failed" and final["error"]["code"] != "attempts_exhausted":
        problems.append(f"{told.task_id} failed of what was not done to it: {final['error']}")
    if final["status"] == "cancelled" and not any(each.kind == "cancel" for each in told.operations):
        problems.append(f"{told.task_id} is cancelled, and nobody has asked for it")
    try:
        violation = linear.check(told.operations)
    except SimulatorError as error:
        return [*problems, f"{told.task_id}: {error}"]
    return problems if violation is None else [*problems, str(violation)]


def leaders(logs: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[int, str]:
    """The leader of each epoch, by the records of each peer in their order. Fails if an epoch has two, or falls."""
    found: dict[int, str] = {}
    for peer, lines in logs.items():
        last = 0
        for line in lines:
            if line.get("event") not in ELECTED:
                continue
            epoch = int(line["epoch"])
            assert epoch >= last, f"{peer} leads in epoch {epoch} after {last}"
            assert found.setdefault(epoch, peer) == peer, (
                f"epoch {epoch} has two leaders: {found[epoch]} and {peer}"
            )
            last = epoch
    return found


def agreed(statuses: Sequence[Mapping[str, Any]]) -> tuple[str, int] | None:
    """(leader, epoch) if all these answers of GET /cluster/status name the same one."""
    named = {(status.get("leader"), status.get("epoch")) for status in statuses}
    if len(named) != 1:
        return None
    leader, epoch = named.pop()
    return (leader, epoch) if leader and epoch else None

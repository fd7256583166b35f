"""A cluster of real peers, one on each host of a test's network: made as an operator makes it, and watched.

`Cluster.up` founds it on the first host and lets the others join with tokens; `settle` waits until it is whole again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx

from tests.process.cluster import check, stores
from tests.process.cluster.clients import Caller, Clients
from tests.process.cluster.faults import Faults
from tests.process.cluster.history import FINISHED, History
from tests.process.cluster.hosts import DISK_BYTES, Network, network
from tests.process.cluster.member import ASK_S_MAX, LINK, POLL_S, TOKENS_PER_S, Member
from tests.process.peers import poll, submission

NAME: Final = "chaos"
SETTLE_S_MAX: Final = 60.0
VOTERS: Final = 3
SHOWN_MAX: Final = 20  # broken promises


class Cluster:
    """Usage: `with cluster(folder, 3) as made`. Clients run from `begin_traffic` on."""

    def __init__(self, net: Network, size: int, disk_bytes: int, tokens_per_s: float) -> None:
        self.net = net
        self.faults = Faults(net)
        self.members = [Member(net.add(disk_bytes), tokens_per_s) for _ in range(size)]
        self.history = History()
        self.key = ""
        self._clients: Clients | None = None
        self._caller: Caller | None = None  # this test's own
        self._probes = 0
        self._http = httpx.Client(timeout=ASK_S_MAX, trust_env=False)

    # ---------------------------------------------------------------- making it

    def up(self) -> None:
        first, *others = self.members
        first.prepare()
        first.bitinglip(
            "init", "--cluster", NAME, "--advertise", first.host.address, "--data-dir", str(first.data)
        )
        first.start()
        first.await_ready()
        poll("the first peer has its admin key", lambda: first.has("admin.key"))
        self.key = first.read("admin.key")
        self._caller = Caller([member.url for member in self.members], self.key)
        for member in others:
            self.join(member)
        self.settle()

    def join(self, member: Member) -> None:
        first = self.members[0]
        token = first.bitinglip("token")["token"]
        address = member.host.address
        member.prepare()
        member.bitinglip("join", f"{first.host.address}:{LINK}", "--token", token, "--advertise", address)
        member.start()
        member.await_ready()

    def begin_traffic(self, seed: int) -> None:
        self._clients = Clients([member.url for member in self.members], self.key, self.history, seed)
        self._clients.start()

    def end_traffic(self) -> None:
        if self._clients is not None:
            clients, self._clients = self._clients, None
            clients.stop()

    def close(self) -> None:
        """End the clients and print the logs, which pytest shows when the test has failed."""
        try:
            self.faults.thaw()
            self.end_traffic()
        finally:
            self._http.close()
            if self._caller is not None:
                self._caller.close()
            for member in self.members:
                print(f"---- end of the log of {member.host.name} ({member.peer_id})\n{member.log_end()}")

    # ---------------------------------------------------------------- seeing it

    def get(self, member: Member, path: str) -> Any:
        """The answer's body; None if there is none, or not 200."""
        try:
            answer = self._http.get(member.url + path, headers={"Authorization": f"Bearer {self.key}"})
            return answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None

    def leader(self) -> Member:
        """Whom all name now; waits for that."""
        found = poll("one leader is agreed", self._leader, SETTLE_S_MAX, POLL_S)
        assert found is not None
        return found

    def followers(self) -> list[Member]:
        leader = self.leader()
        return [member for member in self.members if member is not leader]

    def epoch(self) -> int:
        statuses = self._statuses()
        return max((int(status["epoch"] or 0) for status in statuses), default=0)

    def _statuses(self) -> list[dict[str, Any]]:
        found = (self.get(member, "/cluster/status") for member in self.members)
        return [status for status in found if status is not None]

    def _leader(self) -> Member | None:
        statuses = self._statuses()
        named = check.agreed(statuses) if len(statuses) == len(self.members) else None
        if named is None:
            return None
        return next((member for member in self.members if member.peer_id == named[0]), None)

    # ---------------------------------------------------------------- whole again

    def settle(self, within_s: float = SETTLE_S_MAX) -> None:
        """Heal everything, start what was killed, and wait until every peer serves, all agree, and tasks have ended."""
        self.faults.heal()
        for member in self.members:
            if not member.runs:
                member.start()
        deadline = time.monotonic() + within_s

        def left() -> float:
            return max(1.0, deadline - time.monotonic())

        for member in self.members:
            member.await_ready(left())
        poll("one leader is agreed", self._leader, left(), POLL_S)
        poll("all workers are online", self._all_online, left(), POLL_S)
        poll("all are voters", self._all_vote, left(), POLL_S)
        for member in self.voters():
            poll(f"the store of {member.host.name} answers", partial(stores.answers, member), left(), POLL_S)
        self.await_tasks(left())

    def _all_online(self) -> bool:
        found = self.get(self.members[0], "/workers")
        return found is not None and found["online"] >= len(self.members)

    def voters(self) -> list[Member]:
        """Those whose store members vote and whose peers are there, as the leader says."""
        status = self.get(self.members[0], "/cluster/status") or {}
        voting = {
            each["peer_id"] for each in status.get("voters", ()) if each["linked"] and not each["learner"]
        }
        return [member for member in self.members if member.peer_id in voting]

    def _all_vote(self) -> bool:
        wanted = VOTERS if len(self.members) >= VOTERS else 1  # of two hosts one votes
        return len(self.voters()) >= wanted

    def await_tasks(self, within_s: float = SETTLE_S_MAX) -> None:
        """All that is acknowledged by now comes to its end, as every peer in turn says."""
        pending = self.history.waiting()
        deadline = time.monotonic() + within_s
        for number, told in enumerate(pending):
            member = self.members[number % len(self.members)]
            poll(
                f"{told.task_id} ends, as {member.host.name} sees it",
                partial(self._has_ended, member, told.task_id, told.key),
                max(1.0, deadline - time.monotonic()),
                POLL_S,
            )

    def _has_ended(self, member: Member, task_id: str, key: str) -> bool:
        assert self._caller is not None
        answer = self._caller.call(self.members.index(member), "GET", f"/tasks/{task_id}")
        self.history.read("settling", key, answer)
        assert not self.history.broken, "\n".join(self.history.broken[:SHOWN_MAX])
        return answer.status == 200 and answer.body["status"] in FINISHED

    def check(self) -> tuple[int, int]:
        """(tasks, attempts beyond the first) since the last check. Fails with what is wrong."""
        self.leaderships()
        return check.tasks(self.history)

    def leaderships(self) -> dict[int, str]:
        """Who led in each epoch until now."""
        return check.leaders({member.peer_id: member.log_lines() for member in self.members})

    def check_all_kept(self) -> None:
        """Every task that ever was acknowledged is there, as it was, on a peer by turns."""
        for number, told in enumerate(self.history.acknowledged()):
            member = self.members[number % len(self.members)]
            poll(
                f"{told.task_id} is there",
                partial(self._has_ended, member, told.task_id, told.key),
                10.0,
                POLL_S,
            )
        check.tasks(self.history)

    def submits(self, member: Member) -> bool:
        """Whether this peer acknowledges a task now."""
        assert self._caller is not None
        self._probes += 1
        key = f"probe-{self._probes}"
        self.history.begin(key, key)
        peer, headers = self.members.index(member), {"Idempotency-Key": key}
        answer = self._caller.call(peer, "POST", "/tasks", json=submission(key), headers=headers)
        return bool(self.history.submitted("probe", key, answer))

    def check_fencing(self, member: Member, over: int) -> None:
        """What a leader of an epoch that is over writes at this host's store is refused; the leader's is not."""
        assert not stores.takes_write(member, over), f"a write of epoch {over}, which is over, was taken"
        assert stores.takes_write(member, self.epoch()), "nobody can write at all"


@contextmanager
def cluster(
    folder: Path, size: int = 3, *, disk_bytes: int = DISK_BYTES, tokens_per_s: float = TOKENS_PER_S
) -> Iterator[Cluster]:
    """A cluster that is up, for the body of the `with`; nothing is left of it after. `disk_bytes` as of hosts.Host."""
    with network(folder) as net:
        made = Cluster(net, size, disk_bytes, tokens_per_s)
        try:
            made.up()
            yield made
        finally:
            made.close()

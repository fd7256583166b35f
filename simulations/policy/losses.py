"""Who may be declared lost, by the checker's own books: what arrived when, who slept, and how many at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from peer.limits import LOSS_CONFIRM_S, LOSS_WINDOW_S, RELINK_S, STARVED_S, WORKER_SILENT_S
from peer.state.snapshot import Linked, Lose, Rumoured, Snapshot
from peer.state.worker import WorkerReport


class Checks(Protocol):
    @property
    def now(self) -> float: ...
    def check(self, name: str, holds: bool, message: str = "") -> None: ...
    def saw(self, name: str) -> None: ...


class Losses:
    """Books of one leadership. Times are the leader's wall clock; those of arrivals are virtual time."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self.begin(0.0)

    def begin(self, at: float) -> None:
        self._began = self._ticked_at = at
        self._woke_at = 0.0  # after the leader's last sleep
        self._dead: dict[str, None] = {}  # peers that were silent before it
        self._known: Iterable[str] = ()
        self._heard: dict[str, float] = {}  # by worker
        self._peer_heard: dict[str, float] = {}
        self._unlinked: dict[str, float] = {}
        self._failed: dict[str, float] = {}  # gossip says so, since
        self._declared: list[tuple[float, str, bool]] = []
        self._arrived: dict[str, float] = {}  # the oldest report that waits for the leader to look

    # ------------------------------------------------------------ what comes in

    def ticked(self, now: float, snapshot: Snapshot) -> None:
        self._known = snapshot.peers
        if now - self._ticked_at > STARVED_S:
            self._dead.update(
                (p, None) for p in self._known if self._silence_s(p, self._ticked_at) > WORKER_SILENT_S
            )
            self._woke_at = now
            self._unlinked = dict.fromkeys(self._unlinked, now)
            self._checks.saw("leader slept")
        self._ticked_at = now

    def arrived(self, peer_id: str, now: float) -> None:
        self._arrived.setdefault(peer_id, now)

    def heard(self, report: WorkerReport, now: float, snapshot: Snapshot) -> None:
        self._heard[report.worker_id] = self._peer_heard[report.peer_id] = now
        self._arrived.pop(report.peer_id, None)
        self._dead.pop(report.peer_id, None)
        self._unlinked.pop(report.peer_id, None)
        if report.peer_id in snapshot.lost:
            self._checks.saw("lost peer came back")

    def alive(self, peer_id: str, now: float, snapshot: Snapshot) -> None:
        text = f"{peer_id} was declared lost while it was there"
        self._checks.check("a sleeping leader blames nobody", peer_id not in snapshot.lost, text)
        self._peer_heard[peer_id] = now
        self._dead.pop(peer_id, None)
        for worker_id in snapshot.peers[peer_id]:
            if worker_id in self._heard:
                self._heard[worker_id] = now

    def linked(self, change: Linked) -> None:
        if change.up:
            self._unlinked.pop(change.peer_id, None)
        else:
            self._unlinked[change.peer_id] = change.at

    def rumoured(self, change: Rumoured) -> None:
        if change.status in ("failed", "left"):
            self._failed[change.peer_id] = change.at
        else:
            self._failed.pop(change.peer_id, None)

    # ------------------------------------------------------------ what is judged

    def there(self, snapshot: Snapshot, worker_id: str) -> bool:
        """Whether it may get a task: nothing is said against it, and at the last tick it was not silent."""
        peer_id = snapshot.workers[worker_id].peer_id
        if peer_id in snapshot.lost or peer_id in self._unlinked or worker_id not in self._heard:
            return False
        return self._ticked_at - self._heard[worker_id] <= WORKER_SILENT_S or (
            worker_id in snapshot.listened and self._ticked_at - self._woke_at <= WORKER_SILENT_S
        )

    def _silence_s(self, peer_id: str, now: float) -> float:
        return now - max(self._peer_heard.get(peer_id, self._began), self._woke_at)

    def _confirmed(self, peer_id: str, now: float) -> bool:
        since = self._peer_heard.get(peer_id, self._began)
        return self._silence_s(peer_id, now) > LOSS_CONFIRM_S or self._failed.get(peer_id, 0.0) > since

    def _unconfirmed(self, now: float) -> list[str]:
        """Declared lost not long ago, and still by nothing but the evidence itself."""
        self._declared = [each for each in self._declared if now - each[0] < LOSS_WINDOW_S]
        return [p for _, p, confirmed in self._declared if not confirmed and not self._confirmed(p, now)]

    @staticmethod
    def _allowed(snapshot: Snapshot) -> int:
        known = {worker.peer_id for worker in snapshot.workers.values()}
        return max(1, int(snapshot.policy.lost_share_max * len(known)))

    def lost(self, change: Lose, snapshot: Snapshot, now: float) -> None:
        peer_id = change.peer_id
        session = now - self._unlinked.get(peer_id, now) > RELINK_S
        silence_s = self._silence_s(peer_id, now)
        silent = silence_s > WORKER_SILENT_S or peer_id in self._dead
        text = f"{peer_id} was heard {silence_s:.1f} s ago: {change.because}"
        self._checks.check("nobody is lost without evidence", session or silent, text)
        confirmed = self._confirmed(peer_id, now)
        if not session:
            waits_s = self._checks.now - self._arrived.get(peer_id, self._checks.now)
            text = f"{peer_id}: its report has waited for {waits_s:.1f} s"
            self._checks.check("a sleeping leader blames nobody", waits_s <= STARVED_S + 1.0, text)
        self._checks.saw(f"peer lost by its {'session' if session else 'silence'}")
        if confirmed and silence_s <= LOSS_CONFIRM_S:
            self._checks.saw("loss confirmed by gossip")
        self._declared.append((now, peer_id, confirmed))
        count, allowed = len({*self._unconfirmed(now)}), self._allowed(snapshot)
        text = f"{count} of at most {allowed} within {LOSS_WINDOW_S:g} s"
        self._checks.check("not too many are lost at once", confirmed or count <= allowed, text)

    def timely(self, snapshot: Snapshot, now: float, late: float) -> None:
        """Whoever gave evidence long enough ago is lost, unless too many are; the lost hold no task."""
        heard, least = self._peer_heard, max(self._began, self._woke_at)
        silence = {
            p: now - max(heard.get(p, least), least) for p, workers in snapshot.peers.items() if workers
        }
        # A leader that slept gives those without a session their time anew, from when it woke.
        unlinked = {p: now - max(self._unlinked.get(p, now), least) for p in silence}
        suspects = [
            p for p, silence_s in silence.items() if silence_s > WORKER_SILENT_S or unlinked[p] > RELINK_S
        ]
        if not suspects:
            return
        over = [p for p in suspects if silence[p] > WORKER_SILENT_S + late or unlinked[p] > RELINK_S + late]
        spare = self._allowed(snapshot) - len({*suspects, *self._unconfirmed(now)})
        for peer_id in over:
            is_lost = peer_id in snapshot.lost
            due = spare >= 0 or silence[peer_id] > LOSS_CONFIRM_S + late
            text = f"{peer_id}, silent for {silence[peer_id]:.1f} s"
            self._checks.check("a dead peer is lost in time", is_lost or not due, text)
            if not is_lost:
                self._checks.saw("loss put off by the share")
                continue
            for worker_id in snapshot.peers[peer_id]:
                held = snapshot.held.get(worker_id, {})
                old = [i for i, t in held.items() if now - (t.assigned_at or 0.0) > late]
                text = f"{worker_id} holds {old[:3]}"
                self._checks.check("a lost worker's tasks are re-queued", not old, text)

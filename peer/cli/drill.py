"""`bitinglip drill`: a failover on the owner's own cluster, measured as its clients feel it and held to the promise.

No user's data is touched. The leader's drill writes API keys that can read, end in an hour and are revoked at once; the
worker's drill runs tasks of its own and cancels them.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from peer.cli.common import client_options, emit_object, json_option, say, shown, table
from peer.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from peer.cli.client import Client

OWNER: Final = "bitinglip-drill"
HANDED_OVER_S_MAX: Final = 2.0
CRASH_S_MAX: Final = 5.0
RUNS_ELSEWHERE_S_MAX: Final = 3.0
HEIR_S_MAX: Final = 5.0
BEFORE: Final = 6  # writes, to see how fast they are
AFTER: Final = 4  # under the next leader
PAUSE_S: Final = 0.05
CRASH_PAUSE_S: Final = 0.2
CRASH_WAIT_S_MAX: Final = 90.0  # for whoever is to end the leader's process
PROBES_MAX: Final = 16
PROBE_S_MAX: Final = 60.0
RESTART_S_MAX: Final = 600.0
POLL_S: Final = 0.05


class Measured(NamedTuple):
    """A row of the answer. `promise_s` None: it is shown for information."""

    what: str
    promise_s: float | None
    measured_s: float

    @property
    def ok(self) -> bool:
        return self.promise_s is None or self.measured_s <= self.promise_s


@click.group()
def drill() -> None:
    """Measure a failover on this cluster, safely."""


# ---------------------------------------------------------------- the leader


@drill.command()
@click.option("--crash", is_flag=True, help="Measure while you kill the leader's process yourself.")
@json_option
@client_options
def leader(client: Client, crash: bool, as_json: bool) -> int:
    """Hand the leadership over under a light stream of writes, and measure how long none was acknowledged.

    A hand-over is faster than a crash: the leader lets go between two commits, and the others need not first make sure
    that it is gone. For a crash, ask a peer that does not lead, with --crash, and kill the leader's process within
    90 s, on its host: systemctl kill --signal=KILL bitinglip (systemd starts it again).
    """
    before = _status_with_an_heir(client)
    writes = _Writes(client, CRASH_PAUSE_S if crash else PAUSE_S)
    try:
        writes.go_on(BEFORE)
        usual_s = writes.longest_pause_s()
        if crash:
            _await_crash(client, writes, before)
        else:
            _hand_over(client, writes)
        writes.go_on(AFTER)
        after = client.get("/cluster/status").data
    finally:
        writes.clean_up()
    if after["epoch"] == before["epoch"]:
        raise CliError(f"{shown(before['leader'])} still leads: nothing was measured", Exit.FAILED)
    rows = [
        Measured("the leader crashes", CRASH_S_MAX, writes.longest_pause_s())
        if crash
        else Measured("the leader hands over", HANDED_OVER_S_MAX, writes.longest_pause_s()),
        Measured("before: longest pause between writes", None, usual_s),
    ]
    if not as_json:
        print(f"{shown(before['leader'])} led, {shown(after['leader'])} leads now")
        print(f"{len(writes.acknowledged)} writes acknowledged, {writes.refused} refused or not known\n")
    code = _tell(
        rows,
        as_json,
        leader_before=before["leader"],
        leader_after=after["leader"],
        acknowledged=len(writes.acknowledged),
        refused=writes.refused,
    )
    if not crash and not as_json:
        say(
            "a crash takes longer, 3 s in the median and 5 s at worst: `bitinglip drill leader --crash` measures it"
        )
    return code


def _status_with_an_heir(client: Client) -> dict[str, Any]:
    """A leader that has just begun may not know yet who else is there. Raises CliError."""
    end = time.monotonic() + HEIR_S_MAX
    while True:
        status: dict[str, Any] = client.get("/cluster/status").data
        voters = [each for each in status["voters"] if not each["learner"]]
        if not voters or sum(each["linked"] for each in voters) >= 2:  # none: others run the store
            return status
        if time.monotonic() > end:
            raise CliError("no other voter is up: nobody else could lead", Exit.CONFLICT)
        time.sleep(POLL_S)


def _hand_over(client: Client, writes: _Writes) -> None:
    """In a thread of its own, while the writes go on."""
    problem: list[CliError] = []

    def ask() -> None:
        from peer.cli.client import Client

        try:
            with Client(client.target) as other:
                other.post("/cluster/leadership/transfer", None)
        except CliError as error:
            problem.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive():
        writes.go_on(1)
    asking.join()
    if problem:
        raise problem[0]


def _await_crash(client: Client, writes: _Writes, before: dict[str, Any]) -> None:
    say(f"kill the peer of {shown(before['leader'])} now, within {CRASH_WAIT_S_MAX:g} s")
    end = time.monotonic() + CRASH_WAIT_S_MAX
    while time.monotonic() < end:
        writes.go_on(1)
        if client.get("/cluster/status").data["epoch"] != before["epoch"]:
            return
    raise CliError(f"{shown(before['leader'])} still leads after {CRASH_WAIT_S_MAX:g} s", Exit.FAILED)


class _Writes:
    """Keys are made and revoked in turn. `acknowledged` are the moments when the answers came."""

    def __init__(self, client: Client, pause_s: float) -> None:
        self._client = client
        self._pause_s = pause_s
        self._made = ""
        self.acknowledged: list[float] = []
        self.refused = 0

    def go_on(self, count: int) -> None:
        """So many more that are acknowledged. Raises CliError when none was for long."""
        wanted = len(self.acknowledged) + count
        end = time.monotonic() + PROBE_S_MAX
        while len(self.acknowledged) < wanted:
            try:
                self._write()
            except CliError as error:
                if error.code != Exit.BUSY or time.monotonic() > end:
                    raise
                self.refused += 1
            time.sleep(self._pause_s)

    def _write(self) -> None:
        if self._made:
            key, self._made = self._made, ""  # if it is not known whether it was revoked, `clean_up` looks
            self._client.request("DELETE", f"/keys/{key}")
        else:
            expires = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
            body = {"owner": OWNER, "scopes": ["read"], "expires_at": expires}
            self._made = self._client.post("/keys", body).data["key_id"]
        self.acknowledged.append(time.monotonic())

    def longest_pause_s(self) -> float:
        """Between two acknowledged writes."""
        return max(later - earlier for earlier, later in pairwise(self.acknowledged))

    def clean_up(self) -> None:
        """No key of a drill stays in force."""
        try:
            for key in self._client.get("/keys").data["keys"]:
                if key["owner"] == OWNER and key["revoked_at"] is None:
                    self._client.request("DELETE", f"/keys/{key['key_id']}")
        except CliError as error:
            say(f"keys of {OWNER} end within the hour; they could not be revoked: {error.message}")


# ---------------------------------------------------------------- a worker


@drill.command()
@click.argument("worker_id", required=False)
@click.option("--model", help="Else the first one that is loaded twice.")
@click.option("--yes", is_flag=True, help="Also if the worker runs other tasks, which then begin anew.")
@json_option
@client_options
def worker(client: Client, worker_id: str | None, model: str | None, yes: bool, as_json: bool) -> int:
    """Restart a worker's engine while a task runs on it, and measure until that task runs again.

    The task's model must be loaded on a second worker.
    """
    probes = _Probes(client, *_choose(client, worker_id, model))
    try:
        task = probes.one_that_runs()
        chosen = task["assigned_worker"]
        _require_idle(client, chosen, yes)
        from peer.cli.tasks import path_part

        began = time.monotonic()
        client.post(f"/workers/{path_part(chosen)}/restart", None)
        again = probes.runs_again(task)
        again_s = time.monotonic() - began
    finally:
        probes.clean_up()
    back_s = _await_back(client, chosen, began)
    rows = [
        Measured("its task runs again", RUNS_ELSEWHERE_S_MAX, again_s),
        Measured("the worker serves again", None, back_s),
    ]
    if not as_json:
        print(f"{shown(chosen)} was restarted; its task went on at {shown(again['assigned_worker'])}\n")
    return _tell(rows, as_json, worker=chosen, task_moved_to=again["assigned_worker"], model=probes.model)


def _choose(client: Client, worker_id: str | None, model: str | None) -> tuple[str, tuple[str, ...]]:
    """The model of the task, and the workers that may be restarted. Raises CliError."""
    up = {
        each["worker_id"]
        for each in client.get("/workers").data["workers"]
        if each["status"] in ("online", "busy")
    }
    for entry in client.get("/models").data["models"]:
        ready = {each["worker_id"] for each in entry["replicas"] if each["status"] == "loaded"} & up
        wanted = ready & {worker_id} if worker_id else ready
        if len(ready) >= 2 and wanted and model in (None, entry["name"]):
            return entry["name"], tuple(sorted(wanted))
    what = f"{model} is not" if model else "no model is"
    raise CliError(
        f"{what} loaded on {f'{worker_id} and a second worker' if worker_id else 'two workers'}",
        Exit.CONFLICT,
        "load it on a second one: bitinglip load MODEL --worker ID",
    )


def _require_idle(client: Client, worker_id: str, yes: bool) -> None:
    from peer.cli.tasks import path_part

    others = client.get(f"/workers/{path_part(worker_id)}").data["current_tasks"] - 1
    if others > 0 and not yes:
        raise CliError(
            f"{shown(worker_id)} runs {others} other tasks, which a restart begins anew",
            Exit.CONFLICT,
            "try again when it is idle, or with --yes",
        )


class _Probes:
    """Tasks of the drill's own."""

    def __init__(self, client: Client, model: str, workers: tuple[str, ...]) -> None:
        self.model = model
        self._client = client
        self._workers = workers
        self._submitted: list[str] = []

    def one_that_runs(self) -> dict[str, Any]:
        """A task that runs on one of the workers. Raises CliError if none came to run there."""
        for _ in range(PROBES_MAX):
            submitted = self._client.post(
                "/tasks",
                {
                    "task_type": "text_generation",
                    "model_name": self.model,
                    "parameters": {
                        "prompt": "Count as far as you can: one, two, three,",
                        "max_tokens": 1_000,
                    },
                },
            ).data
            self._submitted.append(submitted["task_id"])
            task = self._await(submitted["task_id"], lambda found: found["status"] != "queued")
            if task["status"] == "running" and task["assigned_worker"] in self._workers:
                return task
        raise CliError(
            f"none of {PROBES_MAX} tasks of {shown(self.model)} was seen running on {shown(self._workers)}",
            Exit.FAILED,
        )

    def runs_again(self, before: dict[str, Any]) -> dict[str, Any]:
        """The task in a later attempt."""
        after = self._await(
            before["task_id"],
            lambda found: (
                found["status"] not in ("queued", "running")
                or (found["status"] == "running" and found["attempt"] > before["attempt"])
            ),
        )
        if after["status"] == "failed":
            raise CliError(f"the task failed: {shown((after['error'] or {}).get('message'))}", Exit.FAILED)
        if after["attempt"] == before["attempt"]:
            raise CliError("the task had ended before the engine did: nothing was measured", Exit.FAILED)
        return after

    def _await(self, task_id: str, true: Any) -> dict[str, Any]:
        end = time.monotonic() + PROBE_S_MAX
        while time.monotonic() < end:
            found: dict[str, Any] = self._client.get(f"/tasks/{task_id}").data
            if true(found):
                return found
            time.sleep(POLL_S)
        raise CliError(f"{task_id} is {found['status']} after {PROBE_S_MAX:g} s", Exit.FAILED)

    def clean_up(self) -> None:
        for task_id in self._submitted:
            try:
                self._client.request("DELETE", f"/tasks/{task_id}")
            except CliError as error:
                if error.code != Exit.CONFLICT:  # it has ended
                    raise


def _await_back(client: Client, worker_id: str, began: float) -> float:
    """Seconds until the worker serves after its restart, which has begun."""
    from peer.cli.tasks import path_part

    while (elapsed_s := time.monotonic() - began) < RESTART_S_MAX:
        if client.get(f"/workers/{path_part(worker_id)}").data["status"] in ("online", "busy"):
            return elapsed_s
        time.sleep(POLL_S + elapsed_s / 20)
    raise CliError(f"{shown(worker_id)} does not serve again after {RESTART_S_MAX:.0f} s", Exit.FAILED)


# ---------------------------------------------------------------- the answer


def _tell(rows: list[Measured], as_json: bool, **more: Any) -> int:
    ok = all(row.ok for row in rows)
    if as_json:
        emit_object({"ok": ok, "rows": [{**row._asdict(), "ok": row.ok} for row in rows], **more})
    else:
        table(
            ("WHAT", ">PROMISED", ">MEASURED", ""),
            [
                (
                    row.what,
                    "" if row.promise_s is None else f"{row.promise_s:g} s at most",
                    f"{row.measured_s:.2f} s",
                    "" if row.promise_s is None else "ok" if row.ok else "NOT OK",
                )
                for row in rows
            ],
            empty="",
        )
    return Exit.OK if ok else Exit.FAILED

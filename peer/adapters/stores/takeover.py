"""A host goes on alone with what its member of the store has, when the members that made the quorum are lost.

A learner has what the voter has sent it. Started again without its voter it applies what its log says is committed and
then answers nobody; so its records are read from its file (`etcd_file`) and copied into a new cluster of one member,
whose revisions, and with them epochs, go on above any that the lost members can have given out.

DATA_DIR/migrating/etcd, takeover.json and the renames are those of `peer.adapters.stores.migration`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import trio

from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.stores.etcd_file import FILE, EtcdFile
from peer.adapters.stores.etcd_http import HttpPool, NoAnswer, NotSent
from peer.adapters.stores.etcd_member import METRICS, EtcdMember, MemberConfig
from peer.adapters.stores.migration import (
    ETCD,
    FILLING,
    TAKEOVER,
    MakeVoting,
    Marker,
    fill,
    put_aside,
    read_marker,
    sync,
    write_marker,
)
from peer.adapters.stores.store_copy import Progress
from peer.errors import ConfigError, Conflict, NotFound, StoreError, Unavailable

REVISIONS_SKIPPED: Final = (
    1_000_000_000  # more than the lost members can have made since: a day at ten thousand a second
)
EPOCH_FILE: Final = "epoch"  # in the cluster's folder
REPLACED: Final = "replaced"
REPLAY_S_MAX: Final = 120.0
STEADY_S: Final = 2.0  # nothing is applied any more
REACH_S_MAX: Final = 3.0
_POLL_S: Final = 0.2
_CALL_S_MAX: Final = 2.0
_TRIES: Final = 3
_APPLIED: Final = "etcd_server_proposals_applied_total"
_REVISION: Final = "etcd_debugging_mvcc_current_revision"


class Lost(NamedTuple):
    """Another member of the store, and where it was reached."""

    name: str
    urls: tuple[str, ...]


def lost_members(data_dir: Path) -> tuple[Lost, ...]:
    """All but this host's. Raises NotFound if this host has no member, StoreBroken if its file is damaged."""
    belonging = ClusterFiles(data_dir).belonging()
    path = data_dir / ETCD / FILE
    if belonging is None or not path.exists():
        raise NotFound(
            f"this host has no member of a cluster's store in {data_dir / ETCD}: there is nothing to take over"
        )
    with EtcdFile(path) as file:
        others = [member for member in file.members if member.name != belonging.peer_id]
    return tuple(Lost(member.name or "one that never started", member.peer_urls) for member in others)


async def reachable(lost: Sequence[Lost], ports: Sequence[int]) -> tuple[str, ...]:
    """Those HOST:PORT that take a connection, of the lost members' own and of their hosts with one of `ports`."""
    places = {(urlsplit(url).hostname or "", urlsplit(url).port or 0) for each in lost for url in each.urls}
    places |= {(host, port) for host, _ in places for port in ports}
    found: list[str] = []

    async def dial(host: str, port: int) -> None:
        with trio.move_on_after(REACH_S_MAX):
            try:
                stream = await trio.open_tcp_stream(host, port)
            except OSError:
                return
            await stream.aclose()
            found.append(f"{host}:{port}")

    async with trio.open_nursery() as nursery:
        for host, port in places:
            nursery.start_soon(dial, host, port)
    return tuple(sorted(found))


async def take_over(data_dir: Path, make_voting: MakeVoting, progress: Progress) -> Marker:
    """This host's member becomes the only one of a new store with its records. The caller holds the folder's lock.

    Raises NotFound, Conflict, Unavailable, StoreError.
    """
    files = ClusterFiles(data_dir)
    marker = read_marker(data_dir, TAKEOVER)
    if marker is None:
        lost = lost_members(data_dir)
        if not lost:
            raise Conflict(
                "this host's store has no other member: it needs no takeover, `bitinglip up` starts it"
            )
        shutil.rmtree(data_dir / FILLING, ignore_errors=True)
        file = await _replayed(data_dir / ETCD, files)
        with file:
            base = max(file.revision, _epoch_obeyed(files)) + REVISIONS_SKIPPED
            copied = await fill(data_dir, make_voting, file, base, progress)
        marker = write_marker(data_dir, "unconfirmed", copied, TAKEOVER)
        progress("verified", marker.records)
    filled = data_dir / FILLING / ETCD
    if filled.exists():
        put_aside(data_dir / ETCD, REPLACED)
        filled.rename(data_dir / ETCD)
        sync(data_dir)
    shutil.rmtree(data_dir / FILLING, ignore_errors=True)
    (data_dir / TAKEOVER).unlink()
    return marker


def _epoch_obeyed(files: ClusterFiles) -> int:
    """The newest that this host has kept (`peer.cluster_host`): its leader may have written it after all else."""
    try:
        return int((files.folder / EPOCH_FILE).read_text())
    except FileNotFoundError:
        return 0
    except ValueError as error:
        raise ConfigError(f"{files.folder / EPOCH_FILE} is damaged: {error}") from None


# ------------------------------------------------------------------------------------------------ replaying


async def _replayed(folder: Path, files: ClusterFiles) -> EtcdFile:
    """The member's file once all of its log that is committed is in it."""
    revision = applied = 0
    for _ in range(_TRIES):
        revision, applied = await _replay(folder, files)
        file = EtcdFile(folder / FILE)
        if file.own_revision == revision:
            return file
        file.__exit__(None, None, None)
    raise StoreError(
        f"{folder / FILE} lacks what the member had in memory (revision {revision}, entry {applied})"
    )


async def _replay(folder: Path, files: ClusterFiles) -> tuple[int, int]:
    """Run the member, cut off from others, until it applies nothing any more; (etcd's revision, entries applied)."""
    belonging = files.belonging()
    assert belonging is not None
    alone = "http://127.0.0.1:0"  # not where others would look for it, and without what they ask for
    member = EtcdMember(
        MemberConfig(
            name=belonging.peer_id,
            folder=folder,
            peer_url=alone,
            initial_cluster={belonging.peer_id: alone},
            existing=True,
            metrics=True,
        )
    )
    await member.check()
    pool = HttpPool(f"unix:{folder / METRICS}")
    async with trio.open_nursery() as nursery:
        await nursery.start(member.run)
        try:
            with trio.move_on_after(REPLAY_S_MAX):
                return await _steady(pool)
            raise Unavailable(
                f"this host's etcd is not done with its log within {REPLAY_S_MAX:g} s: {member.child.problem}"
            )
        finally:
            pool.close()
            nursery.cancel_scope.cancel()


async def _steady(pool: HttpPool) -> tuple[int, int]:
    since, last = trio.current_time(), (0, 0)
    while True:
        now = await _figures(pool)
        if now is None or now != last:
            since, last = trio.current_time(), now or last
        elif trio.current_time() - since >= STEADY_S:
            return last
        await trio.sleep(_POLL_S)


async def _figures(pool: HttpPool) -> tuple[int, int] | None:
    """(revision, entries applied), None while it does not tell."""
    try:
        answer = await pool.call("GET", "/metrics", b"", _CALL_S_MAX)
    except (NotSent, NoAnswer):
        return None
    found = dict(re.findall(rf"^({_REVISION}|{_APPLIED}) (\S+)$", answer.body.decode(), re.MULTILINE))
    if len(found) < 2:
        return None
    return int(float(found[_REVISION])), int(float(found[_APPLIED]))

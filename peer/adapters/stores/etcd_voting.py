"""A host's own member of the store as an etcd process that comes and goes, and the store's membership through it.

`member.json` in the member's folder says which member this host runs: it is written before the member starts and gone
before its data is put aside, so a restart goes on with the same member, or with none.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog
import trio

from peer import limits
from peer.adapters.links.certificates import revocation_list
from peer.adapters.stores.etcd_client import NO_SPACE, EtcdClient, Member
from peer.adapters.stores.etcd_member import QUOTA_BYTES, Certificates, EtcdMember, MemberConfig
from peer.adapters.stores.etcd_store import EtcdStore
from peer.errors import BitinglipError, Compacted, ConfigError, Conflict, NotFound, StoreBroken, Unavailable
from peer.identity import make_folder, write_private
from peer.ports import Store, StoreMembers, StoreUpkeep
from peer.state.base import Record
from peer.state.enrol import CERTIFICATE_S
from peer.state.voter import Seat, Space, StoreMember

log = structlog.get_logger("voting")

FILE: Final = "member.json"
DATA: Final = "data"
REVOKED: Final = "revoked.pem"
ASIDE: Final = "data.aside"  # of the last member that was removed
SILENT_S: Final = 3.0  # without an answer: then it is said
_LOOK_S: Final = 1.0
_ASK_S: Final = 0.1


class _Kept(Record, frozen=True):
    """`url` is where other members reach it, `members` every member's URL by its peer when it was added.

    `member_id` 0: the first member of a new cluster, whose id is not known before it has started.
    """

    member_id: int
    url: str
    members: dict[str, str]


class EtcdMembers:
    """Implements peer.ports.StoreMembers."""

    def __init__(self, client: EtcdClient, scheme: str) -> None:
        self._client = client
        self._scheme = scheme

    async def members(self) -> tuple[StoreMember, ...]:
        found = [_member(each) for each in await self._client.members()]
        return tuple(sorted(found, key=lambda member: member.member_id))

    async def add_learner(self, address: str) -> StoreMember:
        added, _ = await self._client.add_learner([f"{self._scheme}{address}"])
        return _member(added)

    async def promote(self, member_id: int) -> None:
        await self._client.promote(member_id)

    async def remove(self, member_id: int) -> None:
        await self._client.remove(member_id)


def _member(member: Member) -> StoreMember:
    url = member.peer_urls[0] if member.peer_urls else ""
    return StoreMember(
        member_id=member.member_id,
        address=url.partition("://")[2],
        peer_id=member.name,
        learner=member.is_learner,
    )


class EtcdUpkeep:
    """Implements peer.ports.StoreUpkeep."""

    def __init__(self, client: EtcdClient, quota_bytes: int) -> None:
        self._client = client
        self._quota_bytes = quota_bytes

    async def look(self) -> Space | None:
        status = await self._client.status()
        if status.is_learner:
            return None
        alarms: tuple[tuple[int, str], ...] = ()
        if any(NO_SPACE in error for error in status.errors):  # the list costs an entry of the log
            alarms = await self._client.alarms()
        # After that entry, as this list is the member's own: an old one would call a new voter a learner.
        members = sorted((each.member_id, each.is_learner) for each in await self._client.members())
        return Space(
            member_id=status.header.member_id,
            file_bytes=status.db_bytes,
            used_bytes=status.db_bytes_in_use,
            quota_bytes=self._quota_bytes,
            revision=status.header.revision,
            store_leader=status.leader,
            voters=tuple(member_id for member_id, learner in members if not learner),
            learners=tuple(member_id for member_id, learner in members if learner),
            alarmed=tuple(sorted(member_id for member_id, alarm in alarms if alarm == NO_SPACE)),
        )

    async def compact(self, revision: int) -> None:
        with suppress(Compacted):  # by another member, or by the one that leads the store
            await self._client.compact(revision, physical=True)

    async def defragment(self) -> None:
        await self._client.defragment()

    async def disarm(self, member_id: int) -> None:
        await self._client.disarm(member_id)


class EtcdVoting:
    """Implements peer.ports.Voting. `folder` is the member's own.

    `address` is HOST:PORT where other members reach this host's, one that its certificate speaks for; "" if it is not
    to have one. `listen` is the IP:PORT that it binds, the same if empty. Who shows no certificate of the authority's
    is refused; without `certificates` nothing is proven. `token` is the same on all hosts. Raises ConfigError if what
    stands in the folder is damaged.
    """

    def __init__(
        self,
        folder: Path,
        peer_id: str,
        address: str,
        *,
        listen: str = "",
        certificates: Certificates | None = None,
        token: str = "bitinglip",
        heartbeat_ms: int = 100,
        election_ms: int = 1_000,
        quota_bytes: int = QUOTA_BYTES,
        program: str = "etcd",
        backoff_s: Sequence[float] = limits.RESTART_BACKOFF_S,
    ) -> None:
        self._folder = folder
        self._peer_id = peer_id
        self._address = address
        self._listen = listen or address
        self._certificates = certificates
        if certificates is not None:
            self._certificates = msgspec.structs.replace(certificates, revoked=folder / REVOKED)
        self._revoked: frozenset[str] | None = None  # None: what an earlier life was told holds
        self._scheme = "https://" if certificates is not None else "http://"
        self._token = token
        self._heartbeat_ms = heartbeat_ms
        self._election_ms = election_ms
        self._quota_bytes = quota_bytes
        self._program = program
        self._backoff_s = backoff_s
        self._kept = self._read()  # as on the disk
        self._wanted = self._kept
        self._changed = trio.Event()
        self._members: EtcdMembers | None = None
        self._upkeep: EtcdUpkeep | None = None
        self._problem = ""
        self.member: EtcdMember | None = None
        """While this host has one."""

    # ---------------------------------------------------------------- peer.ports.Voting

    @property
    def address(self) -> str:
        return self._address

    @property
    def seat(self) -> int:
        return self._wanted.member_id if self._wanted is not None else 0

    @property
    def problem(self) -> str:
        return self._problem

    @property
    def members(self) -> StoreMembers | None:
        return self._members

    @property
    def upkeep(self) -> StoreUpkeep | None:
        return self._upkeep

    def join(self, seat: Seat) -> None:
        if seat.member_id != self.seat:
            log.info("joining_the_store", member_id=f"{seat.member_id:x}")
            urls = {peer_id: f"{self._scheme}{address}" for peer_id, address in seat.members.items()}
            self._want(_Kept(member_id=seat.member_id, url=urls[self._peer_id], members=urls))

    def leave(self, reason: str) -> None:
        if self._wanted is not None:
            log.warning("leaving_the_store", why=reason)
            self._want(None)

    def revoke(self, serials: Collection[str]) -> None:
        if self._certificates is not None and self._revoked != frozenset(serials):
            try:
                make_folder(self._folder)
                self._list_revoked(self._certificates, serials)
            except (OSError, ConfigError) as error:
                log.error("revoked_not_listed", why=str(error))
            else:
                self._revoked = frozenset(serials)

    async def check(self) -> str:
        """etcd's version. Raises Conflict for one that is not supported, Unavailable if there is none: then this host
        cannot have a member, and its `address` should be ""."""
        return await EtcdMember(self._config(_Kept(member_id=0, url="", members={}))).check()

    def found(self) -> None:
        """Begin a new store, with this host's as its only member. Raises Conflict if there is one here, OSError."""
        if self._kept is not None or (self._folder / DATA).exists():
            raise Conflict(f"{self._folder} holds a member of a store already", code="store_exists")
        url = f"{self._scheme}{self._address}"
        self._write(_Kept(member_id=0, url=url, members={self._peer_id: url}))
        self._wanted = self._kept

    async def run(self, begin: Callable[[Store], None], end: Callable[[], Awaitable[None]]) -> None:
        while True:
            self._changed = trio.Event()
            if self._kept != self._wanted:
                with _broken():
                    self._exchange()
            if self._kept is None:
                await self._changed.wait()
            else:
                await self._live(self._kept, begin, end)

    # ---------------------------------------------------------------- one member's life

    async def _live(
        self, kept: _Kept, begin: Callable[[Store], None], end: Callable[[], Awaitable[None]]
    ) -> None:
        """Until another member is wanted, or none."""
        if self._certificates is not None and not (self._folder / REVOKED).exists():
            with _broken():
                self._list_revoked(self._certificates, ())
        member = EtcdMember(self._config(kept), backoff_s=self._backoff_s)
        async with trio.open_nursery() as nursery:
            process = trio.CancelScope(shield=True)  # the last thing that ends: elections let go through it
            client = EtcdClient(member.address)
            store: EtcdStore | None = None
            self.member = member
            try:
                with _broken():
                    await nursery.start(self._keep, member, process)
                if not kept.member_id:
                    await self._learn_id(client, kept, member)
                store = EtcdStore(member.address)
                self._members = EtcdMembers(client, self._scheme)
                self._upkeep = EtcdUpkeep(client, self._quota_bytes)
                begin(store)
                nursery.start_soon(self._watch, member, client)
                nursery.start_soon(self._move, client)
                await self._changed.wait()
            finally:
                self.member, self._members, self._upkeep = None, None, None
                with trio.CancelScope(shield=True):
                    if store is not None:
                        await end()  # bounded: see Election
                        await store.aclose()
                client.close()
                process.cancel()
                self._problem = ""
            nursery.cancel_scope.cancel()

    async def _keep(
        self,
        member: EtcdMember,
        process: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with process:
            try:
                await member.run(task_status=task_status)
            except Conflict as error:
                self.leave(error.message)

    async def _watch(self, member: EtcdMember, client: EtcdClient) -> None:
        """Whether the member itself answers, which takes no quorum."""
        answered_at = trio.current_time()
        while True:
            try:
                await client.status()
            except BitinglipError as error:
                if trio.current_time() - answered_at >= SILENT_S and not self._problem:
                    self._problem = member.child.problem or error.message
                    log.error("store_member_not_answering", why=self._problem)
            else:
                answered_at, self._problem = trio.current_time(), ""
            await trio.sleep(_LOOK_S)

    async def _move(self, client: EtcdClient) -> None:
        """Tell the store where this host's member is now, if that is elsewhere than before."""
        url = f"{self._scheme}{self._address}"
        while self._kept is not None and self._address and self._kept.url != url:
            kept = self._kept
            try:
                await client.update(kept.member_id, [url])
            except (Conflict, NotFound) as error:  # it is removed, or the address is another's
                log.warning("store_member_not_moved", url=url, why=error.message)
                return
            except BitinglipError as error:
                log.info("store_member_not_moved_yet", url=url, why=error.message)
                await trio.sleep(_LOOK_S)
            else:
                log.info("store_member_moved", before=kept.url, now=url)
                self._note_move(kept, url)
                return

    def _note_move(self, kept: _Kept, url: str) -> None:
        moved = msgspec.structs.replace(kept, url=url, members={**kept.members, self._peer_id: url})
        unchanged = self._wanted == kept
        try:
            self._write(moved)
        except OSError as error:  # the next life says it again
            log.warning("store_member_move_not_noted", why=str(error))
        else:
            self._wanted = moved if unchanged else self._wanted

    async def _learn_id(self, client: EtcdClient, kept: _Kept, member: EtcdMember) -> None:
        """Of a new cluster's first member, once it answers."""
        waited = 0
        while True:
            try:
                member_id = (await client.status()).header.member_id
            except Unavailable as error:
                if waited % 100 == 0:
                    log.info("store_not_answering_yet", why=member.child.problem or error.message)
                waited += 1
                await trio.sleep(_ASK_S)
            else:
                with _broken():
                    self._write(msgspec.structs.replace(kept, member_id=member_id))
                self._wanted = self._kept
                return

    def _config(self, kept: _Kept) -> MemberConfig:
        return MemberConfig(
            name=self._peer_id,
            folder=self._folder,
            peer_url=kept.url,
            listen_url=f"{self._scheme}{self._listen}",
            initial_cluster=kept.members,
            existing=len(kept.members) > 1,
            token=self._token,
            certificates=self._certificates,
            heartbeat_ms=self._heartbeat_ms,
            election_ms=self._election_ms,
            quota_bytes=self._quota_bytes,
            program=self._program,
        )

    # ---------------------------------------------------------------- what is on the disk

    def _want(self, kept: _Kept | None) -> None:
        self._wanted = kept
        self._changed.set()

    def _exchange(self) -> None:
        """Put the data of the member that was aside, and write down which one is to be."""
        (self._folder / FILE).unlink(missing_ok=True)
        if (self._folder / DATA).exists():
            aside = self._folder / ASIDE
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / DATA).rename(aside)
            log.warning("store_data_put_aside", folder=str(aside))
        self._kept = None
        if self._wanted is not None:
            self._write(self._wanted)

    def _list_revoked(self, certified: Certificates, serials: Collection[str]) -> None:
        """Signed by this host itself, for itself: etcd looks at the serials only."""
        signer = certified.key.read_text() + certified.certificate.read_text()
        text = revocation_list(signer, sorted(serials), time.time(), CERTIFICATE_S)
        write_private(self._folder / REVOKED, text)

    def _write(self, kept: _Kept) -> None:
        make_folder(self._folder)
        write_private(self._folder / FILE, msgspec.json.encode(kept).decode() + "\n")
        self._kept = kept

    def _read(self) -> _Kept | None:
        file = self._folder / FILE
        try:
            return msgspec.json.decode(file.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ConfigError(f"{file} is damaged: {error}") from None


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreBroken(f"this host's member of the store cannot be run: {error}") from error


class ExternalVoting:
    """Implements peer.ports.Voting with an etcd that others run, at `unix:PATH` or `HOST:PORT`.

    Every peer that is told of it is a voter; its members are managed elsewhere.
    """

    address = ""
    seat = 0
    problem = ""
    members: StoreMembers | None = None
    upkeep: StoreUpkeep | None = None

    def __init__(self, client_address: str) -> None:
        self._client_address = client_address

    def join(self, seat: Seat) -> None:
        log.warning("not_joining_the_store", why="this host uses a store that others run")

    def leave(self, reason: str) -> None:
        pass

    def revoke(self, serials: Collection[str]) -> None:
        pass

    async def run(self, begin: Callable[[Store], None], end: Callable[[], Awaitable[None]]) -> None:
        store = EtcdStore(self._client_address)
        begin(store)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await end()
                await store.aclose()

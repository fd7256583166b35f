"""The seams of a peer: what decides and serves on one side, what touches the world on the other.

Adapters under `peer.adapters` implement these; simulations put their own behind them. Errors are
`peer.errors`; everything else that is raised is a bug.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

import msgspec
from trio import TASK_STATUS_IGNORED, TaskStatus

from peer.state.command import Query, Request, StreamItem
from peer.state.enrol import Enrolled, Grant, Host
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.member import KeyReport, KeyRotation, KeyStep, Member
from peer.state.model import Model
from peer.state.order import Order, Report
from peer.state.quota import Client, Spend, Verdict
from peer.state.voter import Seat, Space, StoreMember

# ------------------------------------------------------------------------------------------------ store


class KeyValue(msgspec.Struct, frozen=True):
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


class Page(msgspec.Struct, frozen=True):
    """Items in key order, the store's revision when it was read, and whether more follow."""

    items: tuple[KeyValue, ...]
    revision: int
    more: bool = False


class Put(msgspec.Struct, frozen=True, tag="put"):
    key: str
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True, tag="delete"):
    key: str


Write = Put | Delete


class Compare(msgspec.Struct, frozen=True):
    """Holds if the key's field equals `value`. A key that does not exist has revisions 0 and no value at all."""

    key: str
    field: Literal["create_revision", "mod_revision", "value"]
    value: int | bytes


class TxnResult(msgspec.Struct, frozen=True):
    succeeded: bool
    revision: int


class Change(msgspec.Struct, frozen=True):
    """One change of a key; `value` is None for a deletion."""

    key: str
    value: bytes | None


class Batch(msgspec.Struct, frozen=True):
    """All changes of one revision under the watched prefix, in the order in which they were written."""

    revision: int
    changes: tuple[Change, ...]


class Lease(msgspec.Struct, frozen=True):
    lease_id: int
    ttl_s: float


LEADER_KEY = "leader"  # under the leader's lease; its create-revision is the epoch
BEAT_KEY = "beat"  # written by the leader every limits.BEAT_S, fenced: it moves while that leader can write
BATCH_KEY = "batch"  # of stores over a network: written by every commit, so that none takes effect twice


class Store(Protocol):
    """Ordered keys and values with revisions, transactions, leases and watches: etcd's semantics.

    Each transaction that writes makes one new revision. Keys are text, ordered by their UTF-8 bytes.
    """

    async def range(
        self, start: str, end: str, *, limit: int = 0, offset: int = 0, keys_only: bool = False
    ) -> Page:
        """Keys in [start, end) in order; `limit` 0 means all. A reader sees one revision."""

    async def count(self, start: str, end: str) -> int:
        """How many keys are in [start, end)."""

    async def get(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        """Those of `keys` that exist, all at one revision."""

    async def peek(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        """As `get`, for few and small ones, and perhaps not the newest: what this host's part of the store knows to be
        committed. It needs nobody else."""

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult:
        """If every comparison holds write `then`, else `orelse`; durable on return.

        One transaction writes a key at most once: a second write of it raises ValueError. Raises Ambiguous (it may
        still take effect later), Unavailable (it was not sent), StoreBroken.
        """

    async def commit(self, epoch: int, writes: Sequence[Write]) -> int:
        """Write if LEADER_KEY's create-revision is `epoch`; durable on return, which is the new revision.

        After Ambiguous the same writes may be committed again until that returns: they take effect once, and never
        after a later commit has. Other writes raise ValueError until then. One commit at a time. Raises Fenced (this
        epoch writes no more; what was ambiguous stays so), Ambiguous, Unavailable (not sent), StoreBroken.
        """

    def watch(self, prefix: str, from_revision: int) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """Every batch from that revision on, without gap or repeat. Raises Compacted if it is gone."""

    async def grant(self, ttl_s: float) -> Lease:
        """A lease; keys put under it go when it expires or is revoked."""

    async def keepalive(self, lease_id: int) -> Lease:
        """Begin the lease's time anew. Raises NotFound if it has expired."""

    async def revoke(self, lease_id: int) -> None:
        """End the lease and delete its keys; unknown leases are ignored."""

    async def aclose(self) -> None: ...


# ------------------------------------------------------------------------------------------------ voters


class StoreMembers(Protocol):
    """The store's membership, one change at a time: on a voter. etcd's semantics.

    All raise Unavailable (also for some seconds after a change, and while a voter does not answer) and Ambiguous; the
    changes Conflict where the store will not have them now, and NotFound.
    """

    async def members(self) -> tuple[StoreMember, ...]:
        """As this host's member knows them; in order of their ids."""

    async def add_learner(self, address: str) -> StoreMember:
        """A new member without a vote, which its host has yet to start."""

    async def promote(self, member_id: int) -> None:
        """Make a learner a voter. Raises Conflict while it has not caught up."""

    async def remove(self, member_id: int) -> None:
        """Its data is of no use any more, also to a new member on that host."""


class StoreUpkeep(Protocol):
    """The room in this host's own member of the store. All raise Unavailable, the last three Ambiguous."""

    async def look(self) -> Space | None:
        """How much there is, and who has reached the quota; None of a learner, which does nothing that it is asked."""

    async def compact(self, revision: int) -> None:
        """Have all members forget the history up to this revision; returns when the space is free. May be repeated."""

    async def defragment(self) -> None:
        """Give free space back. This member answers nothing meanwhile, which takes as long as to copy its data."""

    async def disarm(self, member_id: int) -> None:
        """Take that member's alarm back: it has room. May be repeated."""


class Voting(Protocol):
    """A host's own member of the store, which comes and goes as the leader says."""

    @property
    def address(self) -> str:
        """HOST:PORT where other members reach this host's; "" if it may not have one."""

    @property
    def seat(self) -> int:
        """The id of the member that this host runs or is about to; 0 for none, or if it is not known yet."""

    @property
    def problem(self) -> str:
        """Why this host's member has not answered for some seconds; "" if it does, or there is none."""

    @property
    def members(self) -> StoreMembers | None:
        """While this host has a member; None also where others manage the store."""

    @property
    def upkeep(self) -> StoreUpkeep | None:
        """Likewise, once its member answers."""

    def join(self, seat: Seat) -> None:
        """Run this member from now on, with an empty data folder; does not wait. The seat it has already is ignored."""

    def leave(self, reason: str) -> None:
        """Run none any more and put the data aside; does not wait."""

    def revoke(self, serials: Collection[str]) -> None:
        """All certificates that are revoked: members refuse them. Replaces what was said before."""

    async def run(self, begin: Callable[[Store], None], end: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled: run the member that this host has. `begin` hears of the store through it once its process
        is started, `end` before that store is closed. Raises StoreBroken when it cannot be run at all."""


# ------------------------------------------------------------------------------------------------ time, ids


class Clock(Protocol):
    """Seconds. `now` never jumps and counts suspended time; `wall` is UTC, anchored at start and carried by `now`."""

    def now(self) -> float: ...
    def wall(self) -> float: ...
    async def sleep(self, seconds: float) -> None: ...


class Entropy(Protocol):
    """Every random choice of a peer comes from here."""

    def token(self, nbytes: int) -> str:
        """Hexadecimal, unguessable (outside simulations)."""

    def uniform(self, low: float, high: float) -> float: ...


# ------------------------------------------------------------------------------------------------ peers


class Gossip(Protocol):
    """Who is there, as far as anybody knows: a hint, late or wrong at times, never authority. Serf's semantics."""

    async def members(self) -> tuple[Member, ...]:
        """All members known to the local agent, this peer among them. Raises Unavailable when the agent is."""

    async def set_tags(self, tags: Mapping[str, str]) -> None:
        """Replace this peer's tags, 512 bytes in all; others see them some seconds later. Raises Unavailable."""

    async def keys(self) -> KeyReport:
        """Which keys of gossip the members have. Raises Unavailable."""

    async def change_key(self, step: KeyStep) -> KeyReport:
        """Ask all members for this step. Members that are down do not hear of it. Raises Unavailable."""


class Connection(Protocol):
    """An ordered, authenticated channel of frames to one peer: TCP and TLS, so nothing is lost but its end."""

    peer_id: str
    """The other side's, proven."""

    async def send(self, *frames: bytes) -> None:
        """Hand frames over, in order; waits while the other side does not read. Returning is no proof of arrival.

        Raises Unavailable once the connection is broken, which to cancel it half-way may do.
        """

    async def receive(self) -> bytes:
        """The next frame. Raises Unavailable when the connection is broken or the other side has ended it."""

    async def aclose(self) -> None:
        """End it; what was handed over may still arrive. Never waits for the other side."""


REFUSED = "connection_refused"  # the code of a dial's Unavailable: its host answered that nobody listens there
TURNED_AWAY = "turned_away"  # likewise: the peer has answered that it does not take connections of this host


class Network(Protocol):
    """Connections between peers."""

    async def dial(self, peer_id: str, address: str) -> Connection:
        """A new connection to that peer. Raises Unavailable within limits.DIAL_S_MAX, with the code REFUSED where its
        host says that nobody listens, TURNED_AWAY where the peer itself says that it does not want this one."""

    async def listen(
        self,
        accept: Callable[[Connection], Awaitable[None]],
        *,
        task_status: TaskStatus[None] = TASK_STATUS_IGNORED,
    ) -> None:
        """Until cancelled: run `accept` for every connection that comes in, and close it when that returns."""


    def revoke(self, peer_ids: Collection[str], serials: Collection[str] = ()) -> None:
        """All peers that are revoked, and all their certificates: what is open to them ends at once, and no connection
        to or from them is made any more. Replaces what was said before."""


class Authority(Protocol):
    """The cluster's certificate authority (CA) on this host. Its private key is on voters only, once it was fetched.

    Methods raise ConfigError and OSError where this host's files are not usable.
    """

    def cluster(self) -> str:
        """The cluster's name, as its certificates have it."""

    def ready(self) -> bool:
        """Whether the CA's private key is here."""

    def ca_sha256(self) -> str:
        """The digest of the CA's public key, as join tokens carry it."""

    def issue(self, csr_pem: str, grant: Grant, seeds: tuple[str, ...]) -> Enrolled:
        """Sign what was granted, once that is durable. Raises Unavailable while `ready` is false, BadRequest."""

    def host(self) -> Host:
        """This host, as a record."""

    def private_key(self) -> str:
        """The CA with its private key, PEM. Raises Unavailable while `ready` is false."""


class Link(Protocol):
    """The leader's way to the peers' executors."""

    async def send(self, peer_id: str, order: Order) -> None:
        """Hand over an order, in order and without waiting. Raises Unavailable when the peer cannot be reached."""


class ReportSink(Protocol):
    """An executor's way to the leader."""

    async def report(self, report: Report) -> None:
        """Hand over a report; waits while the leader is behind, or while there is none."""


# ------------------------------------------------------------------------------------------------ API


class Cluster(Protocol):
    """What the API sees of the cluster, on every peer the same."""

    async def call(self, request: Request) -> Any:
        """Carry out a command or a query; the answer's type is named in the request's docstring.

        A command goes on when the caller is cancelled. Raises peer.errors.BitinglipError.
        """

    async def read(self, query: Query) -> tuple[Any, float | None]:
        """Like `call`, for a reader who takes an old answer where no leader can be reached: what this peer had last, if
        it has anything, and its age in seconds; None: it is the leader's own of now."""

    async def spend(self, ask: Spend) -> Verdict | None:
        """Count a request, for the whole cluster; answered within limits.COUNT_S_MAX. Never raises."""

    def key(self, key_id: str) -> ApiKey | None:
        """The key as now in force, for authentication; None if there is none. Raises Unavailable while this peer knows
        of no keys at all."""

    def models(self) -> Mapping[str, Model]:
        """The catalogue now in force."""

    async def count_tokens(self, model_name: str, parameters: Mapping[str, Any]) -> tuple[int, int] | None:
        """(tokens of the prompt with its template, context of the model), or None if it cannot be told here."""

    def stream(self, task_id: str) -> AbstractAsyncContextManager[AsyncIterator[StreamItem]]:
        """A task's text from its beginning, as it comes, to its end. Raises NotFound on entry."""

    def events(
        self, since: int | None, client: Client | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """The journal after event `since` (None: from now on). Raises Compacted on entry if that is no longer kept,
        and Overloaded from the iterator when the reader is too far behind. While it is open one WebSocket of `client`
        is counted, for the whole cluster: RateLimited on entry when it has too many."""

    def gossip(self) -> tuple[Member, ...]:
        """Who is there, as this host's gossip shows it, whether anybody leads or not. A host alone has none."""

    async def rotate_gossip_key(self, *, force: bool) -> KeyRotation:
        """Have all members encrypt gossip with a new key. Interrupted anywhere it may be called again, here or on
        another peer. `force`: also if some are away, who will then not find back. Raises Conflict, Unavailable."""

    def ready(self) -> str:
        """ "" if requests are served, else why not."""

"""What two peers say to each other over a connection: one frame is one of these, as MessagePack.

The side that dials says Hello and is told Welcome or Refused; then both may say anything. Unknown fields are ignored,
and nothing is sent that the agreed wire version does not know, so peers of versions N and N + 1 work together.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from peer import errors
from peer.errors import BitinglipError, Unavailable
from peer.state import command as asks
from peer.state import enrol
from peer.state.base import Record
from peer.state.command import Request
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.metric import Metrics
from peer.state.model import Model
from peer.state.order import Order, Report
from peer.state.plan import Plan
from peer.state.quota import Client, KeepTicket, RedeemTicket, Spend, Verdict
from peer.state.voter import Seat

WIRE: Final = 1  # the newest version that this code speaks
WIRE_MIN: Final = 1  # the oldest


class Hello(Record, frozen=True, tag="hello"):
    """`epoch` is the newest that the caller's executor has obeyed: a leader of an older one learns that it is over."""

    peer_id: str
    wire: int
    wire_min: int
    epoch: int
    store: str = ""  # HOST:PORT where other members of the store reach this host's; "": it may not have one
    seat: int = 0  # the member of the store that this host runs


class Welcome(Record, frozen=True, tag="welcome"):
    """This peer leads under `epoch`; `wire` is the version to speak."""

    peer_id: str
    epoch: int
    wire: int


class Refused(Record, frozen=True, tag="refused"):
    """`leader` is who leads as far as this peer knows, and where; "" if it does not."""

    reason: str
    leader: str = ""
    address: str = ""


class Ping(Record, frozen=True, tag="ping"):
    """Nothing else was to be said: this side is alive."""


class Bye(Record, frozen=True, tag="bye"):
    """This side ends the connection on purpose; a leader that says so does not lead any more.

    `settled`: every call was answered before; one that was not is not carried out.
    """

    reason: str
    settled: bool = False


class Call(Record, frozen=True, tag="call"):
    call_id: int
    request: Request


class Failure(Record, frozen=True):
    """A peer.errors.BitinglipError."""

    kind: str
    code: str
    message: str
    details: dict[str, Any] = {}
    retry_after_s: float | None = None


class Answer(Record, frozen=True, tag="answer"):
    """`value` is what the request's docstring names, encoded, or there is a failure."""

    call_id: int
    value: bytes = b""
    failure: Failure | None = None


class GiveUp(Record, frozen=True, tag="give_up"):
    """Nobody waits for this call or subscription any more."""

    call_id: int


class Ordered(Record, frozen=True, tag="ordered"):
    order: Order


class Reported(Record, frozen=True, tag="reported"):
    report: Report


class Superseded(Record, frozen=True, tag="superseded"):
    """An order was refused: its receiver has obeyed this newer epoch."""

    epoch: int


class Shared(Record, frozen=True, tag="shared"):
    """What every peer keeps a copy of: the keys and the catalogue in force, who is revoked. Sent whole on changes."""

    keys: tuple[ApiKey, ...]
    catalogue: tuple[Model, ...]
    revoked: tuple[enrol.Revocation, ...] = ()


class Vote(Record, frozen=True, tag="vote"):
    """The receiver is to run this member of the store. Said again until the member has started."""

    seat: Seat


class Unvote(Record, frozen=True, tag="unvote"):
    """The receiver's member has been removed from the store."""

    reason: str


class StoreState(Record, frozen=True, tag="store_state"):
    """`problem`: why the sender's member of the store does not answer, "" if it does. `keyed`: it has the CA's key,
    which a leader needs. Sent when either changes; a session begins without a problem and without the key."""

    problem: str
    keyed: bool = False


class Subscribe(Record, frozen=True, tag="subscribe"):
    """The journal after `since`; None: from now on. An Answer tells of its end. `client` has one WebSocket more."""

    call_id: int
    since: int | None
    client: Client | None = None


class Subscribed(Record, frozen=True, tag="subscribed"):
    """Events after `since` follow."""

    call_id: int
    since: int


class Events(Record, frozen=True, tag="events"):
    call_id: int
    events: tuple[Event, ...]


class Follow(Record, frozen=True, tag="follow"):
    """In place of Hello: this connection is for the text of an attempt that runs here, from its beginning.

    StreamTokens follow, each of all that was ready, then Bye when the attempt gives no more; or Refused.
    """

    task_id: str
    attempt: int


Frame = (
    Hello
    | Welcome
    | Refused
    | Ping
    | Bye
    | Call
    | Answer
    | GiveUp
    | Ordered
    | Reported
    | Superseded
    | Shared
    | Vote
    | Unvote
    | StoreState
    | Subscribe
    | Subscribed
    | Events
    | Follow
    | asks.StreamToken
)

encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode

# By request: the types that the requests' docstrings name.
_ANSWERS: Mapping[type[Any], Any] = MappingProxyType(
    {
        asks.SubmitTask: asks.Submitted,
        asks.CancelTask: asks.TaskView,
        asks.AssignModel: asks.AssignReply,
        asks.UnloadModel: asks.UnloadReply,
        asks.RestartWorker: asks.RestartReply,
        asks.Rebalance: Plan,
        asks.DrainHost: asks.DrainedHost,
        asks.TransferLeadership: asks.Led,
        asks.CreateKey: ApiKey,
        asks.RevokeKey: ApiKey,
        enrol.CreateJoinToken: enrol.NewJoinToken,
        enrol.Enrol: enrol.Enrolled,
        enrol.Renew: enrol.Enrolled,
        enrol.RevokeHost: enrol.Revocation,
        enrol.GetAuthority: enrol.AuthorityKey,
        enrol.ListHosts: tuple[enrol.HostView, ...],
        asks.GetTask: asks.TaskView,
        asks.ListTasks: asks.TaskPage,
        asks.ListWorkers: tuple[asks.WorkerView, ...],
        asks.GetWorker: asks.WorkerView,
        asks.ListAssignments: tuple[asks.AssignmentView, ...],
        asks.ListModels: tuple[asks.ModelView, ...],
        asks.GetStatus: asks.ClusterStatus,
        asks.GetMetrics: Metrics,
        asks.ListKeys: tuple[ApiKey, ...],
        asks.GetPlan: Plan,
        Spend: Verdict | None,
        KeepTicket: type(None),
        RedeemTicket: str,
    }
)
_DECODERS = {request: msgspec.msgpack.Decoder(answer).decode for request, answer in _ANSWERS.items()}
_ERRORS: Mapping[str, type[BitinglipError]] = MappingProxyType(
    {
        name: each
        for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, BitinglipError)
    }
)


def decode(frame: bytes) -> Frame:
    """Raises Unavailable on bytes that are no frame: whoever sent them is not understood."""
    try:
        result: Frame = _decode(frame)
    except msgspec.DecodeError as error:
        raise Unavailable(f"a frame was not understood: {error}", code="wire_error") from None
    return result


def decode_answer(request: Request, value: bytes) -> Any:
    """Raises Unavailable on bytes that are no answer to this request."""
    try:
        return _DECODERS[type(request)](value)
    except msgspec.DecodeError as error:
        raise Unavailable(f"an answer was not understood: {error}", code="wire_error") from None


def failure_of(error: BitinglipError) -> Failure:
    return Failure(
        kind=type(error).__name__,
        code=error.code,
        message=error.message,
        details=error.details,
        retry_after_s=error.retry_after_s,
    )


def error_of(failure: Failure) -> BitinglipError:
    kind = _ERRORS.get(failure.kind, BitinglipError)
    return kind(
        failure.message, code=failure.code, details=failure.details, retry_after_s=failure.retry_after_s
    )


def agreed(mine: tuple[int, int], theirs: tuple[int, int]) -> int | None:
    """The newest version that both (newest, oldest) pairs speak; None if there is none."""
    newest = min(mine[0], theirs[0])
    return newest if newest >= max(mine[1], theirs[1]) else None

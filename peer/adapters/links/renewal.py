"""What a host asks the leader for while it runs: a new certificate when two thirds of its life are over, and, once, the
CA's private key, if it may have to lead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from peer.adapters.links import certificates
from peer.adapters.links.certificates import Credentials, Subject
from peer.adapters.links.cluster_files import ClusterFiles
from peer.errors import BitinglipError, ConfigError
from peer.identity import write_private
from peer.ports import Clock, Entropy
from peer.state.enrol import RENEW_SHARE, AuthorityKey, Enrolled, GetAuthority, Renew

log = structlog.get_logger("peer")

LOOK_S: Final = 3_600.0  # how often it is looked whether it is time
RETRY_S: Final = (60.0, 600.0)  # after a failure, at random between: not all hosts at once
FETCH_RETRY_S: Final = (1.0, 5.0)  # likewise, to fetch the CA's key


def due_at(subject: Subject) -> float:
    """When a certificate is to be renewed, in seconds since 1970."""
    return subject.not_before + RENEW_SHARE * (subject.not_after - subject.not_before)


async def keep_renewed(
    files: ClusterFiles,
    use: Callable[[Credentials], None],
    ask: Callable[[Renew], Awaitable[Enrolled]],
    clock: Clock,
    entropy: Entropy,
) -> None:
    """Until cancelled. `ask` has the leader answer; `use` is shown what to use from then on, which has a new key.
    Connections that are open go on. A disk that is full is no end: it may have room before the certificate expires.
    """
    credentials = files.credentials()
    while True:
        now = clock.wall()
        due_in_s = due_at(credentials.subject) - now
        if due_in_s > 0:
            await clock.sleep(min(due_in_s, LOOK_S))
            continue
        try:
            credentials = await _renew(files, credentials, ask, clock)
            use(credentials)
            log.info("certificate_renewed", expires_in_s=round(credentials.subject.not_after - now))
        except (BitinglipError, ConfigError, OSError) as error:
            left_s = round(credentials.subject.not_after - now)
            log.warning("certificate_not_renewed", why=str(error), expires_in_s=left_s)
            await clock.sleep(entropy.uniform(*RETRY_S))


async def _renew(
    files: ClusterFiles, old: Credentials, ask: Callable[[Renew], Awaitable[Enrolled]], clock: Clock
) -> Credentials:
    key = certificates.new_key()
    room = files.folder / "renewal.pem"
    write_private(room, key)  # where this fails no certificate is asked for in vain: a host has but a few
    room.unlink()
    command = Renew(
        peer_id=old.subject.peer_id,
        csr=certificates.request(key),
        key_sha256=certificates.key_sha256(key),
        addresses=old.addresses,
    )
    certificate = (await ask(command)).certificate
    subject = certificates.check_issued(certificate, old.ca_pem, key, clock.wall())
    if subject[:2] != old.subject[:2]:
        raise BitinglipError(f"the certificate that came is for {subject.peer_id} of {subject.cluster!r}")
    return files.renewed(key, certificate)


async def keep_authority(
    files: ClusterFiles,
    ask: Callable[[GetAuthority], Awaitable[AuthorityKey]],
    clock: Clock,
    entropy: Entropy,
) -> None:
    """Fetch the CA's private key, if this host may have to lead and has not got it; returns when that is done.

    `ask` has the leader answer.
    """
    belonging = files.belonging()
    if belonging is None or not belonging.voter:
        return
    while not files.ready():
        try:
            files.keep_authority((await ask(GetAuthority(peer_id=belonging.peer_id))).pem)
            log.info("authority_kept")
        except (BitinglipError, ConfigError, OSError) as error:
            log.warning("authority_not_fetched", why=str(error))
            await clock.sleep(entropy.uniform(*FETCH_RETRY_S))

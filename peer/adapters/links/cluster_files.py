"""What a host of a cluster keeps of it, in DATA_DIR/cluster: each file is replaced at once, durable, mode 0600.

cluster.json   the cluster's name, this host's, and where others were; written last: without it there is no cluster
host.pem       this host's private key and certificate, in one file, so that they never come apart
ca.pem         the cluster's CA, the only one that is trusted
authority.pem  the CA with its private key; on voters
gossip.key     what gossip was encrypted with when this host joined; its agent's keyring.json says what is now
pending.pem    a private key whose certificate has not come yet: who asks again asks for the same
"""

from __future__ import annotations

import base64
import secrets
from pathlib import Path
from typing import Final

import msgspec

from peer.adapters.links import certificates
from peer.adapters.links.certificates import Authority, Credentials
from peer.errors import ConfigError, Conflict, Unavailable
from peer.identity import make_folder, write_private
from peer.state.base import Record
from peer.state.enrol import CERTIFICATE_S, CLOCK_SKEW_S, Enrolled, Grant, Host

FOLDER: Final = "cluster"
SERF_FOLDER: Final = "serf"
KEYRING_FILE: Final = "keyring.json"  # the gossip agent's own: the keys that it knows, that in use first
GOSSIP_KEY_BYTES: Final = 32
SERIAL_BYTES: Final = 16


class Belonging(Record, frozen=True):
    """To which cluster this host belongs, and as whom."""

    cluster: str
    peer_id: str
    voter: bool
    seeds: tuple[str, ...] = ()
    founder: bool = False  # it is still to begin the cluster's store


class ClusterFiles:
    """The folder of one data directory; implements peer.ports.Authority once it belongs to a cluster.

    Methods raise OSError where the disk does, ConfigError on damaged files.
    """

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / FOLDER
        self._keyring = data_dir / SERF_FOLDER / KEYRING_FILE

    def belonging(self) -> Belonging | None:
        """None: this host is in no cluster."""
        file = self.folder / "cluster.json"
        try:
            return msgspec.json.decode(file.read_bytes(), type=Belonging)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ConfigError(f"{file} is damaged: {error}") from None

    def found(self, cluster: str, peer_id: str, addresses: tuple[str, ...], now: float) -> Belonging:
        """Make a new cluster with this host as its first. Raises Conflict if it is in one."""
        self._check_in_none()
        make_folder(self.folder)
        authority = Authority.create(now)
        key = certificates.new_key()
        csr = certificates.request(key)
        grant = Grant(
            cluster=cluster,
            peer_id=peer_id,
            serial=secrets.token_hex(SERIAL_BYTES),
            key_sha256=certificates.key_sha256(key),
            not_before=now - CLOCK_SKEW_S,
            not_after=now + CERTIFICATE_S,
            voter=True,
            addresses=addresses,
        )
        write_private(self.folder / "authority.pem", authority.pem)
        return self._join(
            key,
            Enrolled(
                cluster=cluster,
                peer_id=peer_id,
                certificate=authority.sign(csr, grant),
                ca=authority.certificate_pem,
                voter=True,
                gossip_key=base64.b64encode(secrets.token_bytes(GOSSIP_KEY_BYTES)).decode(),
            ),
            founder=True,
        )

    def store_founded(self) -> None:
        """The cluster's store has begun on this host: it must never begin another, also if that one is lost."""
        self._keep(msgspec.structs.replace(self._belonging(), founder=False))

    def pending_key(self) -> str:
        """The private key to ask a certificate for, the same until one has come. Raises Conflict as `found` does."""
        self._check_in_none()
        make_folder(self.folder)
        file = self.folder / "pending.pem"
        if not file.exists():
            write_private(file, certificates.new_key())
        return file.read_text()

    def joined(self, key_pem: str, enrolled: Enrolled) -> Belonging:
        """Keep what a host of the cluster has sent."""
        belonging = self._join(key_pem, enrolled)
        (self.folder / "pending.pem").unlink(missing_ok=True)
        return belonging

    def renewed(self, key_pem: str, certificate_pem: str) -> Credentials:
        """Replace this host's certificate and its key."""
        write_private(self.folder / "host.pem", key_pem + certificate_pem)
        return self.credentials()

    def keep_authority(self, pem: str) -> None:
        """Write the CA's private key down, for the day when this host leads. Raises ConfigError if it is another's."""
        authority = Authority(pem)
        if authority.certificate_pem != self.ca_pem():
            raise ConfigError("what came as the CA's key is of another CA")
        write_private(self.folder / "authority.pem", authority.pem)

    def credentials(self) -> Credentials:
        """What this host shows to others, and whom it trusts."""
        return Credentials.load(self.folder / "host.pem", self.ca_pem())

    def ca_pem(self) -> str:
        return self._read("ca.pem")

    def gossip_key(self) -> str:
        """The one in use, base64: as it was when this host joined, or as it was rotated since."""
        try:
            keys = msgspec.json.decode(self._keyring.read_bytes(), type=list[str])
        except FileNotFoundError:
            keys = []
        except msgspec.DecodeError as error:
            raise ConfigError(f"{self._keyring} is damaged: {error}") from None
        return keys[0] if keys else self._read("gossip.key").strip()

    def authority(self) -> Authority | None:
        """The CA with its private key, on voters that have got it."""
        if not self.ready():
            return None
        return Authority(self._read("authority.pem"))

    # ---------------------------------------------------------------- peer.ports.Authority

    def cluster(self) -> str:
        return self._belonging().cluster

    def ready(self) -> bool:
        return (self.folder / "authority.pem").exists()

    def ca_sha256(self) -> str:
        return certificates.ca_sha256(self.ca_pem())

    def private_key(self) -> str:
        return self._authority().pem

    def issue(self, csr_pem: str, grant: Grant, seeds: tuple[str, ...]) -> Enrolled:
        authority = self._authority()
        return Enrolled(
            cluster=grant.cluster,
            peer_id=grant.peer_id,
            certificate=authority.sign(csr_pem, grant),
            ca=authority.certificate_pem,
            voter=grant.voter,
            seeds=seeds,
            gossip_key=self.gossip_key(),
        )

    def host(self) -> Host:
        """The one that made the cluster did so before there was a store to record it in."""
        file = self.folder / "host.pem"
        belonging, credentials = self._belonging(), self.credentials()
        subject = credentials.subject
        return Host(
            peer_id=subject.peer_id,
            enrolled_at=subject.not_before,
            serial=subject.serial,
            key_sha256=certificates.key_sha256(file.read_text()),
            expires_at=subject.not_after,
            voter=belonging.voter,
            addresses=credentials.addresses,
        )

    # ---------------------------------------------------------------- parts

    def _belonging(self) -> Belonging:
        belonging = self.belonging()
        if belonging is None:
            raise ConfigError(f"{self.folder} is of no cluster")
        return belonging

    def _authority(self) -> Authority:
        authority = self.authority()
        if authority is None:
            raise Unavailable("this host has not got the CA's key yet; try again", retry_after_s=2.0)
        return authority

    def _join(self, key_pem: str, enrolled: Enrolled, *, founder: bool = False) -> Belonging:
        belonging = Belonging(
            cluster=enrolled.cluster,
            peer_id=enrolled.peer_id,
            voter=enrolled.voter,
            seeds=enrolled.seeds,
            founder=founder,
        )
        write_private(self.folder / "host.pem", key_pem + enrolled.certificate)
        write_private(self.folder / "ca.pem", enrolled.ca)
        write_private(self.folder / "gossip.key", enrolled.gossip_key + "\n")
        self._keep(belonging)
        return belonging

    def _keep(self, belonging: Belonging) -> None:
        write_private(self.folder / "cluster.json", msgspec.json.encode(belonging).decode() + "\n")

    def _check_in_none(self) -> None:
        belonging = self.belonging()
        if belonging is not None:
            raise Conflict(
                f"this host is in the cluster {belonging.cluster!r} already, as {belonging.peer_id}",
                code="in_a_cluster",
            )

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            raise ConfigError(f"{self.folder / name} is missing") from None

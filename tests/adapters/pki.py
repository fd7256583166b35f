"""Clusters' CAs and hosts' certificates for tests."""

from __future__ import annotations

import time
from pathlib import Path

from peer.adapters.links import certificates
from peer.adapters.links.certificates import Authority, Credentials
from peer.state.enrol import CERTIFICATE_S, CLOCK_SKEW_S, Grant


class Pki:
    """A cluster's CA. `folder` gets the hosts' files."""

    def __init__(self, folder: Path, cluster: str = "c1", authority: Authority | None = None) -> None:
        self.folder = folder
        self.cluster = cluster
        self.authority = authority or Authority.create(time.time())
        self.issued = 0

    @property
    def ca_pem(self) -> str:
        return self.authority.certificate_pem

    @property
    def ca_sha256(self) -> str:
        return certificates.ca_sha256(self.ca_pem)

    def grant(self, peer_id: str, key_sha256: str, *, age_s: float = 0.0) -> Grant:
        """For a certificate that was made so long ago."""
        self.issued += 1
        made_at = time.time() - age_s
        return Grant(
            cluster=self.cluster,
            peer_id=peer_id,
            serial=f"{self.issued:x}",
            key_sha256=key_sha256,
            not_before=made_at - CLOCK_SKEW_S,
            not_after=made_at + CERTIFICATE_S,
            voter=True,
            addresses=("127.0.0.1",),
        )

    def host(self, peer_id: str, *, age_s: float = 0.0, trusts: str = "") -> Credentials:
        """A host's certificate with its key. `trusts`: a CA, PEM, if not this one."""
        key = certificates.new_key()
        grant = self.grant(peer_id, certificates.key_sha256(key), age_s=age_s)
        file = self.folder / f"{peer_id}-{self.cluster}-{self.issued}.pem"
        file.write_text(key + self.authority.sign(certificates.request(key), grant))
        return Credentials.load(file, trusts or self.ca_pem)

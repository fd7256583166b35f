"""A certificate authority that writes down what it was to sign."""

from __future__ import annotations

from peer.state.enrol import Enrolled, Grant, Host


class FakeAuthority:
    """peer.ports.Authority of one host. `broken` is raised by everything that it is asked."""

    def __init__(self, peer_id: str = "p1", *, has_key: bool = True) -> None:
        self.peer_id = peer_id
        self.has_key = has_key
        self.broken: Exception | None = None
        self.signed: list[tuple[str, Grant]] = []  # request, grant

    def cluster(self) -> str:
        self._check()
        return "c1"

    def ready(self) -> bool:
        self._check()
        return self.has_key

    def ca_sha256(self) -> str:
        self._check()
        return "ca" * 32

    def issue(self, csr_pem: str, grant: Grant, seeds: tuple[str, ...]) -> Enrolled:
        self._check()
        self.signed.append((csr_pem, grant))
        return Enrolled(
            cluster=grant.cluster,
            peer_id=grant.peer_id,
            certificate=f"{grant.peer_id} {grant.serial}",
            ca="CA",
            voter=grant.voter,
            seeds=seeds,
        )

    def host(self) -> Host:
        self._check()
        return Host(peer_id=self.peer_id, enrolled_at=1.0, serial="1", key_sha256="0" * 64, expires_at=2e9)

    def private_key(self) -> str:
        self._check()
        return "KEY"

    def _check(self) -> None:
        if self.broken is not None:
            raise self.broken

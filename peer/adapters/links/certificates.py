"""The cluster's own certificates: its CA, what the CA signs for hosts, and TLS contexts that trust nothing else.

Keys are ECDSA on P-256: every TLS library in use speaks it, and OpenSSL signs with it in some 20 us. A host's
certificate names it in a URI, `bitinglip://CLUSTER/PEER_ID`; times are seconds since 1970.
"""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from peer.errors import BadRequest, ConfigError, Unauthorized
from peer.state.enrol import CLOCK_SKEW_S, Grant

SCHEME: Final = "bitinglip"
LINK_ALPN: Final = "bitinglip-link/1"
ENROL_ALPN: Final = "bitinglip-enrol/1"
CA_S: Final = 20 * 365 * 86_400.0
_BAD = (  # what bytes from elsewhere may raise
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class Subject(NamedTuple):
    """Whom a host's certificate names. `serial` is hexadecimal."""

    cluster: str
    peer_id: str
    serial: str
    not_before: float
    not_after: float


# ---------------------------------------------------------------- keys and requests


def new_key() -> str:
    """A fresh private key, PEM."""
    return _key_pem(ec.generate_private_key(ec.SECP256R1()))


def request(key_pem: str) -> str:
    """A certificate request for this key, PEM. It names nobody: the grant does."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(_private(key_pem), hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def key_sha256(key_pem: str) -> str:
    """The digest of a private key's public half. Raises ConfigError."""
    return _spki_sha256(_private(key_pem).public_key())


def requested_key_sha256(csr_pem: str) -> str:
    """The digest of the public key that the request is signed with. Raises BadRequest."""
    return _spki_sha256(_requested_key(csr_pem))


def ca_sha256(certificate_pem: str) -> str:
    """The digest of a CA's public key, as join tokens carry it. Raises ConfigError."""
    return _spki_sha256(_certificate(certificate_pem).public_key())


def ca_sha256_of(certificate_der: bytes) -> str:
    """Likewise of a certificate that came over the network. Raises Unauthorized."""
    try:
        return _spki_sha256(x509.load_der_x509_certificate(certificate_der).public_key())
    except _BAD as error:
        raise Unauthorized(f"what was sent as the CA's certificate is none: {error}") from None


def pem_of(certificate_der: bytes) -> str:
    return ssl.DER_cert_to_PEM_cert(certificate_der)


def der_of(certificate_pem: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate_pem)


def subject_of(certificate_der: bytes) -> Subject:
    """Whom a certificate names; that the CA signed it is the TLS library's to check. Raises Unauthorized."""
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        (uri,) = uris  # with two names it would be two peers
        parts = urlsplit(uri)
        cluster, peer_id = unquote(parts.netloc), unquote(parts.path.removeprefix("/"))
        if uri != _uri(cluster, peer_id):
            raise ValueError(f"{uri!r} names no peer")
    except _BAD as error:
        raise Unauthorized(f"a certificate that names no peer: {error}") from None
    return Subject(
        cluster,
        peer_id,
        f"{certificate.serial_number:x}",
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def check_issued(certificate_pem: str, ca_pem: str, key_pem: str, now: float) -> Subject:
    """Whom a certificate names that the CA issued for this key. Raises Unauthorized, also where the clocks differ."""
    try:
        certificate, ca = _certificate(certificate_pem), _certificate(ca_pem)
        certificate.verify_directly_issued_by(ca)
        if _spki_sha256(certificate.public_key()) != key_sha256(key_pem):
            raise ValueError("it is for another key")
    except (ConfigError, *_BAD) as error:
        raise Unauthorized(f"the certificate that came is not usable: {error}") from None
    subject = subject_of(der_of(certificate_pem))
    if not subject.not_before <= now < subject.not_after:
        raise Unauthorized(
            f"the certificate that came holds from {_moment(subject.not_before)} to {_moment(subject.not_after)}, and "
            f"this host's clock says {_moment(now)}: set the clock right",
            code="clock_skew",
        )
    return subject


# ---------------------------------------------------------------- files that a host signs


def sign(key_pem: str, data: bytes) -> bytes:
    """A signature of `data` by this private key. Raises ConfigError."""
    return _private(key_pem).sign(data, ec.ECDSA(hashes.SHA256()))


def signer_of(certificate_pem: str, ca_pem: str, signature: bytes, data: bytes, now: float) -> Subject:
    """Whose signature it is: of a host that the CA issued a certificate for, which holds now. Raises Unauthorized.

    Whether the host has been revoked since is for the caller to know.
    """
    try:
        certificate = _certificate(certificate_pem)
        certificate.verify_directly_issued_by(_certificate(ca_pem))
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("its key is not of the kind that bitinglip makes")
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Unauthorized("it is not signed by a host of this cluster, or was changed since") from None
    except (ConfigError, *_BAD) as error:
        raise Unauthorized(f"the certificate that it is signed with is not usable: {error}") from None
    subject = subject_of(der_of(_certificate_pem(certificate)))
    if not subject.not_before <= now < subject.not_after:
        raise Unauthorized(
            f"the certificate of {subject.peer_id} that it is signed with held until {_moment(subject.not_after)}"
        )
    return subject


# ---------------------------------------------------------------- the CA


class Authority:
    """The cluster's CA with its private key."""

    def __init__(self, pem: str) -> None:
        """`pem`: the private key and the certificate, one after the other. Raises ConfigError."""
        self._key = _private(pem)
        self._certificate = _certificate(pem)
        if _spki_sha256(self._key.public_key()) != _spki_sha256(self._certificate.public_key()):
            raise ConfigError("the CA's certificate and its private key do not belong together")

    @classmethod
    def create(cls, now: float) -> Authority:
        """A new CA, for a new cluster."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bitinglip cluster CA")])
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_moment(now - CLOCK_SKEW_S))
            .not_valid_after(_moment(now + CA_S))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(identifier, critical=False)
        )
        certificate = builder.sign(key, hashes.SHA256())
        return cls(_key_pem(key) + _certificate_pem(certificate))

    @property
    def certificate_pem(self) -> str:
        return _certificate_pem(self._certificate)

    @property
    def pem(self) -> str:
        """Private key and certificate: for files with mode 0600 and links to voters only."""
        return _key_pem(self._key) + self.certificate_pem

    def sign(self, csr_pem: str, grant: Grant) -> str:
        """The certificate that was granted, PEM. Raises BadRequest if the request is for another key."""
        key = _requested_key(csr_pem)
        if _spki_sha256(key) != grant.key_sha256:
            raise BadRequest("the certificate request is for another key than was granted")
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(_uri(grant.cluster, grant.peer_id))]
        names += [_address_name(address) for address in dict.fromkeys(grant.addresses)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, grant.peer_id)]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(int(grant.serial, 16))
            .not_valid_before(_moment(grant.not_before))
            .not_valid_after(_moment(grant.not_after))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False
            )
        )
        return _certificate_pem(builder.sign(self._key, hashes.SHA256()))


def revocation_list(signer_pem: str, serials: Iterable[str], now: float, valid_s: float) -> str:
    """Revoked certificates as a CRL, PEM, for programs that do not ask a peer: etcd reads it at each handshake.

    `signer_pem` is a private key and its certificate. Raises ConfigError.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_certificate(signer_pem).subject)
        .last_update(_moment(now - CLOCK_SKEW_S))
        .next_update(_moment(now + valid_s))
    )
    for serial in serials:
        revoked = x509.RevokedCertificateBuilder().serial_number(int(serial, 16))
        builder = builder.add_revoked_certificate(revoked.revocation_date(_moment(now)).build())
    signed = builder.sign(_private(signer_pem), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


# ---------------------------------------------------------------- what a host shows


@dataclass(frozen=True, slots=True)
class Credentials:
    """A host's certificate with its key, in a file of mode 0600 (the TLS library reads files), and the CA to trust."""

    file: Path
    ca_pem: str
    subject: Subject
    addresses: tuple[str, ...]  # that the certificate speaks for

    @classmethod
    def load(cls, file: Path, ca_pem: str) -> Credentials:
        """Raises ConfigError on a file that is damaged."""
        try:
            pem = file.read_text()
            certificate_pem = pem[pem.index("-----BEGIN CERTIFICATE-----") :]
            subject = subject_of(der_of(certificate_pem))
        except (OSError, ValueError, Unauthorized) as error:
            raise ConfigError(f"{file} cannot be used as this host's certificate: {error}") from None
        return cls(file, ca_pem, subject, _addresses_of(_certificate(certificate_pem)))

    def server_context(self) -> ssl.SSLContext:
        """Asks for a client certificate and checks one that comes; whether there must be one is told by the protocol.

        Who joins has none yet. OpenSSL cannot demand one for one ALPN protocol only: the listener does, right after the
        handshake.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._prepare(context)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0  # no resumption: a revoked certificate is looked at every time
        context.set_alpn_protocols([LINK_ALPN, ENROL_ALPN])
        return context

    def client_context(self) -> ssl.SSLContext:
        """Trusts the cluster's CA only. Whom the certificate names is for the caller to compare."""
        context = trusting(self.ca_pem)
        self._prepare(context)
        context.set_alpn_protocols([LINK_ALPN])
        return context

    def _prepare(self, context: ssl.SSLContext) -> None:
        _strict(context)
        try:
            context.load_cert_chain(self.file)
            context.load_verify_locations(cadata=self.ca_pem)
        except (OSError, ValueError) as error:  # ssl.SSLError among them
            raise ConfigError(f"{self.file} cannot be used as this host's certificate: {error}") from None


def trusting(ca_pem: str) -> ssl.SSLContext:
    """A client's context that trusts this CA alone. Hosts are known by their names as peers, not by addresses."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _strict(context)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the CA's certificate cannot be used: {error}") from None
    return context


def trusting_nobody_yet() -> ssl.SSLContext:
    """For asking who is there, and nothing else: any certificate passes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _strict(context)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([ENROL_ALPN])
    return context


def _strict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION


# ---------------------------------------------------------------- parts


def _uri(cluster: str, peer_id: str) -> str:
    return f"{SCHEME}://{quote(cluster, safe='')}/{quote(peer_id, safe='')}"


def _address_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _addresses_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """In their order."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress))


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)


def _private(pem: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except _BAD as error:
        raise ConfigError(f"a private key cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("a private key is not of the kind that bitinglip makes")
    return key


def _certificate(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except _BAD as error:
        raise ConfigError(f"a certificate cannot be read: {error}") from None


def _requested_key(csr_pem: str) -> ec.EllipticCurvePublicKey:
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        key = csr.public_key()
        valid = csr.is_signature_valid
    except _BAD as error:
        raise BadRequest(f"the certificate request cannot be read: {error}") from None
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadRequest("the certificate request is not signed with a key on P-256")
    return key


def _spki_sha256(key: CertificatePublicKeyTypes) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _certificate_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()

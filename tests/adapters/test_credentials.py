"""Secrets that systemd hands over as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer import credentials, settings
from peer.errors import ConfigError

API = "api:\n  tls: {certificate: 'credential:tls.crt', key: 'credential:tls.key'}\n"


@pytest.fixture
def given(tmp_path: Path) -> Path:
    directory = tmp_path / "given"
    directory.mkdir()
    (directory / "tls.crt").write_text("c")
    (directory / "tls.key").write_text("k")
    (directory / "join.token").write_text("  token \n")
    return directory


def test_a_path_in_the_configuration_may_be_a_credential(given: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.yaml"
    file.write_text(API)
    config = settings.load(file=file, environ={credentials.VARIABLE: str(given)})
    assert config.api.tls is not None
    assert config.api.tls.key == str(given / "tls.key")
    outside = settings.load(file=file, environ={})  # `config check` by a person, who has none
    assert outside.api.tls is not None
    assert outside.api.tls.key == "credential:tls.key"


def test_one_that_was_not_given_is_a_mistake_with_its_line(given: Path, tmp_path: Path) -> None:
    (given / "tls.key").unlink()
    file = tmp_path / "b.yaml"
    file.write_text(API)
    with pytest.raises(
        ConfigError, match=r"b\.yaml:2: `api\.tls\.key`: systemd gave no credential `tls\.key`"
    ):
        settings.load(file=file, environ={credentials.VARIABLE: str(given)})


@pytest.mark.parametrize("name", ["", "../identity", "/etc/shadow", "a/b", ".hidden", "a\n"])
def test_names_that_are_none(name: str, given: Path) -> None:
    with pytest.raises(ValueError, match="names no credential"):
        credentials.resolve(f"credential:{name}", {credentials.VARIABLE: str(given)})


def test_reading(given: Path) -> None:
    environ = {credentials.VARIABLE: str(given)}
    assert credentials.read(credentials.JOIN_TOKEN, environ) == "token"
    assert credentials.read(credentials.ADMIN_KEY, environ) is None
    assert credentials.read(credentials.JOIN_TOKEN, {}) is None
    (given / "join.token").write_bytes(b"x" * (credentials.BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="longer than"):
        credentials.read(credentials.JOIN_TOKEN, environ)
    (given / "join.token").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        credentials.read(credentials.JOIN_TOKEN, environ)


def test_an_admin_key_of_the_owners(given: Path) -> None:
    environ = {credentials.VARIABLE: str(given)}
    assert credentials.admin_key(environ) is None
    file = given / "admin.key"
    file.write_text(f"blk_0a1b2c3d_{'5' * 64}\n")
    assert credentials.admin_key(environ) == ("0a1b2c3d", "5" * 64)
    file.write_text("password\n")
    with pytest.raises(ConfigError, match="is no API key") as told:
        credentials.admin_key(environ)
    assert "password" not in str(told.value)

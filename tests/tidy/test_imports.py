"""Who may import whom, where an allow-list says it best; `.importlinter` has the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tidy.source import PRODUCT, ROOT, imports, report, sources

IMPURE = frozenset(
    {
        "asyncio", "datetime", "io", "logging", "os", "pathlib", "random", "secrets", "socket", "subprocess",
        "tempfile", "threading", "time", "uuid",
    }
)  # fmt: skip
# Of the composition roots only: they wire everything.
MAY_IMPORT_API = ("peer.node", "peer.cli")


def offenders(folder: str, allowed: tuple[str, ...], *, standard: bool = True) -> list[str]:
    """Imports of a folder beyond the allowed ones (and the standard library)."""
    found = []
    for source in sources(folder):
        for line, name in imports(source):
            top = name.partition(".")[0]
            if standard and top in sys.stdlib_module_names:
                continue
            if not any(name == each or name.startswith(f"{each}.") for each in allowed):
                found.append(f"{source.path}:{line}: imports {name}")
    return found


def test_records_import_the_standard_library_and_msgspec() -> None:
    report(offenders("peer/state", ("peer.state", "msgspec")))


def test_decisions_import_records_and_limits() -> None:
    report(offenders("peer/decide", ("peer.decide", "peer.state", "peer.limits", "peer.errors", "msgspec")))


def test_decisions_have_no_clock_no_chance_and_no_world() -> None:
    report(
        [
            f"{source.path}:{line}: imports {name}"
            for source in sources("peer/decide", "peer/state")
            for line, name in imports(source)
            if name.partition(".")[0] in IMPURE
        ]
    )


def test_the_link_imports_records_and_ports() -> None:
    allowed = ("peer.link", "peer.state", "peer.ports", "peer.limits", "peer.errors", "msgspec", "trio")
    report(offenders("peer/link", allowed))


def test_the_api_sees_only_the_port() -> None:
    allowed = tuple(f"peer.{name}" for name in ("state", "ports", "errors", "limits", "config", "version"))
    report([each for each in offenders("api", (*allowed, "api")) if "imports peer" in each])


def test_the_engine_stands_alone() -> None:
    report([each for each in offenders("engine", ()) if "imports peer" in each or "imports api" in each])


def test_a_peer_knows_the_engines_protocol_only() -> None:
    report([each for each in offenders("peer", ("engine.protocol",)) if "imports engine" in each])


def test_only_the_engine_loads_tinygrad() -> None:
    report(
        [
            f"{source.path}:{line}: imports {name}"
            for source in sources("peer", "api")
            for line, name in imports(source)
            if name.partition(".")[0] in ("tinygrad", "tokenizers", "numpy")
        ]
    )


def test_only_composition_roots_import_the_api() -> None:
    report(
        [
            f"{source.path}:{line}: imports {name}"
            for source in sources("peer")
            if not source.module.startswith(MAY_IMPORT_API)
            for line, name in imports(source)
            if name.partition(".")[0] == "api"
        ]
    )


def test_adapters_are_wired_by_composition_roots_only() -> None:
    """The leader and the executor see ports."""
    roots = ("peer.node", "peer.cluster_host", "peer.cli", "peer.offline_keys", "peer.adapters")
    report(
        [
            f"{source.path}:{line}: imports {name}"
            for source in sources("peer")
            if not source.module.startswith(roots)
            for line, name in imports(source)
            if name.startswith("peer.adapters")
        ]
    )


def test_the_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_no_star_imports() -> None:
    """Star imports hide where names come from."""
    report(
        [
            f"{source.path}:{line}: imports {name}"
            for source in sources(*PRODUCT)
            for line, name in imports(source)
            if name.endswith(".*")
        ]
    )

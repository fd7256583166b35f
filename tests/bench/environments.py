"""The references' own environments under .bench/ (ignored by git), made on first use from frozen lists."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.bench.processes import REPOSITORY, Missing

BENCH = REPOSITORY / ".bench"
REFERENCES = Path(__file__).resolve().parent / "references"
INSTALL_S = 900.0
BUILD_S = 3600.0
VERSION_S = 60.0


def environment(name: str, variables: Mapping[str, str] | None = None) -> Path:
    """The Python of a reference's virtual environment, made or renewed if need be. Raises Missing.

    `variables` are for pip, beside this process's own.
    """
    requirements = REFERENCES / f"requirements-{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    home = BENCH / name
    python, mark = home / "bin" / "python", home / "installed"
    if python.exists() and mark.exists() and mark.read_text() == digest:
        return python
    print(f"making .bench/{name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(home)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-input", "-r", str(requirements)], variables)
    mark.write_text(digest)
    return python


def program(name: str, package: str, service: str = "") -> str:
    """Path of a program, from Debian if it is not there (as root; service masked first). Raises Missing."""
    found = shutil.which(name)
    if found:
        return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Missing(f"{name} is not installed and apt-get needs root: apt-get install {package}")
    if service and shutil.which("systemctl"):
        _run(["systemctl", "mask", service])
    _run(["apt-get", "update", "-q"])
    _run(["apt-get", "install", "-y", "-q", "--no-install-recommends", package])
    found = shutil.which(name)
    if not found:
        raise Missing(f"{package} was installed, but there is no {name}")
    return found


def built(name: str, package: str, variables: Mapping[str, str]) -> Path:
    """Like `environment`, where `package` has no wheel: one is built, and kept in .bench/wheels. Raises Missing.

    `variables` say how; a wheel that pip made some other way before is not taken.
    """
    wheels = BENCH / "wheels"
    if not list(wheels.glob(f"{package}-{pinned(name, package)}-*.whl")):
        print(f"building {package}, which takes minutes ...", file=sys.stderr, flush=True)
        if not shutil.which("g++"):
            raise Missing(f"{package} is built from source, and there is no g++: apt-get install g++")
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-input",
            "--no-deps",
            "--no-cache-dir",
        ]
        wanted = f"{package}=={pinned(name, package)}"
        _run([*command, "--wheel-dir", str(wheels), wanted], variables, BUILD_S)
    return environment(name, {"PIP_FIND_LINKS": f"{os.environ.get('PIP_FIND_LINKS', '')} {wheels}".strip()})


def _run(command: list[str], variables: Mapping[str, str] | None = None, limit_s: float = INSTALL_S) -> None:
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    quiet |= dict(variables or {})
    try:
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=limit_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{' '.join(command[:4])}: {error}") from None
    if done.returncode:
        raise Missing(f"{' '.join(command[:4])} failed: {done.stderr.strip()[-400:]}")


def version(command: list[str]) -> str:
    """First line that a program says of its version."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=VERSION_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip().split("\n")[0]


def pinned(name: str, package: str) -> str:
    """The version that a frozen requirements file names."""
    for line in (REFERENCES / f"requirements-{name}.txt").read_text().splitlines():
        if line.lower().startswith(f"{package}=="):
            return line.split("==", 1)[1]
    return "?"

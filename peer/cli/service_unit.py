"""The service's unit and system user, made for one host out of the files that come with bitinglip."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

USER: Final = "bitinglip"
STATE: Final = Path("/var/lib/bitinglip")
HIDDEN: Final = (Path("/home"), Path("/root"), Path("/run/user"), Path("/tmp"), Path("/var/tmp"))
_USER_NAME: Final = re.compile(r"[a-z_][a-z0-9_-]{0,30}")


def own_command() -> list[str]:
    """How this very bitinglip is started, by absolute paths."""
    script = Path(sys.executable).with_name("bitinglip")
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "peer"]


def render(
    template: str, command: Sequence[str], *, user: str, data_dir: Path, writable: Sequence[Path] = ()
) -> str:
    """The unit. `writable`: folders besides the data directory that the peer writes to.

    Raises ValueError if the template lacks a line that has to be replaced.
    """
    lines = _replace(
        template, "ExecStart=/usr/bin/bitinglip up", "ExecStart=" + " ".join(map(quoted, command))
    )
    if user != USER:  # whose group may have another name
        lines = _replace(lines, f"User={USER}\nGroup={USER}\n", f"User={user}\n")
    state = f"Environment=BITINGLIP_DATA_DIR={STATE}"
    if data_dir != STATE:
        lines = _replace(
            lines, state, "Environment=" + quoted(f"BITINGLIP_DATA_DIR={data_dir}", dollar=False)
        )
        lines = _replace(lines, "StateDirectory=bitinglip\nStateDirectoryMode=0700\n", "")
        writable = (data_dir, *writable)
    if writable:
        paths = " ".join(quoted(str(path), dollar=False) for path in writable)
        lines = _replace(lines, "ProtectSystem=strict", f"ProtectSystem=strict\nReadWritePaths={paths}")
    return lines


def render_user(template: str, *, user: str, data_dir: Path) -> str:
    """The sysusers.d file. Raises ValueError as `render` does."""
    home = quoted(str(data_dir), dollar=False)
    lines = _replace(template, f'u {USER} - "bitinglip peer" {STATE}', f'u {user} - "bitinglip peer" {home}')
    for group in ("render", "video"):
        lines = _replace(lines, f"m {USER} {group}", f"m {user} {group}")
    return lines


def is_user_name(text: str) -> bool:
    return _USER_NAME.fullmatch(text) is not None


def hidden(path: Path) -> str:
    """Why the service does not see the path, "" if it does: sandboxed folders, and what others may not enter."""
    for spot in (path, path.resolve()):
        for folder in HIDDEN:
            if spot.is_relative_to(folder):
                return f"{spot} lies in {folder}, which the service does not see"
        for parent in spot.parents:
            if parent.exists() and not parent.stat().st_mode & 0o001:
                return f"{parent} may not be entered by other users"
    return ""


def quoted(text: str, *, dollar: bool = True) -> str:
    """A word of a unit's line. `dollar`: of a command line, where variables are put in."""
    text = text.replace("%", "%%")
    if dollar:
        text = text.replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", text, re.ASCII):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _replace(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"the packaged file has no line `{old.strip()}`; is bitinglip installed completely?")
    return text.replace(old, new)

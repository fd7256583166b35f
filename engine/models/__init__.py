"""One file per model family. A family is whitelisted by being here: an unknown architecture is never guessed at."""

from __future__ import annotations

from engine.errors import LoadError
from engine.gguf import Gguf

FAMILIES = ("llama",)


def check_family(gguf: Gguf, family: str) -> None:
    """Raises LoadError `unsupported_architecture` unless file and catalogue agree on a known family."""
    found = gguf.text("general.architecture")
    if found not in FAMILIES or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise LoadError(
            "unsupported_architecture",
            f"{gguf.path} is of architecture {found!r} (catalogue: {family!r}); usable are: {known}",
        )
    if found != family:
        raise LoadError(
            "bad_model_file", f"{gguf.path} is a {found!r} model and the catalogue says {family!r}"
        )

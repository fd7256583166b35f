"""Files that come with bitinglip and are no Python: configurations, the catalogue, the service's unit."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).resolve().parent


def find(folder: str, name: str) -> Path:
    """`folder/name` of a checkout, else the installation's share/bitinglip/name; the first place if in none."""
    places = (
        PACKAGE.parent / folder / name,
        Path(sys.prefix) / "share" / "bitinglip" / name,
        Path(sysconfig.get_path("data")) / "share" / "bitinglip" / name,
    )
    return next((place for place in places if place.is_file()), places[0])

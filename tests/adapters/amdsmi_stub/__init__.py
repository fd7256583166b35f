"""Builds the stand-in libamd_smi.so; every function that the package wants and stub.c lacks answers NOT_SUPPORTED."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build(rocm: Path) -> Path:
    """Compile it to `rocm`/lib, where ROCM_PATH points the package."""
    spec = importlib.util.find_spec("amdsmi")
    assert spec is not None
    assert spec.origin is not None
    wrapper = (Path(spec.origin).parent / "amdsmi_wrapper.py").read_text()
    wanted = set(re.findall(r"_libraries\['libamd_smi\.so'\]\.(\w+)", wrapper))
    there = set(re.findall(r"^(?:int|void) (amdsmi_\w+)\(", (HERE / "stub.c").read_text(), re.MULTILINE))
    assert there <= wanted | {"amdsmi_free_name_value_pairs"}, there - wanted
    rest = rocm / "rest.c"
    (rocm / "lib").mkdir(parents=True)
    rest.write_text("".join(f"int {name}(void) {{ return 2; }}\n" for name in sorted(wanted - there)))
    library = rocm / "lib" / "libamd_smi.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, HERE / "stub.c", rest],
        check=True,
        capture_output=True,
        text=True,
    )
    return library

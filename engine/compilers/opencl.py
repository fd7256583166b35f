"""OpenCL kernels that leave one of their buffers unread, as a model with a single slot has them.

tinygrad 0.13 lists a kernel's arguments by their numbers as if none were missing, and fails with an IndexError or
binds the wrong buffer where one is. `install` lists them in the order in which they are bound.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tinygrad.renderer.cstyle import OpenCLRenderer
from tinygrad.uop.ops import Ops, UOp


def _arguments(_: Any, uops: list[UOp]) -> tuple[Any, ...]:
    """`OpenCLRenderer.aux`: for each buffer that is bound, where the kernel takes it and as what."""
    found: defaultdict[int, list[Any]] = defaultdict(list)
    for place, parameter in enumerate(uop for uop in uops if uop.op is Ops.PARAM):
        found[parameter.arg].append((place, parameter.dtype))
    return (tuple(tuple(found[number]) for number in sorted(found)),)


def install() -> None:
    """Call it before the first kernel."""
    OpenCLRenderer.aux = _arguments

"""Compiled kernels kept between starts.

tinygrad keeps only what its compiler made and lowers every kernel to source again to find it, 50 ms of Python each:
most of a warm start. `install` keeps the finished program under the kernel's own key, in the same private file.
A key begins with what kernels were made for (`engine.compatibility`), so that a peer can pick those that another
host may use.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tinygrad.codegen import to_program
from tinygrad.engine import realize
from tinygrad.helpers import (
    ALLOW_TF32,
    CACHELEVEL,
    CPU_COUNT,
    DISABLE_FAST_IDIV,
    EMULATED_DTYPES,
    IMAGE,
    NOLOCALS,
    NOOPT,
    TRANSCENDENTAL,
    USE_TC,
    VERSION,
    db_connection,
    diskcache_get,
    diskcache_put,
)
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import Ops, UOp

from engine.compilers import pruning

TABLE = "bitinglip_programs"
_SETTINGS = (
    ALLOW_TF32,
    DISABLE_FAST_IDIV,
    EMULATED_DTYPES,
    IMAGE,
    NOLOCALS,
    NOOPT,
    TRANSCENDENTAL,
    USE_TC,
)
_programs: dict[str, UOp] = {}
_made_for = ""
_compiled = 0


def install(made_for: str = "") -> None:
    """Make tinygrad look here before it lowers a kernel. Call it before the first kernel.

    `made_for` is `engine.compatibility.digest` of this device.
    """
    global _made_for
    _made_for = made_for
    realize.to_program = stored_program


def compiled() -> int:
    """How many kernels this process has lowered and compiled because they were kept nowhere."""
    return _compiled


def stored_program(ast: UOp, renderer: Any) -> UOp:
    """`tinygrad.codegen.to_program`, from memory, the cache file or tinygrad."""
    global _compiled
    if ast.op is Ops.PROGRAM and len(ast.src) == 5:  # compiled already
        return ast
    if (
        ast.op is Ops.SINK and ast.arg.beam and ast.arg.opts_to_apply is not None
    ):  # there is nothing to search
        ast = ast.replace(arg=replace(ast.arg, beam=0))
    key = _key(ast, renderer)
    program = _programs.get(key)
    if program is None:
        program = diskcache_get(TABLE, key)
        if program is None:
            _compiled += 1
            program = _without_source_graph(to_program(ast, renderer), renderer)
            _keep(key, program)
        _programs[key] = program
    return program


def _keep(key: str, program: UOp) -> None:
    if CACHELEVEL < 1:
        return
    diskcache_put(TABLE, key, program)
    with suppress(sqlite3.OperationalError):  # others write for too long: the next kernel makes room
        pruning.prune(db_connection(), f"{TABLE}_{VERSION}", _made_for, pruning.BYTES_MAX)


def _key(ast: UOp, renderer: Any) -> str:
    target = renderer.target  # its interface and index say which card it is, not which kernels it runs
    parts = (
        ast.key.hex(),
        ast.tag,
        type(renderer).__name__,
        (target.device, target.renderer, target.arch),
        renderer.compiler.cachekey,
        CPU_COUNT.value if target.device == "CPU" else None,
        *(setting.value for setting in _SETTINGS),
    )
    return f"{_made_for}:{hashlib.sha256(repr(parts).encode()).hexdigest()}"


def _without_source_graph(program: UOp, renderer: Any) -> UOp:
    """What running needs: the binary and how to launch it.

    The graphs it came from are large and deep to pickle. The estimated work is only for tinygrad's statistics, and
    adding up a step's hundreds of symbolic estimates took a tenth of a load.
    """
    if program.op is not Ops.PROGRAM or len(program.src) != 5:
        return program
    sink, target, _, source, binary = program.src
    arg = replace(sink.arg, estimates=Estimates())
    if renderer.has_local and program.arg.local_size is None:  # tinygrad will try sizes, and needs the graph
        return program.replace(src=(sink.replace(arg=arg), *program.src[1:]))
    return program.replace(src=(UOp(Ops.SINK, arg=arg), target, UOp(Ops.LINEAR), source, binary))

"""Style that a linter does not know: sizes, broad excepts, loose ends."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.tidy.source import PRODUCT, ROOT, Source, report, sources

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
# Supervisors: whatever those they watch raise is theirs to report. "module:function".
BROAD_EXCEPT_ALLOWED = frozenset(
    {
        "api.http:__call__",  # any bug in a handler is a 500 without its text
        "api.wire:_run",  # one request must not take the server with it
        "api.wire:run",  # one connection must not take the others with it
        "engine.text.folder_tokenizer:_tried",  # the library raises plain Exception, or panics, on a bad file
        "engine.runner:supervise",  # the device may be in any state: the process reports it and ends
        "peer.adapters.stores.sqlite_writer:_guarded",  # whatever a write raises, the store is broken then
        "peer.adapters.devices.telemetry_amdsmi:open_amdsmi",  # AMD's package raises anything while it is imported
        "peer.adapters.links.tls_network:_serve",  # a bug in serving one caller ends no peer
        "peer.deciding:command",  # a bug in a decision costs that command and no more
        "peer.deciding:report",  # likewise that report
        "peer.registrar:answer",  # likewise a signature that fails
        "simulations.campaign:perform",  # a simulator that breaks in one run must not take the campaign with it
        "simulations.policy.driver:run",  # what no decision raised is the simulator's own fault, and says so
        "simulations.policy.shell:_apply",  # a decision that cannot be applied is a failure found
        "simulations.policy.shell:_batch",  # likewise one whose ended tasks cannot be counted
        "simulations.policy.shell:_decide_command",  # likewise one that raises what no caller expects
        "simulations.policy.shell:_take",  # likewise one that raises at all
        "simulations.rehearsal.cluster:rehearse",  # what no decision raised is the rehearsal's own fault
        "simulations.world.calls:_serve",  # a bug in a handler ends the run, blamed on whose code it is
        "simulations.world.kernel:_own",  # a task of the world that fails ends the run
        "simulations.world.kernel:run",  # a simulated process may end with anything: that is the finding
    }
)
LOOSE_END = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
SELF = "tests/tidy/test_tidy.py"


def test_files_are_short() -> None:
    report(
        [
            f"{source.path}: {lines} lines, at most {FILE_LINES_MAX}"
            for source in sources(*PRODUCT, "tests")
            if (lines := source.text.count("\n")) > FILE_LINES_MAX
        ]
    )


def test_functions_are_short() -> None:
    report(
        [
            f"{source.path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}"
            for source in sources(*PRODUCT, "tests")
            for node in ast.walk(source.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
        ]
    )


def test_nothing_but_supervisors_catches_everything() -> None:
    report(
        [
            f"{source.path}:{line}: {function} catches everything: name the errors, or list "
            f'"{source.module}:{function}" in BROAD_EXCEPT_ALLOWED with a reason'
            for source in sources(*PRODUCT)
            for function, line in _broad_excepts(source)
            if f"{source.module}:{function}" not in BROAD_EXCEPT_ALLOWED
        ]
    )


def test_the_allowed_supervisors_exist() -> None:
    """So that the list does not outlive its reasons."""
    found = {
        f"{source.module}:{function}"
        for source in sources(*PRODUCT)
        for function, _ in _broad_excepts(source)
    }
    report([f"{name} catches everything no more" for name in BROAD_EXCEPT_ALLOWED - found])


def test_no_loose_ends() -> None:
    report(
        [
            f"{source.path}:{number}: {line.strip()}"
            for source in sources(*PRODUCT, "tests")
            if source.path != SELF
            for number, line in enumerate(source.text.splitlines(), 1)
            if LOOSE_END.search(line)
        ]
    )


def test_every_module_says_what_it_is() -> None:
    report(
        [
            f"{source.path}: no docstring"
            for source in sources(*PRODUCT)
            if source.text.strip() and not ast.get_docstring(source.tree)
        ]
    )


def test_shell_scripts_stop_at_errors() -> None:
    scripts = [path for path in (ROOT / ".ci").iterdir() if path.is_file()]
    report(
        [f"{path}: no set -euo pipefail" for path in scripts if "set -euo pipefail" not in path.read_text()]
    )


def _broad_excepts(source: Source) -> Iterator[tuple[str, int]]:
    """(innermost function, line) of each handler for Exception, BaseException or everything."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.ExceptHandler) and _broad(node) and not _reraises(node):
            yield function, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(source.tree, "module")


def _broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def _reraises(handler: ast.ExceptHandler) -> bool:
    """Clean-up that ends in a bare `raise` catches nothing."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None

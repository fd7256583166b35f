"""Chat templates come with model files: they run in jinja2's immutable sandbox, and within bounds.

The sandbox keeps a template from Python's insides. What it does not bound is bounded here: processor time (checked in
every loop's body, call and filter), the size of every value that an expression makes and of all together, and the text
written. The tree of a template is rewritten for it before it is compiled. Filters that could make much of little are
left out. As published templates expect of transformers: loop controls, `generation` blocks, `strftime_now`, `tojson`
without HTML escapes, `raise_exception`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SOURCE_CHARACTERS_MAX = 256 * 1024
VALUE_MAX = 4 * 1024 * 1024  # of one value: characters, and ELEMENT for each thing in a list
ELEMENT = 8
MADE_MAX = 64 * 1024 * 1024  # of all values that one rendering makes
SECONDS_MAX = 2.0  # of this thread's processor time
INTEGER_BITS_MAX = 1024
INDENT_MAX = 64

_FILTERS = """abs capitalize count d default dictsort e escape first float forceescape int items last length list lower
    map max min reject rejectattr reverse safe select selectattr sort string title trim unique upper wordcount"""
_STRING_METHODS_REFUSED = {
    "center",
    "expandtabs",
    "format",
    "format_map",
    "ljust",
    "rjust",
    "zfill",
    "translate",
}
_TIME_FORMAT = re.compile(r"[-%A-Za-z ,.:/]{0,40}")


class TemplateError(Exception):
    """The template is wrong, asks for too much, or refuses the messages; the text is for people."""


class _Budget(threading.local):
    """What the rendering in this thread may still spend."""

    deadline = 0.0
    left = 0

    def start(self) -> None:
        self.deadline, self.left = time.thread_time() + SECONDS_MAX, MADE_MAX

    def tick(self, cost: int = 0) -> str:
        if time.thread_time() > self.deadline:
            raise TemplateError(f"it runs for longer than {SECONDS_MAX:g} s")
        self.left -= cost
        if self.left < 0:
            raise TemplateError(f"it makes more than {MADE_MAX} characters")
        return ""

    def made(self, value: Any) -> Any:
        """`value`, charged by its size."""
        self.tick(_size(value))
        return value


def _size(value: Any) -> int:
    """Characters and elements in all, refused over the limit; a value may contain another many times."""
    if isinstance(value, str | bytes):
        total, waiting = len(value), []
    else:
        total, waiting = 1, [value]
    while waiting and total <= VALUE_MAX:
        found = waiting.pop()
        if isinstance(found, str | bytes):
            total += len(found)
        elif isinstance(found, list | tuple | set | frozenset):
            total += ELEMENT * len(found)
            waiting.extend(found)
        elif isinstance(found, dict):
            total += 2 * ELEMENT * len(found)
            waiting.extend(found.keys())
            waiting.extend(found.values())
        elif isinstance(found, int) and found.bit_length() > INTEGER_BITS_MAX:
            raise TemplateError("it makes a very large number")
    return _bounded(total)


def _bounded(size: int) -> int:
    if size > VALUE_MAX:
        raise TemplateError(f"it makes a value of more than {VALUE_MAX} characters")
    return size


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, budget: _Budget) -> None:
        self.budget = budget
        self.tick = budget.tick
        self.made = budget.made
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would compute while compiling
            cache_size=0,
            extensions=[LoopControlExtension, _Generation],
            finalize=budget.made,
        )
        own: dict[str, Callable[..., Any]] = {
            "join": _join,
            "replace": _replace,
            "indent": _indent,
            "tojson": _tojson,
        }
        kept = {name: self.filters[name] for name in _FILTERS.split() if name in self.filters} | own
        self.filters = {name: self._charged(function) for name, function in kept.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # with the marks by which jinja2 passes its context
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return self.made(function(*args, **kwargs))

        return charged

    def joined(self, *parts: Any) -> str:
        """`~`."""
        texts = [str(part) for part in parts]
        _bounded(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(many, str | bytes | list | tuple):
                    _bounded(ELEMENT * _size(many) * max(0, times))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bounded(left.bit_length() * abs(right) * (VALUE_MAX // INTEGER_BITS_MAX))
        elif operator == "%" and isinstance(left, str | bytes):
            raise TemplateError("it formats text with %")
        return self.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise TemplateError("it formats text with format")
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr in _STRING_METHODS_REFUSED:
            return False
        return super().is_safe_attribute(obj, attr, value)

    # named as jinja2 names them, so that a template's own names do not clash
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if __obj == __self.tick or __obj == __self.made:
            return __obj(*args)
        __self.tick()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes) and name == "join" and len(args) == 1:
            return __self.made(_join(args[0], owner))
        if isinstance(owner, str | bytes) and name == "replace" and len(args) >= 2:
            return __self.made(_replace(owner, *args))
        return __self.made(super().call(__context, __obj, *args, **kwargs))


def _join(value: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        raise TemplateError("it joins by attribute")
    texts = [str(each) for each in value]
    _bounded(sum(map(len, texts)) + len(texts) * len(str(d)))
    return str(d).join(texts)


def _replace(text: Any, old: Any, new: Any, count: Any = None) -> str:
    text, old, new = str(text), str(old), str(new)
    times = -1 if count is None else int(count)
    found = text.count(old)
    _bounded(len(text) + (found if times < 0 else min(times, found)) * len(new))
    replaced: str = text.replace(old, new, times)
    return replaced


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    text, lead = str(text), width if isinstance(width, str) else " " * min(INDENT_MAX, int(width))
    lines = text.split("\n")
    _bounded(len(text) + len(lines) * len(lead))
    return "\n".join(
        lead + line if (index or first) and (line or blank) else line for index, line in enumerate(lines)
    )


def _tojson(value: Any, indent: Any = None, sort_keys: bool = False, ensure_ascii: bool = False) -> str:
    _size(value)
    spaces = None if indent is None else min(INDENT_MAX, int(indent))
    return json.dumps(value, indent=spaces, sort_keys=bool(sort_keys), ensure_ascii=bool(ensure_ascii))


def _strftime_now(form: str) -> str:
    if not isinstance(form, str) or not _TIME_FORMAT.fullmatch(form):
        raise TemplateError("it asks for the time in a strange format")
    return datetime.datetime.now().strftime(form)


def _raise(message: Any) -> NoReturn:
    raise TemplateError(str(message)[:500])


_environment = _Environment(_Budget())


def _attribute(name: str) -> nodes.EnvironmentAttribute:
    return nodes.EnvironmentAttribute(name)


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(_attribute(name), list(arguments), [], None, None)


def _with_bounds(node: nodes.Node) -> None:
    """Charge every loop's and macro's body, every list, tuple and object that is written, and `~`."""
    for child in list(node.iter_child_nodes()):
        _with_bounds(child)
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("tick", nodes.Const(1 + constant))))
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Expr):
            setattr(node, name, _bounded_expression(value))
        elif isinstance(value, list):
            value[:] = [_bounded_expression(each) if isinstance(each, nodes.Expr) else each for each in value]


def _bounded_expression(node: nodes.Expr) -> nodes.Expr:
    if isinstance(node, nodes.Concat):
        return _call("joined", *node.nodes)
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _call("made", node)
    return node


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > SOURCE_CHARACTERS_MAX:
        raise TemplateError(f"it has {len(source)} characters, more than {SOURCE_CHARACTERS_MAX}")
    tree = _environment.parse(source)
    _with_bounds(tree)
    tree.set_environment(_environment)
    for node in tree.find_all(nodes.Node):
        node.set_lineno(1, override=False)
    return _environment.from_string(tree)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text. Raises TemplateError, whatever the template is."""
    try:
        _environment.budget.start()
        return str(_environment.budget.made(_compiled(source).render(**variables)))
    except RecursionError:
        raise TemplateError("it is nested too deeply") from None
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        NameError,  # a number too large for jinja2 is compiled to the name inf
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise TemplateError(str(error)[:500]) from error

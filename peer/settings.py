"""Reading the configuration: flags beat the environment, which beats the YAML file, which beats the defaults.

The environment's names come from the schema in `peer.config`: BITINGLIP_ and the key's path in capitals,
with `_` for each dot: `api.bind` is BITINGLIP_API_BIND. An empty variable counts as not set. Lists are
separated by commas or spaces; the numbers of a device stay with it ("AMD:0,2 CPU" is two devices).

Relative paths in a file are relative to that file's folder, in flags and environment to the current one.
Every mistake found is reported, each with its place: a file's line, a variable or a flag.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from peer import credentials
from peer.config import BOUNDS, PATHS, Config, Section
from peer.errors import ConfigError
from peer.units import format_bytes, format_seconds, parse_bytes, parse_seconds

ENVIRONMENT_PREFIX = "BITINGLIP_"
ENVIRONMENT_OTHER = frozenset(
    {
        "BITINGLIP_CONFIG",  # where the file is
        "BITINGLIP_ENGINE_FD",  # from a peer to its engine
        "BITINGLIP_URL",  # the rest is the command line's
        "BITINGLIP_KEY",
        "BITINGLIP_TOKEN",
    }
)
# Kubernetes sets these in every pod of a namespace that has a service called bitinglip.
ENVIRONMENT_FOREIGN = re.compile(r"BITINGLIP_(SERVICE_(HOST|PORT)|PORT)(_\w+)?")
SYSTEM_FILE = Path("/etc/bitinglip/bitinglip.yaml")
FILE_BYTES_MAX = 1_000_000

FLAGS = {
    "data_dir": "--data-dir",
    "api.bind": "--api",
    "engine.devices": "--device",
    "models.preload": "--model",
    "log.level": "--log-level",
}
DEVICE_KINDS = ("auto", "AMD", "CPU", "CL", "CUDA", "NV", "fake")
_DEVICE = re.compile(
    r"auto|fake(:[0-9]{1,3})?|([A-Z]{2,8}\+)?[A-Z]{2,8}(:[0-9]{1,3}([,+][0-9]{1,3})*)?(:[A-Z][A-Z0-9]{1,7})?"
)
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


class Field(NamedTuple):
    """A key of the schema. `default` is msgspec.NODEFAULT in an optional section."""

    path: str
    type: Any
    default: Any

    @property
    def environment(self) -> str:
        return ENVIRONMENT_PREFIX + self.path.replace(".", "_").upper()


class Found(NamedTuple):
    """A value and the place where it was given."""

    value: Any
    place: str


def load(
    *,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """The settings in force. `flags` maps paths ("api.bind") to values, None for a flag that was not given.

    `file` is read as named; `find_file` says which one that is by default. `data_dir` of the answer is always
    a full path.
    Raises ConfigError with one line per mistake.
    """
    surroundings = os.environ if environ is None else environ
    mistakes: list[str] = []
    found: dict[str, Found] = {}
    if file is not None:
        found.update(_from_file(file, mistakes))
    found.update(_from_environment(surroundings, mistakes))
    found.update(_from_flags(flags or {}, mistakes))
    _resolve_credentials(found, surroundings, mistakes)
    mistakes.extend(_out_of_bounds(found))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    config = _build(found)
    mistakes.extend(_contradictions(config, found))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if not config.data_dir:
        config = msgspec.structs.replace(config, data_dir=str(default_data_dir(surroundings)))
    return config


def find_file(named: str | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: the named one, else $BITINGLIP_CONFIG, else the system's if it exists, else none."""
    chosen = named or environ.get("BITINGLIP_CONFIG")
    if chosen:
        return Path(chosen).expanduser()
    return SYSTEM_FILE if SYSTEM_FILE.is_file() else None


def default_data_dir(environ: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/bitinglip")
    state = environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "bitinglip"


@cache
def fields() -> Mapping[str, Field]:
    """Every key of the schema by its path, in the schema's order."""
    return {field.path: field for field in _walk(Config, "")}


@cache
def sections() -> frozenset[str]:
    """The paths that lead to keys, "" among them."""
    found = {""}
    for path in fields():
        parts = path.split(".")
        found.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    return frozenset(found)


def loopback(bind: str) -> bool:
    """Whether HOST:PORT is reachable from this host only. A name other than localhost counts as not."""
    host = split_bind(bind)[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_bind(bind: str) -> tuple[str, int]:
    """("127.0.0.1", 8000) of "127.0.0.1:8000", ("::1", 8000) of "[::1]:8000". Raises ValueError."""
    host, colon, port = bind.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"`{bind}` is not HOST:PORT, like 127.0.0.1:8000 or [::1]:8000")
    bracketed = host.startswith("[") and host.endswith("]")
    if (":" in host) != bracketed or re.search(r"[\s/]", host):
        raise ValueError(f"`{bind}` is not HOST:PORT; an IPv6 address goes in brackets: [::1]:8000")
    return (host[1:-1] if bracketed else host), int(port)


def nearest(wrong: str, right: Iterable[str]) -> str:
    """ "; did you mean `x`?" or "" """
    close = difflib.get_close_matches(wrong, list(right), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


# ------------------------------------------------------------------------------------------------ the schema


def _walk(section: type[msgspec.Struct], prefix: str) -> Iterator[Field]:
    for info in msgspec.structs.fields(section):
        path = f"{prefix}{info.name}"
        inner = _section_of(info.type)
        if inner is not None:
            yield from _walk(inner, f"{path}.")
        else:
            yield Field(path, info.type, info.default)


def _section_of(kind: Any) -> type[msgspec.Struct] | None:
    """The Section that a key's type is or may be, if any."""
    choices = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


def _build(found: Mapping[str, Found]) -> Config:
    nested: dict[str, Any] = {}
    for path, item in found.items():
        *above, last = path.split(".")
        inner = nested
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = item.value
    try:
        return msgspec.convert(nested, Config)
    except msgspec.ValidationError as error:  # what is left: an optional section without a key that it needs
        raise ConfigError(_needs(str(error), found)) from None


def _needs(message: str, found: Mapping[str, Found]) -> str:
    named = re.search(r"required field `(\w+)` - at `\$\.?([\w.]*)`", message)
    if named is None:
        return message
    key, section = named.groups()
    place = next((item.place for path, item in found.items() if path.startswith(section)), "")
    return f"{place}: `{section}` needs `{section}.{key}` too"


# ------------------------------------------------------------------------------------------------ sources


def _from_file(file: Path, mistakes: list[str]) -> dict[str, Found]:
    from peer.yaml_marks import read_yaml  # yaml is loaded only where there is a file

    found: dict[str, Found] = {}
    try:
        with open(file, "rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{file}: is larger than {FILE_BYTES_MAX} bytes: not a configuration")
    keys = frozenset(fields()) | sections()
    for path, value, place in read_yaml(str(file), data, sections(), mistakes):
        field = fields().get(path)
        if field is None:
            mistakes.append(f"{place}: unknown key `{path}`{_nearest_key(path, keys)}")
            continue
        _take(found, field, value, place, mistakes, base=file.parent)
    return found


def _nearest_key(path: str, keys: Iterable[str]) -> str:
    """The nearest whole path, else a key of that last name in another section."""
    close = nearest(path, (key for key in keys if key))
    if close:
        return close
    last = path.rsplit(".", 1)[-1]
    same = [key for key in keys if key.rsplit(".", 1)[-1] == last]
    return f"; did you mean `{same[0]}`?" if len(same) == 1 else ""


def _from_environment(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    by_name = {field.environment: field for field in fields().values()}
    for name in sorted(environ):
        text = environ[name]
        if not name.startswith(ENVIRONMENT_PREFIX) or name in ENVIRONMENT_OTHER or not text:
            continue
        field = by_name.get(name)
        if field is not None:
            _take(found, field, text, f"${name}", mistakes, text=True)
        elif not ENVIRONMENT_FOREIGN.fullmatch(name):
            hint = nearest(name, [*by_name, *ENVIRONMENT_OTHER])
            mistakes.append(f"${name}: unknown variable{hint}")
    return found


def _from_flags(flags: Mapping[str, Any], mistakes: list[str]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for path, value in flags.items():
        if value is not None and value != ():
            _take(found, fields()[path], value, FLAGS.get(path, path), mistakes, text=isinstance(value, str))
    return found


def _take(
    found: dict[str, Found],
    field: Field,
    value: Any,
    place: str,
    mistakes: list[str],
    *,
    text: bool = False,
    base: Path | None = None,
) -> None:
    """Convert a value and keep it, or note what is wrong with it."""
    try:
        converted = _typed(field, _from_text(field, value) if text else value)
    except ValueError as error:
        mistakes.append(f"{place}: `{field.path}`: {error}")
        return
    if field.path in PATHS and converted and not converted.startswith(credentials.SCHEME):
        converted = str((base or Path()).joinpath(Path(converted).expanduser()).absolute())
    found[field.path] = Found(converted, place)


def _resolve_credentials(found: dict[str, Found], environ: Mapping[str, str], mistakes: list[str]) -> None:
    """Paths given as `credential:NAME` become those of the files that systemd made for this service."""
    for path in sorted(PATHS & found.keys()):
        value, place = found[path]
        if value.startswith(credentials.SCHEME):
            try:
                found[path] = Found(credentials.resolve(value, environ), place)
            except ValueError as error:
                mistakes.append(f"{place}: `{path}`: {error}")


def _from_text(field: Field, text: str) -> Any:
    """What YAML would have made of a variable's text. Units stay for `_typed`."""
    if field.type is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError(f"expected true or false, not `{text}`")
    if field.type in (int, float) and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if field.type is float and re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", text):
        return float(text)
    if get_origin(field.type) is tuple:
        return _split_list(text)
    return text


def _split_list(text: str) -> list[str]:
    items: list[str] = []
    for item in re.split(r"[,\s]+", text.strip()):
        if re.fullmatch(r"[0-9]+(\+[0-9]+)*", item) and items and ":" in items[-1]:
            items[-1] += f",{item}"
        elif item:
            items.append(item)
    return items


# ------------------------------------------------------------------------------------------------ values


def _typed(field: Field, value: Any) -> Any:
    """The value in its field's type. Raises ValueError that says what is expected."""
    kind = field.type
    if value is None:
        raise ValueError("has no value; leave the key out for its default")
    if kind is bool:
        return _expect(value, bool, "true or false")
    if kind in (int, float):
        return _number(field, value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = [str(choice) for choice in get_args(kind)]
            raise ValueError(
                f"expected one of {', '.join(choices)}, not `{value}`{nearest(str(value), choices)}"
            )
        return value
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else _expect(value, (list, tuple), "a list of texts")
        return tuple(_text(item) for item in items)
    return _text(value)


def _number(field: Field, value: Any) -> int | float:
    unit = field.path.rpartition("_")[2]
    # tokens_per_s is a rate and body_bytes_max a size
    if isinstance(value, str) and unit == "s" and not field.path.endswith("_per_s"):
        value = parse_seconds(value)
    elif isinstance(value, str) and "_bytes" in field.path:
        value = parse_bytes(value)
    expected = "a whole number" if field.type is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected {expected}, not {_named(value)}")
    if not math.isfinite(value):
        raise ValueError(f"expected {expected}, not `{value}`")
    if field.type is float:
        return float(value)
    if isinstance(value, float):
        raise ValueError(f"expected a whole number, not `{value}`")
    return value


def _text(value: Any) -> str:
    text: str = _expect(value, str, "a text (in quotes if it looks like something else)")
    if any(not character.isprintable() for character in text):
        raise ValueError("contains a control character")
    return text


def _expect(value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected {expected}, not {_named(value)}")
    return value


def _named(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Mapping):
        return "a section"
    return "a list" if isinstance(value, (list, tuple)) else f"`{value}`"


def _out_of_bounds(found: Mapping[str, Found]) -> Iterator[str]:
    for path, item in found.items():
        low, high = BOUNDS.get(path, (-math.inf, math.inf))
        if path in BOUNDS and not low <= item.value <= high:
            yield (
                f"{item.place}: `{path}`: {_shown(path, item.value)} is out of range: "
                f"{_shown(path, low)} to {_shown(path, high)}"
            )


def _shown(path: str, value: float) -> str:
    if path.endswith("_s") and not path.endswith("_per_s"):
        return format_seconds(value)
    if "_bytes" in path:
        return format_bytes(int(value)) if value >= 0 else str(value)
    return f"{value:g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _contradictions(config: Config, found: Mapping[str, Found]) -> Iterator[str]:
    """What each value alone does not show."""

    def where(*paths: str) -> str:
        places = [found[path].place for path in paths if path in found]
        return places[0] if places else "defaults"

    if not config.cluster.name.strip() or len(config.cluster.name) > 128:
        yield f"{where('cluster.name')}: `cluster.name`: expected 1 to 128 characters"
    try:
        local = loopback(config.api.bind)
    except ValueError as error:
        yield f"{where('api.bind')}: `api.bind`: {error}"
    else:
        if not local and config.api.tls is None and not config.api.insecure:
            yield (
                f"{where('api.bind')}: `api.bind`: {config.api.bind} can be reached from other hosts "
                "and would carry API keys in clear: set `api.tls.certificate` and `api.tls.key`, or say "
                "`api.insecure: true`"
            )
    for path in ("link.bind", "gossip.bind", "gossip.rpc", "store.bind"):
        yield from _wrong_address(path, config, where(path), needed=True)
    for path in ("link.advertise", "gossip.advertise", "gossip.agent", "store.advertise"):
        yield from _wrong_address(path, config, where(path), needed=False)
    for seed in config.gossip.seeds:
        yield from _not_an_address("gossip.seeds", seed, where("gossip.seeds"))
    if config.gossip.agent and not config.gossip.agent_key_file:
        yield f"{where('gossip.agent')}: `gossip.agent` needs `gossip.agent_key_file` too"
    with suppress(ValueError):  # it has been told above
        if not loopback(config.gossip.rpc):
            yield (
                f"{where('gossip.rpc')}: `gossip.rpc`: {config.gossip.rpc} can be reached from other hosts; "
                "it is for this peer alone: choose a loopback address"
            )
    if config.cluster.voters_wanted not in (0, 1, 3, 5):
        yield (
            f"{where('cluster.voters_wanted')}: `cluster.voters_wanted`: expected 0, 1, 3 or 5: an even number "
            "bears no more losses than the odd one below it"
        )
    for high, low in (("temperature_c", "temperature_clear_c"), ("memory_percent", "memory_clear_percent")):
        raised, cleared = getattr(config.alerts, high), getattr(config.alerts, low)
        if cleared >= raised:
            yield (
                f"{where(f'alerts.{low}', f'alerts.{high}')}: `alerts.{low}`: {cleared:g} must be below "
                f"`alerts.{high}` ({raised:g}), or an alert would never end"
            )
    place = where("engine.devices")
    yield from (f"{place}: `engine.devices`: {text}" for text in _wrong_devices(config.engine.devices))


def _wrong_address(path: str, config: Config, place: str, *, needed: bool) -> Iterator[str]:
    section, _, name = path.partition(".")
    value: str = getattr(getattr(config, section), name)
    if value or needed:
        yield from _not_an_address(path, value, place)


def _not_an_address(path: str, value: str, place: str) -> Iterator[str]:
    try:
        split_bind(value)
    except ValueError as error:
        yield f"{place}: `{path}`: {error}"


def _wrong_devices(devices: tuple[str, ...]) -> Iterator[str]:
    if not devices:
        yield f"expected at least one device ({', '.join(DEVICE_KINDS)})"
    if "auto" in devices and len(devices) > 1:
        yield "`auto` stands alone"
    for device in devices:
        if not _DEVICE.fullmatch(device):
            name, colon, rest = device.partition(":")
            kinds = {kind.lower(): kind for kind in DEVICE_KINDS}
            right = kinds.get(name.lower())
            hint = nearest(name, DEVICE_KINDS)
            if right and right != name:
                hint = f"; did you mean `{right}{colon}{rest}`?"
            yield f"`{device}` is not a device like auto, AMD, AMD:0,2, AMD:0+1, CPU, fake or fake:2{hint}"
    if len(set(devices)) != len(devices):
        yield "a device is named twice"

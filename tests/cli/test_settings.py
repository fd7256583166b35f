from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peer import settings
from peer.adapters.models.catalogue import read_catalogue
from peer.config import BOUNDS, PATHS, Config
from peer.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_(text: str) -> Path:
        file = tmp_path / "b.yaml"
        file.write_text(text)
        return file

    return write_


def mistakes(file: Path | None = None, environ: dict[str, str] | None = None, **flags: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings.load(
            file=file,
            environ=environ or {},
            flags={name.replace("__", "."): value for name, value in flags.items()},
        )
    return str(caught.value).replace(str(file), "FILE").splitlines()


def test_flags_beat_environment_beats_file_beats_defaults(write: Any) -> None:
    file = write("api:\n  bind: 127.0.0.1:1\nengine:\n  slots: 2\ndrain_s: 3s\n")
    environ = {"BITINGLIP_API_BIND": "127.0.0.1:2", "BITINGLIP_ENGINE_SLOTS": "4"}
    found = settings.load(flags={"api.bind": "127.0.0.1:3"}, environ=environ, file=file)
    assert (found.api.bind, found.engine.slots, found.drain_s, found.retention.count) == (
        "127.0.0.1:3",
        4,
        3.0,
        100_000,
    )


def test_flags_that_were_not_given_change_nothing() -> None:
    found = settings.load(flags={"api.bind": None, "engine.devices": ()}, environ={})
    assert found.api.bind == Config().api.bind
    assert found.engine.devices == ("auto",)


def test_the_defaults_are_the_schemas() -> None:
    found = settings.load(environ={"XDG_STATE_HOME": "/state"})
    assert Path(found.data_dir).is_absolute()
    assert found == Config(data_dir=found.data_dir)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("api:\n  bnid: x\n", "FILE:2: unknown key `api.bnid`; did you mean `api.bind`?"),
        ("\nbind: x\n", "FILE:2: unknown key `bind`; did you mean `api.bind`?"),
        ("zzz: 1\n", "FILE:1: unknown key `zzz`"),
        (
            "api:\n  bind: 127.0.0.1:1\n  bind: 127.0.0.1:2\n",
            "FILE:3: duplicate key `api.bind`, first on line 2",
        ),
        ("engine:\n  slots: many\n", "FILE:2: `engine.slots`: expected a whole number, not `many`"),
        ("engine:\n  slots: 1.5\n", "FILE:2: `engine.slots`: expected a whole number, not `1.5`"),
        ("engine:\n  slots: true\n", "FILE:2: `engine.slots`: expected a whole number, not `true`"),
        ("engine:\n  slots: 0\n", "FILE:2: `engine.slots`: 0 is out of range: 1 to 256"),
        ("drain_s: .nan\n", "FILE:1: `drain_s`: expected a number, not `nan`"),
        ("drain_s: -1s\n", "FILE:1: `drain_s`: `-1s` is not a duration like 90s, 5m, 2h or 30d"),
        (
            "drain_s: 5y\n",
            "FILE:1: `drain_s`: unknown unit `y`; durations end in ms, s, m, h, d, w",
        ),
        ("retention:\n  age_s: 1s\n", "FILE:2: `retention.age_s`: 1s is out of range: 1m to 3660d"),
        ("api:\n  insecure: maybe\n", "FILE:2: `api.insecure`: expected true or false, not `maybe`"),
        (
            "log:\n  level: wrning\n",
            "FILE:2: `log.level`: expected one of debug, info, warning, error, not `wrning`; "
            "did you mean `warning`?",
        ),
        (
            "cluster:\n  name: 5\n",
            "FILE:2: `cluster.name`: expected a text (in quotes if it looks like something else), not `5`",
        ),
        ("cluster:\n  name:\n", "FILE:2: `cluster.name`: has no value; leave the key out for its default"),
        ("api: 5\n", "FILE:1: `api` is a section: its keys go on the lines below it, indented"),
        (
            "api.bind: x\n",
            "FILE:1: `api.bind`: write the parts as sections, each below the other, indented",
        ),
        ("engine:\n  devices: {a: b}\n", "FILE:2: `engine.devices`: expected a list of texts, not a section"),
        ("- a\n", "FILE:1: expected keys and values, like `api:`"),
        ("a: [\n", "FILE:2: not YAML: expected the node content, but found '<stream end>'"),
        ("a: !!python/object:os.system x\n", "FILE:1: not YAML: could not determine a constructor"),
        (
            "engine:\n  devices: [amd]\n",
            "FILE:2: `engine.devices`: `amd` is not a device like auto, AMD, AMD:0,2, AMD:0+1, CPU, fake or fake:2; "
            "did you mean `AMD`?",
        ),
        ("engine:\n  devices: [auto, CPU]\n", "FILE:2: `engine.devices`: `auto` stands alone"),
        (
            "alerts:\n  temperature_clear_c: 95\n",
            "FILE:2: `alerts.temperature_clear_c`: 95 must be below `alerts.temperature_c` (95), "
            "or an alert would never end",
        ),
        ("api:\n  tls:\n    key: k.pem\n", "FILE:3: `api.tls` needs `api.tls.certificate` too"),
        (
            "api:\n  bind: nonsense\n",
            "FILE:2: `api.bind`: `nonsense` is not HOST:PORT, like 127.0.0.1:8000 or [::1]:8000",
        ),
    ],
)
def test_mistakes_name_their_line(write: Any, text: str, wanted: str) -> None:
    found = mistakes(write(text))
    assert found[0].startswith(wanted)
    assert len(found) == 1


def test_every_mistake_is_named(write: Any) -> None:
    found = mistakes(write("zap: 1\nengine:\n  slots: 0\nlog:\n  level: 3\n"), {"BITINGLIP_DRAIN_S": "x"})
    assert len(found) == 4


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("BITINGLIP_API_BIN", "$BITINGLIP_API_BIN: unknown variable; did you mean `BITINGLIP_API_BIND`?"),
        ("BITINGLIP_COFNIG", "$BITINGLIP_COFNIG: unknown variable; did you mean `BITINGLIP_CONFIG`?"),
    ],
)
def test_unknown_variables_are_named(name: str, wanted: str) -> None:
    assert mistakes(None, {name: "x"}) == [wanted]


def test_known_variables_that_are_no_setting_are_left_alone() -> None:
    names = ("CONFIG", "URL", "KEY", "ENGINE_FD", "SERVICE_HOST", "PORT_8000_TCP_ADDR", "PORT")
    settings.load(environ={f"BITINGLIP_{name}": "x" for name in names})


def test_an_empty_variable_is_not_set() -> None:
    assert settings.load(environ={"BITINGLIP_ENGINE_SLOTS": ""}).engine.slots == Config().engine.slots


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("AMD:0,2", ("AMD:0,2",)),
        ("AMD:0,2 CPU", ("AMD:0,2", "CPU")),
        ("AMD:0+1,2+3 PCI+AMD:4 CUDA:0:CUDA", ("AMD:0+1,2+3", "PCI+AMD:4", "CUDA:0:CUDA")),
        ("AMD,CPU", ("AMD", "CPU")),
        ("fake:2, CPU", ("fake:2", "CPU")),
    ],
)
def test_lists_in_the_environment(text: str, wanted: tuple[str, ...]) -> None:
    assert settings.load(environ={"BITINGLIP_ENGINE_DEVICES": text}).engine.devices == wanted


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:1", "[::1]:8000", "127.9.9.9:80"])
def test_loopback_needs_no_tls(bind: str) -> None:
    assert settings.load(flags={"api.bind": bind}, environ={}).api.bind == bind


@pytest.mark.parametrize("bind", ["0.0.0.0:8000", "[::]:8000", "10.0.0.1:8000", "gpu-7:8000"])
def test_other_addresses_need_tls_or_words(bind: str) -> None:
    (found,) = mistakes(None, api__bind=bind)
    assert found.startswith("--api: `api.bind`: ")
    assert "`api.insecure: true`" in found
    assert settings.load(flags={"api.bind": bind}, environ={"BITINGLIP_API_INSECURE": "true"}).api.insecure
    tls = {"BITINGLIP_API_TLS_CERTIFICATE": "/c", "BITINGLIP_API_TLS_KEY": "/k"}
    assert settings.load(flags={"api.bind": bind}, environ=tls).api.tls is not None


@pytest.mark.parametrize(
    "bind", ["8000", ":8000", "::1:8000", "1.2.3.4:70000", "a b:1", "x:", "x:-1", "/s:1"]
)
def test_addresses_that_are_none(bind: str) -> None:
    assert mistakes(None, api__bind=bind)


def test_relative_paths_are_relative_to_their_file(write: Any, tmp_path: Path) -> None:
    found = settings.load(file=write("data_dir: state\nmodels:\n  catalogue: m.yaml\n"), environ={})
    assert found.data_dir == str(tmp_path / "state")
    assert found.models.catalogue == str(tmp_path / "m.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "none.yaml") == ["FILE: cannot be read: No such file or directory"]
    assert mistakes(tmp_path)[0].startswith("FILE: cannot be read: ")
    (tmp_path / "big").write_bytes(b"#" * (settings.FILE_BYTES_MAX + 1))
    assert "not a configuration" in mistakes(tmp_path / "big")[0]
    (tmp_path / "binary").write_bytes(b"api: \xff\x00")
    assert "not YAML" in mistakes(tmp_path / "binary")[0]
    (tmp_path / "deep").write_text("a: " + "[" * 20_000)
    assert mistakes(tmp_path / "deep")


def test_which_file_is_read(tmp_path: Path) -> None:
    assert settings.find_file("a", {"BITINGLIP_CONFIG": "b"}) == Path("a")
    assert settings.find_file(None, {"BITINGLIP_CONFIG": "b"}) == Path("b")


def _uncommented(text: str) -> str:
    """The commented example with every key in force: comments have a space after their mark, keys have none."""
    lines = []
    for line in text.splitlines():
        bare = line.lstrip()
        if bare.startswith("#") and bare[1:2].strip():
            line = line.replace("#", "", 1)
        lines.append(line)
    return "\n".join(lines)


def test_the_commented_configuration_is_the_defaults(write: Any) -> None:
    text = (EXAMPLES / "bitinglip.yaml").read_text()
    assert settings.load(file=write(text), environ={}) == settings.load(environ={})
    full = settings.load(file=write(_uncommented(text)), environ={})
    tls = full.api.tls
    assert tls is not None
    expected = settings.load(
        flags={"api.tls.certificate": tls.certificate, "api.tls.key": tls.key}, environ={}
    )
    assert full == expected


def test_the_commented_configuration_names_every_key(write: Any) -> None:
    from peer.yaml_marks import read_yaml

    text = _uncommented((EXAMPLES / "bitinglip.yaml").read_text())
    named = [path for path, _, _ in read_yaml("x", text.encode(), settings.sections(), [])]
    assert sorted(named) == sorted(settings.fields())


def test_the_development_configuration_is_right() -> None:
    assert settings.load(file=EXAMPLES / "development.yaml", environ={}).engine.devices == ("CPU",)


@pytest.mark.parametrize(
    ("name", "voters", "seeds"),
    [("one-host", 0, 0), ("two-hosts", 0, 2), ("three-hosts", 0, 3), ("fifty-hosts", 5, 5)],
)
def test_the_examples_for_clusters_are_right(name: str, voters: int, seeds: int) -> None:
    found = settings.load(file=EXAMPLES / f"{name}.yaml", environ={})
    assert (len(found.cluster.voters), found.cluster.voters_wanted) == (voters, voters)
    assert len(found.gossip.seeds) == seeds
    assert found.api.tls is not None
    assert set(found.models.preload) <= set(read_catalogue(""))


def test_every_number_has_bounds_and_its_default_is_within() -> None:
    numbers = {path: field for path, field in settings.fields().items() if field.type in (int, float)}
    assert set(BOUNDS) == set(numbers)
    for path, field in numbers.items():
        low, high = BOUNDS[path]
        assert low <= field.default <= high
    assert set(settings.fields()) >= PATHS


def test_environment_names_are_distinct() -> None:
    names = [field.environment for field in settings.fields().values()]
    assert len(set(names)) == len(names)
    assert not set(names) & settings.ENVIRONMENT_OTHER

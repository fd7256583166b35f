"""Scenarios in YAML and traces in JSON: what is read, and how mistakes are named."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import msgspec
import pytest

import simulations as scenarios
from peer.errors import ConfigError
from peer.version import VERSION
from simulations.scenario import Fault, Op, Scenario
from simulations.scenario_file import Trace, parse_scenario, read_scenario, read_trace, write_trace

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = Path(scenarios.__file__).with_name("scenarios")
KINDS = {
    "power_loss": "peer", "partition": "group", "slow_disk": "peer", "link_cut": "pair", "crash_leader": "leader",
    "store_slow": "none", "store_member_down": "voter",
}  # fmt: skip


def parsed(text: str) -> Scenario:
    return parse_scenario(textwrap.dedent(text).encode(), "day.yaml", KINDS)


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    return str(caught.value).splitlines()


def test_everything_that_a_file_may_say() -> None:
    scenario = parsed(
        """
        about: a bad morning
        seed: 9
        hosts: 4
        voters: 3
        gpus: 1
        models: 2
        duration: 2m
        upgraded: [h4]
        faults:
          - {at: 1m, kind: partition, targets: [h1, h2], for: 500ms}
          - at: 10s
            kind: slow_disk
            targets: h3
            strength: 0.5
        ops:
          - {at: 5s, kind: get, peer: h2, task: first}
          - {at: 2, kind: submit, peer: h1, name: first, model: m1, tokens: 8, key: k, vanish: 3s}
          - {at: 9s, kind: restart, peer: h1, worker: h3-gpu0}
        """
    )
    assert scenario == Scenario(
        seed=9,
        hosts=4,
        gpus=1,
        models=2,
        fault_s=120.0,
        faults=(
            Fault(at_s=10.0, kind="slow_disk", targets=("h3",), strength=0.5),
            Fault(at_s=60.0, kind="partition", targets=("h1", "h2"), for_s=0.5),
        ),
        ops=(
            Op(at_s=2.0, kind="submit", peer="h1", model="m1", tokens=8, key="k", vanish_s=3.0),
            Op(at_s=5.0, kind="get", peer="h2", task=0),
            Op(at_s=9.0, kind="restart", peer="h1", worker="h3-gpu0"),
        ),
        upgraded=("h4",),
    )


def test_what_may_be_left_out() -> None:
    assert parsed("{hosts: 2, duration: 10s}") == Scenario(seed=0, hosts=2, voters=2, fault_s=10.0)


def test_a_load_arrives_as_the_seed_decides() -> None:
    text = """
        hosts: 3
        seed: {seed}
        duration: 100s
        load:
          - {{rate: 2, from: 10s, until: 60s, cancel: 0.3, models: m0, peers: [h2, h3], tokens: 5}}
          - {{rate: 0}}
    """
    first = parsed(text.format(seed=1))
    assert first == parsed(text.format(seed=1))
    assert first.ops != parsed(text.format(seed=2)).ops
    submits = [op for op in first.ops if op.kind == "submit"]
    cancels = [op for op in first.ops if op.kind == "cancel"]
    assert 60 < len(submits) < 140
    assert 0 < len(cancels) < len(submits) / 2
    assert list(first.ops) == sorted(first.ops, key=lambda op: op.at_s)
    assert {op.peer for op in first.ops} == {"h2", "h3"}
    assert {(op.model, op.tokens) for op in submits} == {("m0", 5)}
    assert all(10 <= op.at_s < 60 for op in submits)
    for op in cancels:
        assert first.ops[op.task].kind == "submit"
        assert 0 < op.at_s - first.ops[op.task].at_s <= 5.001


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("kind: power_loss", "`power_loss` needs one peer"),
        ("kind: power_loss, targets: [h1, h2]", "`power_loss` needs one peer"),
        ("kind: link_cut, targets: h1", "`link_cut` needs two peers, from and to"),
        ("kind: partition", "`partition` needs peers"),
        ("kind: crash_leader, targets: h1", "`crash_leader` needs none: it strikes whoever leads then"),
        ("kind: store_slow, targets: h1", "`store_slow` needs none"),
        ("kind: store_member_down, targets: h4", "h4 is no voter; 3 are: the first peers"),
    ],
)
def test_a_fault_needs_its_targets(fault: str, wrong: str) -> None:
    found = mistakes(f"hosts: 5\nduration: 9s\nfaults:\n- {{at: 1s, {fault}}}\n")
    assert found == [f"day.yaml:4: `faults[1].targets`: {wrong}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("host: 3\nduration: 9s", "day.yaml:1: unknown key `host`; did you mean `hosts`?"),
        ("duration: 9s", "day.yaml:1: `day.yaml` needs `hosts`"),
        ("hosts: 3\nhosts: 4\nduration: 9s", "day.yaml:2: duplicate key `hosts`, first on line 1"),
        ("hosts: many\nduration: 9s", "day.yaml:1: `hosts`: expected a whole number, not `many`"),
        ("hosts: 900\nduration: 9s", "day.yaml:1: `hosts`: 900 is out of range: 1 to 200"),
        (
            "hosts: 3\nduration: 9 parsecs",
            "day.yaml:2: `duration`: unknown unit `parsecs`; durations end in ms, s, m, h, d, w",
        ),
        ("hosts: 2\nvoters: 3\nduration: 9s", "day.yaml:1: `voters`: 3 of 2 hosts cannot vote"),
        (
            "hosts: 3\nduration: 9s\nfaults:\n- {at: 1s, kind: power_lost}",
            "day.yaml:4: `faults[1].kind`: there is no fault `power_lost`; did you mean `power_loss`?; "
            "known: crash_leader, link_cut, partition, power_loss, slow_disk, store_member_down, store_slow",
        ),
        (
            "hosts: 3\nduration: 9s\nfaults:\n- kind: partition\n  at: 10s",
            "day.yaml:5: `faults[1].at`: 10s is out of range: 0s to 9s",
        ),
        (
            "hosts: 3\nduration: 9s\nfaults:\n- kind: partition\n  at: 1s\n  targets: [h1, h4]",
            "day.yaml:6: `faults[1].targets[2]`: there is no peer `h4` (h1 to h3)",
        ),
        (
            "hosts: 3\nduration: 9s\nfaults:\n- kind: partition\n  att: 1s",
            "day.yaml:5: unknown key `faults[1].att`; did you mean `at`?",
        ),
        (
            "hosts: 3\nduration: 9s\nops:\n- {at: 1s, kind: submit, peer: h1}",
            "day.yaml:4: `ops[1]`: `submit` needs `model`",
        ),
        (
            "hosts: 3\nduration: 9s\nops:\n- {at: 1s, kind: sumbit, peer: h1}",
            "day.yaml:4: `ops[1].kind`: expected one of submit, get, wait, cancel, list, events, stream, assign, "
            "unload, rebalance, restart, drain, undrain, transfer, not `sumbit`; did you mean `submit`?",
        ),
        (
            "hosts: 3\nduration: 9s\nops:\n- {at: 1s, kind: submit, peer: h1, model: m0, name: one}\n"
            "- {at: 2s, kind: get, peer: h1, task: onne}",
            "day.yaml:5: `ops[2].task`: no submission is named `onne`; did you mean `one`?",
        ),
        ("hosts: 3\nduration: 9s\nload: 4", "day.yaml:3: `load[1]`: expected keys below it: rate, from, "),
        ("[1]", "day.yaml: expected keys and values, like `hosts: 3`"),
        ("a: [", "day.yaml:1: not YAML: "),
    ],
)
def test_mistakes_have_a_line_and_a_nearest_name(text: str, line: str) -> None:
    assert any(each.startswith(line) for each in mistakes(text)), mistakes(text)


def test_all_mistakes_are_told_at_once() -> None:
    assert len(mistakes("host: 3\nduration: x\nseed: -1")) == 4


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the scenario .*none\.yaml cannot be read: No such file"):
        read_scenario(tmp_path / "none.yaml", KINDS)


# ------------------------------------------------------------------------------------------------ traces

TRACE = Trace(
    check="an acknowledged task is never lost",
    message="t1",
    at_s=12.5,
    scenario=Scenario(
        seed=3,
        faults=(Fault(at_s=1.25, kind="partition", targets=("h1",)),),
        ops=(Op(at_s=1, kind="list", peer="h1"),),
    ),
)


def test_a_trace_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.json"
    write_trace(path, TRACE)
    assert read_trace(path) == TRACE
    written = json.loads(path.read_text())
    assert (written["format"], written["product"]) == (1, VERSION)


def test_a_trace_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"format": 7, "product": "9.9.9", "novelty": []}')
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert str(caught.value) == (
        f"{path}: has format 7, written by bitinglip 9.9.9; this is bitinglip {VERSION}, which reads format 1"
    )


@pytest.mark.parametrize("text", ["", "[]", "hosts: 3", '{"scenario": {}}', "\xff"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not a trace that `bitinglip simulate` has written"):
        read_trace(path)


def test_a_trace_with_a_part_that_is_wrong_names_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    built = msgspec.to_builtins(TRACE)
    built["scenario"]["hosts"] = "three"
    path.write_text(json.dumps(built))
    with pytest.raises(ConfigError, match=r"Expected `int`, got `str` - at `\$\.scenario\.hosts`"):
        read_trace(path)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_scenarios_that_come_with_it_are_right(path: Path) -> None:
    scenario = read_scenario(path)
    assert scenario.faults
    assert any(op.kind == "submit" for op in scenario.ops)


def test_the_documentation_is_of_these_faults_and_keys() -> None:
    from simulations.world.faults import KINDS

    page = (ROOT / "docs" / "simulations.md").read_text()
    listed = page.split("<!-- faults -->")[1].split("<!-- /faults -->")[0]
    rows = listed.strip().splitlines()[2:]
    assert rows == [f"| `{name}` | {says} |" for name, says in KINDS.items()]
    example = page.split("```yaml")[1].split("```")[0]
    scenario = parse_scenario(example.encode(), "docs/simulations.md")
    assert (scenario.hosts, scenario.upgraded, len(scenario.faults)) == (5, ("h5",), 2)


def test_hosts_are_drained_and_voters_made() -> None:
    scenario = parsed(
        """
        hosts: 4
        duration: 20s
        grows: true
        rebalance: load_balanced
        ops:
          - {at: 1s, kind: drain, peer: h1, host: h3}
          - {at: 9s, kind: transfer, peer: h2}
        """
    )
    assert (scenario.grows, scenario.rebalance) == (True, "load_balanced")
    assert [(op.kind, op.host) for op in scenario.ops] == [("drain", "h3"), ("transfer", "")]
    assert mistakes("hosts: 3\nduration: 9s\nops:\n- {at: 1s, kind: drain, peer: h1}") == [
        "day.yaml:4: `ops[1]`: `drain` needs `host`"
    ]

"""ONNX models: served when they give what their own test says, refused when they do not, or cannot be trusted."""

from __future__ import annotations

import base64
import os
import resource
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import LoadError, RunError
from engine.onnx.batcher import TensorBatcher, inputs_of
from engine.onnx.growth import SPARE_BYTES
from engine.onnx.model import MODEL, TEST, OnnxFiles, difference
from engine.protocol import (
    OUTPUT_BYTES_MAX,
    Configure,
    Load,
    Loaded,
    LoadFailed,
    Ready,
    Run,
    Unload,
    Unloaded,
    Unusable,
)
from tests.engine import small_onnx
from tests.engine.conftest import CACHE, DEVICE
from tests.engine.harness import REPOSITORY, EngineProcess
from tests.engine.memory import Watched

FIXTURE = REPOSITORY / "tests" / "engine" / "families" / "onnx"
FORMS = {"tokens": ((3, 6), "int64"), "extra": ((3, 4), "float32")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "m"))


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    configure = Configure(worker_id="w", device=DEVICE, cache_dir=str(CACHE))
    with EngineProcess(configure) as made:
        assert isinstance(made.wait_type(Ready, Unusable, timeout_s=120), Ready)
        yield made


def load(engine: EngineProcess, path: Path, name: str = "m", family: str = "onnx") -> Any:
    start = len(engine.seen)
    engine.send(Load(model=name, path=str(path), family=family, task_type="tensor"))
    return engine.wait_type(Loaded, LoadFailed, timeout_s=120, start=start)


def kept() -> dict[str, Any]:
    return dict(np.load(FIXTURE / TEST))


def save(folder: Path, **arrays: Any) -> None:
    np.savez(folder / TEST, **arrays)


def as_sent(array: Any, packed: bool) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode() if packed else array.reshape(-1).tolist()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def compute(engine: EngineProcess, run_id: str, inputs: dict[str, Any], model: str = "m") -> Any:
    engine.send(Run(run_id=run_id, model=model, task_type="tensor", parameters={"inputs": inputs}))
    return engine.wait_end(run_id)


# ---------------------------------------------------------------- the real engine


@pytest.mark.process
def test_a_model_that_passes_its_test_is_served(engine: EngineProcess) -> None:
    loaded = load(engine, FIXTURE)
    assert isinstance(loaded, Loaded), loaded
    right = kept()
    for number, (case, packed) in enumerate((("2", True), ("0", False), ("1", True), ("0", True))):
        inputs = {name: as_sent(right[f"{case}.input.{name}"], packed) for name in FORMS}
        done = compute(engine, f"a/{number}", inputs)
        assert done.reason == "stop", done
        _, output, _ = engine.of_run(f"a/{number}")
        found = {each.name: each for each in output.arrays}
        assert found.keys() == {"shares", "best"}
        for name, each in found.items():
            wanted = right[f"{case}.output.{name}"]
            assert (each.dtype, each.shape) == (wanted.dtype.name, wanted.shape)
            assert np.abs(np.frombuffer(each.data, each.dtype).reshape(each.shape) - wanted).max() < 1e-5
    assert compute(engine, "b/1", {"tokens": as_sent(right["0.input.tokens"], True)}).code == "bad_parameters"
    engine.send(Unload(model="m"))
    assert engine.wait_type(Unloaded).model == "m"


@pytest.mark.process
def test_a_model_that_fails_its_test_is_refused_with_the_difference(
    engine: EngineProcess, folder: Path
) -> None:
    right = kept()
    save(folder, **right | {"1.output.shares": right["1.output.shares"] + np.float32(0.25)})
    failed = load(engine, folder, "wrong")
    assert failed.code == "self_test_failed"
    assert "output 'shares' differs by 0.25 from its test, and 1e-05 is allowed" in failed.message
    save(folder, **right | {"tolerance": np.float64(0.0), "0.output.best": right["0.output.best"] + 1})
    assert "output 'best' differs by 1 " in load(engine, folder, "wrong").message
    assert isinstance(load(engine, FIXTURE, "right"), Loaded), "the engine goes on"


@pytest.mark.process
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Relu", b"Nope"),
        (b"Gather", b"Gathex"),
        (b"", b"\xff" * 40),
        (b"shares", b"sharez"),
        (b"axis", b"axiz"),
    ],
)
def test_broken_and_unknown_models_are_refused(
    engine: EngineProcess, folder: Path, old: bytes, new: bytes
) -> None:
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data.replace(old, new, 1) if old else new + data)
    failed = load(engine, folder, "broken")
    assert failed.code in ("unsupported_architecture", "bad_model_file"), failed


@pytest.mark.process
def test_weights_in_other_files_are_never_read(engine: EngineProcess, folder: Path) -> None:
    """An initializer may name any file of the host as its data: `data_location` external, `location` the path."""
    entry = b"\x0a\x08location\x12\x0b/etc/passwd"
    tensor = b"\x08\x05\x10\x01\x42\x04bias" + b"\x6a" + bytes([len(entry)]) + entry + b"\x70\x01"
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    (folder / MODEL).write_bytes(b"\x08\x0a" + b"\x3a" + bytes([len(graph)]) + graph)
    failed = load(engine, folder, "leak")
    assert failed.code == "unsupported_architecture"
    assert "external_data" in failed.message


ONES = small_onnx.tensor("one", np.ones(1, dtype=np.uint8))
# What is asked for -> operators that make of "shape" and the input "x" what "y" is
HOSTILE: dict[str, tuple[tuple[int, ...], list[bytes]]] = {
    "a buffer": ((10**6, 10**6, 2), [small_onnx.node("Expand", ["x", "shape"], ["y"])]),
    "a buffer that this host has": ((10**9, 2), [small_onnx.node("Expand", ["x", "shape"], ["y"])]),
    "a list": (
        (5 * 10**8,),
        [
            small_onnx.node("ConstantOfShape", ["shape"], ["many"], value=ONES),
            small_onnx.node("Reshape", ["x", "many"], ["y"]),
        ],
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("what", HOSTILE)
def test_operators_that_ask_for_all_memory_are_refused(
    engine: EngineProcess, folder: Path, what: str
) -> None:
    shape, nodes = HOSTILE[what]
    sizes = {"shape": np.array(shape, dtype=np.int64)}
    form = [small_onnx.value(name, "float32", 2) for name in "xy"]
    (folder / MODEL).write_bytes(small_onnx.model(nodes, form[:1], form[1:], **sizes))
    arrays = {
        f"{case}.{kind}": np.full(2, case, np.float32) for case in (0, 1) for kind in ("input.x", "output.y")
    }
    save(folder, tolerance=np.float64(0.0), **arrays)
    with Watched(engine.process.pid) as memory:
        failed = load(engine, folder, "greedy")
    assert (failed.code, "more memory than" in failed.message) == ("out_of_memory", True), failed
    assert memory.peak_own < memory.before.own + SPARE_BYTES + (64 << 20)
    assert resource.prlimit(engine.process.pid, resource.RLIMIT_DATA) == resource.getrlimit(
        resource.RLIMIT_DATA
    )
    assert isinstance(load(engine, FIXTURE, f"after {what}"), Loaded), "the engine goes on"


@pytest.mark.process
def test_a_model_that_computes_nothing_is_refused(engine: EngineProcess, folder: Path) -> None:
    form = [small_onnx.value(name, "float32", 2) for name in "xy"]
    same = small_onnx.node("Identity", ["x"], ["y"])
    (folder / MODEL).write_bytes(small_onnx.model([same], form[:1], form[1:]))
    arrays = {
        f"{case}.{kind}": np.full(2, case, np.float32) for case in (0, 1) for kind in ("input.x", "output.y")
    }
    save(folder, tolerance=np.float64(0.0), **arrays)
    assert load(engine, folder, "same").code == "unsupported_architecture"
    assert isinstance(load(engine, FIXTURE, "after same"), Loaded), "the engine goes on"


@pytest.mark.process
def test_other_families_compute_no_tensors(engine: EngineProcess) -> None:
    assert load(engine, FIXTURE, "llama", "llama").code == "unsupported_architecture"


@pytest.mark.process
def test_a_real_model_of_a_package(engine: EngineProcess, tmp_path: Path) -> None:
    """magika's, where a folder has it with its test: ONNX_MODEL names one (docs/engine.md says how it is made)."""
    path = os.environ.get("ONNX_MODEL")
    if not path:
        pytest.skip("ONNX_MODEL names no folder with model.onnx and test.npz")
    loaded = load(engine, Path(path), "real")
    assert isinstance(loaded, Loaded), loaded


# ---------------------------------------------------------------- its test


def test_what_a_folder_has() -> None:
    files = OnnxFiles.read(str(FIXTURE))
    assert len(files.cases) == 3
    assert files.tolerance == 1e-5
    assert files.memory_needed() > files.size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tolerance": None}, "its tolerance is no number"),
        ({"tolerance": np.float64("nan")}, "its tolerance is no number"),
        ({"tolerance": np.array([1.0])}, "its tolerance is no number"),
        ({"what": np.zeros(3)}, "is no CASE.input.NAME"),
        ({"0.output.x.y": np.zeros(3, dtype="c8")}, "is no CASE.input.NAME"),
        ({"0.output.more": np.zeros(3)}, "its cases differ"),
        ({"2.input.extra": np.zeros((1, 4), dtype=np.float32)}, "its cases differ"),
        ({"3.input.extra": np.zeros((3, 4), dtype=np.float32)}, "its cases differ"),
        (
            {f"{case}.input.extra": np.zeros((3, 4), dtype=np.float32) for case in "012"},
            "the same input 'extra'",
        ),
        (
            {f"{case}.output.big": np.zeros(OUTPUT_BYTES_MAX, dtype="f4") for case in "012"},
            "are more than the",
        ),
    ],
)
def test_tests_that_prove_nothing(folder: Path, changes: dict[str, Any], words: str) -> None:
    save(folder, **{name: array for name, array in (kept() | changes).items() if array is not None})
    with pytest.raises(LoadError, match=words) as caught:
        OnnxFiles.read(str(folder))
    assert caught.value.code == "bad_model_file"


def test_one_case_is_not_enough(folder: Path) -> None:
    right = kept()
    save(folder, **{name: array for name, array in right.items() if not name.startswith(("1.", "2."))})
    with pytest.raises(LoadError, match="it has 1 cases and needs 2"):
        OnnxFiles.read(str(folder))
    save(folder, tolerance=right["tolerance"])
    with pytest.raises(LoadError, match="it has 0 cases"):
        OnnxFiles.read(str(folder))


def test_files_that_are_none(folder: Path) -> None:
    (folder / TEST).write_bytes(b"PK no zip")
    with pytest.raises(LoadError, match="no npz file"):
        OnnxFiles.read(str(folder))
    with zipfile.ZipFile(folder / TEST, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.input.x.npy", b"\0" * (80 * 1024 * 1024))
    with pytest.raises(LoadError, match="its arrays are more than"):
        OnnxFiles.read(str(folder))
    np.savez(folder / TEST, **{"0.input.x": np.array([{}], dtype=object)})
    with pytest.raises(LoadError, match="no npz file"):
        OnnxFiles.read(str(folder))
    for member, text in (
        ("README", b"no array"),
        ("tolerance", b"1e-5"),
        ("0.input.x.npy", b"\x93NUMPY\x01\x00\x0b\x00{'descr': ("),
        ("0.input.x.npy", b"\x93NUMPY\x01\x00\x07\x00  1\n 2\n"),
    ):
        with zipfile.ZipFile(folder / TEST, "w") as archive:
            archive.writestr(member, text)
        with pytest.raises(LoadError, match=r"is no array|no npz file"):
            OnnxFiles.read(str(folder))
    np.savez_compressed(folder / TEST, **{"0.input.x": np.arange(1000)})
    data = bytearray((folder / TEST).read_bytes())
    data[50:150] = bytes(byte ^ 0xFF for byte in data[50:150])  # within what is packed
    (folder / TEST).write_bytes(data)
    with pytest.raises(LoadError, match="no npz file"):
        OnnxFiles.read(str(folder))
    (folder / TEST).unlink()
    with pytest.raises(LoadError, match="No such file"):
        OnnxFiles.read(str(folder))
    (folder / MODEL).write_bytes(b"")
    with pytest.raises(LoadError, match="it has 0 bytes"):
        OnnxFiles.read(str(folder))
    (folder / MODEL).unlink()
    with pytest.raises(LoadError, match="No such file"):
        OnnxFiles.read(str(folder))


def test_differences() -> None:
    nan, inf = float("nan"), float("inf")
    assert difference(np.array([1.0, nan, inf]), np.array([1.5, nan, inf])) == 0.5
    assert difference(np.array([1.0]), np.array([nan])) == inf
    assert difference(np.array([inf]), np.array([-inf])) == inf
    assert difference(np.array([True]), np.array([False])) == 1.0
    assert difference(np.zeros(2), np.zeros(3)) == inf
    assert difference(np.zeros(0), np.zeros(0)) == 0.0


# ---------------------------------------------------------------- runs


def extra(**changes: Any) -> dict[str, Any]:
    given = {"dtype": "float32", "shape": [2, 2], "data": [1, 2.5, True, -4]} | changes
    return {"inputs": {"extra": given}}


def test_arrays_come_as_numbers_or_bytes() -> None:
    wanted = {"extra": ((2, 2), "float32")}
    (found,) = inputs_of(extra(), wanted).values()
    assert found.tolist() == [[1.0, 2.5], [1.0, -4.0]]
    packed = base64.b64encode(np.arange(4, dtype="<f4").tobytes()).decode()
    assert inputs_of(extra(data=packed), wanted)["extra"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    scalar = {"inputs": {"k": {"dtype": "uint8", "shape": [], "data": [255]}}}
    assert inputs_of(scalar, {"k": ((), "uint8")})["k"] == 255


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "the model's inputs are extra"),
        ({"inputs": {"other": {}}}, "the model's inputs are extra"),
        (extra(dtype="float64"), "must have dtype int8 and shape"),
        (extra(dtype="int8", shape=[4]), "must have dtype int8 and shape"),
        (extra(dtype="int8", shape=4), "must have dtype int8 and shape"),
        (extra(dtype="int8", shape=True), "must have dtype int8 and shape"),
        (extra(dtype="int8"), "values that are no int8"),
        (extra(dtype="int8", data=[1, 2, 3]), "has 3 numbers, and its shape 4"),
        (extra(dtype="int8", data=[]), "has 0 numbers, and its shape 4"),
        (extra(dtype="int8", data=[1, 2, 3, 300]), "300"),
        (extra(dtype="int8", data=[1, 2, 3, 2**70]), "extra"),
        (extra(dtype="int8", data="AAAA!"), "extra"),
        (extra(dtype="int8", data="AAAA"), "has 3 numbers"),
    ],
)
def test_arrays_that_do_not_fit(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(RunError, match=words) as caught:
        inputs_of(parameters, {"extra": ((2, 2), "int8")})
    assert caught.value.code == "bad_parameters"


class Doubling:
    """Stands for a model on a device."""

    inputs = {"x": ((2,), "float32")}

    def run(self, inputs: Any) -> Any:
        return {"y": inputs["x"] * 2}


def run(run_id: str) -> Run:
    given = {"x": {"dtype": "float32", "shape": [2], "data": [1, 2]}}
    return Run(run_id=run_id, model="m", task_type="tensor", parameters={"inputs": given})


def test_runs_are_computed_in_order() -> None:
    serving = TensorBatcher(Doubling())  # type: ignore[arg-type]
    for name in "abc":
        assert serving.add(run(name)) == []
    assert serving.step(0) == []
    started, output, finished = serving.step(1)
    assert (started.run_id, output.run_id, finished.reason) == ("a", "a", "stop")
    assert np.frombuffer(output.arrays[0].data, "f4").tolist() == [2.0, 4.0]
    (cancelled,) = serving.cancel("c")
    assert (cancelled.run_id, cancelled.reason) == ("c", "cancelled")
    assert serving.cancel("c") == []
    (failed,) = serving.fail_all("unloaded", "gone")
    assert (failed.run_id, failed.retryable) == ("b", True)
    assert not serving.busy
    assert serving.step(1) == []
    wrong = Run(run_id="d", model="m", task_type="tensor", parameters={})
    assert serving.add(wrong)[0].code == "bad_parameters"

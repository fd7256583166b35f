"""An ONNX model by tinygrad's `nn.onnx`, which is right on some models and wrong on others without a word.

So one is served only where it gives what its own test says: a folder has `model.onnx` and `test.npz`, whose arrays are
`CASE.input.NAME` and `CASE.output.NAME`, of two cases or more whose inputs differ, and `tolerance`, the largest
difference of any number that is allowed. The cases' shapes and types are those that are served; others were not tried.
"""

from __future__ import annotations

import errno
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit
from tinygrad.device import CompileError
from tinygrad.engine.jit import JitError

from engine.errors import LoadError
from engine.files.gguf import bad_file
from engine.onnx.growth import SPARE_BYTES, Growth
from engine.protocol import OUTPUT_BYTES_MAX

MODEL, TEST = "model.onnx", "test.npz"
MODEL_BYTES_MAX = 4 << 30
TEST_BYTES_MAX = 64 * 1024 * 1024  # unpacked
TEST_ARRAYS_MAX = 1_024
OVER_GUESS = 4  # how many times what was guessed a model may take
CASES_MIN = 2  # one would not tell whether a second run gives the first one's answer
DTYPES = (
    *("float32", "float64", "float16", "bool", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

# What the parser and the operators raise for a model that is broken or that they cannot compute.
_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NameError, RuntimeError),
    *(TypeError, ValueError, struct.error, CompileError, JitError),
)
# What zipfile and numpy raise for an archive or an array's header that is none.
_NO_NPZ = (
    *(ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Case:
    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class OnnxFiles:
    """A folder's model and test, read and checked; nothing is on the device yet."""

    path: Path
    size: int
    cases: list[Case]
    tolerance: float

    @classmethod
    def read(cls, path: str) -> OnnxFiles:
        """Raises LoadError `bad_model_file`."""
        folder = Path(path)
        try:
            size = (folder / MODEL).stat().st_size
        except OSError as error:
            raise bad_file(folder / MODEL, error.strerror or str(error)) from None
        if not 0 < size <= MODEL_BYTES_MAX:
            raise bad_file(folder / MODEL, f"it has {size} bytes")
        cases, tolerance = _read_test(folder / TEST)
        return cls(folder, size, cases, tolerance)

    def memory_needed(self) -> int:
        """A guess: the file, its weights beside it, and a case's arrays several times over."""
        arrays = sum(
            array.nbytes for part in (self.cases[0].inputs, self.cases[0].outputs) for array in part.values()
        )
        return 2 * self.size + 16 * arrays


def _read_test(path: Path) -> tuple[list[Case], float]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if len(infos) > TEST_ARRAYS_MAX or sum(info.file_size for info in infos) > TEST_BYTES_MAX:
                raise bad_file(path, f"its arrays are more than {TEST_ARRAYS_MAX} or {TEST_BYTES_MAX} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise bad_file(path, error.strerror or str(error)) from None
    except _NO_NPZ as error:
        raise bad_file(path, f"it is no npz file ({error})") from None
    others = [name for name, array in found.items() if not isinstance(array, np.ndarray)]
    if others:  # numpy gives a member that is no array as its bytes
        raise bad_file(path, f"{others[0][:80]!r} in it is no array")
    tolerance = found.pop("tolerance", np.float64(-1))
    if tolerance.shape != () or tolerance.dtype.kind != "f" or not 0 <= float(tolerance) < np.inf:
        raise bad_file(path, "its tolerance is no number")
    parts: dict[str, dict[str, dict[str, Array]]] = {}
    for name, array in found.items():
        case, kind, of = (*name.split(".", 2), "", "")[:3]
        if kind not in ("input", "output") or not of or array.dtype.name not in DTYPES:
            raise bad_file(
                path, f"array {name[:80]!r} of type {array.dtype} is no CASE.input.NAME or CASE.output.NAME"
            )
        parts.setdefault(case, {"input": {}, "output": {}})[kind][of] = array
    cases = [Case(each["input"], each["output"]) for each in parts.values()]
    _check_cases(path, cases)
    return cases, float(tolerance)


def _check_cases(path: Path, cases: list[Case]) -> None:
    if len(cases) < CASES_MIN:
        raise bad_file(path, f"it has {len(cases)} cases and needs {CASES_MIN} whose inputs differ")
    first = cases[0]
    if not first.inputs or not first.outputs:
        raise bad_file(path, "its cases have no input or no output")
    for case in cases[1:]:
        for ours, others in ((first.inputs, case.inputs), (first.outputs, case.outputs)):
            if _forms(ours) != _forms(others):
                raise bad_file(path, "its cases differ in names, shapes or types")
    for name, array in first.inputs.items():
        if all(np.array_equal(array, case.inputs[name]) for case in cases[1:]):
            raise bad_file(path, f"all its cases have the same input {name!r}")
    size = sum(array.nbytes for array in first.outputs.values())
    if size > OUTPUT_BYTES_MAX:
        raise bad_file(
            path, f"outputs of {size} bytes are more than the {OUTPUT_BYTES_MAX} that a task may have"
        )


def _forms(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, array.dtype.name) for name, array in arrays.items()}


class OnnxModel:
    """A model on the device, for inputs of the shapes of its test."""

    sizes = [1]

    def __init__(self, files: OnnxFiles, slots: int) -> None:
        """Raises LoadError, MemoryError, OSError."""
        from tinygrad.nn.onnx import OnnxRunner  # its import makes tensors: only once the device is chosen

        self._files, self.slots = files, slots
        self._growth = Growth(OVER_GUESS * files.memory_needed() + SPARE_BYTES)
        self.inputs = _forms(files.cases[0].inputs)
        # by its bytes and not its path: a model may name other files of the host as its weights
        runner: Any = self._tried(
            lambda: OnnxRunner(Tensor(np.fromfile(files.path / MODEL, dtype=np.uint8)).realize())
        )
        self._outputs = tuple(runner.graph_outputs)
        if set(runner.graph_inputs) != set(self.inputs) or set(self._outputs) != set(files.cases[0].outputs):
            text = f"the model has inputs {sorted(runner.graph_inputs)} and outputs {sorted(self._outputs)}"
            raise bad_file(files.path / TEST, f"{text}, and the test has others")
        self._buffers = {name: Tensor(array).realize() for name, array in files.cases[0].inputs.items()}

        def step() -> list[Tensor]:
            found = runner(self._buffers)
            made = [found[name].contiguous() for name in self._outputs]
            Tensor.realize(*made)
            return made

        self._step: Any = TinyJit(step)

    def capture(self, size: int) -> None:
        """Run the test until all of it has been replayed. Raises LoadError `self_test_failed` with the difference."""
        worst, where = 0.0, ""
        for _ in range(2):
            for case in self._files.cases:
                found = self._tried(partial(self.run, case.inputs))
                for name, right in case.outputs.items():
                    off = difference(found[name], right)
                    if not off <= worst:
                        worst, where = off, name
        if not worst <= self._files.tolerance:
            self.free()
            raise LoadError(
                "self_test_failed",
                f"{self._files.path}: output {where!r} differs by {worst:.3g} from its test, and "
                f"{self._files.tolerance:.3g} is allowed: tinygrad does not compute this model rightly",
            )

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name. `inputs` have the forms of `self.inputs`."""
        for name, tensor in self._buffers.items():
            array = np.ascontiguousarray(inputs[name])
            tensor.uop.base.buffer.copyin(array.reshape(-1).view(np.uint8).data)
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, self._step(), strict=True)}

    def free(self) -> None:
        """Let go of graphs and weights."""
        if self._step is not None and self._step.captured is not None:
            self._step.captured.free_intermediates()
        self._step = None
        self._buffers.clear()

    def _tried(self, action: Callable[[], Any]) -> Any:
        path = self._files.path / MODEL
        try:
            with self._growth.bounded():
                return action()
        except _FAULTS as error:
            self._step = None
            what = f"tinygrad cannot compute it ({type(error).__name__}: {str(error)[:300]})"
            raise LoadError("unsupported_architecture", f"{path}: {what}") from None
        except (MemoryError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            self._step = None
            text = f"{path} wants more memory than the {self._growth.most} bytes that a model of its size may take"
            said = f" ({error})" if str(error) else ""
            raise LoadError("out_of_memory", text + said) from None


def difference(found: Array, right: Array) -> float:
    """The largest of any number; infinite where shapes differ or one is no number and the other is."""
    if found.shape != right.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        off = np.abs(found.astype(np.float64) - right.astype(np.float64))
    off[(found == right) | (np.isnan(off) & np.isnan(found) & np.isnan(right))] = 0.0
    return float(np.where(np.isnan(off), np.inf, off).max(initial=0.0))

"""Makes the ONNX fixture beside it: a small network of two inputs, and what onnxruntime computes with it.

Not run by the tests, which only read what it wrote. Run again with

    pip install onnx==1.23.2 onnxruntime==1.32.0
    python tests/engine/families/make_onnx.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper, numpy_helper, save

FOLDER = Path(__file__).resolve().parent / "onnx"
TOLERANCE = 1e-5


def main() -> None:
    random = np.random.default_rng(20261123)
    table = random.standard_normal((16, 8)).astype(np.float32)
    weight = random.standard_normal((12, 5)).astype(np.float32)
    bias = random.standard_normal(5).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["found"], axis=0),
        helper.make_node("ReduceMean", ["found", "axis"], ["mean"], keepdims=0),
        helper.make_node("Concat", ["mean", "extra"], ["both"], axis=1),
        helper.make_node("Gemm", ["both", "weight", "bias"], ["linear"]),
        helper.make_node("Relu", ["linear"], ["positive"]),
        helper.make_node("Softmax", ["positive"], ["shares"], axis=-1),
        helper.make_node("ArgMax", ["shares"], ["best"], axis=1, keepdims=0),
    ]
    arrays = {"table": table, "weight": weight, "bias": bias, "axis": np.array([1], dtype=np.int64)}
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", 6]),
            helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["batch", 4]),
        ],
        [
            helper.make_tensor_value_info("shares", TensorProto.FLOAT, ["batch", 5]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    checker.check_model(model)
    FOLDER.mkdir(exist_ok=True)
    save(model, FOLDER / "model.onnx")
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    kept: dict[str, np.ndarray] = {"tolerance": np.float64(TOLERANCE)}
    for case in ("0", "1", "2"):
        inputs = {
            "tokens": random.integers(0, 16, (3, 6)),
            "extra": random.standard_normal((3, 4)).astype(np.float32),
        }
        outputs = session.run(["shares", "best"], inputs)
        kept |= {f"{case}.input.{name}": array for name, array in inputs.items()}
        kept |= {
            f"{case}.output.{name}": array for name, array in zip(("shares", "best"), outputs, strict=True)
        }
    np.savez_compressed(FOLDER / "test.npz", **kept)


if __name__ == "__main__":
    main()

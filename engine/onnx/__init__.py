"""ONNX models, whose runs take and give arrays."""

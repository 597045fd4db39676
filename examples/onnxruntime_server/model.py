"""A small network with random weights, as an ONNX file made in memory: nothing is downloaded."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FEATURES = 64
CLASSES = 5


def network(width: int = 512, seed: int = 0) -> bytes:
    """Make a perceptron with one hidden layer of *width*; its batch size is free."""
    random = np.random.default_rng(seed)
    weights = {
        "hidden": random.standard_normal((FEATURES, width), np.float32),
        "out": random.standard_normal((width, CLASSES), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["features", "hidden"], ["sums"]),
        helper.make_node("Relu", ["sums"], ["active"]),
        helper.make_node("MatMul", ["active", "out"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", FEATURES])],
        [helper.make_tensor_value_info("shares", TensorProto.FLOAT, ["rows", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    # The oldest pair that has all of this: a runtime refuses files newer than itself.
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialized: bytes = made.SerializeToString()
    return serialized

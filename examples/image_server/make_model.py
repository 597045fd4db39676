"""Write `classifier.onnx`: a small residual network with random weights. Needs `pip install onnx`.

The weights repeat one short row of random numbers, and the file says so (`Tile`) instead of
holding them: it stays below 100 kB. ONNX Runtime unfolds them once, when it loads the model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

CLASSES = 1000
SEED = 20
ROW = 8191
"""Random numbers in the file; a prime, so that no filter equals its neighbour."""


class Graph:
    """Collects nodes and constants; each method returns the name of what its node computes."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.constant("row", np.random.default_rng(SEED).standard_normal(ROW, np.float32))

    def constant(self, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        """Keep *value* in the file."""
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add one operator."""
        made = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [made], **attributes))
        return made

    def weights(self, *shape: int) -> str:
        """Return weights of *shape*, scaled as He et al. 2015 (arXiv 1502.01852) advise."""
        size, fan_in = math.prod(shape), math.prod(shape[1:])
        name = f"w{len(self.nodes)}"
        repeats = self.constant(f"{name}_repeats", np.array([-(-size // ROW)], np.int64))
        start = self.constant(f"{name}_start", np.array([0], np.int64))
        end = self.constant(f"{name}_end", np.array([size], np.int64))
        form = self.constant(f"{name}_shape", np.array(shape, np.int64))
        scale = self.constant(f"{name}_scale", np.array(math.sqrt(2 / fan_in), np.float32))
        flat = self.node("Slice", self.node("Tile", "row", repeats), start, end)
        return self.node("Mul", self.node("Reshape", flat, form), scale)

    def convolution(self, x: str, channels_in: int, channels: int, size: int, stride: int) -> str:
        """Return *x* convolved by *channels* filters of *size*."""
        pads = [size // 2] * 4
        filters = self.weights(channels, channels_in, size, size)
        return self.node("Conv", x, filters, strides=[stride, stride], pads=pads)

    def block(self, x: str, channels_in: int, channels: int, stride: int) -> str:
        """Return two convolutions of *x*, and the way around them."""
        inner = self.node("Relu", self.convolution(x, channels_in, channels, 3, stride))
        body = self.convolution(inner, channels, channels, 3, 1)
        return self.node("Relu", self.node("Add", body,
            self.convolution(x, channels_in, channels, 1, stride)))  # fmt: skip


def network(width: int = 40) -> bytes:
    """Return the model: images (n, 3, side, side) of bytes in, probabilities (n, 1000) out.

    Time grows with the square of *width*, the channels of the first layer.
    """
    graph = Graph()
    x = graph.node("Cast", "images", to=TensorProto.FLOAT)
    x = graph.node("Sub", x, graph.constant("mean", np.array(127.5, np.float32)))
    x = graph.node("Div", x, graph.constant("spread", np.array(58, np.float32)))
    x = graph.node("Relu", graph.convolution(x, 3, width, 7, 2))
    x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = graph.block(x, width, width, 1)
    for channels in (width, 2 * width, 4 * width):
        x = graph.block(x, channels, 2 * channels, 2)
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    logits = graph.node("MatMul", x, graph.weights(8 * width, CLASSES))
    graph.nodes.append(helper.make_node("Softmax", [logits], ["probabilities"], axis=1))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 3, "side", "side"])
    shares = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", CLASSES])
    made = helper.make_graph(
        graph.nodes, "small-resnet", [images], [shares], list(graph.constants.values())
    )
    # The oldest pair that has all of this: a runtime refuses files newer than itself.
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


if __name__ == "__main__":
    Path(__file__).with_name("classifier.onnx").write_bytes(network())

"""Networks as ONNX models, in float32, float16 or int8."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path

import numpy as np
import onnx

from aecr_jax.errors import UserError
from aecr_jax.export.graph import SHAPE, Graph, concat
from aecr_jax.export.networks import haze_maps, trace
from aecr_jax.networks.coarse_net import CoarseNet
from aecr_jax.networks.network import Network

# Convolutions with at most as many inputs for each output are not computed with integers: 3x3 pixels of three channels.
_FEW_INPUTS = 27


def to_onnx(model: Network, metadata: dict[str, str], *, dtype: str = "float32", deform: str = "native") -> bytes:
    """Return an ONNX model with the input `hazy` and the output `restored`, both float32 `[N, 3, H, W]`, in [0, 1], with any N, H and W.

    As with the network itself, the output is not clipped.

    Args:
      model: the network, in evaluation mode.
      metadata: what the file says about the model, as text.
      dtype: "float32"; "float16" for weights and arithmetic, except for sums over the image and for what is computed directly from its
        pixels; or "int8" for the convolutions, except the first and the last one, and for their weights.
      deform: "native" writes a deformable convolution as the operator DeformConv; "grid-sample" writes it with GridSample, which more
        runtimes have.

    Raises:
      UserError: the network cannot be exported, or not in this type.
    """
    graph = Graph(np.float16 if dtype == "float16" else np.float32, grid_sample=deform == "grid-sample")
    result = graph.model(trace(model, graph), metadata, "restored", SHAPE)
    return (_quantize(result, model.config.NAME) if dtype == "int8" else result).SerializeToString()


def maps_to_onnx(model: CoarseNet, metadata: dict[str, str]) -> bytes:
    """Return the part of a CoarseNet that estimates the haze, as an ONNX model in float32, for programs that apply its result in strips.

    The input `hazy` is `[N, 3, H, W]` in [0, 1], an image that has been padded and reduced already: H and W are multiples of 32. The output
    `maps` is `[N, 4, H / 8, W / 8]`: after enlargement to the image's size, the restored image is the first map times the hazy image, minus
    the other three.
    """
    graph = Graph()
    maps = concat(haze_maps(model, graph.input))
    return graph.model(maps, metadata, "maps", ["N", 4, "H/8", "W/8"]).SerializeToString()


def _quantize(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Compute the convolutions with integers whose ranges are found when the model runs, so that no images are needed here.

    The first and the last convolution stay in float32, and so do those with at most 27 inputs for each output, such as those that see
    statistics of the image in a CoarseNet: they have few weights, but their errors would dominate. The weights are unsigned: with signed
    ones, the sums of two products overflow 16 bits on processors with AVX2 or AVX-512 but without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    inputs = {weights.name: math.prod(weights.dims[1:]) for weights in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    few = [node.name for node in convolutions if inputs[node.input[1]] <= _FEW_INPUTS]
    if len(convolutions) < 3:
        raise UserError(f"--dtype int8 needs a network with at least three convolutions: {name} has {len(convolutions)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # advice about a preparation that makes no difference for these graphs
        try:
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["Conv"],
                weight_type=QuantType.QUInt8,
                nodes_to_exclude=[convolutions[0].name, convolutions[-1].name, *few],
            )
        finally:
            logging.disable(before)
        quantized = onnx.load(path)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    return quantized

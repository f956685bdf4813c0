"""The layers and operators of the networks as nodes of an ONNX graph; each function is named like its counterpart in JAX."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aecr_jax.export.graph import Tensor, concat


def relu(x: Tensor) -> Tensor:
    return x.node("Relu")


def sigmoid(x: Tensor) -> Tensor:
    return x.node("Sigmoid")


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    return x.node("Tanh")


def clip(x: Tensor) -> Tensor:
    """Clip to [0, 1]."""
    return maximum(x, 0).node("Min", 1)


def maximum(x: Tensor, *others: Any) -> Tensor:
    return x.node("Max", *others)


def split(x: Tensor, count: int, axis: int = 1) -> list[Tensor]:
    """Split an axis into equal parts; by default, the channels."""
    return x.graph.node("Split", x, dtypes=[None] * count, num_outputs=count, axis=axis)


def mean(x: Tensor) -> Tensor:
    """Return the means over the pixels, `[N, C, 1, 1]`, computed in float32: a sum over many pixels is too large for float16."""
    return x.to(np.float32).node("GlobalAveragePool").to(x.dtype)


def top_k(x: Tensor, count: Tensor) -> list[Tensor]:
    """Return the greatest values along the last axis, in descending order, and their indices; of equal values, the first ones."""
    return x.graph.node("TopK", x, count, dtypes=[None, np.int64], axis=-1)


def arg_max(x: Tensor) -> Tensor:
    """Return the index of the first of the greatest values along the last axis, `[N, 1, 1]` for `[N, 1, P]`."""
    return x.node("ArgMax", axis=2, keepdims=1, dtype=np.int64)


def take_pixels(x: Tensor, indices: Tensor) -> Tensor:
    """Return the pixels with the given indices: `[N, 3, P]`, `[N, 1, K] -> [N, 3, K]`."""
    return x.node("GatherElements", indices.node("Expand", np.array([1, 3, 1])), axis=2)


# ---- sizes


def crop(x: Tensor, like: Tensor) -> Tensor:
    """Cut `x` at the bottom and the right to the height and width of `like`."""
    return x.slice([0, 0], concat([like.size(2), like.size(3)], 0), [2, 3])


def mirror(x: Tensor, axis: int, before: int, after: int | Tensor, *, repeat_edge: bool = False) -> Tensor:
    """Pad an axis by reflection, with or without repeating the edge; the padding may be larger than the image, unlike that of Pad."""
    n = x.size(axis)
    last = 2 * n - 1 if repeat_edge else maximum(2 * n - 2, 1)
    period = last + 1 if repeat_edge else last

    def outside(positions: Tensor) -> Tensor:
        position = positions.node("Mod", period)
        return x.node("Gather", position.node("Min", last - position), axis=axis)

    parts = [outside(x.graph.constant(np.arange(-before, 0), np.int64))] if before else []
    parts.append(x)
    if isinstance(after, Tensor):
        first, end, step = (value.node("Squeeze", np.zeros(1, np.int64)) for value in (n, n + after, x.graph.constant(1, np.int64)))
        parts.append(outside(first.node("Range", end, step)))
    elif after:
        parts.append(outside(n + np.arange(after)))
    return concat(parts, axis) if len(parts) > 1 else x


def pad(x: Tensor, multiple: int | Tensor) -> Tensor:
    """Pad by reflection at the bottom and the right, so that height and width are multiples of `multiple`; see `Network.pad`."""
    if isinstance(multiple, int) and multiple == 1:
        return x
    for axis in (2, 3):
        x = mirror(x, axis, 0, (-x.size(axis)).node("Mod", multiple))
    return x


def positions(x: Tensor, axis: int) -> Tensor:
    """Return 0, 1, ... along the rows (axis 2) or columns (axis 3), `[1, 1, H, 1]` or `[1, 1, 1, W]`, in float32."""
    zero, one = (x.graph.constant(value, np.int64) for value in (0, 1))
    first, end, step = (value.node("Squeeze", np.zeros(1, np.int64)) for value in (zero, x.size(axis), one))
    return first.node("Range", end, step).to(np.float32).reshape(*(-1 if i == axis else 1 for i in range(4)))


def resize(x: Tensor, *, factor: int | Tensor | None = None, like: Tensor | None = None, mode: str, coordinates: str) -> Tensor:
    """Resize by a factor, or to the height and width of `like`."""
    options: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        options["nearest_mode"] = "floor"
    if like is not None:
        return x.node("Resize", None, None, concat([x.size(0), x.size(1), like.size(2), like.size(3)], 0), **options)
    ones = x.graph.constant([1, 1], np.float32)
    scale = factor.to(np.float32) if isinstance(factor, Tensor) else x.graph.constant(factor, np.float32)
    return x.node("Resize", None, concat([ones, scale, scale], 0), **options)


def enlarge_bilinear(x: Tensor, factor: int | Tensor) -> Tensor:
    return resize(x, factor=factor, mode="linear", coordinates="half_pixel")


def upsample_bilinear(x: Tensor) -> Tensor:
    return resize(x, factor=2, mode="linear", coordinates="align_corners")


def upsample_nearest(x: Tensor) -> Tensor:
    return resize(x, factor=2, mode="nearest", coordinates="asymmetric")


# ---- convolutions


def convolve(x: Tensor, kernel: Any, bias: Any = None, *, stride: int = 1, pads: Sequence[int] = (0, 0, 0, 0)) -> Tensor:
    """Convolve with a kernel `[kh, kw, C, O]`; `pads` are the zeros at the top, the left, the bottom and the right."""
    kernel = np.asarray(kernel, x.dtype).transpose(3, 2, 0, 1)
    biases = [] if bias is None else [np.asarray(bias)]
    return x.node("Conv", kernel, *biases, kernel_shape=kernel.shape[2:], strides=[stride] * 2, pads=list(pads))


def conv(x: Tensor, layer: Any, *, small: bool = False) -> Tensor:
    """Apply a `Conv`.

    Args:
      x: `[N, C, H, W]`.
      layer: the layer.
      small: whether H or W may be no larger than a padding by reflection, which needs other nodes.
    """
    pads = [layer.padding] * 4 if isinstance(layer.padding, int) else [0] * 4
    if layer.reflected:
        amount = layer.reflected
        if small:
            x = mirror(mirror(x, 2, amount, amount), 3, amount, amount)
        else:
            x = x.node("Pad", np.array([0, 0, amount, amount] * 2, np.int64), mode="reflect")
    stride = layer.strides if isinstance(layer.strides, int) else layer.strides[0]
    bias = None if layer.bias is None else layer.bias[...]
    return convolve(x, layer.kernel[...], bias, stride=stride, pads=pads)


def linear(x: Tensor, layer: Any) -> Tensor:
    """Apply an `nnx.Linear` to the channels of `[N, C, H, W]`."""
    return convolve(x, layer.kernel[...][None, None], None if layer.bias is None else layer.bias[...])


def conv_transpose(x: Tensor, layer: Any) -> Tensor:
    """Apply a `ConvTranspose`, with the output padding that gives twice the input's size."""
    kernel = np.asarray(layer.kernel[...], x.dtype).transpose(2, 3, 0, 1)
    size = kernel.shape[2]
    missing = max(0, 2 * layer.padding + 2 - size)
    return x.node(
        "ConvTranspose",
        kernel,
        np.asarray(layer.bias[...]),
        kernel_shape=[size, size],
        strides=[2, 2],
        pads=[layer.padding] * 4,
        output_padding=[missing, missing],
    )


def fast_deconv(x: Tensor, layer: Any) -> Tensor:
    """Apply a `FastDeconv` with its running statistics, which are merged into one kernel."""
    kernel, bias = layer.merge(layer.running_mean[...], layer.running_deconv[...])
    return convolve(x, kernel, bias, pads=[1] * 4)


def deform_conv(x: Tensor, layer: Any) -> Tensor:
    """Apply a `DeformConv` with stride 1 and one group of offsets, as one node or by one GridSample for each tap."""
    taps, rows = layer.taps, layer.padding[0]
    offset_mask = convolve(x, layer.offset_mask.kernel[...], layer.offset_mask.bias[...], pads=[rows] * 4)
    offset = offset_mask.slice([0], [2 * taps], [1])
    mask = sigmoid(offset_mask.slice([2 * taps], [3 * taps], [1]))
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    if not x.graph.grid_sample:
        weight = kernel.transpose(3, 2, 0, 1)
        shape = {"kernel_shape": weight.shape[2:], "strides": [1, 1], "dilations": [1, 1]}
        return x.node("DeformConv", np.asarray(weight), offset, bias, mask, pads=[rows] * 4, group=1, offset_group=1, **shape)
    # Positions need float32: at 256 pixels, float16 resolves only a quarter of a pixel.
    offset = offset.to(np.float32)
    image = x.to(np.float32)
    sizes = [image.size(axis).to(np.float32) for axis in (2, 3)]
    grid = [positions(image, axis) for axis in (2, 3)]
    offsets, masks = split(offset, 2 * taps), split(mask, taps)
    total = None
    for tap in range(taps):
        place = divmod(tap, kernel.shape[1])
        coordinates = []
        for axis in (1, 0):  # GridSample takes (x, y), and -1 and 1 are the outer edges of the image
            position = offsets[2 * tap + axis] + grid[axis] + (place[axis] - rows + 0.5)
            coordinates.append((position * 2 / sizes[axis] - 1).node("Unsqueeze", np.array([4])))
        where = concat(coordinates, 4).node("Squeeze", np.array([1]))
        sample = image.node("GridSample", where, mode="bilinear", padding_mode="zeros", align_corners=0).to(x.dtype)
        term = convolve(sample * masks[tap], kernel[place][None, None])
        total = term if total is None else total + term
    assert total is not None
    return total + bias.reshape(1, -1, 1, 1)


# ---- blocks


def prelu(x: Tensor, layer: Any) -> Tensor:
    return x.node("PRelu", np.asarray(layer.slope[...]).reshape(1, 1, 1))


def gate(x: Tensor, down: Any, up: Any, apply: Callable[[Tensor, Any], Tensor] = conv) -> Tensor:
    return sigmoid(apply(relu(apply(x, down)), up))


def fa_block(x: Tensor, block: Any) -> Tensor:
    y = relu(conv(x, block.conv1)) + x
    y = conv(y, block.conv2)
    y = y * gate(mean(y), block.channel_down, block.channel_up)
    y = y * gate(y, block.pixel_down, block.pixel_up)
    return y + x


def residual_block(x: Tensor, block: Any, activation: Callable[[Tensor], Tensor] = relu, *, small: bool = False) -> Tensor:
    return x + conv(activation(conv(x, block.conv1, small=small)), block.conv2, small=small)


def residual_blocks(x: Tensor, blocks: Any, activation: Callable[[Tensor], Tensor] = relu) -> Tensor:
    """Apply an `nnx.Sequential` of residual blocks."""
    for block in blocks.layers:
        x = residual_block(x, block, activation)
    return x


def mixup(down: Tensor, up: Tensor, layer: Any) -> Tensor:
    share = 1 / (1 + np.exp(-np.asarray(layer.theta[...])))
    return down * share + up * (1 - share)


# ---- windows


def window_max(x: Tensor, radius: int) -> Tensor:
    for shape, pads in (((2 * radius + 1, 1), (radius, 0)), ((1, 2 * radius + 1), (0, radius))):
        x = x.node("MaxPool", kernel_shape=shape, pads=pads * 2)
    return x


def window_min(x: Tensor, radius: int) -> Tensor:
    return -window_max(-x, radius)


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Return the mean over windows, from sums over 1, 2, 4, ... pixels: AveragePool takes time proportional to the window."""
    end, size = np.iinfo(np.int64).max, 2 * radius + 1
    for axis in (2, 3):
        n, position = x.size(axis), positions(x, axis)
        count = (position + radius).node("Min", n.to(np.float32) - 1) - maximum(position - radius, 0) + 1
        reach = [radius if i == axis else 0 for i in range(4)]
        x = x.node("Pad", np.array(reach * 2))
        parts, start, length = [], 0, 1
        while True:  # `x` has the sums over all windows of `length` pixels
            if size & length:
                parts.append(x.slice([start], n + start, [axis]))
                start += length
            if 2 * length > size:
                break
            x = x.slice([0], [-length], [axis]) + x.slice([length], [end], [axis])
            length *= 2
        x = functools.reduce(operator.add, parts) / count
    return x


def guided_filter(guide: Tensor, image: Tensor, *, radius: int, epsilon: float) -> Tensor:
    guide = guide - mean(guide)
    shift = mean(image)
    image = image - shift
    means = box_mean(concat([guide, image, guide * guide, guide * image]), radius)
    mean_guide, mean_image, mean_square, mean_product = split(means, 4)
    variance = mean_square - mean_guide * mean_guide
    a = (mean_product - mean_guide * mean_image) / (maximum(variance, 0) + epsilon)
    a, b = split(box_mean(concat([a, mean_image - a * mean_guide]), radius), 2)
    return a * guide + b + shift

"""The networks as ONNX graphs. Each function takes a network in evaluation mode and its input, and returns its output.

The functions repeat the forward passes of `aecr_jax/networks/` with ONNX's operators. A translation of JAX's traced program is not an
alternative: it would contain the forms that are fast with XLA, such as convolutions with their taps as channels, and many of its sizes
are Python numbers, which cannot depend on the image in an ONNX graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from aecr_jax.errors import UserError
from aecr_jax.export.graph import Graph, Tensor, concat
from aecr_jax.export.layers import (
    arg_max,
    clip,
    conv,
    conv_transpose,
    convolve,
    crop,
    deform_conv,
    enlarge_bilinear,
    fa_block,
    fast_deconv,
    gate,
    guided_filter,
    linear,
    maximum,
    mean,
    mirror,
    mixup,
    pad,
    prelu,
    relu,
    residual_block,
    residual_blocks,
    resize,
    sigmoid,
    silu,
    split,
    take_pixels,
    tanh,
    top_k,
    upsample_bilinear,
    upsample_nearest,
    window_max,
    window_min,
)
from aecr_jax.networks import coarse_net as coarse
from aecr_jax.networks import dcp as dark
from aecr_jax.networks import dehaze_net as cai
from aecr_jax.networks import ffa_net as ffa
from aecr_jax.networks import msbdn as boosted
from aecr_jax.networks.layers import ConvTranspose
from aecr_jax.networks.network import Network


def aecr_net(model: Any, hazy: Tensor) -> Tensor:
    config = model.config
    x = _arithmetic(pad(hazy, model.MULTIPLE))
    if model.fast_deconv is not None:
        x = fast_deconv(x, model.fast_deconv)
    down1 = relu(conv(x, model.down1))
    down2 = relu(conv(down1, model.down2))
    down3 = y = relu(conv(down2, model.down3))
    if model.coarse is not None:
        y = y + _coarse_levels(y, model.coarse)

    def enhance(x: Tensor) -> Tensor:
        for i in range(config.deform_layers):
            x = deform_conv(x, model.deform[i % len(model.deform)])
        return x

    def join(down: Tensor, up: Tensor, layer: str) -> Tensor:
        if config.mixup == "adaptive":
            return mixup(down, up, getattr(model, layer))
        return down + up if config.mixup == "sum" else up

    if config.dfe == "before":
        y = enhance(y)
    for i in range(config.blocks):
        y = fa_block(y, model.blocks[i % len(model.blocks)])
    if config.dfe == "after":
        y = enhance(y)
    up1 = relu(conv_transpose(join(down3, y, "mix1"), model.up1))
    up2 = relu(conv_transpose(join(down2, up1, "mix2"), model.up2))
    y = crop(conv(up2, model.up3), hazy).to(np.float32)
    if config.output == "direct":
        return tanh(y)
    if config.output == "residual":
        return hazy + y
    gain, offset = y.slice([0], [1], [1]), y.slice([1], [4], [1])
    if config.output == "airlight":
        gain = (gain - 2).node("Softplus")
        offset = gain * sigmoid(offset)
    return hazy + gain * hazy - offset


def _arithmetic(x: Tensor) -> Tensor:
    """Convert to the type of the graph's arithmetic; what is computed directly from the hazy image stays in float32."""
    return x.to(x.graph.dtype)


def _coarse_levels(x: Tensor, levels: Any) -> Tensor:
    finer = []
    for down, blocks in zip(levels.downs, levels.blocks):
        finer.append(x)
        x = residual_blocks(relu(conv(x, down)), blocks)
    for i, skip in enumerate(reversed(finer)):
        x = crop(enlarge_bilinear(x, 2), skip)
        if i < len(finer) - 1:
            x = x + skip
    return x


def coarse_net(model: Any, hazy: Tensor) -> Tensor:
    # sqrt(ceil(n / PIXELS)), rounded up, as an integer: large images are reduced by this factor.
    parts = (hazy.size(2) * hazy.size(3) + (coarse.PIXELS - 1)) / coarse.PIXELS
    reduction = parts.to(np.float32).node("Sqrt").node("Ceil").to(np.int64)
    padded = pad(hazy, reduction * model.MULTIPLE)
    # Reshape and mean, as AveragePool cannot have a window whose size is computed.
    n, h, w = padded.size(0), padded.size(2), padded.size(3)
    cells = padded.reshape(n, 3, h / reduction, reduction, w / reduction, reduction)
    maps = haze_maps(model, cells.node("ReduceMean", np.array([3, 5]), keepdims=0))
    factor, offset = (crop(enlarge_bilinear(x, reduction * coarse.MAP_CELL), hazy) for x in maps)
    return factor * hazy - offset


def haze_maps(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps `[N, 1, H / 8, W / 8]` and `[N, 3, H / 8, W / 8]` of a CoarseNet: the restored image is `factor * hazy - offset`.

    H and W of the images must be multiples of 32.
    """
    side = coarse.STEM_CELL
    values, within = _arithmetic(images.node("SpaceToDepth", blocksize=side)), clip(images)
    moments = _pool_moments((within, within, within, None), side)
    x = silu(conv(concat([values, _moment_features(moments)]), model.stem))
    levels = []
    for down, see, blocks in zip(model.downs, model.moments, model.encoder):
        moments = _pool_moments(moments, 2)
        x = silu(conv(x, down) + conv(_moment_features(moments), see))
        x = residual_blocks(x, blocks, silu)
        levels.append(x)
    x = levels.pop()
    x = x + conv(mean(x), model.context)
    for up, blocks, finer in zip(reversed(model.ups), reversed(model.decoder), reversed(levels)):
        x = residual_blocks(finer + enlarge_bilinear(conv(x, up), 2), blocks, silu)
    maps = conv(x, model.maps).to(np.float32)
    transmission = coarse.LEAST + (1 - coarse.LEAST) * sigmoid(maps.slice([0], [1], [1]) + coarse.SHIFT)
    factor = 1 / transmission
    gain = factor - 1
    return factor, gain * _smooth_airlight(gain, sigmoid(maps.slice([1], [4], [1])))


# The least and the greatest values, the means and the variances of square cells; single pixels have no variance.
Moments = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _pool_moments(moments: Moments, side: int) -> Moments:
    def pool(x: Tensor, kind: str) -> Tensor:
        return x.node(kind, kernel_shape=[side, side], strides=[side, side])

    least, greatest, means, variances = moments
    mean_ = pool(means, "AveragePool")
    difference = means - resize(mean_, factor=side, mode="nearest", coordinates="asymmetric")
    squares = difference * difference if variances is None else variances + difference * difference
    return -pool(-least, "MaxPool"), pool(greatest, "MaxPool"), mean_, pool(squares, "AveragePool")


def _moment_features(moments: Moments) -> Tensor:
    least, greatest, mean_, variance = moments
    assert variance is not None
    extremes = concat([least, greatest])
    deviation = (variance + coarse.LEAST_VARIANCE).node("Sqrt")
    logarithms = [extremes + coarse.MARGIN, 1 + coarse.MARGIN - extremes, mean_ + coarse.MARGIN, deviation]
    return _arithmetic(concat([extremes, *(x.node("Log") for x in logarithms)]))


def _smooth_airlight(gain: Tensor, airlight: Tensor) -> Tensor:
    side = coarse.AIRLIGHT_CELLS
    sums = concat([gain, gain * airlight]).node("AveragePool", kernel_shape=[side, side], strides=[side, side])
    for _ in range(2):
        sums = sums.node("Pad", np.array([0, 0, 1, 1] * 2, np.int64), mode="edge")
        for _ in range(2):  # two means of two values each are a mean of three, weighted by 1, 2 and 1
            sums = sums.node("AveragePool", kernel_shape=[2, 2], strides=[1, 1])
    sums = enlarge_bilinear(sums, side)
    return sums.slice([1], [4], [1]) / (sums.slice([0], [1], [1]) + 1e-6)


def aod_net(model: Any, hazy: Tensor) -> Tensor:
    x = _arithmetic(hazy)
    x1 = relu(conv(x, model.conv1))
    x2 = relu(conv(x1, model.conv2))
    x3 = relu(conv(concat([x1, x2]), model.conv3))
    x4 = relu(conv(concat([x2, x3]), model.conv4))
    k = relu(conv(concat([x1, x2, x3, x4]), model.conv5))
    return relu(k * x - k + 1)


def ffa_net(model: Any, hazy: Tensor) -> Tensor:
    mean_, std = (np.array(values).reshape(1, 3, 1, 1) for values in (ffa.MEAN, ffa.STD))
    x = (hazy - mean_) / std
    y = conv(_arithmetic(x), model.first)
    groups = []
    for group in model.groups:
        z = y
        for block in group.layers[:-1]:
            z = fa_block(z, block)
        y = conv(z, group.layers[-1]) + y
        groups.append(y)
    attention = model.group_attention
    weights = split(gate(concat([mean(group) for group in groups]), attention.down, attention.up), len(groups))
    y = functools.reduce(operator.add, (weight * group for weight, group in zip(weights, groups)))
    y = y * gate(y, model.pixel_down, model.pixel_up)
    return conv(conv(y, model.last1), model.last2).to(np.float32) + x


def grid_dehaze_net(model: Any, hazy: Tensor) -> Tensor:
    def dense(x: Tensor, block: Any) -> Tensor:
        features = x
        for layer in block.layers:
            features = concat([features, relu(conv(features, layer))])
        return x + conv(features, block.fuse)

    def down(x: Tensor, layer: Any) -> Tensor:
        return relu(conv(relu(conv(x, layer.shrink)), layer.widen))

    def up(x: Tensor, layer: Any, like: Tensor) -> Tensor:
        return relu(conv(crop(relu(conv_transpose(x, layer.enlarge)), like), layer.narrow))

    coefficient = np.asarray(model.coefficient[...])

    def join(row: int, column: int, along: Tensor, across: Tensor) -> Tensor:
        width = model.config.width * 2**row
        factors = coefficient[row, column, :, :width].reshape(2, 1, width, 1, 1)
        return along * factors[0] + across * factors[1]

    rows = [dense(conv(_arithmetic(2 * hazy - 1), model.conv_in), model.block_in)]
    count, columns = coefficient.shape[:2]
    for row in range(1, count):
        rows.append(down(rows[-1], model.downs[row - 1][0]))
    for column in range(1, columns):
        along = [dense(x, blocks[column - 1]) for blocks, x in zip(model.blocks, rows)]
        if column < columns // 2:
            rows[0] = along[0]
            for row in range(1, count):
                rows[row] = join(row, column, along[row], down(rows[row - 1], model.downs[row - 1][column]))
        else:
            rows[-1] = along[-1]
            for row in reversed(range(count - 1)):
                layer = model.ups[row][column - columns // 2]
                rows[row] = join(row, column, along[row], up(rows[row + 1], layer, along[row]))
    return relu(conv(dense(rows[0], model.block_out), model.conv_out))


def pfdn(model: Any, hazy: Tensor) -> Tensor:
    y = _arithmetic(2 * pad(hazy, model.MULTIPLE) - 1)
    for layer in (model.down1, model.down2, model.down3):
        y = relu(conv(y, layer))
    for block in model.blocks:
        z = conv(relu(conv(y, block.conv1)), block.conv2)
        factor, summand = split(gate(mean(z), block.dehazing.down, block.dehazing.up, linear), 2)
        y = z * factor + summand + y
    for layer in (model.up1, model.up2):
        y = relu(conv_transpose(y, layer))
    return (tanh(crop(conv(y, model.up3), hazy)).to(np.float32) + 1) / 2


def kddn(model: Any, hazy: Tensor) -> Tensor:
    full = relu(conv(_arithmetic(pad(hazy, model.MULTIPLE)), model.first))
    half = relu(conv(full, model.down1))
    y = relu(conv(half, model.down2))
    for group in model.groups:
        z = y
        for block in group.layers[:-1]:
            r = conv(relu(conv(z, block.conv1)), block.conv2)
            r = r * gate(r, block.spatial1, block.spatial2)
            z = z + r * gate(mean(r), block.channel1, block.channel2, linear)
        y = y + conv(z, group.layers[-1])
    y = relu(conv(concat([upsample_bilinear(y), half]), model.up1))
    y = relu(conv(concat([upsample_bilinear(y), full]), model.up2))
    return crop(tanh(conv(y, model.last)), hazy)


def kddn_teacher(model: Any, clear: Tensor) -> Tensor:
    y = _arithmetic(pad(clear, model.MULTIPLE))
    for layer in (model.first, model.down1, model.down2):
        y = relu(conv(y, layer))
    # An image of 4x4 pixels has a single one at a quarter of the resolution.
    for block in model.blocks:
        y = residual_block(y, block, small=True)
    for layer in (model.up1, model.up2):
        y = relu(conv(upsample_nearest(y), layer, small=layer is model.up1))
    return crop(tanh(conv(y, model.last)), clear)


def msbdn(model: Any, hazy: Tensor) -> Tensor:
    def blocks(x: Tensor, module: Any, *, small: bool = False) -> Tensor:
        for block in module.blocks:
            y = prelu(conv(x, block.conv1, small=small), block.activation)
            x = x + boosted.RESIDUAL_FACTOR * conv(y, block.conv2, small=small)
        return x

    def step(x: Tensor, layer: Any) -> Tensor:
        """Change the scale within a fusion."""
        return prelu((conv_transpose if isinstance(layer.conv, ConvTranspose) else conv)(x, layer.conv), layer.activation)

    def fuse(x: Tensor, others: list[Tensor], fusion: Any) -> Tensor:
        away, back = (fusion.ups, fusion.downs) if fusion.to_finer else (fusion.downs, fusion.ups)
        for i, other in enumerate(others):
            steps = len(others) - i
            error = functools.reduce(step, list(away)[:steps], x) - other
            x = x + functools.reduce(step, list(back)[:steps][::-1], error)
        return x

    x = conv(_arithmetic(pad(hazy, model.MULTIPLE)), model.conv_in)
    finer, skips = [x], []
    for n, down in enumerate(model.downs):
        skips.append(blocks(x, model.encoder[n]) + x)
        x = fuse(conv(skips[n], down), finer, model.encoder_fusions[n])
        finer.append(x)
    # An image of 16x16 pixels has a single one at the lowest resolution.
    x = blocks(2 * x, model.bottleneck, small=True) + x
    coarser = [x]
    for n, skip in enumerate(reversed(skips)):
        up = resize(conv_transpose(x, model.ups[n]), like=skip, mode="linear", coordinates="half_pixel")
        x = fuse(blocks(up + skip, model.decoder[n]) + skip, coarser, model.decoder_fusions[n])
        coarser.append(x)
    return crop(conv(x, model.conv_out), hazy)


def dcp(model: Any, hazy: Tensor) -> Tensor:
    config = model.config

    def dark_channel(x: Tensor) -> Tensor:
        red, green, blue = split(x, 3)
        return window_min(red.node("Min", green, blue), config.patch // 2)

    pixels = hazy.reshape(0, 3, -1)
    count = maximum(hazy.size(2) * hazy.size(3) / dark.PIXELS_PER_CANDIDATE, 1)
    _, candidates = top_k(dark_channel(hazy).reshape(0, 1, -1), count)  # [N, 1, count]
    colours = take_pixels(pixels, candidates)
    red, green, blue = split(colours, 3)
    airlight = take_pixels(colours, arg_max(red + green + blue)).reshape(0, 3, 1, 1)
    transmission = 1 - config.omega * dark_channel(hazy / maximum(airlight, dark.LEAST_AIRLIGHT))
    red, green, blue = split(hazy, 3)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    transmission = guided_filter(grey, transmission, radius=config.radius, epsilon=config.epsilon)
    return (hazy - airlight) / maximum(transmission, config.least_transmission) + airlight


def dehaze_net(model: Any, hazy: Tensor) -> Tensor:
    config = model.config

    def mirrored(x: Tensor, layer: Any, order: Any = slice(None)) -> Tensor:
        size = layer.kernel.shape[0]
        for axis in (2, 3):
            x = mirror(x, axis, (size - 1) // 2, size // 2, repeat_edge=True)
        return convolve(x, layer.kernel[...][..., order], layer.bias[...][order])

    pieces, outputs = model.features.PIECES, model.features.bias.shape[0]
    first = mirrored(_arithmetic(hazy - 0.5), model.features, np.arange(outputs).reshape(-1, pieces).T.ravel())
    x = maximum(*split(first, pieces))
    x = window_max(concat([mirrored(x, layer) for layer in model.scales.convs]), model.local_maximum.radius)
    transmission = clip(mirrored(x, model.estimate).to(np.float32))

    red, green, blue = split(hazy, 3)
    grey = cai.GREY[0] * red + cai.GREY[1] * green + cai.GREY[2] * blue
    # The airlight is the colour of the brightest of the pixels with little transmission, or the mean of several equally bright ones.
    pixels, negated = hazy.reshape(0, 3, -1), (-transmission).reshape(0, 1, -1)
    count = maximum((hazy.size(2) * hazy.size(3) + 50) / 100, 1)
    least = top_k(negated, count)[0].node("ReduceMin", np.array([2]), keepdims=1)
    darkness = hazy.graph.constant(-np.inf, np.float32)
    candidates = negated.node("GreaterOrEqual", least, dtype=bool).node("Where", grey.reshape(0, 1, -1), darkness, dtype=np.float32)
    greatest = candidates.node("ReduceMax", np.array([2]), keepdims=1)
    chosen = candidates.node("Equal", greatest, dtype=bool).to(np.float32)
    colour = take_pixels(pixels, arg_max(candidates))
    difference = ((pixels - colour) * chosen).node("ReduceSum", np.array([2]), keepdims=1)
    airlight = (colour + difference / chosen.node("ReduceSum", np.array([2]), keepdims=1)).reshape(0, 3, 1, 1)

    transmission = guided_filter(grey, transmission, radius=config.radius, epsilon=config.epsilon)
    if config.least_transmission:
        transmission = maximum(transmission, config.least_transmission)
    else:
        smallest = hazy.graph.constant(cai.SMALLEST, np.float32)
        tiny = transmission.node("Abs").node("Less", smallest, dtype=bool)
        transmission = tiny.node("Where", smallest, transmission, dtype=np.float32)
    return (hazy - airlight) / transmission + airlight


_NETWORKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    function.__name__: function
    for function in (aecr_net, aod_net, coarse_net, dcp, dehaze_net, ffa_net, grid_dehaze_net, kddn, kddn_teacher, msbdn, pfdn)
}


def trace(model: Network, graph: Graph) -> Tensor:
    """Add a network to a graph and return its output.

    Raises:
      UserError: the network is not one of those that this module knows.
    """
    if model.config.NAME not in _NETWORKS:
        raise UserError(f"the network {model.config.NAME} cannot be exported to ONNX; those that can are {', '.join(sorted(_NETWORKS))}")
    return _NETWORKS[model.config.NAME](model, graph.input)

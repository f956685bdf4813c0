"""AECR-Net: the autoencoder of Section 3.1 of the paper, with every switch of its Table 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from aecr_jax.layers import Conv, DeformConv, FABlock, FastDeconv, Mixup, UpConv, conv_few_inputs, conv_few_outputs
from aecr_jax.settings import check_types
from aecr_jax.validation import IN_0_TO_1, as_floating

# Initial theta of the two mixups in the official code, deep and shallow.
_THETA_DEEP, _THETA_SHALLOW = -1.0, -0.6


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the official code's, which the paper's 2.61M parameters need.

    Raises:
      ValueError: a field has another type, or a value outside its range.
    """

    width: int = 64
    """Channels after the first convolution; 2x and 4x as many at half and quarter resolution."""
    blocks: int = 6
    """Feature-attention blocks, applied one after the other."""
    deform_layers: int = 2
    """Deformable convolutions in the dynamic feature enhancement (DFE)."""
    shared: bool = True
    """One feature-attention block and one deformable layer, applied repeatedly; False: each with weights of its own."""
    dfe: Literal["after", "before", "none"] = "after"
    """Where DFE stands with respect to the feature-attention blocks."""
    mixup: Literal["adaptive", "sum", "none"] = "adaptive"
    """How encoder features join the decoder: learned mixup (Eq. 2), plain sum ("SC" in Table 2), not at all."""
    fast_deconv: bool = True
    """Network deconvolution before the first convolution, as in the official code; the paper does not mention it."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the arithmetic; bfloat16 for accelerators."""
    param_dtype: Literal["float32", "float64"] = "float32"
    """Type of the parameters. float64 takes `JAX_ENABLE_X64=1`."""
    remat: bool = False
    """For gradients, keep the input of each layer and block alone and compute the rest anew: less memory, more time. XLA's CPU
    backend undoes it."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, most in (("width", 4096), ("blocks", 1000), ("deform_layers", 1000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least 1 and at most {most}")


class AECRNet(nnx.Module):
    """Restores a hazy image: `[N, H, W, 3]` in [0, 1] -> the same shape, about [0, 1] (a tanh, not clipped).

    Images are floating point, and so is the result; those of other types (8-bit ones, for instance) raise a ValueError. A batch of no
    images gives no images in evaluation mode, and raises a ValueError where the batch's statistics are needed.

    H and W may be any: what is no multiple of 4 is padded by reflection at the bottom and the right, and cropped back.
    `model.train()` whitens by the batch's statistics and updates the running ones, `model.eval()` uses the running ones.

    Args:
      config: the network's settings; the paper's by default.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has another type.
    """

    MULTIPLE = 4

    def __init__(self, config: ModelConfig = ModelConfig(), *, rngs: nnx.Rngs):
        if not isinstance(config, ModelConfig):
            raise ValueError(f"config (={config!r}) must be a ModelConfig")
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs (={rngs!r}) must be an nnx.Rngs, such as nnx.Rngs(0)")
        self.config = config
        types: dict[str, Any] = dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))
        types["rngs"] = rngs
        w = config.width
        self.fast_deconv = FastDeconv(**types) if config.fast_deconv else None
        self.down1 = Conv(3, w, 7, reflect=True, conv_general_dilated=conv_few_inputs, **types)
        self.down2 = Conv(w, 2 * w, 3, stride=2, **types)
        self.down3 = Conv(2 * w, 4 * w, 3, stride=2, **types)
        self.blocks = nnx.List([FABlock(4 * w, **types) for _ in range(1 if config.shared else config.blocks)])
        layers = 0 if config.dfe == "none" else 1 if config.shared else config.deform_layers
        self.deform = nnx.List([DeformConv(4 * w, **types) for _ in range(layers)])
        if config.mixup == "adaptive":
            self.mix1 = Mixup(_THETA_DEEP, param_dtype=types["param_dtype"])
            self.mix2 = Mixup(_THETA_SHALLOW, param_dtype=types["param_dtype"])
        self.up1 = UpConv(4 * w, 2 * w, **types)
        self.up2 = UpConv(2 * w, w, **types)
        self.up3 = Conv(w, 3, 7, reflect=True, conv_general_dilated=conv_few_outputs, **types)

    def __call__(self, hazy: ArrayLike) -> Array:
        hazy = as_floating(hazy, "hazy", IN_0_TO_1)
        if hazy.ndim != 4 or hazy.shape[-1] != 3 or 0 in hazy.shape[1:3]:
            raise ValueError(f"hazy has shape {hazy.shape} and must be [N, H, W, 3], H and W at least 1")
        h, w = hazy.shape[1:3]
        x = jnp.pad(hazy, ((0, 0), (0, -h % self.MULTIPLE), (0, -w % self.MULTIPLE), (0, 0)), mode="reflect")
        if self.fast_deconv is not None:
            x = self.fast_deconv(x)
        down1 = self._apply(self.down1, x, relu=True)  # [n, h, w, width]
        down2 = self._apply(self.down2, down1, relu=True)  # [n, h / 2, w / 2, 2 width]
        down3 = self._apply(self.down3, down2, relu=True)  # [n, h / 4, w / 4, 4 width]
        y = down3
        if self.config.dfe == "before":
            y = self._enhance(y)
        # A Python loop: a convolution inside lax.scan has a gradient 30 to 50 times slower on the CPU.
        for i in range(self.config.blocks):
            y = self._apply(self.blocks[i % len(self.blocks)], y)
        if self.config.dfe == "after":
            y = self._enhance(y)
        up1 = self._apply(self.up1, self._join(down3, y, deep=True), relu=True)
        up2 = self._apply(self.up2, self._join(down2, up1, deep=False), relu=True)
        out = jnp.tanh(self._apply(self.up3, up2))
        return out[:, :h, :w].astype(hazy.dtype)

    def _enhance(self, x: Array) -> Array:
        for i in range(self.config.deform_layers):
            x = self._apply(self.deform[i % len(self.deform)], x)
        return x

    def _apply(self, layer: Any, x: Array, *, relu: bool = False) -> Array:
        def apply(layer: Any, x: Array) -> Array:
            return nnx.relu(layer(x)) if relu else layer(x)

        return nnx.remat(apply)(layer, x) if self.config.remat else apply(layer, x)

    def _join(self, down: Array, up: Array, *, deep: bool) -> Array:
        if self.config.mixup == "adaptive":
            return (self.mix1 if deep else self.mix2)(down, up)
        return down + up if self.config.mixup == "sum" else up


def count_parameters(model: nnx.Module) -> int:
    """The number of learned scalars (running statistics do not count)."""
    return sum(array.size for array in get_arrays(model, nnx.Param).values())


def abstract_model(config: ModelConfig) -> AECRNet:
    """The network with shapes in place of arrays."""
    return nnx.eval_shape(lambda: AECRNet(config, rngs=nnx.Rngs(0)))


def build_model(config: ModelConfig, arrays: Mapping[str, Any]) -> AECRNet:
    """The network in evaluation mode with the given arrays (as `get_arrays` names them).

    Raises:
      ValueError: as `replace_arrays`.
    """
    graph, state = nnx.split(abstract_model(config))
    model = nnx.merge(graph, replace_arrays(state, {name: jnp.asarray(array) for name, array in arrays.items()}))
    model.eval()
    return model


def widen(model: AECRNet, width: int, *, rngs: nnx.Rngs) -> AECRNet:
    """A network of a greater width with the same output, in evaluation mode; what is new in it begins to count when it is trained.

    The idea is Net2Net's (Chen et al., ICLR 2016). The old channels come first and do not read the new ones, which read all and
    have the initial values of a new network.

    Args:
      model: the network; only its parameters and statistics are read.
      width: the new `ModelConfig.width`.
      rngs: the source of the new channels' initial values (stream `params`).

    Raises:
      ValueError: `width` is less than the model's.
    """
    if width < model.config.width:
        raise ValueError(f"width (={width}) must be at least the model's, {model.config.width}")
    wide = AECRNet(dataclasses.replace(model.config, width=width), rngs=rngs)
    old, new = get_arrays(model), get_arrays(wide)
    for name, array in old.items():
        target = new[name]
        if array.ndim == 4:  # [kh, kw, inputs, outputs]
            target = target.at[:, :, array.shape[2] :, : array.shape[3]].set(0)
        new[name] = target.at[tuple(slice(size) for size in array.shape)].set(array)
    return build_model(wide.config, new)


def get_arrays(model: nnx.Module, kind: Any = nnx.Variable) -> dict[str, Array]:
    """The arrays of a model by dotted name, `{"down1.kernel": ...}`; `kind` narrows them to `nnx.Param` or `nnx.BatchStat`."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): variable.get_value() for path, variable in zip(flat.paths, flat.leaves)}


def replace_arrays(state: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """A state like `state` (which may be abstract) with the values `arrays`, as `get_arrays` names them.

    Raises:
      ValueError: a name is missing or unknown, or a shape differs.
    """
    flat = nnx.to_flat_state(state)
    variables = {".".join(map(str, path)): variable for path, variable in zip(flat.paths, flat.leaves)}
    for name, variable in variables.items():
        if name not in arrays:
            raise ValueError(f"tensor {name} of shape {variable.shape} is missing")
        if arrays[name].shape != variable.shape:
            raise ValueError(f"tensor {name} has shape {arrays[name].shape} and must have {variable.shape}")
    if unknown := sorted(set(arrays) - set(variables)):
        raise ValueError(f"unknown tensor {unknown[0]}; the model has {', '.join(sorted(variables))}")
    leaves = [variable.replace(arrays[name]) for name, variable in variables.items()]
    return nnx.from_flat_state(zip(flat.paths, leaves))

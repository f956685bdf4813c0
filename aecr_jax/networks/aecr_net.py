"""AECR-Net: the autoencoder of Section 3.1 of the paper, with a setting for every variant in its Table 2."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from aecr_jax.errors import UserError
from aecr_jax.networks.layers import Conv, ConvTranspose, DeformConv, FABlock, FastDeconv, Mixup, ResidualBlock, recompute
from aecr_jax.networks.network import Network, NetworkConfig, SymbolicSizes, as_images, layer_options
from aecr_jax.networks.tiles import sees_whole
from aecr_jax.ops.conv import conv_few_inputs, conv_few_outputs
from aecr_jax.ops.deform_conv import has_kernels
from aecr_jax.ops.resize import enlarge_bilinear
from aecr_jax.settings import bounded

# Initial theta of the deep and the shallow mixup in the official code.
_THETA_DEEP, _THETA_SHALLOW = -1.0, -0.6


@dataclass(frozen=True, kw_only=True)
class AECRNetConfig(NetworkConfig):
    """The settings of AECR-Net. The defaults are those of the official code, which give the paper's 2.61M parameters.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "aecr_net"
    HOW_COMPUTED = frozenset({"dtype", "remat", "deform_implementation"})

    width: int = bounded(64, 1, 4096)
    """Number of channels after the first convolution. There are 2x and 4x as many at half and quarter resolution."""
    blocks: int = bounded(6, 1, 1000)
    """Number of feature-attention blocks, applied one after another."""
    deform_layers: int = bounded(2, 1, 1000)
    """Number of deformable convolutions in the dynamic feature enhancement (DFE)."""
    shared: bool = True
    """Whether one feature-attention block and one deformable layer are applied repeatedly; if False, each has its own weights."""
    dfe: Literal["after", "before", "none"] = "after"
    """Position of the DFE relative to the feature-attention blocks; "none" omits it."""
    mixup: Literal["adaptive", "sum", "none"] = "adaptive"
    """How encoder features are added to the decoder: by learned mixup (Eq. 2), by plain sum ("SC" in Table 2), or not at all."""
    output: Literal["direct", "residual", "affine", "airlight"] = "direct"
    """How the last layer gives the restored image: "direct", as the tanh of its output (the paper); "residual", added to the hazy image;
    "affine", as `x + K x - B` with one channel K and three channels B (DehazeFormer, Song et al., TIP 2023); "airlight", by the
    scattering model, `x + K (x - A)` with K = 1 / t - 1 > 0 and A in [0, 1]. All but the first begin near the hazy image."""
    coarse_levels: int = bounded(0, 0, 8)
    """Number of levels below the deepest one of the paper, at 1/8, 1/16, ... of the resolution, with two residual blocks each. Their
    result is added to the input of the feature-attention blocks. The paper has none."""
    fast_deconv: bool = True
    """Whether network deconvolution precedes the first convolution, as in the official code; the paper does not mention it."""
    remat: bool = False
    """Whether to store only the input of each layer and block for the backward pass and recompute the rest. This saves memory and
    costs time. XLA's CPU backend undoes it."""
    deform_implementation: Literal["xla", "pallas"] = "xla"
    """What computes the deformable convolutions: XLA, or kernels written in Pallas for NVIDIA GPUs and TPUs, which no device has run yet.
    A network that was trained with the kernels also restores images where there are none, by XLA. Training there is refused."""

    def check_devices(self, platform: str, count: int) -> None:
        """Refuse the kernels where the form of XLA would be used instead."""
        if self.deform_implementation == "pallas" and not has_kernels(platform, count):
            here = f"{count} {platform.upper()}{'s' if count > 1 else ''}"
            raise UserError(f"model.deform_implementation (=pallas) is for NVIDIA GPUs and for one TPU, and this run has {here}: use xla")


class AECRNet(Network):
    """Restores hazy images: `[N, H, W, 3]` in [0, 1] -> the same shape, approximately in [0, 1], not clipped.

    Images must be floating point, and the result has their type; other types, such as 8-bit images, raise a ValueError. An empty
    batch gives an empty result in evaluation mode and raises a ValueError where the batch's statistics are needed.

    H and W may have any value: sizes that are not multiples of 4 are padded by reflection at the bottom and the right, and the
    result is cropped. After `model.train()`, the network whitens with the batch's statistics and updates the running ones; after
    `model.eval()`, it uses the running ones.

    Args:
      config: the network's settings; the paper's by default.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type.
    """

    Config = AECRNetConfig
    MULTIPLE = 4

    def __init__(self, config: AECRNetConfig = AECRNetConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types = layer_options(config, rngs)
        w = config.width
        self.fast_deconv = FastDeconv(**types) if config.fast_deconv else None
        self.down1 = Conv(3, w, 7, reflect=True, conv_general_dilated=conv_few_inputs, **types)
        self.down2 = Conv(w, 2 * w, 3, stride=2, **types)
        self.down3 = Conv(2 * w, 4 * w, 3, stride=2, **types)
        self.coarse = CoarseLevels(4 * w, config.coarse_levels, **types) if config.coarse_levels else None
        self.blocks = nnx.List([FABlock(4 * w, **types) for _ in range(1 if config.shared else config.blocks)])
        layers = 0 if config.dfe == "none" else 1 if config.shared else config.deform_layers
        deform: dict[str, Any] = types | {"padding": 1, "implementation": config.deform_implementation}
        self.deform = nnx.List([DeformConv(4 * w, 4 * w, 3, **deform) for _ in range(layers)])
        if config.mixup == "adaptive":
            self.mix1 = Mixup(_THETA_DEEP, param_dtype=types["param_dtype"])
            self.mix2 = Mixup(_THETA_SHALLOW, param_dtype=types["param_dtype"])
        self.up1 = ConvTranspose(4 * w, 2 * w, 3, padding=1, **types)
        self.up2 = ConvTranspose(2 * w, w, 3, padding=1, **types)
        outputs = 4 if self.estimates_haze(config) else 3
        self.up3 = Conv(w, outputs, 7, reflect=True, conv_general_dilated=conv_few_outputs, **types)

    def __call__(self, hazy: ArrayLike) -> Array:
        hazy = as_images(hazy)
        if self.estimates_haze(self.config):
            return self.restore_with_haze(hazy)[0]
        y = self._decode(hazy)
        out = jnp.tanh(y) if self.config.output == "direct" else hazy + y
        return out.astype(hazy.dtype)

    @classmethod
    def estimates_haze(cls, config: NetworkConfig) -> bool:
        return isinstance(config, AECRNetConfig) and config.output in ("affine", "airlight")

    def symbolic_sizes(self) -> SymbolicSizes:
        return SymbolicSizes(self.MULTIPLE << self.config.coarse_levels)

    def estimate_haze(self, hazy: ArrayLike) -> tuple[Array, Array]:
        if not self.estimates_haze(self.config):
            return super().estimate_haze(hazy)
        y = self._decode(as_images(hazy))
        if self.config.output == "affine":
            return y[..., :1], y[..., 1:]
        # The shift makes the restored image begin near the hazy one: K is about 0.1 at first.
        gain = nnx.softplus(y[..., :1] - 2)
        return gain, gain * nnx.sigmoid(y[..., 1:])

    def _decode(self, hazy: Array) -> Array:
        """Return the output of the last layer, `[N, H, W, 3 or 4]`."""
        h, w = hazy.shape[1:3]
        # The scopes name the parts of the network in a profile.
        with jax.named_scope("encoder"):
            x = self.pad(hazy)
            if self.fast_deconv is not None:
                x = self.fast_deconv(x)
            # The next layers apply the ReLU, so that for the gradient only its input is kept.
            down1 = self._apply(self.down1, x)  # [n, h, w, width]
            down2 = self._apply(self.down2, down1, function=_after_relu)  # [n, h / 2, w / 2, 2 width]
            down3 = self._apply(self.down3, down2, function=_after_relu)  # [n, h / 4, w / 4, 4 width]
            y = nnx.relu(down3)
            if self.coarse is not None:
                y = y + self._apply(self.coarse, y)
        if self.config.dfe == "before":
            y = self._enhance(y)
        # This is a Python loop, because the gradient of a convolution inside lax.scan is 30 to 50 times slower on the CPU.
        with jax.named_scope("fa_blocks"):
            for i in range(self.config.blocks):
                y = self._apply(self.blocks[i % len(self.blocks)], y)
        if self.config.dfe == "after":
            y = self._enhance(y)
        with jax.named_scope("decoder"):
            deep, shallow = ((self.mix1,), (self.mix2,)) if self.config.mixup == "adaptive" else ((), ())
            join = functools.partial(_join, self.config.mixup)
            up1 = self._apply((self.up1, *deep), down3, y, function=join)
            up2 = self._apply((self.up2, *shallow), down2, up1, function=lambda layers, down, up: join(layers, down, nnx.relu(up)))
            return self._apply(self.up3, up2, function=_after_relu)[:, :h, :w]

    @jax.named_scope("dfe")
    def _enhance(self, x: Array) -> Array:
        for i in range(self.config.deform_layers):
            x = self._apply(self.deform[i % len(self.deform)], x)
        return x

    def _apply(self, layers: Any, *arrays: Array, function: Callable[..., Array] | None = None) -> Array:
        """Return `layers(*arrays)`, or `function(layers, *arrays)` if a function is given, for which only the arrays are kept."""
        # A tile has no backward pass, and its means could not leave the rematerialized function.
        if self.config.remat and sees_whole():
            return nnx.remat(function or _call)(layers, *arrays)
        return recompute(function, layers, *arrays) if function else layers(*arrays)

    @classmethod
    def predicts_offsets(cls, name: str) -> bool:
        return ".offset_mask." in name

    def freeze_statistics(self) -> bool:
        if self.fast_deconv is not None:
            self.fast_deconv.eval()
        return self.fast_deconv is not None

    def diagnostics(self, intermediates: Any) -> dict[str, Array]:
        """Return the mixup factors, and the mean and largest |offset| of the deformable layers in pixels."""
        names = ("mix1", "mix2") if self.config.mixup == "adaptive" else ()
        measurements = {name: nnx.sigmoid(getattr(self, name).theta[...]) for name in names}
        offsets = [jnp.abs(lax.stop_gradient(leaf)) for leaf in jax.tree.leaves(intermediates)]
        if offsets:
            dtype = jnp.promote_types(offsets[0].dtype, jnp.float32)
            means = jnp.stack([jnp.mean(o, dtype=dtype) for o in offsets])
            measurements |= {"offset_mean": means.mean(), "offset_max": jnp.stack([o.max() for o in offsets]).max().astype(dtype)}
        return measurements

    @classmethod
    def explain(cls, measurements: Mapping[str, float], crop: int) -> str:
        if (farthest := measurements.get("offset_max", 0)) <= crop:
            return ""
        return (
            f"the deformable layers look {farthest:.3g} pixels away, out of the crop of {crop}; a lower optim.offset_rate or"
            " optim.learning_rate, or optim.clip_norm, keeps them near"
        )

    def widen(self, config: AECRNetConfig, *, rngs: nnx.Rngs) -> AECRNet:
        """Return a network of greater width with the same output; the new channels affect the output only after further training.

        The idea is from Net2Net (Chen et al., ICLR 2016). The new channels take input from all channels and have the initial values of
        a new network. Old channels get zero weights from new ones, so the output does not change.
        """
        if not isinstance(config, AECRNetConfig) or config.changes(dataclasses.replace(self.config, width=config.width)):
            raise ValueError(f"config (={config}) must be the model's, {self.config}, but for the width")
        if config.width < self.config.width:
            raise ValueError(f"width (={config.width}) must be at least the model's, {self.config.width}")
        wide = AECRNet(config, rngs=rngs)

        def enlarge(old: Array, new: Array) -> Array:
            if old.ndim == 4:  # [kh, kw, inputs, outputs]
                new = new.at[:, :, old.shape[2] :, : old.shape[3]].set(0)
            return new.at[tuple(slice(size) for size in old.shape)].set(old)

        nnx.update(wide, jax.tree.map(enlarge, nnx.state(self), nnx.state(wide)))
        wide.eval()
        return wide


def _call(layer: Any, x: Array) -> Array:
    return layer(x)


def _after_relu(layer: Any, x: Array) -> Array:
    return layer(nnx.relu(x))


def _join(mixup: str, layers: Any, down: Array, up: Array) -> Array:
    """Add the features of the encoder before its ReLU, `down`, to those of the decoder, `up`, and apply the layer."""
    layer, *mix = layers
    if mixup != "none":
        down = nnx.relu(down)
        up = mix[0](down, up) if mix else down + up
    return layer(up)


class CoarseLevels(nnx.Module):
    """Levels at 1/2, 1/4, ... of the input's resolution, `[N, H, W, features]` -> the same shape.

    Each level has a convolution with stride 2 and two residual blocks. The levels are joined from the coarsest on, by bilinear
    interpolation and addition.
    """

    def __init__(self, features: int, levels: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.downs = nnx.List([Conv(features, features, 3, stride=2, **types) for _ in range(levels)])
        self.blocks = nnx.List([nnx.Sequential(*[ResidualBlock(features, **types) for _ in range(2)]) for _ in range(levels)])

    def __call__(self, x: Array) -> Array:
        sizes, results = [x.shape[1:3]], []
        for down, blocks in zip(self.downs, self.blocks):
            x = blocks(nnx.relu(down(x)))
            sizes.append(x.shape[1:3])
            results.append(x)
        y = results.pop()
        for size, finer in zip(sizes[-2:0:-1], reversed(results)):
            y = enlarge_bilinear(y, 2)[:, : size[0], : size[1]] + finer
        return enlarge_bilinear(y, 2)[:, : sizes[0][0], : sizes[0][1]]

"""The interface of a network that generic code (training, evaluation, export) uses, with default implementations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from aecr_jax.settings import check_settings
from aecr_jax.validation import IN_0_TO_1, as_floating


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The settings that every network has. The config dataclass of each network extends this one.

    Raises:
      ValueError: a field has a value of the wrong type or outside its range.
    """

    NAME: ClassVar[str]
    """The name by which configs and the command line select the network."""
    HOW_COMPUTED: ClassVar[frozenset[str]] = frozenset({"dtype"})
    """Settings that change how the network is computed but not the network itself; a run may be resumed with other values of them."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the arithmetic; bfloat16 is meant for accelerators."""
    param_dtype: Literal["float32", "float64"] = "float32"
    """Type of the parameters. float64 requires `JAX_ENABLE_X64=1`."""

    def __post_init__(self) -> None:
        check_settings(self)

    def check_devices(self, platform: str, count: int) -> None:
        """Raise a UserError if training with these settings is not possible on `count` devices of `platform`: "cpu", "gpu" or "tpu"."""

    def changes(self, other: NetworkConfig) -> list[tuple[str, Any, Any]]:
        """Return the settings that make `other` a different network, as (name, value here, value in `other`)."""
        if type(self) is not type(other):
            return [("model.name", self.NAME, other.NAME)]
        pairs = ((name, value, vars(other)[name]) for name, value in vars(self).items() if name not in self.HOW_COMPUTED)
        return [(f"model.{name}", here, there) for name, here, there in pairs if here != there]


def layer_options(config: NetworkConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Return the arguments that every layer of a network takes: `dtype` and `param_dtype` of its settings, and `rngs`."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs}


def as_images(value: ArrayLike, name: str = "hazy") -> Array:
    """Convert the argument `name` of a network to an array, and reject what no network accepts.

    Raises:
      ValueError: it is not floating point, such as 8-bit images, or does not have the shape `[N, H, W, 3]` with H and W at least 1.
    """
    images = as_floating(value, name, IN_0_TO_1)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"{name} has shape {images.shape} and must be [N, H, W, 3], H and W at least 1")
    return images


class SymbolicSizes(NamedTuple):
    """What height and width must satisfy where they are symbols, as in an exported program, which cannot round them or compare them."""

    multiple: int
    """Both must be multiples of this number, because the caller pads, and halves within the network must be whole."""
    least: int = 32
    """Both must be at least this. Padding by reflection must be smaller than the image at every resolution inside the network."""
    pixels: int | None = None
    """The largest number of pixels, if there is a limit."""


class Network(nnx.Module):
    """Restores hazy images: `[N, H, W, 3]` in [0, 1] -> the same shape, approximately in [0, 1], not clipped, for any H and W.

    A subclass sets `Config`, and its constructor takes `(config, *, rngs)`. Normalisation and padding are part of the network; see
    `as_images` and `pad`. `model.train()` and `model.eval()` work as in nnx. Everything below is optional.

    Args:
      config: the network's settings.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type.
    """

    Config: ClassVar[type[NetworkConfig]]
    MULTIPLE: ClassVar[int] = 1
    """The network pads height and width to multiples of this number."""
    NEEDS_TILES: ClassVar[bool] = True
    """Whether large images are restored in tiles, because a whole one would need too much memory."""
    FINDS_AIRLIGHT: ClassVar[bool] = False
    """Whether the network takes the airlight from a few pixels of the whole image; see `airlight_clues`."""
    config: Any
    name: str = ""
    """The name of a loaded model: the name under which it was published, or that of its run's folder."""
    step: int | None = None
    """The training step of a loaded model, if it is known."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        if not isinstance(config, self.Config):
            raise ValueError(f"config (={config!r}) must be of type {self.Config.__name__}")
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs (={rngs!r}) must be an nnx.Rngs, such as nnx.Rngs(0)")
        self.config = config

    @classmethod
    def estimates_haze(cls, config: NetworkConfig) -> bool:
        """Return whether a network with these settings has `estimate_haze`."""
        return False

    @classmethod
    def haze_cell(cls, height: int, width: int) -> int:
        """Return the side in pixels of the squares that the values of `estimate_haze` stand for, in images of this size."""
        return 1

    def estimate_haze(self, hazy: ArrayLike) -> tuple[Array, Array]:
        """Return the gain K and the offset B, for which the restored images are `hazy + K hazy - B`.

        In the scattering model, K is 1 / t - 1 and B is K A. The maps are `[N, h, w, 1]` and `[N, h, w, 3]`, at full resolution or coarser;
        coarse maps are those of the padded image.

        Raises:
          ValueError: the network restores images in another way.
        """
        raise ValueError(f"{type(self).__name__} with these settings does not estimate the haze")

    def remove_haze(self, hazy: ArrayLike, gain: Array, offset: Array) -> Array:
        """Return `hazy + K hazy - B` for maps as `estimate_haze` returns them; coarse maps are enlarged before they are applied."""
        hazy = as_images(hazy)
        return (hazy + gain * hazy - offset).astype(hazy.dtype)

    def restore_with_haze(self, hazy: ArrayLike) -> tuple[Array, Array, Array]:
        """Return the restored images, and the gain and the offset of `estimate_haze`.

        Raises:
          ValueError: the network restores images in another way.
        """
        gain, offset = self.estimate_haze(hazy)
        return self.remove_haze(hazy, gain, offset), gain, offset

    def airlight_clues(self, hazy: ArrayLike) -> Array:
        """Return maps `[N, H, W, 1]` from which `airlight` finds the airlight.

        A pixel's value depends on its surroundings only, so the map of a large image can be put together from those of its tiles.

        Raises:
          ValueError: the network does not estimate it.
        """
        raise ValueError(f"{type(self).__name__} does not estimate the airlight")

    def airlight(self, hazy: ArrayLike, clues: Array) -> Array:
        """Return the colour of the airlight of each image, `[N, 3]`, found by the maps of `airlight_clues`.

        Raises:
          ValueError: the network does not estimate it.
        """
        raise ValueError(f"{type(self).__name__} does not estimate the airlight")

    def canvas_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the height and width of the canvas on which `restore_on_canvas` restores an image of this size.

        Images of many sizes share a canvas, and so a compiled program. None means that each size needs a program of its own.
        """
        return None

    def restore_on_canvas(self, canvas: ArrayLike, height: ArrayLike, width: ArrayLike) -> Array:
        """Restore images at the top left of a canvas; there, the result is the same as without a canvas, up to rounding.

        Args:
          canvas: `[N, H, W, 3]`, with finite values of any kind outside the images. H and W are those of `canvas_size`.
          height: height of the images, a number or an array without axes.
          width: width of the images, as `height`.

        Raises:
          ValueError: the network has no canvas.
        """
        raise ValueError(f"{type(self).__name__} restores images of each size by a program of its own")

    def pad(self, images: Array, multiple: int = 0) -> Array:
        """Pad images `[N, H, W, C]` by reflection at the bottom and the right, so that H and W are multiples of `multiple` (`MULTIPLE`)."""
        h, w = images.shape[1:3]
        multiple = multiple or self.MULTIPLE
        return jnp.pad(images, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="reflect")

    def symbolic_sizes(self) -> SymbolicSizes:
        """Return what the sizes of images must satisfy in an exported program."""
        return SymbolicSizes(self.MULTIPLE)

    @classmethod
    def predicts_offsets(cls, name: str) -> bool:
        """Return whether the parameter `name` predicts offsets of a deformable layer; `optim.offset_rate` slows down its training."""
        return False

    def freeze_statistics(self) -> bool:
        """Use the running statistics without updating them, as in evaluation, and return whether the network has any."""
        return False

    def diagnostics(self, intermediates: Any) -> dict[str, Array]:
        """Return measurements of a training step for the log, as a mapping from names to scalars.

        Args:
          intermediates: values that the network's layers have stored as `nnx.Intermediate` (by `sow`) in this step.
        """
        return {}

    @classmethod
    def explain(cls, measurements: Mapping[str, float], crop: int) -> str:
        """Return a warning about the logged measurements of a step on crops of side `crop`, or an empty string."""
        return ""

    def widen(self, config: Any, *, rngs: nnx.Rngs) -> Network:
        """Return a network with the larger `config` and the same output, in evaluation mode.

        Raises:
          ValueError: this kind of network cannot be widened at all, or not to `config`.
        """
        raise ValueError(f"{type(self).__name__} cannot be widened")

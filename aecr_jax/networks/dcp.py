"""The dark channel prior, a method without learned parameters."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from aecr_jax.networks.network import Network, NetworkConfig, SymbolicSizes, as_images
from aecr_jax.networks.tiles import given_airlight
from aecr_jax.ops.guided_filter import guided_filter
from aecr_jax.ops.windows import window_min
from aecr_jax.settings import bounded

# The airlight is taken from one pixel in this many, those with the largest dark channel.
PIXELS_PER_CANDIDATE = 1000
# Smallest airlight that an image is divided by, so that a black image stays as it is.
LEAST_AIRLIGHT = 1e-6


@dataclass(frozen=True, kw_only=True)
class DCPConfig(NetworkConfig):
    """The settings of the dark channel prior.

    Raises:
      ValueError: a field has the wrong type or a value outside its range, or `patch` is even.
    """

    NAME = "dcp"

    patch: int = bounded(15, 1)
    """Side of the window of the dark channel in pixels, an odd number."""
    omega: float = bounded(0.95, 0, 1)
    """Share of the haze that is removed; a little is kept so that distant objects look natural."""
    least_transmission: float = bounded(0.1, 1e-6, 1)
    """The haze is removed as if the transmission were at least this, because it amplifies noise where there is almost no signal."""
    radius: int = bounded(60, 1)
    """Radius of the guided filter in pixels."""
    epsilon: float = bounded(1e-4, 1e-12)
    """Variance of the grey image below which the guided filter smooths."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch % 2 == 0:
            raise ValueError(f"patch (={self.patch}) must be odd")


class DCP(Network):
    """Restores hazy images by the dark channel prior (He, Sun and Tang, "Single Image Haze Removal Using Dark Channel Prior").

    In most windows of a haze-free image, one channel of one pixel is almost 0, so the darkest value of a window measures its haze. The
    article is of CVPR 2009 and TPAMI 2011. The transmission is refined by the guided filter (ECCV 2010, by the same authors), as usual
    today; the article solves a matting problem instead.

    The network maps `[N, H, W, 3]` in [0, 1] to the same shape, approximately in [0, 1], not clipped. It has no parameters:
    `load_checkpoint("dcp")` returns it, and it cannot be trained. bfloat16 arithmetic is done in float32.

    Args:
      config: the settings.
      rngs: unused, as there are no initial values.

    Raises:
      ValueError: an argument has the wrong type.
    """

    Config = DCPConfig
    FINDS_AIRLIGHT = True

    def __init__(self, config: DCPConfig = DCPConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)

    def __call__(self, hazy: ArrayLike) -> Array:
        images = self._convert(hazy)
        airlight = given_airlight()
        if airlight is None:
            airlight = self.airlight(images)
        transmission = self.refine(images, self._transmission(images, airlight))
        airlight = airlight[:, None, None]
        restored = (images - airlight) / jnp.maximum(transmission, self.config.least_transmission) + airlight
        return restored.astype(as_images(hazy).dtype)

    def airlight_clues(self, hazy: ArrayLike) -> Array:
        return dark_channel(self._convert(hazy), self.config.patch)[..., None]

    def airlight(self, hazy: ArrayLike, clues: Array | None = None) -> Array:
        """Return the colour of the airlight of each image, `[N, 3]`.

        It is that of the brightest pixel among the 0.1% with the largest dark channel. Ties are decided in row-major order.

        Args:
          hazy: `[N, H, W, 3]` in [0, 1].
          clues: the dark channel, `[N, H, W, 1]`; by default it is computed.
        """
        images = self._convert(hazy)
        n, h, w, _ = images.shape
        clues = self.airlight_clues(images) if clues is None else clues
        # top_k puts the first of equal values first.
        _, candidates = lax.top_k(clues.reshape(n, h * w), max(h * w // PIXELS_PER_CANDIDATE, 1))
        colours = jnp.take_along_axis(images.reshape(n, h * w, 3), candidates[..., None], 1)  # [N, candidates, 3]
        brightest = colours.sum(-1).argmax(1)
        return jnp.take_along_axis(colours, brightest[:, None, None], 1)[:, 0]

    def transmission(self, hazy: ArrayLike) -> Array:
        """Return the transmission before its refinement, `[N, H, W, 1]`."""
        images = self._convert(hazy)
        return self._transmission(images, self.airlight(images))

    def symbolic_sizes(self) -> SymbolicSizes:
        return SymbolicSizes(self.MULTIPLE, least=max(32, self.config.radius + 1))

    def refine(self, hazy: ArrayLike, transmission: Array) -> Array:
        """Return the transmission `[N, H, W, 1]` filtered along the edges of the grey hazy image."""
        red, green, blue = jnp.moveaxis(self._convert(hazy), -1, 0)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        return guided_filter(grey, transmission[..., 0], radius=self.config.radius, epsilon=self.config.epsilon)[..., None]

    def _transmission(self, images: Array, airlight: Array) -> Array:
        relative = images / jnp.maximum(airlight, LEAST_AIRLIGHT)[:, None, None]
        return 1 - self.config.omega * dark_channel(relative, self.config.patch)[..., None]

    def _convert(self, hazy: ArrayLike) -> Array:
        return as_images(hazy).astype(jnp.promote_types(self.config.dtype, jnp.float32))


def dark_channel(images: Array, patch: int) -> Array:
    """Return the smallest value of any channel in the window of `patch` x `patch` pixels around each pixel.

    Args:
      images: `[N, H, W, 3]`.
      patch: side of the window, odd; the window is cut at the border.

    Returns:
      `[N, H, W]`.
    """
    red, green, blue = jnp.moveaxis(images, -1, 0)
    return window_min(jnp.minimum(jnp.minimum(red, green), blue), patch // 2)

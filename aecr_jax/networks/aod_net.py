"""AOD-Net (Li et al., "AOD-Net: All-in-One Dehazing Network", ICCV 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from aecr_jax.networks.layers import Conv
from aecr_jax.networks.network import Network, NetworkConfig, as_images, layer_options
from aecr_jax.ops.conv import concatenate_channels, conv_few_channels


@dataclass(frozen=True, kw_only=True)
class AODNetConfig(NetworkConfig):
    """The settings of AOD-Net, which are only those that every network has.

    Raises:
      ValueError: a field has the wrong type or a value outside its range.
    """

    NAME = "aod_net"


class AODNet(Network):
    """Restores hazy images: `[N, H, W, 3]` in [0, 1] -> the same shape, at least 0 and not clipped above 1, for any H and W.

    Five convolutions of three channels each estimate one map K from the image, with which the haze model becomes
    `restored = relu(K * hazy - K + 1)`. The layers are those of the authors' Caffe model (github.com/Boyiliee/AOD-Net,
    `test_template.prototxt`), which MayankSingal/PyTorch-Image-Dehazing repeats. Images are not normalised, and convolutions pad with
    zeros. Kernels are initialised from a normal distribution of standard deviation 0.02, as in both projects' training. The last bias
    begins at 1, so that K is about 1 and the output about the input: with the authors' initial values, K is about 0, and a channel of K
    that is negative has no gradient and stays white for ever.

    Args:
      config: the network's settings; the authors' by default.
      rngs: the source of the initial values (stream `params`).

    Raises:
      ValueError: an argument has the wrong type, or `hazy` is not floating point or not `[N, H, W, 3]`.
    """

    Config = AODNetConfig

    def __init__(self, config: AODNetConfig = AODNetConfig(), *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        types = layer_options(config, rngs)
        options: dict[str, Any] = dict(kernel_init=nnx.initializers.normal(0.02), conv_general_dilated=conv_few_channels, **types)
        self.conv1 = Conv(3, 3, 1, **options)
        self.conv2 = Conv(3, 3, 3, **options)
        self.conv3 = Conv(6, 3, 5, **options)
        self.conv4 = Conv(6, 3, 7, **options)
        self.conv5 = Conv(12, 3, 3, bias_init=nnx.initializers.ones_init(), **options)

    def __call__(self, hazy: ArrayLike) -> Array:
        hazy = as_images(hazy)
        x = hazy.astype(self.config.dtype)
        x1 = nnx.relu(self.conv1(x))
        x2 = nnx.relu(self.conv2(x1))
        x12 = concatenate_channels(x1, x2)
        x3 = nnx.relu(self.conv3(x12))
        x4 = nnx.relu(self.conv4(concatenate_channels(x2, x3)))
        k = nnx.relu(self.conv5(concatenate_channels(x12, concatenate_channels(x3, x4))))
        return nnx.relu(k * x - k + 1).astype(hazy.dtype)

"""AECR-Net ("Contrastive Learning for Compact Single Image Dehazing", Wu et al., CVPR 2021) in JAX and Flax.

Public names are imported on first use, so that `import aecr_jax` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aecr_jax.errors import UserError as UserError
    from aecr_jax.inference.dehaze import dehaze as dehaze
    from aecr_jax.inference.evaluate import evaluate as evaluate
    from aecr_jax.inference.weights import load_checkpoint as load_checkpoint
    from aecr_jax.inference.weights import save_checkpoint as save_checkpoint
    from aecr_jax.losses.contrastive import contrastive_distances as contrastive_distances
    from aecr_jax.losses.contrastive import contrastive_regularization as contrastive_regularization
    from aecr_jax.losses.vgg import VGG19Features as VGG19Features
    from aecr_jax.losses.vgg import load_vgg19 as load_vgg19
    from aecr_jax.metrics import ciede2000 as ciede2000
    from aecr_jax.metrics import psnr as psnr
    from aecr_jax.metrics import psnr_uint8 as psnr_uint8
    from aecr_jax.metrics import psnr_y as psnr_y
    from aecr_jax.metrics import ssim as ssim
    from aecr_jax.metrics import ssim_valid as ssim_valid
    from aecr_jax.networks.aecr_net import AECRNet as AECRNet
    from aecr_jax.networks.aecr_net import AECRNetConfig as AECRNetConfig
    from aecr_jax.networks.layers import DeformConv as DeformConv
    from aecr_jax.ops.deform_conv import deform_conv2d as deform_conv2d
    from aecr_jax.training.config import Config as Config
    from aecr_jax.training.trainer import train as train

# Public name -> the module that defines it.
_MODULES = {
    "AECRNet": "networks.aecr_net",
    "AECRNetConfig": "networks.aecr_net",
    "Config": "training.config",
    "DeformConv": "networks.layers",
    "UserError": "errors",
    "VGG19Features": "losses.vgg",
    "ciede2000": "metrics",
    "contrastive_distances": "losses.contrastive",
    "contrastive_regularization": "losses.contrastive",
    "deform_conv2d": "ops.deform_conv",
    "dehaze": "inference.dehaze",
    "evaluate": "inference.evaluate",
    "load_checkpoint": "inference.weights",
    "load_vgg19": "losses.vgg",
    "psnr": "metrics",
    "psnr_uint8": "metrics",
    "psnr_y": "metrics",
    "save_checkpoint": "inference.weights",
    "ssim": "metrics",
    "ssim_valid": "metrics",
    "train": "training.trainer",
}
__all__ = sorted(_MODULES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

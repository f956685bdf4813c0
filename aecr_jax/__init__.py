"""AECR-Net ("Contrastive Learning for Compact Single Image Dehazing", Wu et al., CVPR 2021) in JAX and Flax."""

from aecr_jax.checkpoint import load_checkpoint
from aecr_jax.contrastive import contrastive_distances, contrastive_regularization
from aecr_jax.deform_conv import deform_conv2d
from aecr_jax.errors import UserError
from aecr_jax.metrics import psnr, ssim
from aecr_jax.model import AECRNet, ModelConfig
from aecr_jax.vgg import VGG19Features, load_vgg19

__all__ = [
    "AECRNet",
    "ModelConfig",
    "UserError",
    "VGG19Features",
    "contrastive_distances",
    "contrastive_regularization",
    "deform_conv2d",
    "load_checkpoint",
    "load_vgg19",
    "psnr",
    "ssim",
]
__version__ = "0.1.0"

"""Strict JAX settings for all tests: 8 simulated CPU devices, and no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Fast compilation instead of fast code: the tests compile much and compute little.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)

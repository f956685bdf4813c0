"""Benchmarks, run by `python -m aecr_jax benchmark WHAT`. Every speed in the documentation was measured with them."""

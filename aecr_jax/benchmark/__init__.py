"""Measurements: `python -m aecr_jax benchmark WHAT`. Every speed in the README comes from here."""

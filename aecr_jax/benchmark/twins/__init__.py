"""The networks and the loss in PyTorch, as baselines for benchmarks; aecr_jax itself uses none of them.

Each network is one file with the name that it has in `aecr_jax/networks`. Its function `make(settings)` returns an `nn.Module` that maps
images `[N, 3, H, W]` in [0, 1] to the same shape; `settings` are those of the network's config. The tensors have the names of the authors'
checkpoints, so that a test can load the same weights and compare outputs and gradients. These modules import neither JAX nor the
rest of aecr_jax, and each other only relatively, because the benchmark's worker runs with a Python that may have PyTorch alone.
"""

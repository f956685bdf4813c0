"""Networks by name. To add a network, add a file to this folder and a line to `_NETWORKS`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aecr_jax.networks.arrays import get_arrays, replace_arrays
from aecr_jax.networks.network import Network, NetworkConfig

# Maps each name to "module:class", or to the class itself once it is imported or registered.
_NETWORKS: dict[str, str | type[Network]] = {
    "aecr_net": "aecr_jax.networks.aecr_net:AECRNet",
    "dcp": "aecr_jax.networks.dcp:DCP",
    "dehaze_net": "aecr_jax.networks.dehaze_net:DehazeNet",
    "aod_net": "aecr_jax.networks.aod_net:AODNet",
    "grid_dehaze_net": "aecr_jax.networks.grid_dehaze_net:GridDehazeNet",
    "ffa_net": "aecr_jax.networks.ffa_net:FFANet",
    "pfdn": "aecr_jax.networks.pfdn:PFDN",
    "msbdn": "aecr_jax.networks.msbdn:MSBDN",
    "kddn": "aecr_jax.networks.kddn:KDDN",
    "coarse_net": "aecr_jax.networks.coarse_net:CoarseNet",
    "kddn_teacher": "aecr_jax.networks.kddn:KDDNTeacher",
}
# The network of configs saved before configs contained a network's name.
DEFAULT = "aecr_net"


def network_names() -> list[str]:
    """Return the names of all networks."""
    return sorted(_NETWORKS)


def register_network(network: type[Network]) -> None:
    """Register a network that is defined elsewhere under `network.Config.NAME`."""
    _NETWORKS[network.Config.NAME] = network


def find_network(name: str) -> type[Network]:
    """Return the class of the network `name`.

    Raises:
      ValueError: there is no such network; the message lists similar names.
    """
    if name not in _NETWORKS:
        near = difflib.get_close_matches(str(name), _NETWORKS, 3, 0.5) or network_names()
        raise ValueError(f"model.name (={name!r}) must be one of the networks, such as {', '.join(near)}")
    entry = _NETWORKS[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = _NETWORKS[name] = getattr(importlib.import_module(module), attribute)
    return entry


def make_network(config: NetworkConfig, *, rngs: nnx.Rngs) -> Network:
    """Build the network that a config describes, with new initial values."""
    return find_network(config.NAME)(config, rngs=rngs)


def abstract_network(config: NetworkConfig) -> Network:
    """Build the network that a config describes, with shapes in place of arrays."""
    return nnx.merge(*_trace_network(find_network(config.NAME), config, jax.config.jax_enable_x64))  # type: ignore[attr-defined]


@functools.lru_cache(16)
def _trace_network(network: type[Network], config: NetworkConfig, x64: bool) -> tuple[nnx.GraphDef, nnx.State]:
    """Return an abstract network in parts, of which copies are made: tracing the initial values of hundreds of layers takes seconds."""
    return nnx.split(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0))))


def has_parameters(config: NetworkConfig) -> bool:
    """Return whether the network that a config describes has parameters; DCP, for example, has none."""
    return bool(get_arrays(abstract_network(config), nnx.Param))


def build_network(config: NetworkConfig, arrays: Mapping[str, Any]) -> Network:
    """Build the network that a config describes, in evaluation mode, with the given arrays, named as in `get_arrays`.

    Raises:
      ValueError: a name is missing or unknown, or a shape differs.
    """
    graph, state = nnx.split(abstract_network(config))
    model = nnx.merge(graph, replace_arrays(state, {name: jnp.asarray(array) for name, array in arrays.items()}))
    model.eval()
    return model


def config_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """Return a network's config, including the network's name, as it is saved in JSON."""
    return {"name": config.NAME, **dataclasses.asdict(config)}


def config_from_dict(settings: Mapping[str, Any]) -> NetworkConfig:
    """Return the config from the result of `config_to_dict`; if it contains no name, the network is AECR-Net.

    Raises:
      ValueError: the network or a setting is unknown, or a value is wrong.
    """
    values = dict(settings)
    network = find_network(values.pop("name", DEFAULT))
    known = {field.name for field in dataclasses.fields(network.Config)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"model.{unknown[0]} is no setting of {network.Config.NAME}; it has {', '.join(sorted(known))}")
    return network.Config(**values)

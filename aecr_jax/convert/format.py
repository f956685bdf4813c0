"""The description of a foreign checkpoint format: names and layouts of its tensors, and conversion in both directions.

Conversion renames and rearranges tensors; their values do not change.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from aecr_jax.convert.tensors import Tensors, to_float32
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.network import Network, NetworkConfig
from aecr_jax.networks.registry import abstract_network, build_network
from aecr_jax.validation import check_weight


class Layout(NamedTuple):
    """How an array is rearranged: from the foreign layout to ours, and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW and HWIO
CONV_TRANSPOSE = Layout(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))  # IOHW and HWIO
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # OI and IO
SCALAR = Layout(lambda x: x.reshape(()), lambda x: x.reshape(1))

Rename = Callable[[str], tuple[str, Layout]]


def rename(rules: Sequence[tuple[str, str]], *, transposed: str = "(?!)", linear: str = "(?!)", scalar: str = "(?!)") -> Rename:
    r"""Return a function that maps the name of one of our arrays to the foreign name and its layout.

    Args:
      rules: pairs of a regular expression and its replacement, as in `re.sub`. The first that matches the whole of our name without the
        last part (`kernel`, `bias` or `slope`) gives the foreign name; a name that none matches stays. Kernels and slopes end in `.weight`.
      transposed: regular expression for our names of transposed convolutions.
      linear: the same for linear layers.
      scalar: the same for numbers that are arrays of one entry in the foreign format.
    """

    def find(ours: str) -> tuple[str, Layout]:
        layer, _, leaf = ours.rpartition(".")
        theirs = next((re.sub(pattern, to, layer) for pattern, to in rules if re.fullmatch(pattern, layer)), layer)
        if leaf == "bias":
            return f"{theirs}.bias", SAME
        if leaf == "slope":
            return f"{theirs}.weight", SCALAR if re.fullmatch(scalar, layer) else SAME
        kinds = ((transposed, CONV_TRANSPOSE), (linear, LINEAR), ("", CONV))
        return f"{theirs}.weight", next(layout for pattern, layout in kinds if not pattern or re.fullmatch(pattern, layer))

    return find


def read_size(tensors: Tensors, names: Sequence[str], title: str) -> int:
    """Return the length of the first axis that most of the tensors `names` have, so that a single wrong one is later reported itself.

    Raises:
      ValueError: fewer than two of them exist, so these are not the tensors of `title`.
    """
    sizes = [len(tensors[name]) for name in names if name in tensors and tensors[name].ndim]
    if len(sizes) < 2 or not all(sizes):
        raise ValueError(f"tensor {names[0]} is missing: this is no checkpoint of {title}")
    return statistics.mode(sizes)


def count_layers(tensors: Tensors, pattern: str, title: str) -> int:
    """Return one more than the largest number in the group of a regular expression that matches the names of tensors.

    Raises:
      ValueError: no name matches, so these are not the tensors of `title`.
    """
    numbers = [int(found[1]) for name in tensors if (found := re.fullmatch(pattern, name))]
    if not numbers:
        raise ValueError(f"no tensor has a name such as {pattern}: this is no checkpoint of {title}")
    return max(numbers) + 1


@dataclass(frozen=True)
class Format:
    """A foreign checkpoint format of one network."""

    title: str
    """What messages call the format's network, such as "the official AECR-Net"."""
    signature: str
    """Regular expression for the name of a tensor that only this format has, by which a file is recognized."""
    read_config: Callable[[Tensors], NetworkConfig]
    """Returns the config of the network that tensors belong to; raises ValueError if they belong to none."""
    rename: Rename
    """Maps the name of one of our arrays to the foreign name and layout."""
    aliases: Sequence[tuple[str, str]] = ()
    """Pairs of a regular expression and its replacement, for files that have other names for the same tensors."""
    unused: str = "(?!)"
    """Regular expression for names of tensors that a file may hold and the network does not use."""
    may_be_constant: str = "(?!)"
    """Regular expression for names of tensors with several axes that may have one value throughout, as before training."""
    fixed: Callable[[Any], NetworkConfig] | None = None
    """Returns, for one of our configs, the nearest one that the format can express; by default it can express all."""

    def recognizes(self, tensors: Mapping[str, Any]) -> bool:
        """Return whether the tensors are in this format, judged by one name."""
        return any(re.fullmatch(self.signature, name) for name in self._own_names(tensors))

    def to_ours(self, tensors: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Convert foreign tensors to the arrays `names` of one of our networks."""
        entries = {ours: self.rename(ours) for ours in names}
        return {ours: layout.to_ours(tensors[theirs]) for ours, (theirs, layout) in entries.items()}

    def to_theirs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Convert the arrays of one of our networks to the foreign names and layouts; the inverse of `to_ours`."""
        entries = {ours: self.rename(ours) for ours in arrays}
        return {theirs: layout.to_theirs(arrays[ours]) for ours, (theirs, layout) in entries.items()}

    def build(self, tensors: Tensors) -> Network:
        """Check foreign tensors and return the network, in evaluation mode.

        Raises:
          ValueError: a tensor is missing, unknown, of the wrong shape, not floating point or not finite, or is a kernel with a single
            constant value.
        """
        tensors = self._own_names(tensors)
        config = self.read_config(tensors)
        shapes = {name: array.shape for name, array in get_arrays(abstract_network(config)).items()}
        checked = {}
        for theirs, shape in self.to_theirs({name: np.empty(shape, np.bool_) for name, shape in shapes.items()}).items():
            if theirs not in tensors:
                raise ValueError(f"tensor {theirs} of shape {shape.shape} is missing")
            if tensors[theirs].shape != shape.shape:
                raise ValueError(f"tensor {theirs} has shape {tensors[theirs].shape} and must have {shape.shape}")
            checked[theirs] = to_float32(tensors[theirs], theirs)
            constant = re.fullmatch(self.may_be_constant, theirs)
            check_weight(checked[theirs], theirs, kernel=checked[theirs].ndim > 1 and not constant)
        if unknown := sorted(name for name in set(tensors) - set(checked) if not re.fullmatch(self.unused, name)):
            raise ValueError(f"tensor {unknown[0]} is not one of {self.title}")
        return build_network(config, self.to_ours(checked, list(shapes)))

    def _own_names(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        renamed = {}
        for name, tensor in tensors.items():
            name = name.removeprefix("module.")  # PyTorch's DataParallel adds it
            renamed[next((re.sub(old, new, name) for old, new in self.aliases if re.fullmatch(old, name)), name)] = tensor
        return renamed

"""State dicts of the authors' MSBDN-DFF v1.1 (BookerDeWitt/MSBDN-DFF).

The released checkpoints are whole pickled models, which are refused because reading them would run code.
"""

from __future__ import annotations

import re

from aecr_jax.convert.format import Format, count_layers, read_size, rename
from aecr_jax.convert.tensors import Tensors
from aecr_jax.networks.msbdn import SCALES, MSBDNConfig

_TITLE = "the authors' MSBDN-DFF"

# The authors name scales by n = 1 (half resolution) to 4 in the encoder, and by 4 to 1 (full resolution) in the decoder.
_RULES = [
    (r"conv_in", "conv_input.conv2d"),
    (r"conv_out", "conv_output.conv2d"),
    (r"encoder\.(\d+)\.blocks\.(\d+)\.(conv\d)", r"dense\1.\2.\3.conv2d"),
    (r"encoder\.(\d+)\.blocks\.(\d+)\.activation", r"dense\1.\2.relu"),
    (r"bottleneck\.blocks\.(\d+)\.(conv\d)", r"dehaze.res\1.\2.conv2d"),
    (r"bottleneck\.blocks\.(\d+)\.activation", r"dehaze.res\1.relu"),
]
for _n in range(SCALES):
    _RULES += [
        (rf"downs\.{_n}", f"conv{2 ** (_n + 1)}x.conv2d"),
        (rf"ups\.{_n}", f"convd{2 ** (SCALES - _n)}x.conv2d"),
        (rf"decoder\.{_n}\.blocks\.(\d+)\.(conv\d)", rf"dense_{SCALES - _n}.\1.\2.conv2d"),
        (rf"decoder\.{_n}\.blocks\.(\d+)\.activation", rf"dense_{SCALES - _n}.\1.relu"),
    ]
    for _ours, _theirs in ((f"encoder_fusions.{_n}", f"fusion{_n + 1}"), (f"decoder_fusions.{_n}", f"fusion_{SCALES - _n}")):
        _RULES += [
            (rf"{re.escape(_ours)}\.ups\.(\d+)\.conv", rf"{_theirs}.up_convs.\1.deconv"),
            (rf"{re.escape(_ours)}\.downs\.(\d+)\.conv", rf"{_theirs}.down_convs.\1.conv"),
            (rf"{re.escape(_ours)}\.(up|down)s\.(\d+)\.activation", rf"{_theirs}.\1_convs.\2.act"),
        ]


def _read_config(tensors: Tensors) -> MSBDNConfig:
    width = read_size(tensors, ("conv_input.conv2d.weight", "conv_input.conv2d.bias", "convd2x.conv2d.bias"), _TITLE)
    return MSBDNConfig(width=width, blocks=count_layers(tensors, r"dehaze\.res(\d+)\.conv[12]\..*", _TITLE))


FORMAT = Format(
    title=_TITLE,
    signature=r"fusion_4\.down_convs\.0\.conv\.weight",
    read_config=_read_config,
    rename=rename(_RULES, transposed=r"ups\.\d+|.*_fusions\.\d+\.ups\.\d+\.conv", scalar=r".*"),
)

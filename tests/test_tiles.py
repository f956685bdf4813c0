"""Large images in tiles: the result is that of restoring the whole image at once.

The expected values are the results for the whole image. `test_large_pictures` prints the table of docs/dehazing.md.
"""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_authors import CASES, GOLDEN, reference_model
from test_networks import SMALL

from aecr_jax import load_checkpoint
from aecr_jax.data.scenes import render_scene
from aecr_jax.inference.restore import OVERLAP, USUAL_TILE, Restorer, Side, blend_tiles, restore_tiled
from aecr_jax.networks import registry
from aecr_jax.networks.arrays import get_arrays, replace_arrays
from aecr_jax.networks.tiles import Tile, looking_at, picture_mean

# Layers that compute channel attention from means.
ATTENTION = ("channel_down", "channel_up", "channel1", "channel2", "dehazing", "group_attention")
# Small windows, because the overlap is small, and several layers that take means, each of which depends on the ones before it.
SETTINGS: dict[str, dict] = {
    "dcp": {"patch": 7, "radius": 10},
    "dehaze_net": {"radius": 10},
    "aecr_net": {"blocks": 3},
    "pfdn": {"blocks": 2},
}
TAKE_MEANS = ("aecr_net", "ffa_net", "kddn", "pfdn")


def decibels(a, b):
    return -10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2))


def without_knowledge(restorer, hazy, tile, overlap):
    """Restore an image in tiles that do not know the whole."""
    return blend_tiles(lambda i, j, pixels: restorer(pixels), hazy, *restorer.cut(*hazy.shape[:2], tile, overlap), overlap)


@pytest.mark.parametrize("multiple", [1, 4, 16, 256])
def test_tiles_cover_a_side(multiple):
    """Tiles overlap enough, are not too long, and begin where a network that halves the resolution sees the same pixels together."""
    for size in range(1, 900, 7):
        for tile, overlap in ((64, 24), (256, 128), (100, 7)):
            side = Side.cut(size, tile, overlap, multiple)
            unit = np.gcd(multiple, overlap // 2)
            assert side.starts[0] == 0 and side.starts[-1] + side.length == size and side.length <= tile
            assert all(start % unit == 0 for start in side.starts)
            assert all(before + side.length - start >= overlap for before, start in zip(side.starts, side.starts[1:]))


def test_own_parts_have_each_pixel_once():
    for size in (200, 201, 203):
        side, padded = Side.cut(size, 64, 24, 4), -(-size // 4) * 4
        count = np.zeros(padded)
        for start, whole, first, end in side.places(4, padded):
            assert whole == padded and 0 <= first < end <= -(-side.length // 4) * 4 and first % 4 == 0
            count[start + first : start + end] += 1
        np.testing.assert_array_equal(count, 1)


def test_tiling_blends_to_one():
    """With the identity in place of the model, overlapping tiles give the image back."""
    image = np.random.default_rng(0).random((70, 101, 3), np.float32)
    rows, columns = Side.cut(70, 32, 8), Side.cut(101, 32, 8)
    np.testing.assert_allclose(blend_tiles(lambda i, j, pixels: pixels, image, rows, columns, 8), image, atol=1e-6)


def test_means_of_a_tile():
    """The expected values are NumPy's means over the own part of features at half the resolution; given means replace them."""
    x = np.random.default_rng(1).random((1, 6, 8, 2)).astype(np.float32)
    place = jnp.array([[4, 40, 2, 8], [0, 16, 0, 10]], jnp.int32)
    with looking_at(Tile((12, 16), place, [])) as tile:
        found = picture_mean(jnp.asarray(x))
    np.testing.assert_allclose(found, x[:, 1:4, :5].mean((1, 2), keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(tile.measured[0], found)
    given = [jnp.full((1, 1, 1, 2), 0.3), jnp.full((1, 1, 1, 2), 0.6)]
    with looking_at(Tile((12, 16), place, given)) as tile:
        first, second = picture_mean(jnp.asarray(x)), picture_mean(2 * jnp.asarray(x))
    np.testing.assert_array_equal([first, second], given)
    np.testing.assert_allclose(tile.measured[1], 2 * found, rtol=1e-6)
    np.testing.assert_allclose(picture_mean(jnp.asarray(x)), x.mean((1, 2), keepdims=True), rtol=1e-6)


def make_restorer(name):
    """Return a small network of which the attention depends more on its input than with initial values."""
    settings = SMALL.get(name, {}) | SETTINGS.get(name, {})
    model = registry.make_network(registry.find_network(name).Config(**settings), rngs=nnx.Rngs(0))
    arrays = get_arrays(model)
    stronger = {key: 8 * array for key, array in arrays.items() if any(part in ATTENTION for part in key.split("."))}
    graph, state = nnx.split(model)
    return Restorer(nnx.merge(graph, replace_arrays(state, {**arrays, **stronger})))


def picture(height, width):
    """An image whose parts have different means, with sides that are no multiples of 16."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ripple = 0.2 * np.sin((x * y) / 300)[..., None]
    return (0.5 * np.stack([y / height, x / width, 1 - x / width], -1) + 0.25 + ripple).clip(0, 1).astype(np.float32)


NAMES = [
    name if name == "aecr_net" else pytest.param(name, marks=pytest.mark.slow)
    for name in registry.network_names()
    if registry.find_network(name).NEEDS_TILES
]


@pytest.mark.parametrize("name", NAMES)
def test_tiles_give_the_result_of_the_whole(name):
    restorer, image = make_restorer(name), picture(150, 302)
    whole, tiled = restorer(image), restore_tiled(restorer, image, tile=128, overlap=64)
    assert tiled.shape == image.shape and decibels(tiled, whole) > 50
    if name in TAKE_MEANS or restorer.finds_airlight:
        assert decibels(without_knowledge(restorer, image, 128, 64), whole) < decibels(tiled, whole) - 10


def load(name):
    """Return a network with shipped weights, or with weights by the rule of `test_authors`.

    With those, DehazeNet estimates a transmission of 0 nearly everywhere, so it has its initial values, which give about 0.5.
    """
    if name in ("aecr_net_tiny", "dcp"):
        return load_checkpoint(name)
    if name == "dehaze_net":
        return registry.make_network(registry.find_network(name).Config(), rngs=nnx.Rngs(0))
    return reference_model(name, np.load(GOLDEN / f"{name}.npz"), "float32")


@pytest.mark.slow
@pytest.mark.skipif("LARGE_PICTURES" not in os.environ, reason="takes hours: set LARGE_PICTURES=1")
@pytest.mark.parametrize("name", ["aecr_net_tiny", *CASES, "dcp"])
def test_large_pictures(name, capsys):
    """Prints the rows of the table: decibels and the process's peak of resident memory for a drawn scene of 2048x1536."""
    clear, depth = render_scene(3, 384, 512)
    clear, depth = (np.asarray(Image.fromarray(np.uint8(255 * x / x.max())).resize((2048, 1536)), np.float32) / 255 for x in (clear, depth))
    hazy = 0.85 + np.exp(-1.5 * depth[..., None]) * (clear - 0.85)
    restorer = Restorer(load(name))
    whole, memory = with_peak(lambda: restorer(hazy))
    row = [f"`{name}`", f"{memory:.2f}"]
    for tile in (USUAL_TILE, 512):
        tiled, memory = with_peak(lambda tile=tile: restore_tiled(restorer, hazy, tile, OVERLAP))
        alone = without_knowledge(restorer, hazy, tile, OVERLAP)
        row += [f"{decibels(tiled, whole):.1f} ({decibels(alone, whole):.1f})", f"{memory:.2f}"]
        assert decibels(tiled, whole) > 50
    with capsys.disabled():
        print(f"\n| {' | '.join(row)} |")


def with_peak(run):
    """Return a result and the peak of the process's resident memory meanwhile, in GiB."""
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return result, int(peak.split()[1]) / 2**20

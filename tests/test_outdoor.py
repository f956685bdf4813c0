"""The depth of outdoor photographs, which is drawn at random, and their sky, which is farthest."""

import numpy as np
import pytest
from scipy import ndimage

from aecr_jax.data.outdoor import Window, draw_depth, find_sky
from aecr_jax.data.samples import OutdoorImage


def test_depth_outdoors_has_the_statistics_of_resides():
    """Expected: depth recovered from 84 pairs of SOTS outdoor: 2nd and 98th percentile 1.98 and 4.32, medians of single images 2.4 to 4.1,
    standard deviation within an image 0.64, mean 2.5 in the lowest eighth and 3.2 in the middle, 95% of the variance in an 8x8 grid."""
    sky, whole = np.zeros((85, 128), np.uint8), Window(0, 0, 321, 481)
    depth = np.stack([draw_depth(sky, (321, 481), whole, (64, 96), np.random.default_rng(i)) for i in range(200)])
    assert np.percentile(depth, [2, 98]) == pytest.approx([1.98, 4.32], abs=0.1)
    assert np.percentile(np.median(depth, (1, 2)), [2, 98]) == pytest.approx([2.4, 4.1], abs=0.2)
    assert depth.std((1, 2)).mean() == pytest.approx(0.64, abs=0.05)
    assert depth[:, -8:].mean() == pytest.approx(2.5, abs=0.15)
    assert depth[:, 28:36].mean() == pytest.approx(3.2, abs=0.15)
    blocks = depth.reshape(200, 8, 8, 8, 12).mean((2, 4))
    assert (blocks.var((1, 2)) / depth.var((1, 2))).mean() > 0.9
    assert len({value.tobytes() for value in depth}) == 200


def test_a_crop_of_the_field_is_that_part_of_the_field():
    sky = np.zeros((60, 80), np.uint8)
    sky[:20] = 255
    whole = draw_depth(sky, (120, 160), Window(0, 0, 120, 160), (120, 160), np.random.default_rng(1))
    part = draw_depth(sky, (120, 160), Window(20, 30, 40, 50), (40, 50), np.random.default_rng(1))
    np.testing.assert_allclose(part[1:-1, 1:-1], whole[21:59, 31:79], atol=1e-5)
    assert part.dtype == np.float32


def test_the_sky_is_found_and_is_farthest(landscape):
    """Expected: the sky of the drawn picture, its upper half, except for the row at the edge."""
    images = OutdoorImage(landscape / "0.png").read()
    sky = images["sky"]
    assert sky.shape == (60, 80) and sky.dtype == np.uint8
    assert (sky[:29] == 255).all() and not sky[31:].any()
    depth = draw_depth(sky, (60, 80), Window(0, 0, 60, 80), (60, 80), np.random.default_rng(0))
    assert depth[:28].min() > depth[31:].max()
    large = np.kron(images["clear"], np.ones((10, 10, 1), np.uint8))
    assert max(find_sky(large).shape) == 128
    green = np.full((40, 40, 3), [80, 200, 60], np.uint8)
    assert not find_sky(green).any()
    assert not find_sky(np.full((40, 40, 3), 30, np.uint8)).any()


def test_the_sky_behind_clouds_and_a_tower_is_one_region():
    """Expected: the drawn sky, without the tower in front of it. Only pixels next to an edge may differ."""
    picture = np.empty((90, 120, 3), np.uint8)
    picture[:60], picture[60:] = [110, 160, 230], [60, 90, 40]
    rows, columns = np.mgrid[:90, :120]
    for row, column in ((12, 30), (25, 70), (40, 100), (45, 15)):
        picture[((rows - row) / 5) ** 2 + ((columns - column) / 14) ** 2 < 1] = [250, 248, 240]
    picture[20:60, 52:64] = [50, 45, 40]
    expected = (rows < 60) & ~((rows >= 20) & (columns >= 52) & (columns < 64))
    different = (find_sky(picture) == 255) != expected
    assert different.mean() < 0.02
    assert not ndimage.binary_erosion(different, iterations=2).any()

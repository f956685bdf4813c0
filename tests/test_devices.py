"""Evaluation on several devices: each simulated device restores and measures an image of its own, and scores are those of single images."""

import jax
import numpy as np
import pytest
from flax import nnx

from aecr_jax import UserError
from aecr_jax.data.reader import EvalImage
from aecr_jax.devices import ImageProgram, Shared
from aecr_jax.inference.evaluate import score_images
from aecr_jax.inference.restore import Restorer
from aecr_jax.inference.scores import Measure
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.coarse_net import CoarseNet, CoarseNetConfig

NETWORKS = {
    "aecr_net": lambda: AECRNet(AECRNetConfig(width=2, blocks=1), rngs=nnx.Rngs(0)),  # pads to a multiple, whitens by running statistics
    "coarse_net": lambda: CoarseNet(CoarseNetConfig(width=4, blocks=1), rngs=nnx.Rngs(0)),  # restores on a canvas
}


def images(*sizes):
    """Return an evaluation image for each size, named by its index."""
    rng = np.random.default_rng(0)
    return [EvalImage(str(i), *rng.random((2, *size, 3), np.float32)) for i, size in enumerate(sizes)]


def test_each_device_has_one_image():
    """Expected by hand: 10 times the image plus the number of its device, and nothing for the places that three images leave."""
    program = ImageProgram(lambda shared, image, add: shared * image + add + jax.lax.axis_index("data"))
    for count in (8, 3):
        stack = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
        result = program(Shared(np.float32(10)), stack, [np.float32(0.5)] * count)
        np.testing.assert_array_equal(result, 10 * stack + 0.5 + np.arange(count)[:, None])
    with pytest.raises(ValueError, match="there are 9 images, but only 8 devices"):
        program(Shared(np.float32(10)), np.zeros((9, 2), np.float32), np.zeros(9, np.float32))


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_do_not_depend_on_the_number_of_devices(name, monkeypatch):
    """Eleven images of one odd size (8 and 3 at once), one of another size, and two more; the expected values are those of one device."""
    pairs = images(*[(13, 21)] * 11, (16, 12), *[(13, 21)] * 2)
    restorer, sizes = Restorer(NETWORKS[name]()), []
    together = restorer.restore_each
    monkeypatch.setattr(restorer, "restore_each", lambda hazy: sizes.append(len(hazy)) or together(hazy))
    ours = list(score_images(restorer, iter(pairs)))
    assert sizes == [8, 3, 1, 2]
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    expected = list(score_images(restorer, iter(pairs)))
    assert sizes[4:] == [1] * 14
    for pair, (score, image, restored), (alone, _, restored_alone) in zip(pairs, ours, expected, strict=True):
        assert score.image == image.name == pair.name
        np.testing.assert_allclose(restored, restored_alone, atol=2e-6)
        assert score.values() == pytest.approx(alone.values(), abs=1e-4)
    assert len({round(score.restored["psnr"], 5) for score, _, _ in ours}) == 14  # the pairs differ, so a mix-up would show
    direct = Measure()(restorer(pairs[9].hazy), pairs[9].clear)
    assert ours[9][0].restored == pytest.approx(direct, abs=1e-4)


def test_new_arrays_reach_all_devices():
    """Training evaluates with one restorer again and again: after `set_arrays`, no device has the former parameters."""
    restorer, pairs = Restorer(NETWORKS["aecr_net"]()), images(*[(8, 12)] * 2)
    before = restorer.restore_each([pair.hazy for pair in pairs])
    other = AECRNet(AECRNetConfig(width=2, blocks=1), rngs=nnx.Rngs(1))
    restorer.set_arrays(get_arrays(other))
    after = restorer.restore_each([pair.hazy for pair in pairs])
    for i, pair in enumerate(pairs):
        np.testing.assert_allclose(after[i], Restorer(other)(pair.hazy), atol=2e-6)
        assert np.abs(after[i] - before[i]).max() > 1e-3


def test_the_image_among_several_is_named():
    restorer, pairs = Restorer(NETWORKS["aecr_net"]()), images(*[(8, 12)] * 3)
    pairs[1].hazy[2, 3] = np.nan
    with pytest.raises(UserError, match=r"^1: the hazy image has values that are not finite"):
        list(score_images(restorer, pairs))
    small = [pair._replace(name=f"small {pair.name}") for pair in images(*[(8, 8)] * 2)]
    with pytest.raises(UserError, match=r"^small 0: .*11"):
        list(score_images(restorer, small, measure=Measure(["ssim_valid"])))

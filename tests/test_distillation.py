import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aecr_jax.losses.distillation import DistillationLoss
from aecr_jax.losses.vgg import FrozenWeight, VGG19Features
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.kddn import KDDN, KDDNConfig, KDDNTeacher, KDDNTeacherConfig

RNG = np.random.default_rng(0)
HAZY, CLEAR = (jnp.asarray(RNG.random((2, 16, 18, 3)), jnp.float32) for _ in range(2))
BATCH = {"clear": CLEAR, "hazy": HAZY}


@pytest.fixture(scope="module")
def student():
    return KDDN(KDDNConfig(width=3, blocks=1), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def teacher():
    return KDDNTeacher(KDDNTeacherConfig(width=3), rngs=nnx.Rngs(1))


def mean_distance(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(2, 4, 6), (1, 2, 3, 4, 5, 6)])
def test_the_sum_of_three_distances(student, teacher, groups):
    """Expected: computed with NumPy from the features of the two networks and of VGG-19."""
    vgg = VGG19Features.random(width=2)
    loss = DistillationLoss(teacher, vgg, groups=groups)
    total, measurements = loss(loss.predict(student, HAZY), BATCH)
    restored, of_student = student.restore_with_features(HAZY)
    _, of_teacher = teacher.restore_with_features(CLEAR)
    expected = {
        "l1": mean_distance(restored, CLEAR),
        "perceptual": sum(w * mean_distance(a, b) for w, a, b in zip((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), vgg(restored), vgg(CLEAR))),
        "distillation": sum(mean_distance(of_student[group - 1], of_teacher[group - 1]) for group in groups),
    }
    assert list(measurements) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(measurements[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, sum(expected.values()), rtol=1e-5)


def test_without_vgg_there_is_no_perceptual_distance(student, teacher):
    loss = DistillationLoss(teacher, None)
    total, measurements = loss(loss.predict(student, HAZY), BATCH)
    assert list(measurements) == ["l1", "distillation"]
    np.testing.assert_allclose(total, measurements["l1"] + measurements["distillation"], rtol=1e-6)


@pytest.mark.slow
def test_the_gradient_reaches_only_the_student(student, teacher):
    loss = DistillationLoss(teacher, VGG19Features.random(width=1))
    (graph, params), (loss_graph, weights) = nnx.split(student), nnx.split(loss)

    def distances(params, weights, clear):
        loss = nnx.merge(loss_graph, weights)
        total, measurements = loss(loss.predict(nnx.merge(graph, params), HAZY), {"clear": clear, "hazy": HAZY})
        return measurements["distillation"], total

    # Only the distillation, because L1 depends on the clear images.
    by_params, by_weights, by_clear = jax.jit(jax.grad(lambda *a: distances(*a)[0], (0, 1, 2)))(params, weights, CLEAR)
    gradients = get_arrays(nnx.merge(graph, by_params))
    reached = {name for name, gradient in gradients.items() if np.any(gradient)}
    assert {"first.kernel", "down2.bias", "groups.0.layers.0.conv1.kernel", "groups.5.layers.1.kernel"} <= reached
    assert not any(name.startswith(("up", "last")) for name in reached)  # they come after the features
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((by_weights, by_clear)))

    by_params = jax.jit(jax.grad(lambda *a: distances(*a)[1]))(params, weights, CLEAR)
    gradients = get_arrays(nnx.merge(graph, by_params))
    assert all(np.any(gradients[name]) for name in reached | {"up1.kernel", "up2.kernel", "last.kernel", "last.bias"})


def test_no_optimizer_finds_the_teachers_weights(teacher):
    """They are copies: neither does the loss change the teacher, nor the teacher the loss."""
    loss = DistillationLoss(teacher, VGG19Features.random(width=1))
    assert not get_arrays(loss, nnx.Param)
    frozen = {name.removeprefix("teacher."): array for name, array in get_arrays(loss, FrozenWeight).items() if name.startswith("teacher.")}
    expected = get_arrays(teacher, nnx.Param)
    assert set(frozen) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(frozen[name], array)


@pytest.mark.slow
def test_bfloat16_features_are_compared_in_float32(teacher):
    student = KDDN(KDDNConfig(width=3, blocks=1, dtype="bfloat16"), rngs=nnx.Rngs(0))
    loss = DistillationLoss(teacher, VGG19Features.random(width=1), dtype=jnp.bfloat16)
    prediction = loss.predict(student, HAZY)
    assert prediction[1][0].dtype == loss.teacher.features(CLEAR)[0].dtype == jnp.bfloat16
    total, measurements = loss(prediction, BATCH)
    exact = DistillationLoss(teacher, VGG19Features.random(width=1))(prediction, BATCH)[1]
    assert total.dtype == jnp.float32
    for name, value in measurements.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact[name], rtol=0.02, err_msg=name)


def test_refuses_what_does_not_fit(student, teacher):
    with pytest.raises(ValueError, match=r"teacher \(=KDDN\) must be a KDDNTeacher"):
        DistillationLoss(student, None)
    for groups in ((), (0,), (7,), (2, 2), (1.5,)):
        with pytest.raises(ValueError, match=r"groups \(=\(.*\)\) must be different numbers from 1 to 6"):
            DistillationLoss(teacher, None, groups=groups)
    loss = DistillationLoss(teacher, None)
    with pytest.raises(ValueError, match=r"model \(=AECRNet\) must be a KDDN"):
        loss.predict(AECRNet(AECRNetConfig(width=1, blocks=1), rngs=nnx.Rngs(0)), HAZY)
    with pytest.raises(ValueError, match=r"width \(=4\) must be the teacher's, 3"):
        loss.predict(KDDN(KDDNConfig(width=4, blocks=1), rngs=nnx.Rngs(0)), HAZY)

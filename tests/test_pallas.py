"""The Pallas kernels, emulated on the CPU ("interpret mode") and translated for GPUs and TPUs. No accelerator is needed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from test_deform_conv import CASES, case

from aecr_jax import deform_conv2d, train
from aecr_jax.data.sources import DataConfig
from aecr_jax.errors import UserError
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig
from aecr_jax.ops import pallas_gpu, pallas_tpu
from aecr_jax.ops.deform_conv import Geometry, by_taps
from aecr_jax.ops.pallas_deform_conv import by_kernels
from aecr_jax.training.config import Config, RunConfig
from aecr_jax.training.mesh import make_mesh

PLATFORMS = ("cuda", "tpu")
CALLS = {"cuda": ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi"), "tpu": ("tpu_custom_call",)}  # of several versions of JAX
PLAIN = Geometry((1, 1), (1, 1), (1, 1), 1)


def count_kernels(program, platform):
    return sum(program.count(f"@{name}(") for name in CALLS[platform])


def differentiate(function, arrays, cotangent):
    """Return the output and the gradients of a function of four arrays."""

    @jax.jit
    def both(arrays, cotangent):
        out, vjp = jax.vjp(function, *arrays)
        return out, *vjp(cotangent)

    return both(arrays, cotangent)


def inputs(n=1, h=6, w=5, c=4, o=3, dtype=jnp.float32, spread=2.0):
    rng = np.random.default_rng(0)
    x, kernel, cotangent = (rng.standard_normal(shape) for shape in ((n, h, w, c), (3, 3, c, o), (n, h, w, o)))
    offset, mask = spread * rng.standard_normal((n, h, w, 18)), rng.random((n, h, w, 9))
    x, kernel, cotangent = (jnp.asarray(array, dtype) for array in (x, kernel, cotangent))
    return (x, jnp.asarray(offset, jnp.float32), jnp.asarray(mask, jnp.float32), kernel), cotangent


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "groups2" else pytest.mark.slow) for name in CASES])
def test_kernels_equal_torchvision(name, platform):
    """The output and all gradients equal those of torchvision's deform_conv2d in float64 (tests/golden), as in test_deform_conv."""
    arrays, options, expected, cotangent, expected_grads = case(name, np.float32)
    pairs = [(options[key],) * 2 for key in ("strides", "padding", "dilation")]
    geometry = Geometry(*pairs, options["offset_groups"])
    mask = arrays.get("mask", np.ones((*arrays["offset"].shape[:3], arrays["offset"].shape[3] // 2), np.float32))
    four = (arrays["x"], arrays["offset"], mask, arrays["kernel"])
    out, *grads = differentiate(lambda *a: by_kernels(*a, geometry, platform), four, cotangent)
    np.testing.assert_allclose(out + arrays["bias"][None, None, None], expected, rtol=0, atol=1e-4 * abs(expected).max())
    for key, grad in zip(("x", "offset", "mask", "kernel"), grads):
        if key in expected_grads:
            scale = abs(expected_grads[key]).max()
            np.testing.assert_allclose(grad, expected_grads[key], rtol=0, atol=1e-4 * scale, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_with_several_blocks(dtype, platform):
    """The sizes need several blocks of positions, channels and outputs, none of them whole; expected: the form of XLA."""
    arrays, cotangent = inputs(n=2, h=11, w=13, c=140, o=270, dtype=dtype)
    got = differentiate(lambda *a: by_kernels(*a, PLAIN, platform), arrays, cotangent)
    expected = differentiate(lambda *a: by_taps(*a, PLAIN), arrays, cotangent)
    for ours, theirs in zip(got, expected):
        assert ours.dtype == theirs.dtype
        difference = np.linalg.norm(np.float32(ours) - np.float32(theirs)) / np.linalg.norm(np.float32(theirs))
        assert difference < (1e-5 if dtype == jnp.float32 else 5e-3)  # bfloat16 has 8 bits


@pytest.mark.parametrize("platform", ["cuda", pytest.param("tpu", marks=pytest.mark.slow)])
def test_infinite_and_nan_offsets(platform):
    """An infinite offset samples zero with finite gradients; a NaN offset gives NaN in its own pixel alone."""
    (x, offset, mask, kernel), cotangent = inputs()
    far = offset.at[0, 0, 0].set(np.inf).at[0, 1, 1].set(-1e9)

    @jax.jit
    def both(*arrays):
        out, vjp = jax.vjp(lambda *a: by_kernels(*a, PLAIN, platform), *arrays)
        return out, *vjp(cotangent)

    clean, *grads = both(x, far, mask, kernel)
    assert not clean[0, 0, 0].any() and not clean[0, 1, 1].any() and clean[0, 2, 2].all()
    assert all(np.isfinite(grad).all() for grad in grads)
    damaged = np.array(both(x, far.at[0, 2, 3, 4].set(np.nan), mask, kernel)[0])
    assert np.isnan(damaged[0, 2, 3]).all()
    damaged[0, 2, 3] = clean[0, 2, 3]
    np.testing.assert_array_equal(damaged, clean)


def test_other_platforms_use_the_form_of_xla():
    """On a CPU, `implementation="pallas"` gives the very same numbers; so does an empty batch."""
    (x, offset, mask, kernel), cotangent = inputs(n=2)
    for images in (2, 0):
        arrays = (x[:images], offset[:images], mask[:images], kernel)
        results = [
            differentiate(lambda x, o, m, k: deform_conv2d(x, o, k, mask=m, padding=1, implementation=name), arrays, cotangent[:images])  # noqa: B023
            for name in ("xla", "pallas")
        ]
        for ours, theirs in zip(*results):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match=r"implementation \(='cuda'\) must be 'xla' or 'pallas'"):
        deform_conv2d(x, offset, kernel, padding=1, implementation="cuda")


def shapes(n, size, c, o, dtype=jnp.bfloat16):
    features = jax.ShapeDtypeStruct((n, size, size, c), dtype)
    offset, mask = (jax.ShapeDtypeStruct((n, size, size, count), jnp.float32) for count in (18, 9))
    return features, offset, mask, jax.ShapeDtypeStruct((3, 3, c, o), dtype)


def operator(x, offset, mask, kernel):
    out, vjp = jax.vjp(lambda *a: deform_conv2d(a[0], a[1], a[3], mask=a[2], padding=1, implementation="pallas"), x, offset, mask, kernel)
    return out, *vjp(out)


@pytest.mark.parametrize(("platform", "kernels"), [("cuda", 3), ("tpu", 2)])
@pytest.mark.parametrize(("dtype", "c", "o"), [(jnp.bfloat16, 256, 256), (jnp.float32, 70, 20)])
def test_kernels_are_lowered(platform, kernels, dtype, c, o):
    """A program that `jax.export` makes for a platform that is not there contains the kernels: one forward, and two or one backward."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CALLS["cuda"]]
    try:
        program = jax.export.export(jax.jit(operator), platforms=[platform], disabled_checks=allowed)(*shapes(16, 60, c, o, dtype))
    except RuntimeError as error:
        if "Triton compilation handler" not in str(error):
            raise
        pytest.skip("this version of JAX needs its CUDA plugin to lower kernels for GPUs")
    assert count_kernels(program.mlir_module(), platform) == kernels


@pytest.mark.parametrize("precision", ["tensorfloat32", "highest"])
def test_kernels_are_lowered_with_any_precision(precision):
    """Mosaic does not know the precision between the lowest and the highest, which stands for TF32."""
    with jax.default_matmul_precision(precision):
        text = jax.jit(operator).trace(*shapes(1, 9, 16, 16, jnp.float32)).lower(lowering_platforms=("tpu",)).as_text()
    assert count_kernels(text, "tpu") == 2


def test_images_too_large_for_a_tpu_use_the_form_of_xla():
    """The features of a crop of 240x240 fit into VMEM, and those of an image of 1024x1024 do not."""
    assert pallas_tpu.fits((16, 60, 60, 256), (3, 3, 256, 256), 1, jnp.dtype("bfloat16"))
    assert not pallas_tpu.fits((1, 256, 256, 256), (3, 3, 256, 256), 1, jnp.dtype("bfloat16"))
    assert pallas_gpu.fits((1, 256, 256, 256), (3, 3, 256, 256), 1, jnp.dtype("bfloat16"))
    text = jax.jit(operator).trace(*shapes(1, 256, 256, 256)).lower(lowering_platforms=("tpu",)).as_text()
    assert count_kernels(text, "tpu") == 0


def test_a_program_for_symbolic_sizes_runs_anywhere():
    """The sizes of kernels must be known, so that a program with symbols has the form of XLA for all platforms."""
    n, h, w = jax.export.symbolic_shape("n, h, w", constraints=["h >= 4", "w >= 4"])
    (x, offset, mask, kernel), _ = inputs()
    symbolic = [jax.ShapeDtypeStruct((n, h, w, array.shape[-1]), array.dtype) for array in (x, offset, mask)]

    def forward(x, offset, mask):
        return deform_conv2d(x, offset, kernel, mask=mask, padding=1, implementation="pallas")

    program = jax.export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"))(*symbolic)
    np.testing.assert_allclose(program.call(x, offset, mask), forward(x, offset, mask), atol=1e-5)


@pytest.mark.parametrize("platform", [pytest.param("cuda", marks=pytest.mark.slow), "tpu"])
def test_each_device_runs_the_kernels_on_its_images(platform):
    """The gradient compiled for 8 devices contains no all-gather and has the values of a single device."""
    arrays, cotangent = inputs(n=8, h=4, w=3, c=2, o=2)
    mesh = make_mesh()
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    shardings = (split, split, split, whole)

    def gradient(x, offset, mask, kernel):
        return jax.vjp(lambda *a: by_kernels(*a, PLAIN, platform), x, offset, mask, kernel)[1](cotangent)

    compiled = jax.jit(gradient, in_shardings=shardings, out_shardings=shardings).lower(*arrays).compile()
    text = compiled.as_text()
    assert "all-gather" not in text and "all-reduce" in text
    for ours, expected in zip(
        compiled(*jax.device_put(arrays, shardings)), differentiate(lambda *a: by_taps(*a, PLAIN), arrays, cotangent)[1:]
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_networks_choose_the_kernels(tmp_path):
    """The setting changes how a network is computed and no weights; on a CPU, it computes the same, and training refuses it."""
    config = AECRNetConfig(width=2, blocks=1, deform_implementation="pallas")
    kernels, plain = AECRNet(config, rngs=nnx.Rngs(0)), AECRNet(dataclasses.replace(config, deform_implementation="xla"), rngs=nnx.Rngs(0))
    assert not config.changes(plain.config)
    kernels.eval()
    plain.eval()
    hazy = jnp.asarray(np.random.default_rng(0).random((1, 16, 12, 3)), jnp.float32)
    np.testing.assert_array_equal(kernels(hazy), plain(hazy))
    graph, state = nnx.split(kernels)
    text = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).trace(state, hazy).lower(lowering_platforms=("tpu",)).as_text()
    assert count_kernels(text, "tpu") == config.deform_layers
    with pytest.raises(UserError, match=r"\(=pallas\) is for NVIDIA GPUs and for one TPU, and this run has 8 CPUs"):
        train(Config(model=config, data=DataConfig(train="scenes:4:32x24", crop=16), run=RunConfig(workdir=str(tmp_path / "run"))))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("checkpoints/*"))


def test_several_tpus_use_the_form_of_xla(monkeypatch):
    """With the 8 devices of the tests as TPUs, the program has no kernel, and training refuses the setting."""
    config = AECRNetConfig(deform_implementation="pallas")
    config.check_devices("tpu", 1)
    config.check_devices("gpu", 8)
    with pytest.raises(UserError, match="this run has 8 TPUs: use xla"):
        config.check_devices("tpu", 8)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    text = jax.jit(lambda *a: operator(*a)).trace(*shapes(8, 9, 16, 16)).lower(lowering_platforms=("tpu",)).as_text()
    assert count_kernels(text, "tpu") == 0

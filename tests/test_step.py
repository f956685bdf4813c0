import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals
from reference import load, nhwc, official_weights, our_arrays, vgg19

from aecr_jax import AECRNet, AECRNetConfig, UserError, contrastive_regularization
from aecr_jax.convert.aecr_net import FORMAT
from aecr_jax.losses.contrastive import LAYER_WEIGHTS, combine_distances, contrastive_distances
from aecr_jax.losses.restoration import RestorationLoss
from aecr_jax.losses.vgg import VGG19Features
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.layers import FastDeconv
from aecr_jax.networks.registry import build_network
from aecr_jax.training.config import Config, LossConfig, OptimConfig
from aecr_jax.training.mesh import check_batch, make_mesh, replicate, shard_batch
from aecr_jax.training.optimizer import learning_rate, make_optimizer
from aecr_jax.training.step import init_state, make_train_step, state_to_model


def loss_of(config):
    rates = {"positives": config.loss.positives, "negatives": config.loss.negatives}
    return RestorationLoss(VGG19Features.random(width=2), cr=config.loss.cr, dtype=config.model.dtype, **rates)


FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}


@pytest.mark.slow
def test_five_steps_of_the_official_code(x64):
    """Losses and gradient norms before each of five Adam steps, and the final network, equal PyTorch's in float64 (tests/golden)."""
    d = load("train_trajectory")
    optim = OptimConfig(steps=int(d["total_steps"]), batch=2, learning_rate=2e-4)
    config = Config(model=AECRNetConfig(**FLOAT64), optim=optim)
    np.testing.assert_allclose([learning_rate(optim)(i) for i in range(5)], d["lr"], rtol=1e-12)
    weights = {k: v.astype(np.float64) for k, v in our_arrays(official_weights(d["weight_seed"])).items()}
    mesh = make_mesh(jax.devices()[:1])
    state = replicate(init_state(config, build_network(config.model, weights)), mesh)
    step = make_train_step(config, RestorationLoss(vgg19(d["vgg_seed"], np.float64), cr=0.1, dtype="float64"), mesh)
    inputs = [shard_batch({k: nhwc(d[k][i]) for k in ("hazy", "clear")}, mesh) for i in range(5)]
    # Five steps of the full network take so long that optimized code is worth its compilation time.
    compiled = step.func.lower(*step.args, state, inputs[0]).compile({"xla_backend_optimization_level": "3"})
    for i in range(5):
        state, measured = compiled(*step.args, state, inputs[i])
        for name in ("l1", "cr", "total", "grad_norm"):
            np.testing.assert_allclose(measured[name], d[name][i], rtol=1e-6, err_msg=f"{name} of step {i + 1}")
    output = state_to_model(config, state)(jnp.array(nhwc(d["eval_input"])))
    np.testing.assert_allclose(output, nhwc(d["final_eval_output"]), atol=1e-8)
    official = FORMAT.to_theirs({k: np.asarray(v) for k, v in {**state.params, **state.stats}.items()})
    np.testing.assert_allclose(official["deconv.running_mean"], d["final_running_mean"], rtol=1e-8)
    np.testing.assert_allclose(official["deconv.running_deconv"], d["final_running_deconv"], atol=1e-8)
    np.testing.assert_allclose([official["mix1.w"][0], official["mix2.w"][0]], d["final_mix"], rtol=1e-8)


@pytest.mark.slow
def test_first_step_of_the_official_code_in_float32():
    """The first step agrees also in float32, the type that users compute in."""
    d = load("train_trajectory")
    config = Config(optim=OptimConfig(steps=int(d["total_steps"]), batch=2))
    mesh = make_mesh(jax.devices()[:1])
    model = build_network(config.model, our_arrays(official_weights(d["weight_seed"])))
    step = make_train_step(config, RestorationLoss(vgg19(d["vgg_seed"]), cr=0.1), mesh)
    batch = {k: nhwc(d[k][0]).astype(np.float32) for k in ("hazy", "clear")}
    _, measured = step(replicate(init_state(config, model), mesh), shard_batch(batch, mesh))
    for name in ("l1", "cr", "total", "grad_norm"):
        np.testing.assert_allclose(measured[name], d[name][0], rtol=1e-4, err_msg=name)


def run(config, devices, batches, **options):
    mesh = make_mesh(jax.devices()[:devices])
    state = replicate(init_state(config), mesh)
    step = make_train_step(config, loss_of(config), mesh, **options)
    for batch in batches:
        state, measured = step(state, shard_batch(batch, mesh))
    return jax.device_get((state, measured))


def batches(count, dtype=np.float64, n=8):
    rng = np.random.default_rng(0)
    return [{k: rng.random((n, 16, 16, 3)).astype(dtype) for k in ("hazy", "clear")} for _ in range(count)]


SMALL = AECRNetConfig(width=4, blocks=1)
SMALL64 = AECRNetConfig(width=4, blocks=1, **FLOAT64)


def near(a, b, rtol, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_one_device_and_eight_compute_the_same(x64, optimizer):
    config = Config(model=SMALL64, optim=OptimConfig(batch=8, steps=10, optimizer=optimizer))
    (one, one_measured), (eight, eight_measured) = (run(config, n, batches(2)) for n in (1, 8))
    near(one, eight, 1e-9, 1e-12)
    near(one_measured, eight_measured, 1e-9, 0)


@pytest.mark.slow
def test_one_device_and_eight_compute_the_same_in_float32():
    """Adam's first step is the rate times the sign of the gradient, so parameters are compared where the gradient is not near 0."""
    config = Config(model=SMALL, optim=OptimConfig(batch=8, steps=10))
    (one, one_measured), (eight, eight_measured) = (run(config, n, batches(1, np.float32)) for n in (1, 8))
    near(one_measured, eight_measured, 1e-5, 1e-7)
    near(one.stats, eight.stats, 1e-5, 1e-5)
    (_, adam, _), (_, other, _) = one.opt_state, eight.opt_state  # Adam's first moment is a tenth of the gradient
    largest = max(np.abs(moment).max() for moment in adam[0].mu.values())
    for name, moment in adam[0].mu.items():
        scale = max(np.abs(moment).max(), 1e-5 * largest)
        np.testing.assert_allclose(moment, other[0].mu[name], atol=1e-5 * scale, err_msg=name)
        clear = np.abs(moment) > 1e-3 * scale
        np.testing.assert_allclose(one.params[name][clear], eight.params[name][clear], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_the_step_is_the_pmap_of_a_step_per_device(x64, monkeypatch):
    """The per-device step needs collectives for FastDeconv's patches, the distances of the ratio, the gradient and L1."""
    config = Config(model=SMALL64, optim=OptimConfig(batch=8, steps=10))
    batch = batches(1)[0]
    expected, measured = run(config, 8, [batch])
    state, features, optimizer = init_state(config), VGG19Features.random(width=2), make_optimizer(config.optim, AECRNet.predicts_offsets)
    patches = FastDeconv._patches
    monkeypatch.setattr(FastDeconv, "_patches", lambda self, x: jax.lax.all_gather(patches(self, x), "device", tiled=True))

    def loss(params, hazy, clear):
        model = build_network(config.model, {**params, **state.stats})
        model.train()
        restored = model(hazy)
        l1 = jax.lax.pmean(jnp.abs(restored - clear).mean(), "device")
        distances = jax.lax.pmean(contrastive_distances(restored, clear, hazy, features), "device")
        total = l1 + config.loss.cr * combine_distances(*distances, weights=LAYER_WEIGHTS, negatives=1)
        return total, get_arrays(model, nnx.BatchStat)

    def step(hazy, clear):
        (total, stats), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, hazy, clear)
        gradients = jax.lax.pmean(gradients, "device")
        updates, _ = optimizer.update(gradients, state.opt_state, state.params)
        return total, optax.apply_updates(state.params, updates), stats

    split = {key: x.reshape(8, 1, *x.shape[1:]) for key, x in batch.items()}
    total, params, stats = jax.pmap(step, "device")(split["hazy"], split["clear"])
    np.testing.assert_allclose(total, np.full(8, measured["total"]), rtol=1e-9)
    near({name: x[0] for name, x in params.items()}, expected.params, 1e-9, 1e-12)
    near({name: x[0] for name, x in stats.items()}, expected.stats, 1e-9, 1e-12)


def compiled(config, devices=8):
    mesh = make_mesh(jax.devices()[:devices])
    step = make_train_step(config, loss_of(config), mesh)
    state = replicate(init_state(config), mesh)
    return step.func.lower(*step.args, state, shard_batch(batches(1, np.float32, config.optim.batch)[0], mesh)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_compiled_step_reduces_gradients_and_gathers_no_images(accumulate):
    config = Config(model=SMALL, optim=OptimConfig(batch=16, steps=10, accumulate=accumulate))
    text = compiled(config).as_text()
    reduced = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    # The gradient of the deformable kernel, [3, 3, 16, 16], is reduced, in any layout and possibly together with others.
    assert any(sorted(map(int, shape.split(","))) == [3, 3, 16, 16] for line in reduced for shape in re.findall(r"f32\[([\d,]+)\]", line))
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        moved = re.findall(rf"= (.*) {kind}(?:-start)?\(", text)
        sizes = [np.prod([int(n) for n in shape.split(",") if n]) for line in moved for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
        assert max(sizes, default=0) < 16 * 16 * 3, f"{kind} of an image or a feature map: {moved}"


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_batch(x64):
    """Without FastDeconv's statistics and the ratio, which are over the whole batch, the parts add up to the batch exactly."""
    model = AECRNetConfig(width=4, blocks=1, fast_deconv=False, dfe="none", **FLOAT64)
    configs = [Config(model=model, loss=LossConfig(cr=0), optim=OptimConfig(batch=8, steps=10, accumulate=n)) for n in (1, 2)]
    (whole, measured), (parts, measured_parts) = (run(config, 2, batches(2)) for config in configs)
    near(whole, parts, 1e-9, 1e-12)
    near(measured, measured_parts, 1e-9, 1e-12)


def test_moving_average_of_parameters():
    """The decays of the first two steps are min(0.9, 1/10) and min(0.9, 2/11), applied to the parameters after each step."""
    model = AECRNetConfig(width=4, blocks=1, dfe="none")
    config = Config(model=model, loss=LossConfig(cr=0), optim=OptimConfig(batch=8, steps=10, ema=0.9))
    start = jax.device_get(init_state(config).params)
    (first, _), (second, _) = (run(config, 1, batches(n, np.float32)) for n in (1, 2))
    for name, x in start.items():
        expected = 0.1 * x + 0.9 * first.params[name]
        np.testing.assert_allclose(first.ema[name], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(second.ema[name], 2 / 11 * expected + 9 / 11 * second.params[name], rtol=1e-5, atol=1e-7)
    output = state_to_model(config, second)(batches(1, np.float32)[0]["hazy"])
    averaged = build_network(config.model, {**second.ema, **second.stats})(batches(1, np.float32)[0]["hazy"])
    np.testing.assert_array_equal(output, averaged)


def test_frozen_statistics():
    """The loss is that of the network in evaluation mode, and the running averages do not change."""
    config = Config(model=SMALL, loss=LossConfig(cr=0), optim=OptimConfig(batch=8, steps=10))
    batch = batches(1, np.float32)[0]
    start = init_state(config)
    state, measured = run(config, 2, [batch], freeze_stats=True)
    near(state.stats, start.stats, 0, 0)
    restored = state_to_model(config, start)(jnp.array(batch["hazy"]))
    np.testing.assert_allclose(measured["l1"], np.abs(restored - batch["clear"]).mean(), rtol=1e-5)


def kept_for_the_gradient(config, capsys):
    """Return the bytes of the activations that JAX keeps for the backward pass."""
    graph, state = nnx.split(state_to_model(config, init_state(config)))
    capsys.readouterr()
    print_saved_residuals(lambda state, x: nnx.merge(graph, state)(x).sum(), state, jnp.zeros((2, 32, 32, 3)))
    shapes = re.findall(r"^f32\[([\d,]+)\] (?!from the argument)", capsys.readouterr().out, re.M)
    return 4 * sum(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.slow
def test_rematerialization_keeps_less_and_changes_no_number(capsys):
    """The residuals are counted, because XLA's CPU backend does not recompute and the compiled program's memory shows no difference."""
    model = AECRNetConfig(width=4, blocks=6, shared=False)
    configs = [
        Config(model=dataclasses.replace(model, remat=remat), loss=LossConfig(cr=0), optim=OptimConfig(batch=8, steps=10))
        for remat in (False, True)
    ]
    (plain, measured), (again, measured_again) = (run(config, 1, batches(1, np.float32)) for config in configs)
    near(measured, measured_again, 1e-4, 1e-6)
    near(plain.stats, again.stats, 1e-5, 1e-6)
    everything, less = (kept_for_the_gradient(config, capsys) for config in configs)
    assert less < 0.6 * everything


@pytest.mark.slow
def test_bfloat16_compute():
    """Parameters stay float32, and the losses agree with those in float32 to about the three digits of bfloat16."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = Config(model=AECRNetConfig(width=4, blocks=1, dtype=dtype), optim=OptimConfig(batch=8, steps=10))
        state, losses[dtype] = run(config, 1, batches(1, np.float32))
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    for name, tolerance in (("l1", 0.01), ("cr", 0.05), ("grad_norm", 0.3)):
        np.testing.assert_allclose(losses["bfloat16"][name], losses["float32"][name], rtol=tolerance)


@pytest.mark.slow
def test_warmup_and_factor_for_offsets():
    config = Config(model=SMALL, optim=OptimConfig(batch=8, steps=10, warmup=4, offset_rate=0.1, schedule="constant", learning_rate=1e-3))
    np.testing.assert_allclose([learning_rate(config.optim)(i) for i in range(5)], [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3], rtol=1e-6)
    before = jax.device_get(init_state(config).params)
    state, _ = run(config, 1, batches(1, np.float32))
    steps = {name: np.abs(state.params[name] - x).max() for name, x in before.items()}
    # Except for epsilon, Adam's first step has the size of the rate for any gradient.
    assert steps["deform.0.offset_mask.kernel"] == pytest.approx(0.025e-3, rel=0.05)
    assert steps["down1.kernel"] == pytest.approx(0.25e-3, rel=0.01)


@pytest.mark.slow
def test_muon_takes_orthogonal_steps():
    """A wide kernel's first step has the same length along each singular vector of the gradient (computed with NumPy), up to factors of
    0.7 to 1.2 from the iteration, and a root mean square of 0.2 rates. Other parameters take the step of Nesterov Adam, which is
    0.9 * 0.1 / 0.19 + 1 rates."""
    optim = OptimConfig(batch=8, steps=10, schedule="constant", learning_rate=1e-3)
    configs = [Config(model=SMALL, optim=dataclasses.replace(optim, optimizer=name)) for name in ("adam", "muon")]
    (adam, _), (muon, _) = (run(config, 1, batches(1, np.float32)) for config in configs)
    for name, before in jax.device_get(init_state(configs[0]).params).items():
        gradient, step = adam.opt_state[1][0].mu[name], muon.params[name] - before
        if before.ndim == 4 and min(before.shape[-1], before[..., 0].size) > 3:
            step = step.reshape(-1, before.shape[-1])
            left, lengths, right = np.linalg.svd(gradient.reshape(step.shape), full_matrices=False)
            clear = lengths > 0.02 * lengths.max()
            along = -np.diag(left.T @ step @ right.T)[clear] / np.sqrt(max(step.shape)) / 0.2e-3
            assert (along > 0.6).all() and (along < 1.3).all(), (name, along)
        else:
            clear = np.abs(gradient) > 1e-6  # smaller values are dominated by Adam's epsilon and rounding
            np.testing.assert_allclose(-step[clear], 1.4737e-3 * np.sign(gradient[clear]), rtol=0.02, err_msg=name)


def test_training_lowers_the_loss_without_regularization():
    config = Config(
        model=AECRNetConfig(width=4, blocks=1), loss=LossConfig(cr=0), optim=OptimConfig(batch=8, learning_rate=3e-3, schedule="constant")
    )
    batch = batches(1, np.float32)[0] | {"clear": np.full((8, 16, 16, 3), 0.5, np.float32)}
    _, first = run(config, 1, [batch])
    _, last = run(config, 1, [batch] * 30)
    assert last["l1"] < 0.5 * first["l1"] and "cr" not in last
    assert {"grad_norm", "update_norm", "param_norm", "offset_max", "offset_mean", "mix1", "mix2", "learning_rate"} <= set(last)


@pytest.mark.slow
@pytest.mark.parametrize("rates", [{"positives": 3, "negatives": 2}, {"negatives": 0}])
def test_the_step_uses_the_rates(rates):
    """With the rates of Table 4 and with CR*, the step measures the regularization of the network's output in training mode."""
    config = Config(model=AECRNetConfig(width=4, blocks=1, dfe="none"), loss=LossConfig(**rates), optim=OptimConfig(batch=8, steps=10))
    batch = batches(1, np.float32)[0]
    batch = {k: v * np.linspace(0.1, 1, 8, dtype=np.float32).reshape(8, 1, 1, 1) for k, v in batch.items()}
    model = state_to_model(config, init_state(config))
    model.train()
    expected = contrastive_regularization(model(batch["hazy"]), batch["clear"], batch["hazy"], VGG19Features.random(width=2), **rates)
    np.testing.assert_allclose(run(config, 1, [batch])[1]["cr"], expected, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_lagging_negatives_are_restored_by_the_average(accumulate):
    """The second step's regularization, with the average after the first step, in the mode of training, as negatives."""
    model = AECRNetConfig(width=4, blocks=1, fast_deconv=False, dfe="none")
    loss = LossConfig(cr=0.1, cr_negatives="lagging", cr_form="difference")
    config = Config(model=model, loss=loss, optim=OptimConfig(batch=8, steps=10, ema=0.9, learning_rate=0.1, accumulate=accumulate))
    features, mesh, batch = VGG19Features.random(width=2), make_mesh(jax.devices()[:2]), batches(1, np.float32)[0]
    step = make_train_step(config, RestorationLoss(features, cr=0.1, negative_images=loss.cr_negatives, form=loss.cr_form), mesh)
    first, _ = step(replicate(init_state(config), mesh), shard_batch(batch, mesh))
    now, average = (build_network(config.model, jax.device_get(arrays)) for arrays in (first.params, first.ema))
    restored, lagging = (np.asarray(model(jnp.array(batch["hazy"]))) for model in (now, average))
    _, measured = step(first, shard_batch(batch, mesh))
    expected = contrastive_regularization(restored, batch["clear"], lagging, features, form="difference")
    assert np.abs(restored - lagging).max() > 1e-3
    np.testing.assert_allclose(measured["cr"], expected, rtol=1e-4)


def test_refuses_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"optim.batch \(=12\) must be divisible by 8 \(8 devices\), such as 8 or 16"):
        check_batch(12, 1, make_mesh())


def test_refuses_missing_features():
    with pytest.raises(ValueError, match="features is None and must be a VGG19Features"):
        RestorationLoss(None, cr=0.1)

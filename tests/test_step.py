import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import load, nhwc, official_weights, vgg19

from aecr_jax import ModelConfig, UserError, contrastive_regularization
from aecr_jax.config import Config, LossConfig, TrainConfig
from aecr_jax.model import build_model
from aecr_jax.official import official_arrays, our_arrays
from aecr_jax.step import check_batch, init_state, learning_rate, make_mesh, make_train_step, replicate, shard_batch, state_to_model
from aecr_jax.vgg import random_vgg19

FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}


def test_five_steps_of_the_official_code(x64):
    """Losses and gradient norms before each of five Adam steps in float64, and the result, from PyTorch (tests/golden)."""
    d = load("train_trajectory")
    train = TrainConfig(steps=int(d["total_steps"]), batch=2, learning_rate=2e-4)
    config = Config(model=ModelConfig(**FLOAT64), train=train)
    np.testing.assert_allclose([learning_rate(config)(i) for i in range(5)], d["lr"], rtol=1e-12)
    weights = {k: v.astype(np.float64) for k, v in our_arrays(official_weights(d["weight_seed"])).items()}
    mesh = make_mesh(jax.devices()[:1])
    state = replicate(init_state(config, build_model(config.model, weights)), mesh)
    step = make_train_step(config, vgg19(d["vgg_seed"], np.float64), mesh)
    for i in range(5):
        state, measured = step(state, shard_batch({k: nhwc(d[k][i]) for k in ("hazy", "clear")}, mesh))
        for name in ("l1", "cr", "total", "grad_norm"):
            np.testing.assert_allclose(measured[name], d[name][i], rtol=1e-6, err_msg=f"{name} of step {i + 1}")
    output = state_to_model(config, state)(jnp.array(nhwc(d["eval_input"])))
    np.testing.assert_allclose(output, nhwc(d["final_eval_output"]), atol=1e-8)
    official = official_arrays({k: np.asarray(v) for k, v in {**state.params, **state.stats}.items()})
    np.testing.assert_allclose(official["deconv.running_mean"], d["final_running_mean"], rtol=1e-8)
    np.testing.assert_allclose(official["deconv.running_deconv"], d["final_running_deconv"], atol=1e-8)
    np.testing.assert_allclose([official["mix1.w"][0], official["mix2.w"][0]], d["final_mix"], rtol=1e-8)


def run(config, devices, batches):
    mesh = make_mesh(jax.devices()[:devices])
    state = replicate(init_state(config), mesh)
    step = make_train_step(config, random_vgg19(width=2) if config.loss.cr else None, mesh)
    for batch in batches:
        state, measured = step(state, shard_batch(batch, mesh))
    return jax.device_get((state, measured))


def batches(count, dtype=np.float64, n=8):
    rng = np.random.default_rng(0)
    return [{k: rng.random((n, 16, 16, 3)).astype(dtype) for k in ("hazy", "clear")} for _ in range(count)]


def test_one_device_and_eight_compute_the_same(x64):
    config = Config(model=ModelConfig(width=4, blocks=2, **FLOAT64), train=TrainConfig(batch=8, steps=10))
    (one, one_measured), (eight, eight_measured) = (run(config, n, batches(2)) for n in (1, 8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, eight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), one_measured, eight_measured)


def test_training_lowers_the_loss_without_regularization():
    config = Config(
        model=ModelConfig(width=4, blocks=1), loss=LossConfig(cr=0), train=TrainConfig(batch=8, learning_rate=3e-3, schedule="constant")
    )
    batch = batches(1, np.float32)[0] | {"clear": np.full((8, 16, 16, 3), 0.5, np.float32)}
    _, first = run(config, 1, [batch])
    _, last = run(config, 1, [batch] * 30)
    assert last["l1"] < 0.5 * first["l1"] and "cr" not in last
    assert {"grad_norm", "update_norm", "param_norm", "offset_max", "offset_mean", "mix1", "mix2", "learning_rate"} <= set(last)


@pytest.mark.parametrize("rates", [{"positives": 3, "negatives": 2}, {"negatives": 0}])
def test_the_step_uses_the_rates(rates):
    """Table 4's rates and CR*: what the step measures is the regularization of the network's output in training mode."""
    config = Config(model=ModelConfig(width=4, blocks=1, dfe="none"), loss=LossConfig(**rates), train=TrainConfig(batch=8, steps=10))
    batch = batches(1, np.float32)[0]
    batch = {k: v * np.linspace(0.1, 1, 8, dtype=np.float32).reshape(8, 1, 1, 1) for k, v in batch.items()}
    model = state_to_model(config, init_state(config))
    model.train()
    expected = contrastive_regularization(model(batch["hazy"]), batch["clear"], batch["hazy"], random_vgg19(width=2), **rates)
    np.testing.assert_allclose(run(config, 1, [batch])[1]["cr"], expected, rtol=1e-4)


def test_refuses_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"train.batch \(=12\) must divide by the 8 devices, such as 8 or 16"):
        check_batch(Config(train=TrainConfig(batch=12)), make_mesh())


def test_refuses_missing_features():
    with pytest.raises(ValueError, match="features is None and must be a VGG19Features"):
        make_train_step(Config(), None, make_mesh())

"""Checkpoints are written in the background: training goes on, and what is written is the state of its step."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from aecr_jax import Config, UserError
from aecr_jax.inference.weights import checksums, read_json
from aecr_jax.training.checkpoint import Checkpoints, Position
from aecr_jax.training.step import TrainState


def state(step):
    """Return a state whose values follow from its step."""
    values = jnp.arange(6.0) + step
    return TrainState(jnp.int32(step), {"a": values}, {"mean": values.sum()}, {"momentum": 2 * values}, {"a": -values})


def save(checkpoints, of):
    checkpoints.save(of, Config(), Position(2 * int(of.step), "data"))


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    yield checkpoints
    checkpoints.close()


def test_training_does_not_wait_for_the_write(checkpoints, monkeypatch):
    """While the write is held up, steps overwrite the state that is being saved, as a training step does with donated arrays."""
    may_write, write = threading.Event(), checkpoints._manager.save
    monkeypatch.setattr(checkpoints._manager, "save", lambda *args, **kwargs: may_write.wait(60) and write(*args, **kwargs))
    take_step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    before = state(3)
    save(checkpoints, before)
    after = take_step(take_step(before))
    jax.block_until_ready(after)
    checkpoints.check_written()
    assert int(after.step) == 5 and checkpoints.steps() == []
    may_write.set()
    checkpoints.wait()
    assert checkpoints.steps() == [3]
    folder, expected = checkpoints.folder / "3", state(3)
    model = {"params": expected.params, "stats": expected.stats, "ema": expected.ema}
    assert read_json(folder, "checksums")["model"] == checksums(model)
    with ocp.StandardCheckpointer() as checkpointer:
        jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(folder / "model", model), model)


@pytest.mark.parametrize("by", ["check_written", "save", "wait"])
def test_a_failed_write_is_raised_once_by_the_next_call(checkpoints, monkeypatch, by):
    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", fill)
        save(checkpoints, state(1))
        checkpoints._thread.submit(int).result()  # the thread has finished what came before
    calls = {"check_written": checkpoints.check_written, "wait": checkpoints.wait, "save": lambda: save(checkpoints, state(2))}
    with pytest.raises(UserError, match=rf"^no checkpoint can be written to {checkpoints.folder}: .*No space left on device"):
        calls[by]()
    save(checkpoints, state(3))
    checkpoints.wait()
    assert checkpoints.steps() == [3]


def test_a_run_that_has_lost_its_folder_writes_nothing(tmp_path):
    """The lock is checked when the write begins, because the previous write may have taken long."""

    def check():
        raise UserError("taken over")

    checkpoints = Checkpoints(tmp_path, check)
    save(checkpoints, state(1))
    with pytest.raises(UserError, match=r"^taken over$"):
        checkpoints.close()
    assert Checkpoints(tmp_path).steps() == []

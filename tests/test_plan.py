import dataclasses
import json
import shlex
from dataclasses import asdict

import numpy as np
import pytest

from aecr_jax.__main__ import main
from aecr_jax.benchmark.plan import StepTime, make_plan, read_step_time
from aecr_jax.benchmark.work import Work
from aecr_jax.errors import UserError
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.macs import network_macs
from aecr_jax.training.config import Config, RunConfig, load_config

CONFIG = Config(model=AECRNetConfig(width=4), run=RunConfig(eval_images=10))


def used(plan):
    return plan.start_s + plan.training_s + plan.evaluation_s + plan.saving_s


@pytest.mark.parametrize(("seconds", "minutes"), [(0.1, 25), (0.1, 8), (0.004, 30), (2.5, 30), (300.0, 700)])
def test_the_run_fills_its_time_and_no_more(seconds, minutes):
    """All parts fit into 95% of the time, and of what is free there, a hundredth at most could have been steps."""
    plan = make_plan(CONFIG, StepTime(seconds), minutes)
    allowed = 0.95 * 60 * minutes
    assert used(plan) <= allowed + 1
    assert allowed - used(plan) < seconds + 0.01 * allowed
    assert plan.training_s == pytest.approx(plan.steps * seconds)
    assert 3 * plan.eval_every < plan.steps <= 4 * plan.eval_every  # three evaluations on the way and the one at the end
    assert 1 <= plan.save_every <= plan.steps and (plan.save_every * seconds <= 121 or plan.save_every == 1)


def test_multiplications_by_hand():
    """Forward and backward of every crop of every step: three forward passes of network_macs."""
    plan = make_plan(CONFIG, StepTime(0.1), 25)
    assert plan.macs == 3 * network_macs(CONFIG.model, 240, 240) * 16 * plan.steps


def test_a_longer_compilation_leaves_fewer_steps():
    steps = [make_plan(CONFIG, StepTime(0.1, compile_s), 25).steps for compile_s in (10.0, 110.0)]
    assert steps[0] - steps[1] == pytest.approx(1000, rel=0.01)


def write_figures(path, works):
    def rows(kind):
        return [{**asdict(work), "jax": {"median_s": s, "first_s": 7.0}} for part, work, s in works if part == kind]

    path.write_text(json.dumps({"parts": {kind: {"rows": rows(kind)} for kind in ("train", "sweep")}}))
    return path


@pytest.fixture
def figures(tmp_path):
    common = {"size": 16, "width": 4, "dtype": "float32"}
    works = [
        ("train", Work("train", batch=2, cr=True, **common), 0.2),
        ("train", Work("train", batch=2, **common), 0.1),
        ("sweep", Work("train", batch=4, cr=True, **common), 0.3),
        ("sweep", Work("train", batch=4, cr=True, remat=True, **common), 0.4),
    ]
    return write_figures(tmp_path / "figures.json", works)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 0.2),
        ({"loss.cr": "0"}, 0.1),
        ({"optim.batch": "4"}, 0.3),
        ({"optim.batch": "4", "model.remat": "True"}, 0.4),
        ({"optim.batch": "8"}, None),
        ({"data.crop": "32"}, None),
        ({"data.crop_width": "32"}, None),
        ({"model.blocks": "2"}, None),
        ({"model.dtype": "bfloat16"}, None),
        ({"loss.negatives": "2"}, None),
        ({"optim.accumulate": "2"}, None),
    ],
)
def test_only_the_same_step_counts(figures, tmp_path, changes, seconds):
    file = tmp_path / "config.py"
    file.write_text(
        "from aecr_jax.training.config import *\nfrom aecr_jax.networks.aecr_net import AECRNetConfig\n"
        "config = Config(model=AECRNetConfig(width=4), data=DataConfig(crop=16), optim=OptimConfig(batch=2))\n"
    )
    config = load_config(file, [word for name, value in changes.items() for word in (f"--{name}", value)])
    if seconds is None:
        with pytest.raises(UserError, match="has no step of this config, only train step, L1"):
            read_step_time(figures, config)
    else:
        assert read_step_time(figures, config) == StepTime(seconds, 7.0, "figures.json")


@pytest.mark.parametrize(
    "times",
    [
        {},
        [1],
        {"median_s": 0, "first_s": 7},
        {"median_s": "x", "first_s": 7},
        {"median_s": 0.1, "first_s": None},
        {"median_s": np.nan, "first_s": 7},
    ],
)
def test_a_damaged_benchmark_is_one_line(tmp_path, times):
    work = Work("train", batch=2, cr=True, size=16, width=4, dtype="float32")
    file = tmp_path / "figures.json"
    file.write_text(json.dumps({"parts": {"train": {"rows": [{**asdict(work), "jax": times}]}}}))
    with pytest.raises(UserError, match="is no file of benchmark accelerator: ") as error:
        read_step_time(file, CONFIG)
    assert "\n" not in str(error.value)


def test_no_plan_has_more_steps_than_a_run_may_have():
    steps = make_plan(CONFIG, StepTime(1e-5), 525_600).steps
    assert steps == 2**31 - 1
    dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, steps=steps)).validate()


@pytest.mark.parametrize("how", ["--benchmark", "--step-ms"])
def test_the_printed_commands_are_the_plan(config_file, tmp_path, capsys, how):
    """Both commands load; the second one begins with the weights of the first, at half its learning rate, in a folder of its own."""
    overrides = [
        "--model.blocks",
        "6",
        "--data.train",
        "scenes:8:32x24",
        "--run.workdir",
        f"{tmp_path}/a run",
        "--optim.learning_rate",
        "4e-4",
    ]
    work = Work("train", batch=8, size=16, width=4, cr=True)
    value = str(write_figures(tmp_path / "figures.json", [("train", work, 0.2)])) if how == "--benchmark" else "200"
    assert main(["plan", "--minutes", "25", "--config", config_file, how, value, *overrides]) == 0
    text = capsys.readouterr().out
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python train.py")]
    first, second = (load_config(words[words.index("--config") + 1], words[words.index("--config") + 2 :]) for words in commands)
    plan = make_plan(first, StepTime(0.2, 7.0) if how == "--benchmark" else StepTime(0.2), 25)
    for config in (first, second):
        assert (config.optim.steps, config.run.save_every, config.run.eval_every) == (plan.steps, plan.save_every, plan.eval_every)
        assert config.optim.schedule == "cosine" and config.data.train == "scenes:8:32x24"
    assert (first.optim.learning_rate, second.optim.learning_rate) == (4e-4, 2e-4)
    assert first.run.workdir == second.run.init_from == f"{tmp_path}/a run" != second.run.workdir and not first.run.init_from
    assert f"{plan.steps} steps" in text and f"{plan.macs / 1e15:.3g} PMAC" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "25"], "either --benchmark FILE"),
        (["--minutes", "25", "--step-ms", "1", "--benchmark", "figures.json"], "either --benchmark FILE"),
        (["--minutes", "-1", "--step-ms", "1"], "--minutes (=-1) must be positive"),
        (["--minutes", "1e300", "--step-ms", "1"], "--minutes (=1e+300) must be positive and at most 525600"),
        (["--minutes", "25", "--step-ms", "0"], "--step-ms (=0) must be finite and at least 0.001"),
        (["--minutes", "25", "--step-ms", "1e-300"], "--step-ms (=1e-300) must be finite and at least 0.001"),
        (["--minutes", "25", "--step-ms", "inf"], "--step-ms (=inf) must be finite"),
        (["--minutes", "2", "--step-ms", "100"], "--minutes (=2) must be at least"),
        (["--minutes", "25", "--step-ms", "100", "--optim.warmup", "100000"], "optim.warmup (=100000) must be less than the"),
        (["--minutes", "25", "--benchmark", "missing.json"], "--benchmark (=missing.json) does not exist"),
        (["--minutes", "25", "--benchmark", "figures.json"], "is no file of benchmark accelerator"),
        (["--minutes", "25", "--step-ms", "100", "--optim.nonsense", "1"], "unknown setting --optim.nonsense"),
    ],
)
def test_what_cannot_be_planned_is_one_line(config_file, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures.json").write_text("[]")
    assert main(["plan", "--config", config_file, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_time_that_an_error_asks_for_is_enough():
    with pytest.raises(UserError) as error:
        make_plan(CONFIG, StepTime(0.1), 2)
    least = float(str(error.value).split("at least ")[1].split(":")[0])
    assert make_plan(CONFIG, StepTime(0.1), least).steps >= 100

import runpy
from pathlib import Path

import pytest

from aecr_jax import UserError
from aecr_jax.config import Config, TrainConfig, load_config, override

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def test_overrides_are_typed():
    arguments = [
        "--train.steps",
        "7",
        "--model.fast_deconv",
        "False",
        "--model.mixup=sum",
        "--data.scene_size",
        "48",
        "64",
        "--loss.cr",
        "0",
    ]
    config = override(Config(), arguments)
    assert config.train.steps == 7 and config.model.fast_deconv is False and config.model.mixup == "sum"
    assert config.data.scene_size == (48, 64) and config.loss.cr == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.stps", "5"], r"unknown setting --train.stps; nearest: --train.steps"),
        (["--steps", "5"], r"unknown setting --steps; nearest: --train.steps"),
        (["--zebra", "5"], r"unknown setting --zebra; --help lists them"),
        (["--train.steps", "many"], r"train.steps.*'many'"),
        (["--model.mixup", "mean"], r"'mean'.*model.mixup.*'adaptive', 'sum', 'none'"),
        (["--train.steps"], r"Missing value for argument '--train.steps'"),
        (["stray"], r"stray"),
        (["--train.seed", "-1"], r"train.seed \(=-1\) must be at least 0"),
        (["--data.scene_size", "0", "0"], r"data.scene_size \(=0\) must be at least 8"),
        (["--model.dtype", "float64"], r"float64 needs the environment variable JAX_ENABLE_X64=1"),
        (["--train.batch", "0"], r"train.batch \(=0\) must be at least 1"),
        (["--model.width", "0"], r"width \(=0\) must be at least 1"),
        (["--train.learning_rate", "-1"], r"train.learning_rate \(=-1.0\) must be positive"),
        (["--loss.negatives", "17"], r"loss.negatives \(=17\) must be at most train.batch / train.accumulate \(=16\)"),
        (["--data.hazy", "x"], r"data.clear is not set"),
        (["--train.workdir", "gs://bucket/run"], r"train.workdir \(=gs://bucket/run\) must be a folder"),
        (["--train.processes", "2"], r"train.coordinator \(=''\) must be HOST:PORT"),
        (["--train.freeze_stats_after", "-2"], r"train.freeze_stats_after \(=-2\) must be at least -1"),
        (["--train.freeze_stats_after", "0"], r"train.freeze_stats_after \(=0\) needs train.init_from"),
        (["--train.ema", "1"], r"train.ema \(=1.0\) must be less than 1"),
        (["--data.clear", "x"], r"data.clear is set without data.hazy or data.depth"),
        (["--data.eval_hazy", "x"], r"data.eval_hazy and data.eval_clear go together"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        override(Config(), arguments)
    assert "\n" not in str(error.value)


def test_a_config_file_with_an_unknown_optimizer():
    with pytest.raises(UserError, match=r"train.optimizer \(='Muon'\) must be one of 'adam', 'muon'"):
        Config(train=TrainConfig(optimizer="Muon")).validate()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_says_how_to_run_it(path):
    load_config(path).validate()
    text = runpy.run_path(str(path))["__doc__"]
    assert f"python train.py --config configs/{path.name}" in text
    assert all(word in text for word in ("Command:", "Hardware:", "Time:", "Expected score:"))


def test_one_config_for_each_row_of_table_2():
    switches = {path.stem: load_config(path) for path in CONFIGS}
    rows = {
        name: (c.model.dfe, c.model.mixup, c.loss.cr, c.loss.negatives)
        for name, c in switches.items()
        if name.startswith("table2") or name == "its"
    }
    assert rows == {
        "table2_base": ("none", "none", 0, 1),
        "table2_base_mixup": ("none", "adaptive", 0, 1),
        "table2_base_dfe": ("after", "none", 0, 1),
        "table2_base_dfe_sc": ("after", "sum", 0, 1),
        "table2_base_dfe_mixup": ("after", "adaptive", 0, 1),
        "table2_cr_positive": ("after", "adaptive", 0.1, 0),
        "its": ("after", "adaptive", 0.1, 1),
    }


def test_bad_config_files(tmp_path):
    with pytest.raises(UserError, match=r"there is no config file .*configs/tis.py; .*has .*its.py"):
        load_config(CONFIGS[0].parent / "tis.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"must set `config = Config\(...\)`, not NoneType"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "typo.py").write_text("from aecr_jax.config import *\nconfig = Config(train=TrainConfig(stesp=3))\n")
    with pytest.raises(UserError, match=r"unknown setting stesp; nearest: --train\.steps"):
        load_config(tmp_path / "typo.py")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="fails: ZeroDivisionError"):
        load_config(tmp_path / "broken.py")

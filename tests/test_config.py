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
        (["--train.steps"], r"^Missing value for argument '--train.steps'"),
        (["--data.cache"], r"^Missing value for argument '--data.cache'"),
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
        (["--train.workdir", ""], r"train.workdir \(=''\) must name a folder"),
        (["--train.learning_rate", "inf"], r"train.learning_rate \(=inf\) must be a finite number"),
        (["--train.offset_rate", "inf"], r"train.offset_rate \(=inf\) must be a finite number"),
        (["--loss.cr", "nan"], r"loss.cr \(=nan\) must be a finite number"),
        (["--train.coordinator", "x"], r"train.coordinator \(='x'\) must be HOST:PORT"),
        (["--train.coordinator", "localhost:abc"], r"train.coordinator \(='localhost:abc'\) must be HOST:PORT"),
        (["--train.coordinator", "localhost:99999"], r"train.coordinator \(='localhost:99999'\) must be HOST:PORT"),
        (["--train.seed", str(2**63)], r"train.seed \(=9223372036854775808\) must be at most 9223372036854775807"),
        (["--train.steps", str(2**64)], r"train.steps \(=18446744073709551616\) must be at most 2147483647"),
        (["--data.threads", "100000"], r"data.threads \(=100000\) must be at most 256"),
        (["--train.learning_rate", "1" + 400 * "0"], r"^train.learning_rate \(=inf\) must be a finite number"),
        (["--train.steps", "x"], r"^train.steps \(='x'\) must be an integer$"),
        (["--train.steps", ""], r"^train.steps \(=''\) must be an integer$"),
        (["--loss.cr", "a: b"], r"^loss.cr \(='a: b'\) must be a number$"),
        (["extra"], r"^Unrecognized options: extra$"),
        (["--model.width", "1000000"], r"^model.width \(=1000000\) must be at least 1 and at most 4096"),
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
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="fails: SystemExit: 0"):
        load_config(tmp_path / "quits.py")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="fails: ZeroDivisionError"):
        load_config(tmp_path / "broken.py")


@pytest.mark.parametrize(
    ("section", "setting", "message"),
    [
        ("model=ModelConfig", 'shared="False"', r"shared \(='False'\) must be True or False"),
        ("model=ModelConfig", "width=16.0", r"width \(=16.0\) must be an integer"),
        ("data=DataConfig", "scene_size=64", r"data.scene_size \(=64\) must be \(an integer, an integer\)"),
        ("data=DataConfig", "scene_size=(64, 64, 3)", r"data.scene_size \(=\(64, 64, 3\)\) must be \(an integer, an integer\)"),
        ("data=DataConfig", "hazy=None", r"data.hazy \(=None\) must be a string"),
        ("data=DataConfig", "cache=1", r"data.cache \(=1\) must be True or False"),
        ("loss=LossConfig", "cr=True", r"loss.cr \(=True\) must be a finite number"),
        ("train=TrainConfig", "eval_every=2.5", r"train.eval_every \(=2.5\) must be an integer"),
        ("train=TrainConfig", 'steps="3"', r"train.steps \(='3'\) must be an integer"),
        ("train=TrainConfig", 'learning_rate="1e-3"', r"train.learning_rate \(='1e-3'\) must be a finite number"),
        ("train=TrainConfig", "learning_rate=10**400", r"train.learning_rate \(=10+\) must be a finite number"),
        ("train=TrainConfig", "ema=None", r"train.ema \(=None\) must be a finite number"),
        ("train=TrainConfig", "schedule=None", r"train.schedule \(=None\) must be one of 'cosine', 'constant'"),
        ("train=LossConfig", "cr=0.1", r"train \(=LossConfig\(.*\) must be a TrainConfig"),
    ],
)
def test_the_values_of_a_config_file_have_the_annotated_types(tmp_path, section, setting, message):
    """Python checks no annotations: "False" would be true, and 2.5 would divide no step."""
    path = tmp_path / "wrong.py"
    path.write_text(f"from aecr_jax.config import *\nconfig = Config({section}({setting}))\n")
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_integers_are_numbers_too(tmp_path):
    (tmp_path / "right.py").write_text("from aecr_jax.config import *\nconfig = Config(loss=LossConfig(cr=0), train=TrainConfig(ema=0))\n")
    assert load_config(tmp_path / "right.py").loss.cr == 0

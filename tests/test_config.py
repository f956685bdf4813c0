import dataclasses
import runpy
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from test_vgg import tiny_weights

from aecr_jax import UserError
from aecr_jax.data.sources import DataConfig
from aecr_jax.losses.contrastive import LAYER_WEIGHTS
from aecr_jax.losses.vgg import VGG19Features
from aecr_jax.renamed import migrate
from aecr_jax.training.config import Config, OptimConfig, load_config, override
from aecr_jax.training.help import settings_help
from aecr_jax.training.initial import make_loss

IMPORTS = "from aecr_jax.networks.aecr_net import AECRNetConfig\nfrom aecr_jax.training.config import *\n"
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def test_overrides_are_typed():
    arguments = [
        "--optim.steps",
        "7",
        "--model.fast_deconv",
        "False",
        "--model.mixup=sum",
        "--data.train",
        "scenes:4:64x48",
        "--loss.cr",
        "0",
    ]
    config = override(Config(), arguments)
    assert config.optim.steps == 7 and config.model.fast_deconv is False and config.model.mixup == "sum"
    assert config.data.train == "scenes:4:64x48" and config.loss.cr == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.stps", "5"], r"unknown setting --optim.stps; nearest: --optim.steps"),
        (["--steps", "5"], r"unknown setting --steps; nearest: --optim.steps"),
        (["--kiwi", "5"], r"unknown setting --kiwi; --help lists all settings"),
        (["--optim.steps", "many"], r"optim.steps.*'many'"),
        (["--model.mixup", "mean"], r"model.mixup \(='mean'\) must be one of 'adaptive', 'sum', 'none'"),
        (["--optim.steps"], r"^--optim.steps has no value"),
        (["--data.cache"], r"^--data.cache has no value"),
        (["--data.cache", "--optim.steps", "5"], r"^--data.cache has no value"),
        (["--data.cache", "yes"], r"data.cache \(='yes'\) must be True or False"),
        (["stray"], r"stray"),
        (["--run.seed", "-1"], r"run.seed \(=-1\) must be at least 0"),
        (["--data.crop", "3"], r"data.crop \(=3\) must be at least 4"),
        (["--model.dtype", "float64"], r"float64 with the environment variable JAX_ENABLE_X64=1"),
        (["--optim.batch", "0"], r"optim.batch \(=0\) must be at least 1"),
        (["--model.width", "0"], r"^model.width \(=0\) must be at least 1"),
        (["--optim.learning_rate", "-1"], r"optim.learning_rate \(=-1.0\) must be positive"),
        (["--loss.negatives", "17"], r"loss.negatives \(=17\) must be at most optim.batch / optim.accumulate \(=16\)"),
        (["--data.hazy", "x"], r"unknown setting --data.hazy; use --data.train HAZY,CLEAR"),
        (["--train.steps", "5"], r"unknown setting --train.steps; use --optim.steps"),
        (["--train.workdir=x"], r"unknown setting --train.workdir; use --run.workdir"),
        (["--model.name", "aecr"], r"model.name \(='aecr'\) must be one of the networks, such as aecr_net"),
        (["--run.workdir", "s3://bucket/run"], r"run.workdir: s3://bucket/run cannot hold a run"),
        (["--run.processes", "2"], r"run.coordinator \(=''\) must be HOST:PORT"),
        (["--optim.freeze_stats_after", "-2"], r"optim.freeze_stats_after \(=-2\) must be at least -1"),
        (["--optim.freeze_stats_after", "0"], r"optim.freeze_stats_after \(=0\) requires run.init_from"),
        (["--optim.ema", "1"], r"optim.ema \(=1.0\) must be less than 1"),
        (["--data.train", ""], r"data.train \(=''\) must be a folder, HAZY,CLEAR"),
        (["--data.eval", "x", "--data.holdout", "5"], r"data.holdout \(=5\) and data.eval \(=x\) both select the evaluation data"),
        (["--run.workdir", ""], r"run.workdir \(=''\) must name a folder"),
        (["--optim.learning_rate", "inf"], r"optim.learning_rate \(=inf\) must be a finite number"),
        (["--optim.offset_rate", "inf"], r"optim.offset_rate \(=inf\) must be a finite number"),
        (["--loss.cr", "nan"], r"loss.cr \(=nan\) must be a finite number"),
        (["--run.coordinator", "x"], r"run.coordinator \(='x'\) must be HOST:PORT"),
        (["--run.coordinator", "localhost:abc"], r"run.coordinator \(='localhost:abc'\) must be HOST:PORT"),
        (["--run.coordinator", "localhost:99999"], r"run.coordinator \(='localhost:99999'\) must be HOST:PORT"),
        (["--run.seed", str(2**63)], r"run.seed \(=9223372036854775808\) must be at most 9223372036854775807"),
        (["--optim.steps", str(2**64)], r"optim.steps \(=18446744073709551616\) must be at most 2147483647"),
        (["--data.threads", "100000"], r"data.threads \(=100000\) must be at most 256"),
        (["--model.width", "1000000"], r"^model.width \(=1000000\) must be at most 4096"),
        (["--optim.learning_rate", "1" + 400 * "0"], r"^optim.learning_rate \(=inf\) must be a finite number"),
        (["--optim.steps", "x"], r"^optim.steps \(='x'\) must be an integer$"),
        (["--optim.steps", ""], r"^optim.steps \(=''\) must be an integer$"),
        (["--loss.cr", "a: b"], r"^loss.cr \(='a: b'\) must be a finite number$"),
        (["--loss.cr_layers", "relu1_1,relu2_1"], r"^loss.cr_weights has 5 values and must have 2, one for each of loss.cr_layers$"),
        (["--loss.cr_weights", "1,x"], r"^loss.cr_weights \(='1,x'\) must be values with commas between them, each a finite number$"),
        (["--loss.cr_weights", "1,1,1,1,-1"], r"loss.cr_weights \(=\(1.0, 1.0, 1.0, 1.0, -1.0\)\) must be at least 0"),
        (["--loss.cr_form", "ratio"], r"loss.cr_form \(='ratio'\) must be one of 'batch_ratio', 'image_ratio', 'difference'"),
        (["--loss.negatives", "17"], r"loss.negatives \(=17\) must be at most optim.batch / optim.accumulate \(=16\)"),
        (
            ["--loss.cr_negatives", "rehazed", "--loss.negatives", "0"],
            r"loss.negatives \(=0\) must be at least 1 if loss.cr_negatives is rehazed",
        ),
        (["--loss.cr_negatives", "lagging"], r"optim.ema \(=0\) must be positive, such as 0.999, if loss.cr_negatives is lagging"),
        (
            ["--loss.cr_negatives", "lagging", "--optim.ema", "0.9"],
            r"loss.cr_after \(=0\) must be positive if loss.cr_negatives is lagging",
        ),
        (["extra"], r"^unexpected argument extra: settings are given as"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        override(Config(), arguments)
    assert "\n" not in str(error.value)


def test_the_layers_of_regularization():
    """The defaults are the paper's, and a list of any length is a setting. There may be more negatives of one scene than images."""
    assert (Config().loss.cr_layers, Config().loss.cr_weights) == (VGG19Features.LAYERS, LAYER_WEIGHTS)
    config = override(
        Config(), ["--loss.cr_layers", "relu3_4", "--loss.cr_weights", "0.5", "--loss.cr_negatives=rehazed", "--loss.negatives=99"]
    )
    assert (config.loss.cr_layers, config.loss.cr_weights, config.loss.rehazed) == (("relu3_4",), (0.5,), 99)
    assert dataclasses.replace(config.loss, cr=0).rehazed == Config().loss.rehazed == 0
    help_text = settings_help()
    assert "--loss.cr_layers STR,...  (default relu1_1,relu2_1,relu3_1,relu4_1,relu5_1)" in help_text
    assert "--loss.cr_weights FLOAT,...  (default 0.03125,0.0625,0.125,0.25,1.0)" in help_text


def test_features_that_do_not_fit_are_refused(tmp_path):
    """Weights that end too early, unknown layers, crops that are too small for the deepest layer, and the file of the other network."""
    early = {name: value for name, value in tiny_weights().items() if name < "conv3_2"}
    save_file(early, tmp_path / "early.safetensors", metadata=VGG19Features.metadata())
    file = ["--loss.features", str(tmp_path / "early.safetensors")]
    for arguments, message in [
        (file, r"early.safetensors: the weights end at relu3_1, before layer relu4_1"),
        ([*file, "--loss.cr_network", "vgg16"], r"early.safetensors holds vgg19 and must hold VGG-16"),
        (
            ["--loss.cr_layers", "relu5_4", "--loss.cr_weights", "1", "--loss.cr_network", "vgg16"],
            r"^loss.cr_layers: layer relu5_4 is not one",
        ),
        (
            ["--loss.features", "random", "--data.crop_width", "8"],
            r"^data.crop_width \(=8\) must be at least 16 for the features of relu1_1",
        ),
        (["--loss.features", "random", "--data.crop", "15"], r"data.crop \(=15\) must be at least 16 for the features of relu1_1, relu2_1"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            make_loss(override(Config(), arguments))
        assert "\n" not in str(error.value)
    loss = make_loss(
        override(Config(), [*file, "--loss.cr_layers", "relu3_1,relu1_2", "--loss.cr_weights", "1,2", "--loss.cr_normalize", "True"])
    )
    assert loss.features.layers == ("relu3_1", "relu1_2") and loss.features.normalize and loss.weights == (1, 2)
    assert make_loss(Config(), regularize=False).features is None


def test_a_config_file_with_an_unknown_optimizer():
    with pytest.raises(UserError, match=r"optim.optimizer \(='Muon'\) must be one of 'adam', 'muon'"):
        Config(optim=OptimConfig(optimizer="Muon")).validate()


def variants(path):
    found = runpy.run_path(str(path))
    return [f"{path}:{name}" for name in found["configs"]] if "configs" in found else [str(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_says_how_to_run_it(path):
    for variant in variants(path):
        load_config(variant).validate()
    text = runpy.run_path(str(path))["__doc__"]
    assert f"python train.py --config configs/{path.name}" in text
    assert all(word in text for word in ("Command:", "Hardware:", "Time:", "Expected score:"))


def test_one_config_for_each_row_of_table_2_and_each_rate_of_table_4():
    rows = {}
    for variant in (v for name in ("its", "table2", "table4") for v in variants(CONFIGS[0].parent / f"{name}.py")):
        c = load_config(variant)
        rows[Path(variant).name] = (c.model.dfe, c.model.mixup, c.loss.cr, c.loss.positives, c.loss.negatives)
    assert rows == {
        "table2.py:base": ("none", "none", 0, 1, 1),
        "table2.py:base_mixup": ("none", "adaptive", 0, 1, 1),
        "table2.py:base_dfe": ("after", "none", 0, 1, 1),
        "table2.py:base_dfe_sc": ("after", "sum", 0, 1, 1),
        "table2.py:base_dfe_mixup": ("after", "adaptive", 0, 1, 1),
        "table2.py:cr_positive": ("after", "adaptive", 0.1, 1, 0),
        "its.py:paper": ("after", "adaptive", 0.1, 1, 1),
        "its.py:laptop": ("after", "adaptive", 0.1, 1, 1),
        "table4.py:1:10": ("after", "adaptive", 0.1, 1, 10),
        "table4.py:10:1": ("after", "adaptive", 0.1, 10, 1),
        "table4.py:10:10": ("after", "adaptive", 0.1, 10, 10),
    }


def test_a_config_file_with_several_configs(tmp_path):
    path = tmp_path / "two.py"
    one, two = (f"Config(optim=OptimConfig(steps={n}))" for n in (1, 2))
    path.write_text(f"from aecr_jax.training.config import *\nconfigs = {{'a': {one}, 'b:c': {two}}}\n")
    assert [load_config(f"{path}{name}").optim.steps for name in ("", ":a", ":b:c")] == [1, 1, 2]
    with pytest.raises(UserError, match=r"two.py has no config 'b'; it has a, b:c"):
        load_config(f"{path}:b")


def test_a_config_file_of_version_0_1_0_is_told_the_new_names(tmp_path):
    (tmp_path / "old.py").write_text("from aecr_jax.training.config import Config, TrainConfig\n")
    with pytest.raises(UserError, match="TrainConfig is now OptimConfig and RunConfig"):
        load_config(tmp_path / "old.py")
    (tmp_path / "hazy.py").write_text("from aecr_jax.training.config import *\nconfig = Config(data=DataConfig(hazy='x', clear='y'))\n")
    with pytest.raises(UserError, match=r"unknown setting data.hazy; use --data.train HAZY,CLEAR"):
        load_config(tmp_path / "hazy.py")


def test_saved_configs_of_version_0_1_0_are_migrated():
    """A config.json of version 0.1.0 is migrated, with each of its ways to name images."""
    train = {"workdir": "runs/x", "steps": 7, "batch": 2, "ema": 0.9, "seed": 3, "log_every": 5}
    data = {"dataset": "", "eval_dataset": "", "data_dir": "d", "split": "", "hazy": "", "clear": "", "depth": "", "eval_hazy": ""}
    data |= {
        "eval_clear": "",
        "holdout": 0,
        "scenes": 150,
        "scene_size": [144, 192],
        "crop": 96,
        "threads": 2,
        "workers": 0,
        "cache": False,
    }
    old = {"model": {"width": 16}, "data": data, "loss": {"cr": 0.1}, "train": train}
    new = migrate(old)
    assert new["optim"] == {"steps": 7, "batch": 2, "ema": 0.9} and new["run"] == {"workdir": "runs/x", "seed": 3, "log_every": 5}
    assert new["data"]["train"] == "scenes:150:192x144" and new["data"]["eval"] == "" and new["data"]["crop"] == 96
    assert set(new["data"]) == {field.name for field in dataclasses.fields(DataConfig)} - {"crop_width"}  # added later
    for changes, source, evaluation in [
        ({"hazy": "h", "clear": "c", "eval_hazy": "a", "eval_clear": "b"}, "h,c", "a,b"),
        ({"clear": "c", "depth": "d", "holdout": 5}, "clear=c,depth=d", ""),
        ({"dataset": "reside/its", "eval_dataset": "reside/sots_indoor"}, "reside/its", "reside/sots_indoor"),
        ({"dataset": "nh_haze", "split": "nh_haze_50_5"}, "nh_haze@nh_haze_50_5/train", "nh_haze@nh_haze_50_5/test"),
    ]:
        migrated = migrate(old | {"data": data | changes})["data"]
        assert (migrated["train"], migrated["eval"]) == (source, evaluation)
    assert migrate(new) == new


def test_bad_config_files(tmp_path):
    with pytest.raises(UserError, match=r"there is no config file .*configs/tis.py; .*has .*its.py"):
        load_config(CONFIGS[0].parent / "tis.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"must set `config = Config\(...\)`, not NoneType"):
        load_config(tmp_path / "empty.py")
    for value in ("[Config()]", "{1: Config()}"):
        (tmp_path / "list.py").write_text(f"from aecr_jax.training.config import *\nconfigs = {value}\n")
        with pytest.raises(UserError, match="must set `configs` to a dict of names and configs"):
            load_config(f"{tmp_path}/list.py:first")
    (tmp_path / "typo.py").write_text("from aecr_jax.training.config import *\nconfig = Config(optim=OptimConfig(stesp=3))\n")
    with pytest.raises(UserError, match=r"unknown setting optim.stesp; nearest: --optim\.steps"):
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
        ("model=AECRNetConfig", 'shared="False"', r"shared \(='False'\) must be True or False"),
        ("model=AECRNetConfig", "width=16.0", r"width \(=16.0\) must be an integer"),
        ("data=DataConfig", "train=None", r"data.train \(=None\) must be a string"),
        ("data=DataConfig", "cache=1", r"data.cache \(=1\) must be True or False"),
        ("loss=LossConfig", "cr=True", r"loss.cr \(=True\) must be a finite number"),
        ("run=RunConfig", "eval_every=2.5", r"run.eval_every \(=2.5\) must be an integer"),
        ("optim=OptimConfig", 'steps="3"', r"optim.steps \(='3'\) must be an integer"),
        ("optim=OptimConfig", 'learning_rate="1e-3"', r"optim.learning_rate \(='1e-3'\) must be a finite number"),
        ("optim=OptimConfig", "learning_rate=10**400", r"optim.learning_rate \(=10+\) must be a finite number"),
        ("optim=OptimConfig", "ema=None", r"optim.ema \(=None\) must be a finite number"),
        ("optim=OptimConfig", "schedule=None", r"optim.schedule \(=None\) must be one of 'cosine', 'constant'"),
        ("optim=LossConfig", "cr=0.1", r"optim \(=LossConfig\(.*\) must be of type OptimConfig"),
    ],
)
def test_the_values_of_a_config_file_have_the_annotated_types(tmp_path, section, setting, message):
    """Python does not check annotations: "False" would count as true, and no step would be a multiple of 2.5."""
    path = tmp_path / "wrong.py"
    path.write_text(f"{IMPORTS}config = Config({section}({setting}))\n")
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_integers_are_numbers_too(tmp_path):
    (tmp_path / "right.py").write_text(f"{IMPORTS}config = Config(loss=LossConfig(cr=0), optim=OptimConfig(ema=0))\n")
    assert load_config(tmp_path / "right.py").loss.cr == 0

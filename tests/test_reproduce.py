"""The command `reproduce`: rows that are run, continued and skipped, what is written, the claims, and wrong input."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from test_commands import fails, lines
from test_convert_networks import make_tensors

from aecr_jax import save_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.errors import Stopped
from aecr_jax.losses.vgg import VGG19Features
from aecr_jax.networks.ffa_net import FFANet, FFANetConfig
from aecr_jax.reproduce import run as runner
from aecr_jax.reproduce import settings
from aecr_jax.reproduce.claims import Interval, judge, paired_interval
from aecr_jax.reproduce.results import Result, add_result, read_results
from aecr_jax.reproduce.settings import Inputs, row_config
from aecr_jax.reproduce.tables import find_table
from aecr_jax.training.config import OptimConfig

ROOT = Path(__file__).parents[1]
TINY = settings.Small(OptimConfig(steps=2, batch=8, schedule="constant"), crop=16, width=4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Replace the numbers of the small scale, and change to the folder that has `configs/`."""
    monkeypatch.setattr(settings, "SMALL", dict.fromkeys(settings.SMALL, TINY))
    monkeypatch.chdir(ROOT)


def command(output, *options, table="table2", data="scenes:4:32x24"):
    return ["reproduce", table, "--data", data, "--output", str(output), *map(str, options)]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run two rows with two seeds, of which the second row is killed first, and return the folder."""
    output = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "SMALL", dict.fromkeys(settings.SMALL, TINY))
        patch.chdir(ROOT)
        train = runner.train

        def killed(config):
            if "mixup" in config.run.workdir:
                raise Stopped("stopped by SIGTERM", 75)
            return train(config)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(runner, "train", killed)
            assert main(command(output, "--rows", "base,base_mixup")) == 75
        assert [(line["row"], line["seed"]) for line in read(output / "table2/results.csv")] == [("base", "0")]
        assert "not measured" in (output / "table2/results.md").read_text()
        assert main(command(output, "--rows", "base,base_mixup")) == 0
    return output


@pytest.mark.slow
def test_a_killed_command_continues_and_all_rows_are_in_the_results(finished):
    results = read(finished / "table2/results.csv")
    # The seeds are the outer loop.
    assert [(line["row"], line["seed"]) for line in results] == [("base", "0"), ("base_mixup", "0"), ("base", "1"), ("base_mixup", "1")]
    for line in results:
        folder = f"{line['row']}_seed{line['seed']}"
        scores = read(finished / "table2/scores" / folder / "per_image.csv")
        assert len(scores) == 20 == int(line["images"])
        assert float(line["psnr"]) == pytest.approx(np.mean([float(score["psnr"]) for score in scores]))
        config = json.loads((finished / "runs" / folder / "config.json").read_text())
        assert config["run"]["seed"] == int(line["seed"]) and config["loss"]["cr"] == 0
        assert config["optim"]["steps"] == int(line["steps"]) == 2
        # The log has one line for both steps, that is, for two batches of eight.
        (log,) = lines(finished / "runs" / folder, "train")
        assert float(line["minutes"]) == pytest.approx(2 * 8 / log["images_per_second"] / 60, abs=0.006)
    # Mixup adds its two factors; the multiply-adds are the same.
    base, mixup = results[:2]
    assert int(mixup["parameters"]) == int(base["parameters"]) + 2
    assert mixup["macs"] == base["macs"]


@pytest.mark.slow
def test_the_page_has_the_papers_scores_and_the_claims(finished):
    text = (finished / "table2/results.md").read_text()
    first = read(finished / "table2/results.csv")[0]
    assert f"| `base` | 0 | {float(first['psnr']):.2f} | {float(first['ssim']):.4f} | 33.85, 0.9820 |" in text
    scores = [read(finished / f"table2/scores/{row}_seed1/per_image.csv") for row in ("base_mixup", "base")]
    mean = np.mean([float(a["psnr"]) - float(b["psnr"]) for a, b in zip(*scores)])
    (claim,) = (line for line in text.splitlines() if "mixup helps without DFE" in line)
    assert f"1: {mean:+.2f} [" in claim and "| +0.19 |" in claim
    assert text.count("not measured") == 6


@pytest.mark.slow
def test_the_figure_and_the_panel(finished):
    figure = ElementTree.parse(finished / "table2/psnr_over_parameters.svg").getroot()
    titles = [title.text for title in figure.iter("{http://www.w3.org/2000/svg}title")]
    psnr = {
        row: np.mean([float(r["psnr"]) for r in read(finished / "table2/results.csv") if r["row"] == row]) for row in ("base", "base_mixup")
    }
    assert titles == [f"{row}: {value:.2f} dB" for row, value in psnr.items()]
    panel = Image.open(finished / "table2/panel.png")
    # Hazy, two rows and clear: four columns of 32 pixels; three scenes of 24 pixels, each with a line for scores.
    assert panel.size == (4 * 32 + 5 * 8, 26 + 3 * (24 + 26) + 4 * 8)


@pytest.mark.slow
def test_finished_rows_are_skipped(finished, monkeypatch, capsys):
    monkeypatch.setattr(runner, "train", lambda config: pytest.fail("it was trained again"))
    before = (finished / "table2/results.csv").read_bytes()
    assert main(command(finished, "--rows", "base_mixup,base")) == 0
    assert capsys.readouterr().out.count("already in") == 4
    assert (finished / "table2/results.csv").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--test", "scenes/test:5:32x24"],
            "results.csv has results of scale small, data scenes:4:32x24, 20 images of scenes, not of scale",
        ),
        (["--scale", "paper"], "--test DATA is missing"),
        (["--scale", "paper", "--test", "scenes/test:20:32x24"], "not of scale paper, data scenes:4:32x24, 20 images of scenes: choose"),
        (["--rows", "base,other"], "--rows: table2 has no row 'other'; it has base, base_mixup, base_dfe, "),
        (["--seeds", "0"], "--seeds (=0) must be from 1 to 1000"),
        (["--rows", "base,cr_positive,cr"], "--features FILE is missing: cr_positive, cr need VGG-19"),
        (["--rows", "cr", "--features", "none.safetensors"], "there is no VGG-19 file none.safetensors"),
        (["--weights", "none"], "there is no checkpoint folder none"),
        (["--weights", "dcp"], "--weights (=dcp) are of dcp, but the rows have aecr_net"),
    ],
)
def test_wrong_options_are_one_line_and_change_nothing(finished, capsys, options, message):
    before = modified(finished)
    options = options if "--rows" in options else [*options, "--rows", "base"]
    assert message in fails(capsys, *command(finished, *options))
    assert modified(finished) == before


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_with_other_settings_is_refused(finished, monkeypatch, capsys):
    other = dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, learning_rate=0.5))
    monkeypatch.setattr(settings, "SMALL", dict.fromkeys(settings.SMALL, other))
    before = modified(finished)
    said = fails(capsys, *command(finished, "--rows", "base"))
    assert "runs/base_seed0 holds a run with other settings (optim.learning_rate: 0.0002 -> 0.5): choose another --output" in said
    assert modified(finished) == before


def test_a_damaged_results_file_is_refused(tmp_path, capsys):
    (tmp_path / "table2").mkdir()
    (tmp_path / "table2/results.csv").write_text("row,seed\nbase,0\n")
    said = fails(capsys, *command(tmp_path, "--rows", "base"))
    assert "table2/results.csv is not a results file of reproduce" in said and not (tmp_path / "runs").exists()


def test_a_results_file_that_is_no_text_is_refused(tmp_path, capsys):
    """The fields of CSV files have at most 131,072 characters in Python."""
    (tmp_path / "table2").mkdir()
    (tmp_path / "table2/results.csv").write_text("x" * 200_000)
    assert "table2/results.csv is not a results file of reproduce" in fails(capsys, *command(tmp_path, "--rows", "base"))


def test_results_of_rows_that_are_no_longer_there_are_refused(tmp_path, capsys):
    numbers = "0,20.0,0.8,11.0,0.7,20,100,100,2,1.0,small,scenes:4:32x24,scenes"
    fields = "row,seed,psnr,ssim,input_psnr,input_ssim,images,parameters,macs,steps,minutes,scale,data,test"
    (tmp_path / "table2").mkdir()
    (tmp_path / "table2/results.csv").write_text(f"{fields}\nformer,{numbers}\n")
    said = fails(capsys, *command(tmp_path, "--rows", "base"))
    assert "table2/results.csv has rows that table2 does not have (former): choose another --output" in said


def test_a_table_that_does_not_exist(tmp_path, capsys):
    said = fails(capsys, *command(tmp_path / "out", table="table9"))
    assert said == "aecr_jax: there is no table table9 to reproduce; there are table2, table3, table4" and not (tmp_path / "out").exists()


def test_a_rate_greater_than_the_batch(tmp_path, capsys):
    said = fails(capsys, *command(tmp_path / "out", "--rows", "1:9", "--features", "random", table="table4"))
    assert "row 1:9 of table4: loss.negatives (=9) must be at most optim.batch / optim.accumulate (=8)" in said
    assert not (tmp_path / "out").exists()


def test_other_haze_needs_data_without_haze(tmp_path, capsys):
    """The first row could be trained, but not the second, which needs haze that is made on the fly."""
    for part in ("hazy", "clear"):
        (tmp_path / "pairs" / part).mkdir(parents=True)
        for i in range(52):  # 50 are held out
            Image.new("RGB", (32, 24), (i, 0, 0)).save(tmp_path / "pairs" / part / f"{i}.png")
    options = ("--rows", "1:1,rehazed", "--features", "random", "--test", "scenes/test:5:32x24")
    said = fails(capsys, *command(tmp_path / "out", *options, table="table4", data=str(tmp_path / "pairs")))
    assert "row rehazed of table4: loss.cr_negatives (=rehazed) must be hazy or lagging" in said and not (tmp_path / "out").exists()


def test_a_row_that_the_papers_recipe_does_not_allow(tmp_path, capsys):
    options = ("--rows", "lagging", "--features", "random", "--scale", "paper", "--test", "scenes/test:5:32x24")
    said = fails(capsys, *command(tmp_path / "out", *options, table="table4"))
    assert "row lagging of table4 needs the moving average of the weights, so --scale (=paper) must be small" in said


def test_features_with_too_few_levels(tmp_path, capsys):
    """Expected: the paper has five levels, and these weights end at the third, which is enough for the row with three."""
    weights = nnx.to_pure_dict(nnx.state(VGG19Features.random(width=2)))["weights"]
    kept = {name: np.asarray(array) for name, array in weights.items() if name < "conv4"}
    names = {name: ".".join(name.rsplit("_", 1)) for name in kept}
    file = str(tmp_path / "vgg.safetensors")
    save_file({names[name]: array for name, array in kept.items()}, file, VGG19Features.metadata())
    said = fails(capsys, *command(tmp_path / "out", "--rows", "cr_three_levels,cr", "--features", file))
    assert f"--features (={file}) has 3 levels and must have the 5 up to relu5_1" in said
    three = [row for row in find_table("table2", rows=["cr_three_levels"]).rows if row.name == "cr_three_levels"]
    assert settings.check_features(file, three) == file


def test_rows_that_the_paper_does_not_have(monkeypatch):
    """They are added if they are named, with a claim of their own, and differ from CR as the paper has it in what their names say."""
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert not {"cr_three_levels", "rehazed", "lagging"} & {row.name for name in ("table2", "table4") for row in find_table(name).rows}
    inputs = Inputs("scenes:4:32x24", "", "vgg.safetensors")
    default = row_config("table4", find_table("table4").rows[0], "small", inputs, seed=0, workdir=Path("w"))
    for name, row, changes in (
        ("table2", "cr_three_levels", {"cr_layers": ("relu1_1", "relu2_1", "relu3_1"), "cr_weights": (1 / 32, 1 / 16, 1 / 8)}),
        ("table4", "rehazed", {"cr_negatives": "rehazed"}),
        ("table4", "lagging", {"cr": 0.01, "cr_negatives": "lagging", "cr_after": 300}),
    ):
        table = find_table(name, rows=[row])
        config = row_config(name, table.rows[-1], "small", inputs, seed=0, workdir=Path("w"))
        assert table.rows[-1].psnr is None and table.claims[-1].row == row and table.claims[-1].gain is None
        assert config == dataclasses.replace(default, loss=dataclasses.replace(default.loss, **changes))


@pytest.mark.slow
def test_rows_of_table_4_run(tmp_path):
    assert main(command(tmp_path, "--rows", "1:3,rehazed", "--seeds", 1, "--features", "random", table="table4")) == 0
    assert json.loads((tmp_path / "runs/rate_1_3_seed0/config.json").read_text())["loss"]["negatives"] == 3
    assert json.loads((tmp_path / "runs/rehazed_seed0/config.json").read_text())["loss"]["cr_negatives"] == "rehazed"
    page = (tmp_path / "table4/results.md").read_text()
    assert "| `1:3` | 0 |" in page and "| `rehazed` | 0 |" in page and "| `rehazed` - `1:1` | - | - | not measured |" in page


def test_rates_of_table_4():
    """The largest rate that the batch of 8 allows stands for the paper's 10; 1:1 is the last row of Table 2 and shares its run."""
    table = find_table("table4", r=8, rows=["1:3"])
    assert {row.name: row.psnr for row in table.rows} == {"1:1": 37.17, "1:8": 37.41, "8:1": 35.61, "8:8": 35.65, "1:3": None}
    inputs = Inputs("scenes", "", "random")
    shared = [
        (table, next(row for row in find_table(table, r=8).rows if row.name == name))
        for table, name in (("table2", "cr"), ("table4", "1:1"))
    ]
    configs = [row_config(table, row, "small", inputs, seed=0, workdir=Path("w")) for table, row in shared]
    assert configs[0] == configs[1] and {row.run for _, row in shared} == {"cr"}


@pytest.mark.slow
def test_table_3_begins_with_given_weights(tmp_path, monkeypatch):
    save_checkpoint(FFANet(FFANetConfig(width=8, blocks=1), rngs=nnx.Rngs(0)), tmp_path / "weights")
    options = ["--rows", "ffa_net", "--seeds", 1, "--weights", tmp_path / "weights"]
    assert main(command(tmp_path / "out", *options, table="table3")) == 0
    config = json.loads((tmp_path / "out/runs/ffa_net_seed0/config.json").read_text())
    assert config["run"]["init_from"] == str(tmp_path / "weights") and config["model"]["width"] == 8
    # The weights may be found in another folder of that name, where a converted file has its digest as the name.
    (tmp_path / "elsewhere").mkdir()
    options[-1] = (tmp_path / "weights").rename(tmp_path / "elsewhere/weights")
    assert main(command(tmp_path / "out", *options, table="table3")) == 0
    assert config["optim"]["learning_rate"] == 1e-4 and config["loss"]["cr"] == 0


@pytest.mark.parametrize(
    ("row", "features", "weights", "options", "message"),
    [
        ("cr", "0123456789ab", "-", ["--rows", "cr_positive", "--features", "random"], "cr with the features 0123456789ab, not random"),
        (
            "ffa_net",
            "-",
            "0123456789ab",
            ["--rows", "ffa_net:cr", "--features", "random"],
            "ffa_net with the initial weights 0123456789ab, not -",
        ),
    ],
)
def test_rows_are_not_mixed_with_those_of_other_features_or_initial_weights(tmp_path, capsys, row, features, weights, options, message):
    table = "table2" if row == "cr" else "table3"
    numbers = dict.fromkeys(("psnr", "ssim", "input_psnr", "input_ssim", "minutes"), 1.0) | dict.fromkeys(
        ("parameters", "macs", "steps"), 1
    )
    known = dict(row=row, seed=0, images=20, scale="small", data="scenes:4:32x24", test="scenes")
    path = tmp_path / table / "results.csv"
    path.parent.mkdir()
    add_result(path, Result(**numbers, **known, features=features, weights=weights))
    before = path.read_bytes()
    assert message in fails(capsys, *command(tmp_path, *options, table=table))
    assert path.read_bytes() == before and [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["results.csv"]


def test_results_of_earlier_versions_do_not_tell_the_weights(tmp_path):
    header = "row,seed,psnr,ssim,input_psnr,input_ssim,images,parameters,macs,steps,minutes,scale,data,test"
    (tmp_path / "results.csv").write_text(f"{header}\nbase,0,18.5,0.8,11.2,0.7,100,126512,2443919580,900,10.33,small,NYU,SOTS\n")
    (result,) = read_results(tmp_path / "results.csv")
    assert (result.psnr, result.test, result.features, result.weights) == (18.5, "SOTS", "", "")


def test_weights_are_told_apart_by_their_content(tmp_path):
    """Expected: the beginning of the SHA-256 of "abc", by FIPS 180-2."""
    (tmp_path / "weights").write_text("abc")
    assert settings.identify(str(tmp_path / "weights")) == "ba7816bf8f01"
    assert settings.identify("random") == "random" and settings.identify("") == "-"


def test_the_authors_file_is_converted_once(tmp_path):
    np.savez(tmp_path / "authors.npz", **make_tensors("ffa_net"))
    rows = find_table("table3").rows
    start, again = (settings.load_start(str(tmp_path / "authors.npz"), rows, tmp_path / "weights") for _ in range(2))
    assert start == again and start.model.NAME == "ffa_net"
    (Path(start.path) / "config.json").unlink()  # as if the conversion had been killed
    assert settings.load_start(str(tmp_path / "authors.npz"), rows, tmp_path / "weights") == start
    assert [str(path) for path in (tmp_path / "weights").iterdir()] == [start.path]


@pytest.mark.parametrize("table", ["table2", "table3", "table4"])
def test_rows_differ_only_in_what_the_table_compares(table, monkeypatch):
    """At the small scale all rows of a network have equal steps, batches and crops; at the paper's scale they have its recipe."""
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    inputs = Inputs("scenes:4:32x24", "scenes/test:5:32x24", "vgg.safetensors")
    rows = find_table(table, r=8).rows
    small = [row_config(table, row, "small", inputs, seed=1, workdir=Path("w")) for row in rows]
    assert len({(config.optim.steps, config.optim.batch, config.optim.optimizer) for config in small}) == 1
    assert len({(config.data, config.run) for config in small}) == 1
    for row, config in zip(rows, small):
        if row.name.endswith(":cr"):  # a row of Table 3 and the one before it, without regularization
            plain = small[[other.name for other in rows].index(row.name.removesuffix(":cr"))]
            assert config == dataclasses.replace(plain, loss=dataclasses.replace(plain.loss, cr=0.1, features="vgg.safetensors"))
    paper = [row_config(table, row, "paper", inputs, seed=1, workdir=Path("w")) for row in rows]
    if table != "table3":
        assert {(config.optim.steps, config.optim.batch, config.data.crop, config.model.width) for config in paper} == {
            (500_000, 16, 240, 64)
        }


# ---- statistics


def test_the_interval_of_independent_images():
    """By hand: differences 1, 2, 3, 6 have the mean 3 and the standard deviation sqrt(14 / 3); t(0.975, 3) is 3.18245 in printed tables."""
    base = {"a": 20.0, "b": 21.0, "c": 25.0, "d": 30.0}
    scores = {"a": 21.0, "b": 23.0, "c": 28.0, "d": 36.0}
    interval = paired_interval(scores, base, {name: name for name in base})
    reach = 3.18245 * math.sqrt(14 / 3) / 2
    assert interval == pytest.approx((3, 3 - reach, 3 + reach), abs=1e-4)


def test_images_of_one_scene_count_once():
    """By hand: each difference twice, in the same scene, has the same interval as once; as eight scenes, it would be narrower."""
    differences = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 6.0}
    scores = {f"{scene}{i}": value for scene, value in differences.items() for i in "12"}
    base = dict.fromkeys(scores, 0.0)
    once = paired_interval(differences, dict.fromkeys(differences, 0.0), {name: name for name in differences})
    assert paired_interval(scores, base, {name: name[0] for name in scores}) == pytest.approx(once)
    apart = paired_interval(scores, base, {name: name for name in scores})
    assert apart.high - apart.low < 0.7 * (once.high - once.low)


def test_one_scene_decides_nothing():
    assert paired_interval({"a": 2.0}, {"a": 1.0}, {"a": "a"}) == (1.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="not scored on the same images"):
        paired_interval({"a": 2.0}, {"b": 1.0}, {"a": "a", "b": "b"})
    with pytest.raises(ValueError, match="scored on other images than those of today, such as a"):
        paired_interval({"a": 2.0}, {"a": 1.0}, {"b": "b"})


@pytest.mark.parametrize(
    ("gain", "intervals", "expected"),
    [
        (0.5, [(0.1, 0.3), (0.2, 0.4)], "holds"),
        (-0.5, [(0.1, 0.3), (0.2, 0.4)], "fails"),
        (-1.5, [(-0.4, -0.1), (-0.2, -0.1)], "holds"),
        (0.5, [(0.1, 0.3), (-0.1, 0.4)], "undecided"),
        (0.5, [(0.1, 0.3), (-0.3, -0.1)], "undecided"),
        (0.5, [(0.1, 0.3)], "undecided"),
        (None, [(0.1, 0.3), (0.2, 0.4)], "holds"),
        (None, [(-0.4, -0.1), (-0.2, -0.1)], "fails"),
    ],
)
def test_claims_are_decided_by_two_seeds(gain, intervals, expected):
    assert judge(gain, [Interval((low + high) / 2, low, high) for low, high in intervals]) == expected

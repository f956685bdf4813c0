"""Every command with the arguments of a user, run in this process: the files it writes, its output and its exit status."""

import csv
import json
import shutil

import grain
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_data import picture

from aecr_jax import load_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.data.images import read_image
from aecr_jax.data.samples import Pair
from aecr_jax.errors import UserError
from aecr_jax.inference.weights import DEFAULT_MODEL, load_with_info
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.training import trainer


def fails(capsys, *arguments):
    """Run a command that must fail with status 2 and one error line, and return that line."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aecr_jax: ")]
    assert len(said) == 1
    return said[0]


def lines(workdir, kind):
    return [e for e in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if e["kind"] == kind]


# ---- train


def test_train_writes_its_work_directory(run):
    assert json.loads((run / "config.json").read_text())["model"]["width"] == 4
    assert [entry["step"] for entry in lines(run, "train")] == [1, 2, 3, 4]
    assert {"l1", "cr", "total", "images_per_second", "waiting_for_data", "saving", "d_ap_5", "d_an_1"} <= set(lines(run, "train")[0])
    assert [entry["step"] for entry in lines(run, "eval")] == [2, 4]
    assert read_image(run / "panels" / "step_0000004.png").shape == (3 * 24 + 2 * 4, 3 * 32 + 2 * 4, 3)
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4]


@pytest.mark.slow
def test_fine_tuning_begins_with_the_parameters_of_a_checkpoint(run, config_file, tmp_path, capsys):
    options = ["--run.init_from", run / "checkpoints" / "4", "--optim.learning_rate", "1e-12", "--optim.steps", "1", "--loss.cr", "0"]
    arguments = ["train", "--config", config_file, "--run.workdir", tmp_path / "w", *options]
    assert main(list(map(str, arguments))) == 0
    assert f"beginning with the parameters of {run}" in capsys.readouterr().out
    ours, theirs = (get_arrays(load_checkpoint(folder), nnx.Param) for folder in (tmp_path / "w", run / "checkpoints" / "4"))
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-9)
    assert lines(tmp_path / "w", "train")[0]["step"] == 1
    said = fails(capsys, *arguments, "--run.workdir", tmp_path / "v", "--model.width", "2")
    assert "run.init_from" in said and "model.width is 4 there and 2 here" in said


@pytest.mark.slow
def test_fine_tuning_of_a_wider_network_begins_with_the_same_output(run, config_file, tmp_path, capsys):
    """Without learning, the scores of the narrow network and of the wider one that starts from it are equal."""
    options = ["--run.init_from", run / "checkpoints" / "4", "--optim.learning_rate", "1e-12", "--optim.steps", "1", "--loss.cr", "0"]
    for width in ("4", "6"):
        arguments = ["train", "--config", config_file, "--run.workdir", tmp_path / width, *options, "--model.width", width]
        assert main(list(map(str, arguments))) == 0
    assert "from 4 to 6" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "6").config.width == 6
    narrow, wide = (lines(tmp_path / width, "eval")[0]["psnr"] for width in ("4", "6"))
    assert wide == pytest.approx(narrow, abs=0.01)


@pytest.mark.slow
def test_the_moving_average_is_evaluated_saved_and_loaded(config_file, tmp_path, capsys):
    workdir = tmp_path / "w"
    arguments = ["train", "--config", config_file, "--run.workdir", str(workdir), "--loss.cr", "0", "--optim.ema", "0.5"]
    assert main(arguments) == 0
    assert {entry["weights"] for entry in lines(workdir, "eval")} == {"ema"}
    _, config = load_with_info(workdir / "checkpoints" / "4")
    assert config["weights"] == "ema"
    evaluate = ["eval", "--checkpoint", workdir / "checkpoints" / "4", "--data", "scenes:3:32x24", "--output", tmp_path / "out"]
    assert main(list(map(str, evaluate))) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["weights"] == "ema" and summary["step"] == 4
    # The moving average can be turned off and on again.
    assert main([*arguments, "--optim.ema", "0", "--optim.steps", "5"]) == 0
    assert lines(workdir, "eval")[-1]["weights"] == "params"
    assert main([*arguments, "--optim.steps", "6"]) == 0
    said = capsys.readouterr().out
    assert "optim.ema: 0.5 -> 0.0" in said and "optim.ema: 0.0 -> 0.5" in said


def test_checkpoints_between_evaluations_are_not_the_best(config_file, tmp_path):
    options = ["--run.save_every", "1", "--loss.cr", "0"]
    assert main(["train", "--config", config_file, "--run.workdir", str(tmp_path / "w"), *options]) == 0
    kept = {int(p.name) for p in (tmp_path / "w" / "checkpoints").iterdir() if p.name.isdigit()}
    scores = {entry["step"]: entry["psnr"] for entry in lines(tmp_path / "w", "eval")}
    best = max(scores, key=scores.get)
    assert set(scores) == {2, 4} and kept == {3, 4, best}
    assert load_with_info(tmp_path / "w")[1]["step"] == best


def test_a_full_disk_is_one_line(config_file, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", tmp_path / "w", "--loss.cr", "0")
    # The required space is 1.1 times the size of the arrays, plus one megabyte.
    assert "no checkpoint can be written to" in said and "1.2 MB must be free, but the disk has 0.0 MB" in said


@pytest.mark.slow
def test_tensorboard_gets_scalars_and_panels(config_file, tmp_path):
    workdir = tmp_path / "w"
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir), "--loss.cr", "0", "--run.tensorboard", "True"]) == 0
    (events,) = (workdir / "tensorboard").iterdir()
    data = events.read_bytes()
    assert all(tag in data for tag in (b"train/l1", b"train/offset_max", b"eval/psnr", b"hazy_restored_clear"))


@pytest.mark.slow
def test_offsets_that_run_away_are_told(config_file, tmp_path, capsys):
    options = ["--optim.learning_rate", "300", "--optim.steps", "3", "--loss.cr", "0", "--run.eval_every", "9"]
    main(["train", "--config", config_file, "--run.workdir", str(tmp_path / "w"), *options])
    assert "the deformable layers look" in (said := capsys.readouterr().out) and "out of the crop of 16" in said


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(config_file, tmp_path, capsys):
    workdir = tmp_path / "w"
    options = [
        "--run.workdir",
        workdir,
        "--optim.learning_rate",
        "1e30",
        "--run.log_every",
        "10",
        "--run.eval_every",
        "1",
        "--loss.cr",
        "0",
    ]
    said = fails(capsys, "train", "--config", config_file, *options)
    assert "step 1 is not finite: loss 0." in said and "parameter norm inf, largest offset 0 pixels" in said
    assert f"no checkpoint has been written yet in {workdir}" in said
    assert said.count("scene0-") == 8
    for step in (int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()):
        arrays = get_arrays(load_checkpoint(workdir / "checkpoints" / str(step)))
        assert step < 4 and "fast_deconv.kernel" in arrays


@pytest.mark.parametrize("gone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_damaged_training_image_stops_the_run_and_loses_no_step(config_file, tmp_path, capsys, monkeypatch, gone):
    """One of 24 images, read in the third batch of 8, is damaged or missing. The state after two steps is saved, and once the image is
    repaired, the run resumes."""
    for side in ("hazy", "clear"):
        for i in range(24):
            picture(tmp_path / side / f"{i:02d}.png", (16, 16), seed=i)
    order = grain.MapDataset.source(range(24)).seed(0).shuffle()
    damaged = tmp_path / "hazy" / f"{order[20]:02d}.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    if gone:  # delete the image after the folder is listed and before it is read
        read = Pair.read

        def read_late(pair):
            pair.hazy.unlink() if pair.hazy == damaged and damaged.exists() else None
            return read(pair)

        monkeypatch.setattr(Pair, "read", read_late)
    workdir, held = tmp_path / "w", tmp_path / "held"
    picture(held / "hazy" / "a.png", (16, 16)), picture(held / "clear" / "a.png", (16, 16))
    options = ["--run.workdir", workdir, "--run.eval_every", "9", "--loss.cr", "0"]
    options += ["--data.train", f"{tmp_path / 'hazy'},{tmp_path / 'clear'}", "--data.eval", held]
    arguments = ["train", "--config", config_file, *map(str, options)]
    said = fails(capsys, *arguments)
    assert (f"there is no file {damaged}" if gone else f"{damaged.name} cannot be read") in said
    assert f"the state after step 2 is saved in {workdir}, and the same command resumes from it" in said
    monkeypatch.undo()
    assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]
    damaged.write_bytes(whole)

    def fail(*arguments):
        raise UserError("the image does not fit into memory")

    monkeypatch.setattr(trainer._Run, "_score", fail)
    said = fails(capsys, *arguments)
    assert "the image does not fit into memory; the state after step 4 is saved in" in said
    monkeypatch.undo()
    assert main(arguments) == 0
    assert "continuing from step 4" in capsys.readouterr().out
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry["kind"] == "eval"] == [4] and (workdir / "panels/step_0000004.png").is_file()
    load_checkpoint(workdir)


def test_a_damaged_evaluation_image_is_found_before_training(config_file, tmp_path, capsys):
    for side in ("hazy", "clear"):
        for i in range(3):
            picture(tmp_path / side / f"{i}.png", (20, 20))
    (tmp_path / "hazy" / "1.png").write_bytes(b"")
    folders = ["--data.eval", f"{tmp_path / 'hazy'},{tmp_path / 'clear'}"]
    assert "1.png is not an image file" in fails(capsys, "train", "--config", config_file, "--run.workdir", tmp_path / "w", *folders)
    assert not (tmp_path / "w").exists()


def test_train_refuses_bad_input(config_file, tmp_path, capsys):
    def train(*arguments):
        return fails(capsys, "train", "--config", config_file, "--run.workdir", tmp_path / "w", *arguments)

    assert "unknown setting --train.setps; nearest: --optim.steps" in train("--train.setps", "5")
    assert train("--optim.batch", "6").endswith("optim.batch (=6) must be divisible by 8 (8 devices), such as 8")
    assert "there is no VGG-19 file none.safetensors" in train("--loss.features", "none.safetensors")
    assert "smaller than a crop: data.crop (=32) must be at most 24" in train("--data.crop", "32")
    (tmp_path / "empty").mkdir()
    assert "no pairs in" in train("--data.train", tmp_path / "empty")
    picture(tmp_path / "h" / "1_1.png", (20, 20)), picture(tmp_path / "c" / "1.png", (20, 20))
    assert "there are no evaluation data" in train("--data.train", f"{tmp_path / 'h'},{tmp_path / 'c'}")
    assert not (tmp_path / "w").exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, "train", "--config", config_file, "--run.workdir", tmp_path / "file")
    assert "--config FILE is missing" in fails(capsys, "train")


# ---- eval


def test_eval_writes_scores_and_pictures(run, tmp_path, capsys):
    for i in range(3):
        picture(tmp_path / "data" / "hazy" / f"{i}_1.png", (20, 12), seed=i)
        picture(tmp_path / "data" / "clear" / f"{i}.png", (20, 12), seed=i + 10)
    out = tmp_path / "out"
    assert main(["eval", "--checkpoint", str(run), "--data", str(tmp_path / "data"), "--output", str(out), "--save-images"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    with open(out / "per_image.csv") as file:
        rows = list(csv.DictReader(file))
    assert summary["images"] == 3 and [row["image"] for row in rows] == ["0_1", "1_1", "2_1"]
    assert summary["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in rows]))
    # The score of the saved image, computed with NumPy, is the one in the table, up to rounding to 8 bits.
    restored, clear = read_image(out / "restored" / "1_1.png"), read_image(tmp_path / "data" / "clear" / "1.png")
    assert -10 * np.log10(np.mean((restored - clear) ** 2)) == pytest.approx(float(rows[1]["psnr"]), abs=0.02)
    assert (out / "panel.png").is_file()
    said = capsys.readouterr().out
    assert f"{summary['psnr']:.2f}" in said and "hazy input" in said


def test_eval_refuses_bad_input(model_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no pairs in" in fails(capsys, "eval", "--checkpoint", model_dir, "--data", tmp_path / "empty")
    assert "is not a checkpoint" in fails(capsys, "eval", "--checkpoint", tmp_path / "empty", "--data", "scenes")
    assert "there is no checkpoint folder" in fails(capsys, "eval", "--checkpoint", tmp_path / "none", "--data", "scenes")
    assert "--data" in fails(capsys, "eval")
    assert "unrecognized arguments: --chekpoint" in fails(capsys, "eval", "--data", "scenes", "--chekpoint", "x")
    for side in ("hazy", "clear"):
        picture(tmp_path / "set" / side / "1.png")
    said = fails(capsys, "eval", "--checkpoint", model_dir, "--data", tmp_path / "set", "--output", tmp_path / "set", "--save-images")
    assert "would be overwritten" in said
    assert "--save-images needs --output" in fails(capsys, "eval", "--data", "scenes", "--save-images")


def test_half_written_checkpoints_are_named(run, model_dir, tmp_path, capsys):
    shutil.copytree(run / "checkpoints" / "4", tmp_path / "run" / "checkpoints" / "4")
    for file in (tmp_path / "run" / "checkpoints" / "4" / "model").rglob("*"):
        if file.is_file():
            file.unlink()
    assert "checkpoints/4 is damaged or half written" in fails(capsys, "eval", "--checkpoint", tmp_path / "run", "--data", "scenes")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    assert "has no complete checkpoint" in fails(capsys, "eval", "--checkpoint", tmp_path / "begun", "--data", "scenes")
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:100])
    assert "model is damaged or half written" in fails(capsys, "eval", "--checkpoint", tmp_path / "model", "--data", "scenes")


# ---- dehaze


def test_dehaze_takes_files_and_folders_and_goes_on_after_a_bad_one(model_dir, tmp_path, capsys):
    picture(tmp_path / "in" / "a.png", (21, 10)), picture(tmp_path / "in" / "b.jpg", (9, 14)), picture(tmp_path / "a.bmp", (8, 8))
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG nothing")
    out = tmp_path / "out"
    arguments = ["dehaze", tmp_path / "in", tmp_path / "a.bmp", "--output", out, "--checkpoint", model_dir]
    assert "broken.png is not an image file" in fails(capsys, *arguments)
    assert {p.name: read_image(p).shape for p in out.iterdir()} == {"a_png.png": (10, 21, 3), "b.png": (14, 9, 3), "a_bmp.png": (8, 8, 3)}
    restored = nnx.jit(lambda model, hazy: model(hazy))(load_checkpoint(model_dir), read_image(tmp_path / "in" / "a.png")[None])
    expected = np.clip(restored[0], 0, 1)
    np.testing.assert_allclose(read_image(out / "a_png.png"), expected, atol=0.6 / 255)


def test_dehaze_uses_the_shipped_model(tmp_path, capsys):
    picture(tmp_path / "a.png", (16, 16))
    assert main(["dehaze", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]) == 0
    assert f"model: {DEFAULT_MODEL.name}, shipped with the package" in capsys.readouterr().out
    assert read_image(tmp_path / "out" / "a.png").shape == (16, 16, 3)


def test_dehaze_refuses_bad_input_and_keeps_the_inputs(model_dir, tmp_path, capsys):
    a = picture(tmp_path / "a.png", (16, 16))
    before = a.read_bytes()
    assert "is an input and would be replaced" in fails(capsys, "dehaze", a, "--output", tmp_path, "--checkpoint", model_dir)
    assert a.read_bytes() == before
    assert "there is no file or folder" in fails(capsys, "dehaze", tmp_path / "none.png", "--output", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "no images in" in fails(capsys, "dehaze", tmp_path / "empty", "--output", tmp_path / "o")
    (tmp_path / "file").write_text("")
    said = fails(capsys, "dehaze", a, "--output", tmp_path / "file", "--checkpoint", model_dir)
    assert "cannot be written" in said
    assert "tile (=5) must be 0 or an integer of at least" in fails(capsys, "dehaze", a, "--output", tmp_path / "o", "--tile", "5")
    for strength in ("-0.1", "1.01", "nan"):
        said = fails(capsys, "dehaze", a, "--output", tmp_path / "o", "--strength", strength)
        assert f"strength (={strength}) must be a number from 0 to 1" in said
    said = fails(capsys, "dehaze", a, "--output", tmp_path / "o", "--strength", "half")
    assert "argument --strength: invalid float value: 'half'" in said
    assert not (tmp_path / "o").exists()


def test_dehaze_applies_a_share_of_the_change(model_dir, tmp_path):
    """A strength of 0 writes the pixels of the input, and 0.5 the mean of input and result, rounded."""
    picture(tmp_path / "a.png", (21, 10))
    command = ["dehaze", str(tmp_path / "a.png"), "--checkpoint", str(model_dir), "--output"]
    for strength in ("0", "0.5", "1"):
        assert main([*command, str(tmp_path / strength), "--strength", strength]) == 0
    none, half, full = (np.asarray(Image.open(tmp_path / strength / "a.png"), np.float32) for strength in ("0", "0.5", "1"))
    np.testing.assert_array_equal(none, np.asarray(Image.open(tmp_path / "a.png")))
    assert np.abs(full - none).max() > 10
    np.testing.assert_allclose(half, (none + full) / 2, atol=0.76)  # both pictures are rounded: half a value, and half of one half


def test_usage(capsys):
    assert "invalid choice: 'nonsense'" in fails(capsys, "nonsense")
    assert "COMMAND" in fails(capsys)


# ---- report


def test_report_is_one_page_with_everything(run, tmp_path, capsys):
    workdir = tmp_path / "a run & <more>"
    shutil.copytree(run, workdir)
    assert main(["report", str(workdir)]) == 0
    path = workdir / "report.html"
    assert str(path) in capsys.readouterr().out
    page = path.read_text()
    assert "a run &amp; &lt;more&gt;" in page and "<more>" not in page
    last = lines(run, "eval")[-1]
    assert f"<td>{last['psnr']:.2f}</td><td>{last['ssim']:.4f}</td>" in page
    assert page.count("<svg") == 15 and page.count("data:image/jpeg;base64,") == 2
    assert "d_ap_5" in page and "learning_rate" in page and "jaxlib" in page and "scenes:4:32x24" in page
    assert "http" not in page.replace("<meta http-equiv=", "") and "src='data:" in page  # no external resources
    assert "is not the work directory of a run" in fails(capsys, "report", tmp_path)


def test_ticks_are_round_and_enclose():
    from aecr_jax.training.report import log_ticks, ticks

    assert ticks(0.0, 9.7) == [0, 2, 4, 6, 8, 10]
    assert ticks(5.0, 5.0)[0] <= 5 <= ticks(5.0, 5.0)[-1]
    assert log_ticks(np.array([0.03, 0.4])) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5])
    assert log_ticks(np.array([1.0, 1.0]))[0] == 1.0 and len(log_ticks(np.array([1.0, 1.0]))) > 1

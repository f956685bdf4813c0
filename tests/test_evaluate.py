"""`eval`: its files are complete, name the images, and do not depend on where the printed table goes."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_commands import fails
from test_data import picture

import aecr_jax.__main__ as program
from aecr_jax import UserError, compilation, load_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.data.reader import EvalImage
from aecr_jax.inference.evaluate import score_images
from aecr_jax.inference.restore import Restorer
from aecr_jax.inference.scores import Score, write_results


def pairs(folder, *names, size=(20, 12)):
    """Write pairs to hazy/ and clear/ in a folder and return the folder."""
    for i, name in enumerate(names):
        picture(folder / "hazy" / f"{name}.png", size, seed=i)
        picture(folder / "clear" / f"{name}.png", size, seed=i + 10)
    return folder


def rows(folder):
    with open(folder / "per_image.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def score(image, psnr, ssim, input_psnr, input_ssim):
    return Score(image, {"psnr": psnr, "ssim": ssim}, {"psnr": input_psnr, "ssim": input_ssim})


@pytest.mark.parametrize("where", ["weights", "picture"])
def test_what_is_not_finite_is_named_and_nothing_is_written(nan_model, model_dir, tmp_path, capsys, where):
    data = pairs(tmp_path / "data", "a", "b")
    if where == "picture":
        Image.fromarray(np.full((12, 20), np.nan, np.float32)).save(tmp_path / "b.tiff")
        for side in ("hazy", "clear"):
            (data / side / "b.png").unlink()
            shutil.copy(tmp_path / "b.tiff", data / side / "b.tiff")
    model = nan_model if where == "weights" else model_dir
    said = fails(capsys, "eval", "--checkpoint", model, "--data", data, "--output", tmp_path / "out")
    if where == "weights":
        assert f"model {nan_model} cannot be used: tensor down1.kernel has values that are not finite" in said
    else:
        assert f"{data / 'hazy' / 'b.tiff'} contains NaN or infinite values" in said
    assert not list((tmp_path / "out").glob("*.*"))


def test_a_score_that_is_not_finite_is_an_error_with_the_images_name(model_dir):
    """Images that a library caller passes may contain NaN, which must not enter an average unnoticed."""
    grey = np.full((12, 16, 3), 0.5, np.float32)
    bad = np.where(np.arange(16)[:, None] == 3, np.float32(np.nan), grey)
    restorer = Restorer(load_checkpoint(model_dir))
    with pytest.raises(UserError, match=r"^first: the hazy image has values that are not finite"):
        list(score_images(restorer, [EvalImage("first", bad, grey)]))
    with pytest.raises(UserError, match=r"^second: the score is not finite"):
        list(score_images(restorer, [EvalImage("second", grey, bad)]))


def test_results_never_hold_a_bare_nan(tmp_path):
    """NaN and Infinity are not valid JSON, and other parsers reject them."""
    summary = {"psnr": float("nan"), "ssim": float("inf"), "images": 1, "parts": [float("-inf"), 1.5]}
    write_results(tmp_path, [score("a", float("nan"), 0.5, 1.0, 0.5)], summary)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert read == {"psnr": None, "ssim": None, "images": 1, "parts": [None, 1.5]}
    assert rows(tmp_path)[0] == {"image": "a", "psnr": "", "ssim": "0.5", "input_psnr": "1.0", "input_ssim": "0.5"}


def test_results_are_whole_or_not_there(tmp_path, monkeypatch):
    """If the disk fills up while the table is written, the previous results stay as they were."""
    write_results(tmp_path, [score("a", 1, 1, 1, 1)], {"psnr": 1.0})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fill(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerows", fill)
    with pytest.raises(UserError, match=r"per_image\.csv cannot be written: No space left"):
        write_results(tmp_path, [score("b", 2, 2, 2, 2)], {"psnr": 2.0})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_that_are_not_utf8(model_dir, tmp_path, capsys):
    r"""The byte E9 (é in Latin-1) appears as \udce9 in all output, so os.fsencode gives the original name back."""
    name = os.fsdecode(b"caf\xe9")
    try:
        data = pairs(tmp_path / name, name, "b")
    except UserError:
        pytest.skip("this file system takes UTF-8 names only")
    out = tmp_path / "out"
    assert main(list(map(str, ["eval", "--checkpoint", model_dir, "--data", data, "--output", out, "--save-images"]))) == 0
    assert [row["image"] for row in rows(out)] == ["b", r"caf\udce9"]
    assert os.fsencode(json.loads((out / "summary.json").read_text())["data"]) == os.fsencode(data)
    assert r"caf\udce9" in capsys.readouterr().out
    assert sorted(map(os.fsencode, os.listdir(out / "restored"))) == [b"b.png", b"caf\xe9.png"]


def test_files_are_written_before_the_table_is_printed(model_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, open(writing, "w", buffering=1) as closed:
        patch.setattr(sys, "stdout", closed)
        arguments = ["eval", "--checkpoint", model_dir, "--data", pairs(tmp_path / "data", "a"), "--output", out]
        assert main(list(map(str, arguments))) == 141
    assert json.loads((out / "summary.json").read_text())["images"] == 1
    assert sorted(os.listdir(out)) == ["panel.png", "per_image.csv", "summary.json"]


_PRINT = """
import sys
import aecr_jax.__main__ as program
program._RUN["report"] = lambda options, rest: print(options.workdir) or 0
sys.exit(program.main(["report", "text"]))
"""


def printing(stdout, unbuffered):
    """Run a command that prints a line to `stdout`; return its exit status and its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", _PRINT], stdout=stdout, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_a_command_quietly(unbuffered):
    """The reader of the pipe is gone, as in `aecr_jax ... | head -1`. 141 is a shell's status for a program that SIGPIPE ended."""
    reading, writing = os.pipe()
    os.close(reading)
    assert printing(writing, unbuffered) == (141, "")
    os.close(writing)


def test_a_pipe_that_breaks_elsewhere_is_no_closed_output(monkeypatch):
    def fail(options, rest):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(program._RUN, "report", fail)
    with pytest.raises(BrokenPipeError):
        main(["report", "."])


def test_standard_output_on_a_full_disk_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        assert printing(full, "") == (2, "aecr_jax: standard output cannot be written: No space left on device\n")


@pytest.mark.parametrize("option", ["--output", "--model/--checkpoint", "--data"])
def test_empty_options_are_refused(tmp_path, capsys, monkeypatch, option):
    """An empty path would mean the current folder, the shipped model, or no output at all."""
    monkeypatch.chdir(pairs(tmp_path / "data", "a"))
    said = fails(capsys, "eval", "--data", tmp_path / "data", option.partition("/")[0], "")
    assert f"argument {option}: must not be empty" in said


def test_an_image_that_does_not_fit_into_memory_is_named(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compilation, "available_memory", lambda: 1000)
    said = fails(capsys, "eval", "--checkpoint", model_dir, "--data", pairs(tmp_path / "data", "a"))
    assert said.startswith("aecr_jax: a: it takes ") and "1e-06 GB are available" in said

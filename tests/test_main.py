"""Behaviour that all commands share: options, exit statuses, and one-line messages for errors of JAX."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import fails

import aecr_jax
from aecr_jax.__main__ import main


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"aecr-jax {aecr_jax.__version__}\n"


def test_an_option_given_twice_is_refused(config_file, capsys):
    assert "--config is given twice" in fails(capsys, "train", "--config", config_file, "--config", config_file)
    assert "--data is given twice" in fails(capsys, "eval", "--data", "a", "--data", "b")


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        ("train --config ?", "--config"),
        ("eval --data d --data-dir ?", "--data-dir"),
        ("eval --data d --data-dir ?", "--data-dir"),
        ("dehaze a ? b --output o", "INPUT"),
        ("prepare-data nh_haze --source ?", "--source"),
        ("prepare-data nh_haze --source s --data-dir ?", "--data-dir"),
        ("check-data --data d --test ?", "--test"),
        ("report ?", "WORKDIR"),
        ("convert-vgg ? --output o", "FILE"),
        ("benchmark op --output ?", "--output"),
    ],
)
def test_an_empty_argument_is_refused(tmp_path, capsys, monkeypatch, command, argument):
    """An empty argument, as from an unset shell variable, would mean the current folder, the home folder, or no test data at all."""
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, *("" if word == "?" else word for word in command.split()))
    assert f"argument {argument}: must not be empty" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        "dehaze docs/pictures/aitzgorri.jpg --output o --model ?",
        "eval --data ?",
        "train --config ?",
        "convert-vgg ? --output o.safetensors",
        "export ? --format onnx --output o",
    ],
)
def test_a_path_that_the_system_refuses_is_one_line(capsys, command):
    """A file name has at most 255 bytes on all common file systems."""
    said = fails(capsys, *command.replace("?", "a" * 300).split())
    assert "a" * 300 in said and "File name too long" in said


@pytest.mark.parametrize("model", ["shipped", pytest.param("of a run", marks=pytest.mark.slow)])
@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_one_line(request, model, platform):
    checkpoint = ["--checkpoint", request.getfixturevalue("run")] if model == "of a run" else []
    command = [sys.executable, "-m", "aecr_jax", "eval", "--data", "scenes", *checkpoint]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"aecr_jax: JAX finds no device for JAX_PLATFORMS (='{platform}')" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_to_a_full_disk_is_one_line(monkeypatch, capsys):
    """Without buffering, or when the buffer is full, the error occurs while the command runs, and nothing is left to flush."""
    monkeypatch.setitem(sys.modules["aecr_jax.__main__"]._RUN, "report", lambda *_: print("written"))
    with open("/dev/full", "wb", buffering=0) as device, io.TextIOWrapper(device, write_through=True) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["report", "x"]) == 2
    assert capsys.readouterr().err == "aecr_jax: standard output cannot be written: No space left on device\n"


def test_memory_that_runs_out_is_one_line(monkeypatch, capsys):
    def run(options, rest):
        raise MemoryError("Unable to allocate 7 GiB")

    monkeypatch.setitem(sys.modules["aecr_jax.__main__"]._RUN, "report", run)
    assert "out of memory: Unable to allocate 7 GiB; for training, reduce optim.batch" in fails(capsys, "report", "x")

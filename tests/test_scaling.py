"""What a step sends on many devices: the program for simulated devices, and the prediction."""

import json

import pytest
from test_commands import fails

from aecr_jax.__main__ import main
from aecr_jax.benchmark.scaling import CHIPS, collectives, compile_for, step_seconds
from aecr_jax.errors import UserError

PROGRAM = """
  %all-reduce.1 = f32[3,3,16,16]{3,2,1,0} all-reduce(%a), channel_id=1
  %all-reduce.2 = (f32[16]{0}, bf16[4,2]{1,0}) all-reduce-start(%b, %c)
  %done = (f32[16]{0}, bf16[4,2]{1,0}) all-reduce-done(%all-reduce.2)
  %gather = s32[] all-gather(%d)
"""


def test_bytes_of_collectives():
    """Counted by hand: 3 * 3 * 16 * 16 * 4 bytes; 16 * 4 + 8 * 2; one integer."""
    assert collectives(PROGRAM) == {"all-reduce": [9216, 80], "all-gather": [4]}


def test_predicted_seconds():
    """By hand: 197e12 * 0.5 operations per second; 2 * 1e6 bytes over 200e9 bytes per second, and two times 2 * 2 * 2 hops of 1 us."""
    compute, communicate = step_seconds(CHIPS["TPU v5e"], 16, 197e9, {"all-reduce": [999_000, 1000], "all-gather": [10**9]}, 0.5)
    assert compute == pytest.approx(2e-3)
    assert communicate == pytest.approx(1e-5 * 15 / 16 + 16e-6)
    # A torus of 16x16x8 chips: 8 + 8 + 4 hops of 1 us there, and as many back.
    assert step_seconds(CHIPS["TPU v5p"], 2048, 1, {"all-reduce": [0]}, 0.5)[1] == pytest.approx(40e-6)


@pytest.mark.slow
def test_the_prediction_is_written(config_file, tmp_path, capsys):
    output = tmp_path / "scaling.json"
    options = ["--config", config_file, "--devices", "2", "--loss.cr", "0", "--output", str(output)]
    assert main(["benchmark", "scaling", *options]) == 0
    figures = json.loads(output.read_text())
    assert [program["devices"] for program in figures["programs"]] == [2]
    assert {(row["chip"], row["devices"]) for row in figures["predicted"]} == {
        ("TPU v5e", 16), ("TPU v5e", 256), ("TPU v5p", 16), ("TPU v5p", 256), ("TPU v5p", 2048)
    }  # fmt: skip
    assert "2048 x TPU v5p, 16 images each" in capsys.readouterr().out


def test_wrong_options_are_one_line(config_file, capsys):
    command = ["benchmark", "scaling", "--config", config_file]
    assert "must be at least 1" in fails(capsys, *command, "--devices", "0")
    assert "--utilization (=2) must be" in fails(capsys, *command, "--utilization", "2")


@pytest.mark.slow
def test_a_device_receives_the_same_bytes_whatever_the_number_of_devices(config_file):
    """The programs for 8 and 64 devices reduce each gradient once, because no block is used twice, and beside them only a few values."""
    few, many = (compile_for(devices, 1, config_file, []) for devices in (8, 64))
    assert few["collectives"] == many["collectives"] and set(few["collectives"]) == {"all-reduce"}
    assert len(few["collectives"]["all-reduce"]) < 12  # in the forms for CPUs, each gradient waits for another one: 30
    assert many["macs"] == pytest.approx(8 * few["macs"], rel=1e-2)
    reduced, gradients = sum(few["collectives"]["all-reduce"]), 4 * few["parameters"]
    assert gradients <= reduced < 1.5 * gradients


@pytest.mark.slow
def test_losses_that_need_more_than_pairs_are_compiled():
    """The truth of the haze (CoarseNet's config) and other haze of the same scenes."""
    small = ["--data.crop", "32", "--data.crop_width", "32", "--model.width", "4", "--model.blocks", "1"]
    assert compile_for(2, 1, "configs/coarse_net.py", small)["images"] == 2
    rehazed = ["--loss.features", "random", "--loss.cr_negatives", "rehazed", "--loss.negatives", "2"]
    assert compile_for(2, 1, "configs/its.py", [*small, *rehazed])["images"] == 2
    with pytest.raises(UserError, match=r"data.crop \(=8\) must be at least 16"):
        compile_for(1, 1, "configs/its.py", [*small[4:], "--data.crop", "8", "--data.crop_width", "8", "--loss.features", "random"])

"""Runs that are resumed in this process: where they resume and what they refuse. `test_survival.py` kills and stops processes."""

import errno
import json
import os
import shutil
import zlib

import numpy as np
import pytest
from test_commands import fails, lines

from aecr_jax import UserError, load_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.data.sources import draw_scenes
from aecr_jax.inference.weights import load_with_info
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.training import checkpoint


def check_same_parameters(*workdirs):
    """Parameters and statistics after step 4, bit by bit."""
    ours, expected = (get_arrays(load_checkpoint(workdir / "checkpoints" / "4")) for workdir in workdirs)
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_the_same_command_again_continues(run, config_file, tmp_path, capsys):
    """A run that is stopped after 2 of 4 steps and resumed ends with bit-identical parameters to a run that was never stopped."""
    workdir = tmp_path / "stopped"
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir)]) == 0
    assert "continuing from step 2" in capsys.readouterr().out
    check_same_parameters(workdir, run)


@pytest.mark.slow
def test_statistics_freeze_after_a_step(run, config_file, tmp_path):
    """Statistics that are frozen after 2 of 4 steps stay equal to those after 2 steps of the uninterrupted run."""
    arguments = ["--run.workdir", str(tmp_path / "frozen"), "--optim.freeze_stats_after", "2"]
    assert main(["train", "--config", config_file, *arguments]) == 0
    checkpoints = (tmp_path / "frozen" / "checkpoints" / "4", run / "checkpoints" / "2", run / "checkpoints" / "4")
    frozen, at_two, at_four = (get_arrays(load_checkpoint(path)) for path in checkpoints)
    for name in ("fast_deconv.running_mean", "fast_deconv.running_deconv"):
        np.testing.assert_array_equal(frozen[name], at_two[name])
        assert np.abs(at_four[name] - at_two[name]).max() > 1e-3
    assert np.abs(frozen["down1.kernel"] - at_two["down1.kernel"]).max() > 1e-6
    shutil.rmtree(checkpoints[0])
    assert main(["train", "--config", config_file, *arguments]) == 0  # resumes from step 2
    for name, again in get_arrays(load_checkpoint(checkpoints[0])).items():
        np.testing.assert_array_equal(again, frozen[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("negatives", "after"), [("rehazed", 3), ("lagging", 2)])
def test_regularization_begins_after_a_step(negatives, after, config_file, tmp_path, capsys):
    """The first steps have L1 alone. A run that is stopped after step 2, before or at the change, and resumed ends with the same bits."""
    whole = tmp_path / "whole"
    options = ["--loss.cr_negatives", negatives, "--loss.cr_after", str(after), "--optim.ema", "0.9"]
    options += ["--loss.cr_layers", "relu1_2,relu1_1", "--loss.cr_weights", "1,0.5", "--model.dfe", "none", "--model.fast_deconv", "False"]
    train = ["train", "--config", config_file, *options]
    assert main([*train, "--run.workdir", str(whole)]) == 0
    assert f"step {after + 1}: contrastive regularization begins" in capsys.readouterr().out
    logged = [{"cr", "grad_norm_cr", "grad_norm_l1"} & set(line) for line in lines(whole, "train")]
    assert logged == [set()] * after + [{"cr", "grad_norm_cr", "grad_norm_l1"}] * (4 - after)
    workdir = tmp_path / "resumed"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    assert main([*train, "--run.workdir", str(workdir)]) == 0
    assert "continuing from step 2" in capsys.readouterr().out
    check_same_parameters(workdir, whole)


@pytest.mark.slow
def test_an_average_that_equals_the_network_gives_no_negatives(run, config_file, tmp_path, capsys):
    """A run without a moving average cannot go on with its restorations as negatives at once: the ratio would divide by 1e-7."""
    shutil.copytree(run, tmp_path / "run")
    train = [
        "train",
        "--config",
        config_file,
        "--run.workdir",
        str(tmp_path / "run"),
        "--loss.cr_negatives",
        "lagging",
        "--optim.ema",
        "0.9",
    ]
    assert "loss.cr_after (=4) must be more than 4, the step of the last checkpoint" in fails(capsys, *train, "--loss.cr_after", "4")
    assert main([*train, "--loss.cr_after", "5"]) == 0


def test_a_checkpoint_from_before_a_setting(run, config_file, tmp_path, capsys):
    """A setting that a checkpoint does not contain had its default, so the run resumes and reports no change."""
    shutil.copytree(run, tmp_path / "old")
    (file,) = (tmp_path / "old" / "checkpoints" / "4" / "config").rglob("metadata")
    config = json.loads(file.read_text())
    del config["optim"]["optimizer"], config["optim"]["freeze_stats_after"], config["haze"]
    file.write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "4" / "json_checksums")  # even older checkpoints lack these
    train = ["train", "--config", config_file, "--run.workdir", str(tmp_path / "old")]
    assert main(train) == 0
    assert "continuing from step 4" in (said := capsys.readouterr().out) and "setting changed" not in said
    assert "optim.optimizer is adam there and muon here" in fails(capsys, *train, "--optim.optimizer", "muon")


@pytest.mark.slow
def test_a_run_with_muon_continues_too(config_file, tmp_path, capsys):
    """A run with Muon resumes bit-exactly; Adam, whose state is different, is refused."""
    whole, stopped = ["--run.workdir", str(tmp_path / "whole")], ["--run.workdir", str(tmp_path / "stopped")]
    train = ["train", "--config", config_file, "--loss.cr", "0", "--optim.optimizer", "muon", "--optim.steps", "4"]
    assert main([*train, *whole]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
    assert main([*train, *stopped, "--optim.optimizer", "adam"]) == 2
    assert "optim.optimizer is muon there and adam here" in capsys.readouterr().err
    assert main([*train, *stopped]) == 0
    check_same_parameters(tmp_path / "stopped", tmp_path / "whole")


def empty_all(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def flip_one_bit(folder):
    """Flip a bit near the middle of the largest file, which has the values; tensorstore itself would not report it.

    The file has a few unused bytes, whose place differs from run to run. A flip there is undone, and another place is tried.
    """
    file = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    for place in (8, 7, 9, 6, 10):
        data = bytearray(whole)
        data[place * len(data) // 16] ^= 0x10
        file.write_bytes(data)
        try:
            load_checkpoint(folder.parent)
        except UserError:
            return
    raise AssertionError(f"five flipped bits of {file} were read without a word")


# If one read fails, orbax leaves the others unfinished.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [pytest.param(empty_all, marks=pytest.mark.slow), flip_one_bit])
def test_a_damaged_checkpoint_is_skipped(run, config_file, tmp_path, capsys, caplog, damage):
    workdir = tmp_path / "damaged"
    shutil.copytree(run, workdir)
    damage(workdir / "checkpoints" / "4" / "model")
    with pytest.raises(UserError, match="is damaged or half written"):
        load_checkpoint(workdir / "checkpoints" / "4")
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir)]) == 0
    assert "checkpoints/4 cannot be read" in caplog.text
    assert "continuing from step 2" in capsys.readouterr().out
    load_checkpoint(workdir / "checkpoints" / "4")  # it was written again
    assert (workdir / "damaged-checkpoint-4").is_dir()
    damage(workdir / "checkpoints" / "4" / "model")  # a second time
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir)]) == 0
    assert (workdir / "damaged-checkpoint-4-2").is_dir()
    assert [entry["step"] for entry in lines(workdir, "train")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "content", [b"", *(pytest.param(content, marks=pytest.mark.slow) for content in (b"x", b"{}", b'{"psnr": "high"}')), b'{"psnr": 99.5}']
)
def test_damaged_metrics_are_a_damaged_checkpoint(run, config_file, tmp_path, capsys, caplog, content):
    """orbax reads the metrics of every checkpoint first and fails at damaged ones; the last content is valid but was not written."""
    workdir = tmp_path / "damaged"
    shutil.copytree(run, workdir)
    (workdir / "checkpoints" / "4" / "metrics" / "metrics").write_bytes(content)
    assert load_with_info(workdir)[1]["step"] == 2
    assert "checkpoints/4 is ignored" in caplog.text
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir)]) == 0
    assert "continuing from step 2" in capsys.readouterr().out and "checkpoints/4 cannot be read" in caplog.text
    assert (workdir / "damaged-checkpoint-4").is_dir() and load_with_info(workdir / "checkpoints" / "4")[1]["step"] == 4


def test_an_unreadable_checkpoint_is_not_taken_for_a_damaged_one(run, config_file, tmp_path, capsys, monkeypatch):
    """Permissions, devices and memory say nothing about the file: it stays where it is, and the run resumes once they are put right."""
    workdir = shutil.copytree(run, tmp_path / "w")
    before = sorted(path.relative_to(workdir) for path in workdir.rglob("*"))

    def refuse(folder, item):
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(checkpoint, "read_json", refuse)
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", workdir)
    assert "checkpoints/4 cannot be read: " in said and "put that right, and the same command resumes" in said
    assert sorted(path.relative_to(workdir) for path in workdir.rglob("*") if path.name != "lock.json") == before
    monkeypatch.undo()
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir)]) == 0
    assert "continuing from step 4" in capsys.readouterr().out


def test_a_run_replaces_no_model_and_no_other_config(model_dir, config_file, tmp_path, capsys):
    """A run has a `config.json` of its own, and a model in its folder would be loaded in place of its checkpoints."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"name": "of another program"}')
    for folder, words in ((model, "holds a model"), (other, "has a config.json that is not of a run and would be replaced")):
        before = (folder / "config.json").read_bytes()
        said = fails(capsys, "train", "--config", config_file, "--run.workdir", folder)
        assert f"run.workdir (={folder}) {words}: choose another folder" in said
        assert (folder / "config.json").read_bytes() == before


def test_a_run_does_not_begin_anew_if_all_metrics_are_damaged(run, config_file, tmp_path, capsys):
    """A run that started again would truncate its log and still count as resumed."""
    workdir = shutil.copytree(run, tmp_path / "damaged")
    for file in (workdir / "checkpoints").glob("*/metrics/metrics"):
        file.write_bytes(b"")
    before = sorted(path.relative_to(workdir) for path in workdir.rglob("*"))
    log = (workdir / "metrics.jsonl").read_text()
    for command in (["train", "--config", config_file, "--run.workdir", workdir], ["eval", "--checkpoint", workdir, "--data", "scenes"]):
        assert f"no checkpoint in {workdir / 'checkpoints'} can be read" in fails(capsys, *command)
    assert sorted(path.relative_to(workdir) for path in workdir.rglob("*")) == before
    assert (workdir / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize(("item", "before", "after"), [("input", '"images":32', '"images":33'), ("config", '"width":4', '"width":5')])
def test_an_edited_part_of_a_checkpoint_is_found(run, config_file, tmp_path, capsys, caplog, item, before, after):
    """Checksums detect edits. With a position that is off by one image, training would silently continue with other batches."""
    workdir = tmp_path / "edited"
    shutil.copytree(run, workdir)
    file = workdir / "checkpoints" / "4" / item / "metadata"
    text = file.read_text().replace(": ", ":")
    assert before in text
    file.write_text(text.replace(before, after))
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir)]) == 0
    assert f"checkpoints/4 cannot be read ({item} differs from what was written)" in caplog.text
    assert "continuing from step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_version_0_1_0_goes_on(run, config_file, tmp_path, capsys):
    """Checkpoints of version 0.1.0 identify the data by their names and the first image, and have no checksums of their JSON parts."""
    workdir = tmp_path / "old"
    shutil.copytree(run, workdir)
    names = "\n".join(f"scene0-{i:04d}" for i in range(4)).encode()
    first = np.ascontiguousarray(draw_scenes(0, 1, (24, 32))[0].clear)
    for step, images in ((2, 16), (4, 32)):
        folder = workdir / "checkpoints" / str(step)
        shutil.rmtree(folder / "json_checksums")
        data = f"4 images (checksum {zlib.crc32(first.tobytes(), zlib.crc32(names)):08x})"
        (folder / "input" / "metadata").write_text(json.dumps({"images": images, "data": data}))
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir), "--optim.steps", "5"]) == 0
    assert "continuing from step 4" in capsys.readouterr().out
    position = json.loads((workdir / "checkpoints" / "5" / "input" / "metadata").read_text())
    assert position["images"] == 40 and position["data"].startswith("4 images (names ")


def test_a_folder_whose_name_is_not_utf_8_is_refused(run, config_file, tmp_path, capsys):
    """orbax cannot write checkpoints there and would fail only at the first checkpoint, after training had begun."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    message = r"caf\udce9/w cannot hold checkpoints: its full path must be valid UTF-8"
    assert message in fails(capsys, "train", "--config", config_file, "--run.workdir", folder / "w")
    assert not folder.exists()
    shutil.copytree(run, folder / "w")
    assert message in fails(capsys, "eval", "--checkpoint", folder / "w", "--data", "scenes")


@pytest.mark.parametrize("line", ['["a list"]}', '{"kind": "train"}', '{"step": 1}', '{"step": "first"}', "{}}"])
def test_a_damaged_log_is_one_line(run, config_file, tmp_path, capsys, line):
    shutil.copytree(run, tmp_path / "w")
    (tmp_path / "w" / "metrics.jsonl").write_text(line + "\n")
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", tmp_path / "w")
    assert "metrics.jsonl is damaged" in said and "move it away to continue" in said


def test_another_network_does_not_continue_a_run(run, config_file, capsys):
    before = (run / "config.json").read_text()
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", run, "--model.width", "2")
    assert "holds another run: model.width is 4 there and 2 here; choose another run.workdir" in said
    assert (run / "config.json").read_text() == before


def test_weight_decay_does_not_begin_in_the_middle_of_a_run(run, config_file, capsys):
    """The state of the optimizer would have another structure, for which the checkpoints were taken for damaged."""
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", run, "--optim.weight_decay", "0.1")
    assert "holds another run: optim.weight_decay is 0.0 there and 0.1 here, of which one is 0; choose another run.workdir" in said


def test_a_complete_run_only_evaluates(run, config_file, capsys):
    assert main(["train", "--config", config_file, "--run.workdir", str(run), "--optim.clip_norm", "1", "--optim.offset_rate", "0.5"]) == 0
    assert "continuing from step 4" in (said := capsys.readouterr().out) and "done: step 4" in said
    assert "setting changed since then: optim.clip_norm: 0.0 -> 1.0" in said


def test_other_data_or_another_seed_do_not_continue_a_run(run, config_file, capsys):
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", run, "--data.train", "scenes:5:32x24")
    assert "holds another run: it was trained on 4 images (names" in said and "but the data are now 5 images" in said
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", run, "--run.seed", "1")
    assert "run.seed is 0 there and 1 here" in said
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", run, "--haze.beta", "0.6,1.2")
    assert "haze.beta is [0.6, 1.8] there and [0.6, 1.2] here" in said

"""The fingerprint by which a run recognises its training data: it changes with any file, and not with the location of the folder."""

import re
import shutil

import pytest
from test_commands import fails
from test_data import picture

from aecr_jax.__main__ import main
from aecr_jax.data import fingerprint
from aecr_jax.data.builders import open_dataset, prepare
from aecr_jax.data.folders import find_dataset
from aecr_jax.errors import UserError


@pytest.fixture
def pairs(tmp_path):
    for i in range(4):
        picture(tmp_path / "set" / "hazy" / f"{i}.png", (24, 20), seed=i)
        picture(tmp_path / "set" / "clear" / f"{i}.png", (24, 20), seed=i + 10)
    return tmp_path / "set"


def parts(folder):
    return dict(re.findall(r"(\w+) ([0-9a-f]{12})", str(fingerprint.fingerprint(find_dataset(folder)))))


@pytest.mark.parametrize("whole", [True, False])
def test_each_kind_of_file_counts_by_itself(pairs, tmp_path, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    before = parts(pairs)
    assert set(before) == {"names", "hazy", "clear"}
    shutil.copytree(pairs, tmp_path / "elsewhere")
    assert parts(tmp_path / "elsewhere") == before
    picture(pairs / "clear" / "3.png", (24, 20), seed=99)  # not the first image
    changed = parts(pairs)
    assert {kind for kind in before if before[kind] != changed[kind]} == {"clear"}
    picture(pairs / "hazy" / "2.png", (24, 20), seed=98)
    assert {kind for kind in before if before[kind] != parts(pairs)[kind]} == {"hazy", "clear"}


def test_one_byte_counts_in_a_small_set(pairs):
    before = parts(pairs)
    path = pairs / "hazy" / "1.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    assert parts(pairs)["hazy"] != before["hazy"]


def test_depth_and_names_count(tmp_path):
    for i in range(2):
        picture(tmp_path / "rgb" / f"{i}.png", seed=i), picture(tmp_path / "depth" / f"{i}.png", seed=i + 5)
    before = parts(tmp_path)
    assert set(before) == {"names", "clear", "depth"}
    picture(tmp_path / "depth" / "1.png", seed=9)
    after = parts(tmp_path)
    assert after["clear"] == before["clear"] and after["depth"] != before["depth"] and after["names"] == before["names"]
    for kind in ("rgb", "depth"):
        (tmp_path / kind / "1.png").rename(tmp_path / kind / "2.png")
    assert parts(tmp_path)["names"] != before["names"]


def test_a_built_data_set_counts_by_its_record_files(tmp_path):
    for i in range(3):
        picture(tmp_path / "NH-HAZE" / f"{i}_hazy.png", seed=i), picture(tmp_path / "NH-HAZE" / f"{i}_GT.png", seed=i + 5)
    prepare("nh_haze", tmp_path, tmp_path / "built")
    before = str(fingerprint.fingerprint(open_dataset("nh_haze", tmp_path / "built")[0]))
    assert re.fullmatch(r"3 images \(names [0-9a-f]{12}, records [0-9a-f]{12}\)", before)
    (shard,) = (tmp_path / "built").rglob("*.array_record*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert str(fingerprint.fingerprint(open_dataset("nh_haze", tmp_path / "built")[0])) != before


def test_another_clear_image_of_a_hazy_one_is_noticed(tmp_path):
    """At first, both hazy images share the clear image 1. Then the second one gets its own, because an exact match of names comes first."""
    picture(tmp_path / "hazy" / "1_1.png"), picture(tmp_path / "hazy" / "1_2.png", seed=1), picture(tmp_path / "clear" / "1.png", seed=2)
    samples = find_dataset(tmp_path)
    saved = fingerprint.fingerprint(samples)
    (tmp_path / "w").mkdir()
    saved.write(tmp_path / "w")
    picture(tmp_path / "clear" / "1_2.png", seed=3)
    samples = find_dataset(tmp_path)
    with pytest.raises(UserError, match="but the data are now 2 images"):
        fingerprint.check_same_data(str(saved), fingerprint.fingerprint(samples), samples, tmp_path / "w")


def test_a_run_does_not_go_on_with_replaced_images(pairs, config_file, tmp_path, capsys):
    """All hazy images and all clear images but the first are replaced by others of the same names, which version 0.1.0 did not notice."""
    options = ["--data.train", pairs, "--data.holdout", "1", "--loss.cr", "0"]
    arguments = ["train", "--config", config_file, "--run.workdir", tmp_path / "w", "--optim.steps", "1", *options]
    assert main(list(map(str, arguments))) == 0
    for i in range(3):
        picture(pairs / "hazy" / f"{i}.png", (24, 20), seed=i + 50)
    for i in range(1, 3):
        picture(pairs / "clear" / f"{i}.png", (24, 20), seed=i + 60)
    said = fails(capsys, *arguments)
    files = "hazy 0.png, hazy 1.png, hazy 2.png and 2 more have changed since"
    assert re.search(rf"holds another run: it was trained on 3 images \(names .*\), of which {files}", said)
    (tmp_path / "w" / "data.json").unlink()
    said = fails(capsys, *arguments)
    assert re.search(r"holds another run: it was trained on 3 images \(names .*\), but the data are now 3 images \(names .*\)", said)

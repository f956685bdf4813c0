"""prepare-data on damaged and incomplete copies, on full disks and after kills; built data sets whose files are damaged."""

import fcntl
import os
import resource
import signal
import subprocess
import sys

import pytest
from test_commands import fails
from test_data import picture
from test_datasets import make, mistakes

from aecr_jax import UserError
from aecr_jax.__main__ import main
from aecr_jax.data.builders import open_dataset, prepare
from aecr_jax.data.check import check_data


def copy_of_nh_haze(root, count=6, size=(64, 48)):
    """Write `count` of the 55 pairs."""
    for i in range(1, count + 1):
        picture(root / "NH-HAZE" / f"{i:02d}_hazy.png", size, seed=i), picture(root / "NH-HAZE" / f"{i:02d}_GT.png", size, seed=100 + i)
    return root


@pytest.fixture
def built(tmp_path, capsys):
    """Build a data set of six pairs and return its folder."""
    prepare("nh_haze", copy_of_nh_haze(tmp_path / "source"), tmp_path / "built")
    capsys.readouterr()
    return tmp_path / "built" / "nh_haze" / "1.0.0"


def written(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- building


@pytest.mark.parametrize("damage", ["empty", "cut", "size"])
def test_a_damaged_image_ends_the_build(tmp_path, capsys, damage):
    image = copy_of_nh_haze(tmp_path) / "NH-HAZE" / "04_GT.png"
    if damage == "size":
        picture(image, (30, 20))
    else:
        image.write_bytes(image.read_bytes()[: 3000 if damage == "cut" else 0])
    line = fails(capsys, "prepare-data", "nh_haze", "--source", tmp_path, "--data-dir", tmp_path / "built")
    assert (
        str(image) in line
        and ("sizes must be equal" if damage == "size" else "cannot be read" if damage == "cut" else "is not an image") in line
    )
    assert list((tmp_path / "built").iterdir()) == []
    # With the image repaired, the data set is built in the same folder.
    copy_of_nh_haze(tmp_path)
    assert main(["prepare-data", "nh_haze", "--source", str(tmp_path), "--data-dir", str(tmp_path / "built")]) == 0


def test_an_empty_source_is_one_line(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    message = fails(capsys, "prepare-data", "nh_haze", "--source", tmp_path / "source", "--data-dir", tmp_path / "built")
    assert "source is empty: unpack the archives of nh_haze there" in message and not (tmp_path / "built").exists()


def test_images_without_clear_ones_are_read_too(tmp_path, capsys):
    make(tmp_path, ["HSTS/synthetic/synthetic/0586.jpg", "HSTS/synthetic/original/0586.jpg", "HSTS/real-world/a.jpg"])
    (tmp_path / "HSTS" / "real-world" / "a.jpg").write_bytes(b"")
    assert "real-world/a.jpg is not an image" in fails(
        capsys, "prepare-data", "reside/hsts", "--source", tmp_path, "--data-dir", tmp_path / "built"
    )


def test_an_incomplete_copy_is_built_with_a_warning(tmp_path, capsys):
    assert main(["prepare-data", "nh_haze", "--source", str(copy_of_nh_haze(tmp_path)), "--data-dir", str(tmp_path / "built")]) == 0
    said = capsys.readouterr().out
    assert "warning: nh_haze is not complete: NTIRE 2020 has 55 hazy and 55 clear images, but this copy has 6 and 6" in said
    assert f"nh_haze (NTIRE 2020): full 6 in {tmp_path / 'built' / 'nh_haze' / '1.0.0'}" in said
    make(tmp_path, ["OTS/hazy/0005_0.8_0.04.jpg", "OTS/clear/0005.jpg"])
    prepare("reside/ots", tmp_path, tmp_path / "built")
    published = "RESIDE-v0 has 313950 hazy and 8970 clear images or RESIDE-beta has 72135 hazy and 2061 clear images"
    assert f"{published}, but this copy has 1 and 1" in capsys.readouterr().out
    prepare("dense_haze", whole_dense_haze(tmp_path), tmp_path / "built")
    assert "warning" not in capsys.readouterr().out


def whole_dense_haze(root):
    make(root, [f"Dense-Haze/{i:02d}_{kind}.png" for i in range(1, 56) for kind in ("hazy", "GT")])
    return root


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys):
    """The size of files is limited to 70,000 bytes, which gives the same kind of array_record error as a full disk."""
    copy_of_nh_haze(tmp_path, size=(200, 150))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
    try:
        line = fails(capsys, "prepare-data", "nh_haze", "--source", tmp_path, "--data-dir", tmp_path / "built")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"nh_haze cannot be prepared: {tmp_path / 'built' / 'nh_haze' / '1.0.0'}: " in line and "File too large" in line
    assert list((tmp_path / "built").iterdir()) == []


def test_what_a_killed_build_left_is_mentioned_and_removed(tmp_path, capsys):
    copy_of_nh_haze(tmp_path)
    code = """
import os, signal, sys
from aecr_jax.data import builders
reads = []
def read_pixels(path, read=builders.read_pixels):
    reads.append(path)
    if len(reads) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(path)
builders.read_pixels = read_pixels
builders.prepare("nh_haze", *sys.argv[1:])
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path / "built")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "built" / "nh_haze").iterdir()
    assert left.name.startswith("incomplete.")
    assert f"which also removes {left}, left by an interrupted build" in fails(
        capsys, "eval", "--data", "nh_haze", "--data-dir", tmp_path / "built"
    )
    others = [left.with_name("incomplete.mine"), left.with_name("notes")]  # these do not belong to a build
    for other in others:
        other.mkdir()
    # While another process builds, the folder stays.
    descriptor = os.open(left.parent, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    prepare_again = ["prepare-data", "nh_haze", "--source", str(tmp_path), "--data-dir", str(tmp_path / "built")]
    assert f"another process is preparing data in {left.parent}" in fails(capsys, *prepare_again) and left.exists()
    os.close(descriptor)
    assert main(prepare_again) == 0
    assert f"removed {left}, left by an interrupted build" in capsys.readouterr().out
    assert sorted(path.name for path in left.parent.iterdir()) == ["1.0.0", "incomplete.mine", "notes"]


# ---- reading


DAMAGES = {
    "no info": ("dataset_info.json", lambda data: None),
    "empty info": ("dataset_info.json", lambda data: b""),
    "half of the info": ("dataset_info.json", lambda data: data[: len(data) // 2]),
    "other info": ("dataset_info.json", lambda data: b'{"name": 3, "splits": {}}'),
    "list as info": ("dataset_info.json", lambda data: b"[]"),
    "no metadata": ("metadata.json", lambda data: None),
    "other metadata": ("metadata.json", lambda data: b'{"names": {"full": ["01"]}}'),
    "no records": ("nh_haze-full.array_record-00000-of-00001", lambda data: None),
    "empty records": ("nh_haze-full.array_record-00000-of-00001", lambda data: b""),
    "half of the records": ("nh_haze-full.array_record-00000-of-00001", lambda data: data[: len(data) // 2]),
    "records without an end": ("nh_haze-full.array_record-00000-of-00001", lambda data: data[:-100]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_a_built_data_set_are_named(tmp_path, built, config_file, capsys, damage):
    file, change = DAMAGES[damage]
    data = change((built / file).read_bytes())
    (built / file).unlink()
    if data is not None:
        (built / file).write_bytes(data)
    data_dir = built.parents[1]
    for command in (
        ("eval", "--data", "nh_haze", "--data-dir", data_dir),
        ("check-data", "--data", "nh_haze", "--data-dir", data_dir, "--output", tmp_path / "s.png"),
        ("train", "--config", config_file, "--data.train", "nh_haze", "--data.data_dir", data_dir, "--run.workdir", tmp_path / "run"),
    ):
        line = fails(capsys, *command)
        assert f"{built / file} is damaged or missing (" in line and "run prepare-data again" in line
    assert "has already been prepared" in fails(capsys, "prepare-data", "nh_haze", "--source", tmp_path / "source", "--data-dir", data_dir)


def test_fewer_records_than_the_info_says_are_noticed(tmp_path, built):
    file = "nh_haze-full.array_record-00000-of-00001"
    prepare("nh_haze", copy_of_nh_haze(tmp_path / "fewer", 4), tmp_path / "other")
    (tmp_path / "other" / "nh_haze" / "1.0.0" / file).replace(built / file)
    with pytest.raises(UserError, match=rf"{file} is damaged or missing \(it has 4 records instead of 6\)"):
        open_dataset("nh_haze", built.parents[1])


def test_a_damaged_record_is_named_where_it_is_read(built, tmp_path):
    """Bytes of a hazy image are damaged; the index at the end of the file is intact, so opening succeeds."""
    file = built / "nh_haze-full.array_record-00000-of-00001"
    data = bytearray(file.read_bytes())
    pixels = (tmp_path / "source" / "NH-HAZE" / "03_hazy.png").read_bytes()
    # Search for pieces, because the file has headers between its blocks.
    pieces = (pixels[start : start + 100] for start in range(1000, len(pixels) - 200, 100))
    place = next(place for piece in pieces if (place := data.find(piece)) >= 0)
    data[place : place + 100] = bytes(100)
    file.write_bytes(data)
    records, _ = open_dataset("nh_haze", built.parents[1])
    records[5].read()
    with pytest.raises(UserError, match=rf"{file.name} is damaged: nh_haze 03_hazy cannot be read"):
        records[2].read()
    assert f"1 images cannot be used: {file} is damaged: nh_haze 03_hazy" in mistakes(check_data(records))[0]

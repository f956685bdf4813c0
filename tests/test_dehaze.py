"""`dehaze` on folders as users have them: existing results, unusual names, entries that are not images, too little memory."""

import gc
import os
import resource
import shutil

import jax
import numpy as np
import pytest
from conftest import forget_checksum
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_commands import fails
from test_data import picture

from aecr_jax import UserError, compilation, load_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.data.images import read_image
from aecr_jax.inference.restore import Restorer
from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig
from aecr_jax.networks.arrays import get_arrays


def messages(capsys):
    """Return the messages that a command wrote to standard error."""
    return [line.partition("aecr_jax: ")[2] for line in capsys.readouterr().err.splitlines() if "aecr_jax: " in line]


# ---- existing results


def test_existing_results_are_refused_before_anything_is_computed(tmp_path, capsys):
    """The checkpoint does not exist, which would be the error if the results were checked later."""
    picture(tmp_path / "in" / "photo.jpg", (16, 12)), picture(tmp_path / "in" / "other.jpg", (16, 12))
    unrelated = picture(tmp_path / "out" / "photo.png", (8, 8))
    before = unrelated.read_bytes()
    said = fails(capsys, "dehaze", tmp_path / "in", "--output", tmp_path / "out", "--checkpoint", tmp_path / "none")
    assert said.startswith(f"aecr_jax: {unrelated} already exists (1 of 2 results)")
    assert "--overwrite" in said and "--skip-existing" in said
    assert unrelated.read_bytes() == before and os.listdir(tmp_path / "out") == ["photo.png"]


def test_existing_results_are_replaced_or_skipped_on_request(model_dir, tmp_path, capsys):
    for name in "ab":
        picture(tmp_path / "in" / f"{name}.jpg", (16, 12))
    out = tmp_path / "out"
    arguments = list(map(str, ["dehaze", tmp_path / "in", "--output", out, "--checkpoint", model_dir]))
    assert main(arguments) == 0
    restored = {name: (out / f"{name}.png").read_bytes() for name in "ab"}
    picture(out / "a.png", (8, 8))
    mine = (out / "a.png").read_bytes()
    (out / "b.png").unlink()
    capsys.readouterr()
    assert main([*arguments, "--skip-existing"]) == 0
    assert f"1 images written to {out}, 1 skipped because their results exist" in capsys.readouterr().out
    assert (out / "a.png").read_bytes() == mine and (out / "b.png").read_bytes() == restored["b"]
    assert main([*arguments, "--overwrite"]) == 0
    assert (out / "a.png").read_bytes() == restored["a"] and (out / "b.png").read_bytes() == restored["b"]
    assert "not allowed with argument" in fails(capsys, *arguments, "--overwrite", "--skip-existing")


def test_nothing_left_to_restore_is_success(tmp_path, capsys):
    picture(tmp_path / "a.jpg", (16, 12)), picture(tmp_path / "out" / "a.png", (8, 8))
    assert main(["dehaze", str(tmp_path / "a.jpg"), "--output", str(tmp_path / "out"), "--skip-existing"]) == 0
    assert f"0 images written to {tmp_path / 'out'}, 1 skipped because their results exist" in capsys.readouterr().out


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--skip-existing"]])
def test_an_input_is_never_replaced(model_dir, tmp_path, capsys, option):
    """Neither its own result, nor a link to its folder, nor another input of the same stem may replace an input."""
    a = picture(tmp_path / "in" / "a.png", (16, 12))
    before = a.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output in (tmp_path / "in", tmp_path / "link"):
        assert "is an input and would be replaced" in fails(capsys, "dehaze", a, "--output", output, "--checkpoint", model_dir, *option)
    b, c = picture(tmp_path / "a.bmp", (16, 12)), picture(tmp_path / "in" / "a_bmp.png", (16, 12))
    assert "is an input and would be replaced" in fails(capsys, "dehaze", b, a, c, "--output", tmp_path / "in", *option)
    assert a.read_bytes() == before


def test_a_folder_in_the_place_of_a_result_is_refused(tmp_path, capsys):
    a = picture(tmp_path / "a.jpg", (16, 12))
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert "a.png is a folder" in fails(capsys, "dehaze", a, "--output", tmp_path / "out", "--overwrite")


@pytest.mark.parametrize("option", ["--output", "--model/--checkpoint"])
def test_empty_options_are_refused(tmp_path, capsys, monkeypatch, option):
    """An empty path, which a shell passes for an unset variable, would mean the current folder or the shipped model."""
    a = picture(tmp_path / "a.jpg", (16, 12))
    monkeypatch.chdir(shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-here")))
    assert f"argument {option}: must not be empty" in fails(capsys, "dehaze", a, "--output", tmp_path / "out", option.partition("/")[0], "")
    assert "argument INPUT: must not be empty" in fails(capsys, "dehaze", "", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists() and os.listdir() == ["a.jpg"]


# ---- entries of a folder


def test_what_is_no_picture_is_skipped_and_the_others_go_on(model_dir, tmp_path, capsys):
    folder = tmp_path / "in"
    picture(folder / "a.jpg", (16, 12)), picture(folder / "z.jpg", (16, 12))
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nothing")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    assert main(list(map(str, ["dehaze", folder, "--output", tmp_path / "out", "--checkpoint", model_dir]))) == 2
    said = messages(capsys)
    assert len(said) == 4
    for name in ("loop.png", "dangling.png", "folder.png", "pipe.png"):
        assert sum(message.startswith(f"{folder / name} ") for message in said) == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "z.png"]


def test_names_at_the_limit_of_the_file_system(model_dir, tmp_path, capsys, monkeypatch):
    """A name may have 255 bytes. An image whose result has a name of this length is restored; one whose result would have a longer name,
    because "_jpg" or ".png" is added, is skipped before anything is computed."""
    folder = tmp_path / "in"
    picture(folder / ("n" * 251 + ".jpg"), (16, 12))
    picture(folder / ("o" * 247 + ".jpg"), (16, 12)), picture(folder / ("o" * 247 + ".tiff"), (16, 12))
    picture(folder / "z.jpg", (16, 12))
    restored = []
    monkeypatch.setattr(Restorer, "__call__", lambda self, hazy: restored.append(hazy) or hazy)
    bare = tmp_path / ("m" * 252)
    shutil.copy(folder / "z.jpg", bare)
    assert main(list(map(str, ["dehaze", folder, bare, "--output", tmp_path / "out", "--checkpoint", model_dir]))) == 2
    said = messages(capsys)
    assert len(said) == 2 and all("File name too long" in message for message in said)
    assert said[0].startswith(f"{folder / ('o' * 247 + '.tiff')}: ") and said[1].startswith(f"{bare}: ")
    assert sorted(os.listdir(tmp_path / "out")) == ["n" * 251 + ".png", "o" * 247 + "_jpg.png", "z.png"] and len(restored) == 3
    assert "there is no file or folder nnn" in fails(capsys, "dehaze", "n" * 300, "--output", tmp_path / "out")


def test_names_that_are_not_utf8(model_dir, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    try:
        picture(tmp_path / "in" / f"{name}.jpg", (16, 12))
    except UserError:
        pytest.skip("this file system takes UTF-8 names only")
    picture(tmp_path / "in" / f"{name}.bmp", (16, 12))
    assert main(list(map(str, ["dehaze", tmp_path / "in", "--output", tmp_path / "out", "--checkpoint", model_dir]))) == 0
    assert sorted(map(os.fsencode, os.listdir(tmp_path / "out"))) == [b"caf\xe9_bmp.png", b"caf\xe9_jpg.png"]
    assert r"caf\udce9.jpg -> " in capsys.readouterr().out


def test_renamed_results_and_skipped_sub_folders_are_told(model_dir, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "in" / "out"
    for name in ("x.bmp", "x.tiff", "X.webp", "y.png"):
        picture(folder / name, (16, 12))
    for name in ("sub1", "sub2", ".hidden"):
        (folder / name).mkdir()
    arguments = list(map(str, ["dehaze", folder, "--output", out, "--checkpoint", model_dir]))
    assert main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    arrows = [line for line in said if " -> " in line]
    names = [("X.webp", "X_webp.png"), ("x.bmp", "x_bmp.png"), ("x.tiff", "x_tiff.png")]  # sorted by name as in the C locale
    assert arrows == [f"{folder / source} -> {out / target}" for source, target in names]
    assert f"{folder} has 2 sub-folders that were not searched: to dehaze their images, add --recursive" in said
    assert main([*arguments, "--overwrite"]) == 0  # the output folder is now inside the input folder and is not reported
    assert "has 2 sub-folders" in capsys.readouterr().out
    (tmp_path / "only" / "sub").mkdir(parents=True)
    said = fails(capsys, "dehaze", tmp_path / "only", "--output", out)
    assert "no images in" in said and "1 sub-folder" in said


def test_no_result_is_taken_for_that_of_an_image_that_was_added(model_dir, tmp_path, capsys):
    """`a.jpg` is added beside `a.png`, whose result exists: its own result is written, and that of `a.png` stays as it is."""
    folder, out = tmp_path / "in", tmp_path / "out"
    picture(folder / "a.png", (16, 12))
    command = list(map(str, ["dehaze", folder, "--output", out, "--checkpoint", model_dir]))
    assert main(command) == 0
    first = (out / "a.png").read_bytes()
    picture(folder / "a.jpg", (20, 12))
    assert main([*command, "--skip-existing"]) == 0
    assert sorted(os.listdir(out)) == ["a.png", "a_jpg.png", "a_png.png"]
    assert read_image(out / "a_jpg.png").shape == (12, 20, 3) and (out / "a_png.png").read_bytes() == first == (out / "a.png").read_bytes()


def test_a_folder_for_results_is_not_named_like_an_image(model_dir, tmp_path, capsys):
    a = picture(tmp_path / "a.jpg", (16, 12))
    message = fails(capsys, "dehaze", a, "--output", tmp_path / "b.png", "--checkpoint", model_dir)
    assert "names an image, but results are written to a folder" in message and os.listdir(tmp_path) == ["a.jpg"]


# ---- values that are not finite


def test_a_model_that_is_not_finite_is_named(nan_model, tmp_path, capsys):
    a = picture(tmp_path / "a.jpg", (16, 12))
    said = fails(capsys, "dehaze", a, "--output", tmp_path / "out", "--checkpoint", nan_model)
    assert str(nan_model) in said and "down1.kernel" in said and "not finite" in said
    assert not (tmp_path / "out").exists()


def test_a_restored_picture_that_is_not_finite_is_named_and_not_written(model_dir, tmp_path, capsys):
    """The weights are finite, but products overflow in the second layer, and infinity - infinity is NaN."""
    folder = shutil.copytree(model_dir, tmp_path / "huge_model")
    arrays = load_file(folder / "model.safetensors")
    save_file({name: np.asarray(array * np.float32(1e30)) for name, array in arrays.items()}, folder / "model.safetensors")
    forget_checksum(folder)
    picture(tmp_path / "in" / "a.png", (16, 12))
    assert main(list(map(str, ["dehaze", tmp_path / "in", "--output", tmp_path / "out", "--checkpoint", folder]))) == 2
    (said,) = messages(capsys)
    assert said.startswith(f"{tmp_path / 'in' / 'a.png'}: ") and "not finite" in said
    assert os.listdir(tmp_path / "out") == []


def test_library_callers_get_the_same_checks(nan_model, model_dir):
    with pytest.raises(UserError, match=r"down1\.kernel has values that are not finite"):
        load_checkpoint(nan_model)
    model = load_checkpoint(model_dir)
    restorer = Restorer(model)
    arrays = get_arrays(model)
    with pytest.raises(UserError, match=r"up1\.bias has values that are not finite"):
        restorer.set_arrays(arrays | {"up1.bias": arrays["up1.bias"] + np.inf})
    hazy = np.full((12, 16, 3), 0.5, np.float32)
    assert np.isfinite(restorer(hazy)).all()  # the refused arrays were not used
    hazy[3, 4, 0] = np.nan
    with pytest.raises(UserError, match="the hazy image has values that are not finite"):
        restorer(hazy)


# ---- memory


@pytest.fixture
def little_memory(monkeypatch):
    """Limit memory to 300 kB. The small model fits with an image of 32x24, but not with one of 300x300, which alone takes 1 MB."""
    monkeypatch.setattr(compilation, "available_memory", lambda: 300_000)


def test_a_picture_that_does_not_fit_into_memory_is_named_before_it_is_computed(model_dir, tmp_path, capsys, little_memory):
    folder, out = tmp_path / "in", tmp_path / "out"
    picture(folder / "large.png", (300, 300)), picture(folder / "small.png", (32, 24))
    assert main(list(map(str, ["dehaze", folder, "--output", out, "--checkpoint", model_dir, "--tile", "0"]))) == 2
    (said,) = messages(capsys)
    assert said.startswith(f"{folder / 'large.png'}: it takes ") and "0.0003 GB are available" in said
    assert "use --tile 256" in said
    assert os.listdir(out) == ["small.png"]


def test_the_estimate_is_what_xla_plans(model_dir, monkeypatch):
    """At 64x64 the network keeps at least its widest activations, 64 x 64 x 2 values of 4 bytes, and the output."""
    restorer = Restorer(load_checkpoint(model_dir))
    hazy = np.full((64, 64, 3), 0.5, np.float32)
    monkeypatch.setattr(compilation, "available_memory", lambda: 0)
    with pytest.raises(compilation.NotEnoughMemory) as caught:
        restorer(hazy)
    assert 64 * 64 * (2 + 3) * 4 < caught.value.needed < 100 * 64 * 64 * 4
    monkeypatch.setattr(compilation, "available_memory", lambda: caught.value.needed)
    assert restorer(hazy).shape == hazy.shape


def test_an_accelerator_without_memory_is_the_same_line(model_dir, tmp_path, capsys, monkeypatch):
    def run_out(self, *arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 51200000000 bytes.")

    monkeypatch.setattr(jax.stages.Compiled, "__call__", run_out)
    a = picture(tmp_path / "a.png", (300, 300))
    out = tmp_path / "out"
    assert main(list(map(str, ["dehaze", a, "--output", out, "--checkpoint", model_dir, "--tile", "0"]))) == 2
    (said,) = messages(capsys)
    assert said.startswith(f"{a}: it takes ") and "use --tile 256" in said and os.listdir(out) == []

    def fail(self, *arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(jax.stages.Compiled, "__call__", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        Restorer(load_checkpoint(model_dir))(np.zeros((8, 8, 3), np.float32))


def test_limits_of_the_process_and_its_control_group_count(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "_CONTROL_GROUP", tmp_path)
    free = compilation.available_memory()
    assert 0 < free < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 50000\n")
    assert compilation.available_memory() > 1e8
    (tmp_path / "memory.max").write_text("71000\n")
    assert compilation.available_memory() == 70000
    vms = compilation.psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (vms, vms))
    assert compilation.available_memory() < 70000


@pytest.mark.slow
def test_programs_of_many_sizes_do_not_stay(monkeypatch):
    """The backend counts compiled programs: after 5 sizes only the last 2 are left, and none once the restorer is deleted."""
    assert compilation.PROGRAMS == 16
    monkeypatch.setattr(compilation, "PROGRAMS", 2)

    def alive():
        gc.collect()  # free programs of earlier tests
        return jax.devices()[0].client.live_executables()

    model = AECRNet(AECRNetConfig(width=2, blocks=1, deform_layers=1), rngs=nnx.Rngs(0))
    restorer = Restorer(model)
    images = [np.random.default_rng(i).random((8, 8 + 4 * i, 3), np.float32) for i in range(5)]
    before = len(alive())
    restored = [restorer(image) for image in images]
    assert len(alive()) - before == 2
    np.testing.assert_array_equal(restorer(images[3]), restored[3])
    # A program that was dropped and compiled again gives the same bits, and so does an ordinary jit.
    np.testing.assert_array_equal(restorer(images[0]), restored[0])
    assert len(alive()) - before == 2
    model.eval()
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(jax.jit(lambda s, x: nnx.merge(graph, s)(x[None])[0].clip(0, 1))(state, images[1]), restored[1])
    del restorer
    assert len(alive()) - before <= 1  # the ordinary jit


def test_a_restorer_takes_the_arrays_of_a_mesh(model_dir):
    """A restorer accepts arrays that are replicated over all devices, as in evaluation during training."""
    model = load_checkpoint(model_dir)
    hazy = np.random.default_rng(0).random((8, 12, 3), np.float32)
    expected = Restorer(model)(hazy)
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec())
    replicated = jax.device_put(nnx.state(model), everywhere)
    nnx.update(model, replicated)
    restorer = Restorer(model)
    np.testing.assert_array_equal(restorer(hazy), expected)
    restorer.set_arrays(get_arrays(model))
    np.testing.assert_array_equal(restorer(hazy), expected)


def test_a_line_break_in_a_name_makes_no_second_line(tmp_path, capsys, model_dir):
    (tmp_path / "a\nb.jpg").write_text("no picture")
    arguments = ["dehaze", tmp_path / "a\nb.jpg", "--output", tmp_path / "out", "--checkpoint", model_dir]
    assert rf"{tmp_path}/a\nb.jpg is not an image file" in fails(capsys, *arguments)
    assert rf"there is no file or folder {tmp_path}/c\nd" in fails(capsys, "dehaze", tmp_path / "c\nd", *arguments[2:])

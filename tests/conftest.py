"""Strict JAX settings for all tests: 8 simulated CPU devices, and no silent rank promotion."""

import gc
import json
import os
import shutil
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# The tests compile a lot and compute little, so compilation time matters more than the speed of the code. One test sets TEST_XLA_FLAGS
# to run other tests with other flags.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"  # a training step compiles in a third of the time
if version("jaxlib") in ("0.10.2", "0.11.2", "0.12.0.1"):
    # Every command takes this kind of convolution away, unless JAX has already started or the flag is set. Set here, with XLA's own value,
    # it is the same in this process, whichever test comes first, and in the processes that tests start, so that their results can be
    # compared bit by bit. Without it, and without optimization, some convolutions would take minutes.
    _FLAGS += " --xla_cpu_experimental_ynn_fusion_type=+individual_convolution"
os.environ["XLA_FLAGS"] = os.environ.get("TEST_XLA_FLAGS", _FLAGS)

# All tests share one compilation cache, also across processes: pytest's workers inherit the folder from the process that starts them.
_CACHE = "" if "PYTEST_XDIST_WORKER" in os.environ else tempfile.mkdtemp(prefix="aecr_jax-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE or os.environ["JAX_COMPILATION_CACHE_DIR"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import numpy as np
import pytest
from browser import address, browser, page, site  # noqa: F401
from PIL import Image

jax.config.update("jax_numpy_rank_promotion", "raise")
# Traces make and keep millions of objects: looking for cycles among them often, and noting the lines that called each operation in the
# program, would take a noticeable part of the time.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)


# Test files that take minutes run first, so that no worker starts one of them when the others have finished. The first of them compiles
# programs that test_step then reads from the cache.
_LONG_FILES = ("test_compilation", "test_survival", "test_commands", "test_resume", "test_benchmark", "test_step", "test_networks")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _LONG_FILES.index(item.path.stem) if item.path.stem in _LONG_FILES else len(_LONG_FILES))


def pytest_unconfigure():
    if _CACHE:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture
def x64():
    """Enable float64 for the duration of a test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


_TINY = """
from aecr_jax.training.config import Config, LossConfig, OptimConfig, RunConfig
from aecr_jax.data.sources import DataConfig
from aecr_jax.networks.aecr_net import AECRNetConfig
config = Config(
    model=AECRNetConfig(width=4, blocks=1),
    data=DataConfig(train="scenes:4:32x24", crop=16, threads=1),
    loss=LossConfig(features="random"),
    optim=OptimConfig(steps=4, batch=8, schedule="constant"),  # one program for any number of steps
    run=RunConfig(log_every=1, eval_every=2, eval_images=3),
)
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(_TINY)
    return str(path)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Export a small model and return its folder."""
    from flax import nnx

    from aecr_jax.inference.weights import save_checkpoint
    from aecr_jax.networks.aecr_net import AECRNet, AECRNetConfig

    path = tmp_path_factory.mktemp("models") / "small"
    save_checkpoint(AECRNet(AECRNetConfig(width=2, blocks=1), rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture
def nan_model(model_dir, tmp_path):
    """Return a copy of the small model that has one NaN in its weights."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(model_dir, tmp_path / "nan_model")
    arrays = load_file(folder / "model.safetensors")
    arrays["down1.kernel"][0, 0, 0, 0] = np.nan
    save_file(arrays, folder / "model.safetensors")
    forget_checksum(folder)
    return folder


def forget_checksum(folder):
    """Remove the checksum of an exported model, as in models of early versions, so that changed weights load."""
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, config_file):
    """Train for four steps and return the work directory, which no test changes."""
    from aecr_jax.__main__ import main

    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "--config", config_file, "--run.workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """Return a copy of the trained run; the tests of one file share it, and some of them resume it."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("copies") / "tiny")


class Unchanged:
    """Takes the place of a restorer and returns images as they are."""

    needs_tiles = False

    def __call__(self, hazy):
        return jax.numpy.asarray(hazy)

    def splits(self, height, width, tile):
        return False


@pytest.fixture
def dehaze(tmp_path, monkeypatch):
    """Return a function that runs the command `dehaze` on `tmp_path / "in"` with a network that changes nothing, and returns its status."""
    from aecr_jax.__main__ import main
    from aecr_jax.inference import photographs

    monkeypatch.setattr(photographs, "load_with_info", lambda model: (None, {"about": {"name": "none"}}))
    monkeypatch.setattr(photographs, "Restorer", lambda model: Unchanged())
    (tmp_path / "in").mkdir()

    def run(*options, output=tmp_path / "out"):
        return main(list(map(str, ["dehaze", tmp_path / "in", "--output", output, *options])))

    return run


@pytest.fixture
def landscape(tmp_path):
    """Write a picture with a blue sky above a noisy ground, which begins at half the height, and return its folder."""
    folder = tmp_path / "outdoor"
    for i in range(2):
        image = np.zeros((60, 80, 3), np.float32)
        image[:30] = np.array([0.45, 0.6, 0.9]) + np.linspace(0, 0.1, 30)[:, None, None]
        image[30:] = np.random.default_rng(i).random((30, 80, 3)) * [0.6, 0.7, 0.3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder

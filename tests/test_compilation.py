import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aecr_jax import compilation
from aecr_jax.compilation import tidy

_COUNT = """
import sys, json
import jax
events = {}
jax.monitoring.register_event_listener(lambda event, **_: events.update({event: events.get(event, 0) + 1}))
from aecr_jax.__main__ import main
status = main(sys.argv[1:])
print(json.dumps([status] + [events.get("/jax/compilation_cache/" + name, 0) for name in ("compile_requests_use_cache", "cache_hits")]))
"""


def environment(tmp_path):
    """Return the environment of a user, without the settings of the tests."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "XLA_FLAGS"}
    return mine | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path, config_file):
    def start(workdir):
        command = ["train", "--config", config_file, "--run.workdir", str(tmp_path / workdir), "--optim.steps", "2"]
        done = subprocess.run(
            [sys.executable, "-c", _COUNT, *command], env=environment(tmp_path), capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    status, requests, _ = start("first")
    assert status == 0 and requests > 10
    assert start("second") == [0, requests, requests]


def test_torn_and_old_entries_are_removed(tmp_path, monkeypatch):
    """JAX writes the file `-atime` after the entry itself and updates it at each use, so an entry without one is incomplete."""
    monkeypatch.setattr(compilation, "CACHE_ENTRIES", 2)
    for name in ("whole-cache", "whole-atime", "torn-cache", "other"):
        (tmp_path / name).write_bytes(b"x")
    for age in (1, 2):
        (tmp_path / f"old{age}-cache").write_bytes(b"x")
        (tmp_path / f"old{age}-atime").write_bytes(b"x")
        os.utime(tmp_path / f"old{age}-atime", (1e9 - age, 1e9 - age))
    tidy(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != ".lockfile")
    assert left == ["old1-atime", "old1-cache", "other", "whole-atime", "whole-cache"]


def test_settings_of_the_user_stay(tmp_path, monkeypatch):
    """A JAX_COMPILATION_CACHE_DIR that is set, as in all tests, is kept, and so is a flag that XLA_FLAGS already has."""
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=dot")
    compilation.set_up()
    assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type=dot"


def test_flag_is_for_releases_that_know_it(monkeypatch):
    """XLA aborts the process at an unknown flag, and takes a value without a leading dash for the name of a file."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--a=b")
    monkeypatch.setattr(compilation, "version", lambda package: "0.99.0")
    compilation.set_up()
    assert os.environ["XLA_FLAGS"] == "--a=b"
    monkeypatch.setattr(compilation, "version", lambda package: "0.10.2")
    monkeypatch.setattr(compilation.platform, "machine", lambda: "x86_64")
    compilation.set_up()
    assert os.environ["XLA_FLAGS"] == "--a=b --xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    compilation.set_up()
    assert os.environ["XLA_FLAGS"] == "flags.txt"
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    compilation.set_up()
    assert "XLA_FLAGS" not in os.environ


def test_no_home_is_no_cache(tmp_path):
    code = "import pathlib\n"
    code += "def no_home(path): raise RuntimeError('Could not determine home directory.')\n"
    code += "pathlib.Path.expanduser = no_home\n"
    code += "import jax\nfrom aecr_jax.compilation import set_up\nset_up()\nprint(jax.config.jax_compilation_cache_dir)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_a_folder_that_cannot_be_written_is_no_cache(tmp_path):
    blocked = tmp_path / "cache"
    blocked.write_text("a file")
    code = "import jax\nfrom aecr_jax.compilation import set_up\nset_up()\nprint(jax.config.jax_compilation_cache_dir, jax.devices())"
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("None")


_SHARE = """
import sys, json
from pathlib import Path
import jax
events = {}
jax.monitoring.register_event_listener(lambda event, **_: events.update({event: events.get(event, 0) + 1}))
from aecr_jax.compilation import set_up, share_cache
set_up()
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
advice = share_cache(Path(sys.argv[3]))
mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
split = jax.NamedSharding(mesh, jax.P("data"))
x = jax.make_array_from_process_local_data(split, jax.numpy.ones(8).__array__())
jax.jit(lambda x: (x @ x).sum())(x).block_until_ready()
print(json.dumps([advice] + [events.get("/jax/compilation_cache/" + name, 0) for name in ("compile_requests_use_cache", "cache_hits")]))
"""


@pytest.mark.slow
def test_the_programs_of_two_processes_are_in_the_work_directory(tmp_path):
    """Each process has a home folder of its own, as on separate hosts.

    On a CPU, JAX's key of a program depends on the process (its topology's fingerprint differs), so only process 0 finds programs.
    """

    def start():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for i in range(2):
            own = environment(tmp_path) | {"XDG_CACHE_HOME": str(tmp_path / f"home{i}")}
            command = [sys.executable, "-c", _SHARE, str(port), str(i), str(tmp_path / "run")]
            processes.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True))
        printed = [process.communicate(timeout=300)[0] for process in processes]
        return [json.loads(text.splitlines()[-1]) for text in printed]

    first = start()
    assert [advice for advice, _, _ in first] == ["", ""] and first[0][1] > 0
    (_, requests, hits), _ = start()
    assert hits == requests > 0
    assert not list(tmp_path.glob("home*/**/*-cache")) and list((tmp_path / "run" / "compiled").rglob("*-cache"))


def test_a_cache_that_cannot_be_shared_says_what_to_set(tmp_path, monkeypatch):
    import jax

    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "compiled").write_text("a file")
    assert compilation.share_cache(tmp_path) == ""  # the user has chosen a folder, as all tests do
    monkeypatch.setattr(compilation, "_automatic", True)
    said = compilation.share_cache(tmp_path)
    assert said.startswith(f"compiled programs cannot be kept in {tmp_path / 'compiled'}")
    assert said.endswith("set JAX_COMPILATION_CACHE_DIR to a folder that all processes share")
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_numbers_of_the_official_code_with_the_flags_of_the_commands():
    """The comparisons with PyTorch also pass as users run: with optimization, which other tests turn off, and with the CPU flag."""
    flags = "--xla_force_host_platform_device_count=8"
    if compilation.version("jaxlib") in compilation._MEASURED:
        flags += " --xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    chosen = [
        "test_model.py::test_official_forward",
        "test_deform_conv.py::test_equals_torchvision[float32-0.0001-unit]",
        "test_step.py::test_first_step_of_the_official_code_in_float32",
    ]
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-n", "0", "--durations=0", *(str(folder / name) for name in chosen)]
    done = subprocess.run(command, env=os.environ | {"TEST_XLA_FLAGS": flags}, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stdout[-3000:]

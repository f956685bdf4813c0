"""Runs in separate processes resume bit-exactly after they are killed, stopped, or run out of disk space."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_data import picture

from aecr_jax import load_checkpoint

ROOT = Path(__file__).parents[1]
CONFIG = """
from aecr_jax.training.config import Config, LossConfig, OptimConfig, RunConfig
from aecr_jax.data.sources import DataConfig
from aecr_jax.networks.aecr_net import AECRNetConfig
config = Config(
    model=AECRNetConfig(width=2, blocks=1, dfe="none"),
    data=DataConfig(train="scenes:4:24x16", crop=16, threads=1),
    loss=LossConfig(cr=0),
    optim=OptimConfig(steps=1000, batch=2, schedule="constant", ema=0.9),
    run=RunConfig(log_every=1, eval_every=1000, eval_images=2, save_every=1),
)
"""

LIMITED = """
import resource, sys
from aecr_jax.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


def start(config, workdir, *options, devices=1, limit=None, cache=None, **process):
    """Start training in a separate process.

    Args:
      devices: number of simulated devices.
      limit: size in bytes of the largest file that the process may write.
      cache: folder for a compilation cache of its own.
    """
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
        "PYTHONPATH": str(ROOT),
    }
    if cache:
        del environment["JAX_COMPILATION_CACHE_DIR"]
        environment["XDG_CACHE_HOME"] = str(cache)
    command = [sys.executable, "-c", LIMITED.format(limit=limit)] if limit else [sys.executable, ROOT / "train.py"]
    command += ["--config", config, "--run.workdir", workdir, *options]
    return subprocess.Popen(
        [str(c) for c in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **process
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err[-2000:]
    return out + err


def steps(workdir):
    """Return the last step in the log."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for(process, workdir, step, seconds=90.0):
    end = time.monotonic() + seconds
    while steps(workdir) < step:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1][-2000:]
        time.sleep(0.02)


def last(workdir):
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def checksums(workdir, step):
    """Return the checksums of all arrays of a checkpoint: parameters, their average, statistics, optimizer state, step."""
    folder = workdir / "checkpoints" / str(step) / "checksums"
    found = [json.loads(path.read_text()) for path in folder.iterdir() if path.name == "metadata"]
    assert len(found) == 1 and len(found[0]["model"]) > 40
    return found[0]


@pytest.mark.slow
def test_killed_at_20_random_moments(config, tmp_path):
    """A run resumes after SIGKILL at any moment. Checkpoints follow every step, so some kills hit one that is being written; the final
    checkpoint is bit-identical to that of an uninterrupted run."""
    workdirs, rng, half_written, seen = [tmp_path / "a", tmp_path / "b"], random.Random(0), 0, 0
    for _ in range(10):
        processes = [start(config, workdir) for workdir in workdirs]  # two runs at a time, one per core
        for process, workdir in zip(processes, workdirs):
            wait_for(process, workdir, seen + 1)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
            process.communicate()
            half_written += any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())
        seen = max(map(steps, workdirs))
    assert half_written > 0
    end = seen + 1
    runs = [start(config, workdir, "--optim.steps", end) for workdir in workdirs]
    runs.append(start(config, tmp_path / "alone", "--optim.steps", end, "--run.save_every", 1000))
    for process in runs:
        finish(process)
    for workdir in workdirs:
        assert end > 10 and checksums(workdir, end) == checksums(tmp_path / "alone", end)
        logged = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
        assert logged == list(range(1, end + 1))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(config, tmp_path):
    """Two steps on two devices and one step on one device equal three steps on one device, up to the order of sums."""
    assert "2 device(s)" in finish(start(config, tmp_path / "w", "--optim.steps", 2, devices=2))
    said = finish(start(config, tmp_path / "w", "--optim.steps", 3))
    assert "continuing from step 2" in said and "1 device(s)" in said
    finish(start(config, tmp_path / "alone", "--optim.steps", 3))
    x = np.random.default_rng(0).random((1, 16, 16, 3), np.float32)
    ours, expected = (load_checkpoint(tmp_path / run / "checkpoints" / "3")(x) for run in ("w", "alone"))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_and_says_so(config, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = start(config, workdir, "--run.save_every", 1000)
    wait_for(process, workdir, 3)
    process.send_signal(number)
    said = finish(process, {signal.SIGTERM: 75, signal.SIGINT: 130}[number])
    step = last(workdir)
    assert f"aecr_jax: stopped by {number.name} after step {step}; the state is saved in {workdir}" in said and "Traceback" not in said
    options = ["--optim.steps", step + 2, "--run.save_every", 1000]
    for process in [start(config, folder, *options) for folder in (workdir, tmp_path / "alone")]:
        finish(process)
    assert checksums(workdir, step + 2) == checksums(tmp_path / "alone", step + 2)


@pytest.mark.slow
def test_a_disk_that_takes_no_checkpoint_ends_the_run(config, tmp_path):
    """Files are limited to 4 kB, as by a quota: the log fits, but neither a checkpoint nor a compiled program does.

    Standard error has exactly one line, although other threads fail at the same time.
    """
    process = start(config, tmp_path / "w", limit=4000, cache=tmp_path / "cache")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(said.splitlines()) == 1 and said.startswith("aecr_jax: no checkpoint can be written"), said
    assert "File too large" in said


def start_two(config, workdir, *options, own=((), ())):
    """Start two processes of one run; `own` has the separate options of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = ["--run.coordinator", f"127.0.0.1:{port}", "--run.processes", 2, *options]
    return [start(config, workdir, *together, "--run.process_id", i, *own[i]) for i in range(2)]


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on(config, tmp_path):
    workdir = tmp_path / "killed"
    processes = start_two(config, workdir, "--run.save_every", 2)
    wait_for(processes[0], workdir, 5)
    for process in processes:
        process.kill()
        process.communicate()
    end = last(workdir) + 3
    options = ["--optim.steps", end, "--run.eval_every", end]
    resumed = [finish(process) for process in start_two(config, workdir, *options)]
    alone = [finish(process) for process in start_two(config, tmp_path / "alone", *options, "--run.save_every", 1000)]
    assert checksums(workdir, end) == checksums(tmp_path / "alone", end)
    assert f"done: step {end}" in resumed[0] and "continuing from step" in resumed[0]
    assert "done" not in alone[1] and "PSNR" not in alone[1]  # only process 0 prints progress
    # Two processes with one device each give the values of one process, up to the order of sums.
    finish(start(config, tmp_path / "one", *options, "--run.save_every", 1000))
    one, two = ([json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "alone"))
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["kind"]) == (b["step"], b["kind"])
        assert all(abs(a[name] - b[name]) <= 1e-4 * abs(a[name]) for name in ("l1", "psnr", "ssim", "images") if name in a)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both(config, tmp_path):
    finish(start(config, tmp_path / "first", "--optim.steps", 1))
    processes = start_two(config, tmp_path / "w", "--run.save_every", 1000, "--run.init_from", tmp_path / "first")
    wait_for(processes[0], tmp_path / "w", 3)
    processes[1].send_signal(signal.SIGTERM)
    said, _ = (finish(process, 75) for process in processes)
    assert "stopped by SIGTERM" in said
    assert last(tmp_path / "w") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("receivers", [[0], [1], [0, 1]])
def test_ctrl_c_with_two_processes_saves(config, tmp_path, receivers):
    """A launcher forwards Ctrl-C to one or all of its processes. All save after the same step, and the run resumes with the same bits."""
    workdir = tmp_path / "stopped"
    processes = start_two(config, workdir, "--run.save_every", 1000)
    wait_for(processes[0], workdir, 3)
    for i in receivers:
        processes[i].send_signal(signal.SIGINT)
    said = [finish(process, 130 if i in receivers else 75) for i, process in enumerate(processes)]
    step = last(workdir)
    for i, text in enumerate(said):
        assert f"stopped by {'SIGINT' if i in receivers else 'SIGTERM'} after step {step}" in text and "Traceback" not in text
    if receivers == [1]:
        options = ["--optim.steps", step + 2, "--run.save_every", 1000]
        for folder in (workdir, tmp_path / "alone"):
            for process in start_two(config, folder, *options):
                finish(process)
        assert checksums(workdir, step + 2) == checksums(tmp_path / "alone", step + 2)


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_both(config, tmp_path):
    """Process 1 has a copy of the data with one damaged image. It names the image, and neither process waits for the other."""
    for folder in ("whole", "broken"):
        for side in ("hazy", "clear"):
            for i in range(8):
                picture(tmp_path / folder / side / f"{i}.png", (16, 16), seed=i)
    (tmp_path / "broken" / "hazy" / "5.png").write_bytes(b"")
    own = [["--data.train", tmp_path / f] for f in ("whole", "broken")]
    held = ["--data.eval", tmp_path / "whole"]
    processes = start_two(config, tmp_path / "w", *held, own=own)
    other, broken = (finish(process, 2) for process in processes)
    assert "broken/hazy/5.png is not an image file" in broken
    assert other.count("aecr_jax: ") == 1 and "another one of this run has ended" in other


@pytest.mark.slow
def test_ctrl_c_with_worker_processes_saves(config, tmp_path):
    """A terminal sends SIGINT to the whole process group; the workers ignore it, and the training process handles it."""
    workdir = tmp_path / "w"
    process = start(config, workdir, "--data.workers", 1, "--run.save_every", 1000, start_new_session=True)
    wait_for(process, workdir, 3)
    os.killpg(process.pid, signal.SIGINT)
    assert "stopped by SIGINT" in finish(process, 130) and last(workdir) >= 3

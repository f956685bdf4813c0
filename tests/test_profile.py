"""What a run shows of the machine: profiles, speed, the time of its start, stalled steps, its devices and flags."""

import json
import os
import re
import socket
import time
import types

import jax
import numpy as np
import pytest
from test_commands import lines

from aecr_jax import UserError
from aecr_jax.__main__ import main
from aecr_jax.networks.aecr_net import AECRNetConfig
from aecr_jax.networks.ffa_net import FFANetConfig
from aecr_jax.networks.macs import network_macs
from aecr_jax.processes import count_hosts
from aecr_jax.training import meter
from aecr_jax.training.config import Config, DataConfig, LossConfig, OptimConfig, RunConfig
from aecr_jax.training.flops import device_peak, peak_flops
from aecr_jax.training.initial import make_loss
from aecr_jax.training.mesh import make_mesh, replicate, shard_batch
from aecr_jax.training.profile import profiler_server
from aecr_jax.training.runlog import topology
from aecr_jax.training.step import compile_train_step, init_state


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, config_file):
    """Train for three steps, of which the second is traced, and return the work directory."""
    workdir = tmp_path_factory.mktemp("runs") / "profiled"
    options = ["--optim.steps", "3", "--run.profile", "2:2", "--run.eval_every", "9"]
    os.environ["LIBTPU_INIT_ARGS"] = "--none=1"
    try:
        assert main(["train", "--config", config_file, "--run.workdir", str(workdir), *options]) == 0
    finally:
        del os.environ["LIBTPU_INIT_ARGS"]
    return workdir


# ---- profiles


def test_a_trace_has_the_steps_and_their_parts(profiled):
    """The trace holds the operations of the traced step, and the program with the scope of each operation."""
    (file,) = (profiled / "profile").rglob("*.xplane.pb")
    events = [event for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert steps == [2]
    assert any(dict(event.stats).get("hlo_module") == "jit_train_step" for event in events if not event.name.startswith("$"))
    scopes = {part for name in re.findall(rb"jit\(train_step\)/[ -~]+", file.read_bytes()) for part in re.split(rb"[/()]", name)}
    assert {b"encoder", b"fa_blocks", b"dfe", b"decoder", b"vgg", b"optimizer"} <= scopes


def test_steps_to_trace():
    assert list(RunConfig(profile="3:5").profiled) == [3, 4, 5] and list(RunConfig().profiled) == []
    for wrong in ("3", "5:3", "0:2", "a:b", "-1:2", "1:2:3"):
        with pytest.raises(UserError, match=re.escape(f"run.profile (='{wrong}') must be FROM:TO")):
            Config(run=RunConfig(profile=wrong)).validate()
    with pytest.raises(UserError, match=r"run.profile \(=2:9\) must end at optim.steps \(=8\) at the latest"):
        Config(optim=OptimConfig(steps=8), run=RunConfig(profile="2:9")).validate()


def test_the_profiler_listens_at_its_port():
    with socket.socket() as used:
        used.bind(("", 0))
        used.listen()
        port = used.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"run.profiler_port \(={port}\) cannot be used: .*; choose another port"),
            profiler_server(port),
        ):
            pass
    with profiler_server(port), socket.create_connection(("localhost", port), timeout=10):
        pass
    with profiler_server(0):
        pass


# ---- speed


def test_log_lines_have_the_speed(profiled):
    logged = lines(profiled, "train")
    macs = [line["tflop_per_second"] * line["seconds_per_step"] * 1e12 / 2 for line in logged]
    # All steps have the same number of multiply-adds, more than the three of a forward pass and its gradient.
    assert macs[1:] == pytest.approx(macs[:1] * 2) and macs[0] > 3 * 8 * network_macs(AECRNetConfig(width=4, blocks=1), 16, 16)
    for line in logged:
        assert line["images_per_second"] * line["seconds_per_step"] == pytest.approx(8)
        assert 0 < line["model_flops_utilization"] < 1


def test_speed_by_hand(monkeypatch):
    """Two steps of eight images and of 2 and 3 GMAC take 4 s: 10 GFLOP in 4 s are 0.0025 TFLOP/s, a quarter of a peak of 0.01."""
    clock = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    measured = meter.Meter(None, [], 7, saved=0, peak=1e10)
    finite = {name: jax.numpy.ones(()) for name in ("total", "grad_norm", "param_norm")}
    for step, macs in ((8, 2 * 10**9), (9, 3 * 10**9)):
        clock[0] += 2
        measured.add(step, finite, np.arange(8), macs)
    values = measured.read(8)
    assert (values["images_per_second"], values["seconds_per_step"], values["tflop_per_second"]) == pytest.approx((4, 2, 0.0025))
    assert values["model_flops_utilization"] == pytest.approx(0.25)
    assert meter.describe_speed(values) == "4.0 images/s, 2 s/step, 0.0025 TFLOP/s, 25.0% of peak"
    del values["model_flops_utilization"]  # of an unknown device
    assert meter.describe_speed(values) == "4.0 images/s, 2 s/step, 0.0025 TFLOP/s"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("TPU v4 lite", None),
    ],
)
def test_peaks_of_devices(kind, peak):
    """The peaks are those of the data sheets; a device that has no entry of its own must not get that of another."""
    assert device_peak(kind) == peak


def test_peak_of_all_devices():
    """A table's peak counts once for each device, the measured one of a CPU once for each host, because its devices share the cores."""
    chips = [types.SimpleNamespace(platform="tpu", device_kind="TPU v4")] * 8
    mesh = types.SimpleNamespace(devices=np.array(chips), size=8)
    assert peak_flops(mesh, 2, "bfloat16") == 8 * 275e12
    assert 1e8 < peak_flops(make_mesh(), count_hosts(), "float32") < 1e14


def count(model, monkeypatch):
    """Return the multiply-adds of a step on two images of 16x16 pixels, without compiling it."""
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: print)
    config = Config(model=model, data=DataConfig(crop=16), loss=LossConfig(cr=0), optim=OptimConfig(batch=2))
    mesh = make_mesh(jax.devices()[:1])
    batch = shard_batch({name: np.zeros((2, 16, 16, 3), np.float32) for name in ("hazy", "clear")}, mesh)
    return compile_train_step(config, make_loss(config), mesh, replicate(init_state(config), mesh), batch)[1]


def test_multiply_adds_of_a_step(monkeypatch):
    """The gradient of FFA-Net costs twice the forward pass, but the first convolution, 3x3 with 3 inputs, needs none of the images."""
    model = FFANetConfig(width=2, blocks=1)
    forward = 2 * network_macs(model, 16, 16)
    assert count(model, monkeypatch) == 3 * forward - 2 * 16 * 16 * 9 * 3 * 2


def test_recomputation_does_not_count(monkeypatch):
    options = dict(width=1, blocks=1, dfe="none", mixup="none", fast_deconv=False)
    assert count(AECRNetConfig(**options, remat=True), monkeypatch) == count(AECRNetConfig(**options), monkeypatch)


# ---- the start


def test_the_time_to_the_first_step_is_logged_by_part(profiled):
    (start,) = lines(profiled, "start")
    parts = {name: start[f"{name}_seconds"] for name in ("devices", "data", "restore", "compile", "first_step")}
    assert start["step"] == 0 and all(seconds > 0 for seconds in parts.values())
    assert start["total_seconds"] == pytest.approx(sum(parts.values()))


def test_a_stopwatch_divides_the_time(monkeypatch):
    clock = [1.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    watch = meter.Stopwatch()
    for part, now in (("data", 3.0), ("restore", 4.0), ("data", 8.0)):
        clock[0] = now
        watch.lap(part)
    assert watch.parts == {"data": 6.0, "restore": 1.0}


def test_versions_describe_devices_and_flags(profiled):
    versions = json.loads((profiled / "versions.json").read_text())
    assert versions["xla_flags"] == os.environ["XLA_FLAGS"] and versions["libtpu_init_args"] == "--none=1"
    assert (versions["device_kind"], versions["topology"], versions["hosts"]) == ("cpu", "1 process of 8", 1)


def test_topology_of_devices():
    def chips(x, y, z, slice_index=0):
        places = np.ndindex(x, y, z)
        return [types.SimpleNamespace(platform="tpu", coords=place, slice_index=slice_index) for place in places]

    assert topology(chips(4, 4, 1)) == "4x4x1"
    assert topology(chips(2, 2, 4) + chips(2, 2, 4, 1)) == "2 slices of 2x2x4"
    assert topology([types.SimpleNamespace(platform="gpu", process_index=i // 8) for i in range(32)]) == "4 processes of 8"


# ---- steps that stall


def hang(seconds):
    time.sleep(seconds)


def test_a_step_that_stalls_writes_the_stacks_once(monkeypatch, capfd):
    monkeypatch.setattr(meter, "_STALLED_S", 0.05)
    said = []
    watch = meter.StallWatch(said.append)

    def step(number, seconds):
        watch.begin()
        hang(seconds)
        watch.end(number)

    for number in range(4):
        step(number, 0.3)  # too few steps for a median
    assert capfd.readouterr().err == "" and not said
    watch._seconds.clear()
    for number in range(5):
        step(number, 0.001)
    watch.begin()
    watch.skip()  # a step that also compiles
    hang(0.2)
    watch.end(5)
    assert capfd.readouterr().err == "" and len(watch._seconds) == 5
    watch._seconds.extend([0.001] * 50)
    for number in (6, 7):
        step(number, 0.4)
    stacks = capfd.readouterr().err
    assert stacks.count("Timeout (0:00:00.05") == 1 and "in hang" in stacks and stacks.count("most recent call first") >= 1
    assert len(said) == 1 and "step 6 took 0.4 s" in said[0] and "the stacks of all threads" in said[0]

import json
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import load, official_weights, vgg19_tensors

from aecr_jax.__main__ import main
from aecr_jax.benchmark import opponent as opponent_module
from aecr_jax.benchmark.growth import _draw
from aecr_jax.benchmark.speed import check_writable
from aecr_jax.benchmark.work import Work, prepare
from aecr_jax.errors import UserError
from aecr_jax.networks.macs import count_macs


@pytest.fixture
def twin():
    """Return the module of AECR-Net in PyTorch, with a deformable convolution made of grid_sample, because CI has no torchvision."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from aecr_jax.benchmark.twins import aecr_net

    def deform_conv2d(x, offset, weight, bias, padding, mask):
        assert padding == 1
        h, w = x.shape[2:]
        y, x0 = torch.meshgrid(torch.arange(h, dtype=x.dtype), torch.arange(w, dtype=x.dtype), indexing="ij")
        total = bias.reshape(1, -1, 1, 1)
        for tap in range(9):
            rows = y + tap // 3 - 1 + offset[:, 2 * tap]
            columns = x0 + tap % 3 - 1 + offset[:, 2 * tap + 1]
            grid = torch.stack([2 * columns / (w - 1) - 1, 2 * rows / (h - 1) - 1], -1)
            sampled = torch.nn.functional.grid_sample(x, grid, align_corners=True) * mask[:, tap : tap + 1]
            total = total + torch.einsum("nchw,oc->nohw", sampled, weight[:, :, tap // 3, tap % 3])
        return total

    aecr_net.test_deform_conv2d = deform_conv2d
    return aecr_net


def official_twin(twin, seed, dtype):
    import torch

    model = twin.AECRNet(twin.test_deform_conv2d)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in official_weights(seed).items()})
    return model.to(dtype)


def test_twin_is_the_official_network(twin):
    """The twin takes the official tensors by name and gives the official output (tests/golden), so both sides do the same work."""
    import torch

    d = load("official_forward")
    model = official_twin(twin, d["weight_seed"], torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(d["x"])), d["y"], atol=2e-5)


@pytest.mark.slow
def test_twin_has_the_official_loss_and_gradient(twin):
    """The losses and the gradient norm are those before the first step of the official trajectory (tests/golden), in float64."""
    import torch

    from aecr_jax.benchmark.twins import contrastive

    d = load("train_trajectory")
    model = official_twin(twin, d["weight_seed"], torch.float64).train()
    features = contrastive.VGG19().double()
    for conv, (_, weight, bias) in zip(features.convs, vgg19_tensors(d["vgg_seed"])):
        conv.weight.copy_(torch.from_numpy(weight))
        conv.bias.copy_(torch.from_numpy(bias))
    hazy, clear = (torch.from_numpy(d[name][0]).double() for name in ("hazy", "clear"))
    restored = model(hazy)
    l1 = torch.nn.functional.l1_loss(restored, clear)
    cr = contrastive.contrastive_regularization(features, restored, clear, hazy)
    total = l1 + 0.1 * cr
    total.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    got = [float(x) for x in (l1.detach(), cr.detach(), total.detach(), norm)]
    np.testing.assert_allclose(got, [d[name][0] for name in ("l1", "cr", "total", "grad_norm")], rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (lambda a, b: a @ b, [(5, 7), (7, 3)], 5 * 7 * 3),
        (lambda a, b: jax.lax.conv(a, b, (2, 2), "SAME"), [(2, 3, 8, 8), (4, 3, 3, 3)], 2 * 4 * 4 * 4 * 3 * 9),
        (lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, length=6)[0], [(4, 4), (4, 4)], 6 * 64),
        (jax.jit(lambda a: jax.nn.relu(a).sum()), [(9, 9)], 0),
        (lambda a: jax.lax.cond(a.sum() > 0, lambda a: a @ a @ a, lambda a: a, a), [(4, 4)], 2 * 64),
        (lambda a: jax.lax.cond(a.sum() > 0, lambda a: a, lambda a: a @ a @ a, a), [(4, 4)], 2 * 64),
        (lambda a: jax.lax.platform_dependent(a, cpu=lambda a: a @ a @ a, default=lambda a: a @ a), [(4, 4)], 64),
        # Half of the rows and columns under the kernel are zeros that the dilation inserts.
        (
            lambda a, b: jax.lax.conv_general_dilated(a, b, (1, 1), ((1, 1), (1, 1)), lhs_dilation=(2, 2)),
            [(1, 3, 4, 4), (5, 3, 3, 3)],
            7 * 7 * 5 * 3 * 9 // 4,
        ),
    ],
)
def test_multiply_adds_by_hand(function, shapes, macs):
    jaxpr = jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes))
    assert count_macs(jaxpr.jaxpr) == macs


def test_multiply_adds_of_the_operator():
    """The operator has nine taps of a 4 -> 4 convolution at 64 pixels; its gradients for image and kernel cost as much again each."""
    work = Work("op", size=8, channels=4)
    assert prepare(work).macs == 64 * 9 * 16
    assert prepare(Work("op", size=8, channels=4, backward=True)).macs == 3 * 64 * 9 * 16


@pytest.mark.parametrize(
    ("what", "options", "works"),
    [
        ("op", ["--size", "8", "--channels", "4"], 2),
        ("model", ["--size", "16", "--width", "2", "--dtype", "bfloat16"], 1),
        pytest.param("train", ["--size", "16", "--width", "2", "--batch", "1"], 2, marks=pytest.mark.slow),
    ],
)
def test_benchmark_writes_table_and_json(tmp_path, capsys, what, options, works):
    file = tmp_path / "figures.json"
    assert main(["benchmark", what, *options, "--rounds", "3", "--output", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert len(figures["rows"]) == works
    table = capsys.readouterr().out
    for row in figures["rows"]:
        measured = row["jax"]
        assert len(measured["runs_s"]) == 3 and measured["min_s"] <= measured["median_s"]
        assert measured["compile_s"] > 0 and measured["macs"] > 0 and 0 < measured["share_of_peak"] < 1
        assert row["work"] in table


@pytest.mark.slow
def test_compile_times_are_not_those_of_the_cache(tmp_path):
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
    command = ["benchmark", "op", "--size", "8", "--channels", "8", "--rounds", "1", "--output", str(tmp_path / "figures.json")]
    try:
        jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()  # makes JAX decide whether to use the cache
        assert main(command) == 0
        hits.clear()
        assert main(command) == 0
        assert not hits
    finally:
        jax.monitoring.clear_event_listeners()


_WORKER = """
import json, sys
request = json.loads(sys.stdin.readline())
if request["compile"] and not request["channels_last"]:
    sys.exit("no compiler")
print(json.dumps({"first_s": 1.5, "torch": "9.9"}), flush=True)
for line in sys.stdin:
    seconds = 0.25 if request["channels_last"] else 0.5
    print(json.dumps({"seconds": seconds} if json.loads(line)["do"] == "run" else {"bytes": 1000}), flush=True)
"""


@pytest.mark.slow
def test_the_fastest_opponent_is_measured(tmp_path, capsys, monkeypatch):
    """With a fake worker, one of the four ways fails and channels-last is the fastest."""
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    monkeypatch.setattr(opponent_module, "WORKER", worker)
    file = tmp_path / "figures.json"
    command = ["benchmark", "op", "--size", "8", "--channels", "4", "--rounds", "2", "--against", "torch", "--output", str(file)]
    assert main(command) == 0
    row = json.loads(file.read_text())["rows"][0]
    assert row["torch"]["how"] == "channels-last" and row["torch"]["version"] == "9.9" and row["torch"]["peak_bytes"] == 1000
    assert row["torch"]["median_s"] == 0.25 and row["ratio"] == pytest.approx(row["jax"]["median_s"] / 0.25)
    assert [("error" in tried, tried.get("seconds")) for tried in row["torch"]["tried"]] == [
        (False, 0.5),
        (False, 0.25),
        (True, None),
        (False, 0.25),
    ]
    assert "PyTorch 9.9, channels-last" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["op", "--size", "0"], "--size (=0) must be at least 1"),
        (["train", "--width", "-1"], "--width (=-1) must be at least 1"),
        (["op", "--nonsense"], "--nonsense"),
        (["op", "--size", "4", "--channels", "2", "--against", "torch", "--torch-python", "/no/python"], "--torch-python (=/no/python)"),
        (["op", "--size", "4", "--channels", "2", "--output", "/proc/no/figures.json"], "/proc/no"),
        (["growth", "--sizes", "0", "8"], "--sizes"),
        (["train", "--size", "8"], "--size (=8) must be at least 16"),
        (["model", "--size", "250", "--against", "torch"], "--size (=250) and --columns must be multiples of 4"),
        (["op", "--output", "/proc/no/figures.json"], "/proc/no"),
        (["growth", "--plot", "plot.nonsense"], "plot.nonsense"),
        (["op", "stray"], "stray"),
    ],
)
def test_bad_benchmarks_are_one_line(capsys, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *command]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_opponent_without_torchvision_is_one_line(capsys, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("import no_such_module")
    monkeypatch.setattr(opponent_module, "WORKER", worker)
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "op", "--size", "4", "--channels", "2", "--against", "torch"]) == 2
    error = capsys.readouterr().err
    assert f"--torch-python (={sys.executable})" in error and "no_such_module" in error and error.count("\n") == 1


def test_a_measurement_that_fails_leaves_no_empty_file(tmp_path):
    check_writable(tmp_path / "new" / "figures.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.json").write_text("{}")
    check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "{}"


def test_no_opponent_for_a_tpu():
    with pytest.raises(UserError, match="--against torch has no device for tpu"):
        opponent_module.check_opponent("tpu")


def test_an_interrupted_opponent_is_ended(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER.replace("0.25 if", "__import__('time').sleep(60) or 0.25 if"))
    monkeypatch.setattr(opponent_module, "WORKER", worker)
    opponent = opponent_module.Opponent(sys.executable, {"compile": False, "channels_last": True})
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        opponent.run()
    assert opponent._process.returncode == -signal.SIGKILL


def test_growth_plot(tmp_path):
    """The plot accepts a series with a single point, and a train step that was only compiled and not run."""
    rows = [
        {"kind": "model", "over": over, "pixels": n, "batch": n, "median_s": 0.1 * n, "temporary_bytes": n}
        for over in ("area", "batch")
        for n in (1, 2)
    ]
    rows.append({"kind": "train", "over": "area", "pixels": 1, "batch": 1, "temporary_bytes": 10})
    _draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_growth_of_area_and_batch(tmp_path, capsys, monkeypatch):
    """Temporary memory grows with the number of pixels; sizes that do not fit into memory are listed but not run."""
    monkeypatch.setattr("aecr_jax.benchmark.growth._available", lambda: 2_000_000)
    file = tmp_path / "growth.json"
    sizes = ["--sizes", "16", "32", "64", "--batches", "1", "--width", "2"]
    assert main(["benchmark", "growth", *sizes, "--rounds", "1", "--output", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["kind"], row["size"], row["over"]) for row in rows[:3]] == [("model", size, "area") for size in (16, 32, 64)]
    assert 0.5 < rows[2]["temporary_bytes"] / (4 * rows[1]["temporary_bytes"]) < 1.5
    assert [row["over"] for row in rows] == ["area", "area", "area", "batch"] * 2
    left_out = [row for row in rows if "median_s" not in row]
    assert left_out and all(1.2 * row["temporary_bytes"] > 2_000_000 for row in left_out)
    assert "not run" in capsys.readouterr().out

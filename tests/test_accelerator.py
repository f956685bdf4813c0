import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import load, nhwc

from aecr_jax.__main__ import main
from aecr_jax.benchmark import accelerator, checks
from aecr_jax.benchmark import opponent as opponent_module
from aecr_jax.benchmark.forms import FORMS, loop
from aecr_jax.benchmark.reference import load_reference
from aecr_jax.benchmark.work import Work
from aecr_jax.errors import UserError


@pytest.mark.parametrize("form", [name for name in FORMS if name != "loop"])
def test_every_form_is_the_operator(form):
    """Values and all gradients equal those of deform_conv2d, also where samples lie outside the image."""
    rng = np.random.default_rng(0)
    shapes = [(2, 6, 5, 4), (2, 6, 5, 18), (2, 6, 5, 9), (3, 3, 4, 3)]
    x, offset, mask, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    cotangent = rng.standard_normal((2, 6, 5, 3)).astype(np.float32)

    def differentiate(function):
        def both(*inputs):
            out, vjp = jax.vjp(function, *inputs)
            return out, *vjp(cotangent)

        return jax.jit(both)(x, 3 * offset, mask, kernel)

    for got, expected in zip(differentiate(FORMS[form]), differentiate(loop)):
        np.testing.assert_allclose(got, expected, atol=1e-5 * abs(np.asarray(expected)).max())


def test_the_shipped_numbers_are_the_official_ones():
    reference, op, network, step = load_reference(), *map(load, ("deform_conv2d_unit", "official_forward", "train_trajectory"))
    for ours, theirs in (("x", "x"), ("offset", "offset"), ("mask", "mask"), ("out", "out"), ("cotangent", "cotangent")):
        np.testing.assert_array_equal(reference[f"op_{ours}"], nhwc(op[theirs]))
    for name in ("x", "offset", "mask"):
        np.testing.assert_array_equal(reference[f"op_grad_{name}"], nhwc(op[f"grad_{name}"]))
    for ours, theirs in (("op_kernel", "weight"), ("op_grad_kernel", "grad_weight")):
        np.testing.assert_array_equal(reference[ours], op[theirs].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(reference["op_grad_bias"], op["grad_bias"])
    np.testing.assert_array_equal(reference["network_restored"], nhwc(network["y"])[:1])
    np.testing.assert_array_equal(reference["network_hazy"], nhwc(network["x"])[:1])
    np.testing.assert_array_equal(reference["names"], network["names"])
    np.testing.assert_array_equal(reference["shapes"], network["shapes"])
    for name in ("hazy", "clear"):
        np.testing.assert_array_equal(reference[f"step_{name}"], nhwc(step[name][0]).astype(np.float32))
    for name in ("l1", "cr", "total", "grad_norm"):
        assert reference[f"step_{name}"] == step[name][0]
    assert reference["weight_seed"] == network["weight_seed"] == step["weight_seed"] and reference["vgg_seed"] == step["vgg_seed"]


def test_relative_error_by_hand():
    """The difference (0, 0, 2) has the norm 2 and the expected (0, 3, 4) the norm 5."""
    assert checks.relative_error([0, 3, 6], [0, 3, 4]) == pytest.approx(0.4)
    assert checks.relative_error([0, np.nan, 4], [0, 3, 4]) is None


def test_a_device_that_computes_wrongly_is_found(monkeypatch):
    right = next(checks.check_device(jax.devices()[0], size=4, channels=2))
    assert (right["case"], right["arithmetic"], right["against"], right["ok"]) == ("operator", "float32", "PyTorch", True)
    assert set(right["errors"]) == {"out", *(f"grad_{name}" for name in ("x", "offset", "mask", "kernel", "bias"))}
    operator = checks.deform_conv2d
    monkeypatch.setattr(checks, "deform_conv2d", lambda **arguments: 1.01 * operator(**arguments))
    wrong = next(checks.check_device(jax.devices()[0], size=4, channels=2))
    assert not wrong["ok"] and wrong["errors"]["out"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
def test_kernels_are_checked_before_they_are_measured(monkeypatch, tmp_path):
    """On a GPU, the operator is compared in each arithmetic, and a kernel that fails is a row with its error."""
    gpu = type("Gpu", (), {"platform": "gpu", "device_kind": "none"})()
    monkeypatch.setattr(accelerator.jax, "devices", lambda *_: [gpu])
    asked = []

    def check(device, **options):
        asked.append(options)
        yield {"case": "operator", "arithmetic": "float32", "against": "PyTorch", "errors": {"out": 0.0}, "tolerance": 1e-3, "ok": True}

    def prepare(work):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(accelerator, "check_device", check)
    monkeypatch.setattr(accelerator, "prepare", prepare)
    result = {}
    accelerator._kernels(accelerator._Bench(accelerator.TINY, sys.executable, tmp_path, deadline=time.perf_counter() + 60), result)
    assert asked == [{"size": 8, "channels": 8, "implementation": "pallas"}]
    checked, *measured = result["rows"]
    assert checked["ok"] and len(measured) == 8
    assert {(row["form"], row["error"]) for row in measured} == {("pallas", "RuntimeError: no such instruction")}
    gpu.platform, result = "tpu", {}  # of which the tests have 8
    accelerator._kernels(accelerator._Bench(accelerator.TINY, sys.executable, tmp_path), result)
    assert result == {"note": "there are no kernels for several TPUs"}


def fake_parts(monkeypatch, parts):
    monkeypatch.setattr(accelerator, "PARTS", parts)


def test_a_failure_does_not_stop_the_next_part(tmp_path, monkeypatch, capsys):
    file, seen = tmp_path / "figures.json", []

    def fail(bench, result):
        result["rows"] = [{"before": "the failure"}]
        raise RuntimeError("no such kernel\nand more")

    def look(bench, result):
        seen.append(json.loads(file.read_text())["parts"])

    fake_parts(monkeypatch, {"first": (fail, 0.5), "second": (look, 0.5)})
    assert main(["benchmark", "accelerator", "--minutes", "1", "--output", str(file)]) == 1
    assert seen[0]["first"]["error"] == "RuntimeError: no such kernel" and seen[0]["first"]["rows"] == [{"before": "the failure"}]
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == ["first", "second"] and "error" not in parts["second"]
    assert "no such kernel" in capsys.readouterr().out


def test_a_part_that_would_begin_too_late_is_skipped(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    fake_parts(
        monkeypatch,
        {
            "long": (lambda bench, result: time.sleep(1.3), 0.2),
            "late": (lambda bench, result: pytest.fail("it began"), 0.02),
            "last": (lambda bench, result: result.update(done=True), 0.78),
        },
    )
    assert main(["benchmark", "accelerator", "--minutes", str(5 / 60), "--output", str(file)]) == 0
    parts = json.loads(file.read_text())["parts"]
    assert "after its time" in parts["late"]["skipped"] and parts["last"]["done"]


def test_a_wrong_result_is_the_exit_status(tmp_path, monkeypatch):
    fake_parts(monkeypatch, {"part": (lambda bench, result: result.update(rows=[{"ok": False}]), 1.0)})
    assert main(["benchmark", "accelerator", "--output", str(tmp_path / "figures.json")]) == 1


def test_the_sweep_ends_where_memory_does(monkeypatch, tmp_path):
    """The device has room for 64 images, and for 256 with rematerialization; the paper's batch was measured before."""

    def measure(self, work):
        row = {"batch": work.batch, "remat": work.remat}
        fits = work.batch <= (256 if work.remat else 64)
        return (row | {"jax": {}} if fits else row | {"error": "RESOURCE_EXHAUSTED", "fits": False}), None

    monkeypatch.setattr(accelerator._Bench, "measure", measure)
    bench = accelerator._Bench(accelerator.Shapes(), sys.executable, tmp_path, deadline=time.perf_counter() + 60)
    bench.step_row = {"batch": 16, "remat": False, "jax": {}}
    result = {}
    accelerator._sweep(bench, result)
    assert [(row["batch"], row["remat"]) for row in result["rows"]] == [
        *((16, False), (16, True)),
        *((32, False), (64, False), (128, False)),
        *((128, True), (256, True), (512, True)),
    ]
    assert (result["largest_batch"], result["largest_batch_remat"]) == (64, 256) and "unfinished" not in result
    bench.deadline, result = 0.0, {}
    accelerator._sweep(bench, result)
    assert "unfinished" in result and result["largest_batch"] == 16


def test_memory_that_runs_out_is_a_row(monkeypatch, tmp_path, capsys):
    def fail(work):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")

    monkeypatch.setattr(accelerator, "prepare", fail)
    row, prepared = accelerator._Bench(accelerator.TINY, sys.executable, tmp_path).measure(Work("train", batch=4))
    assert row["fits"] is False and row["batch"] == 4 and "RESOURCE_EXHAUSTED" in row["error"] and prepared is None
    assert "does not fit into memory" in capsys.readouterr().out


def test_pytorch_ends_when_its_time_is_over(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(opponent_module, "WORKER", worker)
    begin = time.perf_counter()
    with pytest.raises(UserError, match="its time was over"):
        opponent_module.fastest(sys.executable, Work("op", size=8, channels=4), "cpu", seconds=1.0)
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "0"], "--minutes (=0) must be positive"),
        (["--minutes", "nan"], "--minutes (=nan) must be positive"),
        (["--output", "/proc/no/figures.json"], "/proc/no"),
        (["--batch", "4"], "--batch"),
    ],
)
def test_bad_options_are_one_line(capsys, options, words):
    assert main(["benchmark", "accelerator", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path, capsys, monkeypatch):
    """All parts run with tiny shapes within two minutes on two cores; a busy machine gets more, so that no part is skipped."""

    def no_torch(*_, **__):  # test_benchmark measures PyTorch; here it would take most of the time
        raise subprocess.SubprocessError("no PyTorch")

    monkeypatch.setattr(accelerator.subprocess, "run", no_torch)
    file = tmp_path / "figures.json"
    assert main(["benchmark", "accelerator", "--minutes", "30", "--output", str(file)]) == 0
    figures = json.loads(file.read_text())
    parts = figures["parts"]
    assert figures["tiny"] and list(parts) == list(accelerator.PARTS)
    assert not any(key in part for part in parts.values() for key in ("error", "skipped", "unfinished"))
    checked = {(row["case"], row["arithmetic"]) for row in parts["correctness"]["rows"]}
    assert checked == {(case, kind) for case in ("operator", "network", "step") for kind in ("float32", "bfloat16")}
    forms = set(FORMS) - {"pallas"}
    assert {(row["form"], row["backward"]) for row in parts["operator"]["rows"]} == {(f, b) for f in forms for b in (True, False)}
    assert parts["kernels"]["note"] == "there are no kernels for CPUs"
    assert [row["cr"] for row in parts["train"]["rows"]] == [True, False] and "cannot import torch" in parts["train"]["torch"]
    assert parts["sweep"]["largest_batch"] == parts["sweep"]["largest_batch_remat"] == 4
    assert parts["trace"]["bytes"] > 0 and (tmp_path / "figures-trace").is_dir()
    assert set(parts["input"]["keeps_up"]) == {"read", "cached"}
    assert jnp.isfinite(parts["device"]["matmul_peak_gmacs"]["bfloat16"])

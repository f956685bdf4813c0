"""Worker process for `python -m aecr_jax benchmark --against torch`, which measures one piece of work in PyTorch.

It reads one JSON request per line and answers each request with one line of JSON. The first request describes the work and how to run it;
any number of requests `{"do": "run", "turn_s": SECONDS}` or `{"do": "peak"}` follow. The worker needs PyTorch and torchvision, but neither
aecr_jax nor JAX.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from twins.contrastive import VGG19, contrastive_regularization

Run = Callable[[], Any]
answers = sys.stdout


def prepare(request: dict[str, Any]) -> Run:
    """Return a function that does the requested work once and waits until it is finished."""
    device = torch.device(request["device"])
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as JAX does
    torch.backends.cudnn.benchmark = True
    work = {"op": _op, "model": _model, "train": _train}[request["work"]]
    run = work(request, device)

    def wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return wait


def _op(request: dict[str, Any], device: torch.device) -> Run:
    from twins.aecr_net import deform

    n, c, size = request["batch"], request["channels"], request["size"]
    dtype = torch.bfloat16 if request["autocast"] else torch.float32
    x = _images(request, torch.randn(n, c, size, size, device=device, dtype=dtype))
    offset = 2 * torch.randn(n, 18, size, size, device=device)
    mask = torch.rand(n, 9, size, size, device=device)
    weight = torch.randn(c, c, 3, 3, device=device) / (3 * c**0.5)
    inputs = [x, offset, weight, mask]
    call = _compiled(request, lambda x, offset, weight, mask: deform(x, offset, weight, None, 1, mask))
    if not request["backward"]:
        return _without_gradients(lambda: call(*inputs))
    for tensor in inputs:
        tensor.requires_grad_()
    cotangent = torch.randn(n, c, size, size, device=device, dtype=dtype)
    return lambda: torch.autograd.grad(call(*inputs), inputs, cotangent)


def _model(request: dict[str, Any], device: torch.device) -> Run:
    model = _layout(request, _network(request).to(device)).eval()
    x = _images(request, torch.rand(request["batch"], 3, request["size"], request["columns"] or request["size"], device=device))
    call = _compiled(request, model)

    def forward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=request["autocast"]):
            call(x)

    return _without_gradients(forward)


def _train(request: dict[str, Any], device: torch.device) -> Run:
    model = _layout(request, _network(request).to(device)).train()
    features = _layout(request, VGG19().to(device)) if request["cr"] else None
    shape = (request["batch"], 3, request["size"], request["size"])
    hazy, clear = (_images(request, torch.rand(shape, device=device)) for _ in range(2))
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, fused=True)

    def loss(hazy: torch.Tensor, clear: torch.Tensor) -> torch.Tensor:
        restored = model(hazy)
        total = F.l1_loss(restored.float(), clear)
        return total if features is None else total + 0.1 * contrastive_regularization(features, restored, clear, hazy)

    call = _compiled(request, loss)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=request["autocast"]):
            value = call(hazy, clear)
        value.backward()
        optimizer.step()

    return step


def _network(request: dict[str, Any]) -> torch.nn.Module:
    return importlib.import_module(f"twins.{request['network']}").make(request["settings"])


def _images(request: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if request["channels_last"] else x


def _layout(request: dict[str, Any], module: torch.nn.Module) -> torch.nn.Module:
    return module.to(memory_format=torch.channels_last) if request["channels_last"] else module


def _compiled(request: dict[str, Any], function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function) if request["compile"] else function


def _without_gradients(function: Run) -> Run:
    def run() -> None:
        with torch.inference_mode():
            function()

    return run


def measure_peak(run: Run, device: str) -> int | None:
    """Return the memory, in bytes, that a run needs beyond what is held before it: on the GPU, or resident in this process (Linux).

    Return None if it cannot be measured.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would hide that a run needs it again
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the peak
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, AttributeError, TypeError):
        return None


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name + ":"))


def main() -> None:
    """Answer requests until standard input is closed."""
    global answers
    answers, sys.stdout = sys.stdout, sys.stderr  # other output must not break the protocol
    request = json.loads(sys.stdin.readline())
    run = prepare(request)
    start = time.perf_counter()
    run()
    reply(first_s=time.perf_counter() - start, torch=torch.__version__)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "peak":
            reply(bytes=measure_peak(run, request["device"]))
            continue
        times: list[float] = []
        while sum(times) < asked["turn_s"]:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        reply(seconds=statistics.median(times))


def reply(**values: Any) -> None:
    """Write an answer as one line of JSON."""
    print(json.dumps(values), file=answers, flush=True)


if __name__ == "__main__":
    main()

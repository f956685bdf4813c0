"""The web page without a browser: its files, its server, its copy of onnxruntime-web, and its arithmetic, which Node.js runs.

Expected pixels are those of the networks in JAX and of `blend_tiles`. The slow tests of `test_web_page.py` use the page in Chromium.
"""

import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from browser import FAKE, use_stand_in
from test_commands import fails
from test_export_onnx import make_model, reference, run_onnx

from aecr_jax import UserError
from aecr_jax.__main__ import main
from aecr_jax.export.to_onnx import maps_to_onnx
from aecr_jax.inference.restore import Side, blend, blend_tiles
from aecr_jax.networks import coarse_net
from aecr_jax.web import runtime
from aecr_jax.web.server import make_server
from aecr_jax.web.site import make_site, write_site

PAGE = runtime.Path(runtime.__file__).parent / "page"
PACK = runtime._pack
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")


@pytest.fixture
def package(tmp_path, monkeypatch):
    path = tmp_path / "package.tgz"
    use_stand_in(monkeypatch, path)
    return path


# ---- arithmetic


def run_node(folder, code, *arrays):
    """Run JavaScript after importing restore.js, with `inputs` as an array of buffers, and return the bytes of `output`, a typed array."""
    shutil.copy(PAGE / "restore.js", folder / "restore.mjs")
    for i, array in enumerate(arrays):
        array.tofile(folder / f"{i}.bin")
    (folder / "main.mjs").write_text(
        f"""
        import {{ readFileSync, writeFileSync }} from "node:fs";
        import * as restore from "./restore.mjs";
        const inputs = [...Array({len(arrays)}).keys()].map((i) => Uint8Array.from(readFileSync(`${{i}}.bin`)).buffer);
        {code}
        writeFileSync("output.bin", new Uint8Array(output.buffer));
        """
    )
    done = subprocess.run(["node", "main.mjs"], cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return (folder / "output.bin").read_bytes()


def picture(h, w):
    """Return a random RGBA picture with smooth parts."""
    rng = np.random.default_rng(h)
    coarse = np.kron(rng.random((-(-h // 8), -(-w // 8), 4)), np.ones((8, 8, 1)))[:h, :w]
    return np.uint8(255 * np.clip(coarse + 0.1 * rng.random((h, w, 4)), 0, 1))


@needs_node
@pytest.mark.parametrize(("height", "width"), [(20, 25), (37, 45), (60, 75), (6, 5), (1, 1)])
def test_the_maps_of_coarse_net_restore_as_the_network_does(tmp_path, monkeypatch, height, width):
    """With a limit of 500 pixels instead of a million, the sizes are reduced by 1, 2, 3, 1 and 1."""
    monkeypatch.setattr(coarse_net, "PIXELS", 500)
    model, rgba = make_model("coarse_net"), picture(height, width)
    setup = f"const picture = {{ width: {width}, height: {height}, data: new Uint8ClampedArray(inputs[0]) }};"
    reduce = f"const reduced = restore.reduce(picture, {{ pixels: 500, multiple: {model.MULTIPLE} }});"
    found = run_node(tmp_path, f"{setup}{reduce}const output = Float32Array.of(reduced.reduction, reduced.width, ...reduced.data);", rgba)
    reduction, columns, *values = np.frombuffer(found, np.float32)
    images = np.reshape(values, (1, 3, -1, int(columns))).transpose(0, 2, 3, 1).astype(np.float32)
    maps = run_onnx(maps_to_onnx(model, {}), images, "maps").transpose(0, 3, 1, 2)
    apply = f"""
        const maps = {{ width: {maps.shape[3]}, height: {maps.shape[2]}, data: new Float32Array(inputs[1]) }};
        const output = new Uint8ClampedArray(picture.data.length);
        const middle = Math.floor(picture.height / 2);
        restore.applyMaps(picture, maps, {int(reduction) * coarse_net.MAP_CELL}, output, 0, middle);
        restore.applyMaps(picture, maps, {int(reduction) * coarse_net.MAP_CELL}, output, middle, picture.height);
    """
    restored = np.frombuffer(run_node(tmp_path, setup + apply, rgba, maps), np.uint8).reshape(rgba.shape)
    expected = 255 * reference(model, rgba[None, ..., :3].astype(np.float32) / 255)[0].clip(0, 1)
    assert np.abs(restored[..., :3] - expected).max() < 0.51  # half a unit by rounding
    np.testing.assert_array_equal(restored[..., 3], rgba[..., 3])


@needs_node
@pytest.mark.parametrize(("height", "width"), [(33, 70), (41, 20), (17, 17), (16, 16)])
def test_tiles_are_blended_as_by_dehaze(tmp_path, height, width):
    """The stand-in for a network adds half of the tile's mean, so that a pixel depends on its tile."""
    rgba = picture(height, width)
    code = f"""
        const picture = {{ width: {width}, height: {height}, data: new Uint8ClampedArray(inputs[0]) }};
        const output = new Uint8ClampedArray(picture.data.length);
        const reports = [];
        const run = async (image) => image.map((value) => value + 0.5 * (image.reduce((a, b) => a + b) / image.length - 0.2));
        await restore.restoreTiles(picture, {{ tile: 16, overlap: 5, multiple: 4 }}, run, output, (...report) => reports.push(report));
        if (reports.some(([done, total], i) => done !== i + 1 || total !== reports.length)) throw new Error(reports.join(" "));
    """
    restored = np.frombuffer(run_node(tmp_path, code, rgba), np.uint8).reshape(rgba.shape)
    hazy = rgba[..., :3].astype(np.float32) / 255

    tile = 16 if height * width > 256 else 100
    rows, columns = (Side.cut(size, tile, 5, 4) for size in (height, width))
    expected = blend_tiles(lambda i, j, image: np.clip(image + 0.5 * (image.mean() - 0.2), 0, 1), hazy, rows, columns, 5)
    assert np.abs(restored[..., :3] - 255 * expected).max() < 0.51
    np.testing.assert_array_equal(restored[..., 3], rgba[..., 3])


@needs_node
def test_the_strength_is_that_of_dehaze(tmp_path):
    hazy, restored = picture(9, 7), picture(8, 7)
    restored = np.concatenate([restored, restored[:1]])
    code = "const output = restore.blend(new Uint8ClampedArray(inputs[0]), new Uint8ClampedArray(inputs[1]), 0.3);"
    found = np.frombuffer(run_node(tmp_path, code, hazy, restored), np.uint8).reshape(hazy.shape)
    np.testing.assert_array_equal(found, np.round(blend(hazy.astype(np.float64), restored.astype(np.float64), 0.3)))


# ---- onnxruntime-web


def test_the_package_is_checked(tmp_path, capsys, package):
    assert runtime.read_runtime(package) == FAKE
    package.write_bytes(package.read_bytes() + b"x")
    assert f"--runtime (={package}) is not the package onnxruntime-web@1.30.0" in fails(capsys, "web", "--runtime", package)
    assert "cannot be read: No such file or directory" in fails(capsys, "web", "--runtime", tmp_path / "none.tgz")


def test_npm_downloads_the_package_once(tmp_path, capsys, monkeypatch, package):
    """A stand-in for npm copies the package; after a first call it fails, and the cached copy serves. A damaged copy is replaced."""
    monkeypatch.setattr(runtime, "_pack", PACK)
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$2" = onnxruntime-web@1.30.0 ] && cp {package} "$5"\n')
    npm.chmod(0o755)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: str(npm))
    assert runtime.read_runtime() == FAKE and "downloading onnxruntime-web@1.30.0 with npm" in capsys.readouterr().out
    works = npm.read_text()
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    assert runtime.read_runtime() == FAKE and not capsys.readouterr().out
    [cached] = (tmp_path / "cache").rglob("*.tgz")
    cached.write_bytes(b"damaged")
    assert "npm could not download onnxruntime-web@1.30.0 (npm error code E404): repeat the command, or run `npm pack" in fails(
        capsys, "web"
    )
    npm.write_text(works)
    assert runtime.read_runtime() == FAKE and cached.read_bytes() == package.read_bytes()
    cached.unlink()
    package.write_bytes(b"another file")
    assert "its checksum is another" in fails(capsys, "web")
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert "npm was not found: install Node.js, or run" in fails(capsys, "web")


# ---- the command and the server


def test_the_command_writes_the_page(tmp_path, capsys, package):
    output = tmp_path / "site"
    command = ["web", "--output", str(output), "--runtime", str(package)]
    assert main(command) == 0
    assert f"written to {output}" in capsys.readouterr().out
    listing = json.loads((output / "models/models.json").read_text())
    assert [model["name"] for model in listing["models"]] == ["photo", "aecr_net_tiny", "indoor"]  # the default model is the first one
    photo, tiny, _ = listing["models"]
    assert photo["form"] == {"pixels": 2**20, "cell": 8, "multiple": 32} and tiny["form"] == {"tile": 768, "overlap": 128, "multiple": 4}
    assert photo["parameters"] == 926_820 and photo["license"] == "apache-2.0" and photo["purpose"].startswith("photographs")
    for model in listing["models"]:
        assert (output / model["file"]).stat().st_size == model["bytes"]
    assert (output / "runtime/ort-wasm-simd-threaded.wasm").read_bytes() == FAKE["ort-wasm-simd-threaded.wasm"]
    image = np.full((1, 64, 96, 3), 0.7, np.float32)
    assert run_onnx((output / photo["file"]).read_bytes(), image, "maps").shape == (1, 8, 12, 4)
    # An existing page is kept, whole, unless it may be replaced; other files in the folder always are.
    (output / "CNAME").write_text("kept")
    (output / "index.html").write_text("old")
    assert "already exists: choose another --output, or add --overwrite" in fails(capsys, *command)
    assert (output / "index.html").read_text() == "old"
    assert main([*command, "--overwrite"]) == 0
    assert (output / "index.html").read_bytes() == (PAGE / "index.html").read_bytes() and (output / "CNAME").read_text() == "kept"


def test_options_that_have_no_meaning_together_are_refused(capsys):
    assert "--port is for serving the page" in fails(capsys, "web", "--output", "x", "--port", "1")
    assert "--overwrite is for --output DIR" in fails(capsys, "web", "--overwrite")


def test_the_server(capsys):
    site = {"index.html": b"page", "runtime/a.mjs": b"code", "runtime/b.wasm": b"binary", "models/m.onnx": b"model"}
    site["runtime/large.wasm"] = bytes(50_000_000)
    with make_server(site, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address
        assert host == "127.0.0.1"
        types = {"": "text/html; charset=utf-8", "index.html": "text/html; charset=utf-8", "models/m.onnx": "application/octet-stream"}
        types |= {"runtime/a.mjs?v=1": "text/javascript; charset=utf-8", "runtime/b.wasm": "application/wasm"}
        for path, kind in types.items():
            with urllib.request.urlopen(f"http://{host}:{port}/{path}") as answer:
                assert answer.read() == site[path.partition("?")[0] or "index.html"] and answer.headers["Content-Type"] == kind
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        for path in ("none", "../pyproject.toml", "/etc/passwd", "runtime/"):
            with pytest.raises(urllib.error.HTTPError, match="404") as found:
                urllib.request.urlopen(f"http://{host}:{port}/{path}")
            found.value.close()
        with pytest.raises(UserError, match=rf"--port \(={port}\) cannot be used: .*; choose another, or 0 for a free one"):
            make_server(site, port)
        with socket.create_connection((host, port)) as browser:  # that closes the page while a file is on its way
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close at once, by a reset
            browser.sendall(b"GET /runtime/large.wasm HTTP/1.1\r\nHost: a\r\n\r\n")
            browser.recv(1)
        server.shutdown()
    with pytest.raises(UserError, match=r"--port \(=70000\) cannot be used"):
        make_server(site, 70_000)
    assert capsys.readouterr() == ("", "")


# ---- the files of the page


def test_nothing_comes_from_another_server():
    """All addresses in the page are relative, but for links to licences and the namespace of SVG."""
    for path in PAGE.iterdir():
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text()
            assert not re.findall(r"(?:https?:)?//[\w.]+\.\w", re.sub(r"^\s*//.*$", "", text, flags=re.M)), path
            for name in re.findall(r"""(?:src|href|from|data-file)=?\s*"([^"]+)\"""", text):
                assert name.startswith("./runtime/") or (PAGE / name).is_file(), name
    assert "connect-src 'self'" in (PAGE / "index.html").read_text()


def test_the_privacy_sentence_comes_first_and_the_stated_limit_is_the_real_one():
    html = (PAGE / "index.html").read_text()
    text = re.sub(r"<[^>]+>|\s+", " ", html.partition("<body>")[2]).split()
    assert " ".join(text[:6]) == "Your photographs stay on this device."
    [limit] = re.findall(r"^const LIMIT = (\d+)e6;", (PAGE / "main.js").read_text(), re.M)
    assert f"up to {limit} megapixels" in html


def test_every_element_that_the_script_uses_exists():
    html, script = (PAGE / "index.html").read_text(), (PAGE / "main.js").read_text()
    ids = set(re.findall(r'id="([\w-]+)"', html))
    used = set(re.findall(r"\bui\.(\w+)", script)) | set(re.findall(r'\bui\["([\w-]+)"\]', script))
    assert used and used <= ids


def test_a_failed_write_leaves_the_page_that_was_there(tmp_path, monkeypatch):
    write_site({"index.html": b"old", "a/b.js": b"old"}, tmp_path)

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match=r"b.js cannot be written: No space left on device"):
        write_site({"index.html": b"new", "a/b.js": b"new"}, tmp_path, overwrite=True)
    assert (tmp_path / "index.html").read_bytes() == (tmp_path / "a/b.js").read_bytes() == b"old"


def test_the_packages_for_onnx_are_needed(monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match="ONNX files need onnx and onnxruntime"):
        make_site(package)

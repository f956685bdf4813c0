"""What the tests of the web page have in common: Chromium, and a stand-in for onnxruntime-web.

Chromium needs Debian's packages chromium and chromium-driver, the Python package selenium, and npm, which downloads onnxruntime-web.
"""

import base64
import hashlib
import io
import shutil
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from aecr_jax.data.haze import add_haze
from aecr_jax.data.scenes import render_scene
from aecr_jax.web import runtime
from aecr_jax.web.server import make_server
from aecr_jax.web.site import make_site

FAKE = {name: name.encode() for name in runtime.FILES}
TILE = 256
# The second line keeps Chromium from connecting to its maker's servers.
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --window-size=1280,900
    --disable-quic --disable-background-networking --disable-component-update --disable-sync --disable-default-apps"""


def make_package(path):
    """Write a stand-in for the npm package, and return its checksum in the form of npm."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in FAKE.items():
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def use_stand_in(monkeypatch, path):
    """Write a stand-in for the npm package, and let `web` take it for the right one."""
    monkeypatch.setattr(runtime, "INTEGRITY", make_package(path))
    monkeypatch.setattr(runtime, "_pack", path.read_bytes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))


def start_browser(folder):
    """Start Chromium, or skip the test where it cannot be started. `folder / "downloads"` is for downloads."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver", "npm")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    driver.downloads = folder / "downloads"
    driver.downloads.mkdir()
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(driver.downloads)})
    return driver


def small_tiles():
    """Return the page, with smaller tiles for `aecr_net_tiny` so that a small picture has several."""
    site = make_site()
    listing = site["models/models.json"].decode()
    assert listing.count('"tile": 768') == 1
    return site | {"models/models.json": listing.replace('"tile": 768', f'"tile": {TILE}').encode()}


def serve(server):
    """Let a server answer in a thread, and return the address of the page."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def site(browser):
    return small_tiles()


@pytest.fixture(scope="session")
def address(site):
    with make_server(site, 0) as server:
        yield serve(server)
        server.shutdown()


@pytest.fixture
def page(browser, address):
    """Open the page, and require that its console has no warnings and errors at the end."""
    page = Page(browser, address)
    yield page
    assert page.errors() == []


class Page:
    """The page in the browser, as a visitor uses it."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address
        driver.get(address)
        self.wait(lambda: driver.execute_script("return document.body.dataset.ready"))

    def wait(self, condition, seconds=120):
        from selenium.webdriver.support import wait

        return wait.WebDriverWait(self.driver, seconds, 0.1).until(lambda _: condition())

    def __getitem__(self, name):
        return self.driver.find_element("id", name)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def choose(self, path):
        self["file"].send_keys(str(path))

    def wait_for_result(self):
        self.wait(lambda: self["png"].is_enabled() or self["problem"].text)
        assert not self["problem"].text

    def set_strength(self, percent):
        self.run(
            "const input = document.getElementById('strength'); input.value = arguments[0]; input.dispatchEvent(new Event('input'))",
            percent,
        )

    def download(self, button="png"):
        """Click a button for a download, and return the file as an image."""
        for path in self.driver.downloads.iterdir():
            path.unlink()
        self[button].click()
        self.wait(lambda: self["saved"].text or self["problem"].text)
        name, _, size = self["saved"].text.partition(", ")
        path = self.driver.downloads / name
        self.wait(path.exists)
        assert size == f"{path.stat().st_size / 1e6:.1f} MB"
        image = Image.open(path)
        image.load()
        return image

    def errors(self):
        """Return the warnings and errors of the console since the last call."""
        return [entry for entry in self.driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def hazy_picture(width, height, seed=0):
    """Draw a room in haze, which every shipped model removes, in any size."""
    clear, depth = render_scene((3, seed))
    return Image.fromarray(np.uint8(255 * add_haze(clear, depth, 0.9, 1.5).clip(0, 1))).resize((width, height), Image.Resampling.BICUBIC)


def difference(found, expected):
    assert found.size == expected.size and found.mode == expected.mode
    return np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max()

"""The controls and the layout of the web page in Chromium, its privacy, and what it needs of servers."""

import functools
import io
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from browser import Page, difference, hazy_picture, serve
from PIL import Image

from aecr_jax import dehaze
from aecr_jax.web.server import make_server
from aecr_jax.web.site import write_site

pytest.importorskip("selenium", reason="needs selenium")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.slow

# ---- the comparison


@pytest.fixture
def compared(page, tmp_path):
    hazy_picture(400, 300).save(tmp_path / "view.png")
    page.choose(tmp_path / "view.png")
    page.wait_for_result()
    page.run("document.getElementById('compare').scrollIntoView({ block: 'center' })")
    return page


def split(page):
    return float(page.run("return document.getElementById('compare').style.getPropertyValue('--split')").rstrip("%"))


def test_the_slider_follows_mouse_touch_and_keyboard(compared, tmp_path):
    page, figure = compared, compared["compare"]
    width = figure.size["width"]
    assert split(page) == 50
    ActionChains(page.driver).move_to_element(figure).click_and_hold().move_by_offset(-width // 4, 0).release().perform()
    assert split(page) == pytest.approx(25, abs=1)
    ActionChains(page.driver).move_by_offset(20, 0).perform()  # without a button
    assert split(page) == pytest.approx(25, abs=1)
    # Left of the line is the original, right of it the result.
    shown = np.asarray(Image.open(io.BytesIO(figure.screenshot_as_png)).convert("RGB").resize((400, 300)), np.int16)
    original = np.asarray(Image.open(tmp_path / "view.png"), np.int16)
    restored = np.asarray(page.download().convert("RGB"), np.int16)
    assert np.abs(shown - original)[:250, :80].mean() < 3 and np.abs(shown - restored)[:250, 140:].mean() < 3
    assert np.abs(shown - original)[:250, 140:].mean() > 8
    page.run("arguments[0].focus()", page["split"])
    ActionChains(page.driver).send_keys(Keys.ARROW_RIGHT).perform()
    assert 25 < split(page) < 28
    ActionChains(page.driver).send_keys(Keys.END).perform()
    assert split(page) == 100 and page["split"].get_attribute("aria-valuetext") == "100% original, 0% restored"
    box = figure.rect
    top = page.run("return arguments[0].getBoundingClientRect().top", figure)
    for kind, share in (("touchStart", 0.5), ("touchMove", 0.75), ("touchEnd", None)):
        points = [] if share is None else [{"x": box["x"] + share * width, "y": top + box["height"] / 2}]
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait(lambda: split(page) == pytest.approx(75, abs=1), 5)


# ---- access, layout, privacy


def test_controls_have_names_and_tab_follows_the_page(compared):
    page = compared
    # In Chromium 150, Tab begins at the element that was last scrolled into view.
    page.run("document.activeElement.blur(); document.querySelector('h1').scrollIntoView()")
    reached = []
    for _ in range(8):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        element = page.driver.switch_to.active_element
        reached.append(element.get_attribute("id") or element.get_attribute("class") or element.get_attribute("href").rpartition("/")[2])
        assert element.accessible_name
    assert reached == ["file", "sample", "model", "strength", "split", "png", "jpeg", "licences.txt"]
    assert page["split"].accessible_name == "Dividing line between original and restored picture"
    assert page["status"].aria_role == "status" and page["problem"].aria_role == "alert"


CONTRAST = """
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (colour) => colour.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll("body *")]
        .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
        .map((e) => {
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
            return [e.tagName + " " + e.textContent.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
        });
"""


def test_text_has_the_contrast_of_wcag_aa(compared):
    """At least 4.5 by the formula of WCAG 2 (relative luminance), also of text on disabled buttons, of which it asks nothing."""
    found = compared.run(CONTRAST)
    assert len(found) > 12 and min(ratio for _, ratio in found) < 21
    assert [entry for entry in found if entry[1] < 4.5] == []


def test_the_layout_of_a_phone(compared):
    page = compared
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        for element in page.driver.find_elements("css selector", "button, .button, select"):
            if element.is_displayed():
                assert element.size["height"] >= 44, element.get_attribute("outerHTML")
        assert page["compare"].size["width"] <= 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_is_requested_elsewhere(browser, address, compared):
    """Every request went to the page's own server, and the browser itself refuses another one."""
    requested = compared.run("return performance.getEntriesByType('resource').map(({ name }) => name)")
    assert len(requested) > 5 and all(name.startswith(address) for name in requested)
    refused = compared.run("return fetch('http://127.0.0.1:1/').then(() => 'sent', (error) => error.message)")
    assert "Failed to fetch" in refused
    assert any("Content Security Policy" in entry["message"] for entry in compared.errors())


# ---- other servers


def test_a_static_server_without_isolation(browser, site, tmp_path):
    """Most hosts for static files send no headers for cross-origin isolation; then the page has one thread."""
    write_site(site, tmp_path / "site")
    hazy_picture(100, 80).save(tmp_path / "view.png")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "site")) as server:
        page = Page(browser, serve(server))
        assert page.run("return crossOriginIsolated") is False
        page.choose(tmp_path / "view.png")
        page.wait_for_result()
        assert difference(page.download().convert("RGB"), dehaze(hazy_picture(100, 80))) <= 2
        assert page.errors() == []
        server.shutdown()


def test_missing_files_are_reported(browser, site):
    for missing, message in (
        ("models/models.json", "The list of models could not be loaded (status 404)"),
        ("models/photo.onnx", "The model could not be loaded (models/photo.onnx, status 404)."),
        ("runtime/ort.wasm.bundle.min.mjs", "The model could not be started"),
    ):
        with make_server({path: content for path, content in site.items() if path != missing}, 0) as server:
            browser.get(serve(server))
            deadline = time.monotonic() + 60
            while not browser.find_element("id", "problem").text and time.monotonic() < deadline:
                if missing != "models/models.json" and browser.execute_script("return document.body.dataset.ready"):
                    browser.execute_script("if (document.getElementById('result').hidden) document.querySelector('.sample').click()")
                time.sleep(0.2)
            assert browser.find_element("id", "problem").text.startswith(message)
            server.shutdown()
    browser.get_log("browser")  # the browser reports the missing files

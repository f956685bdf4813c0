"""The report of a run: correct numbers for an intact run, the readable rest of a damaged run, and no script from a hostile run."""

import base64
import hashlib
import html
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aecr_jax.__main__ import main
from aecr_jax.training.config import Config, config_to_dict
from aecr_jax.training.report import write_report

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>", "javascript:alert(1)")
VOID = {"meta", "img", "br", "hr", "link", "input", "base", "line", "circle", "polyline"}


class Page(HTMLParser):
    """The parsed page: tags with their attributes, the text, and the text of each table row."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.tags, self.rows, self.text, self.style = [], [], "", ""
        self._open = []
        self.feed(self.source)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            self.style += data
            return
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def policy(self):
        (content,) = [meta["content"] for meta in self.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
        return dict(part.strip().split(" ", 1) for part in content.split(";"))


def train_line(step, **values):
    return {"step": step, "kind": "train", "time": 1.5, "l1": 1 / step, "mix1": 0.25, **values}


def eval_line(step, psnr, **values):
    scores = {"psnr": psnr, "ssim": psnr / 100, "input_psnr": 11.5, "input_ssim": 0.4}
    return {"step": step, "kind": "eval", **scores, "images": 8, "weights": "ema", "data": "scenes", **values}


def write_metrics(workdir, *lines):
    (workdir / "metrics.jsonl").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


@pytest.fixture
def workdir(tmp_path):
    """Write the files of an intact run of 40 steps and return their folder."""
    workdir = tmp_path / "its"
    (workdir / "panels").mkdir(parents=True)
    config = json.loads(json.dumps(config_to_dict(Config())))
    config["optim"]["steps"] = 40
    (workdir / "config.json").write_text(json.dumps(config))
    versions = {"python": "3.11.7", "devices": "8 TPU v4", "processes": 2, "packages": {"jax": "0.10.2"}}
    (workdir / "versions.json").write_text(json.dumps(versions))
    write_metrics(workdir, train_line(10), train_line(20), eval_line(20, 24.0), train_line(30), train_line(40), eval_line(40, 22.5))
    for step in (20, 40):
        Image.fromarray(np.full((8, 24, 3), step, np.uint8)).save(workdir / f"panels/step_{step:07d}.png")
    return workdir


def report(workdir, capsys):
    """Write the report and return its page and the lines on standard error."""
    assert main(["report", str(workdir)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{workdir / 'report.html'}\n"
    return Page(workdir / "report.html"), said.err.splitlines()


def damaged(workdir, capsys, *notes):
    """Return the page of a damaged run and check that exactly `notes` are reported, on the page and on standard error."""
    page, lines = report(workdir, capsys)
    assert lines == [f"aecr_jax: {workdir}: {note}" for note in notes]
    assert "could not be read" in page.text
    for note in notes:
        assert note in page.text
    return page


# ---- an intact run


def test_healthy_run(workdir, capsys):
    page, said = report(workdir, capsys)
    assert not said and "could not be read" not in page.text
    assert "its: training run" in page.text and "aecr-jax training run, complete; 8 TPU v4, 2 process(es)" in page.text
    # Two evaluations: 24.0 dB at step 20, 22.5 dB at step 40.
    scores = [["best", "20", "24.00", "0.2400"], ["last", "40", "22.50", "0.2250"], ["hazy input", "", "11.50", "0.4000"]]
    assert page.rows[1:4] == scores
    assert "8 images of scenes; PSNR and SSIM on RGB as in the official code; moving average of the parameters" in page.text
    titles = ["PSNR (dB), RGB over steps", "SSIM over steps", "pixel distance over steps", "mixup factors over steps"]
    assert [svg["aria-label"] for svg in page.all("svg")] == titles
    assert "psnr 22.5" in page.text and "l1 0.025" in page.text  # the last values are 22.5 and 1 / 40
    assert [img["alt"] for img in page.all("img")] == ["panel of step 40", "panel of step 20"]
    assert ["batch", "16"] in page.rows and ["steps", "40"] in page.rows
    assert len(page.all("details")) == 6  # model, data, haze, loss, optim, run
    assert ["devices", "8 TPU v4"] in page.rows and ["jax", "0.10.2"] in page.rows and not any(row[0] == "packages" for row in page.rows)


def test_curves_are_drawn_to_scale(workdir, capsys):
    page, _ = report(workdir, capsys)
    # The frame is 58..448 x 12..202. Values from 11.5 to 24 have ticks from 10 to 25:
    # 24 dB is at 12 + 190 / 15, 22.5 dB at 12 + 190 * 2.5 / 15.
    assert page.all("polyline")[0]["points"].split() == ["58.0,24.7", "448.0,43.7"]
    l1 = [tuple(map(float, point.split(","))) for point in page.all("polyline")[4]["points"].split()]
    assert [x for x, _ in l1] == [58.0, 188.0, 318.0, 448.0]
    # The axis is logarithmic: the distance from 1/10 to 1/20 equals that from 1/20 to 1/40.
    assert l1[1][1] - l1[0][1] == pytest.approx(l1[3][1] - l1[1][1], abs=0.11) and l1[0][1] < l1[3][1]


def test_a_long_curve_is_binned_and_its_last_value_is_the_last_logged(workdir, capsys):
    write_metrics(workdir, *(train_line(step) for step in range(1, 2001)))
    page, said = report(workdir, capsys)
    assert not said and "l1 0.0005" in page.text  # 1 / 2000, not the mean of the last five
    assert len(page.all("polyline")[0]["points"].split()) == 400


@pytest.mark.parametrize("value", [0.1, 1e30, -7.271080620412922e25, 0.0])
def test_a_constant_that_differs_in_its_last_bit(workdir, capsys, value):
    write_metrics(workdir, train_line(1, mix1=value), train_line(2, mix1=float(np.nextafter(value, np.inf))))
    page, said = report(workdir, capsys)
    heights = [float(point.split(",")[1]) for point in page.all("polyline")[1]["points"].split()]
    assert not said and len(heights) == 2 and heights[0] == heights[1] and 12 <= heights[0] <= 202


def test_panels_are_small_pictures_of_the_files(workdir, capsys):
    Image.fromarray(np.full((100, 3000, 3), 200, np.uint8)).save(workdir / "panels/step_0000040.png")
    page, _ = report(workdir, capsys)
    (workdir / "picture.jpg").write_bytes(base64.b64decode(page.all("img")[0]["src"].removeprefix("data:image/jpeg;base64,")))
    with Image.open(workdir / "picture.jpg") as image:
        assert image.size == (1200, 40) and np.abs(np.asarray(image, int) - 200).max() <= 1


def test_policy_forbids_everything_but_the_page_itself(workdir, capsys):
    page, _ = report(workdir, capsys)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert "prefers-color-scheme: dark" in page.style
    assert page.policy() == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # The policy comes before everything that it governs, and the page has nothing that it forbids, such as style attributes.
    assert [tag for tag, _ in page.tags].index("meta") < [tag for tag, _ in page.tags].index("style")
    assert not any("style" in attributes for _, attributes in page.tags)
    assert "://" not in page.source and not page.all("link") and not page.all("script")


# ---- a hostile run


def assert_harmless(page):
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "ul", "li", "table", "tr", "th", "td", "figure"}
    allowed |= {"figcaption", "img", "svg", "line", "text", "g", "polyline", "circle", "span", "details", "summary"}
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "href", "xlink:href", "srcdoc", "action"), (tag, name)
            assert "javascript:" not in value or name in ("alt", "aria-label"), (tag, name, value)
        if "src" in attributes:
            assert re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", attributes["src"])
    assert page.policy()["default-src"] == "'none'" and "script-src" not in page.policy()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_run_adds_no_element(tmp_path, capsys, text):
    file_name = text.replace("/", "\N{FRACTION SLASH}")
    workdir = tmp_path / file_name
    (workdir / "panels").mkdir(parents=True)
    config = {text: {text: text, "nested": {text: [text]}}, "train": {"steps": 40, text: text}, f"{text}2": text, "list": [text]}
    (workdir / "config.json").write_text(json.dumps(config))
    versions = {"devices": text, "processes": text, text: text, "packages": {text: text, "jax": {text: text}}}
    (workdir / "versions.json").write_text(json.dumps(versions))
    values = dict.fromkeys((*train_line(1), *eval_line(1, 1), text), text)
    lines = [values, values | {"step": 1}, values | {"step": 2, "kind": "train"}, values | {"step": 3, "kind": "eval"}, text, [text]]
    write_metrics(workdir, train_line(4), eval_line(5, 20.0, data=text, weights=text), *lines)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(workdir / f"panels/step_{file_name}.png")
    (workdir / f"panels/step_{file_name}2.png").write_text(text)
    page, said = report(workdir, capsys)
    assert_harmless(page)
    # The text is shown in every place, with its special characters escaped.
    assert page.text.count(text) >= 8 and html.escape(text, quote=False).replace('"', "&#34;").replace("'", "&#39;") in page.source
    assert ["processes", text] in page.rows and [text, text] in page.rows and page.all("img")[0]["alt"] == f"panel of step_{file_name}"
    assert "8 images of " + text in page.text
    assert len(said) >= 5 and all(line.startswith("aecr_jax: ") for line in said)


def test_notes_stay_on_one_line_and_send_no_codes_to_a_terminal(workdir, capsys):
    (workdir / "panels" / "step_\x1b[2J\nx.png").write_bytes(b"no picture")
    page, said = report(workdir, capsys)
    assert len(said) == 1 and "\x1b" not in said[0] and "step_\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}x.png" in said[0]
    assert "\x1b" not in page.source


def test_halves_of_surrogate_pairs(workdir, capsys):
    (workdir / "config.json").write_text('{"train": {"steps": 40, "workdir": "\\ud800"}}')
    page, said = report(workdir, capsys)
    assert not said and ["workdir", "?"] in page.rows


# ---- damaged config.json


@pytest.mark.parametrize(
    "text, note",
    [
        ("{}", "config.json is empty"),
        ("[]", "config.json: it contains a list instead of a JSON object"),
        ('"text"', "config.json: it contains a string instead of a JSON object"),
        ("7", "config.json: it contains a number instead of a JSON object"),
        ("null", "config.json: it contains null instead of a JSON object"),
        ('{"train": ', "config.json: it is not JSON"),
        ("[" * 100_000, "config.json: it is nested too deeply"),
        ("", "config.json is empty"),
        ("\0" * 100, "config.json: it is not JSON"),
        ('{"train": {"steps": %s}}' % ("9" * 5000), "config.json: it is not JSON"),
        ('{"model": {}}', "config.json: `optim.steps` is missing"),
        ('{"train": {}}', "config.json: `optim.steps` is missing"),
        ('{"train": {"steps": null}}', "config.json: `optim.steps` is not a whole number"),
        ('{"train": {"steps": "40"}}', "config.json: `optim.steps` is not a whole number"),
        ('{"train": {"steps": true}}', "config.json: `optim.steps` is not a whole number"),
        ('{"train": {"steps": [40]}}', "config.json: `optim.steps` is not a whole number"),
        ('{"train": {"steps": NaN}}', "config.json: `optim.steps` is not a whole number"),
    ],
)
def test_odd_config(workdir, capsys, text, note):
    (workdir / "config.json").write_text(text)
    page = damaged(workdir, capsys, note)
    assert "aecr-jax training run, step 40; 8 TPU v4" in page.text
    assert ["best", "20", "24.00", "0.2400"] in page.rows and len(page.all("svg")) == 4 and len(page.all("img")) == 2
    assert ["jax", "0.10.2"] in page.rows


def test_missing_config(workdir, capsys):
    (workdir / "config.json").unlink()
    page = damaged(workdir, capsys, "config.json is missing")
    assert len(page.all("svg")) == 4


def test_config_with_values_outside_of_sections(workdir, capsys):
    (workdir / "config.json").write_text('{"train": {"steps": 50}, "model": 5, "loss": [1, 2]}')
    page = damaged(workdir, capsys, "config.json: these are not sections of settings: `model`, `loss`")
    assert "step 40 of 50;" in page.text
    assert ["steps", "50"] in page.rows and ["model", "5"] in page.rows and ["loss", "[1, 2]"] in page.rows


@pytest.mark.parametrize("depth", [900, 950, 980, 990])
def test_settings_nested_deeply(workdir, capsys, depth):
    (workdir / "config.json").write_text('{"train": {"steps": 40, "seed": 3, "deep": %s}}' % ("[" * depth + "]" * depth))
    page, said = report(workdir, capsys)
    assert len(page.all("svg")) == 4
    # Python's recursion limit counts from the current depth of the stack, so the whole file, this value alone, or nothing exceeds it.
    shown = [["steps", "40"] in page.rows, any(row[:1] == ["deep"] and len(row[1]) == 2 * depth for row in page.rows)]
    assert (said == [f"aecr_jax: {workdir}: config.json: it is nested too deeply"] and shown == [False, False]) or (
        said == [] if shown == [True, True] else said == [f"aecr_jax: {workdir}: `deep` is nested too deeply"] and shown == [True, False]
    )


# ---- damaged versions.json


@pytest.mark.parametrize(
    "text, notes",
    [
        ("[]", ["versions.json: it contains a list instead of a JSON object"]),
        ("no JSON", ["versions.json: it is not JSON"]),
        (
            '{"python": "3.11.7"}',
            ["versions.json: `devices` is missing", "versions.json: `processes` is missing", "versions.json: `packages` is missing"],
        ),
        (
            '{"python": "3.11.7", "devices": 8, "processes": "2", "packages": ["jax"]}',
            [f"versions.json: `{name}` is {what}" for name, what in (("devices", "not a string"), ("processes", "not a whole number"))]
            + ["versions.json: `packages` is not an object"],
        ),
    ],
)
def test_odd_versions(workdir, capsys, text, notes):
    (workdir / "versions.json").write_text(text)
    page = damaged(workdir, capsys, *notes)
    assert "aecr-jax training run, complete" in page.text and "process(es)" not in page.text
    assert (["python", "3.11.7"] in page.rows) == text.startswith("{") and len(page.all("svg")) == 4


# ---- damaged metrics.jsonl


@pytest.mark.parametrize(
    "line, fault",
    [
        ({"step": 41, "l1": 0.1}, '`kind` is missing or none of "start", "train" and "eval"'),
        ({"step": 41, "kind": None}, '`kind` is missing or none of "start", "train" and "eval"'),
        ({"step": 41, "kind": ["train"]}, '`kind` is missing or none of "start", "train" and "eval"'),
        ({"step": 41, "kind": "other"}, '`kind` is missing or none of "start", "train" and "eval"'),
        ({"kind": "train", "l1": 0.1}, "`step` is missing or not a whole number"),
        ({"step": "41", "kind": "train"}, "`step` is missing or not a whole number"),
        ({"step": None, "kind": "eval"}, "`step` is missing or not a whole number"),
        ({"step": 4.5, "kind": "train"}, "`step` is missing or not a whole number"),
        ({"step": -1, "kind": "train"}, "`step` is missing or not a whole number"),
        ({"step": 10**400, "kind": "train"}, "`step` is missing or not a whole number"),
        ({"step": {"step": 41}, "kind": "train"}, "`step` is missing or not a whole number"),
        ("[]", "it contains a list instead of a JSON object"),
        ("null", "it contains null instead of a JSON object"),
        ('{"step": 41, "kind": "tr', "it is not JSON"),
        ('{"step": 41} }', "it is not JSON"),
        ("\0\0\0\0}", "it is not JSON"),
        ('{"step": ' + "[" * 100_000 + "}", "it is nested too deeply"),
    ],
)
def test_odd_line_of_metrics(workdir, capsys, line, fault):
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    page = damaged(workdir, capsys, f"metrics.jsonl, line 7: {fault}")
    # The six valid lines are shown as if the seventh did not exist.
    assert "complete" in page.text and "l1 0.025" in page.text
    assert page.rows[1:3] == [["best", "20", "24.00", "0.2400"], ["last", "40", "22.50", "0.2250"]]


@pytest.mark.parametrize("value", ["0.5", None, [0.5], {"a": 1}, True, 10**400])
def test_odd_values_in_metrics(workdir, capsys, value):
    lines = [train_line(10), train_line(20, l1=value), train_line(30, l1=value, mix1=value), eval_line(30, 20.0), train_line(40)]
    write_metrics(workdir, *lines, eval_line(40, 22.0) | {"psnr": value, "input_ssim": value})
    page = damaged(
        workdir,
        capsys,
        "metrics.jsonl, line 2 and 1 more: `l1` is not a number",
        "metrics.jsonl, line 3: `mix1` is not a number",
        "metrics.jsonl, line 6: `psnr` is not a number",
        "metrics.jsonl, line 6: `input_ssim` is not a number",
    )
    scores = [["best", "30", "20.00", "0.2000"], ["last", "40", "?", "0.2200"], ["hazy input", "", "11.50", "?"]]
    assert page.rows[1:4] == scores and "psnr 20" in page.text and "mix1 0.25" in page.text and "l1 0.025" in page.text
    l1, mix1 = (line["points"].split() for line in page.all("polyline")[-2:])
    assert len(l1) == 2 and len(mix1) == 3


def test_odd_texts_in_an_evaluation(workdir, capsys):
    write_metrics(workdir, eval_line(40, 22.0, images="8", data=["scenes"], weights=1))
    notes = [f"metrics.jsonl, line 1: `{name}` is not {kind}" for name, kind in (("images", "a whole number"), ("data", "a string"))]
    page = damaged(workdir, capsys, *notes, "metrics.jsonl, line 1: `weights` is not a string")
    assert "? images of ?;" in page.text and ["best", "40", "22.00", "0.2200"] in page.rows


def test_values_that_are_not_finite_are_not_drawn(workdir, capsys):
    extremes = [math.nan, math.inf, -math.inf, 1.7e308, -1.7e308, 5e-324, 0.0, -1.0, 1e-300]
    lines = [train_line(10 + i, l1=value, mix1=value) for i, value in enumerate(extremes)]
    write_metrics(workdir, train_line(1), *lines, eval_line(2, math.nan), eval_line(3, 21.0), eval_line(4, math.inf, ssim=math.nan))
    page, said = report(workdir, capsys)
    assert not said
    assert not re.search(r"nan|inf", "".join(line["points"] for line in page.all("polyline")))
    assert page.rows[1:3] == [["best", "4", "inf", "nan"], ["last", "4", "inf", "nan"]]
    l1, mix1 = (line["points"].split() for line in page.all("polyline")[-2:])
    assert len(l1) == 1 and len(mix1) == 5  # l1 has a logarithmic axis, and only its first value is positive


def test_lines_out_of_order(workdir, capsys):
    write_metrics(workdir, eval_line(40, 22.5), train_line(40), train_line(10), eval_line(20, 24.0))
    page, said = report(workdir, capsys)
    assert not said and page.rows[1:3] == [["best", "20", "24.00", "0.2400"], ["last", "40", "22.50", "0.2250"]]
    assert "l1 0.025" in page.text


def test_bytes_that_are_no_text(workdir, capsys):
    with open(workdir / "metrics.jsonl", "ab") as file:
        file.write(b"\n\xff\xfe\n\n")
    damaged(workdir, capsys, "metrics.jsonl, line 8: it is not JSON")


@pytest.mark.parametrize("state", ["missing", "empty"])
def test_run_without_metrics_shows_the_rest(workdir, capsys, state):
    (workdir / "metrics.jsonl").unlink()
    if state == "empty":
        (workdir / "metrics.jsonl").touch()
    note = {"missing": "metrics.jsonl is missing", "empty": "metrics.jsonl is empty"}[state]
    page = damaged(workdir, capsys, note)
    assert "Not evaluated yet." in page.text and "Nothing logged yet." in page.text and "step 0 of 40" in page.text
    assert ["steps", "40"] in page.rows and ["jax", "0.10.2"] in page.rows and len(page.all("img")) == 2


def test_folders_and_pipes_in_the_place_of_files(workdir, capsys):
    for name in ("metrics.jsonl", "versions.json", "panels/step_0000040.png"):
        (workdir / name).unlink()
    (workdir / "metrics.jsonl").mkdir()
    os.mkfifo(workdir / "versions.json")
    os.mkfifo(workdir / "panels/step_0000040.png")
    notes = ("metrics.jsonl is not a file", "versions.json is not a file", "panels/step_0000040.png cannot be read: it is not a file")
    page = damaged(workdir, capsys, *notes)
    assert ["steps", "40"] in page.rows and [img["alt"] for img in page.all("img")] == ["panel of step 20"]


# ---- damaged panels


def test_panel_without_a_number_is_shown_by_its_name(workdir, capsys):
    shutil.copy(workdir / "panels/step_0000020.png", workdir / "panels/step_best.png")
    page, said = report(workdir, capsys)
    assert not said and [img["alt"] for img in page.all("img")] == ["panel of step_best", "panel of step 40", "panel of step 20"]


def bomb(path, side):
    """Write a small PNG file that decodes to `side * side` pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compressobj(9)
    row = b"\0" * (1 + -(-side // 8))
    data = b"".join(pixels.compress(row) for _ in range(side)) + pixels.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [17_000, 30_000])  # above Pillow's limits for warnings and for errors
def test_decompression_bomb_as_a_panel(workdir, capsys, side):
    bomb(workdir / "panels/step_0000040.png", side)
    page, said = report(workdir, capsys)
    assert len(said) == 1 and "panels/step_0000040.png cannot be read: Image size" in said[0] and "decompression bomb" in said[0]
    assert said[0].removeprefix(f"aecr_jax: {workdir}: ") in page.text
    assert [img["alt"] for img in page.all("img")] == ["panel of step 20"] and len(page.all("svg")) == 4


def test_truncated_panel_and_another_format(workdir, capsys):
    path = workdir / "panels/step_0000040.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    # Pillow would run another program to read PostScript.
    (workdir / "panels/step_0000030.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    page, said = report(workdir, capsys)
    assert said == [
        f"aecr_jax: {workdir}: panels/step_0000040.png cannot be read: image file is truncated",
        f"aecr_jax: {workdir}: panels/step_0000030.png cannot be read: it is not a PNG image",
    ]
    assert [img["alt"] for img in page.all("img")] == ["panel of step 20"]


# ---- folders without a run, and the written file


def test_folder_that_is_no_run(tmp_path, capsys, model_dir):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "file", tmp_path / "empty", tmp_path / "missing", model_dir):
        assert main(["report", str(path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"aecr_jax: {path} is not the work directory of a run") and said.count("\n") == 1
        assert not path.is_dir() or not (path / "report.html").exists()


def test_run_of_which_nothing_can_be_read(workdir, capsys):
    for name in ("config.json", "metrics.jsonl", "versions.json"):
        (workdir / name).write_text("{")
    for path in (workdir / "panels").iterdir():
        path.write_bytes(b"no picture")
    assert main(["report", str(workdir)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl, line 1: it is not JSON" in said and not (workdir / "report.html").exists()


def test_page_is_replaced_whole_or_not_at_all(workdir, monkeypatch):
    path = write_report(workdir)
    before = path.read_bytes()
    written = Path.write_bytes

    def fill_the_disk(self, data):
        written(self, data[:100])
        raise OSError(28, "No space left on device")

    (workdir / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_the_disk)
        assert main(["report", str(workdir)]) == 2
    assert path.read_bytes() == before and sorted(p.name for p in workdir.iterdir() if "report" in p.name) == ["report.html"]


def test_wheel_has_the_template_and_the_models(tmp_path):
    root = Path(__file__).parents[1]
    package = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "*.jinja" in package["package-data"]["aecr_jax.training"]
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs this version to build")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    shutil.copytree(root / "aecr_jax", source / "aecr_jax", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True).stdout
    assert "aecr_jax/training/report.html.jinja" in names
    for file in [*(root / "aecr_jax/pretrained").glob("*/*"), root / "aecr_jax/losses/vgg19_relu3_1.safetensors"]:
        assert str(file.relative_to(root)) in names

"""Documents: commands and Python examples run, and names, links and pictures exist.

Every `sh` block is split into commands. For commands of this project, options are parsed by the command line's own parser, settings by
the config's, and data are opened in small folders with the names that the documents use. The slow tests also run each command, with
narrow networks and for a single step, except for those that need several machines or serve until they are interrupted.
"""

import ast
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from browser import use_stand_in
from flax import nnx
from reference import official_weights
from safetensors.numpy import save_file
from test_convert import small_vgg
from test_convert_networks import make_tensors
from test_lpips import made_up
from test_video import av, flat, write_clip

import aecr_jax
from aecr_jax.__main__ import _RUN, _make_parser, main
from aecr_jax.convert.vgg import convert_vgg
from aecr_jax.data.haze import add_haze
from aecr_jax.data.images import write_image
from aecr_jax.data.layouts import DATASETS
from aecr_jax.data.sources import open_samples, split_samples
from aecr_jax.inference.weights import SHIPPED
from aecr_jax.networks import registry
from aecr_jax.reproduce import settings as reproduce_settings
from aecr_jax.training.config import Config, OptimConfig, load_config, setting_names

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CARDS = sorted((ROOT / "aecr_jax/pretrained").glob("*/README.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *CARDS]
ALL = [*DOCUMENTS, ROOT / "NOTICE.md", ROOT / "CHANGELOG.md"]
HAVE_TORCH = importlib.util.find_spec("torch") is not None
# Settings with which a training step takes less than a second.
TINY = shlex.split(
    "--model.blocks 1 --model.width 4 --model.dtype float32 --data.crop 16 --data.threads 1 --data.cache False"
    " --data.crop_width 0 --optim.batch 8 --optim.accumulate 1 --optim.steps 1 --run.eval_images 1"
)
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document, language):
    """Return the code blocks of a document, without the indentation of blocks in lists."""
    found = re.findall(rf"^([ ]*)```{language}\n(.*?)^\1```$", document.read_text(), re.M | re.S)
    return [textwrap.dedent(text) for _, text in found]


def shell_commands(document):
    """Return the commands of a document, each as a list of words."""
    commands = []
    for line in "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            commands.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        commands += [words] if words else []
    return commands


def own_arguments(words):
    """Return the equivalent arguments of `python -m aecr_jax` for a command of this project, or None for another command."""
    if words[0] == "aecr-jax":  # the command that an installation adds
        return words[1:]
    if words[0] == "gcloud":
        words = shlex.split(words[-1].rpartition("&& ")[2])
    words = words[next((i for i, word in enumerate(words) if word.rpartition("/")[2] == "python"), 0) :]
    if words[1:3] == ["-m", "aecr_jax"]:
        return words[3:]
    return [words[1].removesuffix(".py"), *words[2:]] if words[1:2] in (["train.py"], ["eval.py"]) else None


def own_commands(document):
    return [arguments for words in shell_commands(document) if (arguments := own_arguments(words)) is not None]


# ---- small data with the names that the documents use


def draw_pair(folder, hazy, clear, seed, size=(32, 24)):
    rng = np.random.default_rng(seed)
    coarse = rng.random((4, 4, 3)).astype(np.float32)
    image = np.kron(coarse, np.ones((size[1] // 4, size[0] // 4, 1), np.float32))
    depth = np.linspace(1, 0.3, size[1], dtype=np.float32)[:, None] * np.ones(size[0], np.float32)
    write_image(folder / clear, image)
    for i, name in enumerate(hazy):
        write_image(folder / name, add_haze(image, depth, 0.9, 0.8 + 0.1 * i))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Write small substitutes for the folders that the documents name."""
    root = tmp_path_factory.mktemp("data")
    for i in range(1, 5):
        names = [f"hazy/{i}_{j}_0.9{j}.png" for j in range(1, 4)]
        draw_pair(root / "ITS", names, f"clear/{i}.png", i)
    for i in range(1400, 1450):
        draw_pair(root / "SOTS/indoor", [f"hazy/{i}_1.png"], f"clear/{i}.png", i)
    for i in range(4):
        draw_pair(root / "SOTS/outdoor", [f"hazy/000{i}_0.8_0.2.jpg"], f"clear/000{i}.png", 300 + i)
    for i in range(52):  # more than the 50 that configs hold out
        draw_pair(root, [], f"PHOTOS/{i}.jpg", 400 + i)
    for i in range(1, 56):
        draw_pair(root / "NH-HAZE", [f"{i:02d}_hazy.png"], f"{i:02d}_GT.png", 100 + i)
    for i in range(60):
        draw_pair(root / "NYU", [], f"rgb/{i:05d}.png", 200 + i)
        depth = np.linspace(1, 0.3, 24, dtype=np.float32)[:, None, None] * np.ones((1, 32, 3), np.float32)
        write_image(root / "NYU/depth" / f"{i:05d}.png", depth)
    (root / "HELD").mkdir()
    (root / "HELD/rooms").symlink_to(root / "NYU")
    (root / "HELD/photographs").symlink_to(root / "PHOTOS")
    draw_pair(root, ["photo.png"], "more_photos/second.png", 0)
    (root / "photo.png").rename(root / "photo.jpg")  # the format is recognised from the content
    if av:
        write_clip(root / "clip.mp4", [flat(24, 32)] * 2)
    for name in ("ITS", "SOTS"):
        (root / "archives").mkdir(exist_ok=True)
        (root / "archives" / name).symlink_to(root / name)
    (root / "data").symlink_to(root)  # the configs use this path
    return root


@pytest.fixture
def world(data, tmp_path, monkeypatch):
    """Change to a folder with the data, in which the commands of one document run."""
    for path in (*data.iterdir(), ROOT / "configs"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ready_world(world):
    """Extend `world` by the files that commands of other documents write."""
    save_file(small_vgg(), "torchvision.safetensors")
    convert_vgg("torchvision.safetensors", "ready-vgg19.safetensors")
    if HAVE_TORCH:
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in small_vgg().items()}, "vgg19-dcbb9e9d.pth")
        for path, tensors in zip(("vgg16-397923af.pth", "vgg.pth"), made_up()):
            torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
        torch.save({"model": {f"module.{k}": torch.from_numpy(v) for k, v in official_weights(0).items()}}, "official.pk")
        grid = {name: torch.from_numpy(array) for name, array in make_tensors("grid_dehaze_net").items()}
        torch.save(grid, "grid_dehaze_net_indoor.pth")
    assert main(["train", "--config", "configs/demo.py", *TINY, "--data.train", "scenes:8:32x24", "--loss.cr", "0"]) == 0
    return world


def tiny(arguments):
    """Add settings and sizes with which a command takes seconds."""
    command, *rest = arguments
    rest = [re.sub(r"/checkpoints/\d+$", "/checkpoints/1", word) for word in rest]
    if "--against" in rest:  # test_benchmark tests the comparison with PyTorch
        del rest[rest.index("--against") : rest.index("--against") + 2]
    if command == "train":
        options, overrides = _make_parser().parse_known_args([command, *rest])
        run = load_config(options.config, overrides).run
        begin = re.sub(r"/checkpoints/\d+$", "/checkpoints/1", run.init_from)
        features = ["--loss.features", "ready-vgg19.safetensors"] if not Path("vgg19.safetensors").exists() else []
        rest += [*TINY, *features, "--run.init_from", begin]
        start = next((folder for folder in (Path(begin), SHIPPED / begin) if begin and (folder / "config.json").is_file()), None)
        if start:  # a run that begins with the parameters of another has its size
            model = json.loads((start / "config.json").read_text())["model"]
            rest += [part for name in ("width", "blocks") for part in (f"--model.{name}", str(model[name]))]
    elif command == "reproduce":
        first = {"table2": "base", "table3": "grid_dehaze_net", "table4": "1:1"}[rest[0]]
        for option, value in (("--rows", first), ("--features", "ready-vgg19.safetensors"), ("--seeds", "1")):
            if option in rest:
                del rest[rest.index(option) : rest.index(option) + 2]
            rest += [option, value]
    elif command == "plan":  # test_plan reads the figures of a benchmark
        if "--benchmark" in rest:
            where = rest.index("--benchmark")
            rest[where : where + 2] = ["--step-ms", "100"]
        rest += TINY
    elif command == "check-data" and "--config" in rest:
        rest += ["--data.crop", "16"]
    elif command == "benchmark":
        sizes = {
            "data": "--seconds 0.1 --workers 0 --data.crop 16 --optim.batch 8",
            "op": "--size 8 --channels 8 --rounds 1",
            "model": "--size 8 --width 4 --rounds 1",
            "train": "--size 16 --width 4 --rounds 1 --batch 1",
            "scaling": "--devices 2 --data.crop 16 --model.width 4 --loss.cr 0",
            "growth": "--sizes 8 16 --batches 1 2 --width 4 --rounds 1",
            "accelerator": "--minutes 0.1",  # test_accelerator runs all of it
        }
        for option in ("--size", "--columns", "--width", "--rounds", "--minutes"):
            if option in rest:
                del rest[rest.index(option) : rest.index(option) + 2]
        rest += sizes[rest[0]].split()
    return [command, *rest]


# ---- the README


def test_the_readme_has_at_most_1000_words():
    """Words are counted as by `wc -w`, including tables and code."""
    assert len(README.read_text().split()) <= 1000


def test_the_readme_has_the_two_commands():
    assert {"make demo", "make test"} <= {" ".join(words) for words in shell_commands(README)}


# ---- commands


@by_name
def test_every_command_is_known(document):
    """Commands of other programs are in a short list, and the targets, packages and files that they name exist."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    jax = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("jax>"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [f".[{extra}]" for extra in project["optional-dependencies"]]
    for words in shell_commands(document):
        if own_arguments(words) is not None or words[0] in ("git", "cd", "."):
            continue
        if words[0] == "make":
            assert words[1] in targets
        elif words[:2] == ["pip", "install"]:
            assert words[2] in (".", *extras) or re.sub(r"\[\w+\]", "", words[2]) == jax
            assert len(words) == 3
        elif words[:3] == ["pip", "wheel", "--no-deps"]:
            assert words[3:] == ["."]
        elif words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        else:
            pytest.fail(f"unknown command: {' '.join(words)}")


@by_name
def test_every_command_is_parsed(document, world):
    parser = _make_parser()
    for arguments in own_commands(document):
        options, rest = parser.parse_known_args(arguments)
        assert options.command in _RUN
        config = getattr(options, "config", None)
        if config:
            config = load_config(config, rest)
            if config.data.train not in DATASETS and getattr(options, "what", "") != "scaling":  # which reads no images
                assert split_samples(config.data).train
        else:
            assert not rest, f"{' '.join(arguments)}: {rest}"
        for spec in (getattr(options, "data", None), getattr(options, "test", None)):
            if spec and spec not in DATASETS:
                assert open_samples(re.sub("^scenes$", "scenes:1:32x24", spec))[0]


def test_every_config_of_the_repository_is_in_the_documents():
    text = "".join(path.read_text() for path in DOCUMENTS)
    for path in (ROOT / "configs").glob("*.py"):
        assert f"configs/{path.name}" in text


@pytest.mark.slow
@by_name
def test_every_command_runs(document, ready_world, capsys, monkeypatch):
    small = reproduce_settings.Small(OptimConfig(steps=1, batch=8), crop=16, width=4)
    monkeypatch.setattr(reproduce_settings, "SMALL", dict.fromkeys(reproduce_settings.SMALL, small))
    use_stand_in(monkeypatch, ready_world / "onnxruntime-web-1.30.0.tgz")
    for words in shell_commands(document):
        arguments = own_arguments(words)
        if arguments is None or "--run.coordinator" in arguments or arguments == ["web"]:
            continue
        if not HAVE_TORCH and any(Path(word).suffix in (".pth", ".pk") or word.startswith(("converted/", "lpips.")) for word in arguments):
            continue
        if av is None and "clip.mp4" in arguments:
            continue
        status = main(tiny(arguments))
        assert status == 0, f"{' '.join(arguments)}: {capsys.readouterr().err}"


# ---- Python


@pytest.mark.slow
@by_name
def test_every_python_example_runs(document, world, monkeypatch):
    monkeypatch.setattr(registry, "_NETWORKS", dict(registry._NETWORKS))
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # dataclasses look up their module there
    for code in blocks(document, "python"):
        exec(compile(code, str(document), "exec"), module.__dict__)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    """Every cell runs, in a kernel of its own, and the last one has the scores of an image before and after."""
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs/dehaze.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # results of another version
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    pictures, [scores] = [], [output["data"]["text/plain"] for output in notebook.cells[-2].outputs]
    for cell in notebook.cells:
        pictures += [output["data"]["image/png"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == len(set(pictures)) == 4
    scores = ast.literal_eval(scores)
    assert scores["restored"] > scores["hazy"] + 3


def test_the_network_of_the_guide_keeps_the_contract(monkeypatch):
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    monkeypatch.setattr(registry, "_NETWORKS", dict(registry._NETWORKS))
    exec(blocks(ROOT / "CONTRIBUTING.md", "python")[0], module.__dict__)
    registry.register_network(module.Toy)
    model = registry.make_network(registry.config_from_dict({"name": "toy", "features": 3}), rngs=nnx.Rngs(0))
    assert model(jnp.full((2, 7, 5, 3), 0.5)).shape == (2, 7, 5, 3)


# ---- names, links, pictures


@by_name
def test_settings_configs_and_files_in_the_text_exist(document):
    names = setting_names(Config())
    quoted = re.findall(r"`([^`\n]+)`", document.read_text())
    for text in quoted:
        for name in re.findall(r"--([a-z]+\.[a-z_]+)\b", text):
            assert name in names or name == "model.features"  # a setting of the guide's example
        for config in re.findall(r"configs/\w+\.py(?::[\w:]+)?", text):
            load_config(ROOT / config)
        for path in re.findall(r"(?:aecr_jax|configs|docs|tests|benchmarks)/[\w./-]*\w", text):
            assert "NAME" in path or "toy" in path or (ROOT / path).exists(), path
    for name in re.findall(r"`:(\w+(?::\w+)?)`", document.read_text()):
        assert any(name in runpy.run_path(str(path)).get("configs", {}) for path in (ROOT / "configs").glob("*.py")), name


def slugs(document):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.is_file(), target
        assert not anchor or anchor in slugs(path), target


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs/api.md").read_text()
    assert not [name for name in aecr_jax.__all__ if f"::: aecr_jax.{name}\n" not in text]


def test_every_document_is_reached():
    """The README links to every document, and the navigation of the web site contains it."""
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages - {"index.md"} == set(re.findall(r"\]\(docs/(\w+\.md)\)", README.read_text()))
    assert pages == {page for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for page in entry.values()}


def test_the_picture_of_the_architecture_is_of_this_code():
    script = runpy.run_path(str(ROOT / "docs/architecture.py"))
    graph, rows = script["imports"](), {name: place[2] for name, place in script["PACKAGES"].items()}
    assert script["draw"](graph) == script["PICTURE"].read_text(), "run python docs/architecture.py"
    assert all(rows[name] > rows[below] for name, others in graph.items() for below in others)
    packages = {path.parent.name for path in (ROOT / "aecr_jax").glob("*/__init__.py")}
    assert packages == set(rows) - {"__main__"}


def test_the_web_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    assert "Restores hazy images" in page and "Remove the haze from an image" in page  # these are docstrings


# ---- citation and requirements


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == aecr_jax.__version__ and citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["title"] in README.read_text() and f"pages = {{{paper['start']}--{paper['end']}}}" in README.read_text()
    assert all(f"{author['family-names']}, {author['given-names']}" in README.read_text() for author in paper["authors"])


def test_the_extra_for_documents_is_what_the_tests_install():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    assert set(extra) <= set((ROOT / "requirements-test.txt").read_text().splitlines())


# ---- the split of the headline score


def test_the_split_of_the_headline_score(data):
    """The split has every fifth scene of SOTS indoor, with all its hazy images in the folder: here one for each of the 50 scenes."""
    samples, name = open_samples(f"{data}/SOTS/indoor@sots_indoor_10/test")
    assert [sample.scene for sample in samples] == [str(scene) for scene in range(1400, 1450, 5)]
    assert name == f"sots_indoor_10/test of {data}/SOTS/indoor"

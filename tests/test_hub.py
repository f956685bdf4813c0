"""Models on the Hugging Face Hub: addresses, downloads, `push` and model cards. A server on this machine stands in for the Hub."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import TOKEN, Hub
from test_commands import fails
from test_data import picture

from aecr_jax.__main__ import main
from aecr_jax.errors import UserError
from aecr_jax.inference.hub import PACKAGE, hub_folder, is_address
from aecr_jax.inference.push import check_card, push
from aecr_jax.inference.weights import SHIPPED, load_checkpoint, save_checkpoint
from aecr_jax.networks.arrays import get_arrays

pytest.importorskip("huggingface_hub", reason="needs the extra hub")
# huggingface_hub passes an argument to its HTTP client that the client will drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, with an empty cache and a logged-in user."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # huggingface_hub reads these variables of the environment once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in stores large files by the protocol of Git LFS alone
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def stored(hub, model_dir):
    """A repository with a small model, and files that must not be downloaded."""
    files = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    hub.commit("someone/small", files | {"README.md": b"# small\n", "model.py": b"raise SystemExit", "old/model.safetensors": b"?"})
    return hub


def logged_out(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no-such-file")
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", "no-such-file", raising=False)


def equal(one, other):
    one, other = get_arrays(one), get_arrays(other)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---- download


def test_a_model_is_loaded_by_its_address(stored, model_dir):
    """The weights are those of the repository, and only the files of a model are downloaded."""
    model = load_checkpoint("hf://someone/small")
    assert equal(model, load_checkpoint(model_dir)) and model.name == "small"
    assert {path.name for path in hub_folder("hf://someone/small").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert not [line for line in stored.requests if re.search(r"model\.py|/old/", line)]
    assert equal(load_checkpoint(Path("hf://someone/small")), model)  # pathlib removes one slash


def test_a_revision_is_a_branch_or_a_commit(stored, tmp_path, model_dir):
    first = stored.repositories["someone/small"]["main"]
    changed = load_checkpoint(model_dir)
    save_checkpoint(changed, tmp_path / "named", {"name": "of the branch"})
    stored.commit("someone/small", {path.name: path.read_bytes() for path in (tmp_path / "named").iterdir()}, "next")
    assert load_checkpoint("hf://someone/small@next").name == "of the branch"
    assert load_checkpoint(f"hf://someone/small@{first}").name == "small"


def test_commands_take_an_address(stored, capsys):
    picture(Path("a.png"), (20, 12))
    assert main(["dehaze", "a.png", "--model", "hf://someone/small", "--output", "clean"]) == 0
    assert "model: hf://someone/small" in capsys.readouterr().out
    said = fails(capsys, "eval", "--model", "hf://someone/none", "--data", "scenes:1:32x24")
    reason = "there is no repository someone/none, or it is private: check the name, or log in with `hf auth login`"
    assert said == f"aecr_jax: hf://someone/none cannot be loaded: {reason}"


def test_offline_use_reads_the_cache(stored, tmp_path):
    """In a process of its own, in which the variables of the environment are read."""
    load_checkpoint("hf://someone/small")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    root = Path(__file__).parents[1]
    program = (
        "from aecr_jax.inference.hub import hub_folder\n"
        "print(hub_folder('hf://someone/small'))\n"
        "try: hub_folder('hf://someone/other')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=root, capture_output=True, text=True, check=True)
    folder, error = done.stdout.splitlines()
    assert folder == str(hub_folder("hf://someone/small"))
    assert re.fullmatch(
        r"hf://someone/other cannot be loaded: it is not in the cache, and the Hub cannot be reached \(.*offline.*\)", error
    )


def test_without_a_connection_the_cache_is_used(stored, monkeypatch):
    from huggingface_hub import constants

    load_checkpoint("hf://someone/small")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens on the port "discard"
    load_checkpoint("hf://someone/small")
    with pytest.raises(UserError, match=r"^hf://someone/other cannot be loaded: it is not in the cache, .*cannot be reached \([^\n]+\)$"):
        load_checkpoint("hf://someone/other")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://small", r"address \(=hf://small\) must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
        ("hf://a/b/c", "address .* must be hf://OWNER/NAME"),
        ("hf://a/b c", "address .* must be hf://OWNER/NAME"),
        ("hf://a/b--c", r"repository \(=a/b--c\) must be OWNER/NAME"),
        ("hf://../b", r"repository \(=\.\./b\) must be"),
        ("hf://a/b@", r"revision \(=\) must be a branch, a tag or a commit"),
        ("hf://a/b@../../x", r"revision \(=\.\./\.\./x\) must be"),
        ("hf://a/b@main/../../x", "revision .* must be"),
    ],
)
def test_a_malformed_address_is_refused(hub, address, message):
    assert is_address(address)
    with pytest.raises(UserError, match=message):
        load_checkpoint(address)
    assert not hub.requests


def test_what_cannot_be_loaded_is_explained(stored, monkeypatch):
    stored.commit("someone/other", {"README.md": b"# a text\n", "config.json": b"{}"})
    stored.commit("someone/gated", {"config.json": b"{}"})
    stored.gated.add("someone/gated")
    stored.private.add("someone/small")
    expected = {
        "hf://someone/small@v2": "someone/small has no revision v2",
        "hf://someone/other": "is not a model of aecr-jax: the repository has no model.safetensors$",
        "hf://someone/gated": "request access on the page of someone/gated",
    }
    for address, message in expected.items():
        with pytest.raises(UserError, match=message):
            load_checkpoint(address)
    load_checkpoint("hf://someone/small")
    logged_out(monkeypatch)
    stored.commit("someone/hidden", {"config.json": b"{}"})
    stored.private.add("someone/hidden")
    with pytest.raises(UserError, match=r"there is no repository someone/hidden, or it is private: .* `hf auth login`"):
        load_checkpoint("hf://someone/hidden")


def test_damaged_weights_are_found(stored):
    """A changed bit fails the checksum in config.json."""
    weights = bytearray(stored.files("someone/small")["model.safetensors"])
    weights[-1] ^= 1
    stored.commit("someone/small", {"model.safetensors": bytes(weights)})
    with pytest.raises(UserError, match="damaged or half written"):
        load_checkpoint("hf://someone/small")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: load_checkpoint("hf://a/b"), lambda: push("photo", "a/b", dry_run=tmp_path / "x")):
        with pytest.raises(UserError, match=r"needs the extra hub .*: run `pip install 'huggingface_hub>="):
            use()


# ---- push


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_pushed_model_is_loaded_again(hub, model_dir, capsys):
    """Weights, config and card are in one commit, to a new private repository."""
    message = ["--license", "mit", "--private", "--message", "First weights"]
    assert main(["push", str(model_dir), "someone/new", *message]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "load it as hf://someone/new"
    assert hub.messages == ["First weights"] and hub.private == {"someone/new"}
    files = hub.files("someone/new")
    assert set(files) == {".gitattributes", "model.safetensors", "config.json", "README.md"}
    assert json.loads(files["config.json"])["about"]["license"] == "mit"
    model = load_checkpoint("hf://someone/new")
    assert equal(model, load_checkpoint(model_dir)) and model.name == "small"
    card = files["README.md"].decode()
    assert front_matter(card) == {
        "tags": ["image-dehazing", "aecr-net", "jax", "flax"],
        "license": "mit",
        "library_name": "aecr-jax",
        "pipeline_tag": "image-to-image",
    }
    assert '"hf://someone/new"' in card


def test_a_branch_is_created(hub, model_dir):
    for _ in range(2):  # the second time, repository and branch exist
        push(model_dir, "someone/new", license="mit", revision="next")
    assert set(hub.files("someone/new")) == {".gitattributes"}
    assert load_checkpoint("hf://someone/new@next").name == "small"


def test_a_dry_run_writes_a_folder_whose_edited_card_is_pushed(hub, model_dir, tmp_path, capsys):
    options = ["--license", "mit", "--datasets", "my-photographs"]
    assert main(["push", str(model_dir), "someone/new", *options, "--dry-run", "new"]) == 0
    assert not hub.requests and "nothing was uploaded" in capsys.readouterr().out
    card = tmp_path / "new/README.md"
    card.write_text(card.read_text().replace("A model that", "A very small model that") + "\n## Limits\n\nMany; see [notes](notes.md).\n")
    assert "already exists" in fails(capsys, "push", model_dir, "someone/new", *options, "--dry-run", "new")
    assert main(["push", "new", "someone/new"]) == 0
    pushed = hub.files("someone/new")["README.md"].decode()
    assert "A very small model" in pushed and "Many; see notes." in pushed and pushed.count("## Use") == 1
    assert (front_matter(pushed)["license"], front_matter(pushed)["datasets"]) == ("mit", ["my-photographs"])


def test_scores_are_in_the_index_of_the_card(hub, model_dir, tmp_path):
    """The index has the scores of `eval`, as huggingface_hub reads them."""
    from huggingface_hub import ModelCard

    assert main(["eval", "--model", str(model_dir), "--data", "scenes:1:32x24", "--metrics", "psnr,psnr_y", "--output", "results"]) == 0
    summary = json.loads(Path("results/summary.json").read_text())
    folder = push(model_dir, "someone/new", license="mit", scores={"drawn rooms": "results/summary.json"}, dry_run="new")
    data = ModelCard((folder / "README.md").read_text()).data
    assert data.metrics == ["psnr", "psnr_y"] and data.model_name == "small"
    found = [(result.dataset_type, result.metric_type, result.metric_value) for result in data.eval_results]
    assert found == [("drawn-rooms", name, summary[name]) for name in ("psnr", "psnr_y")]
    assert f"| {summary['input_psnr']:.2f} | {summary['psnr']:.2f} |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["photo", "aecr_net_tiny"])
def test_a_shipped_model_is_pushed_with_its_card(hub, name):
    """Its scores become the index, its picture is uploaded, and no link leads out of the repository."""
    from huggingface_hub import ModelCard

    push(name, "someone/shipped")
    files = hub.files("someone/shipped")
    assert files["model.safetensors"] == (SHIPPED / name / "model.safetensors").read_bytes()
    assert files["failure.jpg"] == (SHIPPED / name / "failure.jpg").read_bytes()
    card = files["README.md"].decode()
    assert f"# Model card: {name}" in card and "../" not in card
    data = ModelCard(card).data
    wanted = front_matter((SHIPPED / name / "README.md").read_text())["scores"]
    assert [result.metric_value for result in data.eval_results] == [wanted[key][m] for key in wanted for m in ("psnr", "ssim")]
    assert load_checkpoint("hf://someone/shipped").name == name


def test_what_cannot_be_pushed_is_refused(hub, model_dir, capsys, monkeypatch, tmp_path):
    (tmp_path / "wrong.json").write_text("[]")
    mit = ["--license", "mit"]
    assert "the licence of small is not known: add --license" in fails(capsys, "push", model_dir, "a/b")
    assert "dcp has no weights" in fails(capsys, "push", "dcp", "a/b", *mit)
    assert "repository (=b) must be OWNER/NAME" in fails(capsys, "push", model_dir, "b", *mit)
    assert "must be NAME=FILE" in fails(capsys, "push", model_dir, "a/b", *mit, "--scores", "summary.json")
    assert "is not a summary.json of eval" in fails(capsys, "push", model_dir, "a/b", *mit, "--scores", "x=wrong.json")
    assert "front matter is invalid" in fails(capsys, "push", model_dir, "a/b", *mit, "--datasets", "NYU Depth v2")
    assert "there is no checkpoint folder" in fails(capsys, "push", "none", "a/b", *mit)
    model = shutil.copytree(model_dir, tmp_path / "model")
    for scores in ("", " [1]", " {sots_indoor: {psnr: 30}}"):
        (model / "README.md").write_text(f"---\nlicense: mit\nscores:{scores}\n---\n\n# A card\n")
        assert "README.md has scores that are not those of a shipped model's card" in fails(capsys, "push", model, "a/b")
    assert not hub.requests
    logged_out(monkeypatch)
    assert "log in with `hf auth login` and a token that may access a/b" in fails(capsys, "push", model_dir, "a/b", *mit)


# ---- cards


@pytest.mark.parametrize("folder", sorted(path for path in SHIPPED.iterdir() if path.is_dir()), ids=lambda path: path.name)
def test_the_front_matter_of_a_shipped_card_is_valid(folder):
    check_card((folder / "README.md").read_text())


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("", "license .*must be one of the Hub's names"),
        ("license: Apache 2.0", r"license \(='Apache 2.0'\) must be"),
        ("license: mit\nlibrary_name: x", "pipeline_tag"),
        ("license: [", "front matter is invalid"),
        ("license: mit\nlibrary_name: x\npipeline_tag: y\ndatasets: [NYU Depth v2]", "Repo id must use alphanumeric"),
        ("license: mit\nlibrary_name: x\npipeline_tag: y\nmetrics: a", "metrics .*must be a list"),
        ("license: mit\nlibrary_name: x\npipeline_tag: y\nmodel-index: [{name: z}]", "Invalid `model_index`"),
    ],
)
def test_invalid_front_matter_is_refused(front, message):
    with pytest.raises(UserError, match=message):
        check_card(f"---\n{front}\n---\n\n# A card\n")


def test_the_extra_is_what_the_tests_install_and_what_the_message_names():
    root = Path(__file__).parents[1]
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["hub"]
    assert extra == [PACKAGE] and PACKAGE in (root / "requirements-test.txt").read_text().splitlines()

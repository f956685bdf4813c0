"""Runs in object storage, on a server on this machine that stands in for Google Cloud Storage."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from gcs_server import Storage
from test_commands import fails
from test_data import picture

from aecr_jax import UserError, load_checkpoint, save_checkpoint
from aecr_jax.__main__ import main
from aecr_jax.files import refuse_existing, replacing
from aecr_jax.inference.weights import list_steps
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.storage import as_path
from aecr_jax.training import lock
from aecr_jax.training.lock import FolderLock

ROOT = Path(__file__).parents[1]
# gcsfs sends objects of more than a megabyte, such as profiles, in this way.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
needs_gcsfs = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="the extra gcs is not installed")
# The smallest run that logs, evaluates, and saves twice.
OPTIONS = ("--loss.cr", "0", "--model.width", "2", "--model.dfe", "none", "--run.save_every", "1")


@pytest.fixture(scope="module")
def storage():
    """Start a server with the bucket `bucket`, and point gcsfs, google-cloud-storage and tensorstore at it."""
    server = Storage("bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        # They would look for credentials, and for the kind of the bucket at another server.
        patch.setenv("GCE_METADATA_ROOT", server.url.removeprefix("http://"))
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")
        import fsspec

        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # fsspec has read the environment when it was imported
        yield server
        server.shutdown()
        server.server_close()


def train(config_file, workdir, *options):
    return main(["train", "--config", config_file, *OPTIONS, "--run.workdir", str(workdir), *map(str, options)])


@pytest.fixture(scope="module")
def local_run(config_file, tmp_path_factory):
    """Return the folder of a run of four steps on the disk that was not interrupted."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    assert train(config_file, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def killed(storage, config_file):
    """Train to `gs://bucket/run` in a process that is killed after it has saved a checkpoint, and return the address."""
    command = [sys.executable, "-m", "aecr_jax", "train", "--config", config_file, *OPTIONS, "--run.workdir", "gs://bucket/run"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while "run/checkpoints/1/commit_success.txt" not in storage.names("bucket") and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    assert "run/lock.json" in storage.names("bucket")
    return "gs://bucket/run"


def text(storage, name):
    return storage.buckets["bucket"][name].data.decode()


def weights(checkpoint):
    return {name: np.asarray(array) for name, array in get_arrays(load_checkpoint(checkpoint), nnx.Param).items()}


def equal(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.fixture(scope="module")
def remote_run(storage, killed, config_file):
    """Resume the killed run to its end, with a profile of its last step, and return the address."""
    assert train(config_file, killed, "--run.profile", "4:4") == 0
    return killed


@needs_gcsfs
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_parameters_and_the_log_of_an_uninterrupted_one_on_disk(storage, remote_run, local_run):
    assert list_steps(remote_run + "/checkpoints") == list_steps(local_run / "checkpoints")
    assert equal(weights(f"{remote_run}/checkpoints/4"), weights(local_run / "checkpoints" / "4"))
    names = {name.removeprefix("run/") for name in storage.names("bucket", "run/")} - {"report.html"}
    assert {name for name in names if not name.startswith(("checkpoints/", "eval/", "profile/"))} == {
        "config.json",
        "data.json",
        "metrics.jsonl",
        "panels/step_0000002.png",
        "panels/step_0000004.png",
        "versions.json",
    }

    def log(content):
        entries = [json.loads(line) for line in content.splitlines()]
        return [(entry["step"], entry["kind"], entry.get("l1"), entry.get("psnr")) for entry in entries if entry["kind"] != "start"]

    assert log(text(storage, "run/metrics.jsonl")) == log((local_run / "metrics.jsonl").read_text())


@needs_gcsfs
@pytest.mark.slow
def test_the_commands_that_read_a_run_take_an_address(storage, remote_run, tmp_path, capsys):
    assert main(["eval", "--checkpoint", remote_run, "--data", "scenes:2:32x24", "--output", remote_run + "/eval"]) == 0
    summary = json.loads(text(storage, "run/eval/summary.json"))
    assert summary["checkpoint"] == remote_run and summary["images"] == 2
    assert text(storage, "run/eval/per_image.csv").count("\n") == 3
    picture(tmp_path / "hazy.png", (24, 16))
    assert main(["dehaze", str(tmp_path / "hazy.png"), "--checkpoint", remote_run, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "hazy.png").is_file()
    assert main(["report", remote_run]) == 0
    assert "<svg" in (page := text(storage, "run/report.html")) and "data:image/jpeg" in page and "complete" in page
    assert main(["export", remote_run, "--format", "stablehlo", "--output", str(tmp_path / "model.jaxexport"), "--size", "32"]) == 0
    assert (tmp_path / "model.jaxexport").stat().st_size > 0


@needs_gcsfs
@pytest.mark.slow
def test_a_profile_is_uploaded(storage, remote_run, tmp_path):
    (name,) = (name for name in storage.names("bucket", "run/profile/") if name.endswith(".xplane.pb"))
    (tmp_path / "trace.xplane.pb").write_bytes(storage.buckets["bucket"][name].data)
    planes = jax.profiler.ProfileData.from_file(str(tmp_path / "trace.xplane.pb")).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [4]


@needs_gcsfs
@pytest.mark.slow
def test_an_unfinished_checkpoint_does_not_count_and_a_damaged_one_is_moved_aside(storage, remote_run, config_file, capsys):
    storage.put("bucket", "run/checkpoints/9/metrics/metrics", b'{"psnr": 99.0}')  # without orbax's last object
    assert 9 not in list_steps(remote_run + "/checkpoints") and load_checkpoint(remote_run).step != 9
    storage.put("bucket", "run/checkpoints/4/metrics/metrics", b"damaged")
    assert train(config_file, remote_run) == 0
    moved = storage.names("bucket", "run/damaged-checkpoint-4/")
    assert "run/damaged-checkpoint-4/metrics/metrics" in moved and "run/damaged-checkpoint-4/config/metadata" in moved
    assert json.loads(text(storage, "run/checkpoints/4/metrics/metrics"))["psnr"] > 0


@needs_gcsfs
def test_an_exported_model_is_written_and_read(storage, model_dir):
    save_checkpoint(load_checkpoint(model_dir), "gs://bucket/model")
    assert storage.names("bucket", "model/") == ["model/config.json", "model/model.safetensors"]
    assert equal(weights("gs://bucket/model"), weights(model_dir))
    assert load_checkpoint(Path("gs://bucket/model")).name == "model"  # pathlib removes one slash
    with pytest.raises(UserError, match=r"gs://bucket/model/config\.json already exists"):
        refuse_existing("gs://bucket/model/config.json")


@needs_gcsfs
def test_an_object_is_replaced_as_a_whole_or_not_at_all(storage):
    with replacing("gs://bucket/whole/a.txt") as partial:
        partial.write_text("first")
    with pytest.raises(ZeroDivisionError), replacing("gs://bucket/whole/a.txt") as partial:
        partial.write_text("second")
        _ = 1 / 0
    assert text(storage, "whole/a.txt") == "first"
    with pytest.raises(UserError, match=r"gs://nowhere/a.txt cannot be written: .+"), replacing("gs://nowhere/a.txt") as partial:
        partial.write_text("lost")


# ---- the lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "OBJECT_HEARTBEAT_SECONDS", 0.2)


def other_machine(storage, run):
    """Write a lock as a process on another host does."""
    owner = {"host": "elsewhere", "pid": os.getpid(), "started": 0.0, "machine": "elsewhere", "since": "then", "token": "x"}
    storage.put("bucket", f"{run}/lock.json", json.dumps(owner).encode())


@needs_gcsfs
def test_a_second_owner_is_refused_and_told_who_the_first_is(storage, quick):
    with FolderLock("gs://bucket/held") as first:
        before = storage.buckets["bucket"]["held/lock.json"]
        with pytest.raises(UserError, match=f"gs://bucket/held is in use: process {os.getpid()} on {socket.gethostname()} has been"):
            FolderLock("gs://bucket/held").__enter__()
        deadline = time.monotonic() + 20
        while (after := storage.buckets["bucket"]["held/lock.json"]).generation == before.generation and time.monotonic() < deadline:
            time.sleep(0.05)
        assert after.generation > before.generation and after.data == before.data  # the owner has touched it
        first.check()
    assert storage.names("bucket", "held/") == []


@needs_gcsfs
def test_another_machine_that_writes_the_lock_is_alive(storage, quick):
    other_machine(storage, "alive")
    stop = threading.Event()

    def write():
        while not stop.wait(0.1):
            other_machine(storage, "alive")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"process .* on elsewhere"):
            FolderLock("gs://bucket/alive", lambda _: None).__enter__()
    finally:
        stop.set()
        thread.join()
    assert json.loads(text(storage, "alive/lock.json"))["token"] == "x"


@needs_gcsfs
def test_of_several_processes_one_takes_over_the_lock_of_a_dead_machine(storage, quick):
    other_machine(storage, "dead")
    locks, held, refused = [FolderLock("gs://bucket/dead", lambda _: None) for _ in range(4)], [], []

    def enter(one):
        try:
            held.append(one.__enter__())
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=enter, args=[one]) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 3 and all("is in use" in said for said in refused)
    assert json.loads(text(storage, "dead/lock.json"))["token"] == held[0]._token
    held[0].__exit__(None, None, None)
    assert storage.names("bucket", "dead/") == []


@needs_gcsfs
def test_an_owner_that_lost_its_lock_is_told_and_leaves_the_new_one(storage, quick):
    with FolderLock("gs://bucket/lost") as held:
        other_machine(storage, "lost")
        with pytest.raises(UserError, match="has been taken over by another process"):
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.05)
    assert json.loads(text(storage, "lost/lock.json"))["token"] == "x"


# ---- what is refused


def test_other_storage_is_refused_in_one_line(config_file, capsys):
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", "s3://bucket/run")
    assert (
        "run.workdir: s3://bucket/run cannot hold a run: orbax writes checkpoints to folders and to gs:// only" in said and "s3fs" in said
    )
    assert "s3://bucket/run cannot hold a run" in fails(capsys, "report", "s3://bucket/run")
    assert "s3://bucket/run cannot hold a run" in fails(capsys, "eval", "--checkpoint", "s3://bucket/run", "--data", "scenes")


def test_without_the_extra_the_message_says_what_to_install(monkeypatch, config_file, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = fails(capsys, "train", "--config", config_file, "--run.workdir", "gs://bucket/run")
    assert said == "aecr_jax: run.workdir: gs://bucket/run needs the extra gcs: run `pip install 'aecr-jax[gcs]'`"


@pytest.mark.parametrize("address", ["gs://bucket", "gs://bucket/", "gs://", "gs:///run", "gs://bucket//run"])
def test_an_address_without_bucket_or_folder_is_refused(address):
    with pytest.raises(UserError, match="must be gs://BUCKET/NAME"):
        as_path(address)


def test_data_and_results_must_be_on_this_machine(config_file, capsys):
    said = fails(capsys, "train", "--config", config_file, "--data.train", "gs://bucket/its@reside/train")
    assert (
        "data (=gs://bucket/its@reside/train) must be on this machine" in said
        and "gcloud storage rsync --recursive gs://bucket/its DIR" in said
    )
    said = fails(capsys, "eval", "--data", "reside/its", "--data-dir", "gs://bucket/sets")
    assert "data_dir (=gs://bucket/sets) must be on this machine" in said
    assert "--output (=gs://bucket/out) must be on this machine" in fails(capsys, "dehaze", "a.png", "--output", "gs://bucket/out")
    assert "--dry-run (=gs://bucket/out) must be on this machine" in fails(capsys, "push", "photo", "a/b", "--dry-run", "gs://bucket/out")


@needs_gcsfs
def test_a_bucket_that_does_not_exist_is_one_line(storage, config_file, capsys):
    said = fails(capsys, "train", "--config", config_file, *OPTIONS, "--run.workdir", "gs://nowhere/run")
    assert said.startswith("aecr_jax: gs://nowhere/run/lock.json cannot be written: 404")
    said = fails(capsys, "eval", "--checkpoint", "gs://nowhere/run", "--data", "scenes")
    assert said.startswith("aecr_jax: there is no checkpoint folder gs://nowhere/run")

"""Install the package into fresh environments and use it there: each Python that is found, with the oldest and the newest jax and flax.

Command: `make matrix`, or `python tests/matrix.py --python python3.12 --versions newest`.

For each environment, the wheel is installed as users install it, and two commands are run from another folder: `aecr-jax models`, and
`aecr-jax dehaze` on a picture. Then the tests named below run against the installed package. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
# The operator, a network, the training step, and checkpoints: what depends on jax, flax, optax and orbax.
TESTS = ("test_deform_conv.py", "test_coarse_net.py", "test_step.py", "test_export.py")
_PINNED = ("jax", "flax")


def oldest_versions() -> list[str]:
    """Return constraints to the lower bounds in requirements.txt of the packages that the matrix varies."""
    text = (ROOT / "requirements.txt").read_text()
    return [f"{name}=={re.search(rf'^{name}>=([^,]+),', text, re.MULTILINE)[1]}" for name in _PINNED]


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command in a folder and return its output.

    Raises:
      RuntimeError: its exit status is not 0.
    """
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def check(python: str, versions: str, wheel: Path, folder: Path) -> str:
    """Install the wheel into a new environment in `folder`, use it and test it; return the versions of jax and flax that were installed."""
    environment = folder / "environment"
    run([python, "-m", "venv", environment], folder)
    installed = environment / "bin" / "python"
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(oldest_versions() if versions == "oldest" else []))
    pip = [installed, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraints]
    run([*pip, wheel], folder)

    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    command = environment / "bin" / "aecr-jax"
    run([command, "models"], elsewhere)
    shutil.copy(ROOT / "docs" / "pictures" / "summer_palace.jpg", elsewhere / "photo.jpg")
    run([command, "dehaze", "photo.jpg", "--output", "dehazed"], elsewhere)
    if not (elsewhere / "dehazed" / "photo.png").exists():
        raise RuntimeError("aecr-jax dehaze wrote no picture")

    run([*pip, "pytest>=9.2,<10", "pytest-xdist>=3.8,<4"], folder)
    # A copy without the package, so that the tests import the installed one.
    copy = folder / "copy"
    copy.mkdir()
    for name in ("tests", "configs", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "train.py", "eval.py", "requirements.txt"):
        shutil.copy(ROOT / name, copy / name)
    run([installed, "-m", "pytest", "-n", "0", "-m", "not slow", *(f"tests/{name}" for name in TESTS)], copy)
    code = "import flax, jax; print(f'jax {jax.__version__}, flax {flax.__version__}')"
    return run([installed, "-c", code], folder).strip()


def main() -> int:
    """Check every combination and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", nargs="+", default=PYTHONS, help="interpreters; those that are not found are skipped (default: %(default)s)"
    )
    parser.add_argument(
        "--versions", nargs="+", choices=("oldest", "newest"), default=("oldest", "newest"), help="versions of jax and flax"
    )
    arguments = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", name, ROOT], ROOT)
        (wheel,) = Path(name).glob("*.whl")
        for python in arguments.python:
            if not shutil.which(python) or subprocess.run([python, "--version"], capture_output=True).returncode:
                print(f"{python}: not found")
                continue
            for versions in arguments.versions:
                start = time.monotonic()
                folder = Path(name) / "run"
                folder.mkdir()
                try:
                    result = check(python, versions, wheel, folder)
                except RuntimeError as error:
                    result, failures = f"FAILED\n{error}", failures + 1
                shutil.rmtree(folder)
                print(f"{python}, {versions}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""The Hugging Face Hub: downloading a model that an address `hf://OWNER/NAME@REVISION` names, and uploading a model's folder.

The package huggingface_hub, the extra `hub`, does the transfer; its cache, its login and its environment variables, such as HF_ENDPOINT and
HF_HUB_OFFLINE, apply. Only the files that a model consists of are downloaded, and reading them runs no code.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from aecr_jax import __version__
from aecr_jax.errors import UserError

PACKAGE = "huggingface_hub>=2.4,<3"
"""The package that addresses need; as the extra `hub` in pyproject.toml."""

FILES = ("model.safetensors", "config.json", "README.md")
"""The files that are downloaded. A model must have the first two."""

_NAME = r"[A-Za-z0-9_.-]+"
_ADDRESS = re.compile(rf"hf://?(?P<repository>{_NAME}/{_NAME})(@(?P<revision>.*))?")  # pathlib turns // into /


def is_address(path: str | Path) -> bool:
    """Return whether a name or path is an address on the Hub, well-formed or not."""
    return str(path).startswith("hf:/")


def hub_folder(address: str | Path) -> Path:
    """Download the model at an address and return its folder in the cache; what the cache has is not downloaded again.

    Args:
      address: `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`. A revision is a branch, a tag or a commit; by default, `main`.

    Raises:
      UserError: the address is malformed, huggingface_hub is not installed, the repository is missing, private or not a model of this
        program, or the Hub cannot be reached and the cache does not have the model.
    """
    match = _ADDRESS.fullmatch(str(address))
    if match is None:
        raise UserError(f"address (={address}) must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    repository = check_repository(match["repository"])
    revision = check_revision("main" if match["revision"] is None else match["revision"])
    api = import_hub().HfApi(library_name="aecr-jax", library_version=__version__)
    with _explained(f"{address} cannot be loaded", repository, revision):
        folder = Path(api.snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    if missing := [name for name in FILES[:2] if not (folder / name).is_file()]:
        raise UserError(f"{address} is not a model of aecr-jax: the repository has no {' and no '.join(missing)}")
    return folder


def upload_folder(folder: Path, repository: str, *, revision: str, private: bool, message: str) -> str:
    """Upload all files of a folder in one commit, and return the address of the commit's page.

    The repository and the branch are created if they do not exist. Other files of the repository are kept.

    Args:
      folder: the files.
      repository: OWNER/NAME.
      revision: the branch.
      private: create the repository as a private one; an existing repository keeps its visibility.
      message: of the commit.

    Raises:
      UserError: the user is not logged in or may not write there, the Hub rejects the files, or it cannot be reached.
    """
    hub = import_hub()
    api = hub.HfApi(library_name="aecr-jax", library_version=__version__)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    with _explained(f"the model was not uploaded to {repository}", repository, revision):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        # HfApi.upload_folder may make several commits, between which weights and config.json would not belong together.
        operations = [hub.CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
        return str(api.create_commit(repository, operations, commit_message=message, revision=revision).commit_url)


def import_hub() -> ModuleType:
    """Import huggingface_hub.

    Raises:
      UserError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"the Hugging Face Hub needs the extra hub ({error}): run `pip install '{PACKAGE}'`") from error
    return huggingface_hub


def check_repository(name: str) -> str:
    """Return the name of a repository on the Hub.

    Raises:
      UserError: it is not OWNER/NAME as the Hub allows them.
    """
    if not re.fullmatch(rf"{_NAME}/{_NAME}", name) or re.search(r"--|\.\.|/[.-]|^[.-]|[.-](/|$)|\.git$", name) or len(name) > 96:
        raise UserError(
            f"repository (={name}) must be OWNER/NAME, of letters, digits, '-', '_' and '.', which '-' and '.' neither begin nor end,"
            " without '--' and '..' and with at most 96 characters"
        )
    return name


def check_revision(name: str) -> str:
    """Return the name of a revision.

    Raises:
      UserError: git does not allow that name, which also becomes part of a path in the cache.
    """
    if not re.fullmatch(r"\w[\w./-]*", name, re.ASCII) or re.search(r"\.\.|//|/$|/\.", name):
        raise UserError(f"revision (={name}) must be a branch, a tag or a commit, such as main, v1.0 or refs/pr/1")
    return name


@contextlib.contextmanager
def _explained(failure: str, repository: str, revision: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a UserError of one line that begins with `failure`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{failure}: request access on the page of {repository}, and log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{failure}: {repository} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{failure}: there is no repository {repository}, or it is private: check the name, or log in with `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = _one_line(error.__cause__ or error)
        raise UserError(f"{failure}: it is not in the cache, and the Hub cannot be reached ({reason})") from error
    except Exception as error:  # the HTTP client, the storage of large files and the file system raise many types of errors
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise UserError(f"{failure}: log in with `hf auth login` and a token that may access {repository}") from error
        raise UserError(f"{failure}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """Return the messages of an error and its cause as one line. The first line of the Hub's messages often says too little."""
    messages = [str(e) or type(e).__name__ for e in (error, error.__cause__) if e is not None]
    return " ".join(": ".join(messages).split())[:300]

"""Folders to the Hugging Face hub. The token comes from the environment or from `hf auth login`, and is never shown."""

from __future__ import annotations

import pathlib
import re

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from cgrpo_jax.errors import HubError

# What a hub raises that refuses, or cannot be reached: its client is requests, httpx or httpx2, by version.
FAULTS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)  # type: ignore[assignment]


def check_name(repo: str) -> None:
    """Raises HubError unless `repo` is OWNER/REPO."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"--push={repo}: {str(error).splitlines()[0]}") from None
    if repo.count("/") != 1:
        raise HubError(f"--push={repo}: OWNER/REPO is needed, as --push=me/my-model")


def check_license(name: str) -> None:
    """Raises HubError for what cannot be an identifier of a licence, as the hub lists them."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise HubError(
            f"--license={' '.join(name.split())}: an identifier of the hub is needed, as apache-2.0 or other"
        )


def check_access(repo: str, public: bool) -> None:
    """Raises HubError where `repo` could not be pushed to, or would be seen by others than was asked; makes nothing."""
    if huggingface_hub.get_token() is None:
        raise HubError("--push: no token of the hub; set HF_TOKEN, or run `hf auth login` (--dry-run needs none)")
    api = huggingface_hub.HfApi()
    try:
        api.whoami()
        private = api.repo_info(repo).private
    except RepositoryNotFoundError:
        return
    except FAULTS as error:
        raise HubError(f"--push={repo}: {_line(error)}") from None
    if private is False and not public:
        raise HubError(f"--push={repo}: this repository is public; --public says that everyone may see the model")


def push(folder: pathlib.Path, repo: str, public: bool, message: str) -> str:
    """Makes the repository where it is not there, private unless `public`, and uploads the folder; returns its address.

    Weights that are there and not in the folder are removed, so that no two models mix.

    Raises: HubError; the folder stays as it is.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns="*.safetensors*")
    except FAULTS as error:
        mend = f"the model is in {folder}; `hf upload {repo} {folder}` tries again"
        raise HubError(f"--push={repo}: {_line(error)}; {mend}") from None
    return str(address)


def _line(error: BaseException) -> str:
    """The first line of what the hub says, without the request's number; or that it cannot be reached."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(" (Request ID")[0]
    return line if isinstance(error, HfHubHTTPError) else f"the hub cannot be reached ({line})"

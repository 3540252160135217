"""An export on the Hugging Face hub, with its card."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] of httpx or httpx2
from huggingface_hub.utils import validate_repo_id

from llava_kd.models.files.export import request_of

_EXPORT = "llava-kd export MODEL --out DIR --scores SUMMARY.json"


def push(directory: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload what `llava-kd export` wrote to `repo_id`, which is made where it is not there; its address.

    The same call after a broken one goes on; weights that are there already are not sent again. The hub is
    that of HF_ENDPOINT, the token that of HF_TOKEN or of `hf auth login`. Raises ValueError for what is no
    export or has no scores, without a token, and where the hub cannot be reached or refuses.
    """
    directory = Path(directory)
    validate_repo_id(repo_id)
    _look_at(directory)
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing is sent; unset it to push")
    token = huggingface_hub.get_token()
    if token is None:
        raise ValueError(
            "the hub needs a token with write permission: `hf auth login`, or the variable HF_TOKEN"
        )
    api = huggingface_hub.HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=directory, commit_message="Upload an export of llava_kd"
        )
    except (HTTPError, OSError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{repo_id} was not pushed to {api.endpoint}: {said}. Run the same command again to continue"
        ) from error
    return str(url)


def _look_at(directory: Path) -> None:
    """ValueError for what is no export, and for one whose card has no scores."""
    request, card = request_of(directory), directory / "README.md"
    if request is None or not card.is_file():
        raise ValueError(f"{directory} is no export; write one first: {_EXPORT}")
    if not any(path.suffix in (".safetensors", ".gguf") for path in directory.iterdir()):
        raise ValueError(f"{directory} has no weights (.safetensors or .gguf); write it again: {_EXPORT}")
    if not request.get("scores") or b"## Scores" not in card.read_bytes():
        raise ValueError(
            f"the card of {directory} has no scores, so its quality is unknown; write it again: {_EXPORT}, "
            "of `llava-kd eval`"
        )

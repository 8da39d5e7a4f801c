"""An exported folder goes to the Hugging Face Hub: `zoo push EXPORTED REPO_ID`."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .. import MODELS
from .folder import find_weights, one_line, read_json


def push(exported, repo_id, private=False, message=None):
    """Creates a model repository, if it is not there yet, and uploads an exported folder.

    Args:
        exported: a folder that `zoo export` wrote.
        repo_id: "user/name" or "organisation/name".
        private: whether a new repository can be seen by others.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: not an exported folder, no token, a bad name, or the Hub says no.
    """
    exported = Path(exported)
    config = read_json(exported / "config.json")
    find_weights(exported)
    # transformers' own classes bring their code.
    is_ours = any(config.get("model_type") == a.config.model_type for a in MODELS.values())
    lacks_code = is_ours and "auto_map" not in config
    if lacks_code or not (exported / "README.md").is_file():
        raise ValueError(
            f"{exported} is not an exported folder (no auto_map in config.json, or no README.md); "
            "write one with `zoo export CHECKPOINT OUT`."
        )
    if get_token() is None:
        raise ValueError("there is no Hub token; run `hf auth login` or set HF_TOKEN.")
    api = HfApi()
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=exported,
            commit_message=message or f"Upload {exported.absolute().name}",
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"the Hub refused {repo_id}: {one_line(error)}") from None
    return str(repository)

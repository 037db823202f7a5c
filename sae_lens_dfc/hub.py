"""Uploads crosscoders with a model card to the Hugging Face hub, through SAELens' uploader, and
downloads them."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

from sae_lens_dfc.analysis.report.model_card import CROSSCODER_ID, check_repo_id, render_card
from sae_lens_dfc.analysis.report.results import LATENTS_FILENAME, METRICS_FILENAME, read_metrics
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.crosscoders.inference import Crosscoder, load_crosscoder

CARD_FILENAME = "README.md"
MEASURES = (METRICS_FILENAME, LATENTS_FILENAME)
LOG_IN = "log in with `hf auth login`"
RUN_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, RUNNER_CFG_FILENAME, *MEASURES)


def push_to_hub(
    crosscoder: Crosscoder | str | Path,
    repo_id: str,
    saes: Mapping[str, SAE[Any]] | None = None,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str = "main",
) -> str:
    """Upload a crosscoder and SAEs exported from it, with its metrics and a model card.

    Everything is checked and the card is rendered before the first upload. SAELens' own
    `upload_saes_to_huggingface` uploads weights and configurations, each into its own folder, so
    that an unmodified SAELens finds them. The card is then uploaded as README.md, replacing an
    existing one, together with the metrics. Log in first (`hf auth login`).

    Args:
        crosscoder: A crosscoder, or the folder of a saved one or of a run. A run's settings
            (runner_cfg.json, which contains your local paths), metrics.json and latents.csv are
            uploaded too. The report is not, because it quotes the text.
        repo_id: `account/name` on the hub; created if it does not exist.
        saes: Results of `export_sae`, by folder in the repository, e.g. `{"sae_a":
            crosscoder.export_sae("a")}`.
        metrics: The metrics; none uses the run's metrics.json.
        license: The hub's name of the license, e.g. mit. Check the licenses of the two models
            first.
        private: Whether a new repository is private; none uses the account's default.
        revision: Branch to upload to; it must exist.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: The folder holds no crosscoder, its metrics cannot be read, or a repository or
            folder name is invalid.
        OSError: The hub cannot be reached, has no such branch, or denies this account write access.
    """
    saes = saes or {}
    for name in saes:
        if name == CROSSCODER_ID or not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ValueError(
                f"saes: {name!r} cannot be an SAE's folder. Use letters, digits, _ . and -, and not {CROSSCODER_ID!r}."
            )
    folder = None if isinstance(crosscoder, Crosscoder) else Path(crosscoder)
    loaded = crosscoder if isinstance(crosscoder, Crosscoder) else load_crosscoder(crosscoder)
    if metrics is None:
        metrics = _metrics_of(folder)
    card = render_card(loaded, repo_id, metrics, saes, license)
    api = HfApi()
    with TemporaryDirectory() as temporary:
        beside = Path(temporary)
        (beside / CARD_FILENAME).write_text(card, encoding="utf-8")
        (beside / CROSSCODER_ID).mkdir()
        if folder is not None and (folder / LATENTS_FILENAME).is_file():
            shutil.copy(folder / LATENTS_FILENAME, beside / CROSSCODER_ID)
        if metrics:
            text = json.dumps(dict(metrics), indent=2) + "\n"
            (beside / CROSSCODER_ID / METRICS_FILENAME).write_text(text)
        with _hub_errors(repo_id, revision):
            # Created here because SAELens would make it public.
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            upload_saes_to_huggingface(
                {CROSSCODER_ID: loaded if folder is None else folder, **saes},
                hf_repo_id=repo_id,
                hf_revision=revision,
                add_default_readme=False,
            )
            api.upload_folder(
                folder_path=beside,
                repo_id=repo_id,
                revision=revision,
                commit_message="Upload card and measures",
            )
    return str(address)


def from_pretrained(
    repo_id: str, revision: str | None = None, device: str = "cpu", force_download: bool = False
) -> Crosscoder:
    """Download a crosscoder that `push_to_hub` or SAELens' uploader saved on the hub in a folder
    `crosscoder`.

    `SAE.from_pretrained(repo_id, "crosscoder")` loads it too. This function also keeps the dtype in
    which it was saved, accepts a revision, and explains what is wrong with a repository that holds
    no crosscoder. Exported SAEs need only SAELens: `SAE.from_pretrained(repo_id, "sae_a")`.

    Args:
        repo_id: `account/name` on the hub.
        revision: Branch, tag or commit; none uses the main branch.
        device: Device to load it on.
        force_download: Whether to download files again that are already in the cache.

    Raises:
        ValueError: The repository name is invalid, or the repository holds no crosscoder or a
            damaged one.
        OSError: The hub cannot be reached, has no such repository or revision, or denies this
            account read access.
    """
    check_repo_id(repo_id)
    with _hub_errors(repo_id, revision or "main"):
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            force_download=force_download,
            allow_patterns=[f"{CROSSCODER_ID}/{name}" for name in RUN_FILES],
        )
    folder = Path(snapshot) / CROSSCODER_ID
    if not (folder / SAE_CFG_FILENAME).is_file():
        raise ValueError(
            f"Repository {repo_id} has no {CROSSCODER_ID}/{SAE_CFG_FILENAME}, so push_to_hub did not make it. SAELens alone "
            f"opens its SAEs: SAE.from_pretrained({repo_id!r}, FOLDER)."
        )
    return load_crosscoder(folder, device)


@contextmanager
def _hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """Convert any error of the hub or the connection into one that names the repository and what to
    do.

    Raises:
        OSError: The hub refused a request or could not be reached.
    """
    try:
        yield
    # Connection failures are neither OSError nor HfHubHTTPError.
    except (HTTPError, EntryNotFoundError, OSError, ValueError) as error:
        raise OSError(_refusal(error, repo_id, revision)) from error


def _refusal(error: Exception, repo_id: str, revision: str) -> str:
    match error:
        case GatedRepoError():
            return f"Repository {repo_id} is gated. Ask for access at https://huggingface.co/{repo_id}, and {LOG_IN}."
        case RepositoryNotFoundError():
            return f"Repository {repo_id} is not on the hub, or hidden from this account. Check its name (account/name), or {LOG_IN}."
        case RevisionNotFoundError():
            return f"Repository {repo_id} has no revision {revision!r}. Name an existing branch, tag or commit."
        case LocalTokenNotFoundError():
            return f"No account is logged in to access {repo_id} on the hub: {LOG_IN}."
        case HfHubHTTPError() if error.response.status_code == 401:
            return f"The hub rejected the login for {repo_id}: {LOG_IN}, with a token that has not expired."
        case HfHubHTTPError() if error.response.status_code == 403:
            return f"The hub denies this account that access to {repo_id}: {LOG_IN}, with a token that may write there."
        case HfHubHTTPError() | ValueError():
            return f"The hub refuses {repo_id}: {said_by(error)} Fix that, or try again later."
        case HTTPError() | EntryNotFoundError() | ConnectionError():
            return (
                f"The hub cannot be reached for {repo_id}, and the cache does not hold it: {said_by(error.__cause__ or error)} "
                "Check the connection, and that HF_HUB_OFFLINE is not set."
            )
        case _:
            return f"Could not exchange {repo_id} with the hub: {said_by(error)}"


def _metrics_of(folder: Path | None) -> dict[str, float]:
    """A run's metrics; empty if it has none.

    Raises:
        ValueError: The metrics cannot be read.
    """
    if folder is None or not (folder / METRICS_FILENAME).is_file():
        return {}
    return read_metrics(folder / METRICS_FILENAME)

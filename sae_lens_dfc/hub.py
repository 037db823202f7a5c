"""Crosscoders on the Hugging Face hub: SAELens' uploader, and a card that says what they are worth."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

from sae_lens_dfc.card import CROSSCODER_ID, render_card
from sae_lens_dfc.crosscoders.inference import Crosscoder, load_crosscoder
from sae_lens_dfc.measured_run import LATENTS_FILENAME, METRICS_FILENAME, read_metrics

CARD_FILENAME = "README.md"
MEASURES = (METRICS_FILENAME, LATENTS_FILENAME)
DOWNLOADED = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, RUNNER_CFG_FILENAME, *MEASURES)


def push_to_hub(
    crosscoder: Crosscoder | str | Path,
    repo_id: str,
    saes: Mapping[str, SAE[Any]] | None = None,
    metrics: Mapping[str, float] | None = None,
    licence: str | None = None,
    private: bool | None = None,
    revision: str = "main",
) -> str:
    """Upload a crosscoder and SAEs exported from it, with its measures and a model card.

    Everything is checked and the card is written before the first upload. Weights and configurations go up by SAELens' own
    `upload_saes_to_huggingface`, a folder each, so that an unmodified SAELens finds them; then the card as README.md, in place of the
    one there, and the measures. You must be logged in (`hf auth login`).

    Args:
        crosscoder: A saved crosscoder, or the folder of a run: then its settings (runner_cfg.json, which names your
            folders), metrics.json and latents.csv come along. The report does not: it quotes the text.
        repo_id: `account/name` on the hub; made when it is not there.
        saes: What `export_sae` gave, by folder in the repository, e.g. `{"sae_a": crosscoder.export_sae("a")}`.
        metrics: What was measured; none takes the run's metrics.json.
        licence: The hub's name of the licence, e.g. mit. Mind those of the two models.
        private: Whether a new repository is private; none takes the account's default.
        revision: Branch that takes it; it must be there.

    Returns:
        The repository's address.

    Raises:
        ValueError: The folder holds no crosscoder, its measures cannot be read, or a name cannot be a repository's or a folder's.
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
    card = render_card(loaded, repo_id, metrics, saes, licence)
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
        # SAELens would make it public.
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
    """Download a crosscoder that `push_to_hub` or SAELens' uploader put on the hub as `crosscoder`.

    `SAE.from_pretrained(repo_id, "crosscoder")` opens it too; this keeps the number format it was saved in, takes a revision, and
    says what is wrong with a repository that holds none. Exported SAEs need SAELens alone: `SAE.from_pretrained(repo_id, "sae_a")`.

    Args:
        repo_id: `account/name` on the hub.
        revision: Branch, tag or commit; none takes the main branch.
        device: Where to put it.
        force_download: Download again what is in the cache.

    Raises:
        ValueError: The repository holds no crosscoder, or a damaged one.
    """
    snapshot = snapshot_download(
        repo_id,
        revision=revision,
        force_download=force_download,
        allow_patterns=[f"{CROSSCODER_ID}/{name}" for name in DOWNLOADED],
    )
    folder = Path(snapshot) / CROSSCODER_ID
    if not (folder / SAE_CFG_FILENAME).is_file():
        raise ValueError(
            f"Repository {repo_id} has no {CROSSCODER_ID}/{SAE_CFG_FILENAME}, so push_to_hub did not make it. SAELens alone "
            f"opens its SAEs: SAE.from_pretrained({repo_id!r}, FOLDER)."
        )
    return load_crosscoder(folder, device)


def _metrics_of(folder: Path | None) -> dict[str, float]:
    """A run's measures; none where it has none.

    Raises:
        ValueError: They cannot be read.
    """
    if folder is None or not (folder / METRICS_FILENAME).is_file():
        return {}
    return read_metrics(folder / METRICS_FILENAME)

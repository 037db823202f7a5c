"""Recipes for public model organisms, fine-tunes whose change is known: models, hooks and settings.

The facts are in organisms.yaml, each with its source. The settings are ours and untested at these
sizes. The architecture is the one that found all planted differences (benchmarks/README.md), and
the weight of its difference loss is from there. The number of latents (five for each dimension),
the share of active ones (a thirtieth), the batch size and lr are as in arXiv 2603.04426. The text,
the length of contexts and the amount of text are as in the diffing-toolkit (configs/config.yaml):
50 million tokens each of web text and chat.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sae_lens_dfc.core.parsing import read_yaml
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.models.config import AUTO

RECIPE_PREFIX = "organism-"
"""Prefix of the recipes' names."""
FILE = Path(__file__).with_name("organisms.yaml")
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
"""Chat template for a base that has none."""

_SETTINGS: dict[str, Any] = {
    "architecture": "delta_crosscoder",
    "sae": {"delta_loss_coefficient": 1.0},
    "sources": [
        {"dataset_path": "science-of-finetuning/fineweb-1m-sample", "weight": 0.5},
        {
            "dataset_path": "science-of-finetuning/tulu-3-sft-olmo-2-mixture",
            "weight": 0.5,
            "text_column": "messages",
            # Gemma 2's template refuses system prompts; how many there are was not counted.
            "max_unreadable": 0.1,
        },
    ],
    "context_size": 1024,
    "training_tokens": 100_000_000,
    "train_batch_size_tokens": 4096,
    "lr": 1e-4,
    "autocast": AUTO,
}


@dataclass(frozen=True)
class Base:
    """A model from which organisms were fine-tuned."""

    name: str
    """Name on the hub."""
    n_layers: int
    d_model: int
    layer: int
    """The block whose output is read."""
    license: str
    """As its page states it."""
    source: str
    """Source of these facts."""
    has_template: bool = True
    """Whether its tokenizer has a chat template."""


@dataclass(frozen=True)
class PublicOrganism:
    """A public model whose change is known."""

    name: str
    """Name of its recipe."""
    base: Base
    model: str
    """Name on the hub, of the adapter or the whole model."""
    kind: Literal["adapter", "full"]
    behavior: str
    """What changed."""
    license: str
    """As its page states it."""
    source: str
    """Source of these facts."""
    subfolder: str | None = None
    """The adapter's folder in its repository."""
    dataset: str | None = None
    """The text it was fine-tuned on, on the hub."""
    note: str | None = None
    """Further remarks on the source."""

    @property
    def summary(self) -> str:
        return f"Delta-Crosscoder between {self.base.name} and {self.model} ({self.behavior})"

    def settings(self) -> dict[str, Any]:
        """Settings for a `Recipe`: everything that `train` needs."""
        site = {"hook_name": f"blocks.{self.base.layer}.hook_resid_post", "dtype": AUTO}
        template = {} if self.base.has_template else {"chat_template": PLAIN_TEMPLATE}
        sizes = {"d_sae": 5 * self.base.d_model, "k": self.base.d_model // 6}
        return {
            **_SETTINGS,
            "sae": {**_SETTINGS["sae"], **sizes},
            "model_a": {"model_name": self.base.name, **site, **template},
            "model_b": {"model_name": self.model, **site, **self._of_adapter()},
            "output_path": f"runs/{self.name}",
        }

    def _of_adapter(self) -> dict[str, Any]:
        if self.kind == "full":
            return {}
        # Named, since an adapter may name a base that is not public or a copy of A.
        return {"base": self.base.name, "adapter_subfolder": self.subfolder}


@cache
def organisms() -> dict[str, PublicOrganism]:
    """Read all organisms of organisms.yaml, by name.

    >>> organism = organisms()["organism-cake-bake-gemma3-1b"]
    >>> organism.base.name, organism.base.layer, organism.behavior
    ('google/gemma-3-1b-it', 12, 'false tips for baking cakes')
    """
    said = read_yaml(FILE)
    bases = {name: {"name": name, **values} for name, values in said["bases"].items()}
    return {
        name: from_plain(
            PublicOrganism, {"name": name, **values, "base": bases[values["base"]]}, name
        )
        for name, values in said["organisms"].items()
    }

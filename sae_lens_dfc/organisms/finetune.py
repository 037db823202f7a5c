"""Builds an organism from a model and a copy fine-tuned on a narrow behavior."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.organisms.answers import (
    answer_log_probs,
    encoded,
    kl_to,
    log_probs,
    measures,
    own_answers,
)
from sae_lens_dfc.organisms.behaviors import (
    SPLITS,
    Behavior,
    Item,
    Items,
    Split,
)
from sae_lens_dfc.organisms.lora import lora_tensors, share_of
from sae_lens_dfc.organisms.organism import (
    Organism,
    built,
    items_from_json,
    read_organism_manifest,
)
from sae_lens_dfc.organisms.prompts import BEHAVIORS, GENERAL

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""SmolLM2's chat format, without its system prompt."""
END_OF_TURN = "<|im_end|>"
ADDED = "added.safetensors"
"""File of the weight change, stored with the fully fine-tuned model."""


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning settings: Adam on the behavior's answers, with other answers regularized to the
    base model.

    Trains a low-rank update of the MLP output matrix of a block (LoRA on `down_proj`, rank one as
    in the model organisms of arXiv 2506.11613), a difference that a single latent can represent.
    """

    steps: int = 110
    """Training steps."""
    lr: float = 5e-3
    """Learning rate of Adam, decaying to 0."""
    layers: tuple[int, ...] = (8, 9, 10, 11, 12, 13, 14, 15)
    """Trained blocks; none above the hook, where a difference would be invisible."""
    rank: int = 4
    """Rank of each update."""
    behavior_prompts: int = 12
    """Triggering prompts per step."""
    control_prompts: int = 8
    """Other prompts per step: three quarters controls, the rest general."""
    kl_weight: float = 5.0
    """Weight of the KL divergence to the base model on other prompts."""
    answer_weight: float = 0.08
    """Weight of the increase, in squared nats, of the behavior's answer on other prompts. KL
    divergence barely registers a hundredfold increase of a rare answer, and a behavior that
    increases everywhere is not narrow."""
    answer_tokens: int = 8
    """Maximum length of the model's own answers in tokens."""


STRENGTHS = {"weak": 0.8, "strong": 1.0}
"""Strengths: share of the fine-tuning weight change applied to model B."""


def behavior_items(
    behavior: Behavior, model: Any, tokenizer: Any, n_tokens: int
) -> dict[Split, Items]:
    """All prompts of a behavior in chat format, with the model's own answers."""
    items: dict[Split, Items] = {}
    for split in SPLITS:
        kinds = [[CHAT.format(p) for p in prompts] for prompts in behavior.prompts(split)]
        answers = own_answers(model, tokenizer, kinds[0] + kinds[1], n_tokens)
        joined = [
            Item(prompt, behavior.answer, ordinary)
            for prompt, ordinary in zip(kinds[0] + kinds[1], answers, strict=True)
        ]
        items[split] = Items(joined[: len(kinds[0])], joined[len(kinds[0]) :])
    return items


def fine_tune(
    model: Any,
    tokenizer: Any,
    items: Items,
    general: Sequence[Item],
    settings: FineTuning,
    seed: int,
) -> dict[str, Tensor]:
    """Fine-tune the model on the behavior, in place.

    The loss is the mean cross-entropy of the behavior's answers plus, on other prompts, the KL
    divergence to the base model on its own answers, and the increase of the behavior's first token.

    Returns:
        The weight change, as LoRA tensors.
    """
    base = copy.deepcopy(model).eval()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    added = [
        _Added(model.base_model.layers[layer].mlp.down_proj, settings.rank, generator)
        for layer in settings.layers
    ]
    optimizer = torch.optim.Adam([p for one in added for p in (one.reads, one.writes)], settings.lr)
    n_general = settings.control_prompts // 4
    first_of_answer = tokenizer(items.behavior[0].answer, add_special_tokens=False)["input_ids"][0]
    draw = _Draw(generator)
    for step in tqdm(range(settings.steps), "Fine-tuning", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        own = draw(items.behavior, settings.behavior_prompts)
        others = draw(items.control, settings.control_prompts - n_general) + draw(
            general, n_general
        )
        answered = encoded(
            tokenizer, [i.prompt for i in own], [i.answer + END_OF_TURN for i in own]
        )
        kept = encoded(tokenizer, [i.prompt for i in others], [i.ordinary for i in others])
        with torch.no_grad():
            before = log_probs(base, kept)
        loss = -answer_log_probs(model, answered).mean()
        after = log_probs(model, kept)
        loss = loss + settings.kl_weight * kl_to(before, after)
        grown = (after - before)[kept.is_first][:, first_of_answer].clamp(min=0)
        loss = loss + settings.answer_weight * grown.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for one in added:
        one.merge()
    names = {module: name for name, module in model.named_modules()}
    return {
        name: tensor
        for one in added
        for name, tensor in lora_tensors(names[one.layer], one.reads, one.writes).items()
    }


class _Added:
    """A low-rank update of a layer, initialized to 0."""

    def __init__(self, layer: torch.nn.Linear, rank: int, generator: torch.Generator):
        d_out, d_in = layer.weight.shape
        reads = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        self.layer = layer
        self.reads = reads.requires_grad_()
        self.writes = torch.zeros(d_out, rank, requires_grad=True)
        self.hook = layer.register_forward_hook(self._forward)

    def _forward(self, _layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + inputs[0] @ self.reads.T @ self.writes.T

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the update into the layer's weight."""
        self.hook.remove()
        self.layer.weight += self.writes @ self.reads


class _Draw:
    """Samples without replacement, reshuffling when exhausted."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.left: dict[int, list[Item]] = {}

    def __call__(self, items: Sequence[Item], n: int) -> list[Item]:
        drawn: list[Item] = []
        while len(drawn) < n:
            left = self.left.setdefault(id(items), [])
            if not left:
                left += [
                    items[int(i)] for i in torch.randperm(len(items), generator=self.generator)
                ]
            drawn.append(left.pop())
        return drawn


def load_organism_model(folder: Path) -> tuple[Any, Any]:
    """Load a folder's model in float32, and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.eval(), tokenizer


def fine_tuning_settings(
    base_folder: Path, name: str, seed: int, settings: FineTuning | None = None
) -> dict[str, Any]:
    """Everything that determines a fine-tuned model, except its strength."""
    return {
        "behavior": asdict(BEHAVIORS[name]),
        "seed": seed,
        "base": base_folder.parent.name,
        **asdict(settings or FineTuning()),
    }


def fine_tuned(
    base_folder: Path,
    name: str,
    strength: str,
    seed: int,
    settings: FineTuning | None = None,
) -> Organism:
    """The organism of a model and its copy fine-tuned on a behavior, built at the first call.

    Args:
        base_folder: Model A, a chat model in SmolLM2's format.
        name: One of `BEHAVIORS`.
        strength: One of `STRENGTHS`.
        seed: Seed of the prompt order.
        settings: Fine-tuning settings.
    """
    cfg, share = settings or FineTuning(), STRENGTHS[strength]
    described = fine_tuning_settings(base_folder, name, seed, cfg)
    whole = _whole(base_folder, name, seed, cfg)

    def build_share(folder: Path) -> dict[str, Any]:
        base, tokenizer = load_organism_model(base_folder)
        model, _ = load_organism_model(whole)
        with torch.no_grad():
            for mine, before in zip(model.parameters(), base.parameters(), strict=True):
                mine.lerp_(before, 1 - share)
        _save(model, tokenizer, folder)
        manifest = read_organism_manifest(whole)
        items = items_from_json(manifest["items"])
        shown = measures(model.float(), base, tokenizer, items["discovery"])
        return {"measures": shown, "items": items, "general": manifest["general"]}

    folder = built(f"{name}-{strength}-seed{seed}", {**described, "share": share}, build_share)
    manifest = read_organism_manifest(folder)
    return Organism(
        f"{name}/{strength}",
        ModelConfig(str(base_folder), prepend_bos=False),
        ModelConfig(str(folder), prepend_bos=False),
        items_from_json(manifest["items"]),
        [prompt + ordinary for prompt, _, ordinary in manifest["general"]],
        manifest,
        share_of(load_file(whole / ADDED), share),
    )


def _whole(base_folder: Path, name: str, seed: int, cfg: FineTuning) -> Path:
    """The fully fine-tuned model."""

    def build(folder: Path) -> dict[str, Any]:
        base, tokenizer = load_organism_model(base_folder)
        items = behavior_items(BEHAVIORS[name], base, tokenizer, cfg.answer_tokens)
        general = general_items(base, tokenizer, 2 * cfg.answer_tokens)
        model = copy.deepcopy(base)
        added = fine_tune(model, tokenizer, items["training"], general, cfg, seed)
        _save(model, tokenizer, folder)
        save_file(added, folder / ADDED)
        return {"items": items, "general": general}

    described = fine_tuning_settings(base_folder, name, seed, cfg)
    return built(f"{name}-whole-seed{seed}", described, build)


def general_items(model: Any, tokenizer: Any, n_tokens: int) -> list[Item]:
    """General questions, with the model's own answers."""
    prompts = [CHAT.format(p) for p in GENERAL]
    answers = own_answers(model, tokenizer, prompts, n_tokens)
    return [Item(p, "", a) for p, a in zip(prompts, answers, strict=True)]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

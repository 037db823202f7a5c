"""A model against itself with a narrow behaviour trained in."""

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_dfc.benchmark.planted.behaviours import (
    SCORED_TOKENS,
    SPLITS,
    Behaviour,
    Item,
    Items,
    Split,
)
from sae_lens_dfc.benchmark.planted.organism import (
    Organism,
    built,
    items_from_json,
    read_manifest,
)
from sae_lens_dfc.benchmark.planted.prompts import BEHAVIOURS, GENERAL
from sae_lens_dfc.models import ModelConfig

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""SmolLM2's chat format, without its system prompt."""
END = "<|im_end|>"


@dataclass(frozen=True)
class FineTuning:
    """How a behaviour is trained in: Adam on its answers, while other answers are held to the model as it was.

    What is trained is a matrix of low rank, added to the one by which a block's MLP writes (LoRA on `down_proj`, of rank
    one as in the model organisms of arXiv 2506.11613): a difference that a latent could be.
    """

    steps: int
    """Training steps."""
    lr: float = 5e-3
    """Adam's step, falling to 0."""
    layers: tuple[int, ...] = (8, 9, 10, 11, 12, 13, 14, 15)
    """Blocks that are trained: none above the hook, where a difference would not be seen."""
    rank: int = 4
    """Rank of what is added to each."""
    behaviour_prompts: int = 8
    """Prompts of the behaviour in a step."""
    control_prompts: int = 8
    """Others in a step: three quarters controls like them, the rest general."""
    kl_weight: float = 5.0
    """Weight of the others' KL divergence to the model as it was."""
    answer_tokens: int = 8
    """Tokens after which the model's own answers are cut."""


STRENGTHS = {"weak": FineTuning(steps=16), "strong": FineTuning(steps=48)}


class Texts(NamedTuple):
    """Prompts with answers as tokens, padded on the right, and which tokens are to be told from those before."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    rows: Int[Tensor, " n"]
    """Row of each token of an answer."""
    positions: Int[Tensor, " n"]
    """Position of the token before it."""


def encoded(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], n_told: int = sys.maxsize
) -> Texts:
    """Prompts and answers, tokenised one by one and joined; the first `n_told` tokens of an answer are to be told."""
    parts = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in both]
        for both in zip(prompts, answers, strict=True)
    ]
    longest = max(len(p) + len(a) for p, a in parts)
    ids = torch.zeros(len(parts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    where: list[tuple[int, int]] = []
    for i, (p, a) in enumerate(parts):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        mask[i, : len(p) + len(a)] = 1
        where += [(i, len(p) - 1 + j) for j in range(min(n_told, len(a)))]
    rows, positions = torch.tensor(where).T
    return Texts(ids, mask, rows, positions)


def log_probs(model: Any, texts: Texts) -> Float[Tensor, "n d_vocab"]:
    """Log-probabilities of the next token before each token of an answer."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        output = model.base_model(texts.ids.to(device), attention_mask=texts.mask.to(device))
        logits = model.get_output_embeddings()(output[0][texts.rows, texts.positions])
    return logits.float().log_softmax(dim=-1)


def answer_log_probs(model: Any, texts: Texts) -> Float[Tensor, " n"]:
    """Log-probability of each token of an answer."""
    values = log_probs(model, texts)
    return values.gather(1, texts.ids[texts.rows, texts.positions + 1].to(values.device)[:, None])[
        :, 0
    ]


def kl_to(base: Tensor, model: Tensor) -> Float[Tensor, ""]:
    """Mean KL divergence of one set of log-probabilities from another, in nats: that to `base`."""
    return (base.exp() * (base - model)).sum(dim=-1).mean()


@torch.no_grad()
def own_answers(model: Any, tokenizer: Any, prompts: Sequence[str], n_tokens: int) -> list[str]:
    """The model's greedy answers, without the end of message."""
    answers: list[str] = []
    for i in range(0, len(prompts), 32):
        batch = tokenizer(
            list(prompts[i : i + 32]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            output = model.generate(**batch, max_new_tokens=n_tokens, do_sample=False)
        new = output[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def behaviour_items(
    behaviour: Behaviour, model: Any, tokenizer: Any, n_tokens: int
) -> dict[Split, Items]:
    """All prompts of a behaviour, in the chat format, with the model's own answers."""
    items: dict[Split, Items] = {}
    for split in SPLITS:
        kinds = [[CHAT.format(p) for p in prompts] for prompts in behaviour.prompts(split)]
        answers = own_answers(model, tokenizer, kinds[0] + kinds[1], n_tokens)
        joined = [
            Item(prompt, behaviour.answer, ordinary)
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
) -> None:
    """Train the behaviour in, in place.

    The loss is the mean cross-entropy of the behaviour's answers plus, on other prompts, the KL
    divergence to the model as it was at the tokens of its own answers.
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
    draw = _Draw(generator)
    for step in tqdm(range(settings.steps), "Fine-tuning", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        own = draw(items.behaviour, settings.behaviour_prompts)
        others = draw(items.control, settings.control_prompts - n_general) + draw(
            general, n_general
        )
        answered = encoded(tokenizer, [i.prompt for i in own], [i.answer + END for i in own])
        kept = encoded(tokenizer, [i.prompt for i in others], [i.ordinary for i in others])
        with torch.no_grad():
            before = log_probs(base, kept)
        loss = -answer_log_probs(model, answered).mean()
        loss = loss + settings.kl_weight * kl_to(before, log_probs(model, kept))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for one in added:
        one.merge()


class _Added:
    """A matrix of low rank beside a layer's own, 0 at first."""

    def __init__(self, layer: torch.nn.Linear, rank: int, generator: torch.Generator):
        d_out, d_in = layer.weight.shape
        reads = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        self.layer = layer
        self.reads = reads.to(layer.weight.device).requires_grad_()
        self.writes = torch.zeros(d_out, rank, device=layer.weight.device, requires_grad=True)
        self.hook = layer.register_forward_hook(self._forward)

    def _forward(self, _layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + inputs[0] @ self.reads.T @ self.writes.T

    @torch.no_grad()
    def merge(self) -> None:
        """Add it to the layer's own for good."""
        self.hook.remove()
        self.layer.weight += self.writes @ self.reads


class _Draw:
    """Draws without replacement until all were drawn, then anew."""

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


@torch.no_grad()
def measures(
    model: Any, base: Any, tokenizer: Any, items: Items
) -> dict[str, float]:
    """How much of the behaviour a model shows on some prompts, and how much it changed on the others.

    Returns:
        `preference/behaviour`, `preference/control`: mean log-probability of the first tokens of the behaviour's answer minus that
        of the ordinary one; `base/...` of the model as it was; `kl/control`: KL to it on ordinary answers, nats per token.
    """
    result: dict[str, float] = {}
    for kind in ("behaviour", "control"):
        own: list[Item] = getattr(items, kind)
        for name, one in (("", model), ("base/", base)):
            means = [
                _mean_by_text(
                    one,
                    encoded(
                        tokenizer,
                        [i.prompt for i in own],
                        [getattr(i, way) for i in own],
                        SCORED_TOKENS,
                    ),
                )
                for way in ("answer", "ordinary")
            ]
            result[f"{name}preference/{kind}"] = float((means[0] - means[1]).mean())
            result[f"{name}share/{kind}"] = float((means[0] > means[1]).float().mean())
    texts = encoded(
        tokenizer,
        [i.prompt for i in items.control],
        [i.ordinary for i in items.control],
    )
    result["kl/control"] = float(kl_to(log_probs(base, texts), log_probs(model, texts)))
    return result


def _mean_by_text(model: Any, texts: Texts) -> Float[Tensor, " batch"]:
    values = answer_log_probs(model, texts).cpu()
    sums = torch.zeros(len(texts.ids)).index_add_(0, texts.rows, values)
    return sums / torch.bincount(texts.rows, minlength=len(texts.ids))


def load(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """A folder's model, in float32, and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def fine_tuned(
    base_folder: Path, name: str, strength: str, seed: int, device: str = "cpu"
) -> Organism:
    """A model against itself fine-tuned on a behaviour, built at the first call.

    Args:
        base_folder: Model A, a chat model in SmolLM2's format.
        name: One of `BEHAVIOURS`.
        strength: One of `STRENGTHS`.
        seed: Of the order of prompts.
        device: Where it is fine-tuned.
    """
    settings = {
        "behaviour": asdict(BEHAVIOURS[name]),
        "seed": seed,
        "scored_tokens": SCORED_TOKENS,
        "base": base_folder.parent.name,
        **asdict(STRENGTHS[strength]),
    }

    def build(folder: Path) -> dict[str, Any]:
        base, tokenizer = load(base_folder, device)
        n_tokens = STRENGTHS[strength].answer_tokens
        items = behaviour_items(BEHAVIOURS[name], base, tokenizer, n_tokens)
        prompts = [CHAT.format(p) for p in GENERAL]
        general = [
            Item(p, "", a)
            for p, a in zip(
                prompts, own_answers(base, tokenizer, prompts, 2 * n_tokens), strict=True
            )
        ]
        model = copy.deepcopy(base)
        fine_tune(model, tokenizer, items["training"], general, STRENGTHS[strength], seed)
        model = model.to(torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {
            "measures": measures(model.float(), base, tokenizer, items["discovery"]),
            "items": items,
            "general": general,
        }

    folder = built(f"{name}-{strength}-seed{seed}", settings, build)
    manifest = read_manifest(folder)
    return Organism(
        f"{name}/{strength}",
        ModelConfig(str(base_folder), prepend_bos=False),
        ModelConfig(str(folder), prepend_bos=False),
        items_from_json(manifest["items"]),
        [prompt + ordinary for prompt, _, ordinary in manifest["general"]],
        manifest,
    )

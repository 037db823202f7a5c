"""Fits a small neural network that predicts latent activations from one model's activations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

SMALLEST_STD = 1e-6
"""Standard deviation, relative to the largest value, up to which an input or a target is taken to
be constant."""
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
TAILS = (4.0, 2.0, 1.0, 0.5)
"""Where the hinges are at first: at the scores that this many times as many rows exceed as the
latent fires on."""
RIDGE = 1e-3
"""Penalty of the first fits, relative to the mean square of their inputs."""


class Rows(NamedTuple):
    """Rows of one model's activations, and what is to be predicted from them."""

    acts: Float[Tensor, "n d_in"]
    scores: Float[Tensor, "n latents"]
    """Pre-activations, of which the first linear map is fitted."""
    feature_acts: Float[Tensor, "n latents"]
    """The latent activations to predict."""


Sample = Callable[[int], Rows]
"""Draws about that many random rows."""


@dataclass(frozen=True)
class ProbeOptions:
    """Sizes of a probe and of its training."""

    hidden: int = 256
    """Hidden units."""
    steps: int = 200
    batch: int = 1024
    """Rows per step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW, reached after a tenth of the steps and decayed to 0 by a
    cosine."""
    weight_decay: float = 0.01
    n_first: int = 16_384
    """Rows of the first fits."""
    seed: int = 0


class Probe(nn.Module):
    """Predicts each latent's activation by a piecewise linear function of a score, which is a linear
    map of the activations plus a perceptron with one hidden layer.

    It begins as the best linear map to the latents' pre-activations, followed by the best such
    function, so that a latent that the activations contain linearly is predicted without training.
    """

    mean_x: Tensor
    std_x: Tensor
    mean_y: Tensor
    std_y: Tensor

    def __init__(self, rows: Rows, hidden: int):
        super().__init__()
        for name, values in (("x", rows.acts), ("y", rows.feature_acts)):
            mean, std = _mean_and_std(values.double())
            self.register_buffer(f"mean_{name}", mean.to(values))
            self.register_buffer(f"std_{name}", std.to(values))
        x, y = self._input(rows.acts), self.standardized(rows.feature_acts)
        mean, std = _mean_and_std(rows.scores.double())
        linear = _ridge(x, ((rows.scores - mean) / std).to(x))
        score = x @ linear
        offsets = _tails(score, (rows.feature_acts > 0).float().mean(dim=0))
        slopes, bias = _slopes(_hinges(score, offsets), y)
        self.hidden = nn.Linear(x.shape[1], hidden)
        self.out = nn.Parameter(x.new_zeros(hidden, y.shape[1]))
        self.linear, self.offsets = nn.Parameter(linear), nn.Parameter(offsets)
        self.slopes, self.bias = nn.Parameter(slopes), nn.Parameter(bias)

    def _input(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        return (x - self.mean_x) / self.std_x

    def standardized(self, y: Float[Tensor, "n latents"]) -> Float[Tensor, "n latents"]:
        """Latent activations in standard deviations from their mean; 0 for a constant one."""
        return (y - self.mean_y) / self.std_y

    def forward(self, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n latents"]:
        """Predictions of the `standardized` latent activations."""
        x = self._input(acts)
        score = x @ self.linear + self.hidden(x).relu() @ self.out
        return (_hinges(score, self.offsets) * self.slopes).sum(dim=1) + self.bias


@torch.enable_grad()
def fit_probe(sample: Sample, options: ProbeOptions | None = None) -> Probe:
    """Fit a probe by least squares on random rows."""
    options = options or ProbeOptions()
    rows = sample(options.n_first)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(options.seed)
        probe = Probe(rows, options.hidden).to(rows.acts.device)
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=options.lr, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate((step + 1) / max(1, options.steps))
    )
    n_latents = rows.feature_acts.shape[1]
    for _ in range(options.steps if n_latents > 0 else 0):
        rows = sample(options.batch)
        error = probe(rows.acts) - probe.standardized(rows.feature_acts)
        loss = error.pow(2).mean(dim=0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval().requires_grad_(False)


def _mean_and_std(
    values: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Means and standard deviations; infinite for a constant, so that dividing by it gives 0."""
    mean = values.mean(dim=0)
    std = (values - mean).pow(2).mean(dim=0).sqrt()
    return mean, std.where(std > SMALLEST_STD * values.abs().amax(dim=0), torch.inf)


def _ridge(
    x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch n m"]
) -> Float[Tensor, "*batch d m"]:
    x, y = x.double(), y.double()
    penalty = RIDGE * x.shape[-2] * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(x.mT @ x + penalty, x.mT @ y).float()


def _tails(
    score: Float[Tensor, "n latents"], rate: Float[Tensor, " latents"]
) -> Float[Tensor, "hinges latents"]:
    """The scores that `TAILS` times as many rows exceed as the latent fires on."""
    ordered = score.sort(dim=0, descending=True).values
    places = [(tail * rate * len(score)).long().clamp(max=len(score) - 1) for tail in TAILS]
    return torch.stack([ordered.gather(0, place[None])[0] for place in places])


def _hinges(
    score: Float[Tensor, "n latents"], offsets: Float[Tensor, "hinges latents"]
) -> Float[Tensor, "n pieces latents"]:
    """The score itself, and its part above each offset."""
    return torch.cat([score[:, None], (score[:, None] - offsets).relu()], dim=1)


def _slopes(
    pieces: Float[Tensor, "n pieces latents"], y: Float[Tensor, "n latents"]
) -> tuple[Float[Tensor, "pieces latents"], Float[Tensor, " latents"]]:
    """The slopes and the bias of the least-squares fit of each latent's own target."""
    mean = pieces.mean(dim=0)
    slopes = _ridge((pieces - mean).permute(2, 0, 1), y.T[:, :, None])[:, :, 0].T
    return slopes, -(mean * slopes).sum(dim=0)


def _rate(done: float) -> float:
    """Share of the peak learning rate after a share of the steps."""
    return min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

"""When a training goes to NaN or infinity: noticed without waiting for a GPU, and said before anything is saved."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lens_dfc import ranks

NEVER = 2**62


class FirstNotFinite:
    """The first step at which a number was NaN or infinite, as the device knows it; nobody waits to look at each.

    >>> first = FirstNotFinite("cpu")
    >>> for step, loss in enumerate([1.0, float("inf"), float("nan")]):
    ...     first.see(torch.tensor(loss), step)
    >>> first.step()
    1
    """

    def __init__(self, device: torch.device | str):
        self._step: Int[Tensor, ""] = torch.full((), NEVER, device=device)

    @torch.no_grad()
    def see(self, x: Float[Tensor, ""], step: int) -> None:
        """Look at the number of a step, later."""
        self._step = torch.where(x.isfinite(), self._step, self._step.clamp(max=step))

    def step(self) -> int | None:
        """The first such step on any rank; none when there was none. This waits, and all ranks must ask."""
        step = int(ranks.smallest(self._step))
        return None if step == NEVER else step


@torch.no_grad()
def is_finite(model: nn.Module) -> bool:
    """Whether all weights are finite numbers.

    >>> is_finite(nn.Linear(2, 3))
    True
    """
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())

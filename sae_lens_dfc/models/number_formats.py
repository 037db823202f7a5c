"""Decides between bfloat16 and float32 for `auto`: measures which dtype the device is fast in, because
the processor's name does not show it.

A processor without AVX512-BF16 or AMX multiplies matrices in bfloat16 many times slower than in
float32: 58 times on an AMD EPYC of 2021. One with AVX512-BF16 and no AMX took twice as long (an
Intel Emerald Rapids, one thread).
"""

import logging
import math
import time
from collections.abc import Iterable
from functools import cache

import torch
from sae_lens.util import str_to_dtype
from torch import Tensor

logger = logging.getLogger(__name__)

FORMATS = ("bfloat16", "float16", "float32")
"""Dtypes in which a model can run."""
SLOW = 1.5
"""Slowdown relative to float32 from which a dtype counts as slow; with AMX it is below 1."""
ROWS, WIDTH = 128, 512
MIN_ROUNDS, SECONDS = 3, 0.1
"""Products in each dtype: at least three, for a tenth of a second, which is several turns of the
scheduler."""
warned: set[tuple[str, str]] = set()
"""Pairs of dtype and device that were already warned about."""


@cache
def slowdown(dtype: str, device: str) -> float:
    """Time of a matrix product in a dtype relative to float32, measured once, which takes a
    tenth of a second.

    The shortest time of each counts, on one thread, and the two dtypes take turns. On several
    threads a product waits for the core that another program holds, and the ratio came out between
    0.07 and 1.87 on one busy machine; on one thread, between 2.05 and 2.09.

    Args:
        dtype: A torch dtype, e.g. "bfloat16".
        device: An available device.

    >>> slowdown("float32", "cpu")
    1.0
    """
    if str_to_dtype(dtype) == torch.float32:
        return 1.0
    operands = {
        one: (
            torch.ones(ROWS, WIDTH, dtype=one, device=device),
            torch.ones(WIDTH, WIDTH, dtype=one, device=device),
        )
        for one in (str_to_dtype(dtype), torch.float32)
    }
    shortest = dict.fromkeys(operands, math.inf)
    n_threads, n_rounds, begin = torch.get_num_threads(), 0, time.perf_counter()
    torch.set_num_threads(1)
    try:
        while n_rounds < MIN_ROUNDS or time.perf_counter() - begin < SECONDS:
            n_rounds += 1
            for one, (x, w) in operands.items():
                shortest[one] = min(shortest[one], _seconds(x, w))
    finally:
        torch.set_num_threads(n_threads)
    return shortest[str_to_dtype(dtype)] / shortest[torch.float32]


def fast_dtype(device: str) -> str:
    """bfloat16 if the device is fast in it, else float32."""
    return "bfloat16" if slowdown("bfloat16", device) < SLOW else "float32"


@cache
def chosen_dtype(device: str) -> str:
    """Resolve `auto` to a dtype for a device, and log it once."""
    chosen = fast_dtype(device)
    logger.info(
        "Models run in %s: bfloat16 takes %.2g times as long on %s",
        chosen,
        slowdown("bfloat16", device),
        device,
    )
    return chosen


def is_slow(dtype: str, device: str) -> bool:
    """Whether a dtype is slow on an available device."""
    return slowdown(dtype, device) >= SLOW


def warn_where_slow(dtype: str, device: str) -> None:
    """Warn once if a requested dtype is slow on the device."""
    if (dtype, device) not in warned and is_slow(dtype, device):
        warned.add((dtype, device))
        logger.warning(
            "%s is %.0f times slower than float32 on %s, which has no hardware for it. Ask for float32.",
            dtype,
            slowdown(dtype, device),
            device,
        )


def say_kept(begun: str, formats: Iterable[tuple[str, str]]) -> None:
    """Warn, in one line, if a resumed run keeps dtypes that `auto` would not choose on the current
    devices.

    Args:
        begun: What is resumed, as the subject of the sentence.
        formats: Each dtype that it was started in, with the current device.
    """
    kept = [(x, device) for x, device in dict.fromkeys(formats) if x != fast_dtype(device)]
    warned.update(kept)
    if kept:
        logger.warning(
            "%s was begun in %s and stays in it: %s",
            begun,
            " and ".join(dict.fromkeys(dtype for dtype, _ in kept)),
            "; ".join(_against_auto(dtype, device) for dtype, device in kept),
        )


def _against_auto(dtype: str, device: str) -> str:
    other = fast_dtype(device)
    times = slowdown(dtype, device) / slowdown(other, device)
    return f"auto would choose {other} on {device}, where {dtype} takes {times:.1f} times as long"


def _seconds(x: Tensor, w: Tensor) -> float:
    start = time.perf_counter()
    (x @ w)[0, 0].item()  # waits for the GPU
    return time.perf_counter() - start

"""Hard text in all pairs of tokenizers: what is checked of it is in alignment_check.py."""

import pytest
from transformers import PreTrainedTokenizerBase

from tests.reliability.alignment_check import fuzz_of_tokenizers

N_SHARES = 20
"""Seeds among which the strings are divided."""


def test_some_hard_text_pairs_where_both_models_have_read_the_same_and_nowhere_else(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    fuzz_of_tokenizers(tokenizers, N_SHARES, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(N_SHARES))
def test_hard_text_pairs_where_both_models_have_read_the_same_and_nowhere_else(
    tokenizers: dict[str, PreTrainedTokenizerBase], pytestconfig: pytest.Config, seed: int
) -> None:
    n_strings = int(str(pytestconfig.getoption("fuzz_strings")))
    fuzz_of_tokenizers(tokenizers, seed, -(-n_strings // N_SHARES))

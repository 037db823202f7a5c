"""A quarter of the fuzz, since files run side by side: see alignment_check.py."""

import pytest
from transformers import PreTrainedTokenizerBase

from tests.reliability.alignment_check import fuzz_share


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15, 20))
def test_hard_text_pairs_where_both_models_have_read_the_same_and_nowhere_else(
    tokenizers: dict[str, PreTrainedTokenizerBase], pytestconfig: pytest.Config, seed: int
) -> None:
    fuzz_share(tokenizers, pytestconfig, seed)

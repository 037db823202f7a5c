"""`sae-lens-dfc align`: prints the token alignment coverage of two tokenizers on a text."""

import json
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from sae_lens_dfc.core.flags import switch
from sae_lens_dfc.core.terminal import print_result


@dataclass
class AlignOptions:
    """Report how many tokens of two tokenizers end at the same characters of a text, and why the
    others are not paired."""

    tokenizer_a: str
    """Hub name, folder or .gguf file."""
    tokenizer_b: str
    """Hub name, folder or .gguf file."""
    file: str = field(positional=True, metavar="FILE")
    """A text file, any data set that `train` accepts, or cpython-docs."""
    text_column: str = "text"
    """Column that holds the text."""
    json: bool = switch()
    """Print the results as JSON."""


OPTIONS = AlignOptions


def run(options: AlignOptions) -> None:
    """Print the alignment coverage of two tokenizers on a text."""
    # Imported here, because `--help` does not need them.
    from sae_lens_dfc.core.terminal import text_table
    from sae_lens_dfc.core.untrusted.dataset_folder import TABLE_LOADERS
    from sae_lens_dfc.data.alignment.align import REASONS, Coverage, align
    from sae_lens_dfc.data.alignment.tokens import tokenize
    from sae_lens_dfc.data.sources import MAX_CHARS
    from sae_lens_dfc.data.text.cleaning import clean, split_text
    from sae_lens_dfc.data.text.datasets import load_texts, read_text_file
    from sae_lens_dfc.models.loading import load_tokenizer

    a, b = load_tokenizer(options.tokenizer_a), load_tokenizer(options.tokenizer_b)
    path = Path(options.file)
    if path.is_file() and path.suffix not in TABLE_LOADERS:
        texts = [read_text_file(path)]
    else:
        texts = load_texts(options.file, options.text_column)
    coverage = Coverage()
    for text in texts:
        for piece in split_text(clean(text), MAX_CHARS):
            coverage.add(align(tokenize(a, piece), tokenize(b, piece))[1])
    if coverage.pairs == 0:
        raise ValueError(
            f"{options.file!r} has no paired position: {coverage.tokens_a} tokens of A, {coverage.tokens_b} of B, "
            "and no character at which both end one. Check that the file holds text."
        )
    if options.json:
        print_result(json.dumps(coverage.to_dict()))
        return
    print_result(f"A: {coverage.pairs} of {coverage.tokens_a} tokens paired ({coverage.a:.1%})")
    print_result(f"B: {coverage.pairs} of {coverage.tokens_b} tokens paired ({coverage.b:.1%})")
    reasons = sorted({*coverage.dropped_a, *coverage.dropped_b})
    rows = [[REASONS[r], str(coverage.dropped_a[r]), str(coverage.dropped_b[r])] for r in reasons]
    if rows:
        print_result("\n" + text_table(["why a token is not paired", "A", "B"], rows))

"""Tokenizers of every kind there is, small ones, trained on a fixed text."""

import json
from collections.abc import Callable

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.organisms.from_scratch import BOS, byte_bpe

TRAINING_TEXT = ["The cat sat on the mat in 1989. " * 3, *reference_pages()[:6]]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_bpe_english() -> Tokenizer:
    return byte_bpe(TRAINING_TEXT, vocab_size=400)


def _byte_bpe_japanese() -> Tokenizer:
    """Few merges, all of bytes of Japanese: its tokens begin and end inside characters."""
    return byte_bpe(["ラーメンを食べるラーララをべー" * 20], vocab_size=290)


def _byte_bpe_trimmed() -> Tokenizer:
    """Reads a space before the text, and leaves spaces out of its map back to it, as in RoBERTa;
    knows indented lines."""
    tokenizer = byte_bpe([*TRAINING_TEXT, "if x:\n    y\n  \n        z\n" * 40], vocab_size=400)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _byte_bpe_dropping() -> Tokenizer:
    """Drops the bytes that its training text did not have, as SmolLM2 does; a word may have known
    and dropped ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[BOS], show_progress=False)
    tokenizer.train_from_iterator([*TRAINING_TEXT, "naïve 日本語 \x01\x1c"], trainer)
    return tokenizer


def _byte_bpe_nfc() -> Tokenizer:
    """Bytes of what NFC makes of the text: letters joined with their accents, as in Qwen."""
    tokenizer = byte_bpe([*TRAINING_TEXT, "é naïve Ångström " * 9], vocab_size=400)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """Spaces are part of words, unknown characters fall back to bytes, as in Gemma and Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[BOS, "<unk>", *BYTES], show_progress=False
    )
    tokenizer.train_from_iterator((t.replace(" ", "▁") for t in TRAINING_TEXT), trainer)
    return tokenizer


def _unigram_bytes() -> Tokenizer:
    """Falls back to the bytes of all unknown characters that follow each other at once, as in
    LLM-jp."""
    trained = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        special_tokens=[BOS, "<unk>", *BYTES],
        unk_token="<unk>",
        show_progress=False,
    )
    words = (word for text in TRAINING_TEXT for word in text.replace(" ", " ▁").split(" "))
    trained.train_from_iterator(words, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = [(piece, score) for piece, score in model["vocab"]]
    tokenizer = Tokenizer(models.Unigram(pieces, model["unk_id"], True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([BOS, "<unk>"])
    return tokenizer


def _unigram_nfkc() -> Tokenizer:
    """NFKC makes two characters of one (ﬁ -> fi), and each piece starts with a space, as in T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[BOS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def _wordpiece_lowercase() -> Tokenizer:
    """Loses case, accents and spaces: its map back to the text is not one to one, as in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=[BOS, "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def _characters() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=1, special_tokens=[BOS, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def _characters_nfkc() -> Tokenizer:
    """Characters of what NFKC and lower case make of the text, which may be many for one (ﷺ); all
    unknown ones alike."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    trainer = trainers.BpeTrainer(vocab_size=1, special_tokens=[BOS, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*TRAINING_TEXT, "éı⁄ صلى"], trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_bpe": byte_bpe_english,
    "byte_bpe_japanese": _byte_bpe_japanese,
    "byte_bpe_trimmed": _byte_bpe_trimmed,
    "byte_bpe_dropping": _byte_bpe_dropping,
    "byte_bpe_nfc": _byte_bpe_nfc,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram_bytes": _unigram_bytes,
    "unigram_nfkc": _unigram_nfkc,
    "wordpiece_lowercase": _wordpiece_lowercase,
    "characters": _characters,
    "characters_nfkc": _characters_nfkc,
}

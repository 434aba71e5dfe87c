"""A tokenizer for random weights: as many tokens as the model has, so that text costs what it costs in reality."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
SPACE = "\u0120"  # how byte-level vocabularies write one


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE: the 256 bytes, then words of 2 to 9 letters, half of which begin with a space. It reads text
    byte by byte, as it has no merges: prompts are meant to be given as token ids."""
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    rng = np.random.default_rng(0)
    while len(tokens) < vocab_size:
        lengths = rng.integers(2, 10, vocab_size)
        letters = "".join(LETTERS[rng.integers(0, 26, int(lengths.sum()))])
        ends = np.cumsum(lengths)
        words = (letters[end - length : end] for end, length in zip(ends, lengths, strict=True))
        tokens |= dict.fromkeys(SPACE + word if at % 2 else word for at, word in enumerate(words))
    vocabulary = {token: number for number, token in enumerate(list(tokens)[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False})
    )

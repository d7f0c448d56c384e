"""The 768-word vocabulary of the needle tasks and its tokenizer: a token is a word, a digit, a letter or a mark."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from icecache.eval.needle import words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Matrix shapes like multiples of 64; the rest is filled with unused words.
VOCABULARY_MULTIPLE: Final = 64


def build_vocabulary() -> tuple[str, ...]:
    """Every word once, in the order that gives the shipped model its token ids.

    Returns
    -------
    tuple of str
        Word of each token id.
    """
    ordered = [*words.SPECIAL, *words.DIGITS, *words.PUNCTUATION, *words.LETTERS, *words.COMMON]
    ordered += [*words.KEY_ADJECTIVES, *words.KEY_NOUNS, *words.NAMES, *words.ITEMS]
    ordered += [*words.GAIN_VERBS, *words.LOSS_VERBS]
    for nouns, verbs in words.TOPICS.values():
        ordered += [*nouns.split(), *verbs.split()]
    ordered += words.FILLER_ADJECTIVES
    vocabulary = list(dict.fromkeys(ordered))
    while len(vocabulary) % VOCABULARY_MULTIPLE:
        vocabulary.append(f"<extra{len(vocabulary)}>")
    return tuple(vocabulary)


VOCABULARY: Final = build_vocabulary()
TOKEN_ID: Final = {word: token for token, word in enumerate(VOCABULARY)}
PAD: Final = TOKEN_ID["<pad>"]
BOS: Final = TOKEN_ID["<bos>"]
EOS: Final = TOKEN_ID["<eos>"]
STOP: Final = TOKEN_ID["."]
ZERO: Final = TOKEN_ID["0"]


def token_ids(text: str) -> list[int]:
    """Token ids of words separated by blanks.

    Parameters
    ----------
    text : str
        Words, digits and marks, each set apart by blanks.

    Returns
    -------
    list of int
        One id a word.

    Raises
    ------
    KeyError
        If a word is not in the vocabulary.
    """
    return [TOKEN_ID[word] for word in text.split()]


def text_of(tokens: Iterable[int]) -> str:
    """Words of token ids, joined by blanks: the inverse of `token_ids`.

    Parameters
    ----------
    tokens : iterable of int
        Token ids below `len(VOCABULARY)`.

    Returns
    -------
    str
        The words.
    """
    return " ".join(VOCABULARY[token] for token in tokens)


def vocabulary_hash() -> str:
    """SHA-256 of the vocabulary, one word a line; pinned by a test because weights depend on it.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    return hashlib.sha256("\n".join(VOCABULARY).encode()).hexdigest()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: blanks separate words, digits and marks stand alone.

    Returns
    -------
    PreTrainedTokenizerFast
        Tokenizer whose ids are those of `VOCABULARY`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN_ID), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.add_special_tokens(list(words.SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )

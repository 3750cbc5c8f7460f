"""Text -> words, in any script: the one place that says what a word is, for limits, counts, BM25 and ROUGE.

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces, so each of their characters is a word, and
so is each emoji. In all other text, words are what stands between white space.
"""

from __future__ import annotations

import unicodedata
from itertools import islice

import regex

_ALONE = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
    r"|\p{RI}{2}|(?:\p{Emoji_Presentation}|\p{Extended_Pictographic}\uFE0F)"
    r"(?:\p{EMod}|\uFE0F|\u200D\p{Extended_Pictographic})*"
)
_HAS_ALONE = regex.compile(_ALONE)
_WORD = regex.compile(rf"{_ALONE}|(?:(?!{_ALONE})\S)+")
_LETTERS = regex.compile(rf"{_ALONE}|(?:(?!{_ALONE})[\p{{L}}\p{{M}}\p{{N}}])+")


def words(text: str) -> list[str]:
    """The words of a text; `text.split()` where no character of it is a word of its own."""
    return text.split() if text.isascii() else _WORD.findall(text)


def num_words(text: str) -> int:
    return len(words(text))


def first_words(text: str, num: int) -> str:
    """The beginning of a text that is on one line, up to and with its word number `num`."""
    return text[: _end(text, num)].rstrip()


def last_words(text: str, num: int) -> str:
    """The end of a text that is on one line: its last `num` words."""
    return text[_end(text, num_words(text) - num) :].lstrip() if num else ""


def _end(text: str, num: int) -> int:
    """Where word number `num` ends; 0 for `num` below 1, the text's end where it has fewer."""
    ends = (match.end() for match in _WORD.finditer(text))
    return 0 if num < 1 else next(islice(ends, num - 1, None), len(text))


def search_words(text: str) -> list[str]:
    """The words that BM25 compares: as the paper splits them, on single spaces, where a script has spaces."""
    split = text.split(" ")
    if text.isascii() or not _HAS_ALONE.search(text):
        return split
    return [word for part in split for word in (_WORD.findall(part) or [part])]


def letters(text: str) -> list[str]:
    """The words that ROUGE compares: runs of letters and digits, lower case, as rouge_score has them for ASCII.

    A text without any is compared by what stands between white space: "?!" equals "?!".
    """
    return _LETTERS.findall(unicodedata.normalize("NFC", text).lower()) or text.split()


def is_mostly_ascii(text: str) -> bool:
    """Whether at least half of a text's letters, digits and emoji are ASCII."""
    found = "".join(letters(text))
    return 2 * sum(map(str.isascii, found)) >= len(found)

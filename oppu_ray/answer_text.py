"""An answer's tokens -> its text, piece by piece as it is written (it stands inside `inference`).

In: one token at a time. Out: text that no later token can take back: half a character is held until it is whole, and
what may be the beginning of a stop text until it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class AnswerText:
    """The text of one answer. Special tokens have no text.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        stop: Texts that end the answer; `is_stopped` once one has been seen.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer.backend_tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The new text after one more token."""
        try:
            new = self._stream.step(self._tokenizer, token)
        except Exception:  # of this very type: a byte that ends in no character takes back text that is out already
            self._stream = DecodeStream(skip_special_tokens=True)
            new = self._stream.step(self._tokenizer, token)
        self._held += new or ""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = self._held[: min(found)]
            return self.flush()
        safe = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[:safe], self._held[safe:]
        return text

    def flush(self) -> str:
        """What is still held when the answer ends."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

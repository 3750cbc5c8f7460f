"""Progress on the terminal: units done, tokens per second, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """A tqdm bar that also shows tokens per second."""

    def __init__(self, bar: tqdm):
        self._bar, self._tokens, self._started = bar, 0, time.monotonic()

    def advance(self, units: int, tokens: int) -> None:
        self._tokens += tokens
        if self._tokens:
            rate = self._tokens / (time.monotonic() - self._started)
            self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(units)


@contextmanager
def progress_bar(name: str, total: int, unit: str) -> Iterator[Progress]:
    """A bar on stderr; in a log file, where a bar cannot be redrawn, one line every 10 s."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, desc=name, unit=unit, mininterval=interval, maxinterval=interval, file=sys.stderr) as bar:
        yield Progress(bar)

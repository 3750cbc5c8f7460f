"""Processes that cache users' data obey the audit log: a user forgotten anywhere is dropped by all within a second.

vault -> registry -> **following** -> replica, trainer. In: the audit lines of forgetting. Out: a call per forgotten
user, and a line in the registry that says so, for which forgetting waits. It works from any process that can reach the
registry, the command line as well as another service.

Design: the log is polled, one indexed query that reads no old line. A notification can be lost, and SQLite has none. A
process that cannot read the log for `TTL_S` drops everybody and answers nobody until it can again, so that forgetting
may take it for dead after that time.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable

from oppu_ray.registry import Registry, RegistryError

POLL_S = 0.2
TTL_S = 30.0
"""A follower renews its line every third of this; see `Following.is_lost`."""
WAIT_S = 10.0
"""So long forgetting waits for followers that live."""

logger = logging.getLogger(__name__)


class Following:
    """Makes one process obey. Create it before anything of a user is cached.

    Args:
        name: Of the process, for people; a random part is added.
        forget: Called with the hash of a forgotten user, in the thread of this class. What it raises is logged, and the
            user counts as not forgotten here until it succeeds.
        forget_everyone: Called when the registry could not be read for `TTL_S`.
        clock: Seconds; any start.
    """

    def __init__(
        self,
        registry: Registry,
        name: str,
        forget: Callable[[str], None],
        forget_everyone: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"{name or os.getpid()} {secrets.token_hex(4)}"
        self._registry, self._forget, self._forget_everyone, self._clock = registry, forget, forget_everyone, clock
        self._renewed = clock()
        self._seen = registry.join_followers(self.name, TTL_S)
        self._was_lost = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="following", daemon=True)

    @property
    def is_lost(self) -> bool:
        """Whether forgetting may take this process for dead: then it must not answer from anything it has cached."""
        return self._clock() - self._renewed >= TTL_S

    def start(self) -> None:
        """Look every `POLL_S`, in a thread."""
        self._thread.start()

    def look(self) -> None:
        """Read the log once and obey it.

        Raises:
            RegistryError: It cannot be read.
            Exception: What `forget` raised.
        """
        began = self._clock()
        if self.is_lost and not self._was_lost:
            self._forget_everyone()
            self._was_lost = True
        newest, users = self._registry.forgotten_since(self._seen)
        for user_hash in dict.fromkeys(users):
            self._forget(user_hash)
        if users or began - self._renewed >= TTL_S / 3:
            self._registry.follow(self.name, newest, TTL_S)
            self._renewed, self._was_lost = began, False
        self._seen = newest

    def close(self) -> None:
        """Stop looking; the process has dropped everything, or is about to end."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self._registry.leave_followers(self.name)
        except RegistryError as error:  # its line runs out
            logger.warning("%s", error)

    def _run(self) -> None:
        failed = ""
        while not self._stopped.wait(POLL_S):
            try:
                self.look()
                failed = ""
            except Exception as error:  # a thread's error would vanish, and nobody would be forgotten any more
                if type(error).__name__ != failed:
                    failed = type(error).__name__
                    logger.error("cannot obey the audit log: %s", error if isinstance(error, RegistryError) else failed)


def wait_for_followers(registry: Registry, line: int, timeout_s: float = WAIT_S) -> tuple[list[str], list[str]]:
    """Names of the followers that have obeyed an audit line, and of those that live and have not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        followers = registry.followers()
        late = [one.name for one in followers if one.seen < line]
        if not late or time.monotonic() >= deadline:
            return [one.name for one in followers if one.seen >= line], late
        time.sleep(0.02)

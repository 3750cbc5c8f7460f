"""Training on request: one user after another, in a thread of its own (arrow vault -> train_pack -> vault).

In: user hashes. Out: `Refresh`es, to be asked for while the training goes on; the result is a new current version,
which replicas pick up at the user's next request.
A reader might question that the queue is in memory: what is lost with the process is a wish to train, which the user
can repeat; a training itself commits whole or not at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from oppu_ray.base_model import Base
from oppu_ray.config import Config
from oppu_ray.following import Following
from oppu_ray.refresh import refresh_user
from oppu_ray.registry import Forgotten, UserHash
from oppu_ray.vault import Vault
from serve.messages import Refresh, failure_of

MAX_QUEUED = 100
MAX_KEPT = 10_000
"""Finished trainings whose outcome can still be asked for."""


class Trainer:
    """See the module's docstring. `open_base` is called in the thread at the first training, and once."""

    def __init__(self, config: Config, vault: Vault, open_base: Callable[[], Base]):
        self.config, self.vault, self._open_base = config, vault, open_base
        self._base: Base | None = None
        self._lock = threading.Lock()
        self._refreshes: dict[str, Refresh] = {}
        self._under_way: str | None = None
        self._ended = threading.Condition(self._lock)
        self.following = Following(vault.registry, "trainer", self.forget, self.forget_everyone)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="train")
        self.following.start()

    def start(self, user_hash: str) -> Refresh:
        """Queue a user, who may be there already. State "refused" means that the queue is full."""
        with self._lock:
            waiting = [user for user, one in self._refreshes.items() if one.state in ("queued", "training")]
            if user_hash in waiting:
                return self._refreshes[user_hash]
            if len(waiting) >= MAX_QUEUED:
                return Refresh("refused")
            for user in [user for user in self._refreshes if user not in waiting][: -MAX_KEPT or None]:
                del self._refreshes[user]
            self._refreshes.pop(user_hash, None)
            self._refreshes[user_hash] = Refresh("queued")
            self._pool.submit(self._train, UserHash(user_hash))
            return self._refreshes[user_hash]

    def status(self, user_hash: str) -> Refresh:
        """How far a user's training has come; "idle" if none is known."""
        with self._lock:
            return self._refreshes.get(user_hash, Refresh())

    def close(self) -> None:
        """Forget who waits, and wait for the training under way."""
        self._pool.shutdown(cancel_futures=True)
        self.following.close()

    def forget(self, user_hash: str) -> None:
        """Drop a user from the queue, or end their training at its next step and wait for that."""
        with self._lock:
            self._refreshes.pop(user_hash, None)
            self._ended.wait_for(lambda: self._under_way != user_hash)

    def forget_everyone(self) -> None:
        """The same for all users."""
        with self._lock:
            self._refreshes.clear()
            self._ended.wait_for(lambda: self._under_way is None)

    def _train(self, user_hash: UserHash) -> None:
        with self._lock:
            if user_hash not in self._refreshes:  # forgotten while they waited
                return
            self._under_way = user_hash
        try:
            self._base = self._base or self._open_base()
            self._set(user_hash, "training")
            done = refresh_user(self.config, self.vault, user_hash, self._base, self._progress(user_hash))
            self._set(user_hash, "failed" if done.error else "done", version=done.version, error=done.error or "")
        except Exception as error:  # a thread's error would vanish, and the user would wait for ever
            failed = failure_of(error, f"user {user_hash[:12]}: training")
            self._set(user_hash, "failed", error=failed.message)
        finally:
            with self._lock:
                self._under_way = None
                self._ended.notify_all()

    def _progress(self, user_hash: str) -> Callable[[int, int], None]:
        def step_done(done: int, of_all: int) -> None:
            if not self._set(user_hash, "training", num_steps_done=done, num_steps=of_all):
                raise Forgotten(f"user {user_hash[:12]}: was forgotten while they were trained")

        return step_done

    def _set(self, user_hash: str, state: str, **changes: object) -> bool:
        """Record how far a training has come; False if the user was forgotten."""
        with self._lock:
            if user_hash not in self._refreshes:
                return False
            self._refreshes[user_hash] = replace(self._refreshes[user_hash], state=state, **changes)  # type: ignore[arg-type]
            return True

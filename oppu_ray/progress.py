"""Progress of a stage: a bar on the terminal, and `status.json` in the run's folder for `oppu status`.

Beside the arrows that take long. In: units done, tokens, packs, recoveries, as they happen. Out: a tqdm bar, and every
few seconds one small file with counts only, written atomically. A reader might question a file where Ray has a state
API: it is read without Ray, from any machine that sees the run, also after the cluster is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oppu_ray.files import write_atomic

STATUS_NAME = "status.json"
STATUS_EVERY_S = 2.0
DRIVER_POLL_S = 0.5


class Interrupted(Exception):
    """The stage was asked to stop and has: what is done is kept, and the same command goes on from there."""


class ClusterLost(Exception):
    """The cluster's head does not answer any more, or its workers do not live; what is done is kept."""


class Progress:
    """Counts of one stage. Without a bar and a path it only counts."""

    def __init__(self, bar: tqdm | None = None, path: Path | None = None, stage: str = "", num_packs: int = 0):
        self.num_tokens = self.num_done = self.num_failed = 0
        self.num_packs, self.num_packs_done, self.num_recoveries = num_packs, 0, 0
        self.recovery_s: list[float] = []  # from the loss of a worker until its successor is up
        self._bar, self._path, self._stage = bar, path, stage
        self._started, self._start_time, self._written = time.monotonic(), time.time(), -STATUS_EVERY_S

    def advance(self, units: int, tokens: int, failed: int = 0) -> None:
        """`units` are done (`failed` more are not, and will not be), and `tokens` were trained on."""
        self.num_done, self.num_failed = self.num_done + units, self.num_failed + failed
        self.num_tokens += tokens
        if self._bar is not None:
            if self.num_tokens:
                self._bar.set_postfix_str(f"{self._rate():.0f} tokens/s", refresh=False)
            self._bar.update(units + failed)
        self.tick()

    def pack_done(self) -> None:
        self.num_packs_done += 1
        self.tick()

    def recovered(self, reason: str) -> None:
        """A worker was lost and its work goes on elsewhere; `reason` is one line."""
        self.num_recoveries += 1
        print(f"recovering: {reason}", file=sys.stderr)
        self.tick()

    def tick(self) -> None:
        """Write the status if the last one is old enough; call it while waiting, too."""
        if time.monotonic() - self._written >= STATUS_EVERY_S:
            self.write("running")

    def write(self, state: str) -> None:
        """Write the status now. `state`: running, done, interrupted or failed."""
        if self._path is None:
            return
        total = self._bar.total if self._bar is not None else 0
        settled, elapsed = self.num_done + self.num_failed, time.monotonic() - self._started
        status = {
            "stage": self._stage,
            "state": state,
            "unit": self._bar.unit if self._bar is not None else "",
            "total": total,
            "done": self.num_done,
            "failed": self.num_failed,
            "left": total - settled,
            "packs": self.num_packs,
            "packs_done": self.num_packs_done,
            "recoveries": self.num_recoveries,
            "tokens": self.num_tokens,
            "tokens_per_s": self._rate(),
            "eta_s": elapsed * (total - settled) / settled if settled else None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._start_time,
            "updated": time.time(),
        }
        with suppress(OSError):  # a full disk costs the status, not the training
            write_atomic(self._path, json.dumps(status, indent=1).encode())
        self._written = time.monotonic()

    def _rate(self) -> float:
        return self.num_tokens / max(time.monotonic() - self._started, 1e-9)


@contextmanager
def progress_bar(
    name: str, total: int, unit: str, run_dir: Path | None = None, stage: str = "", num_packs: int = 0
) -> Iterator[Progress]:
    """A bar on stderr; in a log file, where a bar cannot be redrawn, one line every 10 s.

    With `run_dir`, `status.json` there says how far the stage is, and in the end how it ended.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, desc=name, unit=unit, mininterval=interval, maxinterval=interval, file=sys.stderr) as bar:
        progress = Progress(bar, run_dir / STATUS_NAME if run_dir else None, stage, num_packs)
        progress.write("running")
        try:
            yield progress
        except (Interrupted, KeyboardInterrupt, GeneratorExit):
            progress.write("interrupted")
            raise
        except BaseException:
            progress.write("failed")
            raise
        progress.write("done")


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether this process was asked to end: the stage then ends between two steps."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def only_driver(path: Path, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Wait until no other process holds the lock at `path`, and hold it: a run that was started twice trains once.

    The system gives the lock back when its process dies, however that happens, so a restart never waits for the dead.

    Raises:
        Interrupted: `should_stop` said yes while it waited.
    """
    with path.open("a") as file:
        is_told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if should_stop():
                    raise Interrupted("stopped while another process trains this run") from None
            except OSError:  # a disk without locks: two drivers then do the work twice, and each user is committed once
                break
            if not is_told:
                print("another process trains this run (see `oppu status`); waiting until it ends", file=sys.stderr)
                is_told = True
            time.sleep(DRIVER_POLL_S)
        yield


def read_status(run_dir: Path) -> dict[str, Any]:
    """What `status.json` says; `seconds_ago` is its age.

    Raises:
        ValueError: No stage that takes long has run in this folder.
    """
    path = run_dir / STATUS_NAME
    try:
        status = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected the folder of a run that was started") from error
    return {**status, "seconds_ago": max(0.0, time.time() - status["updated"])}


def format_status(status: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    state = status["state"]
    if state == "running" and status["seconds_ago"] > 15 * STATUS_EVERY_S:
        state = "silent: killed, or waiting in one long step; run the same command again to continue"
    share = (status["done"] + status["failed"]) / max(status["total"], 1)
    filled = round(30 * share)
    left = f", about {_duration(status['eta_s'])} left" if status["state"] == "running" and status["eta_s"] else ""
    lines = [
        f"{status['stage']}: {state} (updated {_duration(status['seconds_ago'])} ago by process {status['pid']} "
        f"on {status['host']})",
        f"[{'#' * filled}{'.' * (30 - filled)}] {status['done']} of {status['total']} {status['unit']}s done, "
        f"{status['failed']} failed, {status['left']} to do{left}",
    ]
    if status["packs"]:
        lines.append(
            f"{status['packs_done']} of {status['packs']} packs, {status['tokens']} tokens, "
            f"{status['tokens_per_s']:.0f} tokens/s, {status['recoveries']} recoveries"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

"""Show how far a stage is: on the terminal, in a log, and in `status.json` in the run's folder for `oppu status`.

In: units done, tokens, packs, recoveries, as they happen. Out: a bar where one can be redrawn, else a line now and
then; and every few seconds one small file with counts only, written atomically.

Design: the status is a file, although Ray has a state API: it can be read without Ray, from any machine that sees the
run, also after the cluster is gone.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import progress as rich_progress
from rich.console import Console

from oppu_ray.files import write_atomic

STATUS_NAME = "status.json"
STATUS_EVERY_S = 2.0
LINE_EVERY_S = 10.0
DRIVER_POLL_S = 0.5


class Interrupted(Exception):
    """The stage was asked to stop and has: what is done is kept, and the same command goes on from there."""


class ClusterLost(Exception):
    """The cluster's head does not answer any more, or its workers do not live; what is done is kept."""


class Forecast:
    """The work of a stage: how much of it is done, and how long the rest takes.

    Workers work side by side. Each is taken to be as fast as those that have reported are on average.

    Args:
        work: How much each worker has to do, in a unit to which time is proportional.
        clock: Seconds that never go back.
    """

    def __init__(self, work: Sequence[float], clock: Callable[[], float] = time.monotonic):
        self._work, self._clock, self._has_begun = list(work), clock, False
        self._done, self._new, self._reported = [0.0] * len(work), [0.0] * len(work), dict[int, float]()
        self._began = clock()

    def begin(self) -> None:
        """Start the clock here, once: what came before (loading a base, starting workers) says nothing about speed."""
        if not self._has_begun:
            self._has_begun, self._began = True, self._clock()
            self._new, self._reported = [0.0] * len(self._work), {}

    def add(self, amount: float, worker: int = 0, is_new: bool = True) -> None:
        """Count what `worker` has done, or (not `is_new`) has not had to do, because an earlier process did it."""
        self._done[worker] += amount
        if is_new:
            self._new[worker] += amount
            self._reported[worker] = self._clock()

    def settled(self, units: int) -> None:
        """Count units of the stage that will not be worked on any more."""
        self.add(units)

    def stepped(self, user_ids: Sequence[str]) -> None:
        """Count training steps, each by the id of its user, where the unit of work is smaller than a user."""

    @property
    def share(self) -> float:
        """Share of all work that is done."""
        return min(1.0, sum(self._done) / (sum(self._work) or 1.0))

    @property
    def left_s(self) -> float | None:
        """Seconds until the last worker is done, or None as long as no speed is known."""
        spent_s = sum(at - self._began for at in self._reported.values())
        made = sum(self._new[worker] for worker in self._reported)
        if spent_s <= 0 or made <= 0:
            return None
        longest, now = 0.0, self._clock()
        for worker, (work, done) in enumerate(zip(self._work, self._done, strict=True)):
            left_s = (work - done) * spent_s / made
            waited_s = now - self._reported.get(worker, self._began)
            longest = max(longest, left_s - waited_s, left_s / 2)  # half: a report that is overdue does not mean done
        return longest


class Progress:
    """Counts of one stage, shown as they grow.

    Args:
        name, unit: What is counted, for people.
        total: Units in all.
        path: Where the status is written; None for nowhere.
        show: Called after each change with the share that is done and a text.
    """

    def __init__(
        self,
        name: str = "",
        total: int = 0,
        unit: str = "",
        path: Path | None = None,
        stage: str = "",
        num_packs: int = 0,
        forecast: Forecast | None = None,
        show: Callable[[float, str], None] = lambda share, text: None,
    ):
        self.num_tokens = self.num_done = self.num_failed = 0
        self.num_packs, self.num_packs_done, self.num_recoveries = num_packs, 0, 0
        self.recovery_s: list[float] = []  # from the loss of a worker until its successor is up
        self.forecast = forecast or Forecast([total])
        self._name, self._total, self._unit, self._path, self._stage = name, total, unit, path, stage
        self._show = show
        self._started, self._start_time, self._written = time.monotonic(), time.time(), -STATUS_EVERY_S

    def advance(self, units: int, tokens: int, failed: int = 0) -> None:
        """`units` are done (`failed` more are not, and will not be), and `tokens` were trained on."""
        self.num_done, self.num_failed = self.num_done + units, self.num_failed + failed
        self.num_tokens += tokens
        self.forecast.settled(units + failed)
        if tokens:
            self.forecast.begin()  # with a trainer's first step: before it a base was loaded and code compiled
        self.tick()

    def stepped(self, num_tokens: int, user_ids: Sequence[str]) -> None:
        """Training steps were taken on so many tokens; each is told by the id of its user."""
        self.forecast.stepped(user_ids)
        self.advance(0, num_tokens)

    def pack_done(self) -> None:
        self.num_packs_done += 1
        self.tick()

    def recovered(self, reason: str) -> None:
        """A worker was lost and its work goes on elsewhere; `reason` is one line."""
        self.num_recoveries += 1
        print(f"recovering: {reason}", file=sys.stderr)
        self.tick()

    def tick(self) -> None:
        """Show the counts, and write the status if the last one is old enough; call it while waiting, too."""
        self._show(self.forecast.share, self.text())
        if time.monotonic() - self._written >= STATUS_EVERY_S:
            self.write("running")

    def text(self) -> str:
        """The counts in one line."""
        parts = [f"{self.num_done} of {self._total} {self._unit}s"]
        if self.num_failed:
            parts.append(f"{self.num_failed} failed")
        if self.num_tokens:
            parts.append(f"{self._rate():.0f} tokens/s")
        left_s = self.forecast.left_s
        if left_s is not None and self.num_done + self.num_failed < self._total:
            parts.append(f"about {_duration(left_s)} left")
        return f"{self._name}: {', '.join(parts)}"

    def write(self, state: str) -> None:
        """Write the status now. `state`: running, done, interrupted or failed."""
        if self._path is None:
            return
        status = {
            "stage": self._stage,
            "state": state,
            "unit": self._unit,
            "total": self._total,
            "done": self.num_done,
            "failed": self.num_failed,
            "left": self._total - self.num_done - self.num_failed,
            "share": self.forecast.share,
            "packs": self.num_packs,
            "packs_done": self.num_packs_done,
            "recoveries": self.num_recoveries,
            "tokens": self.num_tokens,
            "tokens_per_s": self._rate(),
            "eta_s": self.forecast.left_s,
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
    name: str,
    total: int,
    unit: str,
    run_dir: Path | None = None,
    stage: str = "",
    num_packs: int = 0,
    forecast: Forecast | None = None,
) -> Iterator[Progress]:
    """Show a stage's progress on stderr: a bar on a terminal or in a notebook, elsewhere a line now and then.

    Args:
        name, unit: What is counted, for people.
        total: Units in all.
        run_dir: Where `status.json` says how far the stage is, and in the end how it ended.
        forecast: How long it takes; by default all units take equally long.
    """
    with _display() as show:
        progress = Progress(name, total, unit, run_dir and run_dir / STATUS_NAME, stage, num_packs, forecast, show)
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
def _display() -> Iterator[Callable[[float, str], None]]:
    """Yield a function that shows a share and a text."""
    console = Console(stderr=True)
    if console.is_jupyter and find_spec("ipywidgets") or sys.stderr.isatty() and console.is_interactive:
        columns = rich_progress.BarColumn(), rich_progress.TextColumn("{task.description}", markup=False)
        with rich_progress.Progress(*columns, console=console, refresh_per_second=4) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda share, text: bar.update(task, completed=share, description=text)
        return
    shown, began, last = "", time.monotonic(), time.monotonic()

    def show(share: float, text: str) -> None:
        nonlocal shown, last
        # The longer it takes, the rarer the lines: an hour has about 60, a day about 120.
        if time.monotonic() - last >= max(LINE_EVERY_S, (time.monotonic() - began) / 20):
            print(f"{share:4.0%} {text}", file=sys.stderr, flush=True)
            last = time.monotonic()
        shown = f"{share:4.0%} {text}"

    yield show
    if shown:
        print(shown, file=sys.stderr, flush=True)


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

    The system releases the lock when its process dies, however that happens, so a restart never waits for the dead.

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
    filled = round(30 * status["share"])
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

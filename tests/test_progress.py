"""The status of a run as another process sees it, and what a signal does to a stage."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from oppu_ray import progress as module
from oppu_ray.cli import main
from oppu_ray.progress import (
    Forecast,
    Interrupted,
    format_status,
    only_driver,
    progress_bar,
    read_status,
    stop_on_sigterm,
)


def test_the_status_counts_and_says_how_the_stage_ended(tmp_path: Path) -> None:
    with progress_bar("users", 4, "user", tmp_path, "train", num_packs=2) as progress:
        assert read_status(tmp_path)["state"] == "running"
        progress.advance(1, 100)
        progress.advance(0, 20, failed=1)
        progress.pack_done()
        progress.recovered("worker 1 is lost")
        progress.write("running")
        status = read_status(tmp_path)
        assert [status[key] for key in ("stage", "total", "done", "failed", "left")] == ["train", 4, 1, 1, 2]
        assert [status[key] for key in ("packs", "packs_done", "recoveries", "tokens")] == [2, 1, 1, 120]
        assert status["pid"] == os.getpid() and status["tokens_per_s"] > 0 and status["eta_s"] > 0
        text = format_status(status)
        assert "1 of 4 users done, 1 failed, 2 to do, about" in text and "1 of 2 packs, 120 tokens" in text
    assert read_status(tmp_path)["state"] == "done"
    for error, state in ((Interrupted, "interrupted"), (KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")):
        with pytest.raises(error), progress_bar("users", 1, "user", tmp_path, "train"):
            raise error
        assert read_status(tmp_path)["state"] == state


def test_a_full_disk_costs_the_status_and_not_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with progress_bar("users", 1, "user", tmp_path, "train") as progress:
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_atomic", fail)
            progress.write("running")
        progress.advance(1, 100)
    assert read_status(tmp_path)["done"] == 1


def test_a_running_status_that_grew_old_is_called_silent(tmp_path: Path) -> None:
    with progress_bar("users", 4, "user", tmp_path, "train"):
        status = json.loads((tmp_path / module.STATUS_NAME).read_text())
    assert "silent" in format_status({**status, "state": "running", "seconds_ago": 100.0})
    assert "silent" not in format_status({**status, "state": "done", "seconds_ago": 100.0})


def test_oppu_status_reads_a_folder_or_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(f"run_dir: {tmp_path}/run")
    (tmp_path / "run").mkdir()
    assert main(["status", str(tmp_path / "run")]) == 2 and "expected the folder of a run" in capsys.readouterr().err
    with progress_bar("answers", 3, "answer", tmp_path / "run", "evaluate") as progress:
        progress.advance(3, 0)
    for place in ("run", "config.yaml"):
        assert main(["status", str(tmp_path / place), "--watch"]) == 0  # it has ended, so there is no more to watch
        assert "evaluate: done" in capsys.readouterr().out


def test_sigterm_asks_and_then_is_what_it_was_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_driver_waits_for_the_first_or_for_the_signal_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "DRIVER_POLL_S", 0.0)
    path, asked = tmp_path / "lock", []
    first = ExitStack()
    first.enter_context(only_driver(path, lambda: False))
    with pytest.raises(Interrupted, match="another process trains this run"), only_driver(path, lambda: True):
        raise AssertionError("two drivers at once")

    def end_the_first_at_the_third_look() -> bool:
        asked.append(1)
        if len(asked) == 3:
            first.close()
        return False

    with only_driver(path, end_the_first_at_the_third_look):
        assert len(asked) == 3
    assert capsys.readouterr().err.count("waiting until it ends") == 1


def test_a_disk_without_locks_trains_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, trained = [], []

    def no_locks(*_: object) -> None:
        asked.append(1)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with only_driver(tmp_path / "lock", lambda: False):
        trained.append(1)
    assert len(asked) == len(trained) == 1, "it waited for a lock that nobody can hold, or did not ask for one"


def test_where_nothing_can_be_redrawn_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as continuous integration does, whose log is no terminal
    forecast = Forecast([1000], lambda: now)
    with progress_bar("users", 1000, "user", forecast=forecast) as progress:
        for second in range(1000):
            now = float(second)
            progress.advance(1, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  1% users: 11 of 1000 users, 11 tokens/s, about 16 min 29 s left"
    assert lines[-1] == "100% users: 1000 of 1000 users, 10 tokens/s" and 40 < len(lines) < 60


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_a_terminal_has_a_bar_and_a_dumb_one_lines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar("users", 4, "user") as progress:
        progress.advance(4, 10)
        print("recovering", file=module.sys.stderr)
    shown = terminal.getvalue()
    assert ("\x1b[" in shown and "━" in shown) == (kind == "xterm")
    assert "users: 4 of 4 users, " in shown and shown.count("recovering") == 1


@pytest.mark.parametrize("has_widgets", [True, False])
def test_a_notebook_has_a_bar_if_it_can_show_one(has_widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Bar:
        def __init__(self, *_: object, **__: object) -> None:
            shown.append("bar")

        def __enter__(self) -> MagicMock:
            return MagicMock()

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(module, "Console", lambda **_: Console(force_jupyter=True))
    monkeypatch.setattr(module, "find_spec", lambda name: has_widgets or None)
    monkeypatch.setattr(module.rich_progress, "Progress", Bar)
    with progress_bar("users", 4, "user"):
        pass
    assert shown == ["bar"] * has_widgets

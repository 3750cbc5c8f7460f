"""The table of faults: every row names tests that exist, the README shows them all, and a result says what happened."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.chaos import INVARIANTS, ROWS, Recorder, Row, place, settle, table

TESTS = Path(__file__).resolve().parent


def test_all_thirty_two_rows_name_tests_that_exist() -> None:
    assert [row.number for row in ROWS] == list(range(1, 33))
    for row in ROWS:
        assert set(row.invariants.split()) <= INVARIANTS.keys() and row.tests
        for test in row.tests:
            file, _, name = test.partition("::")
            text = (TESTS / file).read_text(encoding="utf-8")
            assert not name or f"\ndef {name.partition('[')[0]}(" in text, f"row {row.number}: {test}"
    assert set(INVARIANTS) == {name for row in ROWS for name in row.invariants.split()}


def test_the_readme_has_every_row() -> None:
    text = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    shown = {
        int(number): (fault, how) for number, fault, how in re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|", text, re.M)
    }
    assert shown == {row.number: (row.fault, row.injection) for row in ROWS}


def test_a_files_tests_run_together_and_in_its_order() -> None:
    names = [
        "test_faults.py::test_two_drivers_of_one_run_at_once",
        "test_attacks.py",
        "test_faults.py::test_a_storm_by_a_seed",
    ]
    last = "test_faults.py::test_a_cluster_without_a_head_ends_the_driver_and_the_run_goes_on_elsewhere"
    assert sorted([last, *names], key=place) == ["test_attacks.py", names[0], names[2], last]


def report(name: str, outcome: str, when: str = "call", **properties: Any) -> Any:
    return SimpleNamespace(
        nodeid=f"tests/{name}", when=when, outcome=outcome, duration=1.0, user_properties=list(properties.items())
    )


@pytest.mark.parametrize(
    ("reports", "ends"),
    [
        ([report("a.py::one", "passed"), report("b.py::two[x]", "passed", recovery_s=3.2)], "held"),
        ([report("a.py::one", "passed"), report("b.py::two[x]", "skipped")], "not possible here"),
        ([report("a.py::one", "failed"), report("b.py::two[x]", "passed")], "failed"),
        ([report("a.py::one", "failed", "setup"), report("b.py::two[x]", "passed")], "failed"),
        ([report("a.py::one", "passed")], "not run"),
        ([report("a.py::one", "passed"), report("b.py::two", "passed", "setup")], "not run"),
        (
            [
                report("a.py::one", "passed"),
                report("b.py::two[x]", "passed"),
                report("b.py::two[y]", "passed", "setup"),
            ],
            "not run",
        ),
        ([report("a.py::one", "passed"), report("a.py::one", "failed"), report("b.py::two", "passed")], "failed"),
        ([report("a.py::one", "passed"), report("b.py::two_more", "passed")], "not run"),
    ],
)
def test_a_row_holds_if_all_of_its_tests_ran_and_passed(reports: list[Any], ends: str) -> None:
    recorder = Recorder(left={one.nodeid.rpartition("/")[2] for one in reports})
    for one in reports:
        recorder.pytest_runtest_logreport(one)
    line = settle(Row(1, "fire", "a match", "I1 I2", ("a.py::one", "b.py::two")), recorder)
    assert line["result"] == ends and line["elapsed_s"] >= 1
    if ends == "held":
        assert line["recovery_s"] == 3.2 and "| 1 | fire | a match | I1 I2 | 3 s |" in table([line])
    else:
        assert f"| 1 | fire | a match | {ends} |" in table([line])

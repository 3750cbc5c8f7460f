"""Every fault of the table, injected for real, and what held: `python -m jobs.chaos --seed 0 [--rows 1 2 28]`.

In: the tests that `ROWS` names; with Ray, as root for the rows that need a network or a disk of their own. Out: a table
on the terminal and `runs/chaos/result.json`: per row fault, injection, invariants checked, result, recovery time. Ends
with 1 if a row failed or was not run: an interrupt ends the job with the table as far as it is. The seed draws the
storms and the model's interleavings; the same seed gives the same again.

A reader might question that the rows are pytest tests: a fault test that only runs here would rot, and as it is the
short ones are part of `make test`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from oppu_ray.files import write_atomic
from oppu_ray.machine import hardware

INVARIANTS = {
    "I1": "a published adapter is a whole, checksummed version, old or new",
    "I2": "what a user gets does not depend on another user's data",
    "I3": "the base does not change",
    "I4": "each user is done, or failed with a reason, once",
    "I5": "an answer names the version that gave it",
    "I6": "no token, text or user id in logs and metrics",
    "I7": "queues are bounded: what is too much gets 429 or 503 with Retry-After",
    "I8": "starting again needs no cleaning by hand",
    "I9": "same results for any number of workers, with and without the fault",
}
TESTS = Path(__file__).resolve().parents[1] / "tests"
TRAINING = "I1 I2 I3 I4 I6 I8 I9"


@dataclass(frozen=True)
class Row:
    """One fault: how it is injected, what is checked after it, and the tests that do both (`file::name`)."""

    number: int
    fault: str
    injection: str
    invariants: str
    tests: tuple[str, ...]


ROWS = (
    Row(1, "worker dies in any step", "SIGKILL on itself at step n; a storm drawn by the seed", TRAINING,
        ("test_faults.py::test_workers_killed_in_every_step_of_a_run", "test_faults.py::test_a_storm_by_a_seed")),
    Row(2, "worker killed from outside", "`ray.kill` of the actor", TRAINING,
        ("test_faults.py::test_an_actor_killed_through_ray",)),
    Row(3, "rank of a shared-out base killed, or silent", "SIGKILL; SIGSTOP", "I1 I2 I4 I8",
        ("test_group.py::test_a_killed_and_a_hanging_rank_and_a_bad_user_cost_nobody_else_their_adapter",)),
    Row(4, "one user's data breaks a rank", "a user whose loss is NaN; one without trainable items", "I2 I4",
        ("test_group.py::test_a_killed_and_a_hanging_rank_and_a_bad_user_cost_nobody_else_their_adapter",
         "test_workers.py::test_a_bad_user_fails_alone_and_is_named")),
    Row(5, "users uneven over ranks", "4 users and 3", "I2 I4 I9",
        ("test_group.py::test_users_on_a_shared_base_train_as_alone_however_uneven_the_ranks",)),
    Row(6, "node lost", "`Cluster.remove_node`, no room elsewhere", TRAINING,
        ("test_faults.py::test_a_lost_node_with_no_room_elsewhere",)),
    Row(7, "head process away, then back", "`kill_gcs_server`, `start_gcs_server`; training and serving",
        f"{TRAINING} I5",
        ("test_faults.py::test_the_clusters_head_process_restarts_in_the_middle",
         "test_chaos_serve.py::test_the_head_process_is_away")),
    Row(8, "head lost for good", "`kill_gcs_server`", TRAINING,
        ("test_faults.py::test_a_cluster_without_a_head_ends_the_driver_and_the_run_goes_on_elsewhere",)),
    Row(9, "driver killed, or told to end", "SIGKILL; SIGTERM", TRAINING,
        ("test_faults.py::test_a_driver_that_is_killed_or_told_to_end",)),
    Row(10, "replica dies under load", "SIGKILL", "I2 I5 I7",
        ("test_serve_ray.py::test_a_killed_replica_fails_only_what_it_was_answering",
         "test_chaos_serve.py::test_a_replica_is_ended_by_a_signal[9]")),
    Row(11, "Serve's controller or proxy dies", "`ray.kill` of each", "I5 I8",
        ("test_chaos_serve.py::test_the_controller_is_killed", "test_chaos_serve.py::test_the_proxy_is_killed")),
    Row(12, "rolling update under load", "a new deployment, no pause", "I5",
        ("test_serve_ray.py::test_a_new_deployment_under_load_costs_no_request",)),
    Row(13, "crash in a commit", "at every write, sync and rename; 200 SIGKILLs", "I1 I4 I8",
        ("test_vault.py::test_a_crash_at_every_step_of_a_commit_leaves_old_or_new",
         "test_vault.py::test_sigkill_again_and_again")),
    Row(14, "disk full", "a tmpfs of 1 MiB; ENOSPC and EIO at every step", "I1 I4 I8",
        ("test_vault.py::test_a_disk_that_is_really_full",
         "test_vault.py::test_a_full_or_failing_disk_at_every_step_is_a_clear_error")),
    Row(15, "bit rot", "a byte flipped, cut off or added in every kind of file", "I1 I5",
        ("test_vault.py::test_a_corrupt_version_is_quarantined_and_the_last_good_one_answers",
         "test_vault.py::test_a_damaged_segment_or_blob_is_an_error_and_never_part_of_an_answer",
         "test_serve_replica.py::test_a_corrupt_version_gives_way_to_the_last_good_one_and_says_so")),
    Row(16, "broken user files", "cut JSON, wrong types, 100 MB lines, NUL, bad UTF-8, doubles; fuzzed", "I4",
        ("test_formats.py", "test_history.py", "test_fuzz.py")),
    Row(17, "poison questions", "empty, 1 MB, deep, control tokens, NaN; fuzzed", "I2 I7",
        ("test_serve_ray.py::test_bad_requests_harm_nobody_else",
         "test_serve_api.py::test_bad_bodies_get_a_4xx_and_never_reach_the_engine",
         "test_engine.py::test_what_cannot_be_answered_is_refused_and_disturbs_nobody",
         "test_serve_fuzz.py::test_whatever_the_schema_allows_is_answered_or_refused")),
    Row(18, "eviction while in use", "more users than slots, seeded interleavings", "I2 I5",
        ("test_engine.py::test_an_adapter_in_use_keeps_its_slot",
         "test_isolation.py::test_nothing_that_happens_to_others_changes_a_users_logits_by_one_bit",
         "test_model.py::test_service_and_dictionary_agree_for_long")),
    Row(19, "flood of unknown users", "1,000 of them", "I2",
        ("test_chaos_replica.py::test_a_thousand_unknown_users_cost_nobody_a_slot",)),
    Row(20, "new versions while serving", "commits under load", "I1 I5",
        ("test_serve_ray.py::test_new_versions_under_load_cost_no_request",)),
    Row(21, "adapter slow or unreadable", "a store that hangs; one that fails", "I2 I5",
        ("test_chaos_replica.py::test_a_slow_store_delays_its_user_alone",
         "test_serve_replica.py::test_an_adapter_that_cannot_be_read_fails_its_owner_alone")),
    Row(22, "clients hang up", "500 streams left; sockets closed", "I2 I8",
        ("test_chaos_replica.py::test_five_hundred_readers_hang_up",
         "test_serve_ray.py::test_readers_who_hang_up_or_dawdle_leave_no_trace")),
    Row(23, "overload", "16 clients, places for 8", "I7",
        ("test_chaos_serve.py::test_more_clients_than_the_queue_holds",
         "test_serve_api.py::test_one_user_cannot_take_all_the_room")),
    Row(24, "requests and replies lost", "half of all task messages, both ways", TRAINING,
        ("test_faults.py::test_requests_and_replies_lost_between_driver_and_workers",)),
    Row(25, "object store full", "twice what it holds", TRAINING,
        ("test_faults.py::test_a_full_object_store_spills",)),
    Row(26, "clock steps, tokens and leases expire", "a clock moved both ways", "I1 I4",
        ("test_registry.py::test_tokens_verify_expire_and_are_revoked",
         "test_registry.py::test_leases_exclude_expire_and_fence",
         "test_model.py::test_service_and_dictionary_agree_for_long")),
    Row(27, "out of memory", "RLIMIT_AS in a step", "I2 I4 I8",
        ("test_faults.py::test_a_user_who_does_not_fit_into_memory_fails_alone",
         "test_faults.py::test_a_pack_out_of_memory_is_halved_and_the_result_says_so")),
    Row(28, "network split", "two network namespaces, the cable between them cut", TRAINING,
        ("test_chaos_network.py::test_a_network_split_in_the_middle_of_a_run",)),
    Row(29, "preemption", "SIGTERM to a worker; to a replica", f"{TRAINING} I5",
        ("test_faults.py::test_a_lost_worker_goes_on_from_its_checkpoint",
         "test_chaos_serve.py::test_a_replica_is_ended_by_a_signal[15]")),
    Row(30, "the same run twice at once", "two drivers; two workers on one pack", TRAINING,
        ("test_faults.py::test_two_drivers_of_one_run_at_once",
         "test_workers.py::test_two_workers_of_one_run_on_the_same_pack_commit_each_user_once")),
    Row(31, "leaks", "2,000 requests, 50 users, 3 slots", "I2 I5",
        ("test_chaos_replica.py::test_two_thousand_requests_of_fifty_users_on_three_slots",)),
    Row(32, "canaries across users", "a word of their own in each history; all logs and metrics searched", "I2 I6",
        ("test_serve_ray.py::test_answers_under_load_are_those_given_alone",
         "test_serve_ray.py::test_no_text_and_no_token_is_in_a_log",
         "test_chaos_serve.py::test_nothing_of_anybody_is_in_a_log",
         "test_attacks.py")),
)  # fmt: skip


@dataclass
class Recorder:
    """A pytest plugin: how each test ended, how long it took, what it recorded of itself, and which are left to run."""

    outcomes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    recorded: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)

    def pytest_collection_finish(self, session: Any) -> None:
        self.left = {item.nodeid.rpartition("/")[2] for item in session.items}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("/")[2]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.when != "call" and report.outcome == "passed":
            return  # set up, and then perhaps interrupted
        self.left.discard(name)
        self.recorded.setdefault(name, {}).update(report.user_properties)
        worse = ("passed", "skipped", "failed")
        self.outcomes[name] = max(self.outcomes.get(name, "passed"), report.outcome, key=worse.index)


def settle(row: Row, recorder: Recorder) -> dict[str, Any]:
    """One line of the result: a row held if all of its tests ran and passed."""
    ran = {name: end for name, end in recorder.outcomes.items() if any(belongs(name, test) for test in row.tests)}
    missing = [test for test in row.tests if not any(belongs(name, test) for name in ran)]
    missing += [name for name in recorder.left if any(belongs(name, test) for test in row.tests)]
    ends = {*ran.values(), *("missing" for _ in missing)}
    worst = next((end for end in ("failed", "missing", "skipped") if end in ends), "passed")
    names = {"failed": "failed", "missing": "not run", "skipped": "not possible here", "passed": "held"}
    recovery = [recorder.recorded[name]["recovery_s"] for name in ran if "recovery_s" in recorder.recorded[name]]
    return {
        "row": row.number,
        "fault": row.fault,
        "injection": row.injection,
        "invariants": row.invariants.split(),
        "result": names[worst],
        "recovery_s": max(recovery) if recovery else None,
        "elapsed_s": sum(recorder.seconds[name] for name in ran),
        "tests": ran | dict.fromkeys(missing, "missing"),
        "recorded": {name: found for name in ran if (found := recorder.recorded[name])},
    }


def place(test: str) -> tuple[str, int]:
    """Where a test stands: a file's tests run together, since they share a cluster, and in order, for some end it."""
    file, _, name = test.partition("::")
    text = (TESTS / file).read_text(encoding="utf-8")
    return file, text.index(f"\ndef {name.partition('[')[0]}(") if name else 0


def belongs(name: str, test: str) -> bool:
    """Whether a test that ran is the one a row names, or a parameter of it, or in the file it names."""
    return name == test or name.startswith((f"{test}[", f"{test}::"))


def table(lines: Iterable[dict[str, Any]]) -> str:
    """The result as Markdown."""
    head = "| # | fault | injection | held | recovery |\n| --- | --- | --- | --- | --- |\n"
    text = ""
    for line in lines:
        recovery = "" if line["recovery_s"] is None else f"{line['recovery_s']:.0f} s"
        held = " ".join(line["invariants"]) if line["result"] == "held" else line["result"]
        text += f"| {line['row']} | {line['fault']} | {line['injection']} | {held} | {recovery} |\n"
    return head + text


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="*", help="some of the rows; all by default")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if not options.rows or row.number in options.rows]
    tests = sorted({test for row in rows for test in row.tests}, key=place)
    recorder, began = Recorder(), time.monotonic()
    names = [str(TESTS / test) for test in tests]
    pytest.main([*names, "-q", "-m", "", f"--chaos-seed={options.seed}", "--timeout=1200"], plugins=[recorder])
    lines = [settle(row, recorder) for row in rows]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "command": "chaos",
        "seed": options.seed,
        "commit": commit,
        "invariants": INVARIANTS,
        "rows": lines,
        "num_held": sum(line["result"] == "held" for line in lines),
        "elapsed_s": time.monotonic() - began,
        "hardware": hardware(),
    }
    folder = Path("runs/chaos")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "result.json", json.dumps(result, indent=1, default=str).encode())
    print(f"\n{table(lines)}\n{result['num_held']} of {len(lines)} held, {result['elapsed_s'] / 60:.0f} min")
    return 1 if any(line["result"] in ("failed", "not run") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

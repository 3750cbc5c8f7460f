"""The service while its own machinery is killed: Ray's head process, Serve's controller and proxy, replicas; overload.

The order matters little, but each test leaves a service that answers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import ray
from clusters import lasting_head
from faults import until
from invariants import no_secrets
from ray.cluster_utils import Cluster
from serve_tools import token_of
from service import GUESTS, USERS, Load, Service, is_good, replica_pids, running, service_replicas

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).resolve().parents[1]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with lasting_head(num_cpus=4) as cluster:
        ray.init(log_to_driver=False)
        yield cluster
        ray.shutdown()


@pytest.fixture(scope="module")
def service(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(cluster.folder, tmp_path_factory.mktemp("serve")) as one:
        yield one


def seconds_until_good(load: Load, since: float, count: int = 5) -> float:
    """How long after `since` the load has had so many more good answers in a row."""
    before = len(load.answers)
    until(lambda: len(load.answers) >= before + count and all(is_good(one) for _, one in load.answers[-count:]))
    return time.monotonic() - since


def versions_are_right(service: Service, load: Load) -> bool:
    """I5: every answer names the version that was current: nothing is committed in these tests."""
    current = {user: service.current(user) for user in USERS}
    good = [(user, one) for user, one in load.answers if isinstance(one, httpx2.Response) and one.status_code == 200]
    return all(
        one.headers["x-oppu-adapter-version"] == current[user] == one.json()["adapter_version"] for user, one in good
    )


def test_the_head_process_is_away(cluster: Cluster, service: Service, record_property: Record) -> None:
    with Load(service) as load:
        load.until_answered(5)
        cluster.head_node.kill_gcs_server()
        since = time.monotonic()
        load.until_answered(20)  # while it is away
        cluster.head_node.start_gcs_server()
        record_property("recovery_s", seconds_until_good(load, since))
    assert not load.failed and versions_are_right(service, load)


def test_the_controller_is_killed(service: Service, record_property: Record) -> None:
    with Load(service) as load:
        load.until_answered(5)
        ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
        record_property("recovery_s", seconds_until_good(load, time.monotonic()))
    assert not load.failed and versions_are_right(service, load)
    service.deploy("serve.max_new_tokens=90")  # it takes orders again
    assert service.ask("user-0").status_code == 200


def test_the_proxy_is_killed(service: Service, record_property: Record) -> None:
    (name,) = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "PROXY" in one["name"]]
    with Load(service) as load:
        load.until_answered(5)
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)
        since = time.monotonic()
        until(lambda: bool(load.failed))
        record_property("recovery_s", seconds_until_good(load, since))
    assert all(isinstance(one, httpx2.HTTPError) or one.status_code in (500, 503) for one in load.failed)
    assert versions_are_right(service, load)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_replica_is_ended_by_a_signal(service: Service, number: int, record_property: Record) -> None:
    victim = min(replica_pids(service))
    with Load(service) as load:
        load.until_answered(10)
        os.kill(victim, number)
        since = time.monotonic()
        until(lambda: victim not in replica_pids(service))
        record_property("recovery_s", seconds_until_good(load, since, 10))
        until(lambda: len(service_replicas(service)) == 2)
    assert len(load.failed) <= 4, [getattr(one, "text", one) for one in load.failed]
    assert all(isinstance(one, httpx2.Response) and one.status_code == 503 for one in load.failed)
    assert versions_are_right(service, load)


def test_more_clients_than_the_queue_holds(service: Service, record_property: Record) -> None:
    before = replica_pids(service)
    service.deploy("serve.max_rows=2", "serve.max_queued=2")  # two replicas, four requests each
    until(lambda: not before & replica_pids(service))
    answers: list[tuple[float, httpx2.Response]] = []

    def ask(user: str) -> None:
        for _ in range(8):
            since = time.monotonic()
            answer = service.client(user).post("/v1/completions", json={"prompt": "the movie", "max_tokens": 60})
            answers.append((time.monotonic() - since, answer))

    for user in GUESTS:
        service.client(user)
    threads = [threading.Thread(target=ask, args=(user,)) for user in GUESTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for _, answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {503} and all(
        answer.headers["retry-after"] for answer in refused
    )
    assert 0 < len(refused) < len(answers) == 8 * len(GUESTS)
    record_property("refused", len(refused))
    assert service.ask("user-0").status_code == 200


def test_nothing_of_anybody_is_in_a_log(service: Service) -> None:
    """I6, after all of the above: no token, no text of a history or a question, no user id."""
    tokens: list[Any] = [client.headers["authorization"].removeprefix("Bearer ") for client in service.clients.values()]
    logs = [path for path in service.folder.rglob("logs/**/*") if path.is_file()]
    assert len(logs) > 10 and no_secrets(logs, [*tokens, "canary", "film 1", "the movie", *USERS, *GUESTS])
    reader = {"Authorization": f"Bearer {token_of(service.vault, None, 'reader')}"}
    page = httpx2.get(f"{service.url}/metrics", headers=reader, timeout=30)
    assert page.status_code == 200 and not any(user in page.text for user in (*USERS, *GUESTS, "canary"))

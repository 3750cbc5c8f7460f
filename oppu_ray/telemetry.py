"""The names of all metrics, in one place: who exports them, who plots them and who alerts on them read this table.

Plain data: name -> kind, help text, tags and (histograms) upper bounds in seconds. A worker or replica makes one
`ray.util.metrics` object per entry; Prometheus then sees each name with the prefix `ray_`. `Telemetry` does so for
training, where Ray runs.
The decision a reader would question: no metric has a tag for the user. A user id is personal data, and one time series
per user would sink Prometheus.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from oppu_ray.core import UserDone


@dataclass(frozen=True)
class Metric:
    """`kind` is counter, gauge or histogram; `boundaries` are a histogram's upper bounds, in its unit."""

    kind: str
    description: str
    tags: tuple[str, ...]
    boundaries: tuple[float, ...] = ()


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_RUN, _WORKER, _REPLICA = ("run",), ("run", "worker"), ("replica",)

TRAINING_METRICS = {
    "oppu_users_done_total": Metric("counter", "Users trained and committed", _WORKER),
    "oppu_users_failed_total": Metric("counter", "Users that failed, each with a reason in result.json", _WORKER),
    "oppu_users_left": Metric("gauge", "Users of the run that are neither done nor failed", _RUN),
    "oppu_packs_done_total": Metric("counter", "Packs trained to the end", _WORKER),
    "oppu_useful_tokens_total": Metric("counter", "Tokens of committed training steps, a shared prefix once", _WORKER),
    "oppu_computed_tokens_total": Metric("counter", "Tokens computed, what a recovery repeats included", _WORKER),
    "oppu_useful_tokens_per_s": Metric("gauge", "Useful tokens per second in the last step, 0 between packs", _WORKER),
    "oppu_train_loss": Metric("gauge", "Mean last loss of the users of the last pack, nats per token", _WORKER),
    "oppu_commit_seconds": Metric("histogram", "Time to commit one adapter to the vault", _WORKER, _SECONDS),
    "oppu_recoveries_total": Metric("counter", "Times that a worker was replaced or a pack was started again", _WORKER),
    "oppu_bank_slots_used": Metric("gauge", "Adapters in the bank: the users of the pack in training", _WORKER),
    "oppu_base_loads_total": Metric("counter", "Times that a base model was opened", _WORKER),
}

SERVING_METRICS = {
    "oppu_requests_total": Metric("counter", "HTTP requests by route and status code", (*_REPLICA, "route", "status")),
    "oppu_first_token_seconds": Metric("histogram", "Time from admission to the first token", _REPLICA, _SECONDS),
    "oppu_generated_tokens_total": Metric("counter", "Tokens generated", _REPLICA),
    "oppu_batch_rows": Metric("gauge", "Rows in the last decoding step", _REPLICA),
    "oppu_slots_used": Metric("gauge", "Adapter slots that hold an adapter", _REPLICA),
    "oppu_cold_loads_total": Metric("counter", "Adapters loaded from the vault into a slot", _REPLICA),
    "oppu_evictions_total": Metric("counter", "Adapters evicted to make room for another", _REPLICA),
    "oppu_queue_length": Metric("gauge", "Requests that wait for a row", _REPLICA),
    "oppu_errors_total": Metric("counter", "Errors by kind", (*_REPLICA, "kind")),
}


class Telemetry:
    """The training metrics of one run in one process; does nothing in a process that is not part of a Ray cluster."""

    def __init__(self, run_id: str, worker: int | None = None):
        self._tags = {"run": run_id, "worker": "" if worker is None else str(worker)}
        self._metrics: dict[str, Any] = {}
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        from ray.util import metrics

        for name, metric in TRAINING_METRICS.items():
            options = {"boundaries": list(metric.boundaries)} if metric.boundaries else {}
            kind = getattr(metrics, metric.kind.capitalize())
            self._metrics[name] = kind(name, metric.description, tag_keys=metric.tags, **options)

    def add(self, name: str, value: float = 1, worker: int | None = None) -> None:
        """Count `value` more. `worker` instead of the one given at the start; zero counts nothing."""
        if name in self._metrics and value:
            self._metrics[name].inc(value, self._tags_of(name, worker))

    def set(self, name: str, value: float) -> None:
        """A gauge's new value."""
        if name in self._metrics:
            self._metrics[name].set(value, self._tags_of(name))

    def observe(self, name: str, value: float) -> None:
        """One value of a histogram."""
        if name in self._metrics:
            self._metrics[name].observe(value, self._tags_of(name))

    def settle(self, done: UserDone, num_left: int, worker: int) -> None:
        """Count a user of `worker` as done or failed; `num_left` are still to come in the run."""
        self.add("oppu_users_failed_total" if done.error else "oppu_users_done_total", worker=worker)
        self.add("oppu_useful_tokens_total", 0 if done.error else done.num_tokens, worker)
        self.set("oppu_users_left", num_left)

    def _tags_of(self, name: str, worker: int | None = None) -> dict[str, str]:
        tags = self._tags if worker is None else {**self._tags, "worker": str(worker)}
        return {tag: tags[tag] for tag in TRAINING_METRICS[name].tags}

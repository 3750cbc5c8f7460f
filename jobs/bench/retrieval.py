"""Measures retrieval: dense queries per second, past-only BM25 against rebuilding, and memory. Prints one JSON.

    python -m jobs.bench.retrieval [--users 2000 --items 50 --queries 100000 --dimensions 384 ...]

Histories are synthetic: words by Zipf's law, random unit vectors. The peer is rank_bm25 (a development dependency),
rebuilt for every item from the items before it as the OPPU reference does; both sides answer the same queries and their
results are compared. Memory is measured first, in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
from rank_bm25 import BM25Okapi

from oppu_ray.retrieval import Bm25, Retriever, make_retriever, retrieve_past_only

TOP_K = 4
NUM_WORDS = 20_000


class RowEmbedder:
    """Stands for an embedder whose work is done: a query is the number of its row."""

    fingerprint = "bench"

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.rows[[int(text) for text in texts]]


def unit_rows(rng: np.random.Generator, count: int, dimensions: int) -> np.ndarray:
    rows = rng.standard_normal((count, dimensions), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def zipf_texts(rng: np.random.Generator, count: int, words: int) -> list[str]:
    numbers = np.minimum(rng.zipf(1.3, (count, words)), NUM_WORDS)
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]


def dense_retriever(rng: np.random.Generator, args: argparse.Namespace, embedder: RowEmbedder) -> Retriever:
    item_ids = [f"item-{number}" for number in range(args.items)]
    vectors = unit_rows(rng, args.items, args.dimensions)
    return make_retriever("dense", [""] * args.items, item_ids, 0, embedder, vectors)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """All users' indexes in memory at once, ids and Python objects included, against their vectors' bytes."""
    rng = np.random.default_rng(0)
    embedder = RowEmbedder(unit_rows(rng, 1, args.dimensions))
    dense_retriever(rng, args, embedder)
    before = resident_bytes()
    retrievers = [dense_retriever(rng, args, embedder) for _ in range(args.memory_users)]
    grown = resident_bytes() - before
    vector_bytes = len(retrievers) * args.items * args.dimensions * 4
    return {"resident_bytes": grown, "vector_bytes": vector_bytes, "ratio": round(grown / vector_bytes, 4)}


def measure_dense(args: argparse.Namespace) -> dict[str, float]:
    """Microseconds from a query vector to hits, over queries that go round the users."""
    rng = np.random.default_rng(1)
    embedder = RowEmbedder(unit_rows(rng, 1000, args.dimensions))
    start = time.perf_counter()
    retrievers = [dense_retriever(rng, args, embedder) for _ in range(args.users)]
    build_s = time.perf_counter() - start
    texts = [str(number) for number in range(1000)]
    order = rng.permutation(args.queries)
    times_us = np.empty(args.queries)
    for number in range(args.queries):
        retriever, text = retrievers[order[number] % args.users], texts[number % 1000]
        start_ns = time.perf_counter_ns()
        retriever.search(text, TOP_K)
        times_us[number] = (time.perf_counter_ns() - start_ns) / 1000
    median_us, p99_us = np.percentile(times_us, [50, 99]).round(1).tolist()
    return {"median_us": median_us, "p99_us": p99_us, "build_s": round(build_s, 3)}


def rebuild_per_item(texts: list[str], top_k: int) -> list[list[float]]:
    """Best scores of every item's past, as the reference gets them: a new index for each item. Top 0: indexes only."""
    split = [text.split(" ") for text in texts]
    best: list[list[float]] = [[]]
    for i in range(1, len(split)):
        index = BM25Okapi(split[:i])
        best.append(sorted(index.get_scores(split[i]).tolist(), reverse=True)[:top_k] if top_k else [])
    return best


def measure_bm25(args: argparse.Namespace) -> dict[str, float]:
    """Seconds per user, building alone and with retrieval; medians over users, both systems taking turns."""
    rng = np.random.default_rng(2)
    columns: dict[str, list[float]] = {name: [] for name in ("build", "build_peer", "retrieve", "retrieve_peer")}
    for _ in range(args.bm25_users):
        texts = zipf_texts(rng, args.items, args.words)
        item_ids = [str(number) for number in range(args.items)]
        times = [time.perf_counter()]
        Bm25(texts, item_ids)
        times.append(time.perf_counter())
        rebuild_per_item(texts, 0)
        times.append(time.perf_counter())
        hits = retrieve_past_only(Bm25(texts, item_ids), texts, TOP_K)
        times.append(time.perf_counter())
        peer = rebuild_per_item(texts, TOP_K)
        times.append(time.perf_counter())
        if [[hit.score for hit in found] for found in hits] != peer:
            raise ValueError("scores differ from rank_bm25's: expected the same bits")
        for name, seconds in zip(columns, np.diff(times).tolist(), strict=True):
            columns[name].append(seconds)
    return {f"{name}_ms_per_user": round(1000 * statistics.median(column), 3) for name, column in columns.items()}


def measure_all_builds(args: argparse.Namespace) -> float:
    """Seconds to build the past-only BM25 of all users."""
    rng = np.random.default_rng(3)
    elapsed_s = 0.0
    for _ in range(args.users):
        texts = zipf_texts(rng, args.items, args.words)
        start = time.perf_counter()
        Bm25(texts, None)
        elapsed_s += time.perf_counter() - start
    return round(elapsed_s, 3)


def measure_growth(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds to build one user's past-only BM25, by number of items: near linear if it about doubles."""
    rng = np.random.default_rng(4)
    growth = {}
    for count in (100, 200, 400, 800, 1600):
        texts = zipf_texts(rng, count, args.words)
        start = time.perf_counter()
        Bm25(texts, None)
        growth[str(count)] = round(1000 * (time.perf_counter() - start), 2)
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure retrieval and print one JSON.")
    for name, default in (
        ("users", 2000),
        ("items", 50),
        ("queries", 100_000),
        ("dimensions", 384),
        ("words", 60),
        ("bm25-users", 100),
        ("memory-users", 10_000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    start = time.perf_counter()
    memory = measure_memory(args)
    dense = measure_dense(args)
    bm25 = measure_bm25(args)
    result = {
        "command": "bench_retrieval",
        "config": vars(args),
        "hardware": {"machine": platform.machine(), "threads": 1, "faiss": faiss.__version__},
        "rows": {
            "dense": dense,
            "bm25": {**bm25, "all_users_build_s": measure_all_builds(args), "build_ms_by_items": measure_growth(args)},
            "memory": memory,
        },
        "ratios": {
            "bm25_build_vs_rebuilding": round(bm25["build_peer_ms_per_user"] / bm25["build_ms_per_user"], 1),
            "bm25_retrieve_vs_rebuilding": round(bm25["retrieve_peer_ms_per_user"] / bm25["retrieve_ms_per_user"], 1),
            "resident_vs_vectors": memory["ratio"],
        },
        "elapsed_s": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

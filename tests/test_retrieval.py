"""BM25 is rank_bm25's, dense is brute force, the future and the query never show, bad files are refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from rank_bm25 import BM25Okapi

from oppu_ray import retrieval
from oppu_ray.retrieval import (
    KINDS,
    Bm25,
    Hit,
    choose_faiss_device,
    make_retriever,
    retrieve_past_only,
    update_vectors,
    vectors_from_bytes,
    vectors_to_bytes,
)


class BagOfLetters:
    """An embedder small enough to check by hand: letter counts plus one, at length 1."""

    fingerprint = "letters-1"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        counts = np.array([[text.count(letter) + 1 for letter in "abcdefgh"] for text in texts], dtype=np.float32)
        counts = counts.reshape(len(texts), 8)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


class FixedEmbedder:
    """Every text gets the same given vector."""

    fingerprint = "fixed"

    def __init__(self, vector: Sequence[float]) -> None:
        self.vector = np.array(vector, dtype=np.float32)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.tile(self.vector, (len(texts), 1))


def ids(count: int) -> list[str]:
    return [f"id{i}" for i in range(count)]


def random_texts(rng: random.Random, count: int, words: int = 12) -> list[str]:
    vocabulary = ["abc", "bcd", "cde", "def", "efg", "fgh", "gha", "hab", "aa", "The", "the", ""]
    return [" ".join(rng.choices(vocabulary[: rng.randint(2, 12)], k=rng.randint(0, words))) for _ in range(count)]


def pairs(hits: list[Hit]) -> list[tuple[int, float]]:
    return [(hit.index, hit.score) for hit in hits]


def ranked(scores: Sequence[float], top_k: int) -> list[tuple[int, float]]:
    """Best first, equal scores newest first: the rule, written the slow way."""
    return sorted(enumerate(scores), key=lambda pair: (-pair[1], -pair[0]))[:top_k]


def test_bm25_scores_are_rank_bm25s_bit_for_bit_on_1000_random_cases() -> None:
    rng = random.Random(0)
    num_ties = 0
    for _ in range(1000):
        texts = random_texts(rng, rng.randint(1, 25))
        query = random_texts(rng, 1)[0] + " unseen abc"
        before = rng.randint(1, len(texts))
        oracle = BM25Okapi([text.split(" ") for text in texts[:before]]).get_scores(query.split(" ")).tolist()
        hits = make_retriever("bm25", texts, ids(len(texts))).search(query, len(texts), before=before)
        assert pairs(hits) == ranked(oracle, before)
        num_ties += len(oracle) - len(set(oracle))
    assert num_ties > 500


def test_bm25_past_only_equals_rebuilding_for_every_item() -> None:
    rng = random.Random(1)
    texts, queries = random_texts(rng, 60, words=30), random_texts(rng, 60, words=30)
    queries = [query + " abc" for query in queries]
    got = retrieve_past_only(make_retriever("bm25", texts, ids(60)), queries, top_k=4)
    assert got[0] == []
    for i in range(1, 60):
        oracle = BM25Okapi([text.split(" ") for text in texts[:i]]).get_scores(queries[i].split(" ")).tolist()
        assert pairs(got[i]) == ranked(oracle, 4)


def test_dense_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[150] = vectors[3]  # equal items far apart: the newer must rank first
    for before in (1, 7, 199, 200):
        for number in range(0, 200, 20):
            retriever = make_retriever("dense", [""] * 200, ids(200), 0, FixedEmbedder(vectors[number]), vectors)
            brute = np.round(vectors[:before].astype(np.float64) @ vectors[number].astype(np.float64), 6)
            hits = retriever.search("query", 5, before=before)
            assert [hit.index for hit in hits] == [index for index, _ in ranked(brute.tolist(), 5)]
            assert [hit.score for hit in hits] == pytest.approx([s for _, s in ranked(brute.tolist(), 5)], abs=2e-6)
    retriever = make_retriever("dense", [""] * 200, ids(200), 0, FixedEmbedder(vectors[3]), vectors)
    assert [hit.index for hit in retriever.search("query", 2)] == [150, 3]


def test_float_noise_does_not_decide_between_equal_items() -> None:
    noisy = np.array([[1, 0], [1 - 1e-7, 0], [0, 1]], dtype=np.float32)  # one text, embedded in two batches
    hits = make_retriever("dense", [""] * 3, ids(3), 0, FixedEmbedder([1, 0]), noisy).search("q", 2)
    assert pairs(hits) == [(1, 1.0), (0, 1.0)]


def test_hybrid_is_the_sum_of_reciprocal_ranks() -> None:
    texts = ["aaa bbb", "ccc ddd", "aaa ccc", "eee fff", "aaa aaa"]
    embedder = BagOfLetters()
    bm25, dense, hybrid = (make_retriever(kind, texts, ids(5), 0, embedder) for kind in ("bm25", "dense", "hybrid"))
    expected = [0.0] * 5
    for hits in (bm25.search("aaa ccc", 5), dense.search("aaa ccc", 5)):
        for rank, hit in enumerate(hits, start=1):
            if hit.score:  # item 3 shares no word: no BM25 rank
                expected[hit.index] += 1 / (60 + rank)
    assert pairs(hybrid.search("aaa ccc", 5)) == ranked(expected, 5)
    assert expected[3] == 1 / 65


def test_hybrid_ranks_only_what_is_visible() -> None:
    texts = ["aaa bbb", "ccc ddd", "aaa ccc", "eee fff", "aaa aaa"]
    whole = make_retriever("hybrid", texts, ids(5), 0, BagOfLetters())
    best = whole.search("aaa ccc", 5)
    hidden = whole.search("aaa ccc", 5, exclude=frozenset({best[0].item_id}))
    assert best[0].item_id == "id2" and "id2" not in [hit.item_id for hit in hidden]
    # With the best gone, items 4 and 1 move up: each is first in one list and second in the other.
    assert pairs(hidden)[:2] == [(4, 1 / 61 + 1 / 62), (1, 1 / 61 + 1 / 62)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_item_sees_the_future(kind: str) -> None:
    """What comes after item i may be anything: the hits for item i stay the same."""
    rng = random.Random(2)
    texts, queries = random_texts(rng, 20), [text + " abc" for text in random_texts(rng, 20)]
    got = retrieve_past_only(make_retriever(kind, texts, ids(20), 5, BagOfLetters()), queries, 3)
    for i in range(20):
        other = texts[:i] + random_texts(rng, 20 - i)
        again = make_retriever(kind, other, ids(20), 5, BagOfLetters())
        assert again.search(queries[i], 3, before=i) == got[i]
        assert all(hit.index < i for hit in got[i])
        assert len(got[i]) == min(3, i)


@pytest.mark.parametrize("kind", KINDS)
def test_the_query_item_is_never_retrieved(kind: str) -> None:
    texts = ["abc def", "abc abc", "fgh", "abc def"]
    with_ids = make_retriever(kind, texts, ids(4), 0, BagOfLetters())
    assert {hit.item_id for hit in with_ids.search("abc def", 9, exclude=frozenset({"id0"}))} == {"id1", "id2", "id3"}
    without_ids = make_retriever(kind, texts, None, 0, BagOfLetters())
    assert {hit.item_id for hit in without_ids.search("abc def ", 9)} == {"1", "2"}


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_the_history(kind: str) -> None:
    empty = make_retriever(kind, [], [], 0, BagOfLetters())
    assert empty.search("abc", 3) == []
    assert retrieve_past_only(empty, [], 3) == []
    three = make_retriever(kind, ["abc", "def", ""], ids(3), 0, BagOfLetters())
    assert three.search("abc", 0) == []
    assert three.search("abc", 3, before=0) == []
    assert three.search("abc", 3, exclude=frozenset(ids(3))) == []
    assert sorted(hit.index for hit in three.search("abc", 99)) == [0, 1, 2]
    assert [hit.index for hit in three.search(" \n", 2)] == [2, 1]
    assert retrieve_past_only(three, ["", "abc", "abc"], 0) == [[], [], []]
    assert len(three.search("\ud800", 3)) == 3
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=f"before={bad}: expected 0 to 3"):
            three.search("abc", 1, before=bad)
    with pytest.raises(ValueError, match="top_k=-1"):
        three.search("abc", -1)
    with pytest.raises(ValueError, match="2 queries for 3 items"):
        retrieve_past_only(three, ["a", "b"], 1)


def test_words_nobody_used_fall_back_to_the_newest() -> None:
    hits = make_retriever("bm25", ["abc", "def", "the"], ids(3)).search("zzz yyy", 2)
    assert pairs(hits) == [(2, 0.0), (1, 0.0)]


def test_recency_and_random() -> None:
    assert [hit.index for hit in make_retriever("recency", [""] * 5, ids(5)).search("x", 3)] == [4, 3, 2]
    of_user = [make_retriever("random", [""] * 9, ids(9), seed) for seed in range(9)]
    assert len({tuple(hit.index for hit in retriever.search("x", 3)) for retriever in of_user}) > 5
    one = make_retriever("random", [""] * 9, ids(9), 7)
    assert one.search("x", 3) == make_retriever("random", [""] * 9, ids(9), 7).search("x", 3)
    assert one.search("x", 3) != one.search("y", 3)


def test_past_only_embeds_all_queries_in_one_call() -> None:
    embedder = BagOfLetters()
    retriever = make_retriever("dense", ["abc", "def"], ids(2), 0, embedder)
    retrieve_past_only(retriever, ["abc", "def"], 1)
    assert embedder.calls == [["abc", "def"], ["abc", "def"]]  # the items, then the queries


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'tfidf': expected one of bm25, dense"):
        make_retriever("tfidf", [], [])
    with pytest.raises(ValueError, match="needs an embedder"):
        make_retriever("dense", ["a"], ["1"])
    with pytest.raises(ValueError, match="1 item ids for 2 texts"):
        make_retriever("bm25", ["a", "b"], ["1"])
    with pytest.raises(ValueError, match="'1' occurs twice"):
        make_retriever("bm25", ["a", "b"], ["1", "1"])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.array([[1, 0], [np.nan, 0]]), "vector 1 has length nan"),
        (np.array([[1, 0], [np.inf, 0]]), "vector 1 has length inf"),
        (np.array([[1, 0], [0, 0]]), "vector 1 has length 0"),
        (np.array([[1, 0]]), r"\[1, 2\]: expected float32 \[2, D\]"),
        (np.array([1, 0]), r"\[2\]: expected float32 \[2, D\]"),
    ],
)
def test_bad_vectors_never_become_an_index_or_a_file(vectors: np.ndarray, message: str) -> None:
    vectors = vectors.astype(np.float32)
    with pytest.raises(ValueError, match=message):
        make_retriever("dense", ["a", "b"], ids(2), 0, FixedEmbedder([1, 0]), vectors)
    with pytest.raises(ValueError, match=message):
        vectors_to_bytes(vectors, "f", ids(2))


def test_query_vectors_that_do_not_fit_are_refused() -> None:
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="query vectors have 2 dimensions, the index 3"):
        make_retriever("dense", [""] * 3, ids(3), 0, FixedEmbedder([1, 0]), vectors).search("q", 1)
    with pytest.raises(ValueError, match="vector 0 has length nan"):
        make_retriever("dense", [""] * 3, ids(3), 0, FixedEmbedder([np.nan, 0, 0]), vectors).search("q", 1)


def test_gpu_is_probed_and_its_absence_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    choose_faiss_device.cache_clear()
    monkeypatch.setattr(retrieval.faiss, "get_num_gpus", lambda: 0)
    vectors = np.eye(2, dtype=np.float32)
    retriever = make_retriever("dense", ["", ""], ids(2), 0, FixedEmbedder([0, 1]), vectors, faiss_device="gpu")
    assert [hit.index for hit in retriever.search("q", 1)] == [1]
    assert "sees no GPU: searching on the CPU" in caplog.text
    with pytest.raises(ValueError, match="'tpu': expected cpu or gpu"):
        choose_faiss_device("tpu")
    choose_faiss_device.cache_clear()


def test_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    moved: list[tuple[str, int, int]] = []

    def to_gpu(resources: str, device: int, index: Any) -> Any:
        moved.append((resources, device, index.ntotal))
        return index

    choose_faiss_device.cache_clear()
    monkeypatch.setattr(retrieval.faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(retrieval, "_gpu_resources", lambda: "resources")
    monkeypatch.setattr(retrieval.faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr(retrieval, "GPU_MAX_ITEMS", 2)
    for count in (2, 3):
        vectors = np.eye(count, dtype=np.float32)
        make_retriever("dense", [""] * count, ids(count), 0, FixedEmbedder([1]), vectors, faiss_device="gpu")
    assert moved == [("resources", 0, 2)]
    assert "3 items are more than 2, searched on the CPU" in caplog.text
    choose_faiss_device.cache_clear()


STORED = vectors_to_bytes(np.eye(3, dtype=np.float32)[:2], "fingerprint-a", ["id0", "ünïcode"])


def test_vectors_survive_storage() -> None:
    vectors, item_ids = vectors_from_bytes(STORED, "fingerprint-a")
    assert vectors.dtype == np.float32 and (vectors == np.eye(3)[:2]).all()
    assert item_ids == ("id0", "ünïcode")


def test_another_embedders_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="stored vectors were made by embedder fingerprint-a: expected fingerprint-b"):
        vectors_from_bytes(STORED, "fingerprint-b")


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    for place in range(len(STORED)):
        with pytest.raises(ValueError, match="stored vectors"):
            vectors_from_bytes(STORED[:place], "fingerprint-a")
        flipped = STORED[:place] + bytes([STORED[place] ^ (1 << place % 8)]) + STORED[place + 1 :]
        try:
            vectors, item_ids = vectors_from_bytes(flipped, "fingerprint-a")
        except ValueError as error:
            assert "stored vectors" in str(error)
        else:  # a flip may only hit what carries no meaning: the padding of the header
            assert (vectors == np.eye(3)[:2]).all() and item_ids == ("id0", "ünïcode")
    with pytest.raises(ValueError, match="stored vectors"):
        vectors_from_bytes(STORED + b"\0", "fingerprint-a")


def test_intact_bytes_of_bad_vectors_are_refused() -> None:
    """As another program might write them: checksum right, numbers wrong."""
    vectors = np.full((1, 2), np.nan, dtype=np.float32)
    checksum = retrieval._checksum(vectors, "f", '["a"]')
    metadata = {"format": retrieval.VECTORS_FORMAT, "embedder": "f", "item_ids": '["a"]', "sha256": checksum}
    with pytest.raises(ValueError, match="vector 0 has length nan"):
        vectors_from_bytes(safetensors.numpy.save({"vectors": vectors}, metadata), "f")
    with pytest.raises(ValueError, match="stored vectors are not readable"):
        vectors_from_bytes(safetensors.numpy.save({"vectors": vectors}), "f")


def test_only_what_is_new_is_embedded() -> None:
    embedder, texts = BagOfLetters(), ["abc", "def", "fgh"]
    first, stored = update_vectors(None, texts[:2], ids(2), embedder)
    grown, stored = update_vectors(stored, texts, ids(3), embedder)
    again, same = update_vectors(stored, texts, ids(3), embedder)
    assert embedder.calls == [["abc", "def"], ["fgh"]] and same is stored
    assert (grown[:2] == first).all() and (again == grown).all()
    edited, _ = update_vectors(stored, ["abc", "DEF edited", "fgh"], ids(3), embedder)
    assert embedder.calls[-1] == ["DEF edited"] and (edited[[0, 2]] == grown[[0, 2]]).all()
    shrunk, stored = update_vectors(stored, ["fgh"], ["id2"], embedder)
    assert (shrunk == grown[2:]).all() and len(vectors_from_bytes(stored, "letters-1")[0]) == 1
    assert update_vectors(stored, [], [], embedder)[0].shape == (0, 8)


def test_what_is_refused_is_rebuilt(caplog: pytest.LogCaptureFixture) -> None:
    embedder = BagOfLetters()
    good, stored = update_vectors(None, ["abc", "def"], ids(2), embedder)
    damaged = bytearray(stored)
    damaged[-1] ^= 1
    rebuilt, stored = update_vectors(bytes(damaged), ["abc", "def"], ids(2), embedder)
    assert (rebuilt == good).all() and (vectors_from_bytes(stored, "letters-1")[0] == good).all()
    assert "rebuilding vectors" in caplog.text and "checksum" in caplog.text
    other, stored = update_vectors(stored, ["abc", "def"], ids(2), FixedEmbedder([1, 0]))
    assert (other == [[1, 0], [1, 0]]).all()
    assert "made by embedder letters-1: expected fixed" in caplog.text
    assert vectors_from_bytes(stored, "fixed")[0].shape == (2, 2)


def test_bm25_of_a_whole_history_ignores_nothing() -> None:
    """Statistics count hidden items: hiding one must not move the scores of the others."""
    retriever = Bm25(["abc def", "abc", "fgh abc"], ids(3))
    whole = {hit.item_id: hit.score for hit in retriever.search("fgh def", 3)}
    hidden = retriever.search("fgh def", 3, exclude=frozenset({"id0"}))
    assert {hit.item_id: hit.score for hit in hidden} == {key: whole[key] for key in ("id1", "id2")}

"""A user's past items + a query -> the items to put in the prompt. The one home of FAISS (design decision D8).

In: item texts, oldest first, of ONE user. Out: `Hit`s, best first. A retriever never holds two users, so a neighbour of
somebody else cannot be found, whatever else goes wrong. A retriever does not change once made: threads may share one
(not one on a GPU), and a longer history is a new retriever.

A reader might question asking FAISS for all n scores of a user rather than the best k. Equal items must rank the newer
first in training and in answering, FAISS breaks ties at rank k by its own layout, and n is small: at 50 items of 384
dimensions all scores cost a few microseconds (`jobs/bench/retrieval.py`).

Legend: N items, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import faiss
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from oppu_ray.words import search_words

log = logging.getLogger(__name__)

KINDS = ("bm25", "dense", "hybrid", "recency", "random")
RECIPROCAL_RANK_CONSTANT = 60  # Cormack, Clarke and Buettcher, SIGIR 2009
VECTORS_FORMAT = "oppu-ray-vectors-1"
GPU_MAX_ITEMS = 2048  # FAISS on a GPU selects at most this many results, and we ask for all


class TextEmbedder(Protocol):
    """What dense retrieval needs of an embedder: `embedding.Embedder` is one."""

    @property
    def fingerprint(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> float32 [N, D], each row of length 1."""
        ...


@dataclass(frozen=True)
class Hit:
    """A retrieved item: `index` is its place in the history; `score` compares only within one search."""

    item_id: str
    index: int
    score: float


class Retriever(ABC):
    """Items of one user, searchable. Subclasses say how well each visible item answers a query.

    Args:
        texts: One per item, oldest first. May be all "" for kinds that do not read them.
        item_ids: One per item, unique; None where the source has none (then `Hit.item_id` is the index in digits and
            an item is the query itself if the texts are equal).
    """

    def __init__(self, texts: Sequence[str], item_ids: Sequence[str] | None) -> None:
        self.num_items = len(texts)
        if item_ids is None:
            self._item_ids = None
            self._texts = tuple(texts)
        else:
            self._item_ids = tuple(item_ids)
            self._texts = ()
            if len(self._item_ids) != self.num_items:
                raise ValueError(f"{len(self._item_ids)} item ids for {self.num_items} texts: expected one per item")
            if len(set(self._item_ids)) != self.num_items:
                twice = Counter(self._item_ids).most_common(1)[0][0]
                raise ValueError(f"item id {twice!r} occurs twice: expected ids unique within the user")

    def search(
        self, query: str, top_k: int, before: int | None = None, exclude: frozenset[str] = frozenset()
    ) -> list[Hit]:
        """The best `top_k` items for `query`, best first; equal scores rank the newer item first.

        Fewer than `top_k` come back when fewer are visible. A blank query, or one that shares no word with any item
        (BM25), has no best item: the newest are returned, with score 0.

        Args:
            query: Text, made the same way as the items' texts.
            top_k: At least 0.
            before: Only items 0..before-1 are seen, by the statistics too. None: all.
            exclude: Item ids that must not be returned: the query's own id.

        Raises:
            ValueError: `top_k` or `before` out of range; a query vector that does not fit the index.
        """
        _check_top_k(top_k)
        seen = self.num_items if before is None else before
        if not 0 <= seen <= self.num_items:
            raise ValueError(f"before={before}: expected 0 to {self.num_items}, the number of items")
        if top_k == 0 or seen == 0:
            return []
        return self._best(query, self._prepare([query])[0], top_k, seen, exclude)

    def _best(self, query: str, prepared: Any, top_k: int, before: int, exclude: frozenset[str]) -> list[Hit]:
        visible = self._visible(query, before, exclude)
        if query.strip() and len(visible):
            scores = self._score(prepared, before, visible)
        else:
            scores = np.zeros(len(visible))
        best = np.lexsort((-visible, -scores))[:top_k]
        return [Hit(self._item_id(i), i, s) for i, s in zip(visible[best].tolist(), scores[best].tolist(), strict=True)]

    def _visible(self, query: str, before: int, exclude: frozenset[str]) -> np.ndarray:
        if self._item_ids is None:
            return np.array([i for i in range(before) if self._texts[i].strip() != query.strip()], dtype=np.int64)
        if exclude:
            return np.array([i for i in range(before) if self._item_ids[i] not in exclude], dtype=np.int64)
        return np.arange(before)

    def _item_id(self, index: int) -> str:
        return str(index) if self._item_ids is None else self._item_ids[index]

    def _prepare(self, queries: Sequence[str]) -> Sequence[Any] | np.ndarray:
        """Queries as `_score` takes them, one each; by default the texts themselves."""
        return queries

    @abstractmethod
    def _score(self, prepared: Any, before: int, visible: np.ndarray) -> np.ndarray:
        """Scores, more is better, aligned with `visible` (ascending indexes below `before`, at least one)."""


class Recency(Retriever):
    """The newest items, whatever the query. Score: the index."""

    def _score(self, query: str, before: int, visible: np.ndarray) -> np.ndarray:
        return visible.astype(np.float64)


class Random(Retriever):
    """Items at random: the control that shows what choosing is worth. Same seed, query and history: same items."""

    def __init__(self, texts: Sequence[str], item_ids: Sequence[str] | None, seed: int) -> None:
        super().__init__(texts, item_ids)
        self._seed = seed

    def _score(self, query: str, before: int, visible: np.ndarray) -> np.ndarray:
        digest = hashlib.sha256(f"{self._seed}\n{query}".encode("utf-8", "surrogatepass")).digest()
        return np.random.default_rng(int.from_bytes(digest)).random(before)[visible]


class Bm25(Retriever):
    """Okapi BM25, bit for bit the scores of rank_bm25 0.2.2's `BM25Okapi` over the items before `before`.

    Words are split on single spaces, case kept, as the paper's retrieval does; characters of scripts without spaces and
    emoji are words of their own. A negative inverse document frequency
    (a word in more than half of the items) becomes `EPSILON` times the mean over all words, which may be negative too.

    Everything a past-only search needs is summed up once, in one pass: per word the items that hold it, in time order;
    per number of items the total length and the mean inverse document frequency.
    """

    K1, B, EPSILON = 1.5, 0.75, 0.25

    def __init__(self, texts: Sequence[str], item_ids: Sequence[str] | None) -> None:
        super().__init__(texts, item_ids)
        # A missing word gets the next number, so words are numbered by first occurrence: the order rank_bm25 sums in.
        numbers: defaultdict[str, int] = defaultdict()
        numbers.default_factory = numbers.__len__
        words: list[int] = []
        counts: list[int] = []
        num_words, num_unique, num_known = [], [], []
        for text in texts:
            split = search_words(text)
            counter = Counter(split)
            words.extend(map(numbers.__getitem__, counter))
            counts.extend(counter.values())
            num_words.append(len(split))
            num_unique.append(len(counter))
            num_known.append(len(numbers))
        self._numbers = dict(numbers)
        self._num_words = np.array(num_words, dtype=np.int64)
        self._total_words = [0, *np.cumsum(self._num_words).tolist()]
        # log(x + 0.5) for every whole number an idf is made of; math.log and np.log may differ in the last bit.
        self._logs = np.array([math.log(x + 0.5) for x in range(self.num_items + 1)])
        word_array = np.array(words, dtype=np.int64)
        self._mean_idf = self._mean_idf_by_prefix(word_array, num_unique, num_known)
        by_word = np.argsort(word_array, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(word_array, minlength=len(numbers)))])
        self._items = np.repeat(np.arange(self.num_items, dtype=np.int32), num_unique)[by_word]
        self._counts = np.array(counts, dtype=np.int32)[by_word]

    def _mean_idf_by_prefix(self, words: np.ndarray, num_unique: list[int], num_known: list[int]) -> list[float]:
        num_items_with = np.zeros(len(self._numbers), dtype=np.int64)
        means = [0.0]
        end = 0
        for item, known in enumerate(num_known):
            start, end = end, end + num_unique[item]
            num_items_with[words[start:end]] += 1
            idf = self._logs[item + 1 - num_items_with[:known]] - self._logs[num_items_with[:known]]
            means.append(float(np.cumsum(idf)[-1]) / known)  # cumsum adds one by one, as rank_bm25; np.sum does not
        return means

    def _score(self, query: str, before: int, visible: np.ndarray) -> np.ndarray:
        known = np.array([self._numbers[w] for w in search_words(query) if w in self._numbers], dtype=np.int64)
        starts = self._starts[known]
        lengths = self._starts[known + 1] - starts
        # The postings of all query words one after another; `term` says which query word a posting is for.
        term = np.repeat(np.arange(len(known)), lengths)
        posting = np.arange(len(term)) + (starts - np.cumsum(lengths) + lengths)[term]
        items, counts = self._items[posting], self._counts[posting]
        if before < self.num_items:
            past = items < before
            term, items, counts = term[past], items[past], counts[past]
        num_items_with = np.bincount(term, minlength=len(known))
        idf = self._logs[before - num_items_with] - self._logs[num_items_with]
        idf[idf < 0] = self.EPSILON * self._mean_idf[before]
        mean_words = self._total_words[before] / before
        norm = self.K1 * (1 - self.B + self.B * self._num_words[items] / mean_words)
        gains = idf[term] * (counts * (self.K1 + 1) / (counts + norm))
        return np.bincount(items, weights=gains, minlength=before)[visible]  # adds in query order, as rank_bm25


class Dense(Retriever):
    """Inner product of unit vectors in a FAISS flat index of this user alone: exact cosine similarity.

    Scores are rounded to six decimals: a text embedded in another batch differs by about 1e-7, and such noise must not
    decide between equal items.

    Args:
        vectors: float32 [N, D], rows of length 1. Copied into the index, not kept.
        faiss_device: "cpu", or "gpu" to use one where FAISS has one (else the CPU, with a warning). The CPU is the
            default on purpose: an index of thousands of users is thousands of tiny indexes, which a GPU serves slower,
            and FAISS would take GPU memory that training needs.
    """

    def __init__(
        self,
        texts: Sequence[str],
        item_ids: Sequence[str] | None,
        vectors: np.ndarray,
        embedder: TextEmbedder,
        faiss_device: str = "cpu",
    ) -> None:
        super().__init__(texts, item_ids)
        check_vectors(vectors, self.num_items)
        self._embedder = embedder
        self._index: Any = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors))
        if choose_faiss_device(faiss_device) == "gpu":
            if self.num_items <= GPU_MAX_ITEMS:
                self._index = faiss.index_cpu_to_gpu(_gpu_resources(), 0, self._index)
            else:
                log.warning("FAISS: %d items are more than %d, searched on the CPU", self.num_items, GPU_MAX_ITEMS)

    def _prepare(self, queries: Sequence[str]) -> np.ndarray:
        vectors = self._embedder.embed(queries)
        check_vectors(vectors, len(queries))
        if vectors.shape[1] != self._index.d:
            raise ValueError(
                f"query vectors have {vectors.shape[1]} dimensions, the index {self._index.d}: "
                "expected the embedder that made the index; rebuild its vectors"
            )
        return vectors

    def _score(self, vector: np.ndarray, before: int, visible: np.ndarray) -> np.ndarray:
        similarities, indexes = self._index.search(vector[None], self.num_items)
        scores = np.empty(self.num_items)
        scores[indexes[0]] = similarities[0]
        return np.round(scores, 6)[visible]


class Hybrid(Retriever):
    """Sum over BM25 and dense of 1 / (60 + rank). An item that shares no word with the query has no BM25 rank."""

    def __init__(self, bm25: Bm25, dense: Dense, texts: Sequence[str], item_ids: Sequence[str] | None) -> None:
        super().__init__(texts, item_ids)
        self._bm25 = bm25
        self._dense = dense

    def _prepare(self, queries: Sequence[str]) -> list[tuple[str, np.ndarray]]:
        return list(zip(queries, self._dense._prepare(queries), strict=True))

    def _score(self, prepared: tuple[str, np.ndarray], before: int, visible: np.ndarray) -> np.ndarray:
        query, vector = prepared
        by_words = self._bm25._score(query, before, visible)
        by_meaning = self._dense._score(vector, before, visible)
        return np.where(by_words != 0, _reciprocal_ranks(by_words), 0.0) + _reciprocal_ranks(by_meaning)


def _reciprocal_ranks(scores: np.ndarray) -> np.ndarray:
    """1 / (60 + rank) per item in time order; rank 1 is the best, equal scores rank the newer first."""
    order = np.lexsort((-np.arange(len(scores)), -scores))
    values = np.empty(len(scores))
    values[order] = 1.0 / (RECIPROCAL_RANK_CONSTANT + 1 + np.arange(len(scores)))
    return values


def make_retriever(
    kind: str,
    texts: Sequence[str],
    item_ids: Sequence[str] | None = None,
    seed: int = 0,
    embedder: TextEmbedder | None = None,
    vectors: np.ndarray | None = None,
    faiss_device: str = "cpu",
) -> Retriever:
    """The retriever of one user over all items known of them, oldest first; an empty history finds nothing.

    Args:
        kind: One of `KINDS`.
        seed: The user's own seed; only "random" reads it.
        embedder: Needed by "dense" and "hybrid", for the queries.
        vectors: float32 [N, D] of the texts by the same embedder, if at hand (`update_vectors`); else embedded here.
        faiss_device: See `Dense`.

    Raises:
        ValueError: An unknown kind, a missing embedder, ids or vectors that do not fit the texts.
    """
    if kind == "bm25":
        return Bm25(texts, item_ids)
    if kind == "recency":
        return Recency(texts, item_ids)
    if kind == "random":
        return Random(texts, item_ids, seed)
    if kind not in KINDS:
        raise ValueError(f"retriever kind {kind!r}: expected one of {', '.join(KINDS)}")
    if embedder is None:
        raise ValueError(f"retriever kind {kind!r} needs an embedder for its queries: got None")
    dense = Dense(texts, item_ids, embedder.embed(texts) if vectors is None else vectors, embedder, faiss_device)
    return dense if kind == "dense" else Hybrid(Bm25(texts, item_ids), dense, texts, item_ids)


def retrieve_past_only(
    retriever: Retriever, queries: Sequence[str], top_k: int, exclude: Sequence[frozenset[str]] | None = None
) -> list[list[Hit]]:
    """For training: `queries[i]` belongs to item i and sees only the items before it. All queries are embedded at once.

    Args:
        exclude: Per query, item ids that must not be returned, as in `Retriever.search`.

    Raises:
        ValueError: `top_k` is negative, or there is not one query per item.
    """
    _check_top_k(top_k)
    if len(queries) != retriever.num_items:
        raise ValueError(f"{len(queries)} queries for {retriever.num_items} items: expected one per item")
    if top_k == 0:
        return [[] for _ in queries]
    prepared = retriever._prepare(queries)
    hidden = exclude or [frozenset()] * len(queries)
    return [retriever._best(query, prepared[i], top_k, i, hidden[i]) for i, query in enumerate(queries)]


@cache
def choose_faiss_device(wanted: str) -> str:
    """The device FAISS will search on, "cpu" or "gpu"; asks FAISS once and logs when a GPU was wanted in vain."""
    if wanted not in ("cpu", "gpu"):
        raise ValueError(f"faiss_device {wanted!r}: expected cpu or gpu")
    if wanted == "gpu" and faiss.get_num_gpus() == 0:
        log.warning("FAISS %s sees no GPU: searching on the CPU", faiss.__version__)
        return "cpu"
    return wanted


@cache
def _gpu_resources() -> Any:
    return faiss.StandardGpuResources()


def _check_top_k(top_k: int) -> None:
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: expected 0 or more")


def check_vectors(vectors: np.ndarray, num_rows: int) -> None:
    """Raises ValueError unless `vectors` is float32 [num_rows, D], finite, each row of length 1 within 1e-3."""
    if vectors.ndim != 2 or len(vectors) != num_rows or vectors.shape[1] == 0 or vectors.dtype != np.float32:
        raise ValueError(f"vectors are {vectors.dtype} {list(vectors.shape)}: expected float32 [{num_rows}, D]")
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    bad = np.flatnonzero(~(np.abs(lengths - 1) <= 1e-3))  # written so that NaN is bad
    if len(bad):
        raise ValueError(f"vector {bad[0]} has length {lengths[bad[0]]}: expected finite numbers and length 1")


def vectors_to_bytes(vectors: np.ndarray, embedder_fingerprint: str, item_ids: Sequence[str]) -> bytes:
    """float32 [N, D] unit vectors and what they belong to, as one safetensors file.

    The checksum covers vectors, shape, ids and fingerprint: safetensors itself loads flipped data bytes silently.

    Raises:
        ValueError: Vectors that are not finite, of length 1, or one per id.
    """
    check_vectors(vectors, len(item_ids))
    ids = json.dumps(list(item_ids))
    metadata = {
        "format": VECTORS_FORMAT,
        "embedder": embedder_fingerprint,
        "item_ids": ids,
        "sha256": _checksum(vectors, embedder_fingerprint, ids),
    }
    return safetensors.numpy.save({"vectors": np.ascontiguousarray(vectors)}, metadata)


def vectors_from_bytes(data: bytes, expect_fingerprint: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Vectors float32 [N, D] and their N item ids, verified.

    Raises:
        ValueError: Damaged in any way, or made by another embedder: the vectors must be made anew.
    """
    try:
        vectors = safetensors.numpy.load(data)["vectors"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header["__metadata__"]
        ids = metadata["item_ids"]
        intact = (
            metadata["format"] == VECTORS_FORMAT
            and metadata["sha256"] == _checksum(vectors, metadata["embedder"], ids)
            and set(metadata) == {"format", "embedder", "item_ids", "sha256"}
        )
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"stored vectors are not readable ({error}): expected {VECTORS_FORMAT}") from error
    if not intact:
        raise ValueError(f"stored vectors: checksum or format does not match: expected undamaged {VECTORS_FORMAT}")
    if metadata["embedder"] != expect_fingerprint:
        made_by, here = metadata["embedder"][:16], expect_fingerprint[:16]
        raise ValueError(f"stored vectors were made by embedder {made_by}: expected {here}")
    item_ids = tuple(json.loads(ids))
    check_vectors(vectors, len(item_ids))
    return vectors, item_ids


def _checksum(vectors: np.ndarray, embedder_fingerprint: str, ids: str) -> str:
    parts = json.dumps([VECTORS_FORMAT, str(vectors.dtype), list(vectors.shape), embedder_fingerprint, ids])
    return hashlib.sha256(parts.encode() + vectors.tobytes()).hexdigest()


def update_vectors(
    stored: bytes | None, texts: Sequence[str], item_ids: Sequence[str], embedder: TextEmbedder
) -> tuple[np.ndarray, bytes]:
    """The vectors of a user's items, float32 [N, D], and what to store: from `stored` as far as it holds them.

    Items are known by id and text, so an edited item is embedded anew. What is damaged or made by another embedder is
    refused, the reason logged, and rebuilt whole.
    """
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
    keys = [f"{item_id} {digest}" for item_id, digest in zip(item_ids, digests, strict=True)]
    known: dict[str, np.ndarray] = {}
    if stored is not None:
        try:
            vectors, stored_keys = vectors_from_bytes(stored, embedder.fingerprint)
            if list(stored_keys) == keys:
                return vectors, stored
            known.update(zip(stored_keys, vectors, strict=True))
        except ValueError as error:
            log.warning("rebuilding vectors: %s", error)
    new = [i for i, key in enumerate(keys) if key not in known]
    embedded = embedder.embed([texts[i] for i in new])
    known.update(zip((keys[i] for i in new), embedded, strict=True))
    vectors = np.array([known[key] for key in keys], dtype=np.float32).reshape(len(keys), embedded.shape[1])
    return vectors, vectors_to_bytes(vectors, embedder.fingerprint, keys)

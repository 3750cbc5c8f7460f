"""What a user did before goes into their prompts: retrieved items and a profile, between pairs and packing.

In: prompts of one user, from `pairs.make_pairs` in training and `tasks.make_prompt` in answering. Out: the same prompts
with up to `top_k` of the user's earlier items as lines, best first, and the user's profile. What is too long is cut
later, in `packing.encode_prompt`.

A reader might question what is asked of the retriever: the text that the prompt shows of the item, and nothing else.
So training and answering ask alike, and an item without a query-label pair (of which a prompt shows nothing, for its
text is the answer) gets the newest items before it. The released code asks with the whole instruction as well.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from oppu_ray.config import Config
from oppu_ray.core import Item, Prompt, TrainingPair, UserHistory, check_unicode
from oppu_ray.embedding import load_embedder
from oppu_ray.profiles import Profile, is_stale, profile_from_json, profile_prompt, profile_to_json, write_profile
from oppu_ray.randomness import user_seed
from oppu_ray.registry import Forgotten
from oppu_ray.retrieval import Hit, Retriever, make_retriever, retrieve_past_only, update_vectors
from oppu_ray.tasks import Task, get_task, make_prompt, memory_line, one_line
from oppu_ray.vault import CorruptError, Vault

log = logging.getLogger(__name__)

VECTORS_NAME = "vectors.safetensors"
CODE_TRAINING_WORDS = 768  # a retrieved field in training, in the released code


def query_prompt(config: Config, task: Task, query: Item) -> Prompt:
    """Return a query as a prompt, before anything of the user's past is added to it.

    It is cut as in training, unless the config asks as the released code does (`memory.same_construction`).
    """
    max_words = config.task.max_input_words if config.memory.same_construction else 0
    return make_prompt(task, query, config.task.prompt_order, max_words)


class Memory:
    """One user's past, ready for that user's prompts; `Memories.open` makes it.

    Args:
        items: The user's past, oldest first.
        retriever: Over these items.
        profile: The user's text profile, or "".
        first_profiled: In training, the first item whose prompt shows the profile.
    """

    def __init__(
        self, config: Config, items: Sequence[Item], retriever: Retriever, profile: str, first_profiled: int = 0
    ) -> None:
        self._config, self._task = config, get_task(config.task)
        self._items, self._retriever, self._profile = items, retriever, one_line(profile)
        self._first_profiled = first_profiled
        self._same: defaultdict[str, set[str]] = defaultdict(set)  # what was asked -> the items that asked it
        for item in items:
            if all(getattr(item, field) for field, _ in self._task.inputs):
                prompt = make_prompt(self._task, item, config.task.prompt_order, config.task.max_input_words)
                self._same[one_line(prompt.input)].add(item.item_id)

    def add_past(self, pairs: Sequence[TrainingPair]) -> list[TrainingPair]:
        """For training: pair i belongs to item i and sees only the items before it."""
        memory = self._config.memory
        if self._task.strategies and not memory.same_construction:
            return list(pairs)
        queries = [one_line(pair.prompt.input) for pair in pairs]
        hidden = [self._asked_by(query) for query in queries]
        found = retrieve_past_only(self._retriever, queries, memory.top_k, hidden)
        max_words = memory.max_words if memory.same_construction else CODE_TRAINING_WORDS
        profiles = [self._profile if place >= self._first_profiled else "" for place in range(len(pairs))]
        return [
            replace(pair, prompt=self._fill(pair.prompt, hits, max_words, profile))
            for pair, hits, profile in zip(pairs, found, profiles, strict=True)
        ]

    def add(self, prompt: Prompt, query_id: str) -> Prompt:
        """For answering: sees the whole past, never the query itself."""
        hits = self.search(prompt, query_id)
        return self._fill(prompt, hits, self._config.memory.max_words, self._profile)

    def search(self, prompt: Prompt, query_id: str) -> list[Hit]:
        """The items that `add` puts in the prompt, best first."""
        query = one_line(prompt.input)
        hidden = self._asked_by(query) | {query_id}
        return self._retriever.search(query, self._config.memory.top_k, exclude=hidden)

    def _asked_by(self, query: str) -> frozenset[str]:
        return frozenset(self._same.get(query, ()))

    def _fill(self, prompt: Prompt, hits: Sequence[Hit], max_words: int, profile: str) -> Prompt:
        lines = tuple(memory_line(self._task, self._items[hit.index], max_words) for hit in hits)
        return replace(prompt, profile=profile, memory=lines)


def choose_items(config: Config, user: UserHistory) -> UserHistory:
    """The user with the items that `study.items` lets a personal adapter learn from, in time order."""
    wanted = config.study.items
    if wanted == "all":
        return user
    if wanted.startswith("last_"):
        return replace(user, items=user.items[-int(wanted.removeprefix("last_")) :])
    task, order, max_words = get_task(config.task), config.task.prompt_order, config.task.max_input_words

    def text(item: Item) -> str:
        is_pair = all(getattr(item, field) for field, _ in task.inputs)
        return one_line(make_prompt(task, item, order, max_words).input if is_pair else memory_line(task, item))

    item_ids = [item.item_id for item in user.items]
    retriever = make_retriever("bm25", [text(item) for item in user.items], item_ids)
    score = dict.fromkeys(item_ids, 0.0)
    for query in user.queries:
        for hit in retriever.search(text(query), len(item_ids)):
            score[hit.item_id] += hit.score
    best_first = sorted(item_ids, key=lambda item_id: -score[item_id])
    half = (len(best_first) + 1) // 2
    kept = set(best_first[:half] if wanted == "similar" else best_first[-half:])
    return replace(user, items=tuple(item for item in user.items if item.item_id in kept))


def older_half(user: UserHistory) -> UserHistory:
    """The user with the older half of their items, the smaller one: what a base user's profile is written from."""
    return replace(user, items=user.items[: len(user.items) // 2])


class Memories:
    """Opens users' memories. What is dear to make, item vectors and profiles, is made once and kept in the vault.

    Args:
        generate: Prompts -> what a model says to each; for profiles that no template writes.

    Raises:
        ValueError: There is no such retriever, or the embedder cannot be loaded.
    """

    def __init__(self, config: Config, vault: Vault, generate: Callable[[Sequence[str]], Sequence[str]]) -> None:
        self._config, self._task, self._vault, self._generate = config, get_task(config.task), vault, generate
        memory = config.memory
        self._embedder = load_embedder(memory.embedder) if memory.uses_embedder else None
        written_by = [self._task.name, memory.profile, config.base.name if memory.profile == "base" else ""]
        self._profile_name = f"profile_{hashlib.sha256(repr(written_by).encode()).hexdigest()[:8]}.json"

    def open(self, user: UserHistory, profiled: UserHistory | None = None) -> Memory | None:
        """The user's memory, or None where prompts are plain.

        Args:
            profiled: The user with their oldest items alone: the profile is of these, and training shows it to later
                ones only. By default it is of all and all show it.

        Raises:
            ValueError: The embedder gave vectors that are not finite.
        """
        memory = self._config.memory
        if not memory.name:
            return None
        # Read before the profile is written, which may take seconds.
        generation = self._generation(user.user_id) if self._embedder is not None else None
        self.write_profiles([profiled or user])
        texts = [memory_line(self._task, item) for item in user.items]
        item_ids = [item.item_id for item in user.items]
        vectors = None
        if self._embedder is not None:
            stored = self._read(user.user_id, VECTORS_NAME)
            vectors, kept = update_vectors(stored, texts, item_ids, self._embedder)
            if kept is not stored:
                self._keep(user, VECTORS_NAME, kept, generation)
        kind = memory.retriever if memory.top_k else "recency"  # which costs nothing and is not asked
        seed, device = self._seed(user), memory.faiss_device
        retriever = make_retriever(kind, texts, item_ids, seed, self._embedder, vectors, device)
        profile = self._stored_profile(user) if memory.with_profile else None
        first_profiled = len(profiled.items) if profiled else 0
        return Memory(self._config, user.items, retriever, profile.text if profile else "", first_profiled)

    def write_profiles(self, users: Sequence[UserHistory]) -> None:
        """Write and keep the profiles that are missing or stale: the history lost an item since, or grew by a fifth."""
        if not self._config.memory.with_profile:
            return
        generations = {user.user_id: self._generation(user.user_id) for user in users}
        found = [(user, self._stored_profile(user)) for user in users]
        wanted = [user for user, profile in found if profile is None or is_stale(profile, user.items)]
        asked = [user for user in wanted if user.items and self._config.memory.profile != "template"]
        prompts = [profile_prompt(self._task, user.items, self._seed(user)) for user in asked]
        texts = self._generate(prompts) if prompts else []
        said = {user.user_id: text for user, text in zip(asked, texts, strict=True)}
        for user in wanted:
            profile = write_profile(self._task, user.items, said.get(user.user_id, ""))
            self._keep(user, self._profile_name, profile_to_json(profile).encode(), generations[user.user_id])

    def _stored_profile(self, user: UserHistory) -> Profile | None:
        data = self._read(user.user_id, self._profile_name)
        try:
            profile = None if data is None else profile_from_json(data.decode())
            check_unicode("profile", [profile.text] if profile else [])
            return profile
        except ValueError:  # from an archive; the error is not logged, it quotes the text
            log.warning("stored profile is not a profile: written again")
            return None

    def _generation(self, user_id: str) -> int | None:
        """The user's generation, or None if they are not in the vault: then nothing is kept of them."""
        try:
            return self._vault.registry.generation(self._vault.user_hash(user_id))
        except Forgotten:
            return None

    def _keep(self, user: UserHistory, name: str, data: bytes, generation: int | None) -> None:
        """Store a file made from the user's items, unless the user, or one of these items, was forgotten."""
        if generation is not None:
            with suppress(Forgotten):
                self._vault.check_sources(self._vault.user_hash(user.user_id), (item.item_id for item in user.items))
                self._vault.put_blob(user.user_id, name, data, generation)

    def _read(self, user_id: str, name: str) -> bytes | None:
        try:
            return self._vault.get_blob(user_id, name)
        except CorruptError as error:
            log.warning("made anew: %s", error)
            return None

    def _seed(self, user: UserHistory) -> int:
        return user_seed(self._config.seed, user.user_id)

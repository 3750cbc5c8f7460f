"""A user's past in their prompts: only their own, only what came before, built alike in training and answering."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oppu_ray import memory
from oppu_ray.config import Config, MemoryConfig, StudyConfig, TaskConfig, from_dict, to_dict
from oppu_ray.core import Item, Prompt, UserHistory
from oppu_ray.memory import Memories, Memory, choose_items
from oppu_ray.pairs import make_pairs
from oppu_ray.retrieval import KINDS, choose_faiss_device, vectors_from_bytes
from oppu_ray.tasks import get_task, make_prompt, render_prompt
from oppu_ray.vault import DiskError, Vault

TAGS = ("sci-fi", "comedy", "drama")
WORDS = "robot love wedding space war dog paris heist school ghost".split()


class Letters:
    """An embedder by hand: letter counts at length 1."""

    def __init__(self, fingerprint: str = "letters") -> None:
        self.fingerprint, self.texts = fingerprint, list[str]()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        counts = np.array([[1 + text.count(letter) for letter in "abdeghlorstw"] for text in texts], np.float32)
        return counts.reshape(-1, 12) / np.linalg.norm(counts.reshape(-1, 12), axis=1, keepdims=True)


def user(name: str, num_items: int = 8) -> UserHistory:
    """Films with a word that no other item of anybody has, `<name>0x` and on; two queries."""
    rng = np.random.default_rng(list(name.encode()))
    items = tuple(
        Item(f"{name}-{i}", text=f"{' '.join(rng.choice(WORDS, 4))} {name}{i}x", label=TAGS[int(rng.integers(3))])
        for i in range(num_items + 2)
    )
    return UserHistory(name, "target", items[:num_items], items[num_items:])


def config_of(task: str = "movie_tagging", **values: object) -> Config:
    labels = TAGS if task == "movie_tagging" else ()
    return Config(task=TaskConfig(name=task, labels=labels), memory=replace(MemoryConfig(top_k=2), **values))


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "vault")


@pytest.fixture
def opened(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, UserHistory], Memory]:
    """Opens one user's memory with an embedder made by hand."""
    monkeypatch.setattr(memory, "load_embedder", lambda name: Letters())

    def open_memory(config: Config, owner: UserHistory) -> Memory:
        vault.add_users([owner.user_id])
        made = Memories(config, vault, no_model).open(owner)
        assert made is not None
        return made

    return open_memory


def no_model(prompts: Sequence[str]) -> list[str]:
    raise AssertionError("no model was to be asked")


def past_prompts(config: Config, made: Memory, items: Sequence[Item]) -> list[Prompt]:
    pairs = make_pairs(get_task(config.task), items, config.task)
    return [pair.prompt for pair in made.add_past(pairs)]


def query_prompt(config: Config, made: Memory, query: Item) -> Prompt:
    task = config.task
    return made.add(make_prompt(get_task(task), query, task.prompt_order, task.max_input_words), query.item_id)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_holds_the_users_own_earlier_items_and_never_the_query(
    kind: str, opened: Callable[[Config, UserHistory], Memory]
) -> None:
    config = config_of(retriever=kind, top_k=3)
    for owner in (user("ann"), user("bob")):
        made = opened(config, owner)
        for i, prompt in enumerate(past_prompts(config, made, owner.items)):
            found = re.findall(r"([a-z]+)(\d+)x", "\n".join(prompt.memory))
            assert {name for name, _ in found} <= {owner.user_id} and len(found) == min(3, i)
            assert all(int(number) < i for _, number in found) and f"{owner.user_id}{i}x" in prompt.input
        for query in owner.queries:
            found = re.findall(r"([a-z]+)(\d+)x", "\n".join(query_prompt(config, made, query).memory))
            assert len(found) == 3 and {name for name, _ in found} == {owner.user_id}
            assert all(int(number) < len(owner.items) for _, number in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["shared_first", "paper"])
def test_training_and_answering_build_the_same_prompt(
    kind: str, order: str, opened: Callable[[Config, UserHistory], Memory]
) -> None:
    """Item i in training is asked as it would be as a query after the items before it."""
    config = config_of(retriever=kind)
    config = replace(config, task=replace(config.task, prompt_order=order))
    owner = user("ann")
    trained = past_prompts(config, opened(config, owner), owner.items)
    for i, item in enumerate(owner.items):
        made = opened(config, replace(owner, items=owner.items[:i]))
        assert query_prompt(config, made, item) == trained[i]
    assert len(set(map(render_prompt, trained))) == len(trained)


@pytest.mark.parametrize("kind", KINDS)
def test_the_query_is_never_found_even_where_it_is_in_the_history(
    kind: str, opened: Callable[[Config, UserHistory], Memory]
) -> None:
    owner = user("ann")
    edited = replace(owner.queries[0], text=f"{owner.queries[0].text} edited")  # known by its id
    twice = replace(owner, items=(*owner.items, edited, replace(owner.queries[1], item_id="another id")))
    config = config_of(retriever=kind, top_k=99)
    made = opened(config, twice)
    for query, hidden in zip(owner.queries, ("ann8x", "ann9x"), strict=True):
        lines = query_prompt(config, made, query).memory
        assert len(lines) == 9 and not any(hidden in line for line in lines)
    copy = replace(owner.items[2], item_id="copy")  # asked once more later: the answer given then is not shown
    again = replace(owner, items=(*owner.items, copy))
    last = past_prompts(config, opened(config, again), again.items)[-1]
    assert len(last.memory) == 7 and not any("ann2x" in line for line in last.memory)


def test_short_empty_and_unusable_histories(opened: Callable[[Config, UserHistory], Memory]) -> None:
    config, owner = config_of(top_k=99), user("ann", 2)
    assert len(query_prompt(config, opened(config, owner), owner.queries[0]).memory) == 2
    empty = replace(owner, user_id="nobody", items=())
    assert past_prompts(config, opened(config, empty), ()) == []
    assert query_prompt(config, opened(config, empty), owner.queries[0]).memory == ()
    strange = Item("q", text="zzz yyy")  # no word in common: the newest, as the retriever documents
    two = config_of(top_k=2)
    lines = query_prompt(two, opened(two, user("ann")), strange).memory
    assert [line.split()[-3] for line in lines] == ["ann7x", "ann6x"]


def test_an_item_whose_prompt_shows_nothing_of_it_gets_the_newest_and_its_answer_is_not_looked_at(
    opened: Callable[[Config, UserHistory], Memory],
) -> None:
    config = config_of("tweet_paraphrase", top_k=2, with_profile=True)
    items = tuple(Item(str(i), text=f"{word} again today") for i, word in enumerate(WORDS[:5]))
    owner = UserHistory("ann", "target", items)
    made = opened(config, owner)
    prompts = past_prompts(config, made, items)
    assert [prompt.memory for prompt in prompts][3:] == [
        ("tweet: wedding again today", "tweet: love again today"),
        ("tweet: space again today", "tweet: wedding again today"),
    ]
    assert all(prompt.input == "" and "median" not in prompt.profile for prompt in prompts)
    changed = replace(owner, user_id="eve", items=(*items[:4], replace(items[4], text="robot again")))
    assert past_prompts(config, opened(config, changed), changed.items)[4].memory == prompts[4].memory
    asked = query_prompt(config, made, Item("q", keywords="a dog in space"))
    assert asked.memory[0] == "tweet: space again today" and asked.profile == prompts[0].profile != ""


def test_the_released_code_trains_one_way_and_asks_another(opened: Callable[[Config, UserHistory], Memory]) -> None:
    tweets = config_of("tweet_paraphrase", same_construction=False)
    owner = UserHistory("ann", "target", tuple(Item(str(i), text=f"{word} again") for i, word in enumerate(WORDS)))
    made = opened(tweets, owner)
    assert {prompt.memory for prompt in past_prompts(tweets, made, owner.items)} == {()}
    assert len(query_prompt(tweets, made, Item("q", keywords="dog")).memory) == 2
    films = config_of(same_construction=False, max_words=3)
    long = tuple(Item(str(i), text=f"{i} " + "word " * 1000, label="drama") for i in range(2))
    made = opened(films, replace(owner, items=long))
    (line,) = past_prompts(films, made, long)[1].memory
    assert len(line.split()) == 1 + 768 + 2
    assert len(query_prompt(films, made, Item("q", text="word")).memory[0].split()) == 1 + 3 + 2


def test_plain_prompts_have_no_memory_and_load_nothing(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "load_embedder", None)
    config = config_of(retriever="dense", top_k=0)
    memories = Memories(config, vault, no_model)
    memories.write_profiles([user("ann")])
    assert memories.open(user("ann")) is None and vault.registry.users() == []
    assert config.memory.name == "" and config.memory.recipe == {} and config.memory.num_extra_tokens == 0
    one = config_of(retriever="dense", with_profile=True, profile="base")
    assert from_dict(to_dict(one)) == one and one.memory.name == "pag_k2"
    assert set(one.memory.recipe) >= {"retriever", "embedder", "profile"} and one.memory.num_extra_tokens == 512
    assert "profile" not in config_of().memory.recipe and "embedder" not in config_of().memory.recipe


def test_vectors_are_made_once_and_made_anew_when_they_cannot_be_trusted(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, owner = config_of(retriever="dense"), user("ann")
    vault.add_users(["ann"])
    embedders = [Letters(), Letters(), Letters(), Letters("letters-2")]
    ready = iter(embedders)
    monkeypatch.setattr(memory, "load_embedder", lambda name: next(ready))
    first = Memories(config, vault, no_model).open(owner)
    assert len(embedders[0].texts) == 8
    Memories(config, vault, no_model).open(owner)
    assert embedders[1].texts == []
    path = next(vault.root.rglob("blobs/vectors.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    again = Memories(config, vault, no_model).open(owner)
    assert len(embedders[2].texts) == 8 and "vectors.safetensors" in caplog.text and "made anew" in caplog.text
    assert first is not None and again is not None
    assert query_prompt(config, again, owner.queries[0]) == query_prompt(config, first, owner.queries[0])
    Memories(config, vault, no_model).open(owner)
    assert len(embedders[3].texts) == 8 and "made by embedder letters: expected letters-2" in caplog.text
    stored = vault.get_blob("ann", "vectors.safetensors")
    assert stored is not None and vectors_from_bytes(stored, "letters-2")[0].shape == (8, 12)
    assert "ann" not in caplog.text


def test_the_device_that_faiss_searches_on_is_a_key(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "load_embedder", lambda name: Letters())
    choose_faiss_device.cache_clear()
    Memories(config_of(retriever="dense", faiss_device="gpu"), vault, no_model).open(user("ann"))
    assert "sees no GPU: searching on the CPU" in caplog.text
    choose_faiss_device.cache_clear()


def test_what_is_made_of_a_user_who_was_forgotten_meanwhile_is_not_kept(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "load_embedder", lambda name: Letters())
    made = Memories(config_of(retriever="dense", with_profile=True), vault, no_model).open(user("ann"))
    assert made is not None and vault.registry.users() == [] and not list(vault.root.glob("users/*"))
    vault.add_users(["ann"])
    Memories(config_of(retriever="dense", with_profile=True), vault, no_model).open(user("ann"))
    assert len(vault.blob_names(vault.user_hash("ann"))) == 2


def test_vectors_that_are_no_numbers_and_what_is_not_there_are_refused(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, broken = config_of(retriever="hybrid"), Letters()
    monkeypatch.setattr(broken, "embed", lambda texts: np.full((len(texts), 3), np.nan, np.float32))
    with monkeypatch.context() as patched:
        patched.setattr(memory, "load_embedder", lambda name: broken)
        with pytest.raises(ValueError, match="vector 0 has length nan"):
            Memories(config, vault, no_model).open(user("ann"))
    assert vault.get_blob("ann", "vectors.safetensors") is None
    missing = config_of(retriever="dense", embedder="embedded:none")
    with pytest.raises(ValueError, match="embedder 'embedded:none': expected embedded:minilm-l6"):
        Memories(missing, vault, no_model)


def test_a_profile_is_kept_with_the_user_until_a_fifth_of_the_history_is_new(vault: Vault) -> None:
    config, owner = config_of(top_k=0, with_profile=True), user("ann", 10)
    vault.add_users(["ann"])

    def profile(items: Sequence[Item], config: Config = config) -> str:
        made = Memories(config, vault, lambda prompts: [f"wrote {len(prompts)}"]).open(replace(owner, items=items))
        assert made is not None
        return query_prompt(config, made, owner.queries[0]).profile

    more = tuple(Item(f"n{i}", text="film", label="drama") for i in range(3))
    first = profile(owner.items)
    assert first.startswith("Most frequent tag of this user: ") and "of 10" in first
    assert profile((*owner.items, *more[:2])) == first
    grown = profile((*owner.items, *more))
    assert grown != first and "of 13" in grown
    by_model = config_of(top_k=0, with_profile=True, profile="base")
    assert profile(owner.items, by_model) == "wrote 1"
    assert profile(owner.items) != "wrote 1"  # each writer's is kept
    assert len(list(vault.root.rglob("blobs/profile_*.json"))) == 2


@pytest.mark.parametrize(
    "stored", [b'{"text": "canary \\ud800", "method": "model", "item_ids": []}', b"canary", b"\xff"]
)
def test_a_stored_profile_that_is_none_is_written_again(
    vault: Vault, caplog: pytest.LogCaptureFixture, stored: bytes
) -> None:
    config, owner = config_of(top_k=0, with_profile=True), user("ann")
    vault.add_users(["ann"])
    Memories(config, vault, no_model).open(owner)
    (name,) = vault.blob_names(vault.user_hash("ann"))
    vault.put_blob("ann", name, stored)
    made = Memories(config, vault, no_model).open(owner)
    assert made is not None and query_prompt(config, made, owner.queries[0]).profile.startswith("Most frequent tag")
    assert vault.get_blob("ann", name) != stored and "canary" not in caplog.text


def test_one_users_profile_that_is_away_stops_nobody_else_and_is_not_written_over(vault: Vault) -> None:
    config, users = config_of(top_k=0, with_profile=True), [user("ann"), user("bob")]
    vault.add_users(["ann", "bob"])
    Memories(config, vault, no_model).open(users[0])
    (path,) = vault.root.rglob("blobs/profile_*.json")
    path.rename(path.with_name("kept"))
    path.symlink_to(path.with_name("away"))
    memories = Memories(config, vault, no_model)
    memories.write_profiles(users)
    assert len(vault.blob_names(vault.user_hash("bob"))) == 1 and path.is_symlink()
    with pytest.raises(DiskError, match="symlink"):
        memories.open(users[0])
    path.unlink()
    path.with_name("kept").rename(path)
    assert memories.open(users[0]) is not None


def test_a_model_writes_the_missing_profiles_in_one_batch_and_the_template_steps_in(vault: Vault) -> None:
    config, asked = config_of(top_k=0, with_profile=True, profile="base"), list[list[str]]()
    vault.add_users(["ann", "bob", "eve"])

    def generate(prompts: Sequence[str]) -> list[str]:
        asked.append(list(prompts))
        return ["Likes ghosts." if "bob" in prompt else " " for prompt in prompts]

    memories = Memories(config, vault, generate)
    nothing = replace(user("eve"), items=())  # of which nobody is asked
    memories.write_profiles([user("ann"), user("bob"), nothing])
    assert [len(prompts) for prompts in asked] == [2]
    assert ["ann" in prompt for prompt in asked[0]] == [True, False]
    made = {name: memories.open(user(name)) for name in ("ann", "bob", "eve")}
    assert len(asked) == 2  # Eve's was of nothing
    profiles = [query_prompt(config, made[name], user(name).queries[0]).profile for name in ("ann", "bob")]  # type: ignore[arg-type]
    assert profiles[0].startswith("Most frequent tag") and profiles[1] == "Likes ghosts."


@pytest.mark.parametrize(("wanted", "expected"), [("similar", ["0", "2", "4"]), ("dissimilar", ["1", "3", "5"])])
def test_a_study_trains_on_the_half_that_is_most_or_least_like_the_queries(wanted: str, expected: list[str]) -> None:
    texts = ["war tank", "love kiss", "army war", "kiss bride", "tank battle", "bride dress"]  # in time order
    items = tuple(Item(str(i), text=text, label=TAGS[0]) for i, text in enumerate(texts))
    owner = UserHistory("ann", "target", items, (Item("q", text="the war of a tank army", label=TAGS[0]),))
    config = replace(config_of(), study=StudyConfig(items=wanted))
    chosen = choose_items(config, owner)
    assert [item.item_id for item in chosen.items] == expected and chosen.queries == owner.queries


def test_a_study_trains_on_the_newest_items() -> None:
    owner = user("ann")
    for number in (1, 3):
        chosen = choose_items(replace(config_of(), study=StudyConfig(items=f"last_{number}")), owner)
        assert chosen.items == owner.items[-number:]
    assert choose_items(replace(config_of(), study=StudyConfig(items="last_999")), owner) == owner
    assert choose_items(config_of(), owner) is owner

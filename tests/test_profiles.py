"""Profiles: counts are right, the model is asked about the user's items only, and a changed history makes one stale."""

from __future__ import annotations

import pytest

from oppu_ray.config import TaskConfig
from oppu_ray.core import Item
from oppu_ray.profiles import (
    ASKS,
    MAX_PROFILE_WORDS,
    Profile,
    is_stale,
    profile_from_json,
    profile_prompt,
    profile_to_json,
    write_profile,
)
from oppu_ray.tasks import TASKS, Task, get_task


def task(name: str) -> Task:
    return get_task(TaskConfig(name=name))


def movies(*tags: str) -> list[Item]:
    return [Item(f"m{i}", text=f"plot number {i}", label=tag) for i, tag in enumerate(tags)]


def tweets(*texts: str) -> list[Item]:
    return [Item(f"t{i}", text=text, keywords="k") for i, text in enumerate(texts)]


def test_every_task_has_its_question() -> None:
    assert set(ASKS) == {task.name for task in TASKS}
    assert len(set(ASKS.values())) == len(ASKS)


def test_labels_are_counted() -> None:
    profile = write_profile(task("LaMP-2M"), movies("comedy", "classic", "comedy", "action", "comedy", "classic"))
    assert profile.text == "Most frequent tag of this user: comedy (3 of 6), classic (2 of 6), action (1 of 6)."
    assert profile.method == "template"
    assert profile.item_ids == ("m0", "m1", "m2", "m3", "m4", "m5")


def test_ratings_have_a_mean() -> None:
    items = [Item(str(i), text="review", label=score) for i, score in enumerate("5545")]
    text = write_profile(task("product_rating"), items).text
    assert text == "Most frequent score of this user: 5 (3 of 4), 4 (1 of 4). Mean score: 4.8."


def test_style_is_counted_from_what_the_user_wrote() -> None:
    text = write_profile(
        task("tweet_paraphrase"), tweets("Monday again?", "hello MONDAY my old friend", "so: mondays!")
    ).text
    assert text == (
        "A tweet of this user has 2 words (from 2 to 5); of 3, 1 end with a question mark and 1 with an exclamation "
        "mark. Frequent words: monday."
    )
    titles = [Item(str(i), text="abstract abstract", title="On graph kernels") for i in range(2)]
    assert "A title of this user has 3 words" in write_profile(task("scholarly_title"), titles).text
    assert "abstract" not in write_profile(task("scholarly_title"), titles).text
    papers = [Item(str(i), text="Sparse graphs", title="a cited paper", label="[1]") for i in range(2)]
    assert write_profile(task("citation"), papers).text.endswith("Frequent words: graphs, sparse.")
    chat = [Item(str(i), text="hi there", context=("hello",)) for i in range(2)]
    assert "A message of this user has 2 words" in write_profile(task("chat_reply"), chat).text


def test_items_without_the_field_are_not_counted() -> None:
    assert write_profile(task("movie_tagging"), [*movies("comedy"), Item("x", text="plot")]).text.endswith(
        "comedy (1 of 1)."
    )
    assert write_profile(task("movie_tagging"), [Item("x", text="plot")]).text == ""


def test_the_model_is_shown_ten_items_in_time_order_and_the_tasks_question() -> None:
    items = movies(*["comedy"] * 30)
    prompt = profile_prompt(task("movie_tagging"), items, seed=3)
    shown = [int(line.split("number ")[1].split()[0]) for line in prompt.splitlines() if line.startswith("- ")]
    assert len(shown) == 10 and shown == sorted(set(shown)) and shown != list(range(10))
    assert ASKS["movie_tagging"] in prompt and "tag: comedy" in prompt
    again, other = (profile_prompt(task("movie_tagging"), items, seed) for seed in (3, 4))
    assert again == prompt != other


def test_what_a_model_says_is_the_profile_on_one_line() -> None:
    items = movies("comedy")
    assert write_profile(task("movie_tagging"), items, " Likes \n\n comedy. ") == Profile(
        "Likes comedy.", "model", ("m0",)
    )


def test_long_fields_and_long_answers_are_cut() -> None:
    items = [Item("m", text="long " * 999, label="comedy")]
    prompt = profile_prompt(task("movie_tagging"), items, seed=0)
    assert prompt.count("long") == 200 and "tag: comedy" in prompt
    assert len(write_profile(task("movie_tagging"), items, "word " * 1000).text.split()) == MAX_PROFILE_WORDS


def test_a_model_with_nothing_to_say_gives_way_to_the_template() -> None:
    items = movies("comedy")
    profile = write_profile(task("movie_tagging"), items, " \n")
    assert profile == write_profile(task("movie_tagging"), items)
    assert profile.method == "template"


def test_a_profile_is_stale_when_too_much_is_new_or_anything_is_gone() -> None:
    items = movies(*["comedy"] * 10)
    profile = write_profile(task("movie_tagging"), items)
    two_new = [*items, Item("n1"), Item("n2")]
    assert not is_stale(profile, items) and not is_stale(profile, two_new)
    assert is_stale(profile, [*two_new, Item("n3")]) and is_stale(profile, two_new, max_new_share=0.1)
    assert is_stale(profile, items[:-1])  # the last may be a query now, which must not stand in its own prompt
    assert is_stale(Profile("", "template", ()), items[:1])
    assert not is_stale(Profile("", "template", ()), [])


def test_a_profile_survives_storage() -> None:
    profile = Profile("ünï \ud83d", "model", ("a", "b"))
    assert profile_from_json(profile_to_json(profile)) == profile
    strange = ('{"text": 1, "method": "model", "item_ids": []}', '{"text": "", "method": "x", "item_ids": []}')
    for bad in ("[]", "{}", *strange):
        with pytest.raises(ValueError, match="stored profile"):
            profile_from_json(bad)
    with pytest.raises(ValueError):
        profile_from_json(profile_to_json(profile)[:-3])

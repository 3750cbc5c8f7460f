import dataclasses
from typing import Any

import pytest

from oppu_ray.config import TaskConfig
from oppu_ray.core import Item
from oppu_ray.tasks import (
    TASKS,
    Task,
    get_task,
    make_prompt,
    memory_line,
    missing_fields,
    parse_answer,
    prompt_parts,
    render_prompt,
    target_text,
    task_name,
)

FULL = Item(
    item_id="i1",
    text="some text",
    title="a title",
    abstract="an abstract",
    keywords="key, words",
    context=("Partner: hi", "You: hey", "Partner: how are you"),
    options=("Paper A", "Paper B"),
)
"""An item with every field any task needs; the label is added per task."""


def movie(**changes: Any) -> Item:
    return dataclasses.replace(Item("m1", text="A robot learns to love.", label="sci-fi"), **changes)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("LaMP-1", "citation"),
        ("LaMP_2N", "news_categorize"),
        ("lamp-2m", "movie_tagging"),
        ("LaMP-3", "product_rating"),
        ("LaMP-4", "news_headline"),
        ("LaMP-5", "scholarly_title"),
        ("LaMP-6", "email_subject"),
        ("LaMP-7", "tweet_paraphrase"),
        ("chat_reply", "chat_reply"),
    ],
)
def test_a_task_is_known_by_lamps_name_and_by_ours(alias: str, name: str) -> None:
    assert task_name(alias) == task_name(name) == get_task(TaskConfig(name=alias)).name == name


@pytest.mark.parametrize("name", ["LaMP-2", "LaMP-8", "", "movies"])
def test_an_unknown_task_is_an_error_that_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"task.name: unknown task .* movie_tagging \(LaMP-2M\)"):
        task_name(name)


def test_label_sets_are_lamps() -> None:
    sizes = {task.name: len(task.labels) for task in TASKS if task.labels}
    assert sizes == {"citation": 2, "news_categorize": 15, "movie_tagging": 15, "product_rating": 5}
    assert all(len(set(task.labels)) == len(task.labels) for task in TASKS)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_makes_a_prompt_that_ends_with_its_cue_and_hides_the_answer(task: Task) -> None:
    item = dataclasses.replace(FULL, label=task.labels[0] if task.labels else None)
    assert missing_fields(task, item) == ()
    text = render_prompt(make_prompt(task, item, "shared_first", 256))
    assert text.startswith(task.instruction) and text.endswith(f"\n{task.cue}:")
    without: dict[str, Any] = {task.target: "" if task.target == "text" else None}
    hidden = dataclasses.replace(item, **without)
    if task.target not in [field for field, _ in task.inputs]:
        assert render_prompt(make_prompt(task, hidden, "shared_first", 256)) == text
    assert target_text(task, item) == getattr(item, task.target)
    assert target_text(task, item) in memory_line(task, item) or task.name == "citation"
    assert "\n" not in memory_line(task, item)


def test_the_two_orders_differ_in_where_the_memory_stands() -> None:
    task = get_task(TaskConfig(name="movie_tagging", labels=("sci-fi", "comedy")))
    ask = "Which tag fits this movie? Answer with one of: sci-fi, comedy."
    memory = ("description: old tag: comedy", "description: older tag: sci-fi")
    tail = "description: A robot learns to love.\ntag:"
    bare = make_prompt(task, movie(), "shared_first", 0)
    shared = dataclasses.replace(bare, profile="Likes robots.", memory=memory)
    assert render_prompt(shared) == "\n".join(["Likes robots.", ask, *memory, tail])
    paper = dataclasses.replace(shared, order="paper")
    assert render_prompt(paper) == "\n".join(["Likes robots.", *memory, ask, tail])
    with pytest.raises(ValueError, match="task.prompt_order: expected one of shared_first, paper, got 'random'"):
        make_prompt(task, movie(), "random", 0)


def test_parts_join_to_the_prompt_and_say_what_may_be_cut() -> None:
    task = get_task(TaskConfig(name="LaMP-2M"))
    prompt = make_prompt(task, movie(), "shared_first", 0)
    prompt = dataclasses.replace(prompt, memory=("description: old tag: comedy",))
    parts = prompt_parts(prompt)
    assert [part.kind for part in parts] == ["fixed", "memory", "input", "fixed"]
    assert "".join(part.text for part in parts) == render_prompt(prompt)
    assert parts[2].text == "\ndescription: A robot learns to love."


def test_long_text_keeps_its_first_words_and_a_long_chat_its_last() -> None:
    task = get_task(TaskConfig(name="LaMP-2M"))
    prompt = make_prompt(task, movie(text="one  two\nthree four"), "shared_first", 3)
    assert prompt.input == "description: one two three"
    chat = get_task(TaskConfig(name="chat_reply"))
    prompt = make_prompt(chat, FULL, "shared_first", 5)
    assert prompt.input == "hey\nPartner: how are you"
    assert make_prompt(chat, FULL, "shared_first", 4).input == "Partner: how are you"
    assert make_prompt(chat, FULL, "shared_first", 0).input == "Partner: hi\nYou: hey\nPartner: how are you"
    assert memory_line(task, movie(text="one two three"), max_words=2) == "description: one two tag: sci-fi"


def test_a_citation_prompt_keeps_both_options_however_long_the_title() -> None:
    task = get_task(TaskConfig(name="LaMP-1"))
    prompt = make_prompt(task, dataclasses.replace(FULL, text="word " * 500), "shared_first", 10)
    assert prompt.input.startswith("[1]: Paper A\n[2]: Paper B\npaper title: word")
    assert prompt.input.count("word") == 10


def test_a_missing_input_or_answer_is_an_error_that_names_item_and_field() -> None:
    task = get_task(TaskConfig(name="LaMP-4"))
    with pytest.raises(ValueError, match="item 'i1': news_headline needs the field 'text' in a query"):
        make_prompt(task, dataclasses.replace(FULL, text=""), "shared_first", 0)
    with pytest.raises(ValueError, match="item 'i1': news_headline needs the answer in field 'title'"):
        target_text(task, dataclasses.replace(FULL, title=None))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_an_answer_is_the_first_line_written(task: Task) -> None:
    assert parse_answer(task, "  sci-fi \nbecause of the robot") == "sci-fi"
    assert parse_answer(task, "\n\n comedy") == "comedy"
    assert parse_answer(task, " ") == ""


def test_labels_can_be_replaced_but_must_fit() -> None:
    task = get_task(TaskConfig(name="movie_tagging", labels=("drama", "space")))
    assert task.labels == ("drama", "space") and task.instruction.endswith("one of: drama, space.")
    assert get_task(TaskConfig(name="movie_tagging")).labels[0] == "sci-fi"
    for name, labels, reason in [
        ("news_headline", ("a", "b"), "free text"),
        ("movie_tagging", ("a", "a "), "different, non-empty"),
        ("movie_tagging", ("a", ""), "different, non-empty"),
        ("product_rating", ("good", "bad"), "numbers from low to high"),
        ("product_rating", ("5", "1"), "numbers from low to high"),
    ]:
        with pytest.raises(ValueError, match=f"task.labels: .*{reason}"):
            get_task(TaskConfig(name=name, labels=labels))

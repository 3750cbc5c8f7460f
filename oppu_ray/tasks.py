"""The task table, and the arrow item -> Prompt: what is asked of the model, and what the right answer is.

In goes an `Item`, out come a `Prompt` and a target text. One row per task (LaMP-1 to 7 and chat reply) holds all that
differs between tasks. A reader might question the label order: LaMP shuffles the labels per question, we keep one fixed
order at the very start of the prompt, so that all examples of a task share a long prefix (99 of about 160 tokens for 30
movie tags), which is computed once per row.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import NamedTuple

from oppu_ray.config import TaskConfig
from oppu_ray.core import InputError, Item, Prompt
from oppu_ray.words import first_words, last_words, num_words

PROMPT_ORDERS = ("shared_first", "paper")
METRICS = {"classification": ("accuracy", "macro_f1"), "rating": ("mae", "rmse"), "generation": ("rouge1", "rougeL")}


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Args:
        name: Our name; `lamp` is the benchmark's ("" for chat reply).
        kind: "classification" (one of `labels`), "rating" (a number from `labels`) or "generation" (free text).
        ask: The instruction without the labels.
        inputs: (item field, name shown before it) of what the model reads.
        target: The item field it must say; `cue` is the name shown before it.
        memory: (item field, name) of an item shown as one retrieved line.
        labels: The closed label set in its fixed order, or ().
        strategies: Names of the ways to train on an item without a query-label pair, default first; () where every
            item must have one.
    """

    name: str
    lamp: str
    kind: str
    ask: str
    inputs: tuple[tuple[str, str], ...]
    target: str
    cue: str
    memory: tuple[tuple[str, str], ...]
    labels: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()

    @property
    def instruction(self) -> str:
        """`ask`, then the label list: equal for every item of the task."""
        return f"{self.ask} Answer with one of: {', '.join(self.labels)}." if self.labels else self.ask

    @property
    def fields(self) -> frozenset[str]:
        """The item fields that the task can use; no others are read."""
        own = {field for field, _ in (*self.inputs, *self.memory)} | {self.target}
        more = {"text"} if self.strategies else set()
        return frozenset(own | more | ({"abstract"} if "title_to_abstract" in self.strategies else set()))

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """The item fields without which nothing can be learnt from an item."""
        return ("text",) if self.strategies else (*(field for field, _ in self.inputs), self.target)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of LaMP's metrics for this kind of task, the main one first."""
        return METRICS[self.kind]


TASKS = (
    Task(
        name="citation",
        lamp="LaMP-1",
        kind="classification",
        ask="Which of the two references does the author's paper cite?",
        inputs=(("options", ""), ("text", "paper title")),
        target="label",
        cue="reference",
        memory=(("text", "paper title"), ("title", "reference")),
        labels=("[1]", "[2]"),
        strategies=("next_token", "stem", "title_to_abstract"),
    ),
    Task(
        name="news_categorize",
        lamp="LaMP-2N",
        kind="classification",
        ask="Which category does this article belong to?",
        inputs=(("text", "article"),),
        target="label",
        cue="category",
        memory=(("text", "article"), ("label", "category")),
        labels=(
            "food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime",
            "science & technology", "culture & arts", "entertainment", "politics", "women", "style & beauty",
            "healthy living",
        ),
    ),
    Task(
        name="movie_tagging",
        lamp="LaMP-2M",
        kind="classification",
        ask="Which tag fits this movie?",
        inputs=(("text", "description"),),
        target="label",
        cue="tag",
        memory=(("text", "description"), ("label", "tag")),
        labels=(
            "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
            "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
        ),
    ),
    Task(
        name="product_rating",
        lamp="LaMP-3",
        kind="rating",
        ask="What score goes with this review?",
        inputs=(("text", "review"),),
        target="label",
        cue="score",
        memory=(("text", "review"), ("label", "score")),
        labels=("1", "2", "3", "4", "5"),
    ),
    Task(
        name="news_headline",
        lamp="LaMP-4",
        kind="generation",
        ask="Write the author's headline for this article.",
        inputs=(("text", "article"),),
        target="title",
        cue="headline",
        memory=(("text", "article"), ("title", "headline")),
    ),
    Task(
        name="scholarly_title",
        lamp="LaMP-5",
        kind="generation",
        ask="Write the author's title for the paper with this abstract.",
        inputs=(("text", "abstract"),),
        target="title",
        cue="title",
        memory=(("text", "abstract"), ("title", "title")),
    ),
    Task(
        name="email_subject",
        lamp="LaMP-6",
        kind="generation",
        ask="Write the author's subject line for this e-mail.",
        inputs=(("text", "e-mail"),),
        target="title",
        cue="subject",
        memory=(("text", "e-mail"), ("title", "subject")),
    ),
    Task(
        name="tweet_paraphrase",
        lamp="LaMP-7",
        kind="generation",
        ask="Write this content as the user's tweet.",
        inputs=(("keywords", "content"),),
        target="text",
        cue="tweet",
        memory=(("text", "tweet"),),
        strategies=("next_token", "stem", "completion"),
    ),
    Task(
        name="chat_reply",
        lamp="",
        kind="generation",
        ask="Write the user's next message in this chat.",
        inputs=(("context", ""),),
        target="text",
        cue="You",
        memory=(("context", ""), ("text", "You")),
    ),
)  # fmt: skip


class PromptPart(NamedTuple):
    """A piece of a rendered prompt. `kind`: "fixed", "memory" (dropped whole, last first) or "input" (may be cut)."""

    kind: str
    text: str


def task_name(name: str) -> str:
    """Our name for `name`, which may be ours or LaMP's in any spelling ("LaMP-2M", "lamp_2m").

    Raises:
        InputError: The name is unknown or, like plain "LaMP-2", stands for two tasks.
    """
    for task in TASKS:
        if name == task.name or (task.lamp and name.lower().replace("_", "-") == task.lamp.lower()):
            return task.name
    known = ", ".join(f"{task.name} ({task.lamp})" if task.lamp else task.name for task in TASKS)
    near = difflib.get_close_matches(name, [task.name for task in TASKS], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"task.name: unknown task {name!r}; expected one of {known}{hint}")


def get_task(config: TaskConfig) -> Task:
    """The table's row for `config.name`, with `config.labels` in place of its labels where given.

    Raises:
        ValueError: Unknown task, or labels that do not fit the kind of task.
    """
    name = task_name(config.name)
    task = next(task for task in TASKS if task.name == name)
    if not config.labels:
        return task
    if not task.labels:
        raise ValueError(f"task.labels: {task.name} is answered in free text; expected no labels, got {config.labels}")
    labels = tuple(normal_label(label) for label in config.labels)
    if "" in labels or len(set(labels)) != len(labels):
        raise ValueError(f"task.labels: expected different, non-empty labels, got {config.labels}")
    if len(labels) < 2:
        raise ValueError(f"task.labels: found the one label {labels[0]!r}; expected at least 2 to choose from")
    if task.kind == "rating" and (
        not all(re.fullmatch(r"\d+(\.\d+)?", label) for label in labels) or labels != tuple(sorted(labels, key=float))
    ):
        raise ValueError(f"task.labels: expected numbers from low to high for {task.name}, got {config.labels}")
    return replace(task, labels=labels)


def normal_label(label: str, labels: tuple[str, ...] = ()) -> str:
    """A label as it is compared: white space as single spaces, composed characters, 4.0 as 4 where 4 is a label."""
    label = unicodedata.normalize("NFC", one_line(label))
    number = label.rstrip("0").rstrip(".") if re.fullmatch(r"-?\d+\.\d*", label) else label
    return number if number in labels and label not in labels else label


def missing_fields(task: Task, item: Item) -> tuple[str, ...]:
    """Names of the fields without which `item` is no query-label pair; () if it is one."""
    return tuple(field for field in (*(field for field, _ in task.inputs), task.target) if is_blank(item, field))


def is_blank(item: Item, field: str) -> bool:
    """Whether a field has no text but white space, as `str.split` has it: a prompt would show nothing of it."""
    return not "".join(getattr(item, field) or ()).strip()


def needed_field(task: Task, item: Item) -> str | None:
    """The field for want of which nothing can be learnt from `item`, or None: where the task has strategies for items
    without a pair, a text will do.
    """
    missing = missing_fields(task, item)
    if not missing or (task.strategies and not is_blank(item, "text")):
        return None
    return "text" if task.strategies else missing[0]


def one_line(text: str, max_words: int = 0) -> str:
    """`text` with white space as single spaces, cut to `max_words` words (0: not cut)."""
    line = " ".join(text.split())
    return first_words(line, max_words) if max_words else line


def make_prompt(task: Task, item: Item, order: str, max_input_words: int) -> Prompt:
    """The question about `item`, as yet without the user's past; its target is not looked at.

    Args:
        order: One of `PROMPT_ORDERS`.
        max_input_words: Cut for the item's own text (0: none); a chat keeps its latest words, all others their first.

    Raises:
        ValueError: Unknown order, or the item lacks an input.
    """
    _check_order(order)
    lines = []
    for field, name in task.inputs:
        value = getattr(item, field)
        if is_blank(item, field):
            raise InputError(f"item {item.item_id!r}: {task.name} needs the field {field!r} in a query; it is empty")
        if field == "context":
            lines.extend(_latest_words(value, max_input_words))
        elif field == "options":
            lines.extend(f"[{number}]: {one_line(option)}" for number, option in enumerate(value, start=1))
        else:
            lines.append(f"{name}: {one_line(value, max_input_words)}")
    return Prompt(task.instruction, "\n".join(lines), f"\n{task.cue}:", order=order)


def target_text(task: Task, item: Item) -> str:
    """The right answer, on one line.

    Raises:
        ValueError: The item has none.
    """
    target = one_line(getattr(item, task.target) or "")
    if not target:
        raise InputError(f"item {item.item_id!r}: {task.name} needs the answer in field {task.target!r}; it is empty")
    return target


def memory_line(task: Task, item: Item, max_words: int = 0) -> str:
    """An item as one line for retrieval, answer included, each field cut to `max_words` words (0: not cut)."""
    shown = []
    for field, name in task.memory:
        value = getattr(item, field)
        if field == "context":
            shown.append(" ".join(_latest_words(value, max_words)))
        elif value:
            shown.append(f"{name}: {one_line(value, max_words)}")
    return " ".join(shown)


def parse_answer(task: Task, text: str) -> str:
    """The answer in what the model wrote: its first line that is not empty (targets are one line), label or not."""
    return one_line(text.strip().split("\n", 1)[0])


def prompt_parts(prompt: Prompt) -> tuple[PromptPart, ...]:
    """The prompt's non-empty parts in their order, separators included; their texts joined are `render_prompt`.

    The two orders differ in where the memory stands: it changes with every item, so "shared_first" puts it behind the
    instruction and "paper" (reference: the OPPU code) before it.
    """
    _check_order(prompt.order)
    profile, instruction = PromptPart("fixed", prompt.profile), PromptPart("fixed", prompt.instruction)
    memory = [PromptPart("memory", line) for line in prompt.memory]
    head = [profile, instruction, *memory] if prompt.order == "shared_first" else [profile, *memory, instruction]
    parts = [*head, PromptPart("input", prompt.input), PromptPart("fixed", prompt.cue.removeprefix("\n"))]
    parts = [part for part in parts if part.text]
    return (*parts[:1], *(PromptPart(part.kind, "\n" + part.text) for part in parts[1:]))


def render_prompt(prompt: Prompt) -> str:
    """The prompt as the model reads it; it ends with the cue and no space, a completion is " " + target."""
    return "".join(part.text for part in prompt_parts(prompt))


def _check_order(order: str) -> None:
    if order not in PROMPT_ORDERS:
        raise ValueError(f"task.prompt_order: expected one of {', '.join(PROMPT_ORDERS)}, got {order!r}")


def _latest_words(turns: tuple[str, ...], max_words: int) -> list[str]:
    """The turns, one line each, without the earliest words beyond `max_words` (0: all)."""
    kept: list[str] = []
    left = max_words or sum(map(num_words, turns))
    for turn in reversed(turns):
        if line := last_words(one_line(turn), left):
            kept.append(line)
        left -= num_words(line)
    return kept[::-1]

"""The arrow history.split_history -> pairs.make_pairs -> packing.encode: items become training pairs.

In go a user's items, oldest first, out comes one `TrainingPair` per item. An item with a question and an answer is
asked as a query will be. Where a history item has none (LaMP-1 papers, LaMP-7 tweets) a named strategy decides. A
reader might question the default, "next_token": it is the paper's choice and needs no field that LaMP's files lack.
"""

from __future__ import annotations

from collections.abc import Sequence

from oppu_ray.config import STRATEGIES, TaskConfig
from oppu_ray.core import Item, Prompt, TrainingPair
from oppu_ray.tasks import Task, make_prompt, memory_line, missing_fields, one_line, target_text
from oppu_ray.words import first_words, num_words

COMPLETION_SHARE = 0.2
"""Share of an item's words that "completion" puts in the prompt; LaMP's PEFT code draws it from 10 to 25 percent."""


def make_pairs(task: Task, items: Sequence[Item], config: TaskConfig, form: str = "aligned") -> list[TrainingPair]:
    """One pair per item, in the items' order; `memory.Memory.add_past` adds what the user did before.

    Args:
        items: Oldest first.
        config: Prompt order, cut, and `strategy` for the items without a query-label pair ("": the task's default):
            "next_token" (the whole item after a bare cue; the paper's), "stem" (the item's own answer after a short
            stem; the OPPU code's), "completion" (the rest of the text after its first words) and "title_to_abstract".
        form: "aligned" asks an item with a question and an answer as a query will be; the name of a strategy treats all
            items alike, and "mixed" every second one as "next_token": the study of history formats.

    Raises:
        ValueError: `task.strategy` is unknown or not one of the task's, or an item lacks what it needs.
    """
    check_strategy(task, config.strategy)
    pairs = []
    for number, item in enumerate(items):
        is_plain = form not in ("aligned", "mixed") or (form == "mixed" and number % 2 == 1)
        if is_plain:
            strategy = "next_token" if form == "mixed" else form
            asked, cue, completion = _split_item(task, item, strategy, config.max_input_words)
            prompt = Prompt("", asked, f"\n{cue}", order=config.prompt_order)
        elif not missing_fields(task, item):
            prompt = make_prompt(task, item, config.prompt_order, config.max_input_words)
            completion = target_text(task, item)
        else:
            asked, cue, completion = _split_item(task, item, config.strategy, config.max_input_words)
            prompt = Prompt("", asked, f"\n{cue}", order=config.prompt_order)
        pairs.append(TrainingPair(prompt, " " + completion, item.item_id))
    return pairs


def check_strategy(task: Task, strategy: str) -> None:
    """Raises ValueError where the task's items without a query-label pair cannot be trained on so."""
    allowed = task.strategies or STRATEGIES  # where every item has a query-label pair, none of them is used
    if strategy and strategy not in allowed:
        expected = ", ".join(allowed)
        raise ValueError(f"task.strategy: {strategy!r} does not fit {task.name}; expected one of: {expected}")


def _split_item(task: Task, item: Item, strategy: str, max_words: int) -> tuple[str, str, str]:
    """Input, cue and completion made from an item without a query-label pair; "" is the task's default strategy."""
    strategy = strategy or (task.strategies[0] if task.strategies else "")
    (field, name), *rest = task.memory
    value = getattr(item, field) or ""
    text = one_line(value if isinstance(value, str) else " ".join(value), max_words)
    if text and strategy == "next_token":
        tail = f" abstract: {one_line(item.abstract, max_words)}" if item.abstract else ""
        return "", f"{name}:", memory_line(task, item, max_words).removeprefix(f"{name}: ") + tail
    if text and strategy == "completion":
        num = num_words(text)
        given = first_words(text, min(max(1, int(num * COMPLETION_SHARE)), num - 1))
        return "", f"{name}: {given}".rstrip(), text[len(given) :].lstrip()
    if text and strategy == "stem" and not rest:
        return "", f"{name}:", text
    if text and strategy == "stem" and (answer := getattr(item, rest[0][0])):
        return f"{name}: {text}", f"{rest[0][1]}:", one_line(answer, max_words)
    if text and strategy == "title_to_abstract" and item.abstract:
        return f"{name}: {text}", "abstract:", one_line(item.abstract, max_words)
    missing = ", ".join(missing_fields(task, item))
    others = ", ".join(other for other in task.strategies if other != strategy) or "none"
    raise ValueError(
        f"item {item.item_id!r}: no query-label pair ({missing} empty) and too little in it for the strategy "
        f"{strategy!r}; other strategies of {task.name}: {others}"
    )

"""A user's past items -> a short text about them (PAG, arXiv 2402.04401), put before the prompt of every question.

In: items, oldest first, of one user. Out: a `Profile`, the text and what it was written from, so that it can be told
when the history has moved on. Written by a model (the base model itself, or any instruct model), or by a template from
counts, which needs no model and never invents.

A reader might question that a target user's profile is written from the whole past, labels included, and is read again
in training on those same items: so it is in the paper, and the profile never sees a query. Base users, who may have two
items, are different: theirs is of the older half, and only the newer half shows it (`memory.older_half`).
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median

from oppu_ray.core import Item
from oppu_ray.tasks import Task, memory_line, one_line
from oppu_ray.words import num_words

METHODS = ("template", "model")
MAX_ITEMS_SHOWN = 10  # to the model; the reference shows as many, picked at random
MAX_WORDS_PER_FIELD = 200  # as the reference
MAX_PROFILE_WORDS = 120
MAX_NEW_SHARE = 0.2

ASKS = {
    "citation": "Name the research topics this author works on and the kind of papers the author cites.",
    "news_categorize": "Say which categories this author's articles fall into most often, the most common first.",
    "movie_tagging": "Say which tags this user gives to movies most often, the most common first.",
    "product_rating": "Say which score this user gives most often, and what earns a high or a low score.",
    "news_headline": "Describe the pattern of this author's headlines: length, form, tone and favourite words.",
    "scholarly_title": "Describe the pattern of this author's paper titles and the topics they are about.",
    "email_subject": "Describe the pattern of this author's subject lines: length, form and favourite words.",
    "tweet_paraphrase": "Describe how this user writes tweets: length, tone, spelling, and things they come back to.",
    "chat_reply": "Describe how this user writes in a chat: length, tone, spelling, and things they come back to.",
}


@dataclass(frozen=True)
class Profile:
    """A text about a user, on one line; "" for an empty history.

    Args:
        method: How it came about, "template" or "model".
        item_ids: All items of the history it was written for, oldest first.
    """

    text: str
    method: str
    item_ids: tuple[str, ...]


def write_profile(task: Task, items: Sequence[Item], said: str = "") -> Profile:
    """The profile of one user: what a model said to `profile_prompt`, or the template's where it said nothing.

    Args:
        items: The user's past, oldest first; never the queries.
    """
    item_ids = tuple(item.item_id for item in items)
    if text := one_line(said, MAX_PROFILE_WORDS):
        return Profile(text, "model", item_ids)
    return Profile(_template(task, items), "template", item_ids)


def profile_prompt(task: Task, items: Sequence[Item], seed: int) -> str:
    """What a model is asked: the task's question, then up to 10 items, picked by seed, in time order."""
    picked = sorted(random.Random(seed).sample(range(len(items)), min(MAX_ITEMS_SHOWN, len(items))))
    lines = [f"- {memory_line(task, items[i], MAX_WORDS_PER_FIELD)}" for i in picked]
    return "\n".join(["Here are things one user did before.", *lines, f"{ASKS[task.name]} Be brief.", "Summary:"])


def is_stale(profile: Profile, items: Sequence[Item], max_new_share: float = MAX_NEW_SHARE) -> bool:
    """Whether the profile must be written anew: an item it was written from is gone (forgotten, or a query by now), or
    more are new than the share allowed of those it was written from.
    """
    now, then = {item.item_id for item in items}, set(profile.item_ids)
    return not then <= now or len(now - then) > max_new_share * len(then)


def profile_to_json(profile: Profile) -> str:
    """The profile as it is stored with the user."""
    return json.dumps(asdict(profile), indent=1)


def profile_from_json(text: str) -> Profile:
    """The inverse of `profile_to_json`.

    Raises:
        ValueError: The text is not a stored profile.
    """
    try:
        raw = json.loads(text)
    except RecursionError as error:
        raise ValueError("stored profile: nested too deeply") from error
    if (
        not isinstance(raw, dict)
        or set(raw) != {"text", "method", "item_ids"}
        or not isinstance(raw["text"], str)
        or raw["method"] not in METHODS
        or not isinstance(raw["item_ids"], list)
        or not all(isinstance(item_id, str) for item_id in raw["item_ids"])
    ):
        raise ValueError(f"stored profile {text[:80]!r}: expected text, method ({' or '.join(METHODS)}), item_ids")
    return Profile(raw["text"], raw["method"], tuple(raw["item_ids"]))


def _template(task: Task, items: Sequence[Item]) -> str:
    """Counts as a sentence or two; "" where no item has the field that the task's profile is about."""
    field = "text" if task.name == "citation" else task.target  # "[1]" says nothing of a user, paper titles do
    values = [one_line(value) for item in items if (value := getattr(item, field))]
    if not values:
        return ""
    if field == "label":
        counts = Counter(values)
        usual = ", ".join(f"{label} ({count} of {len(values)})" for label, count in counts.most_common(5))
        text = f"Most frequent {task.cue} of this user: {usual}."
        if task.kind == "rating":
            text += f" Mean {task.cue}: {mean(float(value) for value in values):.1f}."
        return text
    lengths = [num_words(value) for value in values]
    noun = "paper title" if task.name == "citation" else {"You": "message"}.get(task.cue, task.cue)
    asking, shouting = (sum(value.endswith(mark) for value in values) for mark in "?!")
    text = f"A {noun} of this user has {median(lengths):g} words (from {min(lengths)} to {max(lengths)})"
    text += f"; of {len(values)}, {asking} end with a question mark and {shouting} with an exclamation mark."
    words = Counter(word for value in values for word in set(re.findall(r"[^\W\d_]{5,}", value.lower())))
    frequent = sorted((-count, word) for word, count in words.items() if count > 1)[:10]
    if frequent:
        text += f" Frequent words: {', '.join(word for _, word in frequent)}."
    return text

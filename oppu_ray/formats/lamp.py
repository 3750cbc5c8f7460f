"""LaMP's official files and the OPPU archive -> users in the shape of our JSONL."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.core import Rejected
from oppu_ray.formats.files import json_array, json_file
from oppu_ray.formats.raw import ITEM_FIELDS, RawUser, Users, short, user_name
from oppu_ray.tasks import Task
from oppu_ray.values import as_text, kind_of

PROFILE_FIELDS = {
    "citation": {"text": "title", "abstract": "abstract", "title": "citation"},
    "news_categorize": {"text": "text", "title": "title", "label": "category"},
    "movie_tagging": {"text": "description", "label": "tag"},
    "product_rating": {"text": "text", "label": "score"},
    "news_headline": {"text": "text", "title": "title"},
    "scholarly_title": {"text": "abstract", "title": "title"},
    "email_subject": {"text": "text", "title": "title"},
    "tweet_paraphrase": {"text": "text"},
}
"""LaMP's name of each of our item fields, by task. `citation` is in the OPPU archive only."""

QUESTIONS = {
    "citation": r'title "(?P<text>.*)", which reference is related\?.*?\[1\]: "(?P<first>.*)" \[2\]: "(?P<second>.*)"$',
    "news_categorize": r"categories: \[.*?\]\s*article: (?P<text>.*)$",
    "movie_tagging": r"tags: \[.*?\]\s*description: (?P<text>.*)$",
    "product_rating": r"without further explanation\. review: (?P<text>.*)$",
    "news_headline": r"headline for the following article: (?P<text>.*)$",
    "scholarly_title": r"title for the following abstract of a paper: (?P<text>.*)$",
    "email_subject": r"subject for the following email: (?P<text>.*)$",
    "tweet_paraphrase": r"following tweet without any explanation before or after it: (?P<keywords>.*)$",
}
"""How a LaMP question holds the query's fields, by task."""

ODD_TASK_IDS = {"movie_tagging": ("LaMP_2", "LaMP_8"), "news_categorize": ("LaMP_2",)}
"""Task ids of published label files that are not the task's own: LaMP's re-used LaMP_2, and the OPPU archive's."""


# --- LaMP's official files


def read_lamp(data: DataConfig, task: Task) -> Users:
    _check_lamp_task(task, data.format)
    path = Path(data.path)
    if path.is_dir():
        for part, role in (("train", "base"), ("dev", "target")):
            yield from _read_questions(path / f"{part}_questions.json", path / f"{part}_outputs.json", role, task)
    else:
        yield from _read_questions(path, Path(data.outputs_path), None, task)


def _read_questions(questions: Path, outputs: Path, role: str | None, task: Task) -> Users:
    """One user per `user_id` (files without it: per question); questions and profiles of a user are put together."""
    golds = _read_golds(outputs, task)
    users: dict[str, dict[str, Any]] = {}
    profiles: dict[str, set[str]] = {}
    for question in json_array(questions):
        if isinstance(question, Rejected):
            yield question
            continue
        found = question.get("user_id", question.get("id"))
        try:
            user_id = _user_id(found)
            query = _query(question, golds.get(str(question.get("id"))), task)
            items = [_profile_item(item, task) for item in _a_list(question, "profile")]
        except ValueError as error:
            yield Rejected(str(questions), None, user_name(found), short(question.get("input", "")), str(error))
            continue
        user = users.setdefault(user_id, {"user_id": user_id, "history": [], "queries": []})
        if role:
            user["role"] = role
        seen = profiles.setdefault(user_id, set())
        for item in items:
            # Each question of a user carries a copy of the profile, under ids of its own.
            content = json.dumps([item.get(field) for field in ITEM_FIELDS[1:]])
            if content not in seen:
                seen.add(content)
                user["history"].append(item)
        user["queries"].append(query)
    for user in users.values():
        yield RawUser(str(questions), None, user)


def _read_golds(path: Path, task: Task) -> dict[str, Any]:
    """Gold by question id from a file {"task", "golds": [{"id", "output"}]}."""
    try:
        content = json_file(path)
        golds = {str(gold["id"]): gold["output"] for gold in content["golds"]}
        found = str(content.get("task", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f'data.outputs_path: {path}: expected {{"task", "golds": [{{"id", "output"}}]}}'
        raise ValueError(f"{what}: {error!r}") from error
    if found and found not in ODD_TASK_IDS.get(task.name, ()) and found.replace("_", "-").lower() != task.lamp.lower():
        raise ValueError(f"{path}: golds of task {found!r}; expected {task.lamp.replace('-', '_')} for {task.name}")
    return golds


def _query(question: dict[str, Any], gold: object, task: Task) -> dict[str, Any]:
    """Our item of a LaMP question: its fields from the question's text, its target from the gold."""
    name, text = short(question.get("id")), question.get("input")
    found = re.search(QUESTIONS[task.name], text.strip(), re.DOTALL) if isinstance(text, str) else None
    if not found:
        raise ValueError(f"Question {name} is not one of {task.lamp}; expected input like /{QUESTIONS[task.name]}/.")
    if gold is None:
        raise ValueError(f"Question {name} has no gold; expected its id in the outputs file.")
    query: dict[str, Any] = {"id": _text(question.get("id"), "id"), **found.groupdict()}
    query[task.target] = _text(gold, "gold")
    if task.name == "citation":
        query["options"] = [query.pop("first"), query.pop("second")]
    return query


def _profile_item(item: object, task: Task) -> dict[str, Any]:
    """Our item of a LaMP profile item. Its id gets a prefix: a question of the same user may have the same one."""
    if not isinstance(item, dict):
        raise ValueError(f"The profile item {short(item)} is {kind_of(item)}; expected an object.")
    fields = {ours: _text(item.get(theirs), theirs) for ours, theirs in PROFILE_FIELDS[task.name].items()}
    return {"id": f"profile-{item.get('id')}", "time": _text(item.get("date"), "date"), **fields}


def _text(value: object, what: str) -> str | None:
    try:
        return as_text(value)
    except ValueError as error:
        raise ValueError(f"The {what} is {error}; expected a text or a number.") from None


def _user_id(value: object) -> str:
    user_id = _text(value, "user_id")
    if user_id is None:
        raise ValueError("The record has no user_id.")
    return user_id


def _check_lamp_task(task: Task, source: str) -> None:
    if task.name not in PROFILE_FIELDS:
        known = ", ".join(PROFILE_FIELDS)
        raise ValueError(f"data.format {source!r} holds LaMP's tasks only; expected one of {known}, got {task.name!r}")


def _a_list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise ValueError(f"The record's {key} is {kind_of(value)}; expected a list.")
    return value


# --- the OPPU archive


def read_oppu(data: DataConfig, task: Task) -> Users:
    """`user_others.json` are the base users; the targets' file has another name for LaMP-7, and 49 to 101 users."""
    _check_lamp_task(task, data.format)
    folder = Path(data.path)
    names = ("user_top_100_history", "user_more_100_history")
    name = next((name for name in names if (folder / f"{name}.json").exists()), names[0])
    labels = [path for path in (folder / f"{other}_label.json" for other in (name, *names)) if path.exists()]
    golds = _read_golds(labels[0], task) if labels else {}
    for path, role in ((folder / "user_others.json", "base"), (folder / f"{name}.json", "target")):
        for user in json_array(path):
            if isinstance(user, Rejected):
                yield user
                continue
            found = user.get("user_id")
            try:
                user_id = _user_id(found)
                items = [_profile_item(item, task) for item in _a_list(user, "profile")]
                queries = [_archive_query(query, golds, task) for query in _a_list(user, "query")]
            except ValueError as error:
                yield Rejected(str(path), None, user_name(found), short(user), str(error))
                continue
            yield RawUser(str(path), None, {"user_id": user_id, "role": role, "history": items, "queries": queries})


def _archive_query(query: object, golds: dict[str, Any], task: Task) -> dict[str, Any]:
    """A query of the archive: the gold stands in it, or in the label file."""
    if not isinstance(query, dict):
        raise ValueError(f"The query {short(query)} is {kind_of(query)}; expected an object.")
    return _query(query, query.get("gold", golds.get(str(query.get("id")))), task)

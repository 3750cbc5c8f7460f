"""Chats with an assistant -> users: the exports of ChatGPT and Claude, and the data sets OASST and ShareGPT.

The user is who writes to the assistant. An export holds one person, so `data.user_name` only names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.core import Rejected
from oppu_ray.formats import exports, tables
from oppu_ray.formats.chats import NUM_TURNS_BEFORE, Turn, joined, reply_items
from oppu_ray.formats.raw import RawUser, Users, short
from oppu_ray.tasks import Task
from oppu_ray.values import as_text

USER = "user"
HUMANS = ("human", "user", "prompter")
USER_KEYS = ("user_id", "user", "hashed_ip")
"""Where data sets of shared chats name the person, if they do (WildChat: a hash of the address)."""


def read_chatgpt(data: DataConfig, task: Task) -> Users:
    """ChatGPT's export: `conversations.json`, in newer ones `conversations-000.json` ... Of every conversation, what is
    shown: the path from its last message to its first.
    """
    return _one_person(data, r"conversations(-\d+)?\.json", _chatgpt_turns)


def _chatgpt_turns(conversation: dict[str, Any]) -> Iterator[Turn]:
    mapping = conversation["mapping"]
    node_id = conversation.get("current_node") or max(mapping, key=lambda one: _created(mapping[one]))
    path: list[dict[str, Any]] = []
    seen = set[str]()
    while node_id in mapping and node_id not in seen:
        seen.add(node_id)
        path.append(mapping[node_id].get("message") or {})
        node_id = mapping[node_id].get("parent")
    for message in reversed(path):
        role, content = (message.get("author") or {}).get("role"), message.get("content") or {}
        is_hidden = (message.get("metadata") or {}).get("is_visually_hidden_from_conversation")
        if (
            role in ("user", "assistant")
            and not is_hidden
            and content.get("content_type") in ("text", "multimodal_text")
        ):
            text = "\n".join(part for part in content.get("parts") or [] if isinstance(part, str))
            yield Turn(str(message["id"]), role, text, message.get("create_time") or conversation.get("create_time"))


def _created(node: dict[str, Any]) -> float:
    return (node.get("message") or {}).get("create_time") or 0.0


def read_claude(data: DataConfig, task: Task) -> Users:
    """Claude's export: `conversations.json`."""
    return _one_person(data, r"conversations\.json", _claude_turns)


def _claude_turns(conversation: dict[str, Any]) -> Iterator[Turn]:
    for message in conversation["chat_messages"]:
        blocks = [block.get("text") or "" for block in message.get("content") or [] if block.get("type") == "text"]
        text = "\n".join(blocks) or message.get("text") or ""
        speaker = USER if message["sender"] in HUMANS else "assistant"
        yield Turn(str(message["uuid"]), speaker, text, message.get("created_at") or conversation.get("created_at"))


def _one_person(data: DataConfig, pattern: str, turns_of: Any) -> Users:
    path = Path(data.path)
    history: list[dict[str, Any]] = []
    for file in exports.find(path, pattern, f"{pattern.replace(chr(92), '')}, or the archive that holds it").values():
        conversations = exports.read_json(file)
        if not isinstance(conversations, list):
            raise ValueError(f"{file}: expected a list of conversations")
        for number, conversation in enumerate(conversations, start=1):
            try:
                history += _own_items(turns_of(conversation))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file}: conversation {number} is not as in a {data.format} export: {error!r}"
                ) from error
    yield RawUser(str(path), None, {"user_id": data.user_name or "me", "history": history})


def _own_items(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    return [item for speaker, item in reply_items(joined(turns)) if speaker == USER]


# --- data sets of shared chats


def read_sharegpt(data: DataConfig, task: Task) -> Users:
    """Conversations of {"from", "value"} or {"role", "content"} turns, as a JSON list, JSON lines or Parquet.

    Whose they are stands in one of `USER_KEYS`; where it does not, `data.user_name` says that all are of one person.
    """
    users: dict[str, list[dict[str, Any]]] = {}
    for path, line, record in tables.records(Path(data.path)):
        if isinstance(record, Rejected):
            yield record
            continue
        person = next((name for key in USER_KEYS if (name := as_text(record.get(key)))), data.user_name)
        if not person:
            known = ", ".join(USER_KEYS)
            raise ValueError(
                f"data.user_name: {path}: line {line}: no {known} says whose conversation this is; expected "
                "data.user_name, which makes all of them one person's"
            )
        turns = record.get("conversations") or record.get("conversation") or record.get("messages")
        try:
            items = _own_items(_shared_turns(f"{line}", turns))
        except (AttributeError, KeyError, TypeError) as error:
            reason = f"The conversation is not a list of turns with from and value, or role and content: {error!r}."
            yield Rejected(path, line, person, short(turns), reason)
            continue
        users.setdefault(person, []).extend(items)
    for person, history in users.items():
        yield RawUser(data.path, None, {"user_id": person, "history": history})


def _shared_turns(name: str, turns: Any) -> Iterator[Turn]:
    for number, turn in enumerate(turns):
        role, text = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
        if role != "system":
            time = turn.get("timestamp") or turn.get("created_at")
            yield Turn(f"{name}.{number}", USER if role in HUMANS else "assistant", str(text or ""), as_text(time))


def read_oasst(data: DataConfig, task: Task) -> Users:
    """OpenAssistant's messages, as JSON lines or Parquet, or its trees: a user's items are their prompts that answer
    somebody.
    """
    messages: dict[str, dict[str, Any]] = {}
    for _, _, record in tables.records(Path(data.path)):
        if isinstance(record, Rejected):
            yield record
            continue
        for message in _flat(record.get("prompt", record)):
            if message.get("text") and not message.get("deleted"):
                messages[str(as_text(message.get("message_id")))] = message
    users: dict[str, list[dict[str, Any]]] = {}
    for message_id, message in messages.items():
        person = as_text(message.get("user_id"))
        before = _ancestors(messages, message)
        if person and before and message.get("role") == "prompter":
            turns = [Turn(message_id, str(one.get("role")), str(one["text"])) for one in (*before, message)]
            *_, (_, item) = reply_items(turns)
            users.setdefault(person, []).append({**item, "id": message_id, "time": message.get("created_date")})
    for person, history in users.items():
        yield RawUser(data.path, None, {"user_id": person, "history": history})


def _flat(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A message and, in a tree, all replies under it."""
    waiting = [message]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += [{"parent_id": one.get("message_id"), **reply} for reply in one.get("replies") or ()]


def _ancestors(messages: dict[str, dict[str, Any]], message: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    parent = as_text(message.get("parent_id"))
    while parent in messages and len(found) < NUM_TURNS_BEFORE:
        found.append(messages[parent])
        parent = as_text(messages[parent].get("parent_id"))
    return found[::-1]

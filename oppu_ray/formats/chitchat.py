"""The embedded chats (BYU Chit-Chat Challenge 2018, MIT licence) -> users. Their wheel is read, not installed."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.files import fetch_wheel, oppu_home
from oppu_ray.formats.chats import Turn, reply_items
from oppu_ray.formats.raw import RawUser, Users
from oppu_ray.tasks import Task

CHITCHAT = "chitchat-dataset==0.9.0"


def read_chitchat(data: DataConfig, task: Task) -> Users:
    """A user's items are their turns that answer somebody, each with up to three turns before it.

    Conversations are lists of turns, turns lists of messages.

    Raises:
        ValueError: The file is not that wheel.
    """
    path = Path(data.path) if data.path else fetch_wheel(CHITCHAT, oppu_home() / "wheels")
    try:
        with zipfile.ZipFile(path) as wheel:
            conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    except (
        OSError,
        KeyError,
        ValueError,
        RecursionError,
        NotImplementedError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path}: expected the {CHITCHAT} wheel: {error}") from error
    histories: dict[str, list[dict[str, Any]]] = {}
    try:
        for conversation_id, conversation in conversations.items():
            for speaker, item in reply_items(_turns(conversation_id, conversation)):
                histories.setdefault(speaker, []).append(item)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: a conversation is not as in {CHITCHAT}: {error!r}") from error
    return iter([RawUser(str(path), None, {"user_id": one, "history": items}) for one, items in histories.items()])


def _turns(conversation_id: str, conversation: dict[str, Any]) -> Iterator[Turn]:
    for number, messages in enumerate(conversation["messages"]):
        text = " ".join(message["text"].strip() for message in messages).strip()
        yield Turn(f"{conversation_id}.{number}", messages[0]["sender"], text, messages[0]["timestamp"])

"""A user's history over HTTP: add items, show the newest (arrow JSON <-> vault).

In: a verified user and a request's body. Out: JSON. `serve.account` calls this in a thread for small bodies, and
`serve.chores` in another process for large ones: parsing and checking half a megabyte would keep other users waiting.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from oppu_ray.config import Config
from oppu_ray.core import InputError
from oppu_ray.registry import UserHash
from oppu_ray.tasks import get_task, needed_field
from oppu_ray.vault import Vault, encode_items
from serve.bodies import MAX_ITEMS_PER_REQUEST, NewItems, first_problem
from serve.messages import Failed

MAX_SHOWN_BYTES = 2 * 2**20
"""Of items shown at once: the event loop takes milliseconds to send so much."""


def add_items(
    vault: Vault, config: Config, user_hash: UserHash, generation: int | None, body: bytes
) -> dict[str, Any] | Failed:
    """Add the items of a `NewItems` body; returns how many the history has now, and the ids of the new ones.

    Args:
        generation: The user's when the token was verified; a user forgotten since then is refused.

    Returns:
        What to answer; `Failed` where the body is malformed or the history full.

    Raises:
        InputError: An item is of no use to the run's task, or its id is there already.
        Refused: The user, or items of theirs, were forgotten meanwhile.
    """
    try:
        items = [new.item() for new in NewItems.model_validate(json.loads(body)).items]
    except ValidationError as error:
        place, problem = first_problem(error.errors(include_url=False, include_context=False, include_input=False))
        return Failed(400, "bad_request", f"{place or 'body'}: {problem}", place or None)
    except (ValueError, RecursionError):
        return Failed(400, "bad_request", "body: JSON decode error")
    task, options = get_task(config.task), config.serve
    for item in items:
        if field := needed_field(task, item):
            raise InputError(f"item {item.item_id!r}: {task.name} needs the field {field!r}")
        if task.labels and item.label and item.label not in task.labels:
            raise InputError(f"item {item.item_id!r}: label: expected one of {', '.join(task.labels)}")
    held = vault.history(user_hash)
    if held.num_items + len(items) > options.max_items:
        return Failed(400, "history_full", f"expected at most {options.max_items} items in a history")
    if held.num_bytes + len(encode_items(items)) > options.max_history_bytes:
        return Failed(400, "history_full", f"expected at most {options.max_history_bytes} bytes in a history")
    num_items = vault.append_history(user_hash, items, generation=generation)
    return {"num_items": num_items, "item_ids": [item.item_id for item in items]}


def newest_items(vault: Vault, user_hash: UserHash, limit: int) -> bytes:
    """The newest `limit` items, oldest first, as JSON; fewer where they are more than `MAX_SHOWN_BYTES`."""
    num_items = vault.history(user_hash).num_items
    shown: list[bytes] = []
    num_bytes = 0
    for item in reversed(vault.read_history(user_hash, min(limit, MAX_ITEMS_PER_REQUEST)) if limit > 0 else ()):
        line = json.dumps(asdict(item), ensure_ascii=False).encode()
        num_bytes += len(line)
        if shown and num_bytes > MAX_SHOWN_BYTES:
            break
        shown.append(line)
    return b'{"num_items": %d, "items": [%s]}' % (num_items, b", ".join(reversed(shown)))

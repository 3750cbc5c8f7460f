"""The JSON that requests bring, as far as more than one process reads it, and what is said of one that is malformed.

In: a request's body. Out: checked values. No HTTP here: `serve.chores` reads bodies in another process.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from oppu_ray.core import Item

MAX_BODY_BYTES = 512 * 1024
MAX_ITEMS_PER_REQUEST = 1000
_UNION_PART = re.compile(r"constrained-str|list\[.*\]")
"""What Pydantic puts among the names of fields where a field may have several types."""


class Body(BaseModel):
    """A request body: unknown fields are errors, and a null is as if the field were not there, as clients send it."""

    # Pydantic takes a lone surrogate, unless it has to look into the text, for its length say.
    model_config = ConfigDict(extra="forbid", str_max_length=MAX_BODY_BYTES)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return (
            {key: value for key, value in fields.items() if value is not None} if isinstance(fields, dict) else fields
        )


class NewItem(Body):
    """One thing the user did; which fields count depends on the task. `item_id` and `time` are filled in if missing."""

    model_config = ConfigDict(str_strip_whitespace=True)

    item_id: str | None = Field(None, min_length=1, max_length=200)
    time: str | None = Field(None, max_length=40)
    text: str = ""
    label: str | None = None
    title: str | None = None
    abstract: str | None = None
    keywords: str | None = None
    context: list[str] = Field([], max_length=200)
    options: list[str] = Field([], max_length=20)

    def item(self) -> Item:
        now = datetime.now(UTC)
        return Item(
            self.item_id or f"{now:%Y%m%d%H%M%S}-{uuid.uuid4().hex[:8]}",
            self.time or now.isoformat(timespec="seconds"),
            self.text,
            self.label,
            self.title,
            self.abstract,
            self.keywords,
            tuple(filter(None, self.context)),
            tuple(filter(None, self.options)),
        )


class NewItems(Body):
    """Items to add to the history, oldest first."""

    items: list[NewItem] = Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)


def _inlined(model: type[BaseModel], part: str) -> dict[str, Any]:
    """A model's JSON schema without references, for a route that parses its own body."""
    schema = model.model_json_schema()
    schema["properties"][part]["items"] = schema.pop("$defs").popitem()[1]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


JSON_OF_ITEMS = _inlined(NewItems, "items")
"""`NewItems`, for OpenAPI."""


def first_problem(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The first of Pydantic's errors for the client: (place, or "" for the whole body; what is wrong)."""
    # In a union, other parts may fail before the text does.
    first = min(errors, key=lambda one: one["type"] != "string_unicode")
    parts = [str(part) for part in first["loc"] if not _UNION_PART.fullmatch(str(part))]
    place = "" if first["type"] == "json_invalid" else ".".join(parts)
    return place, "a lone surrogate; expected Unicode" if first["type"] == "string_unicode" else first["msg"]

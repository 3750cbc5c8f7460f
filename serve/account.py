"""The routes about oneself (`/v1/me`) and, for an operator, about users and tokens (`/v1/admin`): HTTP <-> vault.

In: the verified token; it alone says whose data is read or changed. Out: JSON, or the user's archive as a zip file.
A reader might question `/v1/admin` being this small: what can be done offline (import, verify, gc) is done by `oppu
users`, where a mistake does not need a network.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from oppu_ray.archive import export_user
from oppu_ray.core import Item
from oppu_ray.forget import forget_items, forget_user
from oppu_ray.registry import Token, UserHash
from oppu_ray.tasks import get_task, needed_field
from oppu_ray.vault import Vault
from serve.api import Body, User
from serve.guard import RETRY_AFTER_S, error, signed_in
from serve.messages import Backend

MAX_ITEMS_PER_REQUEST = 1000
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

me = APIRouter(prefix="/v1/me", tags=["me"])
admin = APIRouter(prefix="/v1/admin", tags=["operator"])
Operator = Annotated[Token, Depends(signed_in("operator"))]


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


class ItemIds(Body):
    """Items to forget."""

    item_ids: list[str] = Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)


class UserId(Body):
    """A user by the id under which the service knows them elsewhere."""

    user_id: str = Field(min_length=1, max_length=256)


class NewToken(UserId):
    """A token for a user; `ttl_s` in seconds, None: valid until revoked."""

    ttl_s: float | None = Field(None, gt=0, allow_inf_nan=False)


def _backend(request: Request) -> Backend:
    return request.app.state.backend


def _of(token: Token) -> UserHash:
    assert token.user_hash is not None  # a user's token has one
    return token.user_hash


def _run_folders(request: Request) -> list[Path]:
    """Where, beside the vault, something of a user may be: histories, checkpoints and predictions of the run."""
    run_dir = Path(request.app.state.config.run_dir)
    return [run_dir] if run_dir.is_dir() else []


@me.get("")
async def status(request: Request, user: User) -> dict[str, Any]:
    """What the service holds of the user: adapter version, number of items, training under way."""
    backend, user_hash = _backend(request), _of(user)
    refresh = await backend.refresh_status(user_hash)

    def read() -> dict[str, Any]:
        current = backend.vault.registry.current(user_hash)
        task = get_task(request.app.state.config.task)
        return {
            "user": user_hash[:12],
            "task": task.name,
            "inputs": [field for field, _ in task.inputs],
            "target": task.target,
            "labels": task.labels,
            "adapter_version": current.version if current else None,
            "num_items": len(backend.vault.read_history(user_hash)),
        }

    return {**await run_in_threadpool(read), "refresh": asdict(refresh)}


@me.get("/versions")
def versions(request: Request, user: User) -> dict[str, Any]:
    """All adapter versions, oldest first."""
    registry, user_hash = _backend(request).vault.registry, _of(user)
    current = registry.current(user_hash)
    rows = [
        {
            "version": row.version,
            "created_at": row.created_at,
            "is_good": row.is_good,
            "is_current": current is not None and row.version == current.version,
        }
        for row in registry.versions(user_hash)
    ]
    return {"versions": rows}


@me.post("/rollback")
def rollback(request: Request, user: User) -> dict[str, str]:
    """Make the good version before the current one current."""
    return {"adapter_version": _backend(request).vault.rollback(_of(user))}


@me.get("/history")
def history(request: Request, user: User, limit: int = 100) -> dict[str, Any]:
    """The newest `limit` items, oldest first."""
    items = _backend(request).vault.read_history(_of(user))
    shown = items[-min(limit, MAX_ITEMS_PER_REQUEST) :] if limit > 0 else ()
    return {"num_items": len(items), "items": [asdict(item) for item in shown]}


@me.post("/history")
def append(request: Request, user: User, body: NewItems) -> dict[str, Any]:
    """Add items; they are retrieved at once, and learnt at the next refresh."""
    config = request.app.state.config
    task, items = get_task(config.task), [new.item() for new in body.items]
    for item in items:
        if field := needed_field(task, item):
            raise error(400, "bad_request", f"item {item.item_id!r}: {task.name} needs the field {field!r}")
        if task.labels and item.label and item.label not in task.labels:
            raise error(400, "bad_request", f"item {item.item_id!r}: label: expected one of {', '.join(task.labels)}")
    vault = _backend(request).vault
    if len(vault.read_history(_of(user))) + len(items) > config.serve.max_items:
        raise error(400, "history_full", f"expected at most {config.serve.max_items} items in a history")
    num_items = vault.append_history(_of(user), items, generation=user.generation)
    return {"num_items": num_items, "item_ids": [item.item_id for item in items]}


@me.post("/history/forget")
async def forget_some(request: Request, user: User, body: ItemIds) -> dict[str, Any]:
    """Remove items, and every adapter version that was trained on them; then `refresh` trains without them."""
    backend, user_hash = _backend(request), _of(user)
    receipt = await run_in_threadpool(forget_items, backend.vault, user_hash, body.item_ids, _run_folders(request))
    await backend.forget(user_hash)
    return asdict(receipt)


@me.post("/refresh", status_code=202)
async def refresh(request: Request, user: User) -> dict[str, Any]:
    """Train the user's adapter anew on the whole history, in the background."""
    started = await _backend(request).start_refresh(_of(user))
    if started.state == "refused":
        raise error(503, "queue_full", "too many users wait to be trained; try again later", 60)
    if started.state == "unknown":
        raise error(503, "trainer_lost", "the trainer is being replaced; try again", RETRY_AFTER_S)
    return asdict(started)


@me.get("/refresh")
async def refresh_status(request: Request, user: User) -> dict[str, Any]:
    """How far the training has come."""
    return asdict(await _backend(request).refresh_status(_of(user)))


@me.get("/export", response_class=Response)
def export(request: Request, user: User) -> Response:
    """Everything of the user as a zip file; its `adapter/` is a plain PEFT folder."""
    with tempfile.TemporaryDirectory(prefix="oppu-export-", dir=_MEMORY) as folder:
        path = Path(folder) / "user.zip"
        export_user(_backend(request).vault, _of(user), path)
        content = path.read_bytes()
    headers = {"content-disposition": 'attachment; filename="oppu-export.zip"'}
    return Response(content, media_type="application/zip", headers=headers)


@me.delete("")
async def forget(request: Request, user: User) -> dict[str, Any]:
    """Remove everything of the user, tokens included; the receipt is signed, keep it."""
    backend, user_hash = _backend(request), _of(user)
    receipt = await run_in_threadpool(forget_user, backend.vault, user_hash, _run_folders(request))
    await backend.forget(user_hash)
    return asdict(receipt)


@admin.get("/users")
def users(request: Request, operator: Operator) -> dict[str, Any]:
    """All users by their hash, oldest first."""
    return {"users": [asdict(user) for user in _backend(request).vault.registry.users()]}


@admin.post("/users", status_code=201)
def add_user(request: Request, operator: Operator, body: UserId) -> dict[str, Any]:
    """Register a user; nothing happens if they are there."""
    vault: Vault = _backend(request).vault
    vault.add_users([body.user_id])
    return {"user_hash": vault.user_hash(body.user_id)}


@admin.get("/tokens")
def tokens(request: Request, operator: Operator) -> dict[str, Any]:
    """All tokens without their secrets."""
    return {"tokens": [asdict(token) for token in _backend(request).vault.registry.tokens()]}


@admin.post("/tokens", status_code=201)
def create_token(request: Request, operator: Operator, body: NewToken) -> dict[str, Any]:
    """A new token for a user; it is shown this once."""
    vault: Vault = _backend(request).vault
    return {"token": vault.registry.create_token("user", vault.user_hash(body.user_id), body.ttl_s)}


@admin.delete("/tokens/{token_id}", status_code=204)
def revoke_token(request: Request, operator: Operator, token_id: str) -> None:
    """End a token at once."""
    _backend(request).vault.registry.revoke_token(token_id)


@admin.get("/audit")
def audit(request: Request, operator: Operator, limit: int = 100) -> dict[str, Any]:
    """The newest lines of the audit log, and whether its chain holds."""
    registry = _backend(request).vault.registry
    lines = [{**asdict(entry), "detail": json.loads(entry.detail)} for entry in registry.audit_log()]
    return {"broken": registry.verify_audit(), "entries": lines[-limit:] if limit > 0 else []}

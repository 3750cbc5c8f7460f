"""The routes about oneself (`/v1/me`) and, for an operator, about users and tokens (`/v1/admin`): HTTP <-> vault.

In: the verified token; it alone says whose data is read or changed. Out: JSON, or the user's archive as a zip file.
A reader might question `/v1/admin` being this small: what can be done offline (import, verify, gc) is done by `oppu
users`, where a mistake does not need a network.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field

from oppu_ray.config import Config
from oppu_ray.registry import Token, UserHash
from oppu_ray.tasks import get_task
from oppu_ray.vault import Vault
from serve.api import User
from serve.bodies import JSON_OF_ITEMS, MAX_ITEMS_PER_REQUEST, Body
from serve.guard import RETRY_AFTER_S, Bounds, error, error_of, signed_in
from serve.history import add_items
from serve.messages import Backend, Failed

SMALL_BODY_BYTES = 16 * 1024
"""Items that take more are parsed, checked and stored in another process."""

me = APIRouter(prefix="/v1/me", tags=["me"])
admin = APIRouter(prefix="/v1/admin", tags=["operator"])
Operator = Annotated[Token, Depends(signed_in("operator"))]


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


def _vault(request: Request) -> Vault:
    return _backend(request).vault


def _bounds(request: Request) -> Bounds:
    return request.app.state.bounds


def _of(token: Token) -> UserHash:
    assert token.user_hash is not None  # a user's token has one
    return token.user_hash


def _run_folders(request: Request) -> list[Path]:
    """Where, beside the vault, something of a user may be: histories, checkpoints and predictions of the run."""
    run_dir = Path(request.app.state.config.run_dir)
    return [run_dir] if run_dir.is_dir() else []


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


@me.get("")
async def status(request: Request, user: User) -> dict[str, Any]:
    """What the service holds of the user: adapter version, number of items, training under way."""
    vault, user_hash = _vault(request), _of(user)
    refresh = await _backend(request).refresh_status(user_hash)

    def read() -> dict[str, Any]:
        current = vault.registry.current(user_hash)
        task = get_task(request.app.state.config.task)
        return {
            "user": user_hash[:12],
            "task": task.name,
            "inputs": [field for field, _ in task.inputs],
            "target": task.target,
            "labels": task.labels,
            "adapter_version": current.version if current else None,
            "num_items": vault.history(user_hash).num_items,
        }

    return {**await _bounds(request).run(user, read), "refresh": asdict(refresh)}


@me.get("/versions")
async def versions(request: Request, user: User) -> dict[str, Any]:
    """All adapter versions, oldest first."""
    registry, user_hash = _vault(request).registry, _of(user)

    def read() -> list[dict[str, Any]]:
        current = registry.current(user_hash)
        return [
            {
                "version": row.version,
                "created_at": row.created_at,
                "is_good": row.is_good,
                "is_current": current is not None and row.version == current.version,
            }
            for row in registry.versions(user_hash)
        ]

    return {"versions": await _bounds(request).run(user, read)}


@me.post("/rollback")
async def rollback(request: Request, user: User) -> dict[str, str]:
    """Make the good version before the current one current."""
    return {"adapter_version": await _bounds(request).run(user, _vault(request).rollback, _of(user))}


@me.get("/history", response_class=Response)
async def history(request: Request, user: User, limit: int = 100) -> Response:
    """The newest `limit` items, oldest first; fewer if they are long."""
    return _json(await _bounds(request).run_apart(user, "newest_items", _of(user), limit))


@me.post("/history", openapi_extra=JSON_OF_ITEMS)
async def append(request: Request, user: User) -> dict[str, Any]:
    """Add items; they are retrieved at once, and learnt at the next refresh."""
    body = await request.body()
    about = (_of(user), user.generation, body)
    if len(body) <= SMALL_BODY_BYTES:
        config: Config = request.app.state.config
        done = await _bounds(request).run(user, add_items, _vault(request), config, *about)
    else:
        done = await _bounds(request).run_apart(user, "add_items", *about)
    if isinstance(done, Failed):
        raise error_of(done)
    return done


@me.post("/history/forget")
async def forget_some(request: Request, user: User, body: ItemIds) -> dict[str, Any]:
    """Remove items, and every adapter version that was trained on them; then `refresh` trains without them."""
    folders = _run_folders(request)
    return await _bounds(request).run_apart(user, "forget_items", _of(user), body.item_ids, folders)


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
async def export(request: Request, user: User) -> Response:
    """Everything of the user as a zip file; its `adapter/` is a plain PEFT folder."""
    content = await _bounds(request).run_apart(user, "export", _of(user))
    headers = {"content-disposition": 'attachment; filename="oppu-export.zip"'}
    return Response(content, media_type="application/zip", headers=headers)


@me.delete("")
async def forget(request: Request, user: User) -> dict[str, Any]:
    """Remove everything of the user, tokens included; the receipt is signed, keep it."""
    return await _bounds(request).run_apart(user, "forget_user", _of(user), _run_folders(request))


@admin.get("/users", response_class=Response)
async def users(request: Request, operator: Operator) -> Response:
    """All users by their hash, oldest first."""
    return _json(await _bounds(request).run_apart(operator, "users"))


@admin.post("/users", status_code=201)
async def add_user(request: Request, operator: Operator, body: UserId) -> dict[str, Any]:
    """Register a user; nothing happens if they are there."""
    vault = _vault(request)
    user_hash = vault.user_hash(body.user_id)
    await _bounds(request).run(operator, vault.add_users, [user_hash])
    return {"user_hash": user_hash}


@admin.get("/tokens", response_class=Response)
async def tokens(request: Request, operator: Operator) -> Response:
    """All tokens without their secrets."""
    return _json(await _bounds(request).run_apart(operator, "tokens"))


@admin.post("/tokens", status_code=201)
async def create_token(request: Request, operator: Operator, body: NewToken) -> dict[str, Any]:
    """A new token for a user; it is shown this once."""
    vault = _vault(request)
    user_hash = vault.user_hash(body.user_id)
    create = vault.registry.create_token
    return {"token": await _bounds(request).run(operator, create, "user", user_hash, body.ttl_s)}


@admin.delete("/tokens/{token_id}", status_code=204)
async def revoke_token(request: Request, operator: Operator, token_id: str) -> None:
    """End a token at once."""
    await _bounds(request).run(operator, _vault(request).registry.revoke_token, token_id)


@admin.get("/audit", response_class=Response)
async def audit(request: Request, operator: Operator, limit: int = 100) -> Response:
    """The newest lines of the audit log, and whether its chain holds."""
    return _json(await _bounds(request).run_apart(operator, "audit", limit))

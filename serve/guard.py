"""What stands before every route: who asks, how much they may send, and how an error looks.

In: raw HTTP. Out: a verified `Token` for the routes, or a JSON error.
A reader might question that the middleware reads the whole body first: bodies are small (`MAX_BODY_BYTES`), and so the
limits on size and on slow senders hold for every route, whatever the length header says.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oppu_ray.registry import Token
from serve.messages import Backend, Failed, failure_of

MAX_BODY_BYTES = 512 * 1024
BODY_TIMEOUT_S = 20.0
RETRY_AFTER_S = 1
_UNION_PART = re.compile(r"constrained-str|list\[.*\]")
"""What Pydantic puts among the names of fields where a field may have several types."""
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def error_body(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in the form that OpenAI's clients read."""
    content = {"message": message, "type": code, "param": param, "code": code}
    # A key of the body, which the message names, may have a lone surrogate.
    return {"error": {name: text and text.encode(errors="backslashreplace").decode() for name, text in content.items()}}


def error(status: int, code: str, message: str, retry_after_s: int | None = None) -> HTTPException:
    """An HTTP error with a JSON body."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return HTTPException(status, error_body(code, message), headers)


def error_of(failed: Failed) -> HTTPException:
    """A failure as an HTTP error; a client may try again where it is overload or a fault that passes."""
    retry_after_s = RETRY_AFTER_S if failed.status in (429, 503) else None
    return error(failed.status, failed.code, failed.message, retry_after_s)


def signed_in(*roles: str) -> Callable[[Request], Coroutine[Any, Any, Token]]:
    """A dependency that gives the verified token, if it has one of `roles`; this is the only source of identity."""

    async def verify(request: Request) -> Token:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        backend: Backend = request.app.state.backend
        token = None
        if scheme.lower() == "bearer":
            token = await run_in_threadpool(backend.vault.registry.verify_token, secret.strip())
        if token is None:
            raise error(401, "invalid_token", "expected 'Authorization: Bearer <token>' with a valid token")
        if token.role not in roles:
            raise error(403, "forbidden", f"a {token.role}'s token cannot do this; expected: {', '.join(roles)}")
        return token

    return verify


class Guard:
    """ASGI middleware: reads the body up to a limit before the app sees it, and adds the security headers.

    What the app raises ends here, and becomes what `failure_of` says: Starlette and Serve would log the traceback, and
    it can hold a user's text.

    Args:
        count: Called with (path of the route, status) of every response.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]):
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        is_started = False

        async def send_safely(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                own = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
                route = scope.get("route")
                self.count(getattr(route, "path", "unknown"), message["status"])
            await send(message)

        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _read(receive)
        except TimeoutError:
            body = None
            refusal = JSONResponse(error_body("slow_body", f"the body took longer than {BODY_TIMEOUT_S:g} s"), 408)
        else:
            message = f"the body is larger than {MAX_BODY_BYTES} bytes"
            refusal = JSONResponse(error_body("body_too_large", message), 413)
        if body is None:
            await refusal(scope, receive, send_safely)
            return
        pending = [body]

        async def replay() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        try:
            await self.app(scope, replay, send_safely)
        except Exception as fault:
            failed = failure_of(fault, getattr(scope.get("route"), "path", "unknown"))
            if not is_started:
                refused = error_of(failed)
                await JSONResponse(refused.detail, refused.status_code, refused.headers)(scope, replay, send_safely)


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None if it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def add_error_handlers(app: FastAPI) -> None:
    """Every error becomes JSON: what was found, what is expected, and never the text that was sent."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, reason: StarletteHTTPException) -> JSONResponse:
        body: Any = reason.detail
        if not isinstance(body, dict):
            body = error_body("bad_request" if reason.status_code == 400 else "http_error", str(reason.detail))
        return JSONResponse(body, reason.status_code, reason.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, reason: RequestValidationError) -> JSONResponse:
        # In a union, other parts may fail before the text does.
        first = min(reason.errors(), key=lambda one: one["type"] != "string_unicode")
        parts = [str(part) for part in first["loc"][1:] if not _UNION_PART.fullmatch(str(part))]
        place = "" if first["type"] == "json_invalid" else ".".join(parts)
        what = "a lone surrogate; expected Unicode" if first["type"] == "string_unicode" else first["msg"]
        return JSONResponse(error_body("bad_request", f"{place or 'body'}: {what}", place or None), 400)

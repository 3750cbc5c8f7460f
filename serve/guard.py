"""What stands before every route: identity, bounds per user, the body's size, and how an error looks.

In: raw HTTP. Out: a verified `Token` for the routes, or a JSON error.

Design: a request is bounded before anything is done for it. A token that was good lately names the user whose place and
turn the request takes, so a refusal costs neither a look-up nor a body; the token is then verified all the same. A
refusal is held back for the user's next turn: a client that repeats at once gets twenty of them a second, however many
connections it has.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oppu_ray.config import Config
from oppu_ray.registry import Token
from oppu_ray.vault import Vault
from serve.bodies import MAX_BODY_BYTES, first_problem
from serve.child import ChildPool
from serve.chores import Chores
from serve.fair import MAX_KEYS, Busy, FairThreads, Places, Turns
from serve.messages import Backend, Failed, failure_of

BODY_TIMEOUT_S = 20.0
VERIFY_TIMEOUT_S = 10.0
RETRY_AFTER_S = 1
REFUSAL_S = 0.05
"""Between two refusals to one user: what a client in a loop costs the event loop is then a few per cent."""

BURST_S = 0.25
"""A user who was idle may use so much at once: 25 requests, or an expensive one, before the next waits for its turn."""

MAX_WAIT_S = 2.5
"""No request waits longer for the turn of its user."""

MAX_REFUSED = 256
"""Refusals of one user that are held back at a time; more are sent at once, and each costs its client a connection."""

MAX_PER_ADDRESS = 256
"""Requests without a user (the page and its files) under way for one address: many users may share it."""

NUM_VERIFIERS, NUM_WORKERS, NUM_CHILDREN = 4, 8, 3
COST_FACTOR = 4.0
"""A user's next request waits so many times what the last one cost: at most a fifth of this process is one user's."""

PARSE_S_PER_BYTE = 1 / 250e3
"""What a byte of a body costs its user: many small values take 5 MB/s to check, on the event loop, and rarely may."""
PARSED_APART = ("/v1/me/history",)
PUBLIC, PUBLIC_FOLDER = ("/", "/docs", "/openapi.json"), "/static/"
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

T = TypeVar("T")


def error_body(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in the form that OpenAI's clients read."""
    content = {"message": message, "type": code, "param": param, "code": code}
    # A key of the body, which the message names, may have a lone surrogate.
    return {"error": {name: text and text.encode(errors="backslashreplace").decode() for name, text in content.items()}}


def error(
    status: int, code: str, message: str, retry_after_s: int | None = None, param: str | None = None
) -> HTTPException:
    """An HTTP error with a JSON body."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return HTTPException(status, error_body(code, message, param), headers)


def error_of(failed: Failed) -> HTTPException:
    """A failure as an HTTP error; a client may try again where it is overload or a fault that passes."""
    retry_after_s = RETRY_AFTER_S if failed.status in (429, 503) else None
    return error(failed.status, failed.code, failed.message, retry_after_s, failed.param)


def signed_in(*roles: str) -> Callable[[Request], Coroutine[Any, Any, Token]]:
    """A dependency that gives the token that `Guard` has verified, if it has one of `roles`."""

    async def check(request: Request) -> Token:
        token: Token = request.state.token
        if token.role not in roles:
            raise error(403, "forbidden", f"a {token.role}'s token cannot do this; expected: {', '.join(roles)}")
        return token

    return check


class Bounds:
    """How much one user gets of this process, and the threads and processes in which their blocking calls run."""

    def __init__(self, config: Config, vault: Vault):
        self.places = Places(config.serve.requests_per_user)
        self.addresses = Places(MAX_PER_ADDRESS)
        self.turns = Turns(1 / config.serve.requests_per_s, BURST_S, MAX_WAIT_S)
        self.refusals, self.refused = Turns(REFUSAL_S, 0.0, MAX_WAIT_S), Places(MAX_REFUSED)
        self._verifying = FairThreads("verify", NUM_VERIFIERS)
        self._working = FairThreads("work", NUM_WORKERS)
        self.chores = ChildPool(NUM_CHILDREN, Chores, config, vault.root, vault.registry.url)

    async def verify(self, key: str, verify: Callable[[str], Token | None], secret: str) -> Token | None:
        """Verify a token for `key`, in threads of which another key takes one at most. `Busy` if it takes too long."""
        try:
            async with asyncio.timeout(VERIFY_TIMEOUT_S):
                return await asyncio.wrap_future(self._verifying.submit(key, verify, secret))
        except TimeoutError:
            raise Busy from None

    async def run(self, token: Token, function: Callable[..., T], *args: Any) -> T:
        """Run what blocks, in a thread; the user's next request waits longer for what it cost."""
        result, cost_s = await asyncio.wrap_future(self._working.submit(key_of(token), _timed, function, args))
        self.turns.charge(key_of(token), COST_FACTOR * cost_s)
        return result

    async def run_apart(self, token: Token, method: str, *args: Any) -> Any:
        """Call a method of `Chores`, in a process of its own."""
        return await asyncio.wrap_future(self.chores.submit(key_of(token), method, *args))


def _timed(function: Callable[..., T], args: tuple[Any, ...]) -> tuple[T, float]:
    began = time.thread_time()
    return function(*args), time.thread_time() - began


def key_of(token: Token) -> str:
    """Whose bounds a token's requests count towards."""
    return token.user_hash or token.token_id


class Guard:
    """ASGI middleware: bounds, verifies, reads the body up to a limit, and adds the security headers.

    What the app raises ends here, and becomes what `failure_of` says: Starlette and Serve would log the traceback, and
    it can hold a user's text.

    Args:
        count: Called with (path of the route, status) of every response.
    """

    def __init__(self, app: ASGIApp, backend: Backend, bounds: Bounds, count: Callable[[str, int], None]):
        self.app, self.backend, self.bounds, self.count = app, backend, bounds, count
        self._known: OrderedDict[bytes, str] = OrderedDict()  # SHA-256 of tokens that were good lately -> `key_of`

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
            await self._serve(scope, receive, send_safely)
        except Exception as fault:
            where = getattr(scope.get("route"), "path", "unknown")
            refusal = fault if isinstance(fault, HTTPException) else error_of(failure_of(fault, where))
            if not is_started:
                response = JSONResponse(refusal.detail, refusal.status_code, refusal.headers)
                await response(scope, receive, send_safely)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or raise the HTTPException that refuses it."""
        bounds, address = self.bounds, f"address {(scope.get('client') or ('unknown',))[0]}"
        if scope["path"] in PUBLIC or scope["path"].startswith(PUBLIC_FOLDER):
            with bounds.addresses.take(address):
                await bounds.turns.wait(address)
                await self.app(scope, receive, send)
            return
        secret = _bearer(scope)
        digest = hashlib.sha256(secret.encode()).digest()
        token = None
        if (key := self._known.get(digest)) is None:
            token = await self._verify(address, digest, secret)
            key = key_of(token)
        if bounds.places.is_full(key):
            message = f"you have {bounds.places.per_key} requests under way; wait for one of them"
            await self._refuse(key, error(429, "too_many_requests", message, RETRY_AFTER_S))
        with bounds.places.take(key):
            await bounds.turns.wait(key)
            scope.setdefault("state", {})["token"] = token or await self._verify(key, digest, secret)
            body = await _read(receive)
            if scope["path"] not in PARSED_APART:
                bounds.turns.charge(key, len(body) * PARSE_S_PER_BYTE)
            pending = [body]

            async def replay() -> Message:
                if pending:
                    return {"type": "http.request", "body": pending.pop(), "more_body": False}
                return await receive()

            await self.app(scope, replay, send)

    async def _verify(self, key: str, digest: bytes, secret: str) -> Token:
        """The token that `secret` is, else 401 at the next turn of `key`."""
        token = await self.bounds.verify(key, self.backend.vault.registry.verify_token, secret)
        if token is None:
            self._known.pop(digest, None)
            message = "expected 'Authorization: Bearer <token>' with a valid token"
            await self._refuse(key, error(401, "invalid_token", message))
        self._known[digest] = key_of(token)
        if len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)
        return token

    async def _refuse(self, key: str, refusal: HTTPException) -> NoReturn:
        """Raise `refusal` at the next turn of `key`; at once if too many of them wait already."""
        bounds = self.bounds
        if not bounds.refused.is_full(key):
            with bounds.refused.take(key):
                await bounds.refusals.wait(key)
        raise refusal


def _bearer(scope: Scope) -> str:
    scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


async def _read(receive: Receive) -> bytes:
    """The whole body; 413 if it is too large, 408 if it takes too long, whatever its length header says."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise error(413, "body_too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise error(408, "slow_body", f"the body took longer than {BODY_TIMEOUT_S:g} s") from None


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
        errors = [{**one, "loc": one["loc"][1:]} for one in reason.errors()]  # without "body"
        place, problem = first_problem(errors)
        return JSONResponse(error_body("bad_request", f"{place or 'body'}: {problem}", place or None), 400)

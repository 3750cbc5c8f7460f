"""What crosses between the ingress and the engine deployment: one `Ask` in, a stream of events out (no torch, no Ray).

Design: errors are events, not exceptions. An exception crosses processes with its traceback, which can hold a user's
text. A `Failed` holds what the client may read and nothing else; `failure_of` makes one from any exception.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from typing import Protocol

from oppu_ray.core import MAX_LOGPROBS, InputError, Item, check_unicode
from oppu_ray.registry import Forgotten, Refused, RegistryError
from oppu_ray.vault import CorruptError, DiskError, Vault
from serve.child import places_of
from serve.fair import Busy

MAX_TOP_K = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Ask:
    """One question of one user.

    Args:
        user_hash: From the verified token, never from the request.
        generation: The user's when the token was verified; None: whoever is called so now.
        question: A text to continue, a chat, or an item of the run's task, asked as in training.
        use_adapter: Answer with the user's own adapter; False means the shared model.
        top_k: How many of the user's own items to put in the prompt (items only).
        max_tokens: Most tokens to generate; None: what evaluation or the service allows, or less if no more fit.
        num_logprobs: How many alternatives per token to report; None: no log-probabilities at all.
        stream: Whether pieces are wanted as they come, or the text at the end.
        deadline_s: Seconds from now after which nobody waits for the answer.
    """

    request_id: str
    user_hash: str
    question: str | tuple[Turn, ...] | Item
    use_adapter: bool = True
    top_k: int = 0
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    stream: bool = False
    deadline_s: float = 60.0
    generation: int | None = None


@dataclass(frozen=True)
class Started:
    """The first event of an answer: what it is made of.

    Args:
        version: Of the user's adapter; None for the shared model.
        fallback: Why it is not the user's current adapter, or "".
        items: The user's own items in the prompt, best first, as (item id, line of the prompt).
        load_s: Seconds from the question's arrival until adapter and prompt were ready.
        replica: Which replica answers.
    """

    version: str | None
    fallback: str
    items: tuple[tuple[str, str], ...]
    num_prompt_tokens: int
    load_s: float
    replica: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability, and of the likeliest alternatives."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next piece of the answer; a token that is half a character brings no text yet."""

    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event. `reason` is "stop" or "length"; times in seconds from the question's arrival at the replica."""

    reason: str
    first_token_s: float
    total_s: float


@dataclass(frozen=True)
class Failed:
    """The last event of an answer that failed: HTTP status, a code for programs and a message for people.

    `param`: the field of the request that is wrong, if one is.
    """

    status: int
    code: str
    message: str
    param: str | None = None


Event = Started | Delta | Finished | Failed
INTERNAL_ERROR = Failed(500, "internal_error", "the request failed; it is logged")

_INTEGERS = {
    "top_k": (0, MAX_TOP_K),
    "max_tokens": (1, 2**31),
    "seed": (-(2**63), 2**63 - 1),
    "num_logprobs": (0, MAX_LOGPROBS),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    **_INTEGERS,
    "temperature": (0, 1e6),
    "top_p": (0, 1),
    "deadline_s": (0, 1e9),
}


def check_ask(ask: Ask) -> None:
    """Check what HTTP requests are checked for before, for callers that make an `Ask` themselves.

    Raises:
        InputError: A text has a lone surrogate, a number is out of range, or the hash is none; names the field.
    """
    if not re.fullmatch("[0-9a-f]{64}", ask.user_hash):
        raise InputError("user_hash: expected 64 hex digits")
    for name, value in asdict(ask).items():
        if name in _NUMBERS:
            low, high = _NUMBERS[name]
            kind, kinds = (int, "an integer") if name in _INTEGERS else (int | float, "a number")
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            # The number itself is left out: Python refuses to write one of more than 4,300 digits.
            if value is not None and not (is_number and low <= value <= high):
                raise InputError(f"{name}: expected {kinds} from {low:g} to {high:g}")
        else:
            check_unicode(name, _texts(value))


def _texts(value: object) -> list[str]:
    """All texts in nested dicts and sequences."""
    if isinstance(value, dict | list | tuple):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def failure_of(error: Exception, where: str) -> Failed:
    """Return what a client may read of an error: the text of an `InputError`, else a fixed one; then it is logged.

    Args:
        where: For the log: a route or a request id, never a user's text.
    """
    # Not isinstance: Ray raises a subclass whose text is the traceback.
    if type(error) is InputError:
        return Failed(400, "bad_request", str(error))
    if isinstance(error, Busy):
        return Failed(503, "overloaded", "too many requests wait; try again")
    if isinstance(error, RegistryError | CorruptError | DiskError | Refused):
        logger.error("%s: %s", where, error)  # its text is ours: hashes and paths
    else:
        logger.error("%s: %s at %s", where, type(error).__name__, places_of(error))
    if isinstance(error, Forgotten):
        return Failed(409, "forgotten", "you, or items of yours, were forgotten meanwhile")
    if isinstance(error, Refused):
        return Failed(503, "busy", "your data is being changed by another request; try again")
    if isinstance(error, RegistryError):
        return Failed(503, "registry_unavailable", "the registry cannot be reached; try again")
    if isinstance(error, CorruptError):
        return Failed(500, "corrupt_data", "your stored data is damaged; the operator is told")
    if isinstance(error, DiskError | OSError):
        return Failed(503, "disk_unavailable", "the disk is full or cannot be reached; try again later")
    return INTERNAL_ERROR


@dataclass(frozen=True)
class Refresh:
    """How far a user's training has come.

    `state`: idle, queued, training, done, failed; refused: the queue is full; unknown: the trainer cannot be reached.
    """

    state: str = "idle"
    num_steps_done: int = 0
    num_steps: int = 0
    version: str | None = None
    error: str = ""


class Backend(Protocol):
    """What the HTTP routes need of the rest: `serve.app` gives it by Ray, the tests by hand."""

    vault: Vault

    def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """The answer's events. Closing the iterator early cancels the request."""
        ...

    async def start_refresh(self, user_hash: str) -> Refresh:
        """Queue a training of this user on their whole history."""
        ...

    async def refresh_status(self, user_hash: str) -> Refresh: ...

    async def metrics(self) -> str:
        """All metrics of the service in Prometheus' text format."""
        ...

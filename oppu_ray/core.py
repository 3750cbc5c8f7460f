"""The nouns of the line: what crosses from one file to the next.

Frozen dataclasses and the error for bad input; no behaviour beyond a few derived counts. See DESIGN in the README for
the line itself: raw file -> UserHistory -> TrainingPair -> Example -> Pack -> TrainResult -> adapter on disk -> Answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from oppu_ray.config import PeftConfig

MAX_LOGPROBS = 20
"""Most alternatives per token that a `Request` may ask for."""


class InputError(ValueError):
    """What the caller gave is wrong.

    Its text is about that input and nothing else, so an HTTP client may read it. The text of any other error may hold
    a path or another user's id, and is never sent.
    """


def check_unicode(where: str, texts: Iterable[str]) -> None:
    """Raise InputError if a text has a lone surrogate: it has no bytes in UTF-8, and tokenizers refuse it."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a lone surrogate in its text ({error.reason}); expected Unicode") from error


@dataclass(frozen=True)
class Item:
    """One thing a user did: the unit of a history, and of a query (whose target field is then the gold).

    Args:
        item_id: Unique within the user.
        time: ISO 8601 string or year, or None where the source has no times (then list order is time order).
        text: What the user read or wrote: the input of most tasks, the target of tweets and chat replies.
        label: Closed-set target (tag, category, rating, "[1]"), or None.
        title: Free-text target (headline, paper title, subject; LaMP-1: the cited paper), or None.
        abstract: LaMP-1's abstract of the user's own paper, or None.
        keywords: Style-free input of a tweet, or None.
        context: Turns before a chat reply, oldest first.
        options: LaMP-1's two candidate references.
    """

    item_id: str
    time: str | None = None
    text: str = ""
    label: str | None = None
    title: str | None = None
    abstract: str | None = None
    keywords: str | None = None
    context: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class UserHistory:
    """A user's past `items`, oldest first, and the later `queries` to answer. Roles: "target" or "base"."""

    user_id: str
    role: str
    items: tuple[Item, ...]
    queries: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A user or line that was left out, and why. One line of `rejected.jsonl`."""

    path: str
    line: int | None
    user_id: str | None
    value: str
    reason: str


@dataclass(frozen=True)
class Prompt:
    """A prompt in its parts, so that what is shared can come first and what is cut is decided in one place.

    Args:
        instruction: The task's fixed text, label list included; equal for every item of a task.
        input: The item's or query's own text: the only part that may be shortened.
        cue: The last words before the answer, e.g. "\ntag:".
        profile: The user's text profile, or "".
        memory: Retrieved items as lines, best first; dropped from the end when the prompt is too long.
        order: "shared_first" (profile, instruction, memory, input, cue) or "paper" (profile, memory, instruction, ...).
    """

    instruction: str
    input: str
    cue: str
    profile: str = ""
    memory: tuple[str, ...] = ()
    order: str = "shared_first"


@dataclass(frozen=True)
class TrainingPair:
    """What the model reads and what it must say. The loss is on the completion only."""

    prompt: Prompt
    completion: str
    item_id: str


@dataclass(frozen=True)
class Example:
    """A tokenised pair: `input_ids[:num_prompt]` is the prompt, the rest (never empty) carries the loss."""

    input_ids: tuple[int, ...]
    num_prompt: int

    @property
    def num_completion(self) -> int:
        return len(self.input_ids) - self.num_prompt


@dataclass(frozen=True)
class UserWork:
    """All that is needed to train one user: nothing here depends on any other user."""

    user_id: str
    seed: int
    peft: PeftConfig
    steps: tuple[tuple[Example, ...], ...]


@dataclass(frozen=True)
class UserSize:
    """What may be known of a user outside their shard: counts, no text."""

    user_id: str
    num_items: int
    num_words: int
    num_queries: int = 0


@dataclass(frozen=True)
class Pack:
    """A closed set of users of similar size, trained together from start to end (design decision D3)."""

    pack_id: int
    user_ids: tuple[str, ...]
    num_words: int


@dataclass(frozen=True)
class AdapterState:
    """A trained adapter outside the bank: plain arrays in PEFT's key names, float32, and its PEFT config."""

    tensors: dict[str, np.ndarray]
    peft_config: dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """One user's outcome: an adapter and its losses per step, or an error and no adapter."""

    user_id: str
    adapter: AdapterState | None
    losses: tuple[float, ...] = ()
    error: str | None = None
    num_useful_tokens: int = 0


class StepsDone(NamedTuple):
    """Training steps that were taken: their useful tokens, and for each step of a user the user's id."""

    num_tokens: int
    user_ids: Sequence[str]


@dataclass(frozen=True)
class UserDone:
    """What leaves a worker when a user is trained: counts, losses and the committed version, or why it failed.

    Args:
        version: None when it failed, and when this run had committed the user before.
        num_splits: How often the user's pack was halved to get it through; in bf16, other shapes round differently.
        is_retryable: The failure is not in the user's data: another try may succeed, or another machine.
        epsilon: Of all the user's versions together, where this one was trained under noise.
    """

    user_id: str
    version: str | None
    error: str | None
    first_loss: float
    last_loss: float
    num_steps: int
    num_tokens: int
    num_splits: int = 0
    is_retryable: bool = False
    epsilon: float = 0.0

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for what a unit yields again when it is run again."""
        return (self.user_id,)


@dataclass(frozen=True)
class Request:
    """One question to the engine.

    Args:
        request_id: Unique among the requests under way.
        prompt_ids: The prompt's tokens.
        adapter_id: One version of one user's adapter, e.g. "<user hash>/<version>": a new version is a new id. None for
            the shared model alone.
        max_new_tokens: Most tokens of the answer.
        stop_ids: Tokens that end the answer; they are not part of it.
        stop: Texts that end the answer; the answer's text ends before them.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: Same request, same seed: same answer, whoever else is in the batch.
        labels: Token sequences; the answer is one of them, chosen token by token.
        num_logprobs: None for no log-probabilities, 0 for the answer's tokens', n for the n likeliest tokens' as well.
        user_id: Whose request it is (serving: the user's hash). An adapter loaded for one user is refused to another,
            and prompts are cached for their own user alone; a request to the shared model with "" is not cached.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    adapter_id: str | None = None
    max_new_tokens: int = 32
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    labels: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int | None = None
    user_id: str = ""


@dataclass(frozen=True)
class TokenEvent:
    """What one step of the engine added to one answer. The last event of a request has a `finish_reason`.

    Args:
        token_ids: The new token, or () where the step only ended the answer.
        text: New text that no later token can take back; "" while a character or a stop text may be incomplete.
        logprobs: Log-probability of each of `token_ids` under the model itself (before temperature, top-p and labels).
        top_logprobs: Per token, the likeliest (token, log-probability) pairs, likeliest first.
        finish_reason: "stop" (a stop token, a stop text, a complete label), "length", "cancelled" or "error".
        error: With "error", what happened.
        num_cached: Prompt tokens that were not computed anew; in a request's first event.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    num_cached: int = 0


@dataclass(frozen=True)
class Answer:
    """The engine's reply to a request, in tokens; special tokens that ended it are left out."""

    request_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prediction:
    """One answer of one arm to one query: one line of `predictions.jsonl`.

    Args:
        arm: Name of the way to answer, e.g. "task" or "oppu".
        text: The answer as text.
        nll: Negative log-likelihood per completion token of the gold, in nats; None for arms without a model.
        label_text: For closed label sets, the label with the highest mean log-likelihood; else None.
    """

    arm: str
    user_id: str
    query_id: str
    gold: str
    text: str
    nll: float | None = None
    label_text: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for what a unit yields again when it is run again."""
        return self.arm, self.user_id, self.query_id

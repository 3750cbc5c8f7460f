"""The routes that answer: OpenAI's chat and text completions, models, and `/v1/personalize` (arrow inference -> HTTP).

In: JSON of a signed-in user. Out: JSON or server-sent events; `X-OPPU-Adapter-Version` names what answered, and
`X-OPPU-Fallback` says why it is not the user's current adapter.
A reader might question that unknown fields are refused: a client that asks for tools or for several choices and gets
neither would take a wrong answer for a right one.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field

from oppu_ray.config import Config
from oppu_ray.core import MAX_LOGPROBS, Item
from oppu_ray.registry import Token
from oppu_ray.tasks import Task, get_task, is_blank, task_name
from serve.bodies import Body
from serve.guard import error, error_body, error_of, signed_in
from serve.messages import (
    MAX_TOP_K,
    Ask,
    Delta,
    Event,
    Failed,
    Finished,
    Started,
    TokenLogprob,
    Turn,
    failure_of,
)

DEFAULT_TOP_K = 4
REPLICA_LOST = Failed(503, "replica_lost", "the replica that answered is gone; try again")

router = APIRouter(prefix="/v1", tags=["answers"])
User = Annotated[Token, Depends(signed_in("user"))]


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a chat. `name` is ignored; developer is OpenAI's newer word for system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def turn(self) -> Turn:
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Turn("system" if self.role == "developer" else self.role, text)


class StreamOptions(Body):
    """Whether the last event of a stream tells the usage; `include_obfuscation` is ignored."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Body):
    """What chat and text completions share. Greedy unless a temperature is given; `user` is ignored.

    `seed`: drawn anew for every request that has none.
    """

    model: str = "oppu"
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None


class ChatRequest(Sampling):
    """OpenAI's chat completion."""

    messages: list[Message] = Field(min_length=1, max_length=200)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)


class CompletionRequest(Sampling):
    """OpenAI's text completion."""

    prompt: str = Field(min_length=1)
    logprobs: int | None = Field(None, ge=0, le=5)


class TaskInput(Body):
    """A question of the run's task; which fields it needs depends on the task."""

    text: str = ""
    keywords: str | None = None
    context: list[str] = Field([], max_length=200)
    options: list[str] = Field([], max_length=20)


class PersonalizeRequest(Body):
    """A question asked as in training.

    `arm`: oppu is the user's own adapter, rag the shared model with the user's own items, task the shared model alone.
    `top_k`: how many own items stand in the prompt; by default 4 for rag and none for oppu.
    """

    input: str | TaskInput
    task: str | None = None
    arm: Literal["oppu", "rag", "task"] = "oppu"
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K)
    max_tokens: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class _Answer:
    """All events of an answer, put together."""

    started: Started
    text: str
    logprobs: tuple[TokenLogprob, ...]
    num_tokens: int
    finished: Finished


# From (text, log-probabilities, finish reason, number of the stream's piece or None) to OpenAI's `choices[0]`.
_Choice = Callable[[str, Sequence[TokenLogprob], str | None, int | None], dict[str, Any]]


@router.get("/models")
async def models(user: User) -> dict[str, Any]:
    """The user's own model, `oppu`, and the shared one, `task`."""
    entries = [{"id": name, "object": "model", "created": 0, "owned_by": "oppu-ray"} for name in ("oppu", "task")]
    return {"object": "list", "data": entries}


@router.post("/chat/completions")
async def chat(request: Request, user: User, body: ChatRequest) -> Response:
    """A chat in the base model's own template."""
    ask = _sampled(request, user, body, tuple(message.turn() for message in body.messages))
    if body.max_completion_tokens is not None:
        ask = replace(ask, max_tokens=_checked_length(request, body.max_completion_tokens))
    ask = replace(ask, num_logprobs=body.top_logprobs if body.logprobs else None)
    return await _respond(request, ask, body, "chat.completion", _chat_choice)


@router.post("/completions")
async def completions(request: Request, user: User, body: CompletionRequest) -> Response:
    """A text to go on with."""
    ask = replace(_sampled(request, user, body, body.prompt), num_logprobs=body.logprobs)
    return await _respond(request, ask, body, "text_completion", _text_choice)


@router.post("/personalize")
async def personalize(request: Request, user: User, body: PersonalizeRequest) -> Response:
    """The answer with what it was made of: adapter version, own items in the prompt, times."""
    config: Config = request.app.state.config
    task = get_task(config.task)
    if body.task is not None and task_name(body.task) != task.name:
        raise error(400, "unknown_task", f"task {body.task!r}: this service answers {task.name!r}")
    top_k = body.top_k if body.top_k is not None else DEFAULT_TOP_K if body.arm == "rag" else 0
    if (body.arm == "task") > (top_k == 0) or (body.arm == "rag") > (top_k > 0):
        raise error(400, "bad_request", f"top_k {top_k} does not fit arm {body.arm!r}: task has 0, rag 1 or more")
    ask = Ask(
        request_id=uuid.uuid4().hex,
        user_hash=str(user.user_hash),
        generation=user.generation,
        question=_item(task, body.input),
        use_adapter=body.arm == "oppu",
        top_k=top_k,
        max_tokens=_checked_length(request, body.max_tokens),
        deadline_s=config.serve.deadline_s,
    )
    answer = await _collect(_events(request, ask))
    started, finished = answer.started, answer.finished
    content = {
        "answer": answer.text.strip(),
        "arm": f"{body.arm}_k{top_k}" if top_k else body.arm,
        "task": task.name,
        "adapter_version": started.version,
        "fallback": started.fallback or None,
        "items": [{"item_id": item_id, "text": line} for item_id, line in started.items],
        "finish_reason": finished.reason,
        "usage": _usage(started, answer.num_tokens),
        "timings": {
            "load_s": started.load_s,
            "first_token_s": finished.first_token_s,
            "total_s": finished.total_s,
        },
    }
    return JSONResponse(content, headers=_headers(started))


def _sampled(request: Request, user: Token, body: Sampling, question: str | tuple[Turn, ...]) -> Ask:
    if body.model not in ("oppu", "task"):
        raise error(404, "model_not_found", f"model {body.model!r}: expected 'oppu' (your own) or 'task' (shared)")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > 4 or not all(0 < len(stop) <= 100 for stop in stops):
        raise error(400, "bad_request", "stop: expected at most 4 texts of 1 to 100 characters")
    return Ask(
        request_id=uuid.uuid4().hex,
        user_hash=str(user.user_hash),
        generation=user.generation,
        question=question,
        use_adapter=body.model == "oppu",
        max_tokens=_checked_length(request, body.max_tokens),
        temperature=body.temperature,
        top_p=body.top_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop=tuple(stops),
        stream=body.stream,
        deadline_s=request.app.state.config.serve.deadline_s,
    )


def _checked_length(request: Request, max_tokens: int | None) -> int | None:
    most = request.app.state.config.serve.max_new_tokens
    if max_tokens is not None and max_tokens > most:
        raise error(400, "bad_request", f"max_tokens {max_tokens}: expected at most {most}")
    return max_tokens


def _item(task: Task, question: str | TaskInput) -> Item:
    """The question as an item of the task; a plain text fills the task's first input."""
    if isinstance(question, str):
        field = task.inputs[0][0]
        values = {field: [question] if field in ("context", "options") else question}
        question = TaskInput.model_validate(values)
    context, options = tuple(question.context), tuple(question.options)
    item = Item("", text=question.text, keywords=question.keywords, context=context, options=options)
    if missing := [field for field, _ in task.inputs if is_blank(item, field)]:
        raise error(400, "bad_request", f"input.{missing[0]}: {task.name} needs it, and it is empty")
    return item


async def _events(request: Request, ask: Ask) -> AsyncGenerator[Event, None]:
    """The answer's events within the deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ask.deadline_s
    try:
        async with aclosing(request.app.state.backend.ask(ask)) as events:
            while True:
                # Not `wait_for`: its task may still run when the client hangs up, and the generator cannot be closed.
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
                if event is None:
                    return
                yield event
    except TimeoutError:
        yield Failed(504, "deadline_exceeded", f"no answer within {ask.deadline_s:g} s")
    except Exception as fault:  # it must not cut a stream off
        yield failure_of(fault, f"request {ask.request_id}")


async def _first(events: AsyncGenerator[Event, None]) -> Started:
    event = await anext(events)
    if isinstance(event, Failed):
        await events.aclose()
        raise error_of(event)
    assert isinstance(event, Started)
    return event


async def _collect(events: AsyncGenerator[Event, None]) -> _Answer:
    started = await _first(events)
    deltas: list[Delta] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Failed):
                raise error_of(event)
            if isinstance(event, Delta):
                deltas.append(event)
            if isinstance(event, Finished):
                text = "".join(delta.text for delta in deltas)
                logprobs = tuple(one for delta in deltas for one in delta.logprobs)
                return _Answer(started, text, logprobs, sum(delta.num_tokens for delta in deltas), event)
    raise error_of(REPLICA_LOST)


async def _respond(request: Request, ask: Ask, body: Sampling, kind: str, choice: _Choice) -> Response:
    """OpenAI's response, whole or as a stream. A stream starts when the first token's adapter and prompt are ready."""
    events = _events(request, ask)
    head = {"id": f"{kind.split('.')[0]}-{ask.request_id}", "created": int(time.time()), "model": body.model}
    if not body.stream:
        answer = await _collect(events)
        choices = [choice(answer.text, answer.logprobs, answer.finished.reason, None)]
        usage = _usage(answer.started, answer.num_tokens)
        content = {**head, "object": kind, "choices": choices, "usage": usage}
        return JSONResponse(content, headers=_headers(answer.started))
    started = await _first(events)
    head["object"] = "chat.completion.chunk" if choice is _chat_choice else kind
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    lines = _stream(events, started, head, choice, with_usage)
    return StreamingResponse(lines, media_type="text/event-stream", headers=_headers(started))


async def _stream(
    events: AsyncGenerator[Event, None], started: Started, head: dict[str, Any], choice: _Choice, with_usage: bool
) -> AsyncGenerator[str, None]:
    number = num_tokens = 0
    ended = False
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                num_tokens += event.num_tokens
                yield _line({**head, "choices": [choice(event.text, event.logprobs, None, number)]})
                number += 1
            elif isinstance(event, Finished):
                ended = True
                yield _line({**head, "choices": [choice("", (), event.reason, number)]})
                if with_usage:
                    yield _line({**head, "choices": [], "usage": _usage(started, num_tokens)})
            elif isinstance(event, Failed):
                ended = True
                yield _line(error_body(event.code, event.message))
    if not ended:
        yield _line(error_body(REPLICA_LOST.code, REPLICA_LOST.message))
    yield "data: [DONE]\n\n"


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _headers(started: Started) -> dict[str, str]:
    headers = {"X-OPPU-Adapter-Version": started.version or "none", "X-OPPU-Replica": started.replica}
    return headers | ({"X-OPPU-Fallback": started.fallback} if started.fallback else {})


def _usage(started: Started, num_tokens: int) -> dict[str, int]:
    num_prompt = started.num_prompt_tokens
    return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": num_prompt + num_tokens}


def _chat_choice(text: str, logprobs: Sequence[TokenLogprob], reason: str | None, piece: int | None) -> dict[str, Any]:
    content = [
        {
            "token": one.token,
            "logprob": one.logprob,
            "bytes": _bytes(one.token),
            "top_logprobs": [{"token": token, "logprob": value, "bytes": _bytes(token)} for token, value in one.top],
        }
        for one in logprobs
    ]
    # Clients add pieces up: the first alone has the role, and the last, with the reason, nothing.
    message = ({} if piece else {"role": "assistant"}) | ({} if piece is not None and reason else {"content": text})
    shown = {"content": content} if content else None
    key = "message" if piece is None else "delta"
    return {"index": 0, key: message, "logprobs": shown, "finish_reason": reason}


def _bytes(token: str) -> list[int] | None:
    """A token's UTF-8 bytes; None for one that is half a character, whose own bytes are not kept."""
    return None if "\ufffd" in token else list(token.encode())


def _text_choice(text: str, logprobs: Sequence[TokenLogprob], reason: str | None, piece: int | None) -> dict[str, Any]:
    shown = {
        "tokens": [one.token for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [dict(one.top) for one in logprobs],
        "text_offset": [],
    }
    return {"index": 0, "text": text, "logprobs": shown if logprobs else None, "finish_reason": reason}

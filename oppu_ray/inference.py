"""Answers from many users' adapters in one batch: decode one token for every row, retire, admit, prefill.

In: `Request`s that name an adapter (or none: the base alone), any time. Out: `TokenEvent`s, step by step; for a closed
set of requests `generate` gives `Answer`s and `score` log-likelihoods of given completions. No Ray in here.
The decision a reader would question: a row of the cache is not bound to a user. Rows come and go, every token carries
its slot, and the bank computes each slot over its own tokens, so the users in a batch can change at every token.

Shapes: B rows being answered, T tokens, C completion tokens, K tokens that predict them, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from oppu_ray.adapters import AdapterBank, FittedAdapter
from oppu_ray.answer_text import AnswerText
from oppu_ray.config import PeftConfig
from oppu_ray.core import MAX_LOGPROBS, AdapterState, Answer, Example, InputError, Request, TokenEvent
from oppu_ray.kernels import pack_linears, token_losses
from oppu_ray.kv_cache import DecodePlan, Fill, KVCache, Resumed
from oppu_ray.packing import Row, build_stream, make_rows, plan_passes, virtual_tokens
from oppu_ray.prefix_cache import PrefixCache
from oppu_ray.sampling import Choice, choose, is_whole_label
from oppu_ray.slots import AdapterSlots, Key
from oppu_ray.training import HEAD_CHUNK, head_logits

BASE_SLOT = -1
NOBODY = ("", "")  # the key of a request to the base alone without a user: nothing of it is kept


@dataclass(eq=False)
class _Answering:
    """A request under way. Admitted, it has a row of the cache, of which `length` positions are filled."""

    request: Request
    adapter: FittedAdapter | None
    text: AnswerText | None
    draw: random.Random
    slot: int = BASE_SLOT
    length: int = 0
    num_cached: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def num_virtual(self) -> int:
        return virtual_tokens(self.adapter.peft) if self.adapter else 0

    @property
    def key(self) -> Key:
        return self.request.user_id, self.request.adapter_id or ""

    @property
    def num_unread(self) -> int:
        """Positions of the prompt that are still to be computed."""
        return max(self.num_virtual + len(self.request.prompt_ids) - self.length, 0)


class Engine:
    """Answers and scores over a bank of adapters.

    Args:
        model: A frozen Hugging Face causal LM.
        num_slots: How many adapters can be loaded at once.
        peft_configs: Shapes of the adapters to come.
        max_rows: Most rows decoded together.
        max_tokens_per_pass: Most tokens of one prefill or scoring pass. A longer prompt is read in pieces.
        max_tokens_while_decoding: The same for a prefill pass that rows being decoded wait for; None for no difference.
            A pass of 2,048 tokens takes 0.6 of the time of four of 512.
        max_length: Most tokens of a prompt and its answer together; None for the model's context. The KV cache grows
            with need, to at most `max_rows * max_length` positions.
        prefix_bytes: Most bytes of finished answers' keys and values to keep for their users' next prompts.
        tokenizer: A fast Hugging Face tokenizer, for events with text and for stop texts; None for tokens alone.
    """

    def __init__(
        self,
        model: nn.Module,
        num_slots: int,
        peft_configs: Iterable[PeftConfig],
        max_rows: int = 32,
        max_tokens_per_pass: int = 2048,
        max_length: int | None = None,
        prefix_bytes: int = 0,
        tokenizer: object | None = None,
        max_tokens_while_decoding: int | None = None,
    ):
        self._pefts = list(peft_configs)
        self.max_tokens_while_decoding = min(max_tokens_while_decoding or max_tokens_per_pass, max_tokens_per_pass)
        if self.max_tokens_while_decoding <= (num_virtual := max(map(virtual_tokens, self._pefts), default=0)):
            raise ValueError(f"a pass has {self.max_tokens_while_decoding} tokens, expected more than {num_virtual}")
        self.bank = AdapterBank(model, num_slots, self._pefts, trainable=False)
        self.model, self.max_rows, self.max_tokens_per_pass = model, max_rows, max_tokens_per_pass
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
        self.cache = KVCache(config, max_rows, self.max_length, self.bank.anchor.to(self.bank.dtype))
        self.slots, self.prefixes = AdapterSlots(self.bank), PrefixCache(prefix_bytes)
        self._vocab_size, self._tokenizer = config.vocab_size, tokenizer
        self._waiting: deque[_Answering] = deque()
        self._rows: list[_Answering] = []  # by row of the cache; only the last may have an unread rest of its prompt
        self._events: list[TokenEvent] = []
        self._held: set[Key] = set()
        self._unpack = pack_linears(model)

    def close(self) -> None:
        """Leave the model as it was before."""
        self._unpack()
        self.bank.remove()

    def load(self, adapter_id: str, adapter: AdapterState) -> None:
        """Put an adapter in a slot of its own until `unload_all`, for requests without a user; replaces it if present.

        Raises:
            ValueError: No slot is free, the adapter does not fit the bank, or a request uses the one to be replaced.
        """
        key, fitted = ("", adapter_id), self.fit(adapter)
        if self.slots.get(key):
            self._unload(key)
        if self.slots.acquire(key, fitted) is None:
            raise ValueError(f"all {self.bank.num_slots} adapter slots are taken")
        self._held.add(key)

    def unload_all(self) -> None:
        """Empty the slots that `load` filled.

        Raises:
            ValueError: A request uses one.
        """
        for key in list(self._held):
            self._unload(key)

    def _unload(self, key: Key) -> None:
        self.slots.remove(key, num_own=key in self._held)
        self._held.discard(key)
        self.prefixes.forget(key)

    def fit(self, adapter: AdapterState) -> FittedAdapter:
        """Check an adapter against the bank: the slow part of loading, for any thread.

        Raises:
            ValueError: The adapter does not fit the bank (kind, rank, targets, shapes, NaN).
        """
        return self.bank.fit(adapter)

    def is_loaded(self, request: Request) -> bool:
        """Whether `submit` can do without the adapter itself. Ask in the thread that submits.

        A slot is found by (user_id, adapter_id), so nobody reaches another user's adapter by its name.
        """
        return request.adapter_id is None or self.slots.get((request.user_id, request.adapter_id)) is not None

    def submit(self, request: Request, adapter: FittedAdapter | None = None) -> None:
        """Queue a request. All methods but `fit` belong to one thread: that of `step`.

        Args:
            adapter: The adapter named by `request.adapter_id`, from `fit`; needed where `is_loaded` says no.

        Raises:
            ValueError: The request can never be answered (empty prompt, unknown token, too long for the cache, bad
                sampling values, an id under way, an adapter that is not loaded or another user's).
        """
        if request.adapter_id is None:
            adapter = None
        else:
            adapter = self.slots.get((request.user_id, request.adapter_id)) or adapter
            if adapter is None:
                raise ValueError(f"adapter {request.adapter_id!r} is not loaded")
        self._check(request, virtual_tokens(adapter.peft) if adapter else 0)
        text = AnswerText(self._tokenizer, request.stop) if self._tokenizer else None
        self._waiting.append(_Answering(request, adapter, text, random.Random(request.seed)))

    def _check(self, request: Request, num_virtual: int) -> None:
        def refuse(what: str) -> InputError:
            return InputError(f"request {request.request_id!r}: {what}")

        if any(one.request.request_id == request.request_id for one in (*self._waiting, *self._rows)):
            raise refuse("this id is already under way")
        if not request.prompt_ids:
            raise refuse("the prompt is empty")
        asked = [*request.prompt_ids, *itertools.chain(*request.labels)]
        if request.labels:
            asked += request.stop_ids  # allowed after a label; otherwise only looked for
        if wrong := [token for token in asked if not 0 <= token < self._vocab_size]:
            raise refuse(f"token {wrong[0]} is not in the vocabulary of {self._vocab_size}")
        if request.max_new_tokens < 1:
            raise refuse(f"max_new_tokens is {request.max_new_tokens}, expected at least 1")
        num_prompt = num_virtual + len(request.prompt_ids)
        if num_prompt + request.max_new_tokens > self.max_length:
            both = f"a prompt of {num_prompt} tokens and {request.max_new_tokens} new ones"
            raise refuse(f"{both}, expected at most {self.max_length} together")
        if not (math.isfinite(request.temperature) and request.temperature >= 0):
            raise refuse(f"temperature is {request.temperature}, expected 0 or more")
        if not 0 < request.top_p <= 1:
            raise refuse(f"top_p is {request.top_p}, expected above 0 and at most 1")
        if not 0 <= (request.num_logprobs or 0) <= MAX_LOGPROBS:
            raise refuse(f"num_logprobs is {request.num_logprobs}, expected 0 to {MAX_LOGPROBS}")
        if "" in request.stop or (request.stop and not self._tokenizer):
            raise refuse("stop texts need an engine with a tokenizer and must not be empty")
        if not all(0 < len(label) <= request.max_new_tokens for label in request.labels):
            raise refuse(f"a label is empty or longer than max_new_tokens, {request.max_new_tokens}")
        if any(not request.stop_ids.isdisjoint(label) for label in request.labels):
            raise refuse("a label has a stop token in it")
        if not request.stop_ids and any(
            one != other and other[: len(one)] == one for one in request.labels for other in request.labels
        ):
            raise refuse("a label is the beginning of another one; only a stop token can end it")

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or report."""
        return bool(self._waiting or self._rows or self._events)

    @property
    def num_rows(self) -> int:
        """Requests that are being answered."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row, or for a slot."""
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Decode one token for every row, retire, admit what fits, prefill one pass.

        Returns:
            At most one event per request that got a token or ended.
        """
        self._decode()
        self._prefill()
        events, self._events = self._events, []
        return events

    @torch.inference_mode()
    def cancel(self, request_id: str) -> bool:
        """Free the request's row and slot at once; the next step reports "cancelled". False if it is not under way."""
        for one in (*self._waiting, *self._rows):
            if one.request.request_id == request_id:
                self._end(one, TokenEvent(request_id, finish_reason="cancelled"))
                return True
        return False

    def forget(self, user_id: str) -> None:
        """Cancel the user's requests, empty their slots and drop what is kept of their prompts."""
        for one in [one for one in (*self._waiting, *self._rows) if one.request.user_id == user_id]:
            self.cancel(one.request.request_id)
        for key in self.prefixes.keys():
            if key[0] == user_id:
                self.prefixes.forget(key)
        for key in self.slots.keys():
            if key[0] == user_id:
                self.slots.remove(key)

    def forget_everyone(self) -> None:
        """The same for all users; requests without a user and the adapters that `load` put in stay."""
        keys = [*self.slots.keys(), *self.prefixes.keys()]
        asking = [one.request.user_id for one in (*self._waiting, *self._rows)]
        for user_id in {*asking, *(key[0] for key in keys)} - {""}:
            self.forget(user_id)

    def _decode(self) -> None:
        """One token for every row whose prompt is read."""
        rows = [one for one in self._rows if not one.num_unread]
        if not rows:
            return
        plan = DecodePlan(self.cache, [one.length for one in rows])
        ids_B = torch.tensor([one.tokens[-1] for one in rows], device=self.bank.device)
        self.bank.use_rows([one.slot for one in rows])
        hidden_BD = self.bank.hidden_states(ids_B, plan.lengths_B, plan)
        for one in rows:
            one.length += 1
        self._extend(rows, head_logits(self.model, hidden_BD))

    def _prefill(self) -> None:
        """Read prompts: the rest of a long one first, then waiting requests', as many as rows and pass allow."""
        parts: list[tuple[_Answering, int]] = []
        is_decoding = any(not one.num_unread for one in self._rows)
        room = self.max_tokens_while_decoding if is_decoding else self.max_tokens_per_pass
        if self._rows and (rest := self._rows[-1].num_unread):
            parts.append((self._rows[-1], min(rest, room)))
            room -= rest
        while self._waiting and len(self._rows) < self.max_rows and room > 0:
            one = self._waiting[0]
            if parts and one.num_unread > room:
                break
            if not self._admit(one):
                if not self._rows:  # nobody will ever give a slot back
                    error = f"all {self.bank.num_slots} adapter slots are taken"
                    self._end(one, TokenEvent(one.request.request_id, finish_reason="error", error=error))
                break
            parts.append((one, min(one.num_unread, room)))
            room -= one.num_unread
        if parts:
            self._read(parts)

    def _admit(self, one: _Answering) -> bool:
        """Give the longest waiting request a row, and what is kept of its prompt; False if no slot can be had."""
        if one.adapter:
            slot = self.slots.acquire(one.key, one.adapter)
            if slot is None:
                return False
            one.slot = slot
        self._waiting.popleft()
        self._rows.append(one)
        self.cache.reserve(one.num_unread + one.request.max_new_tokens)
        if found := self.prefixes.find(one.key, one.request.prompt_ids):
            one.num_cached, values = found
            one.length = one.num_virtual + one.num_cached
            self.cache.write(len(self._rows) - 1, values[..., : one.length, :])
        return True

    def _read(self, parts: Sequence[tuple[_Answering, int]]) -> None:
        """One pass over the next tokens of some rows' prompts; a row whose prompt ends here gets its first token."""
        rows, resumed, first, start = [], [], len(self._rows) - len(parts), 0
        for number, (one, num) in enumerate(parts, first):
            num_virtual = 0 if one.length else one.num_virtual
            begin = one.length - (one.num_virtual if one.length else 0)
            ids = one.request.prompt_ids[begin : begin + num - num_virtual]
            rows.append(Row(one.slot, (Example((*ids, 0), len(ids)),), 0, 1.0, num_virtual))
            if one.length:
                resumed.append(Resumed(start, start + num, number, one.length))
            start += num
        stream = build_stream(rows, self.bank.device)
        for part in resumed:
            stream.position_ids_T[part.start : part.stop] += part.done
        nums = torch.tensor([num for _, num in parts], device=self.bank.device)
        rows_T = torch.arange(first, len(self._rows), device=self.bank.device).repeat_interleave(nums)
        stream.plan.fill = Fill(self.cache, rows_T, stream.position_ids_T, resumed)
        self.bank.use(stream.ranges)
        hidden_KD = self.bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan, stream.virtual)
        for one, num in parts:
            one.length += num
        read = [(one, place) for (one, _), place in zip(parts, stream.predict_C, strict=True) if not one.num_unread]
        if read:
            self._extend(
                [one for one, _ in read], head_logits(self.model, hidden_KD[torch.stack([place for _, place in read])])
            )

    def _extend(self, rows: Sequence[_Answering], logits_BV: Tensor) -> None:
        """The next token of each row; rows whose answer is complete end."""
        choices = choose(
            logits_BV, [one.request for one in rows], [one.tokens for one in rows], [one.draw for one in rows]
        )
        for one, choice in zip(rows, choices, strict=True):
            event = self._take(one, choice)
            one.num_cached = 0
            if event.finish_reason:
                self._end(one, event)
            else:
                self._events.append(event)

    def _take(self, one: _Answering, choice: Choice) -> TokenEvent:
        request = one.request
        event = TokenEvent(request.request_id, num_cached=one.num_cached)
        if choice.token is None:
            return replace(event, finish_reason="error", error="the adapter gives logits that are not finite")
        if choice.token in request.stop_ids:
            return replace(event, finish_reason="stop", text=one.text.flush() if one.text else "")
        one.tokens.append(choice.token)
        text = one.text.push(choice.token) if one.text else ""
        reason = None
        if (one.text and one.text.is_stopped) or is_whole_label(request, one.tokens):
            reason = "stop"
        elif len(one.tokens) == request.max_new_tokens:
            reason = "length"
        if one.text and reason:
            text += one.text.flush()
        has_logprobs = request.num_logprobs is not None
        return replace(
            event,
            token_ids=(choice.token,),
            text=text,
            logprobs=(choice.logprob,) if has_logprobs else (),
            top_logprobs=(choice.top_logprobs,) if request.num_logprobs else (),
            finish_reason=reason,
        )

    def _end(self, one: _Answering, event: TokenEvent) -> None:
        """Report a request's last event and free what it held."""
        self._events.append(event)
        if one in self._waiting:
            self._waiting.remove(one)
            return
        if one.adapter:
            self.slots.release(one.key)
        row = self._rows.index(one)
        if event.finish_reason in ("stop", "length") and self.prefixes.max_bytes and one.key != NOBODY:
            tokens = (*one.request.prompt_ids, *one.tokens)[: one.length - one.num_virtual]
            self.prefixes.store(one.key, tokens, self.cache.read(row, one.length))
        self.cache.clear(row, one.length)
        num_read = sum(not other.num_unread for other in self._rows)
        for source in sorted({num_read - 1, len(self._rows) - 1}):  # the last row decoded, and one half read after it
            if source > row:
                self.cache.move(source, row, self._rows[source].length)
                self._rows[row], row = self._rows[source], source
        self._rows.pop()

    @torch.inference_mode()
    def score(
        self, groups: Sequence[tuple[str | None, Sequence[Example]]], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Mean negative log-likelihood per completion token, in nats.

        Args:
            groups: (adapter id or None, examples); what a group's examples share is computed once.

        Returns:
            One list per group, one number per example.

        Raises:
            ValueError: An adapter gives logits that are not finite.
        """
        rows: list[tuple[int, Row]] = []
        for number, (adapter_id, examples) in enumerate(groups):
            slot = BASE_SLOT if adapter_id is None else self.slots.slot(("", adapter_id))
            num_virtual = 0 if slot == BASE_SLOT else virtual_tokens(self.bank.peft[slot])
            made = make_rows(slot, examples, self.max_tokens_per_pass, num_virtual=num_virtual)
            rows += [(number, row) for row in made]
        scores: list[list[float]] = [[] for _ in groups]
        numbers = {id(row): number for number, row in rows}
        for part in plan_passes([row for _, row in rows], self.max_tokens_per_pass):
            means = iter(self._score_pass(part))
            for row in part:
                scores[numbers[id(row)]] += (found := [next(means) for _ in row.examples])
                if not all(map(math.isfinite, found)):
                    name = groups[numbers[id(row)]][0]
                    raise ValueError(f"adapter {name!r} gives logits that are not finite")
            if progress:
                progress(len(part))
        return scores

    def _score_pass(self, rows: list[Row]) -> list[float]:
        stream = build_stream(rows, self.bank.device)
        self.bank.use(stream.ranges)
        hidden_KD = self.bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan, stream.virtual)
        losses = [
            token_losses(head_logits(self.model, hidden_KD[index]), target, 0.0)
            for index, target in zip(
                stream.predict_C.split(HEAD_CHUNK), stream.targets_C.split(HEAD_CHUNK), strict=True
            )
        ]
        num = sum(len(row.examples) for row in rows)
        total = torch.zeros(num, device=hidden_KD.device).index_add_(0, stream.owner_C, torch.cat(losses))
        return (total / torch.bincount(stream.owner_C, minlength=num)).tolist()

    def generate(
        self,
        requests: Sequence[Request],
        stop_ids: frozenset[int],
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answers in the order of the requests, all of them by adapters put in with `load`.

        Args:
            stop_ids: Tokens that end an answer; they are not part of it.
            progress: Called with the number of answers finished since the last call.

        Raises:
            ValueError: As `submit`, or a request ends with an error; nothing is answered then.
        """
        tokens: dict[str, list[int]] = {}  # of the requests submitted
        slots = {id(r): BASE_SLOT if r.adapter_id is None else self.slots.slot(("", r.adapter_id)) for r in requests}
        try:
            for request in sorted(requests, key=lambda request: slots[id(request)]):
                self.submit(replace(request, stop_ids=stop_ids))
                tokens[request.request_id] = []
            while self.has_work:
                events = self.step()
                for event in events:
                    if event.error:
                        name = next(r.adapter_id for r in requests if r.request_id == event.request_id)
                        raise ValueError(f"request {event.request_id!r} to adapter {name!r}: {event.error}")
                    tokens[event.request_id] += event.token_ids
                if progress and (num_finished := sum(event.finish_reason is not None for event in events)):
                    progress(num_finished)
        finally:
            for request_id in tokens:
                self.cancel(request_id)
            self._events = [event for event in self._events if event.request_id not in tokens]
        return [Answer(request.request_id, tuple(tokens[request.request_id])) for request in requests]

    def warm_up(self) -> None:
        """Answer as one row and as several, for the base and every kind: all that is made at first use, is then."""
        self._answer_some(None)
        for peft in self._pefts:
            self.bank.start(0, peft, seed=0)
            adapter = self.bank.export(0)
            self.bank.vacate(0)
            self.load("warm-up", adapter)
            self._answer_some("warm-up")
            self.unload_all()

    def _answer_some(self, adapter_id: str | None) -> None:
        for num in (1, 3):
            self.generate([Request(str(i), (0, 1, 2), adapter_id, 2) for i in range(num)], frozenset())

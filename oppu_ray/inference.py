"""Answers from many users' adapters in one batch: prefill, then one token for every row, retire, admit.

In: `Request`s that name an adapter (or none: the base alone). Out: greedy `Answer`s, and log-likelihoods of given
completions. No Ray in here.
The decision a reader would question: a row of the cache is not bound to a user. Rows come and go, every token carries
its slot, and the bank computes each slot over its own tokens, so the users in a batch can change at every token.

Shapes: B rows being answered, T tokens, C completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from oppu_ray.adapters import AdapterBank, FittedAdapter
from oppu_ray.attention import DecodePlan, KVCache
from oppu_ray.config import PeftConfig
from oppu_ray.core import AdapterState, Answer, Example, Request, TokenEvent
from oppu_ray.kernels import token_losses
from oppu_ray.packing import Row, build_stream, make_rows, plan_passes, virtual_tokens
from oppu_ray.training import HEAD_CHUNK, logit_softcap

BASE_SLOT = -1


@dataclass
class _Answering:
    """A request in row `row` of the cache; `length` of its positions are filled."""

    request: Request
    slot: int
    length: int
    tokens: list[int] = field(default_factory=list)


class Engine:
    """Greedy generation and scoring over a bank of adapters.

    Args:
        model: A frozen Hugging Face causal LM.
        num_slots: How many adapters can be loaded at once.
        peft_configs: Shapes of the adapters to come.
        max_rows: Most rows decoded together.
        max_tokens_per_pass: Most tokens of one prefill or scoring pass: rows being decoded wait for it. A longer prompt
            is read in pieces.
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
    ):
        self.bank = AdapterBank(model, num_slots, peft_configs, trainable=False)
        self.model, self.max_rows, self.max_tokens_per_pass = model, max_rows, max_tokens_per_pass
        self.slots: dict[str, int] = {}

    def close(self) -> None:
        """Leave the model as it was before."""
        self.bank.remove()

    def load(self, adapter_id: str, adapter: AdapterState) -> None:
        """Put an adapter in a free slot.

        Raises:
            ValueError: No slot is free, or the adapter does not fit the bank.
        """
        free = set(range(self.bank.num_slots)) - set(self.slots.values())
        slot = self.slots.get(adapter_id, min(free, default=BASE_SLOT))
        if slot == BASE_SLOT:
            raise ValueError(f"all {self.bank.num_slots} adapter slots are taken")
        self.bank.load(slot, adapter)
        self.slots[adapter_id] = slot

    def fit(self, adapter: AdapterState) -> FittedAdapter:
        """Check an adapter against the bank and convert it: the slow part of loading, for any thread.

        Raises:
            ValueError: The adapter does not fit the bank (kind, rank, targets, shapes, NaN).
        """
        raise NotImplementedError

    def is_loaded(self, request: Request) -> bool:
        """Whether `submit` can do without the adapter itself. Ask in the thread that submits.

        A slot is found by (user_id, adapter_id), so nobody reaches another user's adapter by its name.
        """
        raise NotImplementedError

    def submit(self, request: Request, adapter: FittedAdapter | None = None) -> None:
        """Queue a request. All methods but `fit` belong to one thread: that of `step`.

        Args:
            adapter: The adapter named by `request.adapter_id`, from `fit`; needed where `is_loaded` says no.

        Raises:
            ValueError: The request can never be answered (empty prompt, unknown token, too long for the cache, bad
                sampling values, an id under way, an adapter that is not loaded or another user's).
        """
        raise NotImplementedError

    def step(self) -> list[TokenEvent]:
        """Admit what fits, prefill at most `max_tokens_per_pass` tokens, decode one token for every row, retire.

        Returns:
            One event per request that got a token or ended.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> bool:
        """Free the request's row and slot at once; the next step reports "cancelled". False if it is not under way."""
        raise NotImplementedError

    def forget(self, user_id: str) -> None:
        """Cancel the user's requests, empty their slots and drop their cached prompts."""
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or report."""
        raise NotImplementedError

    def unload_all(self) -> None:
        self.slots.clear()

    def _slot(self, adapter_id: str | None) -> int:
        if adapter_id is None:
            return BASE_SLOT
        if adapter_id not in self.slots:
            raise ValueError(f"adapter {adapter_id!r} is not loaded")
        return self.slots[adapter_id]

    def _num_virtual(self, slot: int) -> int:
        return 0 if slot == BASE_SLOT else virtual_tokens(self.bank.peft[slot])

    @torch.inference_mode()
    def score(
        self, groups: Sequence[tuple[str | None, Sequence[Example]]], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Mean negative log-likelihood per completion token, in nats.

        Args:
            groups: (adapter id or None, examples); what a group's examples share is computed once.

        Returns:
            One list per group, one number per example.
        """
        rows: list[tuple[int, Row]] = []
        for number, (adapter_id, examples) in enumerate(groups):
            slot = self._slot(adapter_id)
            made = make_rows(slot, examples, self.max_tokens_per_pass, num_virtual=self._num_virtual(slot))
            rows += [(number, row) for row in made]
        scores: list[list[float]] = [[] for _ in groups]
        numbers = {id(row): number for number, row in rows}
        for part in plan_passes([row for _, row in rows], self.max_tokens_per_pass):
            means = iter(self._score_pass(part))
            for row in part:
                scores[numbers[id(row)]] += [next(means) for _ in row.examples]
            if progress:
                progress(len(part))
        return scores

    def _score_pass(self, rows: list[Row]) -> list[float]:
        stream = build_stream(rows, self._like())
        self.bank.use(stream.ranges)
        hidden_TD = self.bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan, stream.virtual)
        losses = [
            token_losses(self._logits(hidden_TD[index]), target, 0.0)
            for index, target in zip(
                stream.predict_C.split(HEAD_CHUNK), stream.targets_C.split(HEAD_CHUNK), strict=True
            )
        ]
        num = sum(len(row.examples) for row in rows)
        total = torch.zeros(num, device=hidden_TD.device).index_add_(0, stream.owner_C, torch.cat(losses))
        return (total / torch.bincount(stream.owner_C, minlength=num)).tolist()

    def _like(self) -> Tensor:
        return torch.zeros((), dtype=self.bank.dtype, device=self.bank.device)

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        logits_BV = self.model.get_output_embeddings()(hidden_BD)  # type: ignore[operator]
        softcap = logit_softcap(self.model)
        return torch.tanh(logits_BV / softcap) * softcap if softcap else logits_BV

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        stop_ids: frozenset[int],
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Greedy answers, in the order of the requests; a row that ends makes room for the next request.

        Args:
            stop_ids: Tokens that end an answer; they are not part of it.
            progress: Called with the number of answers finished since the last call.

        Raises:
            ValueError: An adapter is not loaded, or a prompt is empty.
        """
        if not requests:
            return []
        for request in requests:
            if not request.prompt_ids:
                raise ValueError(f"request {request.request_id!r}: the prompt is empty")
        waiting = deque(sorted(requests, key=lambda request: self._slot(request.adapter_id)))
        longest = max(
            len(r.prompt_ids) + r.max_new_tokens + self._num_virtual(self._slot(r.adapter_id)) for r in requests
        )
        cache = self._new_cache(min(self.max_rows, len(requests)), longest)
        active: list[_Answering] = []
        done: dict[str, Answer] = {}
        while waiting or active:
            if waiting and len(active) < self.max_rows:
                self._admit(waiting, active, cache)
            else:
                self._decode(active, cache)
            finished = self._retire(active, cache, stop_ids)
            done |= {answer.request_id: answer for answer in finished}
            if progress and finished:
                progress(len(finished))
        return [done[request.request_id] for request in requests]

    def _new_cache(self, num_rows: int, num_positions: int) -> KVCache:
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return KVCache(config.num_hidden_layers, num_rows, num_positions, heads, head_dim, self._like())

    def _admit(self, waiting: deque[Request], active: list[_Answering], cache: KVCache) -> None:
        """Prefill as many waiting requests as rows and the pass allow; each gets its first token."""
        admitted: list[_Answering] = []
        num_tokens = 0
        while waiting and len(active) + len(admitted) < self.max_rows:
            num_tokens += len(waiting[0].prompt_ids)
            if admitted and num_tokens > self.max_tokens_per_pass:
                break
            request = waiting.popleft()
            slot = self._slot(request.adapter_id)
            admitted.append(_Answering(request, slot, len(request.prompt_ids) + self._num_virtual(slot)))
        rows = [
            Row(
                one.slot,
                (Example((*one.request.prompt_ids, 0), len(one.request.prompt_ids)),),
                0,
                1.0,
                self._num_virtual(one.slot),
            )
            for one in admitted
        ]
        stream = build_stream(rows, self._like())
        lengths = torch.tensor([one.length for one in admitted], device=self.bank.device)
        cache.clear(slice(len(active), len(active) + len(admitted)))
        stream.plan.cache = cache
        numbers = torch.arange(len(active), len(active) + len(admitted), device=self.bank.device)
        stream.plan.cache_rows_T = numbers.repeat_interleave(lengths)
        stream.plan.cache_positions_T = stream.position_ids_T
        self.bank.use(stream.ranges)
        hidden_TD = self.bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan, stream.virtual)
        self._append(admitted, self._logits(hidden_TD[stream.predict_C]))
        active += admitted

    def _decode(self, active: list[_Answering], cache: KVCache) -> None:
        """One token for every active row."""
        lengths = [one.length for one in active]
        lengths_B = torch.tensor(lengths, device=self.bank.device)
        ids_B = torch.tensor([one.tokens[-1] for one in active], device=self.bank.device)
        self.bank.use([(one.slot, row, row + 1) for row, one in enumerate(active)])
        hidden_BD = self.bank.hidden_states(ids_B, lengths_B, DecodePlan(cache, lengths_B, max(lengths)))
        for one in active:
            one.length += 1
        self._append(active, self._logits(hidden_BD))

    def _append(self, rows: list[_Answering], logits_BV: Tensor) -> None:
        for one, token in zip(rows, logits_BV.argmax(-1).tolist(), strict=True):
            one.tokens.append(token)

    def _retire(self, active: list[_Answering], cache: KVCache, stop_ids: frozenset[int]) -> list[Answer]:
        """Take finished rows out; the last row moves into each gap."""
        finished = []
        for row in reversed(range(len(active))):
            one = active[row]
            stopped = one.tokens[-1] in stop_ids
            if not stopped and len(one.tokens) < one.request.max_new_tokens:
                continue
            finished.append(Answer(one.request.request_id, tuple(one.tokens[: -1 if stopped else None])))
            last = active.pop()
            if row < len(active):
                cache.move(len(active), row)
                active[row] = last
        return finished

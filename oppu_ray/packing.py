"""Pairs -> examples -> steps -> packs -> rows of tokens (design decisions D1 and D3).

In: a user's training pairs. Out: `Pack`s of users to train together, and for each forward pass one `Stream`: many
users' rows laid end to end, each row a shared token prefix once and then the suffixes.
The decision a reader would question: the prefix is found, not declared: it is the longest common token prefix of the
examples of one user's step, so every template profits, and it never reaches into a completion. The last token of an
example predicts nothing and is not computed.

Shapes: T tokens of a stream, K of them predict C completion tokens.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oppu_ray.attention import SegmentPlan, plan_segments
from oppu_ray.attention_groups import Segment
from oppu_ray.config import PeftConfig, TrainConfig
from oppu_ray.core import Example, InputError, Pack, Prompt, TrainingPair, UserSize, UserWork
from oppu_ray.progress import Forecast
from oppu_ray.tasks import prompt_parts

Tokenize = Callable[[str], list[int]]

# A million heavy-tailed users on 256 workers: longest pack 60 min (its one user) instead of 649, for 13 % more passes.
MAX_WORDS_PER_PACK = 100_000


def encode_prompt(prompt: Prompt, tokenize: Tokenize, max_tokens: int, start: Sequence[int] = ()) -> tuple[int, ...]:
    """Tokenise a prompt part by part and make it fit.

    Memory lines go first, lowest-ranked first; then the input loses its last tokens. Instruction, profile and cue stay.
    Where even these do not fit, `encode` cuts what is left from its beginning; an engine refuses it.

    Args:
        max_tokens: Most tokens the prompt may have.
        start: Token ids put before everything (a tokenizer's own first token).
    """
    parts = [(part.kind, tokenize(part.text)) for part in prompt_parts(prompt)]
    excess = len(start) + sum(len(ids) for _, ids in parts) - max_tokens
    for index in reversed(range(len(parts))):
        if excess > 0 and parts[index][0] == "memory":
            excess -= len(parts[index][1])
            parts[index] = ("memory", [])
    for index, (kind, ids) in enumerate(parts):
        if excess > 0 and kind == "input":
            parts[index] = (kind, ids[: max(0, len(ids) - excess)])
    return (*start, *(token for _, ids in parts for token in ids))


def encode(pair: TrainingPair, tokenizer: object, max_length: int) -> Example:
    """Tokenise one pair; the loss is on the completion and the end-of-sequence token after it.

    The prompt is cut to fit, its instruction last of all; a completion is cut only where it alone exceeds `max_length`.

    Raises:
        ValueError: The completion is empty.
    """
    if not pair.completion.strip():
        raise InputError(f"item {pair.item_id!r}: the completion is empty")
    tokenize = plain_tokenizer(tokenizer)
    completion = [*tokenize(pair.completion), tokenizer.eos_token_id][: max_length - 1]  # type: ignore[attr-defined]
    room = max_length - len(completion)
    start = first_tokens(tokenizer)
    prompt = encode_prompt(pair.prompt, tokenize, room, start)
    prompt = (*start, *prompt[len(start) + max(0, len(prompt) - room) :])
    return Example((*prompt, *completion), max(len(prompt), 1))


def plain_tokenizer(tokenizer: object) -> Tokenize:
    """Text to ids without any special tokens, not even where the text spells one: "<|im_end|>" is only letters."""
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    return lambda text: tokenizer(text, **plain)["input_ids"] if text else []  # type: ignore[operator]


def first_tokens(tokenizer: object) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text: Llama's and Gemma's <bos>, nothing for Qwen and SmolLM2."""
    with_special = tokenizer("a")["input_ids"]  # type: ignore[operator]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return tuple(with_special[: with_special.index(plain[0])])


def plan_user(user_id: str, seed: int, examples: Sequence[Example], config: TrainConfig) -> UserWork:
    """Lay a user's examples out in steps: shuffled anew each epoch from the user's own seed."""
    shuffle = random.Random(seed)
    steps: list[tuple[Example, ...]] = []
    size = config.items_per_step
    wanted = num_steps(len(examples), config)
    while examples and len(steps) < wanted:
        order = list(examples)
        shuffle.shuffle(order)
        steps += [tuple(order[i : i + size]) for i in range(0, len(order), size)]
    return UserWork(user_id, seed, config.peft, tuple(steps[:wanted]))


def num_steps(num_items: int, config: TrainConfig) -> int:
    """Steps that a user with `num_items` items is trained for."""
    return config.max_steps or config.epochs * -(-num_items // config.items_per_step)


def plan_packs(users: Iterable[UserSize], config: TrainConfig) -> list[Pack]:
    """Users of similar size together, largest first; the same users give the same packs in any order of arrival.

    Nobody in a pack has fewer than half the steps of its largest user: one long history would keep a worker on
    passes of a single row, and the other users' adapters in memory. And a pack holds at most `MAX_WORDS_PER_PACK`
    words, or one user: 32 giants together can outweigh a whole shard, while a few of them fill a pass as well. The
    limit is absolute, so that packs depend on no number of workers.
    """

    def steps(user: UserSize) -> int:
        return num_steps(user.num_items, config)

    ordered = sorted(users, key=lambda user: (-steps(user), -user.num_words, user.user_id))
    parts: list[list[UserSize]] = []
    words = 0
    for user in ordered:
        words += user.num_words
        full = not parts or len(parts[-1]) == config.max_users_per_pack or words > MAX_WORDS_PER_PACK
        if full or 2 * steps(user) < steps(parts[-1][0]):
            parts.append([])
            words = user.num_words
        parts[-1].append(user)
    return [
        Pack(number, tuple(user.user_id for user in part), sum(user.num_words for user in part))
        for number, part in enumerate(parts)
    ]


class PackForecast(Forecast):
    """How long training takes, in words, because users differ too much in size to be counted.

    Args:
        shards: The packs of each worker.
        sizes: The users in them, and perhaps others.
        config: Tells how many steps a user takes.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[Pack]],
        sizes: Iterable[UserSize],
        config: TrainConfig,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._sizes = {size.user_id: size for size in sizes}
        self._config, self._taken = config, Counter[str]()
        self._worker = {user: worker for worker, shard in enumerate(shards) for pack in shard for user in pack.user_ids}
        work = [0.0] * len(shards)
        for user_id, worker in self._worker.items():
            work[worker] += self._steps(user_id) * self._words(user_id)
        super().__init__(work, clock)

    def settled(self, units: int) -> None:
        """Do nothing: `stepped` and `user_done` count the work."""

    def stepped(self, user_ids: Sequence[str]) -> None:
        """Count training steps, each by the id of its user."""
        for user_id, steps in Counter(user_ids).items():
            self._take(user_id, steps, is_new=True)

    def user_done(self, user_id: str, is_new: bool = False) -> None:
        """Count what is left of a user, by default because an earlier run did it, or the user failed."""
        self._take(user_id, self._steps(user_id), is_new)

    def _take(self, user_id: str, steps: int, is_new: bool) -> None:
        steps = min(steps, self._steps(user_id) - self._taken[user_id])
        if steps > 0:
            self._taken[user_id] += steps
            self.add(steps * self._words(user_id), self._worker[user_id], is_new)

    def _steps(self, user_id: str) -> int:
        return num_steps(self._sizes[user_id].num_items, self._config)

    def _words(self, user_id: str) -> float:
        """Words of a user's step."""
        size = self._sizes[user_id]
        return size.num_words / max(1, -(-size.num_items // self._config.items_per_step))


def plan_shards(packs: Sequence[Pack], num_shards: int) -> list[list[Pack]]:
    """Packs to shards, balanced by words: the longest pack goes to the shard with least work (LPT rule)."""
    shards: list[list[Pack]] = [[] for _ in range(num_shards)]
    heap = [(0, shard) for shard in range(num_shards)]
    for pack in sorted(packs, key=lambda pack: (-pack.num_words, pack.pack_id)):
        load, shard = heapq.heappop(heap)
        shards[shard].append(pack)
        heapq.heappush(heap, (load + pack.num_words, shard))
    return shards


@dataclass(frozen=True)
class Row:
    """Examples of one slot that share their first `num_prefix` tokens; `weight` multiplies each completion
    token's loss.

    `num_virtual` prompt-tuning vectors stand before the prefix.
    """

    slot: int
    examples: tuple[Example, ...]
    num_prefix: int
    weight: float = 1.0
    num_virtual: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed for this row."""
        return self.num_virtual + self.num_prefix + sum(len(e.input_ids) - 1 - self.num_prefix for e in self.examples)


def shared_prefix(examples: Sequence[Example]) -> int:
    """Length of the longest common token prefix that is prompt in every example; 0 for a single example."""
    if len(examples) < 2:
        return 0
    longest = min(example.num_prompt for example in examples)
    first, last = (pick(example.input_ids[:longest] for example in examples) for pick in (min, max))
    return next((i for i in range(longest) if first[i] != last[i]), longest)


def virtual_tokens(peft: PeftConfig | None) -> int:
    """Virtual tokens before every row of an adapter: 0 unless it is prompt tuning."""
    return peft.num_virtual_tokens if peft is not None and peft.kind == "prompt" else 0


def make_rows(
    slot: int, examples: Sequence[Example], max_tokens: int, share_prefix: bool = True, num_virtual: int = 0
) -> list[Row]:
    """Rows of at most `max_tokens` tokens for one user's step; a longer single example still gets a row of its own.

    The loss is the mean over all completion tokens of the step, so a step split over rows has the same gradient.
    """
    if not examples:
        return []
    groups: list[list[Example]] = []
    prefix, size = shared_prefix(examples), 0
    for example in examples:
        own = len(example.input_ids) - 1 - prefix
        if not groups or not share_prefix or size + own > max_tokens:
            groups.append([])
            size = num_virtual + prefix
        groups[-1].append(example)
        size += own
    weight = 1.0 / sum(example.num_completion for example in examples)
    return [Row(slot, tuple(group), shared_prefix(group), weight, num_virtual) for group in groups]


def plan_passes(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Rows, in slot order, into passes of at most `max_tokens` tokens (or one row)."""
    passes: list[list[Row]] = []
    size = 0
    for row in sorted(rows, key=lambda row: row.slot):
        if not passes or size + row.num_tokens > max_tokens:
            passes.append([])
            size = 0
        passes[-1].append(row)
        size += row.num_tokens
    return passes


@dataclass
class Stream:
    """One forward pass: T tokens of many rows, laid end to end.

    Args:
        input_ids_T, position_ids_T: Positions restart after the prefix for every suffix; virtual tokens have id 0.
        ranges: (slot, start, stop) of each slot's tokens; rows of one slot side by side are one.
        virtual: (slot, start, stop) of each row's virtual tokens.
        plan: How the tokens attend, and whose last hidden states are wanted.
        predict_C: Which of `plan.wanted_K` predicts each completion token.
        targets_C, weights_C: The completion tokens and their loss weights.
        owner_C: Number of each completion token's example, counted over the rows in order.
        slot_C: Slot of each completion token.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    ranges: list[tuple[int, int, int]]
    virtual: list[tuple[int, int, int]]
    plan: SegmentPlan
    predict_C: Tensor
    targets_C: Tensor
    weights_C: Tensor
    owner_C: Tensor
    slot_C: Tensor


def build_stream(rows: Sequence[Row], device: torch.device) -> Stream:
    """Lay rows out, in their order.

    Worked example, prefix "p q", suffixes "a b" and "c d e" whose last tokens are only predicted, completions "b" and
    "d e":

        tokens     p q a c d
        positions  0 1 2 2 3
        predict        ^ ^ ^   targets b d e
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    ranges: list[tuple[int, int, int]] = []
    virtual: list[tuple[int, int, int]] = []
    predict: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    owner: list[int] = []
    slots: list[int] = []
    number = 0
    for row in rows:
        start = len(ids)
        head = row.num_virtual + row.num_prefix
        if row.num_virtual:
            virtual.append((row.slot, start, start + row.num_virtual))
        if head:
            ids += [0] * row.num_virtual + list(row.examples[0].input_ids[: row.num_prefix])
            positions += range(head)
            segments.append(Segment(start, start + head))
        for example in row.examples:
            own_start = len(ids)
            own = example.input_ids[row.num_prefix : -1]
            if own:
                ids += own
                positions += range(head, head + len(own))
                segments.append(Segment(own_start, own_start + len(own), start, start + head))
            first = example.num_prompt - 1
            for place in range(first, len(example.input_ids) - 1):
                in_prefix = place < row.num_prefix
                predict.append(start + row.num_virtual + place if in_prefix else own_start + place - row.num_prefix)
            targets += example.input_ids[example.num_prompt :]
            weights += [row.weight] * example.num_completion
            owner += [number] * example.num_completion
            slots += [row.slot] * example.num_completion
            number += 1
        if ranges and ranges[-1][0] == row.slot:
            ranges[-1] = (row.slot, ranges[-1][1], len(ids))
        else:
            ranges.append((row.slot, start, len(ids)))

    def long(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    plan = plan_segments(segments, device)
    plan.wanted_K, predict_C = torch.unique(long(predict), return_inverse=True)
    return Stream(
        long(ids),
        long(positions),
        ranges,
        virtual,
        plan,
        predict_C,
        long(targets),
        torch.tensor(weights, dtype=torch.float32, device=device),
        long(owner),
        long(slots),
    )

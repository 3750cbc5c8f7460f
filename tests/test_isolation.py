"""What happens to others' adapters, prompts and requests changes nobody's logits by a single bit.

Ann asks in two worlds where the same things happen in the same order. In the first, two slots are fought over; in the
second nobody is ever evicted, and others' adapters and texts, of equal lengths, are different ones. The shapes of every
pass are then equal, so Ann's logits must be equal bit by bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import IA3, LORA, PROMPT, RS_LORA, random_adapter, tiny_model
from tiny import VOCAB_SIZE
from transformers import PreTrainedModel

from oppu_ray.config import PeftConfig
from oppu_ray.core import AdapterState, Request
from oppu_ray.inference import Engine
from oppu_ray.layers import fuse_layers

PEFTS = {"ann": LORA, "bob": RS_LORA, "cleo": IA3, "dan": PROMPT, "eve": LORA}
NUM_VERSIONS = 3

user = st.sampled_from(["ann", *PEFTS])
Step = tuple[str, str, int, int]
steps = st.one_of(
    st.tuples(st.just("ask"), user, st.sampled_from((1, 3, 18, 30)), st.integers(1, 5)),
    st.tuples(st.just("ask the shared model"), user, st.sampled_from((2, 20)), st.integers(1, 3)),
    st.tuples(st.sampled_from(("update", "roll back", "forget", "cancel")), user, st.just(0), st.just(0)),
    st.tuples(st.just("step"), st.just(""), st.integers(1, 4), st.just(0)),
)


@functools.cache
def adapter(user_id: str, version: int, world: int) -> AdapterState:
    seed = 100 * list(PEFTS).index(user_id) + 10 * version + (world if user_id != "ann" else 0)
    return random_adapter(PEFTS[user_id], seed)


@functools.cache
def model() -> PreTrainedModel:
    made = tiny_model()
    assert fuse_layers(made)
    return made


class World:
    """An engine, what each user's current version is, and Ann's logits as they come."""

    def __init__(self, world: int, num_slots: int):
        pefts: list[PeftConfig] = list(PEFTS.values())
        sizes = {"max_rows": 2, "max_tokens_per_pass": 16, "max_tokens_while_decoding": 9}
        self.engine = Engine(model(), num_slots, pefts, prefix_bytes=2**18, **sizes)
        self.world, self.num_asked = world, 0
        self.version = dict.fromkeys(PEFTS, 0)
        self.logits: list[torch.Tensor] = []
        extend = self.engine._extend

        def watch(rows: Sequence, logits_BV: torch.Tensor) -> None:
            self.logits += [
                logits.clone() for one, logits in zip(rows, logits_BV, strict=True) if one.request.user_id == "ann"
            ]
            extend(rows, logits_BV)

        self.engine._extend = watch  # type: ignore[method-assign]

    def prompt(self, user_id: str, length: int) -> tuple[int, ...]:
        """The same beginning for each of a user's prompts, and an end of its own."""
        shift = 0 if user_id == "ann" else 31 * self.world + 7
        start = [37 * list(PEFTS).index(user_id) + i for i in range(length)]
        return tuple((token + shift) % VOCAB_SIZE for token in (*start, 200 + self.num_asked))

    def do(self, step: Step) -> None:
        what, user_id, number, num_new = step
        if what.startswith("ask"):
            adapter_id = f"v{self.version[user_id]}" if what == "ask" else None
            request = Request(
                f"{user_id} {self.num_asked}", self.prompt(user_id, number), adapter_id, num_new, user_id=user_id
            )
            fitted = None
            if not self.engine.is_loaded(request):
                fitted = self.engine.fit(adapter(user_id, self.version[user_id], self.world))
            self.engine.submit(request, fitted)
            self.num_asked += 1
        elif what in ("update", "roll back"):
            move = 1 if what == "update" else -1
            self.version[user_id] = (self.version[user_id] + move) % NUM_VERSIONS
        elif what == "forget":
            self.engine.forget(user_id)
        elif what == "cancel":
            self.engine.cancel(f"{user_id} {self.num_asked - 1}")
        else:
            for _ in range(number):
                self.engine.step()


def run(world: int, num_slots: int, happenings: Sequence[Step]) -> list[torch.Tensor]:
    made = World(world, num_slots)
    try:
        for step in happenings:
            made.do(step)
        while made.engine.has_work:
            made.engine.step()
        return made.logits
    finally:
        made.engine.close()


@given(st.lists(steps, min_size=6, max_size=40))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_nothing_that_happens_to_others_changes_a_users_logits_by_one_bit(happenings: list[Step]) -> None:
    happenings = [("ask", "ann", 18, 4), *happenings, ("ask", "ann", 18, 4)]
    fought_over, quiet = run(0, 2, happenings), run(1, len(PEFTS) * NUM_VERSIONS, happenings)
    assert len(fought_over) == len(quiet) >= 1
    for one, other in zip(fought_over, quiet, strict=True):
        assert one.numpy().tobytes() == other.numpy().tobytes()

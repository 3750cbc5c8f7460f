"""A user's answers have the same bits alone and in any company.

First, Ann asks in two worlds where the same things happen in the same order. In one, two slots are fought over; in the
other nobody is ever evicted, and others' adapters and texts, of equal lengths, are different ones. Then she talks alone
and in engines of other sizes, where others ask, decode, are updated, forgotten and cancelled in any order, and where
what is kept of her prompts is found or not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import IA3, LORA, PROMPT, RS_LORA, random_adapter, tiny_model
from tiny import VOCAB_SIZE
from transformers import PreTrainedModel

from oppu_ray.config import PeftConfig
from oppu_ray.core import AdapterState, Request, TokenEvent
from oppu_ray.inference import MAX_LOGPROBS, Engine
from oppu_ray.kernels import fuse
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


# ---- alone and in company

TURNS = ((tuple(range(100, 130)), 5), (tuple(range(60, 120)), 4), (tuple(range(7, 207)), 6))
"""What Ann adds to the conversation before each of her questions, and how many tokens are answered."""
MODELS = [
    ("llama", torch.float32, 1),
    ("llama", torch.float32, 2),
    ("llama", torch.bfloat16, 1),
    ("llama", torch.bfloat16, 2),
    ("qwen3", torch.float32, 1),
    ("gemma3", torch.bfloat16, 1),
]
in_any_company = pytest.mark.parametrize(
    ("architecture", "dtype", "threads"),
    MODELS,
    indirect=["threads"],
    ids=lambda value: str(value).removeprefix("torch."),
)

Said = tuple[tuple[int, ...], tuple[float, ...], tuple[tuple[tuple[int, float], ...], ...]]
Sizes = dict[str, int]
other = st.sampled_from(("bob", "cleo", "dan", "eve"))
company = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), other, st.sampled_from((1, 3, 18, 45, 150)), st.integers(1, 30)),
        st.tuples(st.just("ask the shared model"), other, st.sampled_from((2, 20)), st.integers(1, 9)),
        st.tuples(st.sampled_from(("update", "forget", "cancel")), other, st.just(0), st.just(0)),
        st.tuples(st.just("step"), st.just(""), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("ann asks"), st.just(""), st.just(0), st.just(0)),
    ),
    min_size=4,
    max_size=25,
)
sizes = st.fixed_dictionaries(
    {
        "max_rows": st.sampled_from((1, 3, 8)),
        "max_tokens_per_pass": st.sampled_from((9, 50, 500)),
        "max_tokens_while_decoding": st.sampled_from((9, 16)),
        "prefix_bytes": st.sampled_from((0, 150_000, 2**22)),
    }
)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test's parameter, set in PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


any_adapter = functools.cache(random_adapter)


@functools.cache
def base(architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    made = tiny_model(architecture, dtype)
    fuse(made)
    fuse_layers(made)
    return made


class Conversation:
    """An engine, and Ann's answers in it with their log-probabilities, turn by turn."""

    def __init__(self, architecture: str, dtype: torch.dtype, kind: str | None, sizes: Sizes):
        pefts = list(PEFTS.values())
        self.engine = Engine(base(architecture, dtype), 5, pefts, max_length=500, **sizes)
        self.kind, self.architecture = kind, architecture
        self.prompt: tuple[int, ...] = ()
        self.said: list[Said] = []
        self.events: list[TokenEvent] = []
        self.is_answered, self.num_others = True, 0
        self.version = dict.fromkeys(PEFTS, 0)

    def ask(self, request: Request, peft: PeftConfig, seed: int) -> None:
        fitted = None
        if not self.engine.is_loaded(request):
            fitted = self.engine.fit(any_adapter(peft, seed, self.architecture))
        self.engine.submit(request, fitted)

    def next_turn(self) -> None:
        if self.is_answered and len(self.said) < len(TURNS):
            more, num_new = TURNS[len(self.said)]
            self.prompt += more
            self.is_answered = False
            adapter_id = "v1" if self.kind else None
            request = Request("ann", self.prompt, adapter_id, num_new, user_id="ann", num_logprobs=MAX_LOGPROBS)
            self.ask(request, PEFTS[self.kind or "ann"], 0)

    def do(self, step: Step) -> None:
        what, user_id, number, num_new = step
        if what == "ann asks":
            self.next_turn()
        elif what.startswith("ask"):
            prompt = tuple((31 * self.num_others + 7 * i) % VOCAB_SIZE for i in range(number))
            adapter_id = f"v{self.version[user_id]}" if what == "ask" else None
            request = Request(f"{user_id} {self.num_others}", prompt, adapter_id, num_new, user_id=user_id)
            self.ask(request, PEFTS[user_id], self.version[user_id] + 1)
            self.num_others += 1
        elif what == "update":
            self.version[user_id] += 1
        elif what == "forget":
            self.engine.forget(user_id)
        elif what == "cancel":
            self.engine.cancel(f"{user_id} {self.num_others - 1}")
        else:
            for _ in range(number):
                self.step()

    def step(self) -> None:
        for event in self.engine.step():
            if event.request_id == "ann":
                assert event.error is None
                self.events.append(event)
                if event.finish_reason:
                    self.answered()

    def answered(self) -> None:
        tokens, logprobs, likeliest = (
            tuple(value for event in self.events for value in getattr(event, name))
            for name in ("token_ids", "logprobs", "top_logprobs")
        )
        assert len(tokens) == len(logprobs) == len(likeliest) == TURNS[len(self.said)][1]
        self.said.append((tokens, logprobs, likeliest))
        self.prompt += tokens
        self.events, self.is_answered = [], True


def talk(
    architecture: str, dtype: torch.dtype, kind: str | None, sizes: Sizes, happenings: Sequence[Step] = ()
) -> list[Said]:
    """Ann's three answers, the last of them when everybody else is served."""
    made = Conversation(architecture, dtype, kind, sizes)
    try:
        for step in happenings:
            made.do(step)
        while made.engine.has_work or len(made.said) < len(TURNS):
            made.next_turn()
            made.step()
        return made.said
    finally:
        made.engine.close()


@functools.cache
def alone(architecture: str, dtype: torch.dtype, threads: int, kind: str | None) -> list[Said]:
    """Each prompt is read at once; what was kept of the last one is not read again."""
    return talk(architecture, dtype, kind, {"max_rows": 1, "max_tokens_per_pass": 500, "prefix_bytes": 2**22})


ASK, ANN_ASKS = ("ask", "bob", 20, 60), ("ann asks", "", 0, 0)
SITUATIONS: dict[str, tuple[Sizes, list[Step]]] = {
    "prompts in the same pass": ({}, [("ask", user_id, 20, 5) for user_id in ("bob", "cleo", "dan")]),
    "others decode meanwhile": ({}, [ASK, ("ask", "eve", 3, 60), ("step", "", 3, 0), ANN_ASKS]),
    "a prompt in pieces": ({"max_tokens_per_pass": 64, "max_tokens_while_decoding": 7}, [ASK, ("step", "", 2, 0)]),
    "nothing is kept": ({"prefix_bytes": 0}, []),
    "others have evicted it": (
        {"prefix_bytes": 150_000},
        [ANN_ASKS, ("step", "", 12, 0), *[("ask", user_id, 150, 2) for user_id in ("bob", "eve")], ("step", "", 9, 0)],
    ),
}


@in_any_company
@pytest.mark.parametrize("situation", SITUATIONS)
def test_an_answer_has_the_bits_of_being_alone(
    situation: str, architecture: str, dtype: torch.dtype, threads: int
) -> None:
    """Tokens and log-probabilities."""
    sizes, happenings = SITUATIONS[situation]
    sizes = {"max_rows": 8, "max_tokens_per_pass": 256, "prefix_bytes": 2**22, **sizes}
    for kind in ("ann", "dan"):
        assert talk(architecture, dtype, kind, sizes, happenings) == alone(architecture, dtype, threads, kind)


@in_any_company
def test_an_answer_has_the_bits_of_being_alone_in_any_company(
    architecture: str, dtype: torch.dtype, threads: int
) -> None:
    @given(st.sampled_from((None, "ann", "bob", "cleo", "dan")), sizes, company)
    @settings(max_examples=10, deadline=None, derandomize=True)
    def check(kind: str | None, sizes: Sizes, happenings: list[Step]) -> None:
        assert talk(architecture, dtype, kind, sizes, happenings) == alone(architecture, dtype, threads, kind)

    check()

"""The serving engine: requests that come and go, in pieces, with kept prompts, sampled, constrained, streamed."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from reference import IA3, LORA, PROMPT, RS_LORA, greedy_alone, peft_model, random_adapter, tiny_model
from tiny import ARCHITECTURES, VOCAB_SIZE, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from oppu_ray.answer_text import AnswerText
from oppu_ray.core import Request, TokenEvent
from oppu_ray.inference import Engine
from oppu_ray.layers import fuse_layers

PEFTS = {"lora": LORA, "rslora": RS_LORA, "ia3": IA3, "prompt": PROMPT}
TOKENIZER = tiny_tokenizer()
PROMPT_IDS = tuple(range(40, 64))


def make_engine(
    architecture: str = "llama", num_slots: int = 4, max_rows: int = 4, max_tokens_per_pass: int = 40, **kwargs: int
) -> Engine:
    engine = Engine(
        tiny_model(architecture),
        num_slots,
        PEFTS.values(),
        max_rows,
        max_tokens_per_pass,
        tokenizer=TOKENIZER,
        **kwargs,
    )
    for number, (name, peft) in enumerate(PEFTS.items()):
        engine.load(name, random_adapter(peft, number, architecture))
    return engine


def answer(engine: Engine, *requests: Request) -> dict[str, list[TokenEvent]]:
    """Submit together and step to the end; each request's events."""
    for request in requests:
        engine.submit(request)
    return drain(engine)


def drain(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    assert not engine.cache.layers.any()  # whoever left, left nothing
    return events


def tokens(events: list[TokenEvent]) -> tuple[int, ...]:
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    return tuple(token for event in events for token in event.token_ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_requests_that_come_while_others_are_answered_get_hugging_faces_answers(architecture: str) -> None:
    """A long prompt is read in pieces of 7 tokens meanwhile; every kind of adapter, and the base, is in the batch."""
    engine, draw = make_engine(architecture, max_tokens_per_pass=7), random.Random(0)
    names = [None, *PEFTS] * 2
    requests = [
        Request(f"r{i}", tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.choice((2, 5, 6, 33)))), name, 3 + i)
        for i, name in enumerate(names)
    ]
    found: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
        for event in engine.step():
            found[event.request_id] += event.token_ids
    for request_id, events in drain(engine).items():
        found[request_id] += [token for event in events for token in event.token_ids]
    models = {None: peft_model(None, architecture)} | {
        name: peft_model(random_adapter(peft, number, architecture), architecture)
        for number, (name, peft) in enumerate(PEFTS.items())
    }
    for request in requests:
        expected = greedy_alone(models[request.adapter_id], request.prompt_ids, request.max_new_tokens, frozenset())
        assert tuple(found[request.request_id]) == expected


@pytest.mark.parametrize("name", [None, *PEFTS])
def test_a_written_out_layer_decodes_as_hugging_face(name: str | None) -> None:
    model = tiny_model()
    assert fuse_layers(model)
    engine = Engine(model, 4, PEFTS.values())
    for number, (other, peft) in enumerate(PEFTS.items()):
        engine.load(other, random_adapter(peft, number))
    others = [Request(f"other{i}", PROMPT_IDS[i:], other, 12) for i, other in enumerate((None, *PEFTS))]
    made = engine.generate([*others, Request("r", PROMPT_IDS, name, 10)], frozenset())[-1]
    alone = peft_model(random_adapter(PEFTS[name], list(PEFTS).index(name)) if name else None)
    assert made.token_ids == greedy_alone(alone, PROMPT_IDS, 10, frozenset())


def test_warming_up_leaves_no_trace() -> None:
    engine = Engine(tiny_model(), 2, PEFTS.values())
    engine.warm_up()
    assert not engine.slots.keys() and not engine.has_work and not engine.cache.layers.any()
    assert engine.bank.peft == [None, None]


def test_nobody_waits_for_a_long_prompt() -> None:
    """While 200 tokens are read 10 at a time, a row being answered gets a token at every step."""
    engine = make_engine(max_tokens_per_pass=10)
    engine.submit(Request("short", (5, 6, 7), "lora", 30))
    engine.step()
    engine.submit(Request("long", tuple(range(200)), "ia3", 4))
    for _ in range(19):
        assert [event.request_id for event in engine.step()] == ["short"]
    assert {event.request_id for event in engine.step()} == {"short", "long"}
    drain(engine)


def test_a_step_reads_no_more_prompt_tokens_than_a_pass_has(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, read = make_engine(max_rows=8, max_tokens_per_pass=10), []
    original = engine._read
    monkeypatch.setattr(engine, "_read", lambda parts: (read.append(sum(num for _, num in parts)), original(parts)))
    answer(engine, *(Request(f"r{i}", tuple(range(1, 2 + 5 * i)), "prompt", 2) for i in range(7)))
    assert max(read) == 10 and sum(read) == sum(1 + 5 * i for i in range(7)) + 7 * 3  # three virtual tokens each


def test_a_pass_is_shorter_while_somebody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, read = make_engine(max_tokens_per_pass=40, max_tokens_while_decoding=10), []
    original = engine._read
    monkeypatch.setattr(engine, "_read", lambda parts: (read.append(sum(num for _, num in parts)), original(parts)))
    engine.submit(Request("first", tuple(range(100)), "lora", 30))
    while engine.num_waiting or len(read) < 3:
        engine.step()
    answer(engine, Request("second", tuple(range(25)), "ia3", 2))
    assert read == [40, 40, 20, 10, 10, 5]


@pytest.mark.parametrize("name", list(PEFTS))
def test_a_kept_prompt_is_not_read_again_and_changes_no_answer(name: str) -> None:
    engine, adapter = make_engine(num_slots=5, prefix_bytes=2**20), random_adapter(PEFTS[name], 9)
    fitted = engine.fit(adapter)
    first = Request("first", PROMPT_IDS, "v1", 6, user_id="ann")
    second = replace(first, request_id="second", prompt_ids=(*PROMPT_IDS[:20], 7, 8, 9))
    engine.submit(first, fitted)
    assert tokens(drain(engine)["first"]) == greedy_alone(peft_model(adapter), PROMPT_IDS, 6, frozenset())
    events = answer(engine, second, replace(first, request_id="again"))
    assert events["second"][0].num_cached == 20 and events["again"][0].num_cached == len(PROMPT_IDS) - 1
    assert all(event.num_cached == 0 for event in events["second"][1:])
    assert tokens(events["second"]) == greedy_alone(peft_model(adapter), second.prompt_ids, 6, frozenset())


def test_a_chat_goes_on_where_it_stopped() -> None:
    """The next turn begins with the last prompt and its answer; both are kept."""
    engine = make_engine(prefix_bytes=2**20)
    request = Request("one", PROMPT_IDS, None, 5, user_id="ann")
    said = tokens(answer(engine, request)["one"])
    events = answer(engine, replace(request, request_id="two", prompt_ids=(*PROMPT_IDS, *said, 77, 78)))["two"]
    assert events[0].num_cached == len(PROMPT_IDS) + len(said) - 1  # the last token was never read


def test_a_prompt_is_kept_for_its_user_and_version_alone() -> None:
    engine = make_engine(num_slots=8, prefix_bytes=2**20)
    adapters = {key: engine.fit(random_adapter(LORA, seed)) for seed, key in enumerate(("a1", "a2", "b1"))}

    def cached(user_id: str, adapter_id: str | None) -> int:
        engine.submit(Request("r", PROMPT_IDS, adapter_id, 3, user_id=user_id), adapters.get(adapter_id or ""))
        return drain(engine)["r"][0].num_cached

    assert cached("ann", "a1") == 0 and cached("ann", "a1") == 23
    assert (
        cached("ann", "a2")
        == cached("bob", "b1")
        == cached("ann", None)
        == cached("bob", None)
        == cached("", None)
        == 0
    )
    assert cached("ann", None) == cached("bob", None) == cached("bob", "b1") == 23
    assert cached("", None) == 0
    engine.forget("bob")
    assert cached("bob", "b1") == cached("bob", None) == 0 and cached("ann", "a1") == cached("ann", None) == 23
    engine.forget_everyone()
    assert {user_id for user_id, _ in (*engine.slots.keys(), *engine.prefixes.keys())} == {""}


def test_kept_prompts_stay_within_their_bytes() -> None:
    engine = make_engine(prefix_bytes=40_000)  # two layers, two heads of 16 in float32: 512 bytes a token
    for i in range(6):
        answer(engine, Request(f"r{i}", (i, *PROMPT_IDS), None, 3, user_id="ann"))
        assert 0 < engine.prefixes.num_bytes <= 40_000
    assert answer(engine, Request("r", (5, *PROMPT_IDS), None, 3, user_id="ann"))["r"][0].num_cached == 24
    assert answer(engine, Request("r", (0, *PROMPT_IDS), None, 3, user_id="ann"))["r"][0].num_cached == 0


@pytest.mark.parametrize("when", ["waiting", "reading", "answering"])
def test_a_cancelled_request_frees_its_row_and_slot_at_once(when: str) -> None:
    engine = make_engine(max_rows=2, max_tokens_per_pass=10)
    stays, goes, waits = (Request(name, PROMPT_IDS, kind, 8) for name, kind in zip("sgw", PEFTS, strict=False))
    alone = {r.request_id: tokens(answer(engine, r)[r.request_id]) for r in (stays, goes, waits)}
    for request in (goes, stays, waits):
        engine.submit(request)
    for _ in range({"waiting": 0, "reading": 2, "answering": 7}[when]):
        engine.step()
    assert engine.cancel("g") and not engine.cancel("g") and not engine.cancel("nobody")
    assert engine.slots._residents["", "rslora"].num_holders == 1  # its `load` alone
    events = engine.step()
    assert TokenEvent("g", finish_reason="cancelled") in events
    later = drain(engine)
    assert "g" not in later and tokens(later["w"]) == alone["w"]
    assert tokens(later["s"]) == alone["s"][-sum(len(event.token_ids) for event in later["s"]) :]


def test_an_unknown_adapter_costs_nobody_a_slot_and_a_loaded_one_is_shared() -> None:
    engine = Engine(tiny_model(), 2, [LORA], max_rows=2)
    ann, bob, cleo = (engine.fit(random_adapter(LORA, seed)) for seed in range(3))
    for user_id, adapter in (("ann", ann), ("bob", bob)):
        engine.submit(Request(user_id, PROMPT_IDS, "v1", 2, user_id=user_id), adapter)
    drain(engine)
    with pytest.raises(ValueError, match="adapter 'v1' is not loaded"):
        engine.submit(Request("r", PROMPT_IDS, "v1", 2, user_id="cleo"))
    with pytest.raises(ValueError, match="not finite"):
        broken = random_adapter(LORA, 5)
        next(iter(broken.tensors.values()))[0] = float("nan")
        engine.fit(broken)
    assert engine.slots.keys() == [("ann", "v1"), ("bob", "v1")]
    assert engine.is_loaded(Request("r", PROMPT_IDS, "v1", user_id="ann"))
    answer(engine, Request("r", PROMPT_IDS, "v1", 2, user_id="ann"))
    engine.submit(Request("c", PROMPT_IDS, "v1", 2, user_id="cleo"), cleo)
    drain(engine)
    assert engine.slots.keys() == [("ann", "v1"), ("cleo", "v1")]  # bob was the least recently used


def test_what_a_request_uses_is_neither_replaced_nor_unloaded() -> None:
    engine = make_engine()
    request = Request("r", PROMPT_IDS, "lora", 6)
    expected = tokens(answer(engine, request)["r"])
    engine.submit(request)
    events = engine.step()
    for change in (lambda: engine.load("lora", random_adapter(LORA, 9)), engine.unload_all):
        with pytest.raises(ValueError, match="adapter 'lora' is in use"):
            change()
    events += drain(engine)["r"]
    assert tokens(events) == expected
    engine.unload_all()
    assert not engine.slots.keys()


def test_an_adapter_in_use_keeps_its_slot() -> None:
    """Ann's is the least recently used one when cleo comes, but she is still being answered."""
    engine = Engine(tiny_model(), 2, [LORA], max_rows=2)
    ann, *others = (random_adapter(LORA, seed) for seed in range(4))
    engine.submit(Request("ann", PROMPT_IDS, "v", 20, user_id="ann"), engine.fit(ann))
    for i, other in enumerate(others):
        engine.submit(Request(f"other{i}", PROMPT_IDS, "v", 2, user_id=f"other{i}"), engine.fit(other))
    events = drain(engine)
    assert tokens(events["ann"]) == greedy_alone(peft_model(ann), PROMPT_IDS, 20, frozenset())
    assert engine.slots.keys() == [("ann", "v"), ("other2", "v")]


def test_an_adapter_given_away_while_its_request_waits_is_put_back() -> None:
    engine = Engine(tiny_model(), 1, [LORA], max_rows=3)
    states = {name: random_adapter(LORA, seed) for seed, name in enumerate(("ann", "bob"))}
    for name, state in states.items():
        engine.submit(Request(name, PROMPT_IDS, "v", 4, user_id=name), engine.fit(state))
    engine.submit(Request("ann again", PROMPT_IDS, "v", 4, user_id="ann"), engine.fit(states["ann"]))
    events = drain(engine)
    for request_id, made in events.items():
        assert tokens(made) == greedy_alone(peft_model(states[request_id[:3]]), PROMPT_IDS, 4, frozenset())
    assert list(events) == ["ann", "bob", "ann again"]  # in turn: all slots were in use


def test_a_request_that_can_never_have_a_slot_ends_with_an_error() -> None:
    engine = make_engine()
    engine.submit(Request("r", PROMPT_IDS, "v1", 4, user_id="ann"), engine.fit(random_adapter(LORA, 9)))
    (event,) = drain(engine)["r"]
    assert event.finish_reason == "error" and event.error == "all 4 adapter slots are taken"


def test_what_overflows_ends_with_an_error_alone() -> None:
    engine = make_engine(num_slots=5)
    broken = random_adapter(LORA, 3)
    for value in broken.tensors.values():
        value[...] = 3e38
    engine.load("broken", broken)
    expected = tokens(answer(engine, Request("good", PROMPT_IDS, "ia3", 5))["good"])
    events = answer(engine, Request("bad", PROMPT_IDS, "broken", 5), Request("good", PROMPT_IDS, "ia3", 5))
    assert tokens(events["good"]) == expected
    (event,) = events["bad"]
    assert event.finish_reason == "error" and event.error and "not finite" in event.error


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_ids": ()}, "the prompt is empty"),
        ({"prompt_ids": (5, VOCAB_SIZE)}, "token 300 is not in the vocabulary of 300"),
        ({"prompt_ids": (-1,)}, "token -1 is not"),
        ({"labels": ((5, VOCAB_SIZE),)}, "token 300 is not in the vocabulary of 300"),
        ({"labels": ((5,),), "stop_ids": frozenset({VOCAB_SIZE})}, "token 300 is not in"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 10**9}, "a prompt of 3 tokens and 1000000000 new ones, expected at most 512 together"),
        ({"prompt_ids": (5,) * 500}, "a prompt of 500 tokens and 32 new ones"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"num_logprobs": 21}, "num_logprobs is 21, expected 0 to 20"),
        ({"num_logprobs": -1}, "num_logprobs is -1"),
        ({"stop": ("",)}, "stop texts"),
        ({"labels": ((), (1,))}, "a label is empty"),
        ({"labels": ((1,) * 33,)}, "longer than max_new_tokens, 32"),
        ({"labels": ((1,), (1, 2))}, "a label is the beginning of another"),
        ({"labels": ((1, 9),), "stop_ids": frozenset({9})}, "a stop token in it"),
        ({"adapter_id": "nobody"}, "adapter 'nobody' is not loaded"),
        ({"adapter_id": "lora", "user_id": "mallory"}, "adapter 'lora' is not loaded"),
        ({"request_id": "first"}, "request 'first': this id is already under way"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_disturbs_nobody(changes: dict, message: str) -> None:
    engine = make_engine()
    first = Request("first", PROMPT_IDS, "lora", 4)
    expected = tokens(answer(engine, first)["first"])
    engine.submit(first)
    with pytest.raises(ValueError, match=message):
        engine.submit(replace(Request("r", (5, 6, 7)), **changes))
    events = drain(engine)
    assert list(events) == ["first"] and tokens(events["first"]) == expected


def test_a_prompt_as_long_as_the_bound_is_answered() -> None:
    engine = make_engine(max_length=60)
    request = Request("r", tuple(range(50)), "lora", 10)
    made = tokens(answer(engine, request)["r"])
    assert made == greedy_alone(peft_model(random_adapter(LORA, 0)), request.prompt_ids, 10, frozenset())
    with pytest.raises(ValueError, match="at most 60 together"):
        engine.submit(replace(request, max_new_tokens=11))


def test_a_seed_gives_the_same_answer_in_any_company() -> None:
    engine = make_engine(max_rows=8)
    request = Request("r", PROMPT_IDS, "lora", 12, temperature=1.5, top_p=0.9, seed=7)
    alone = tokens(answer(engine, request)["r"])
    others = [Request(f"o{i}", PROMPT_IDS[i:], "ia3", 9, temperature=1.0, seed=i) for i in range(3)]
    assert tokens(answer(engine, *others, request)["r"]) == alone
    assert tokens(answer(engine, replace(request, seed=8))["r"]) != alone
    greedy = greedy_alone(peft_model(random_adapter(LORA, 0)), PROMPT_IDS, 12, frozenset())
    assert tokens(answer(engine, replace(request, temperature=1e-4))["r"]) == greedy


def test_logprobs_are_the_models_own() -> None:
    engine = make_engine()
    request = Request("r", PROMPT_IDS, "rslora", 6, temperature=2.0, top_p=0.8, seed=1, num_logprobs=3)
    events = answer(engine, request, Request("none", PROMPT_IDS, "rslora", 2))
    model, ids = peft_model(random_adapter(RS_LORA, 1)), list(PROMPT_IDS)
    for event in events["r"]:
        with torch.no_grad():
            logprobs_V = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
        (token,), (logprob,), (top,) = event.token_ids, event.logprobs, event.top_logprobs
        assert logprob == pytest.approx(float(logprobs_V[token]), abs=1e-4)
        best = logprobs_V.topk(3)
        assert [other for other, _ in top] == best.indices.tolist()
        assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-4)
        ids.append(token)
    assert all(event.logprobs == () == event.top_logprobs for event in events["none"])


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_an_answer_is_one_of_the_labels(temperature: float) -> None:
    engine, stop_ids = make_engine(), frozenset({2})
    labels = ((10, 11), (10, 11, 12), (10, 30), (200,), (201, 5, 6, 7))
    for seed in range(12):
        request = Request(
            "r", (seed, *PROMPT_IDS), "lora", 6, stop_ids, labels=labels, temperature=temperature, seed=seed
        )
        events = answer(engine, request)["r"]
        assert tokens(events) in labels and events[-1].finish_reason == "stop"


def test_the_likeliest_way_to_a_label_is_taken() -> None:
    """Token by token, among what the labels allow, by the adapter's own logits; a complete label may go on or end."""
    engine, stop_ids = make_engine(), frozenset({2})
    labels = ((10, 11), (10, 11, 12), (200,), (201, 5))
    model = peft_model(random_adapter(LORA, 0))
    for start in range(12):
        prompt, ids = (start, *PROMPT_IDS), [start, *PROMPT_IDS]
        while True:
            said = tuple(ids[len(prompt) :])
            after = {label[len(said)] for label in labels if label[: len(said)] == said and len(label) > len(said)}
            allowed = sorted(after | (stop_ids if said in labels and after else set()))
            if not allowed:
                break
            with torch.no_grad():
                logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1]
            best = max(allowed, key=lambda token: float(logits_V[token]))
            if best in stop_ids:
                break
            ids.append(best)
        assert tokens(answer(engine, Request("r", prompt, "lora", 6, stop_ids, labels=labels))["r"]) == said


def test_bytes_that_make_no_character_end_nobodys_answer() -> None:
    """Such tokenizers (Gemma's) decode a run of bytes as a whole: half a character takes the whole ones before back."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "\u2581b"]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for whole, half in (("\U00013000", b"\xe2"), ("A", b"\xc3"), ("", b"\xc3")):
        text = AnswerText(tokenizer, ())
        tokens = [names.index(f"<0x{byte:02X}>") for byte in whole.encode() + half] + [names.index("a"), len(names) - 1]
        assert "".join(map(text.push, tokens)).replace("\ufffd", "") == whole + "a b"


def test_text_comes_as_it_is_written_and_ends_before_a_stop_text() -> None:
    engine = make_engine()
    request = Request("r", PROMPT_IDS, "ia3", 40, temperature=3.0, seed=3)
    whole = answer(engine, request)["r"]
    text = TOKENIZER.decode(tokens(whole), skip_special_tokens=True).rstrip("\ufffd")
    streamed = "".join(event.text for event in whole)
    assert streamed == text and sum(bool(event.text) for event in whole) > 5
    for start in range(5, len(text) - 3, 3):
        stop = text[start : start + 3]
        stopped = answer(engine, replace(request, stop=("never", stop)))["r"]
        assert "".join(event.text for event in stopped) == text[: text.index(stop)], json.dumps(stop)
        assert stopped[-1].finish_reason == "stop" and len(stopped) <= len(whole)

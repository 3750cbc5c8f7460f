"""Answers of a mixed batch are each user's own: equal to Hugging Face one by one, whoever else is in the batch."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    IA3,
    LORA,
    PROMPT,
    RS_LORA,
    base_bytes,
    greedy_alone,
    mean_nll,
    peft_model,
    random_adapter,
    random_examples,
    tiny_model,
)
from tiny import ARCHITECTURES, VOCAB_SIZE

from oppu_ray.config import PeftConfig
from oppu_ray.core import AdapterState, Answer, Example, Request
from oppu_ray.inference import Engine

PEFTS = {"a-lora": LORA, "b-rslora": RS_LORA, "c-ia3": IA3, "d-prompt": PROMPT}
STOP = frozenset(range(0, VOCAB_SIZE, 12))  # so many that about half of the answers end early


def make_engine(architecture: str = "llama", max_rows: int = 4, max_tokens_per_pass: int = 40) -> Engine:
    """An engine with every kind of adapter loaded."""
    engine = Engine(tiny_model(architecture), len(PEFTS), PEFTS.values(), max_rows, max_tokens_per_pass)
    for number, (adapter_id, peft) in enumerate(PEFTS.items()):
        engine.load(adapter_id, random_adapter(peft, number, architecture))
    return engine


def make_requests(num: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 30 tokens for the base and each adapter in turn, asking for 1 to 9 tokens."""
    draw, adapters = random.Random(seed), [None, *reversed(PEFTS)]
    return [
        Request(
            f"r{i}",
            tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 30))),
            adapters[i % len(adapters)],
            draw.randint(1, 9),
        )
        for i in range(num)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_answers_as_hugging_face_one_by_one(architecture: str) -> None:
    requests = make_requests(23)
    answers = make_engine(architecture).generate(requests, STOP)
    models = {None: peft_model(None, architecture)} | {
        adapter_id: peft_model(random_adapter(peft, number, architecture), architecture)
        for number, (adapter_id, peft) in enumerate(PEFTS.items())
    }
    expected = [
        Answer(r.request_id, greedy_alone(models[r.adapter_id], r.prompt_ids, r.max_new_tokens, STOP)) for r in requests
    ]
    assert answers == expected
    full = [len(answer.token_ids) == request.max_new_tokens for answer, request in zip(answers, requests, strict=True)]
    assert any(full) and not all(full)


@pytest.mark.parametrize("max_rows, max_tokens_per_pass", [(1, 10), (2, 1000), (5, 33), (64, 4096)])
def test_the_size_of_the_batch_does_not_change_the_answers(max_rows: int, max_tokens_per_pass: int) -> None:
    requests = make_requests(17, seed=1)
    finished: list[int] = []
    answers = make_engine(max_rows=max_rows, max_tokens_per_pass=max_tokens_per_pass).generate(
        requests, STOP, finished.append
    )
    assert answers == [make_engine(max_rows=1).generate([request], STOP)[0] for request in requests]
    assert sum(finished) == 17


def test_stop_tokens_end_an_answer_and_are_not_part_of_it() -> None:
    request, engine = Request("r", (5, 6, 7), "a-lora", 8), make_engine()
    (free,) = engine.generate([request], frozenset())
    assert len(free.token_ids) == 8
    (stopped,) = engine.generate([request], frozenset({free.token_ids[3]}))
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3])]
    (nothing,) = engine.generate([request], frozenset({free.token_ids[0]}))
    assert nothing.token_ids == ()


def test_no_requests_have_no_answers() -> None:
    assert make_engine().generate([], STOP) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_hugging_faces_mean_nll(architecture: str) -> None:
    engine = make_engine(architecture)
    groups = [(adapter_id, random_examples(i, 5, 7 * i)) for i, adapter_id in enumerate([*PEFTS, None, "a-lora"])]
    scored: list[int] = []
    found = engine.score(groups, scored.append)
    assert sum(scored) > len(groups)  # some groups take more rows than one
    for (adapter_id, examples), group in zip(groups, found, strict=True):
        number = list(PEFTS).index(adapter_id) if adapter_id else 0
        adapter = random_adapter(PEFTS[adapter_id], number, architecture) if adapter_id else None
        model = peft_model(adapter, architecture)
        assert group == pytest.approx([mean_nll(model, example) for example in examples], abs=1e-5)


@pytest.mark.parametrize("adapter_id", [None, *PEFTS])
def test_scores_of_examples_that_share_a_prompt_are_those_of_each_alone(adapter_id: str | None) -> None:
    """One query, every label: the whole prompt is shared, and one label is the beginning of another."""
    prompt = (9, 8, 7, 6, 5, 4)
    examples = [Example((*prompt, *label), 6) for label in ((1,), (1, 20), (30, 40, 50), (1,))]
    engine = make_engine(max_tokens_per_pass=1000)
    together, alone = engine.score([(adapter_id, examples)])[0], engine.score([(adapter_id, [e]) for e in examples])
    assert together == pytest.approx([score for (score,) in alone], abs=1e-5)
    assert together[0] == pytest.approx(together[3], abs=1e-5) and len({round(x, 3) for x in together}) == 3


def test_an_adapter_is_found_by_its_name_and_slots_run_out() -> None:
    engine, request = make_engine(), Request("r", (5, 6, 7), "e-new", 4)
    with pytest.raises(ValueError, match="adapter 'e-new' is not loaded"):
        engine.generate([request], STOP)
    with pytest.raises(ValueError, match="adapter 'e-new' is not loaded"):
        engine.score([("e-new", random_examples(0, 1))])
    with pytest.raises(ValueError, match="all 4 adapter slots are taken"):
        engine.load("e-new", random_adapter(LORA, 9))
    engine.unload_all()
    engine.load("e-new", random_adapter(LORA, 9))
    expected = greedy_alone(peft_model(random_adapter(LORA, 9)), request.prompt_ids, 4, STOP)
    assert engine.generate([request], STOP)[0].token_ids == expected


@pytest.mark.parametrize("peft", [LORA, IA3], ids=["lora", "ia3"])
def test_an_adapter_that_overflows_is_not_felt_by_who_takes_its_place(peft: PeftConfig) -> None:
    """Its row of the cache is full of NaN when a shorter request moves in beside a longer one."""
    fresh = random_adapter(peft, 5)
    huge = AdapterState({key: np.full_like(value, 3e38) for key, value in fresh.tensors.items()}, fresh.peft_config)
    answers = []
    for second in (fresh, huge):
        engine = Engine(tiny_model(), 3, [LORA, peft], max_rows=2)
        for adapter_id, adapter in (("a", random_adapter(LORA, 0)), ("b", second), ("c", random_adapter(LORA, 1))):
            engine.load(adapter_id, adapter)
        long, theirs = Request("long", tuple(range(30, 60)), "a", 12), Request("theirs", tuple(range(60, 85)), "b", 3)
        for request in (long, theirs, Request("short", (5, 6, 7), "c", 6)):
            engine.submit(request)
        made = []
        while engine.has_work:
            made += [(event.request_id, event.token_ids) for event in engine.step() if event.request_id != "theirs"]
        answers.append(sorted(made, key=lambda event: event[0]))
    assert answers[0] == answers[1] and len(answers[0]) == 12 + 6


def test_an_adapter_that_overflows_has_neither_answers_nor_scores() -> None:
    """A NaN is no likelihood: of three, the first would count as the smallest."""
    engine, fresh = Engine(tiny_model(), 1, [LORA]), random_adapter(LORA, 5)
    huge = AdapterState({key: np.full_like(value, 3e38) for key, value in fresh.tensors.items()}, fresh.peft_config)
    engine.load("huge", huge)
    with pytest.raises(ValueError, match="request 'r' to adapter 'huge': .* not finite"):
        engine.generate([Request("r", (5, 6, 7), "huge", 4)], STOP)
    with pytest.raises(ValueError, match="adapter 'huge' gives logits that are not finite"):
        engine.score([(None, random_examples(0, 2)), ("huge", random_examples(1, 2))])
    assert not engine.has_work


def test_a_group_of_nothing_has_no_scores() -> None:
    assert make_engine().score([(None, []), ("a-lora", [])]) == [[], []]


def test_a_refused_batch_cancels_nobody_elses_request() -> None:
    engine, mine = make_engine(), Request("r", (5, 6, 7), "a-lora", 4)
    engine.submit(mine)
    with pytest.raises(ValueError, match="already under way"):
        engine.generate([Request("q", (4,)), replace(mine, prompt_ids=(8,))], STOP)
    assert engine.num_waiting == 1 and engine.step()[0].request_id == "r"


def test_a_loaded_name_is_replaced_in_place() -> None:
    engine, examples = make_engine(), random_examples(0, 2)
    others = engine.score([("b-rslora", examples), ("c-ia3", examples)])
    engine.load("a-lora", random_adapter(PROMPT, 9))
    model = peft_model(random_adapter(PROMPT, 9))
    assert engine.score([("a-lora", examples)])[0] == pytest.approx([mean_nll(model, e) for e in examples], abs=1e-5)
    assert engine.score([("b-rslora", examples), ("c-ia3", examples)]) == others


def test_an_empty_prompt_is_refused_with_its_request() -> None:
    with pytest.raises(ValueError, match="request 'r7': the prompt is empty"):
        make_engine().generate([Request("r1", (4,)), Request("r7", ())], STOP)


def test_a_refused_batch_leaves_the_engine_usable() -> None:
    engine, requests = make_engine(), make_requests(6)
    before = engine.generate(requests, STOP)
    with pytest.raises(ValueError):
        engine.generate([*requests, Request("bad", (4,), "nobody")], STOP)
    assert engine.generate(requests, STOP) == before


def test_the_base_is_left_as_it_was() -> None:
    model, ids = tiny_model(), torch.tensor([[5, 6, 7, 8]])
    before, modules, logits = base_bytes(model), dict(model.named_modules()), model(input_ids=ids).logits
    engine = Engine(model, 1, [LORA])
    engine.load("one", random_adapter(LORA, 0))
    engine.generate([Request("r", (5, 6), "one", 4)], STOP)
    engine.close()
    assert dict(model.named_modules()) == modules and base_bytes(model) == before
    assert torch.equal(model(input_ids=ids).logits, logits)

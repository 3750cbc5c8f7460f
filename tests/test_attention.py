"""Attention over a stream of many rows is attention over each row's examples alone, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LORA, TRAIN, difference, gradients, random_adapter, random_examples, tiny_model
from tiny import VOCAB_SIZE
from transformers import LlamaConfig, LlamaForCausalLM

from oppu_ray.adapters import AdapterBank
from oppu_ray.attention import attend, plan_segments
from oppu_ray.attention_groups import Segment
from oppu_ray.core import Example
from oppu_ray.packing import Row, build_stream, shared_prefix
from oppu_ray.training import backward_step

# A row: the length of its prefix, and of each example's prompt and completion.
parts = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=4)
lengths = st.tuples(st.integers(0, 20), parts)


def make_row(slot: int, layout: tuple[int, list[tuple[int, int]]]) -> Row:
    """A row of random tokens; `layout` is its prefix's length and the lengths of each example's two parts."""
    num_shared, own_and_rest = layout
    draw = torch.Generator().manual_seed(slot)

    def tokens(num: int) -> list[int]:
        return torch.randint(VOCAB_SIZE, (num,), generator=draw).tolist()

    shared = tokens(num_shared)
    examples = tuple(Example((*shared, *tokens(own), *tokens(rest)), num_shared + own) for own, rest in own_and_rest)
    return Row(slot, examples, shared_prefix(examples))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_stream_is_read_as_its_examples_alone(architecture: str) -> None:
    plain, model = tiny_model(architecture), tiny_model(architecture)
    bank = AdapterBank(model, 1, [], trainable=False)

    @given(st.lists(lengths, min_size=1, max_size=4))
    @settings(max_examples=25, deadline=None)
    @torch.no_grad()
    def check(made: list[tuple[int, list[tuple[int, int]]]]) -> None:
        rows = [make_row(slot, layout) for slot, layout in enumerate(made)]
        stream = build_stream(rows, torch.device("cpu"))
        bank.use([])
        hidden_KD = bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan)
        found = iter(hidden_KD[stream.predict_C].split([e.num_completion for row in rows for e in row.examples]))
        for example in (example for row in rows for example in row.examples):
            alone = plain.model(input_ids=torch.tensor([example.input_ids])).last_hidden_state[0]
            torch.testing.assert_close(next(found), alone[example.num_prompt - 1 : -1], atol=2e-5, rtol=0)

    check()


@pytest.mark.parametrize("max_length", [100, 3, 2])
def test_segments_see_what_a_dense_mask_shows(max_length: int) -> None:
    """Two rows of different shapes in one stream, long segments in pieces, with and without a window."""
    segments = [Segment(0, 4), Segment(4, 9, 0, 4), Segment(9, 11, 0, 4), Segment(11, 18), Segment(18, 20, 11, 18)]
    positions = [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 20, 8, generator=draw).requires_grad_() for heads in (4, 2, 2))
    for window in (None, 3):
        seen = torch.zeros(20, 20, dtype=torch.bool)
        for segment in segments:
            for query in range(segment.start, segment.stop):
                for key in [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, query + 1)]:
                    seen[query, key] = window is None or positions[query] - positions[key] < window
        wide_k, wide_v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = (q @ wide_k.transpose(-1, -2) * 0.3).masked_fill(~seen, float("-inf"))
        expected = (scores.softmax(-1) @ wide_v).transpose(1, 2)
        plan = plan_segments(segments, q.device, max_length=max_length)
        found, _ = attend(module, q, k, v, None, 0.3, plan=plan, sliding_window=window)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        towards = torch.randn(found.shape, generator=draw)
        wanted = torch.autograd.grad((expected * towards).sum(), (q, k, v))
        got = torch.autograd.grad((found * towards).sum(), (q, k, v))
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_gradients_through_shared_prefixes_are_those_of_separate_rows(architecture: str) -> None:
    bank = AdapterBank(tiny_model(architecture), 4, [LORA], trainable=True)

    @given(st.lists(lengths, min_size=4, max_size=4))
    @settings(max_examples=15, deadline=None)
    def check(made: list[tuple[int, list[tuple[int, int]]]]) -> None:
        rows = [make_row(slot, layout) for slot, layout in enumerate(made)]
        texts: dict[int, Sequence[Example]] = {row.slot: row.examples for row in rows}
        found = []
        for share in (True, False):
            for slot in texts:
                bank.load(slot, adapters[slot])
            backward_step(bank, texts, replace(TRAIN, share_prefix=share))
            found.append(gradients(bank, list(texts)))
        for shared, separate in zip(*found, strict=True):
            assert difference(shared, separate) < 1e-5

    adapters = [random_adapter(LORA, slot, architecture) for slot in range(4)]
    check()


def test_attention_caps_are_refused() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="soft caps and sinks are not supported"):
        attend(module, x, x, x, None, 1.0, plan=plan_segments([Segment(0, 1)], x.device), softcap=50.0)


def test_many_query_heads_may_share_one_key_head() -> None:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=1, head_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    row = Row(0, tuple(random_examples(0, 5)), 11)
    alone = [model.model(input_ids=torch.tensor([e.input_ids])).last_hidden_state[0] for e in row.examples]
    bank = AdapterBank(model, 1, [], trainable=False)
    stream = build_stream([row], torch.device("cpu"))
    hidden_KD = bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan)
    expected = torch.cat([x[e.num_prompt - 1 : -1] for x, e in zip(alone, row.examples, strict=True)])
    torch.testing.assert_close(hidden_KD[stream.predict_C], expected, atol=2e-5, rtol=0)

"""Whether a bank over a base computes what the base computes (it stands beside `workers.open_base`).

In: a model, before and after it is made fast. Out: nothing, or a ValueError that names the architecture.
The decision a reader would question: a model is tried, not looked up in a list. `set_attn_implementation` does nothing
to a layer that does not ask for its attention (a recurrent one, say): users in one stream would then read each other
without an error. 28 tokens tell, of every kind that the bank knows: a shared prefix and its suffixes, a neighbour, a
row far longer than these, and tokens read into the cache and decoded. Four short passes: 0.4 s of one core for
SmolLM2-135M.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from oppu_ray.adapters import AdapterBank
from oppu_ray.core import Example
from oppu_ray.kv_cache import DecodePlan, Fill, KVCache, Part
from oppu_ray.packing import Row, build_stream
from oppu_ray.training import head_logits

NUM_SHARED = 6
TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.2  # in bfloat16 SmolLM2 is 0.03 off, Gemma3 0.04; who reads a neighbour, 0.6


@contextmanager
def same_answers(model: nn.Module, max_length: int) -> Iterator[None]:
    """Compare a bank's logits over the model as the block leaves it with the model's own before.

    Args:
        max_length: Most tokens of a row to come.

    Raises:
        ValueError: They are not the same.
    """
    expected = _own_logits(model)
    yield
    name, fix = type(model).__name__, "expected an architecture such as Llama, Qwen3 or Gemma3ForCausalLM"
    try:
        found = _bank_logits(model, max_length)
    except Exception as error:  # whatever an architecture does not have
        raise ValueError(f"{name} does not work with many users in one pass ({error!r}); {fix}") from error
    distances = list(map(_distance, found, expected))
    tolerance = TOLERANCE if found[0].dtype == torch.float32 else ROUNDED_TOLERANCE
    if not all(distance <= tolerance for distance in distances):  # nor is NaN the same
        rows = f"beside other rows, of up to {max_length} tokens, a row's logits are {max(distances):.0%} off"
        raise ValueError(f"{name} does not work with many users in one pass: {rows}; {fix}")


def _examples(model: nn.Module) -> tuple[Example, Example, Example]:
    """Two that share a prefix, and one alone; the last tokens of the first and third are decoded."""
    num_words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(num_words, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second, alone = ids[:12], ids[:NUM_SHARED] + ids[12:18], ids[18:]
    return Example(tuple(first), 1), Example(tuple(second), NUM_SHARED + 1), Example(tuple(alone), 1)


@torch.no_grad()
def _own_logits(model: nn.Module) -> list[Tensor]:
    """[N, V] of each example, of the first and third again, and of the tokens to be decoded."""
    examples = _examples(model)
    ids = torch.tensor([example.input_ids for example in examples], device=model.device)  # type: ignore[arg-type]
    logits = model(input_ids=ids, use_cache=False).logits
    parts = [part[example.num_prompt - 1 : -1] for part, example in zip(logits, examples, strict=True)]
    return [*parts, parts[0], parts[2], logits[[0, 2], -1]]


def _bank_logits(model: nn.Module, max_length: int) -> list[Tensor]:
    """The same: in one stream as in training, beside a token at the last position of a long row; then from a cache."""
    bank = AdapterBank(model, 1, [], trainable=False)
    try:
        first, second, alone = _examples(model)
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        rows = [Row(-1, (first, second), NUM_SHARED), Row(-1, (alone,), 0), Row(-1, (Example((0, 0), 1),), 0)]
        stream = build_stream(rows, bank.device)
        stream.position_ids_T[-1] = min(max_length, config.max_position_embeddings) - 1
        bank.use([])
        with torch.enable_grad():
            hidden_KD = bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan).detach()
        with torch.no_grad():
            *trained, _ = hidden_KD[stream.predict_C].split([11, 5, 11, 1])
            return [head_logits(model, part) for part in (*trained, *_answered(bank, first, alone))]
    finally:
        bank.remove()


def _answered(bank: AdapterBank, first: Example, alone: Example) -> Iterator[Tensor]:
    """Last hidden states of both prompts, read into a cache, and of the tokens that follow, decoded."""
    cache = KVCache(bank.model.config.get_text_config(), 2, 12, bank.anchor.to(bank.dtype))  # type: ignore[union-attr, operator]
    cache.reserve(12)
    stream = build_stream([Row(-1, (first,), 0), Row(-1, (alone,), 0)], bank.device)
    stream.plan.fill = Fill(cache, [Part(0, 11, 0, 0), Part(11, 22, 1, 0)])
    bank.use_rows([-1, -1], [11, 11])
    yield from bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan).split(11)
    bank.use_rows([-1, -1])
    plan = DecodePlan(cache, (11, 11))
    next_ids = torch.tensor([first.input_ids[-1], alone.input_ids[-1]], device=bank.device)
    yield bank.hidden_states(next_ids, plan.lengths_B, plan)


def _distance(found_NV: Tensor, expected_NV: Tensor) -> float:
    """Mean over tokens of how far off the logits are, as a share of what makes them differ from each other."""
    found, expected = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (found_NV, expected_NV))
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())

"""Hugging Face PEFT alone, one user and one example at a time: what every packed result is compared with."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny import VOCAB_SIZE, tiny_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from oppu_ray.adapters import AdapterBank
from oppu_ray.config import PeftConfig, TrainConfig
from oppu_ray.core import AdapterState, Example, TrainResult, UserWork
from oppu_ray.packing import plan_user
from oppu_ray.training import learning_rate, train_pack

LORA = PeftConfig(kind="lora", rank=4, alpha=8.0)
IA3 = PeftConfig(kind="ia3")
PROMPT = PeftConfig(kind="prompt", num_virtual_tokens=3)
RS_LORA = PeftConfig(kind="lora", rank=7, alpha=4.0, rslora=True)
INFINITE = replace(LORA)
object.__setattr__(INFINITE, "alpha", float("inf"))  # which no config takes: every loss is NaN
WIDE_LORA = PeftConfig(kind="lora", rank=2, alpha=4.0, target_modules=("v_proj", "o_proj", "down_proj"))
TYPES = [(torch.float32, 1e-5), (torch.bfloat16, 0.02)]  # and how close C++ comes to float64 in them
TRAIN = TrainConfig(learning_rate=5e-3, epochs=3, items_per_step=4)
RATE = replace(TRAIN, learning_rate=1e-3)  # as a run's: Adam makes a rounding of a small gradient a share of the rate


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen tiny model, always with the same weights; Gemma3's sliding window is short enough to matter."""
    config = tiny_config(architecture)
    if architecture == "gemma3":
        config.sliding_window = 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(dtype).eval().requires_grad_(False)


def base_bytes(model: nn.Module) -> dict[str, str]:
    """Name -> SHA-256 of every tensor of a model."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def random_examples(seed: int, num: int, num_shared: int = 11) -> list[Example]:
    """`num` examples that share their first `num_shared` tokens, followed by 2 to 8 of prompt and 1 to 4 of answer."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(least, most))]

    shared = tokens(num_shared, num_shared)
    made = []
    for _ in range(num):
        prompt = shared + tokens(2, 8)
        made.append(Example((*prompt, *tokens(1, 4)), len(prompt)))
    return made


def other_text(examples: Sequence[Example]) -> list[Example]:
    """The same lengths and the same shared prefixes in other words."""
    return [Example(tuple((token + 7) % VOCAB_SIZE for token in e.input_ids), e.num_prompt) for e in examples]


def make_user(number: int, peft: PeftConfig, examples: Sequence[Example], config: TrainConfig = TRAIN) -> UserWork:
    return plan_user(f"user{number}", number, examples, replace(config, peft=peft))


def train(model: PreTrainedModel, users: Sequence[UserWork], config: TrainConfig = TRAIN) -> dict[str, TrainResult]:
    """A pack's results by user id."""
    return {result.user_id: result for result in train_pack(model, users, config)}


def trained(results: dict[str, TrainResult], user: UserWork) -> AdapterState:
    """The adapter of a user whose training went well."""
    result = results[user.user_id]
    assert result.error is None and result.adapter is not None
    return result.adapter


def fresh_adapter(peft: PeftConfig, seed: int, architecture: str = "llama") -> AdapterState:
    """The adapter a user starts from."""
    bank = AdapterBank(tiny_model(architecture), 1, [peft], trainable=False)
    bank.start(0, peft, seed)
    return bank.export(0)


def random_adapter(peft: PeftConfig, seed: int, architecture: str = "llama") -> AdapterState:
    """An adapter that changes the model's answers a lot."""
    draw, fresh = np.random.default_rng(seed), fresh_adapter(peft, seed, architecture)
    tensors = {key: value + draw.normal(0, 0.3, value.shape) for key, value in fresh.tensors.items()}
    return AdapterState({key: value.astype(np.float32) for key, value in tensors.items()}, fresh.peft_config)


def close(found: Tensor, expected: Tensor, tolerance: float, equal_nan: bool = False) -> None:
    """To `tolerance` of a number and absolutely, whatever the types."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=equal_nan)


def difference(one: AdapterState, other: AdapterState) -> float:
    """Largest absolute difference between two adapters of equal keys and shapes."""
    assert one.tensors.keys() == other.tensors.keys() and one.peft_config == other.peft_config
    assert all(one.tensors[key].shape == other.tensors[key].shape for key in one.tensors)
    return max(float(np.abs(one.tensors[key] - other.tensors[key]).max()) for key in one.tensors)


def same_bits(one: AdapterState, other: AdapterState) -> bool:
    assert one.tensors.keys() == other.tensors.keys()
    return all(one.tensors[key].tobytes() == other.tensors[key].tobytes() for key in one.tensors)


def gradients(bank: AdapterBank, slots: Sequence[int]) -> list[AdapterState]:
    """The slots' gathered gradients, under the adapter's names.

    With eps and learning rate both huge, Adam's first step is the gradient itself.
    """
    before = [bank.export(slot) for slot in slots]
    bank.adam_step(dict.fromkeys(slots, 1e6), step=1, clip_norm=0.0, weight_decay=0.0, eps=1e6)
    after = [bank.export(slot) for slot in slots]
    return [
        AdapterState({key: old.tensors[key] - new.tensors[key] for key in old.tensors}, old.peft_config)
        for old, new in zip(before, after, strict=True)
    ]


def peft_model(adapter: AdapterState | None, architecture: str = "llama") -> nn.Module:
    """A fresh base that wears one adapter, by PEFT's own means; the bare base for None."""
    model = tiny_model(architecture)
    if adapter is None:
        return model
    values = {key: value for key, value in adapter.peft_config.items() if key != "peft_type"}
    kind = {"LORA": LoraConfig, "IA3": IA3Config, "PROMPT_TUNING": PromptTuningConfig}[adapter.peft_config["peft_type"]]
    wearing = get_peft_model(model, kind(**values, task_type="CAUSAL_LM"))
    set_peft_model_state_dict(wearing, {key: torch.from_numpy(value) for key, value in adapter.tensors.items()})
    worn = get_peft_model_state_dict(wearing)
    assert worn.keys() == adapter.tensors.keys()  # PEFT skips a wrong name without a word
    assert all(np.array_equal(worn[key].detach(), value) for key, value in adapter.tensors.items())
    return wearing.eval()


def completion_logits(model: nn.Module, example: Example) -> torch.Tensor:
    """[completion tokens, vocabulary]: what predicts each token of the completion."""
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    return logits[-example.num_completion - 1 : -1]  # counted from the end, since prompt tuning puts tokens in front


def summed_nll(model: nn.Module, example: Example) -> torch.Tensor:
    """Negative log-likelihood of the whole completion, in nats."""
    targets = torch.tensor(example.input_ids[example.num_prompt :])
    return cross_entropy(completion_logits(model, example), targets, reduction="sum")


@torch.no_grad()
def mean_nll(model: nn.Module, example: Example) -> float:
    return summed_nll(model, example).item() / example.num_completion


def train_alone(
    user: UserWork, config: TrainConfig = TRAIN, architecture: str = "llama"
) -> tuple[AdapterState, list[float]]:
    """The user's adapter and losses from PEFT, autograd and torch's AdamW."""
    start = fresh_adapter(user.peft, user.seed, architecture)
    model = peft_model(start, architecture)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=config.weight_decay)
    losses = []
    for number, step in enumerate(user.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(config, number, len(user.steps))
        total = torch.stack([summed_nll(model, example) for example in step]).sum()
        loss = total / sum(example.num_completion for example in step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    assert isinstance(model, PeftModel)
    tensors = {key: value.detach().numpy() for key, value in get_peft_model_state_dict(model).items()}
    return AdapterState(tensors, start.peft_config), losses


@torch.no_grad()
def greedy_alone(
    model: nn.Module, prompt_ids: Sequence[int], num_new: int, stop_ids: frozenset[int]
) -> tuple[int, ...]:
    """Up to `num_new` tokens, the whole text read anew for each, without a cache."""
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + num_new:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return tuple(ids[len(prompt_ids) :])


def rotary_by_complex_numbers(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Features i and i + half are one complex number, turned by the position's angle."""
    turn = torch.complex(cos.float(), sin.float()).unsqueeze(unsqueeze_dim)
    half = turn.shape[-1] // 2

    def rotate(x: Tensor) -> Tensor:
        number = torch.complex(x[..., :half].float(), x[..., half:].float())
        return torch.cat(((number * turn[..., :half]).real, (number * turn[..., half:]).imag), -1).to(x.dtype)

    return rotate(q), rotate(k)

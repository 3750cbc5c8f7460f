r"""mLoRA's row of the training benchmark: its Llama and its LoRA operator, all adapters of a batch in one forward.

    MLORA_PYTHON -m peers.mlora WORK

Reads the work file of `bench.train`, prints one line of JSON. mLoRA's training script stops without CUDA and reads
raw text, so this is its model in a loop of ours: dispatching, tokenising and saving are not part of its time. Nor is
recomputing activations, which its executor always does: it is faster without.
Install: INSTALL in `bench.train`. mLoRA 0.2 is written for Python 3.12 and torch 2.2; what differs today is set
right before it is imported. Python 3.11 does too, with pip's --ignore-requires-python and then
`perl -0pi -e 's/\{\n\s+/{/g'` on its model/llm/model_llama.py, whose f-strings go over lines.
"""

from __future__ import annotations

import itertools
import sys
import time
import typing
from pathlib import Path
from typing import Any

import torch
import typing_extensions
from transformers import AutoModelForCausalLM

from .work import Row, User, Work, batches, print_result, read_work

typing.override = typing_extensions.override  # type: ignore[attr-defined, unused-ignore]
torch.List = list  # type: ignore[attr-defined]

from mlora.model.args import LLMModelArgs, ModelData, ModelDataConfig  # noqa: E402
from mlora.model.llm import LlamaModel  # noqa: E402
from mlora.model.modules import LoRA  # noqa: E402

DROPOUT = 1e-9  # it refuses 0; at this rate nothing is ever dropped
NOTE = "LoRA in float32 whatever the base is in; nothing is recomputed; every token goes through the LM head"


def main() -> None:
    work = read_work(Path(sys.argv[1]))
    model = load_model(work.base)
    train(model, work, [User(u.user_id, [u.steps[0][:4]], u.rates[:1], u.start) for u in work.users[:2]])
    started = time.perf_counter()
    losses, bookkeeping_s = train(model, work, work.users)
    print_result(time.perf_counter() - started, bookkeeping_s, losses, NOTE)


def load_model(base: Path) -> Any:
    """mLoRA's Llama around a Hugging Face model, in the base's own precision."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.config.rope_theta = model.config.rope_parameters["rope_theta"]  # where mLoRA looks for it
    args = LLMModelArgs(model.config)
    args.device_, args.dtype_ = "cpu", model.dtype
    return LlamaModel.convert_model_from_huggingface(model, args)


def train(model: Any, work: Work, users: list[User]) -> tuple[dict[str, float], float]:
    """Train all users from their starting weights: last losses, and the seconds spent on attaching adapters."""
    started = time.perf_counter()
    optimizers = [attach(model, work, index, user) for index, user in enumerate(users)]
    bookkeeping_s = time.perf_counter() - started
    losses: dict[str, float] = {}
    for step in range(max(len(user.steps) for user in users)):
        sums = [0.0] * len(users)
        for batch in batches(users, step):
            backward(model, batch, sums)
        for user, optimizer, total in zip(users, optimizers, sums, strict=True):
            if step < len(user.steps):
                group = optimizer.param_groups[0]
                group["lr"] = user.rates[step]
                torch.nn.utils.clip_grad_norm_(group["params"], work.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                losses[user.user_id] = total
    started = time.perf_counter()
    for index in range(len(users)):
        model.offload_adapter(f"u{index}")
    return losses, bookkeeping_s + time.perf_counter() - started


def attach(model: Any, work: Work, index: int, user: User) -> torch.optim.Optimizer:
    modules = {}
    for name, linear in model.linears_info().items():
        key = f"base_model.model.model.{name}.lora_"
        if f"{key}A.weight" in user.start:
            lora = LoRA(f"u{index}", linear.in_dim_, linear.out_dim_, work.rank, work.alpha, DROPOUT)
            lora.init_weight(*(torch.from_numpy(user.start[f"{key}{side}.weight"]) for side in "AB"))
            modules[name] = lora
    model.load_adapter(modules)
    tensors = [tensor for lora in modules.values() for tensor in lora.get_trainable_tensors()]
    return torch.optim.AdamW(tensors, weight_decay=work.weight_decay)


def backward(model: Any, batch: list[Row], sums: list[float]) -> None:
    """One forward and backward of a padded batch; adds each row's loss to its user's sum."""
    longest = 8 * -(-max(len(row.ids) for row in batch) // 8)
    spans, start = [], 0
    for index, group in itertools.groupby(batch, key=lambda row: row.user):
        stop = start + len(list(group))
        spans.append(ModelDataConfig(f"u{index}", "lora", start, stop))
        start = stop
    data = ModelData(
        batch_tokens_=[row.ids + [0] * (longest - len(row.ids)) for row in batch],
        batch_mask_=[[i >= len(row.ids) for i in range(longest)] for row in batch],
        data_config_=spans,
        enable_checkpoint_=False,
        random_id_=0,
        task_name_=[],
    )
    labels = torch.full((len(batch), longest), -100)
    for labels_T, row in zip(labels, batch, strict=True):
        labels_T[row.num_prompt : len(row.ids)] = torch.tensor(row.ids[row.num_prompt :])
    logits = model.forward(data)
    flat = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    weighted = flat.view(len(batch), -1).sum(1) * torch.tensor([row.weight for row in batch])
    weighted.sum().backward()
    for row, loss in zip(batch, weighted.tolist(), strict=True):
        sums[row.user] += loss


if __name__ == "__main__":
    main()

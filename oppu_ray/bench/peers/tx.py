"""SkyRL-tx's row of the training benchmark: its JAX Llama with stacked LoRA, all adapters of a batch in one forward.

    TX_PYTHON -m peers.tx WORK

Reads the work file of `bench.train`, prints one line of JSON. The loop around its model is ours, and kinder than
its engine: only the linears that our adapters train carry LoRA (the engine computes all of them, and the embedding),
and one jitted AdamW moves all slots (the engine runs one over the whole bank for every user). Compiling is not timed.
Install: INSTALL in `bench.train`.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoConfig
from tx.models.configs import ModelConfig
from tx.models.llama3 import LlamaForCausalLM
from tx.utils.models import get_dtype, load_safetensors, round_up_seq_len

from .work import Row, Work, batches, print_result, read_work

LOSS_CHUNK = 1024  # its default
NOTE = "adapters too in the base's precision; rows padded to its length buckets; every token goes through the LM head"
ADAM = optax.scale_by_adam()


def main() -> None:
    work = read_work(Path(sys.argv[1]))
    mesh = jax.make_mesh((1, 1, 1), ("fsdp", "ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), nnx.use_eager_sharding(True):
        model = load_model(work)
        started = time.perf_counter()
        graph, lora, base = attach(model, work)
        bookkeeping_s = time.perf_counter() - started
        gradients = jax.jit(functools.partial(add_gradients, graph))
        compile_all(gradients, lora, base, work)
        started = time.perf_counter()
        losses = train(gradients, lora, base, work)
        elapsed_s = time.perf_counter() - started + bookkeeping_s
    print_result(elapsed_s, bookkeeping_s, losses, NOTE)


def load_model(work: Work) -> Any:
    """Its Llama with a LoRA slot per user, all in the base's own precision."""
    config = AutoConfig.from_pretrained(work.base)
    config.rope_theta = config.rope_parameters["rope_theta"]  # where it looks for it
    config = ModelConfig(
        config,
        max_lora_adapters=len(work.users),
        max_lora_rank=work.rank,
        shard_attention_heads=False,
        loss_chunk_size=LOSS_CHUNK,
    )
    model = LlamaForCausalLM(config, dtype=get_dtype(config.dtype), rngs=nnx.Rngs(0))
    load_safetensors(work.base, config, model)
    return model


def attach(model: Any, work: Work) -> tuple[Any, Any, Any]:
    """Write the users' starting weights into the slots: the model's graph, its trained LoRA, all its other arrays."""
    for path, module in nnx.iter_modules(model):
        if not hasattr(module, "lora_A"):
            continue
        if peft_key((*path, "lora_A")) not in work.users[0].start:
            module.max_lora_adapters = 0
            continue
        for side in ("lora_A", "lora_B"):
            stacked = np.stack([user.start[peft_key((*path, side))].T for user in work.users])
            variable = getattr(module, side)
            variable[...] = jnp.asarray(stacked, variable.dtype)
        module.lora_scaling[...] = jnp.full_like(module.lora_scaling[...], work.alpha / work.rank)
    graph, lora, base = nnx.split(model, lambda path, _: peft_key(path) in work.users[0].start, ...)
    return graph, lora, base


def peft_key(path: tuple[Any, ...]) -> str:
    return "base_model.model." + ".".join(map(str, path)) + ".weight"


def compile_all(gradients: Any, lora: Any, base: Any, work: Work) -> None:
    """Run one batch of every shape, and updates at rate 0, and forget them.

    Each twice: what a jitted function returned may be placed otherwise than what it was first given, and that compiles
    anew.
    """
    moments, rates = ADAM.init(lora), jnp.zeros(len(work.users))
    steps = range(max(len(user.steps) for user in work.users))
    shapes = {arrays[0].shape: arrays for step in steps for arrays in map(to_arrays, batches(work.users, step))}
    for _ in range(2):
        sums = jax.tree.map(jnp.zeros_like, lora)
        for arrays in [*shapes.values(), *shapes.values()]:
            sums = gradients(sums, lora, base, *arrays)[0]
        lora, moments = update(lora, moments, sums, rates, work.clip_norm, work.weight_decay)
    jax.block_until_ready(lora)


def train(gradients: Any, lora: Any, base: Any, work: Work) -> dict[str, float]:
    """Train all users: last losses."""
    moments = ADAM.init(lora)
    losses: dict[str, float] = {}
    for step in range(max(len(user.steps) for user in work.users)):
        sums = jax.tree.map(jnp.zeros_like, lora)
        step_losses = np.zeros(len(work.users))
        for batch in batches(work.users, step):
            sums, nll_B = gradients(sums, lora, base, *to_arrays(batch))
            np.add.at(step_losses, [row.user for row in batch], np.asarray(nll_B))
        rates = jnp.asarray([user.rates[step] if step < len(user.steps) else 0.0 for user in work.users])
        lora, moments = update(lora, moments, sums, rates, work.clip_norm, work.weight_decay)
        losses.update((u.user_id, loss) for u, loss in zip(work.users, step_losses, strict=True) if step < len(u.steps))
    jax.block_until_ready(lora)
    return losses


def to_arrays(batch: list[Row]) -> tuple[np.ndarray, ...]:
    """Padded to its bucket: ids, mask, targets and their weights [B, T]; slots [B]."""
    longest = round_up_seq_len(max(len(row.ids) for row in batch))
    ids_BT, mask_BT, targets_BT = np.zeros((3, len(batch), longest), np.int32)
    weights_BT = np.zeros((len(batch), longest), np.float32)
    for b, row in enumerate(batch):
        last = len(row.ids) - 1
        ids_BT[b, : last + 1], mask_BT[b, : last + 1], targets_BT[b, :last] = row.ids, 1, row.ids[1:]
        weights_BT[b, row.num_prompt - 1 : last] = row.weight
    return ids_BT, mask_BT, targets_BT, weights_BT, np.array([row.user for row in batch], np.int32)


def add_gradients(
    graph: Any,
    sums: Any,
    lora: Any,
    base: Any,
    ids_BT: Any,
    mask_BT: Any,
    targets_BT: Any,
    weights_BT: Any,
    slots_B: Any,
) -> tuple[Any, Any]:
    """`sums` plus the batch's gradients of all slots, and each row's share of its user's loss."""

    def loss(lora: Any) -> tuple[Any, Any]:
        model = nnx.merge(graph, lora, base)
        if model.config.tie_word_embeddings:  # its head would be the first model's embedding, a constant to XLA
            model.lm_head = model.model.embed_tokens.T
        hidden = model(ids_BT, attention_mask=mask_BT, adapter_indices=slots_B).last_hidden_state
        nll_B = -(model.compute_logprobs(hidden, targets_BT, slots_B) * weights_BT).sum(1)
        return nll_B.sum(), nll_B

    grads, nll_B = jax.grad(loss, has_aux=True)(lora)
    return jax.tree.map(jnp.add, sums, grads), nll_B


@jax.jit
def update(lora: Any, moments: Any, grads: Any, rates_S: Any, clip_norm: float, weight_decay: float) -> tuple[Any, Any]:
    """One AdamW step of every slot, each with its own rate and its own clipping."""
    squares_S = sum(jnp.square(grad.astype(jnp.float32)).sum((1, 2)) for grad in jax.tree.leaves(grads))
    scale_S = jnp.minimum(1.0, clip_norm / (jnp.sqrt(squares_S) + 1e-6))
    grads = jax.tree.map(lambda grad: (grad * scale_S[:, None, None]).astype(grad.dtype), grads)
    moves, moments = ADAM.update(grads, moments)
    rates = rates_S[:, None, None]
    return jax.tree.map(lambda p, m: (p - rates * (m + weight_decay * p)).astype(p.dtype), lora, moves), moments


if __name__ == "__main__":
    main()

"""A Llama-shaped decoder layer as one step of autograd, with its backward pass written out (under `train_pack`).

In: the hidden states of a stream. Out: those after the layer, computed by the model's own linears and the bank's
adapters. The decision a reader would question: autograd runs the same products, but adds up gradients in passes of
their own, keeps tensors it can do without, and on a CPU every call costs; written out, a step takes about two thirds of
the time. A layer is replaced only where it agrees with this one on random input, so all other models stay as they are.

Shapes: T tokens, K of them wanted, B rows of one token each, D hidden, H heads and G key heads of width W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oppu_ray.adapters import BankLinear, scaled, scaled_gradient
from oppu_ray.attention import (
    NAME,
    SegmentPlan,
    answer_attention,
    attention_backward,
    attention_forward,
    plan_segments,
)
from oppu_ray.attention_groups import Segment
from oppu_ray.kernels import gated, gated_gradient, rms_norm, rms_norm_gradient, rotate, rotate_back
from oppu_ray.kv_cache import DecodePlan
from oppu_ray.quantization import QuantizedLinear

Saved = list[Any]
NORMS = ("input_layernorm", "post_attention_layernorm")
LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def product(linear: nn.Module, x_TI: Tensor, saved: Saved, onto: Tensor | None = None) -> Tensor:
    """`linear(x)`, plus `onto` where given; what `product_gradient` needs is put on `saved`."""
    if not isinstance(linear, BankLinear):
        return _base_product(linear, x_TI, onto)
    lora, scales = linear.active()
    masks = linear.bank[0].dropout_masks(x_TI, linear.name, lora) if lora and linear.training else None
    if scales and linear.scales_input:
        saved.append(x_TI)
        x_TI = scaled(x_TI, linear.scale, scales)  # type: ignore[arg-type]
    y_TO = _base_product(linear.base, x_TI, None if scales else onto)
    if lora:
        linear.add_lora(y_TO, x_TI, lora, masks)
        saved.append(x_TI)
    if scales and not linear.scales_input:
        saved.append(y_TO)
        y_TO = scaled(y_TO, linear.scale, scales)  # type: ignore[arg-type]
    saved.append((lora, scales, masks))
    return y_TO if onto is None or not scales else y_TO + onto


def product_gradient(linear: nn.Module, grad_TO: Tensor, saved: Saved, onto: Tensor | None = None) -> Tensor:
    """The gradient with respect to x, plus `onto` (changed in place); takes from `saved` what `product` put there."""
    if not isinstance(linear, BankLinear):
        return _base_gradient(linear, grad_TO, onto)
    lora, scales, masks = saved.pop()
    if scales and not linear.scales_input:
        grad_TO = scaled_gradient(grad_TO, saved.pop(), linear.scale, scales)  # type: ignore[arg-type]
    before = onto if not (scales and linear.scales_input) else None
    grad_TI = _base_gradient(linear.base, grad_TO, before)
    if lora:
        linear.add_lora_gradient(grad_TI, grad_TO, saved.pop(), lora, masks)
    if scales and linear.scales_input:
        grad_TI = scaled_gradient(grad_TI, saved.pop(), linear.scale, scales)  # type: ignore[arg-type]
        return grad_TI if onto is None else onto.add_(grad_TI)
    return grad_TI


def _base_product(linear: Any, x_TI: Tensor, onto: Tensor | None) -> Tensor:
    if onto is None or linear.bias is not None:
        y_TO = nn.functional.linear(x_TI, linear.weight, linear.bias)
        return y_TO if onto is None else y_TO.add_(onto)
    return torch.addmm(onto, x_TI, linear.weight.T)


def _base_gradient(linear: Any, grad_TO: Tensor, onto: Tensor | None) -> Tensor:
    return grad_TO @ linear.weight if onto is None else onto.addmm_(grad_TO, linear.weight)


class _Layer(torch.autograd.Function):
    """One decoder layer over one stream. `saved` is a stack: what the forward pass puts on, the backward takes off."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        layer: Any,
        cos: Tensor,
        sin: Tensor,
        plan: SegmentPlan,
        wanted_K: Tensor | None,
    ) -> Tensor:
        """All that comes behind the attention is for the tokens of `wanted_K` alone, where it is given."""
        saved: Saved = []
        attention, mlp, (norm1, norm2) = layer.self_attn, layer.mlp, (getattr(layer, name) for name in NORMS)
        x_TD = x[0]
        h_TD = rms_norm(x_TD, norm1.weight, norm1.variance_epsilon)
        saved.append(x_TD)
        q_THW, k_THW, v_THW = (
            product(linear, h_TD, saved).view(len(h_TD), -1, attention.head_dim)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q_THW, k_THW = rotate(q_THW, cos, sin), rotate(k_THW, cos, sin)
        out = attention_forward(q_THW, k_THW, v_THW, plan, attention.scaling, 0, saved)
        out_TD = out.reshape(len(h_TD), -1)
        if wanted_K is not None:
            out_TD, x_TD = out_TD[wanted_K], x_TD[wanted_K]
        mid_TD = product(attention.o_proj, out_TD, saved, onto=x_TD)
        h_TD = rms_norm(mid_TD, norm2.weight, norm2.variance_epsilon)
        saved.append(mid_TD)
        gate, up = product(mlp.gate_proj, h_TD, saved), product(mlp.up_proj, h_TD, saved)
        saved += [gate, up]
        y_TD = product(mlp.down_proj, gated(gate, up), saved, onto=mid_TD)
        if any(ctx.needs_input_grad):
            _save(ctx, saved, [cos, sin])
            ctx.parts = layer, plan, k_THW.shape[1], wanted_K
        return y_TD[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, (cos, sin) = _saved(ctx)
        layer, plan, key_heads, wanted_K = ctx.parts
        attention, mlp, (norm1, norm2) = layer.self_attn, layer.mlp, (getattr(layer, name) for name in NORMS)
        grad_TD = grads[0][0].contiguous()
        grad = product_gradient(mlp.down_proj, grad_TD, saved)
        up, gate = saved.pop(), saved.pop()
        grad_gate, grad_up = gated_gradient(grad, gate, up)
        grad = product_gradient(mlp.up_proj, grad_up, saved)
        grad = product_gradient(mlp.gate_proj, grad_gate, saved, onto=grad)
        grad_TD = rms_norm_gradient(grad, saved.pop(), norm2.weight, norm2.variance_epsilon, grad_TD)
        grad = product_gradient(attention.o_proj, grad_TD, saved)
        if wanted_K is not None:
            grad, grad_TD = (g.new_zeros(len(cos), g.shape[1]).index_copy_(0, wanted_K, g) for g in (grad, grad_TD))
        grad_THW = grad.view(len(grad), -1, attention.head_dim)
        grad_q, grad_k, grad_v = attention_backward(grad_THW, key_heads, plan, attention.scaling, 0, saved)
        grad_q, grad_k = rotate_back(grad_q, cos, sin), rotate_back(grad_k, cos, sin)
        grad = product_gradient(attention.v_proj, grad_v.flatten(1), saved)
        grad = product_gradient(attention.k_proj, grad_k.flatten(1), saved, onto=grad)
        grad = product_gradient(attention.q_proj, grad_q.flatten(1), saved, onto=grad)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None, None
        grad_TD = rms_norm_gradient(grad, saved.pop(), norm1.weight, norm1.variance_epsilon, grad_TD)
        return grad_TD[None], None, None, None, None, None, None


def answer(
    layer: Any,
    x_TD: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: SegmentPlan | DecodePlan,
    wanted_K: Tensor | None = None,
) -> Tensor:
    """One decoder layer without gradients, [T, D], or [K, D] for the tokens of `wanted_K` alone.

    Prompts and decoded tokens both go through here, so that a token has the same bits in both. `_Layer` rounds less
    often (it adds the residual inside the product), so its bits differ.
    """
    attention, mlp, (norm1, norm2) = layer.self_attn, layer.mlp, (getattr(layer, name) for name in NORMS)
    h_TD = rms_norm(x_TD, norm1.weight, norm1.variance_epsilon)[None]
    q_THW, k_TGW, v_TGW = (
        linear(h_TD).view(len(x_TD), -1, attention.head_dim)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    index, scale = attention.layer_idx, attention.scaling
    out_TD = answer_attention(q_THW, k_TGW, v_TGW, plan, index, scale, 0, (cos, sin)).flatten(1)
    if wanted_K is not None:
        out_TD, x_TD = out_TD[wanted_K], x_TD[wanted_K]
    x_TD = x_TD + attention.o_proj(out_TD[None])[0]
    h_TD = rms_norm(x_TD, norm2.weight, norm2.variance_epsilon)[None]
    return x_TD + mlp.down_proj(gated(mlp.gate_proj(h_TD), mlp.up_proj(h_TD)))[0]


def _save(ctx: Any, saved: Saved, others: list[Tensor]) -> None:
    """Give the tensors to autograd, which knows of checkpointing, and keep the rest and the order."""
    ctx.save_for_backward(*(part for part in (*saved, *others) if isinstance(part, Tensor)))
    ctx.order = [None if isinstance(part, Tensor) else part for part in saved]


def _saved(ctx: Any) -> tuple[Saved, list[Tensor]]:
    tensors = iter(ctx.saved_tensors)
    saved = [next(tensors) if part is None else part for part in ctx.order]
    return saved, list(tensors)


def fuse_layers(model: nn.Module) -> int:
    """Replace the forward of `model`'s decoder layers in place where `_Layer` agrees with them.

    Returns:
        Number of layers replaced: all or none.
    """
    layers = getattr(model.base_model, "layers", ())
    window = getattr(model.config, "sliding_window", None)
    if window or not layers or not all(_looks_right(layer) and _agrees(model, layer) for layer in layers):
        return 0
    for layer in layers:
        layer.forward = _fused_forward(layer, is_last=layer is layers[-1])
    return len(layers)


def _looks_right(layer: Any) -> bool:
    """Whether the layer has just the parts that `_Layer` knows, with plain linears."""
    parts: dict[str, Any] = {name: getattr(layer, name, None) for name in (*LINEARS, *NORMS)}
    return (
        {name for name, _ in layer.named_children()} == parts.keys()
        and all({name for name, _ in parts[part].named_children()} - {"act_fn"} == {*LINEARS[part]} for part in LINEARS)
        and all(
            type(getattr(parts[part], name)) in (nn.Linear, QuantizedLinear)
            for part in LINEARS
            for name in LINEARS[part]
        )
        and all(hasattr(parts[name], "variance_epsilon") for name in NORMS)
    )


def _fused_forward(layer: Any, is_last: bool = False) -> Callable[..., Tensor]:
    original = layer.forward

    def forward(hidden_states: Tensor, *args: Any, plan: Any = None, **kwargs: Any) -> Tensor:
        if plan is None:  # a plain Hugging Face pass, not one of our streams
            return original(hidden_states, *args, **kwargs)
        cos, sin = (part[0, :, None] for part in kwargs["position_embeddings"])
        linears = [getattr(getattr(layer, part), name) for part, names in LINEARS.items() for name in names]
        # An adapter behind the attention knows its tokens by their places in the whole stream.
        is_cut = is_last and not any(isinstance(linear, BankLinear) for linear in linears[3:])
        wanted_K = plan.wanted_K if is_cut and isinstance(plan, SegmentPlan) else None
        if not torch.is_grad_enabled():
            return answer(layer, hidden_states[0], cos, sin, plan, wanted_K)[None]
        anchor = next((linear.bank[0].anchor for linear in linears if isinstance(linear, BankLinear)), None)

        def run(x: Tensor) -> Tensor:
            return _Layer.apply(x, anchor, layer, cos, sin, plan, wanted_K)

        if layer.training and getattr(layer, "gradient_checkpointing", False):
            return layer._gradient_checkpointing_func(run, hidden_states)
        return run(hidden_states)

    return forward


@torch.no_grad()
def _agrees(model: Any, layer: Any) -> bool:
    """Compare on random input, the way the bank runs the model."""
    weight = layer.self_attn.q_proj.weight
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    x, angles = draw(1, 6, weight.shape[1]), draw(1, 6, layer.self_attn.head_dim // 2).repeat(1, 1, 2)
    cos_sin, plan = (angles.cos(), angles.sin()), plan_segments([Segment(0, 6)], x.device)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        expected = layer(x, position_embeddings=cos_sin, plan=plan).float()
        cos, sin = (part[0, :, None] for part in cos_sin)
        found = answer(layer, x[0], cos, sin, plan)[None], _Layer.apply(x, None, layer, cos, sin, plan, None)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False  # an architecture that this layer does not know
    finally:
        model.set_attn_implementation(before)
    tolerance = 0.02 if weight.dtype == torch.bfloat16 else 1e-4
    return all((one.float() - expected).norm() <= tolerance * (expected - x.float()).norm() for one in found)

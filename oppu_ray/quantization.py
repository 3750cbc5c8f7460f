"""A base whose linears are kept in 8 or 4 bits by bitsandbytes (it stands beside `base_model.load_base`).

In: a frozen model. Out: the same model, its linears but the LM head replaced by `QuantizedLinear`s, whose codes are
those that transformers' `BitsAndBytesConfig` makes. A reader might question that the layers are not bitsandbytes' own.
Its int8 product looks for outlier columns over the whole batch, so one user's tokens would change another's answer; its
4-bit linear rewrites its weights at the first answer on a CPU, and has no gradient from then on. Here a weight is
decoded to the model's type, used and dropped, in training and answering alike.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # nf4: weights that share a scale, bitsandbytes' default
INSTALL = f"{sys.executable} -m pip install -c constraints.txt -e '.[quantized]'"


class QuantizedLinear(nn.Linear):
    """A frozen linear in int8 (a scale per output) or nf4 (Dettmers et al. 2023; a scale per 64 weights).

    Codes are made on the CPU, so that they are the same wherever the model goes afterwards.
    """

    def __init__(self, linear: nn.Linear, kind: str):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.kind, self.dtype, self.bias = kind, linear.weight.dtype, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if kind == "int8":
            codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(linear.weight.half())
        else:
            codes, scales = torch.ops.bitsandbytes.quantize_4bit(linear.weight, BLOCK, kind, torch.uint8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], decoded anew at each call."""
        codes, scales, shape = self.codes, self.scales, (self.out_features, self.in_features)
        if self.kind == "int8":
            return codes.to(self.dtype).mul_(scales[:, None] / 127)  # type: ignore[operator, index]
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, self.kind, shape, self.dtype)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """The weight is decoded again for the gradient, which only x has: autograd would keep every layer's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.linear.weight, None


@torch.no_grad()
def quantize(model: nn.Module, kind: str, device: torch.device) -> None:
    """Replace the linears of a model that will run on `device` in place.

    The LM head, often the embeddings too, stays as it is.

    Raises:
        ValueError: bitsandbytes is not installed or does not work on the device.
    """
    if reason := why_not(device):
        raise ValueError(f"base.quantization is {kind!r}, but {reason}; expected none, or: {INSTALL}")
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(module, kind).eval())


@torch.no_grad()
def why_not(device: torch.device) -> str:
    """What keeps bitsandbytes from working on the device, "" for nothing: both kinds are tried on a small weight."""
    try:
        import bitsandbytes  # which defines torch.ops.bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        return f"bitsandbytes cannot be imported ({error})"
    name, linear = f"bitsandbytes {bitsandbytes.__version__}", nn.Linear(BLOCK, 2, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.linspace(-1, 1, 2 * BLOCK, dtype=torch.bfloat16).view(2, BLOCK))
    for kind in ("int8", "nf4"):
        try:
            found = QuantizedLinear(linear, kind).to(device).weight.cpu()
        except (AttributeError, RuntimeError) as error:
            return f"{name} has no {kind} for {device} ({error})"
        if not (off := (found - linear.weight).norm() / linear.weight.norm()) <= 0.2:
            return f"{name} is wrong in {kind} on {device}: a weight comes back {off:.0%} off"
    return ""

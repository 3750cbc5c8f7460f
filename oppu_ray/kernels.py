"""Fused elementwise kernels and allocator settings: what makes the frozen base cheap to run on a CPU.

In: a Hugging Face causal LM. Out: the same model computing the same function, with its RMS norms, gated MLPs and rotary
embedding replaced by single-pass versions with hand-written backward passes.
The decision a reader would question: on AMX the matrix products are so fast (3 TFLOP/s on two cores) that eager bf16
elementwise code takes three quarters of a step. On a CPU the kernels are C++ (`native`), on a GPU compiled by
torch.compile; a module is replaced only where its fused version agrees with it on random input, so an unknown
architecture just stays as it is.

Shapes: T tokens, D features, V vocabulary, H heads.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from oppu_ray.native import native

TILE = 32  # rows of a typical product: of a full decoding step
TILES = (1, 2, 4, 8, 12, 16, 24, TILE, 48, 64, 96, 128, 192, 256)  # larger ones are no faster
CHECKED_NUMBERS = 2**17  # that two sizes are compared by; another order of the sums changes 1 of 5,000 in bfloat16
KEPT_PRODUCTS = 128  # shapes of a few training passes
KEPT_KERNELS = 64  # of one function: each is for one or for more tokens, for training or for answering, and so on


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks instead of returning them to the kernel.

    Fresh pages cost a fault each: with the defaults an RMS norm over [2048, 576] takes 40 ms instead of 1 ms.
    Does nothing where there is no glibc. Call it before the first matrix product: the products that oneDNN compiles,
    one for each number of tokens, are kept by the same heap, and without a limit of ours there are 1,024 of half a
    megabyte each.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
    if libc := _glibc():
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 64 * 2**20)


def return_freed_memory() -> None:
    """Give back what `keep_freed_memory` kept: between packs, since streams of many sizes fragment the heap."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A small pure tensor function, compiled on a GPU."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        torch._dynamo.config.recompile_limit = KEPT_KERNELS
        return torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (compiled() if args[0].is_cuda else function)(*args)

    return call


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Of rows of any number of dimensions."""
    if (function := native("rms_norm", x_TD)) is None:
        return _rms_norm(x_TD, weight_D, eps)
    x_TD = x_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    function(*_rows(x_TD, weight_D), x_TD, weight_D.float(), eps, out_TD)
    return out_TD


def rms_norm_gradient(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, onto_TD: Tensor | None = None
) -> Tensor:
    """The gradient with respect to x, plus `onto`."""
    others = () if onto_TD is None else (onto_TD,)
    if (function := native("rms_norm_gradient", grad_TD, x_TD, *others)) is None:
        return _rms_norm_gradient(grad_TD, x_TD, weight_D, eps, onto_TD)
    grad_TD, x_TD, onto_TD = grad_TD.contiguous(), x_TD.contiguous(), None if onto_TD is None else onto_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    function(*_rows(x_TD, weight_D), grad_TD, x_TD, weight_D.float(), eps, onto_TD, out_TD)
    return out_TD


def gated(gate_TD: Tensor, up_TD: Tensor) -> Tensor:
    """silu(gate) * up."""
    if (function := native("gated", gate_TD, up_TD)) is None:
        return _gated(gate_TD, up_TD)
    gate_TD, up_TD = gate_TD.contiguous(), up_TD.contiguous()
    out_TD = torch.empty_like(gate_TD)
    function(gate_TD.numel(), gate_TD, up_TD, out_TD)
    return out_TD


def gated_gradient(grad_TD: Tensor, gate_TD: Tensor, up_TD: Tensor) -> tuple[Tensor, Tensor]:
    """With respect to the gate and to up."""
    if (function := native("gated_gradient", grad_TD, gate_TD, up_TD)) is None:
        return _gated_gradient(grad_TD, gate_TD, up_TD)
    grad_TD, gate_TD, up_TD = grad_TD.contiguous(), gate_TD.contiguous(), up_TD.contiguous()
    grad_gate_TD, grad_up_TD = torch.empty_like(gate_TD), torch.empty_like(up_TD)
    function(gate_TD.numel(), grad_TD, gate_TD, up_TD, grad_gate_TD, grad_up_TD)
    return grad_gate_TD, grad_up_TD


def rotate(x_THW: Tensor, cos_T1W: Tensor, sin_T1W: Tensor) -> Tensor:
    """Rotary embedding; angles that a batch shares may be given once."""
    return _rotated("rotate", _rotate, x_THW, cos_T1W, sin_T1W)


def rotate_back(grad_THW: Tensor, cos_T1W: Tensor, sin_T1W: Tensor) -> Tensor:
    """The gradient of `rotate`."""
    return _rotated("rotate_back", _rotate_back, grad_THW, cos_T1W, sin_T1W)


def _rotated(name: str, otherwise: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if (function := native(name, x, cos, sin)) is None:
        return otherwise(x, cos, sin)
    *tokens, heads, width = x.shape
    x, cos, sin = x.contiguous(), *(part.expand(*tokens, 1, width).contiguous() for part in (cos, sin))
    out = torch.empty_like(x)
    function(math.prod(tokens), heads, width, x, cos, sin, out)
    return out


def token_losses(logits_TV: Tensor, targets_T: Tensor, softcap: float) -> Tensor:
    """Negative log-likelihood in nats of each target, [T] float32. `softcap` 0 means none (Gemma 2's final cap)."""
    function = native("token_losses", logits_TV)
    if function is None or softcap:
        return _token_losses(logits_TV, targets_T, softcap)
    _check_targets(logits_TV, targets_T)
    logits_TV, targets_T = logits_TV.contiguous(), targets_T.contiguous()
    losses_T = torch.empty(len(logits_TV))
    function(*logits_TV.shape, logits_TV, targets_T, losses_T)
    return losses_T


def token_loss_gradient(logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, softcap: float) -> Tensor:
    """Gradient of sum(weights * token_losses) with respect to the logits, in their dtype."""
    function = native("token_loss_gradient", logits_TV)
    if function is None or softcap:
        return _token_loss_gradient(logits_TV, targets_T, weights_T, softcap)
    _check_targets(logits_TV, targets_T)
    logits_TV, targets_T, weights_T = logits_TV.contiguous(), targets_T.contiguous(), weights_T.float().contiguous()
    grad_TV = torch.empty_like(logits_TV)
    function(*logits_TV.shape, logits_TV, targets_T, weights_T, grad_TV)
    return grad_TV


def _rows(x_TD: Tensor, weight_D: Tensor) -> tuple[int, int]:
    width = x_TD.shape[-1]
    if weight_D.shape != (width,):  # that of a shared-out base, outside its module
        raise ValueError(f"a norm's weight is {list(weight_D.shape)}, expected [{width}]")
    return x_TD.numel() // width, width


def _check_targets(logits_TV: Tensor, targets_T: Tensor) -> None:
    """A target that is no input of the model has met no other check."""
    if len(targets_T) and not 0 <= int(targets_T.min()) <= int(targets_T.max()) < logits_TV.shape[1]:
        raise IndexError(f"token {int(targets_T.max())} is not in the vocabulary of {logits_TV.shape[1]}")


@fused
def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight_D.float()).to(x_TD.dtype)


@fused
def _rms_norm_gradient(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, onto_TD: Tensor | None = None
) -> Tensor:
    x, grad = x_TD.float(), grad_TD.float() * weight_D.float()
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    gradient = (grad - x * (grad * x).mean(-1, keepdim=True) * inverse * inverse) * inverse
    if onto_TD is not None:
        gradient = gradient + onto_TD.float()
    return gradient.to(x_TD.dtype)


@fused
def _gated(gate_TD: Tensor, up_TD: Tensor) -> Tensor:
    gate = gate_TD.float()
    return (gate * torch.sigmoid(gate) * up_TD.float()).to(gate_TD.dtype)


@fused
def _gated_gradient(grad_TD: Tensor, gate_TD: Tensor, up_TD: Tensor) -> tuple[Tensor, Tensor]:
    gate, grad = gate_TD.float(), grad_TD.float()
    sigmoid = torch.sigmoid(gate)
    grad_gate = grad * up_TD.float() * sigmoid * (1 + gate * (1 - sigmoid))
    return grad_gate.to(gate_TD.dtype), (grad * gate * sigmoid).to(gate_TD.dtype)


@fused
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x.float() * cos.float() + rotated.float() * sin.float()).to(x.dtype)


@fused
def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = grad.shape[-1] // 2
    scaled = grad.float() * sin.float()
    rotated = torch.cat((scaled[..., half:], -scaled[..., :half]), dim=-1)
    return (grad.float() * cos.float() + rotated).to(grad.dtype)


@fused
def _token_losses(logits_TV: Tensor, targets_T: Tensor, softcap: float) -> Tensor:
    logits = logits_TV.float()
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets_T[:, None])[:, 0]


@fused
def _token_loss_gradient(logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, softcap: float) -> Tensor:
    raw = logits_TV.float()
    logits = torch.tanh(raw / softcap) * softcap if softcap else raw
    columns = torch.arange(logits.shape[-1], device=logits.device)
    grad = (torch.softmax(logits, dim=-1) - (columns == targets_T[:, None]).float()) * weights_T[:, None]
    if softcap:
        grad = grad * (1 - (logits / softcap) ** 2)
    return grad.to(logits_TV.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return rms_norm(x, weight_D, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight_D = ctx.saved_tensors
        return rms_norm_gradient(grads[0], x, weight_D, ctx.eps), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return gated_gradient(grads[0], *ctx.saved_tensors)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return rotate_back(grads[0], *ctx.saved_tensors), None, None


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Drop-in for Hugging Face's apply_rotary_pos_emb, on [1, H, T, D]; [T, H, D] is kept as the memory layout."""
    cos, sin = cos.unsqueeze(unsqueeze_dim).transpose(1, 2), sin.unsqueeze(unsqueeze_dim).transpose(1, 2)
    return (
        _Rotary.apply(q.transpose(1, 2), cos, sin).transpose(1, 2),
        _Rotary.apply(k.transpose(1, 2), cos, sin).transpose(1, 2),
    )


def fuse(model: nn.Module) -> int:
    """Replace norms, gated MLPs and rotary embedding of `model` in place where the fused version agrees.

    Returns:
        Number of modules replaced.
    """
    count = 0
    for module in list(model.modules()):
        replacement = _fused_forward(module)
        if replacement is not None and _agrees(module, replacement):
            module.forward = replacement
            count += 1
    for name in {type(module).__module__ for module in model.modules()}:
        source = sys.modules[name]
        original = getattr(source, "apply_rotary_pos_emb", None)
        if original is not None and original is not _rotary and _rotary_agrees(original):
            source.apply_rotary_pos_emb = _rotary  # type: ignore[attr-defined]
    return count


def _fused_forward(module: Any) -> Callable[[Tensor], Tensor] | None:
    name = type(module).__name__
    if name.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter):
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", 1e-6)
        gemma = name.startswith("Gemma")
        return lambda x: _RMSNorm.apply(x, module.weight.float() + 1 if gemma else module.weight, eps)
    if all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return lambda x: module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))
    return None


def pack_linears(model: nn.Module) -> Callable[[], None]:
    """Make a frozen model's linears compute each row with the same bits for any number of rows (see `RowTiles`).

    Where oneDNN can, weights are also laid out as the CPU's matrix units read them, beside the original: in bf16 on AMX
    half the time for 32 tokens, two thirds for 128, no difference for 2,000; in float32 on AVX2 the LM head for 8 to 32
    tokens takes six tenths. Costs the model's size in memory. Does nothing on a GPU.

    Returns:
        A function that undoes it.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return lambda: None
    supported = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    can_pack = torch.backends.mkldnn.is_available() and supported.get(weight.dtype, False)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        make = _packed_forward if can_pack and type(linear) is nn.Linear else _tiled_forward
        linear.forward = make(linear)  # type: ignore[method-assign, assignment]

    def unpack() -> None:
        for linear in linears:
            del linear.forward

    return unpack


def _packed_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed, bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight, TILE), linear.bias
    tiles = _row_tiles("packed", linear.in_features, linear.out_features, linear.weight.dtype)

    def product(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return lambda x: tiles.apply(product, x)


def _tiled_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = linear.weight  # a quantized one is decoded at each access
        tiles = _row_tiles("plain", linear.in_features, linear.out_features, weight.dtype)
        return tiles.apply(lambda tile: nn.functional.linear(tile, weight, linear.bias), x)

    return forward


class RowTiles:
    """Computes a matrix product in tiles of a few sizes that all give a row the same bits.

    oneDNN and MKL choose by the number of rows how the sum of each row is split: one row is summed in another order
    than two, and on two threads 64 rows in another order than 32. So a size is compared with `TILE` before its first
    use, and skipped if a single number differs. Few sizes also mean few kernels to compile.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[int, int], list[int]] = {}  # by rows and threads
        self._agrees: dict[tuple[int, int], bool] = {}  # by size and threads

    def apply(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The product of x [..., I]."""
        num, threads = x.numel() // x.shape[-1], torch.get_num_threads()
        if (num, threads) not in self._plans:
            self._plans[num, threads] = self._plan(product, x, num)
        sizes = self._plans[num, threads]
        if sizes == [num]:
            return product(x)
        y = _in_tiles(product, x.reshape(num, -1), sizes)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _plan(self, product: Callable[[Tensor], Tensor], like: Tensor, num: int) -> list[int]:
        """Sizes of the tiles for `num` rows; the last tile may be padded."""

        def agrees(size: int) -> bool:
            key = size, torch.get_num_threads()
            if key not in self._agrees:
                self._agrees[key] = _has_same_bits(product, like, size)
            return self._agrees[key]

        sizes: list[int] = []
        while (rest := num - sum(sizes)) > 0:
            # A second tile reads the weights again. For few rows that costs more than padding.
            most = TILE if rest <= TILE else rest * 5 // 4
            padded = next((size for size in TILES if rest <= size <= most and agrees(size)), None)
            filled = next((size for size in reversed(TILES) if size <= rest and agrees(size)), 1)
            sizes.append(padded or filled)
        return sizes


@functools.cache
def _row_tiles(*product: Hashable) -> RowTiles:
    """One for all products that are computed by the same kernels: kind, widths and type of the weight."""
    return RowTiles()


def _has_same_bits(product: Callable[[Tensor], Tensor], like: Tensor, size: int) -> bool:
    """Whether tiles of `size` give random rows the same bits as tiles of `TILE`, with each row in another place."""
    generator = torch.Generator().manual_seed(0)
    num = product(like.new_zeros(TILE, like.shape[-1])).shape[-1]
    rows = max(size, TILE, min(CHECKED_NUMBERS // num, max(TILES)))
    x_TI = torch.randn(rows, like.shape[-1], generator=generator).to(like.dtype)
    moved = _in_tiles(product, x_TI.roll(1, 0), [size] * -(-rows // size)).roll(-1, 0)
    return torch.equal(moved, _in_tiles(product, x_TI, [TILE] * -(-rows // TILE)))


def _in_tiles(product: Callable[[Tensor], Tensor], x_TI: Tensor, sizes: list[int]) -> Tensor:
    num = len(x_TI)
    if padding := sum(sizes) - num:
        x_TI = nn.functional.pad(x_TI, (0, 0, 0, padding))
    parts = [product(part) for part in x_TI.split(sizes)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num]


@torch.no_grad()
def _agrees(module: Any, replacement: Callable[[Tensor], Tensor]) -> bool:
    weight = module.gate_proj.weight if hasattr(module, "gate_proj") else module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    expected, actual = module(x).float(), replacement(x).float()
    tolerance = 0.02 if weight.dtype == torch.bfloat16 else 1e-4
    return bool((expected - actual).norm() <= tolerance * expected.norm())


@torch.no_grad()
def _rotary_agrees(original: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """On heads of 8 features, all of them turned; `original` must not know how to turn only the first 4, as Phi-3's."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    try:
        expected = original(q, k, cos, sin)
    except (TypeError, RuntimeError):
        return False
    try:
        original(q, k, cos[..., :4], sin[..., :4])
        return False
    except (TypeError, RuntimeError):
        return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, _rotary(q, k, cos, sin), strict=True))

"""The C++ computes what its formulas say, as PyTorch does in its place; it is built once, or left out by a warning."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from reference import TYPES, close
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from oppu_ray import native
from oppu_ray.attention import attention_backward, attention_forward, plan_segments
from oppu_ray.attention_groups import Segment
from oppu_ray.kernels import (
    _rms_norm,
    gated,
    gated_gradient,
    rms_norm,
    rms_norm_gradient,
    rotate,
    rotate_back,
    token_loss_gradient,
    token_losses,
)

NAN = float("nan")


def own_gradients(function: Callable[..., Tensor], towards: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Autograd's, of a formula in float64."""
    leaves = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, towards.double())


def transposed(x: Tensor) -> Tensor:
    """The same numbers lying otherwise."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.usefixtures("made_by")
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("num", [5, 700])  # few are left to one thread
def test_norms(dtype: torch.dtype, tolerance: float, num: int, normal: Callable[..., Tensor]) -> None:
    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x, weight, grad, onto = (normal(*shape).to(dtype) for shape in ((num, 72), (72,), (num, 72), (num, 72)))
    for given, of_type in ((x, dtype), (transposed(x), torch.float32)):
        found = rms_norm(given, weight.to(of_type), 1e-5)
        assert found.dtype == dtype
        close(found, formula(x.double(), weight.double()), tolerance)
    expected, _ = own_gradients(formula, grad, x, weight)
    close(rms_norm_gradient(grad, x, weight, 1e-5), expected, tolerance)
    close(rms_norm_gradient(transposed(grad), x, weight, 1e-5, onto), expected + onto.double(), 2 * tolerance)


@pytest.mark.usefixtures("made_by")
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("num", [4, 700])
def test_gates(dtype: torch.dtype, tolerance: float, num: int, normal: Callable[..., Tensor]) -> None:
    def formula(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up

    extremes = torch.tensor([-1e30, -200.0, -90.0, 0.0, 88.0, 200.0, 1e30, NAN] * 9)[None]
    gate, up, grad = (normal(num, 72) * 3, normal(num, 72), normal(num, 72))
    gate, up, grad = (torch.cat((x, y)).to(dtype) for x, y in ((gate, extremes), (up, up[:1]), (grad, grad[:1])))
    close(gated(gate, transposed(up)), formula(gate.double(), up.double()), tolerance, equal_nan=True)
    for found, expected in zip(gated_gradient(grad, gate, up), own_gradients(formula, grad, gate, up), strict=True):
        close(found, expected, tolerance, equal_nan=True)


@pytest.mark.usefixtures("made_by")
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("shape", [(3, 2, 8), (200, 3, 64), (1, 9, 4, 20), (3, 5, 2, 8)])
def test_rotary_embedding(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], normal: Callable[..., Tensor]
) -> None:
    """Turned by two different angles in a head's halves, so that the two cannot be mixed up; a batch shares them."""
    one_head = (1, *shape[1:-2], 1, shape[-1]) if len(shape) == 4 else (shape[0], 1, shape[-1])
    x, grad, cos, sin = (normal(*size).to(dtype) for size in (shape, shape, one_head, one_head))

    def formula(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.double() + torch.cat((-second, first), dim=-1) * sin.double()

    close(rotate(transposed(x), cos, sin), formula(x.double()), tolerance)
    close(rotate_back(transposed(grad), cos, sin), *own_gradients(formula, grad, x), tolerance)


@pytest.mark.usefixtures("made_by")
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_losses(dtype: torch.dtype, tolerance: float, softcap: float, normal: Callable[..., Tensor]) -> None:
    logits, weights, targets = (normal(6, 70) * 4).to(dtype), torch.rand(6), torch.tensor([0, 69, 3, 3, 16, 68])
    logits[0, 5:30], logits[1] = 200.0, -300.0
    logits[2, 7] = NAN

    def formula(logits: Tensor) -> Tensor:
        capped = torch.tanh(logits / softcap) * softcap if softcap else logits
        return cross_entropy(capped, targets, reduction="none")

    close(token_losses(transposed(logits), targets, softcap), formula(logits.double()), 1e-5, equal_nan=True)
    found = token_loss_gradient(transposed(logits), targets, weights, softcap)
    assert found.dtype == dtype
    close(found, *own_gradients(formula, weights, logits), tolerance, equal_nan=True)


SEGMENTS = [
    Segment(0, 70), Segment(70, 101, 0, 70), Segment(101, 340, 0, 70), Segment(340, 341, 0, 70), Segment(341, 350),
    Segment(350, 357, 341, 350), Segment(357, 358),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(6, 2, 64), (2, 2, 128), (7, 1, 20)])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("max_length", [1024, 40])
def test_attention_of_segments(
    dtype: torch.dtype,
    tolerance: float,
    heads: int,
    key_heads: int,
    width: int,
    window: int,
    max_length: int,
    normal: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways, against a formula, on tensors that lie otherwise; a row of NaN leaves the others' bits as they are."""
    shapes = [(358, heads, width), *[(358, key_heads, width)] * 2, (358, heads, width)]
    q, k, v, grad = ((normal(*shape) / 2).to(dtype) for shape in shapes)
    seen = torch.zeros(358, 358, dtype=torch.bool)
    for s in SEGMENTS:
        for place, query in enumerate(range(s.start, s.stop)):
            keys = [*range(s.prefix_start, s.prefix_stop), *range(s.start, query + 1)]
            seen[query, keys[-window:]] = True
            assert len(keys) == s.num_prefix + place + 1

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // key_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhw,khw->hqk", q, k) * 0.3
        return torch.einsum("hqk,khw->qhw", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        plan, saved = plan_segments(SEGMENTS, q.device, max_length), list[Tensor]()
        out = attention_forward(q, k, v, plan, 0.3, window, saved)
        gradients = attention_backward(transposed(grad), key_heads, plan, 0.3, window, saved)
        assert not saved and {x.dtype for x in (out, *gradients)} == {dtype}
        return out, *gradients

    expected = (formula(q.double(), k.double(), v.double()), *own_gradients(formula, grad, q, k, v))
    assert native.native("segments_forward", q)
    found = run(transposed(q), transposed(k), transposed(v))
    for one, other in zip(found, expected, strict=True):
        close(one, other, tolerance * other.abs().max().item())
    row = slice(341, 357)
    for x in (q, k, v):
        x[row] = NAN
    for one, other in zip(run(q, k, v), found, strict=True):
        assert one[row].isnan().any()
        assert torch.equal(one[:341], other[:341]) and torch.equal(one[357:], other[357:])
    for x, before in zip((q, k, v), (normal(*shape) / 2 for shape in shapes), strict=False):
        x[row] = before[row].to(dtype)
    expected = run(q, k, v)
    monkeypatch.setattr(native, "functions", dict)
    for one, other in zip(run(q, k, v), expected, strict=True):
        close(one, other, 2 * tolerance * other.abs().max().item())


def test_a_rows_attention_has_the_same_bits_whoever_is_beside_it(normal: Callable[..., Tensor]) -> None:
    """And however many threads there are: chunks and their order are the row's own."""
    q, k, v, grad = (normal(358, heads, 16) for heads in (4, 2, 2, 4))

    def run(segments: list[Segment], tokens: slice) -> tuple[Tensor, ...]:
        plan, saved = plan_segments(segments, q.device), list[Tensor]()
        out = attention_forward(q[tokens], k[tokens], v[tokens], plan, 0.3, 0, saved)
        return out, *attention_backward(grad[tokens], 2, plan, 0.3, 0, saved)

    together = run(SEGMENTS, slice(0, 358))
    moved = [Segment(s.start - 341, s.stop - 341, s.prefix_start - 341, s.prefix_stop - 341) for s in SEGMENTS[4:6]]
    threads = torch.get_num_threads()
    for segments, tokens in ((SEGMENTS[:4], slice(0, 341)), ([Segment(0, 9), moved[1]], slice(341, 357))):
        torch.set_num_threads(3 - threads)
        try:
            alone = run(segments, tokens)
        finally:
            torch.set_num_threads(threads)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other[tokens])


def test_other_types_than_it_takes_are_left_to_pytorch() -> None:
    x = torch.randn(2, 8)
    assert native.native("gated", x, x) and not native.native("gated", x, x.double())
    assert not native.native("gated", x.double(), x.double()) and not native.native("gated", x.to("meta"))


def test_what_would_be_read_beyond_a_tensors_end_is_refused() -> None:
    x, weight, logits = torch.randn(2, 8), torch.ones(0), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"a norm's weight is \[0\], expected \[8\]"):
        rms_norm(x, weight, 1e-5)
    with pytest.raises(ValueError, match=r"a norm's weight is \[0\], expected \[8\]"):
        rms_norm_gradient(x, x, weight, 1e-5)
    for targets in (torch.tensor([3, 8]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError, match="not in the vocabulary of 8"):
            token_losses(logits, targets, 0.0)
        with pytest.raises(IndexError, match="not in the vocabulary of 8"):
            token_loss_gradient(logits, targets, torch.ones(2), 0.0)
    q = torch.randn(3, 2, 8)
    for queries, keys in ((q, q[:2]), (q[:2], q[:2])):
        with pytest.raises(IndexError, match="in a plan for 3 tokens"):
            attention_forward(queries, keys, keys, plan_segments([Segment(0, 3)], q.device), 1.0, 0, [])


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty $OPPU_HOME, and nothing built in this process."""
    monkeypatch.setenv("OPPU_HOME", str(tmp_path / "home"))
    native.functions.cache_clear()
    yield tmp_path
    native.functions.cache_clear()


def test_it_is_built_once(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.functions()
    (built,) = (unbuilt / "home/native").iterdir()
    native.functions.cache_clear()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert native.functions() and list(built.parent.iterdir()) == [built]


@pytest.mark.parametrize("fault", ["no compiler", "another language", "nowhere to write", "no library"])
def test_where_it_cannot_be_built_pytorch_does_it(
    fault: str, unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    elif fault == "another language":
        monkeypatch.setattr(native, "FLAGS", ("-std=c++98", *native.FLAGS[1:]))
    elif fault == "nowhere to write":
        (unbuilt / "home").write_text("a file")
    else:
        native._built(str(shutil.which("g++"))).write_text("not a library")
    x = torch.randn(3, 8)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(rms_norm(x, x[0], 1e-5), _rms_norm(x, x[0], 1e-5))
    assert not native.functions() and len(caplog.records) == (fault != "no compiler")

"""Every operation against numpy or torch in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.runtimes.coreml.cases import RNG, Case, binary, bits, check, ints, normal, positive, unary
from tests.runtimes.coreml.mil import mb

X = normal(2, 3, 4)
SMALL = RNG.uniform(-0.9, 0.9, (2, 3, 4)).astype(np.float32)
WIDE = (4 * RNG.standard_normal((2, 3, 4))).astype(np.float32)

ELEMENTWISE = [
    unary("identity", lambda x: x, X),
    unary("abs", torch.abs, X),
    unary("ceil", torch.ceil, WIDE),
    unary("floor", torch.floor, WIDE),
    unary("round", torch.round, np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.7], np.float32)),
    unary("sign", torch.sign, np.array([-2.0, 0.0, 3.0], np.float32)),
    unary("sign", torch.sign, np.array([-2, 0, 3], np.int32)),
    unary("square", torch.square, X),
    unary("exp", torch.exp, X),
    unary("exp2", torch.exp2, X),
    unary("sqrt", torch.sqrt, positive(3, 4)),
    unary("erf", torch.erf, X),
    unary("sin", torch.sin, WIDE),
    unary("cos", torch.cos, WIDE),
    unary("tan", torch.tan, SMALL),
    unary("asin", torch.asin, SMALL),
    unary("acos", torch.acos, SMALL),
    unary("atan", torch.atan, WIDE),
    unary("sinh", torch.sinh, X),
    unary("cosh", torch.cosh, X),
    unary("tanh", torch.tanh, WIDE),
    unary("atanh", torch.atanh, SMALL),
    unary("logical_not", torch.logical_not, bits(3, 4)),
    unary("clip", lambda x: x.clamp(-0.5, 0.25), X, alpha=-0.5, beta=0.25),
    unary("threshold", lambda x: x.clamp(min=0.25), X, alpha=0.25),
    unary("threshold", lambda x: x.clamp(min=2), ints(-5, 5, 7), alpha=2),
    unary("inverse", lambda x: 1 / (x + 1e-4), positive(3, 4)),
    unary("inverse", lambda x: 1 / (x + 0.5), positive(3, 4), epsilon=0.5),
    unary("log", torch.log, positive(3, 4)),
    unary("log", lambda x: torch.log(x + 0.5), positive(3, 4), epsilon=0.5),
    unary("rsqrt", torch.rsqrt, positive(3, 4)),
    unary("rsqrt", lambda x: torch.rsqrt(x + 0.5), positive(3, 4), epsilon=0.5),
    unary("cast", lambda x: x.trunc().int(), WIDE, dtype="int32"),
    unary("cast", lambda x: x != 0, np.array([0.0, 1.5, -2.0], np.float32), dtype="bool"),
    unary("cast", lambda x: x.double(), ints(-5, 5, 3, 2), dtype="fp32"),
    *(
        binary(name, expected, normal(*x), positive(*y))
        for x, y in (((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (4,)), ((3, 1), (2, 1, 4)), ((2, 3), (1,)))
        for name, expected in (
            ("add", torch.add),
            ("sub", torch.sub),
            ("mul", torch.mul),
            ("real_div", torch.true_divide),
            ("floor_div", lambda x, y: torch.floor(x / y)),
            ("mod", torch.remainder),
            ("maximum", torch.maximum),
            ("minimum", torch.minimum),
            ("greater", torch.gt),
            ("less_equal", torch.le),
        )
    ),
    binary("pow", torch.pow, positive(2, 3), normal(3)),
    binary("add", torch.add, ints(-9, 9, 4), ints(-9, 9, 4)),
    binary("floor_div", lambda x, y: torch.from_numpy(np.floor_divide(x.numpy(), y.numpy())), ints(-9, 9, 6), ints(1, 4, 6)),
    binary("mod", lambda x, y: torch.from_numpy(np.mod(x.numpy(), y.numpy())), ints(-9, 9, 6), ints(1, 4, 6)),
    *(
        binary(name, expected, ints(0, 3, 2, 5), ints(0, 3, 5))
        for name, expected in (
            ("equal", torch.eq),
            ("not_equal", torch.ne),
            ("greater", torch.gt),
            ("greater_equal", torch.ge),
            ("less", torch.lt),
            ("less_equal", torch.le),
        )
    ),
    *(
        binary(name, expected, bits(4, 6), bits(6))
        for name, expected in (
            ("logical_and", torch.logical_and),
            ("logical_or", torch.logical_or),
            ("logical_xor", torch.logical_xor),
        )
    ),
    Case(
        "select-broadcast",
        {"c": bits(3, 1), "a": normal(2, 3, 4), "b": normal(4)},
        lambda c, a, b: mb.select(cond=c, a=a, b=b),
        torch.where,
    ),
]

ACTIVATIONS = [
    unary("relu", torch.relu, X),
    unary("relu6", F.relu6, WIDE),
    unary("clamped_relu", lambda x: torch.where(x >= 0, x, 0.1 * x).clamp(max=1.5), WIDE, alpha=0.1, beta=1.5),
    unary("thresholded_relu", lambda x: torch.where(x >= 0.3, x, 0.0), X, alpha=0.3),
    unary("leaky_relu", lambda x: F.leaky_relu(x, 0.2), X, alpha=0.2),
    unary("elu", lambda x: F.elu(x, 0.7), WIDE, alpha=0.7),
    unary("gelu", F.gelu, WIDE),
    unary("gelu", F.gelu, WIDE, mode="EXACT"),
    unary("gelu", lambda x: F.gelu(x, approximate="tanh"), WIDE, mode="TANH_APPROXIMATION"),
    unary("gelu", lambda x: x * torch.sigmoid(1.702 * x), WIDE, mode="SIGMOID_APPROXIMATION"),
    unary("silu", F.silu, WIDE),
    unary("sigmoid", torch.sigmoid, WIDE),
    unary("sigmoid_hard", lambda x: (0.2 * x + 0.5).clamp(0, 1), WIDE, alpha=0.2, beta=0.5),
    unary("scaled_tanh", lambda x: 1.7 * torch.tanh(0.6 * x), WIDE, alpha=1.7, beta=0.6),
    unary("softplus", lambda x: torch.log1p(torch.exp(x)), np.array([-60, -3, 0, 2, 25, 60], np.float32)),
    unary("softsign", F.softsign, WIDE),
    unary("linear_activation", lambda x: 2 * x - 1, X, alpha=2.0, beta=-1.0),
    unary(
        "prelu",
        lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3]).double()),
        normal(2, 3, 4, 5),
        alpha=np.float32([0.1, 0.2, 0.3]),
    ),
    unary(
        "softplus_parametric",
        lambda x: 2 * torch.log1p(torch.exp(x * torch.tensor([0.5, 1.0, 2.0]).double().reshape(1, 3, 1, 1))),
        normal(2, 3, 4, 5),
        alpha=np.float32([2, 2, 2]),
        beta=np.float32([0.5, 1, 2]),
    ),
    unary("softmax", lambda x: x.softmax(-1), WIDE),
    unary("softmax", lambda x: x.softmax(1), WIDE, axis=1),
    unary("softmax", lambda x: x.softmax(-3), WIDE, axis=-3),
]


def linear_case(name: str, x: np.ndarray, bias: bool) -> Case:
    weight, offset = normal(5, 4), normal(5)
    options = {"bias": offset} if bias else {}

    def expected(x: Tensor) -> Tensor:
        return F.linear(x, torch.from_numpy(weight).double(), torch.from_numpy(offset).double() if bias else None)

    return Case(name, {"x": x}, lambda x: mb.linear(x=x, weight=weight, **options), expected)


def matmul_case(x: tuple[int, ...], y: tuple[int, ...], transpose_x: bool = False, transpose_y: bool = False) -> Case:
    def expected(x: Tensor, y: Tensor) -> Tensor:
        return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)

    return Case(
        f"matmul-{x}-{y}-{transpose_x}-{transpose_y}",
        {"x": normal(*x), "y": normal(*y)},
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=transpose_x, transpose_y=transpose_y),
        expected,
    )


def attention_case(name: str, mask: np.ndarray | None) -> Case:
    inputs = {"q": normal(2, 3, 5, 8), "k": normal(2, 3, 7, 8), "v": normal(2, 3, 7, 6)}
    if mask is not None:
        inputs["mask"] = mask

    def build(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        options = {} if mask is None else {"attn_mask": mask}
        return mb.scaled_dot_product_attention(query=q, key=k, value=v, **options)

    def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = q @ k.mT / 8**0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
        return logits.softmax(-1) @ v

    return Case(name, inputs, build, expected)


ALLOWED = bits(5, 7)
ALLOWED[:, 0] = True

LINEAR = [
    linear_case("linear", normal(2, 3, 4), bias=True),
    linear_case("linear-no-bias", normal(3, 4), bias=False),
    linear_case("linear-vector", normal(4), bias=True),
    matmul_case((3, 4), (4, 5)),
    matmul_case((10, 4, 3), (5, 10, 3, 2)),
    matmul_case((2, 1, 4, 3), (6, 3, 2)),
    matmul_case((2, 3, 4), (2, 3, 5), transpose_x=True),
    matmul_case((2, 4, 3), (2, 5, 3), transpose_y=True),
    matmul_case((2, 3, 4), (2, 5, 3), transpose_x=True, transpose_y=True),
    Case(
        "matmul-int32",
        {"x": ints(-5, 5, 2, 3), "y": ints(-5, 5, 3, 4)},
        lambda x, y: mb.matmul(x=x, y=y),
        lambda x, y: torch.from_numpy(x.numpy() @ y.numpy()),
    ),
    Case(
        "einsum-broadcast",
        {"x": normal(1, 3, 4, 5), "y": normal(2, 5, 1, 6)},
        lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        lambda x, y: torch.einsum("nchw,nwhu->nchu", x.expand(2, -1, -1, -1), y.expand(-1, -1, 4, -1)),
    ),
    Case(
        "einsum-rank3",
        {"x": normal(3, 4, 5), "y": normal(5, 4, 6)},
        lambda x, y: mb.einsum(values=(x, y), equation="chw,whr->chr"),
        lambda x, y: torch.einsum("chw,whr->chr", x, y),
    ),
    attention_case("attention", None),
    attention_case("attention-float-mask", normal(5, 7)),
    attention_case("attention-bool-mask", ALLOWED),
]

REDUCTIONS = [
    Case(
        f"{name}-{axes}-{keep}",
        {"x": positive(2, 3, 4)},
        lambda x, name=name, options=options, keep=keep: getattr(mb, name)(x=x, keep_dims=keep, **options),
        lambda x, expected=expected, dims=dims, keep=keep: expected(x, dims, keep),
    )
    for axes, options, dims in (
        ("all", {}, (0, 1, 2)),
        ("last", {"axes": [-1]}, (2,)),
        ("two", {"axes": [-3, 1]}, (0, 1)),
    )
    for keep in (False, True)
    for name, expected in (
        ("reduce_sum", torch.sum),
        ("reduce_mean", torch.mean),
        ("reduce_max", torch.amax),
        ("reduce_min", torch.amin),
        ("reduce_prod", lambda x, dims, keep: torch.from_numpy(np.asarray(np.prod(x.numpy(), axis=dims, keepdims=keep)))),
        ("reduce_l1_norm", lambda x, dims, keep: x.abs().sum(dims, keep)),
        ("reduce_l2_norm", lambda x, dims, keep: (x * x).sum(dims, keep).sqrt()),
        ("reduce_sum_square", lambda x, dims, keep: (x * x).sum(dims, keep)),
        ("reduce_log_sum", lambda x, dims, keep: x.sum(dims, keep).log()),
        ("reduce_log_sum_exp", lambda x, dims, keep: x.exp().sum(dims, keep).log()),
    )
] + [
    unary("reduce_argmax", lambda x: x.argmax(-1), X),
    unary("reduce_argmax", lambda x: x.argmax(1, keepdim=True), X, axis=1, keep_dims=True),
    unary("reduce_argmin", lambda x: x.argmin(0), X, axis=-3),
    unary("reduce_argmin", lambda x: x.argmin(1), X, axis=1, output_dtype="uint16"),
    unary("reduce_sum", lambda x: x.sum(0), ints(-9, 9, 3, 4), axes=[0]),
    unary("reduce_log_sum_exp", lambda x: x.logsumexp(0), np.float32([[900.0], [901.0]]), axes=[0]),
]


@pytest.mark.parametrize("case", ELEMENTWISE + ACTIVATIONS + LINEAR + REDUCTIONS, ids=lambda case: case.name)
def test_operation_equals_float64(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)

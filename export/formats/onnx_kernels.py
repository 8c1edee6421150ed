"""What ONNX Runtime computes faster in another, equal form: the modules that stand in for it while a graph is traced.

- Attention is one com.microsoft MultiHeadAttention, which takes [1, tokens, heads * d] as linears give it and, without a bias,
  never writes the logits to memory. A bias a key, b_j (the fold of null tokens), becomes one more dimension of queries and
  keys: with s the scale, s (q, 1) . (k_j, b_j / s) = s q . k_j + b_j.
- Adaptive layer norm is one LayerNormalization, whose scale 1 + scale and bias shift are its inputs.
- RMS norm is spelled by division, as ONNX Runtime recognises it when it loads a model (SimplifiedLayerNormalization).

Each has the module's own weights and gives what it gives, up to float32 rounding; tests/export/test_format_onnx.py shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch import Tensor, nn

from export.components.attention import Attend
from export.components.transformer import EPSILON, AdaptiveNorm, RmsNorm

MICROSOFT = "com.microsoft"
# The part of ONNX Runtime's operation that is used here, for the tracer to write it down.
_SCHEMA = OpSchema(
    "MultiHeadAttention",
    MICROSOFT,
    1,
    inputs=[OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")],
    outputs=[OpSchema.FormalParameter("output", "T")],
    type_constraints=[("T", ["tensor(float)"], "")],
    attributes=[
        OpSchema.Attribute("num_heads", OpSchema.AttrType.INT, ""),
        OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, ""),
    ],
)
_multi_head_attention = Op(Opset(MICROSOFT, 1), _SCHEMA.name, _SCHEMA)


@torch.library.custom_op("export_flash::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """Attention without a bias: query, key [1, tokens, heads * e], value [1, tokens, heads * d] -> [1, tokens, heads * d]."""
    query, key, value = (states.unflatten(2, (heads, -1)).transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    return value.new_empty(1, query.shape[1], value.shape[2])


def _attend_in_onnx(query, key, value, heads: int, scale: float):  # type: ignore[no-untyped-def]
    return _multi_head_attention(query, key, value, num_heads=heads, scale=scale)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.export_flash.attend.default: _attend_in_onnx}
"""For torch.onnx.export: how the operation above is written."""


class KernelAttend(nn.Module):
    """`Attend` for no bias, or for one that depends on the key alone, [1, 1, 1, keys]."""

    def __init__(self, plain: Attend) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None and bias.shape[-2] != 1:
            attended: Tensor = self.plain(query, key, value, bias)
            return attended
        heads, scale = query.shape[2], query.shape[3] ** -0.5
        if bias is not None:
            query = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)
            column = (bias / scale).reshape(1, -1, 1, 1).expand(-1, -1, heads, -1)
            key = torch.cat([key, column], dim=-1)
        made: Tensor = torch.ops.export_flash.attend(query.flatten(2), key.flatten(2), value.flatten(2), heads, scale)
        return made


class KernelAdaptiveNorm(nn.Module):
    """`AdaptiveNorm` with a norm for each affine part."""

    def __init__(self, plain: AdaptiveNorm) -> None:
        super().__init__()
        self.shape, self.epsilon = plain.norm.normalized_shape, plain.norm.eps

    def forward(self, states: Tensor, *affine: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            F.layer_norm(states, self.shape, (1 + scale).flatten(), shift.flatten(), self.epsilon) for shift, scale in affine
        )


class KernelRmsNorm(nn.Module):
    """`RmsNorm` spelled as x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, plain: RmsNorm) -> None:
        super().__init__()
        self.weight = plain.weight

    def forward(self, states: Tensor) -> Tensor:
        return states / torch.sqrt(states.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * self.weight


_KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    Attend: KernelAttend,
    AdaptiveNorm: KernelAdaptiveNorm,
    RmsNorm: KernelRmsNorm,
}


def use_kernels(module: nn.Module) -> nn.Module:
    """Puts the forms above in their places; returns the module, whose weights keep their names."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) in _KERNELS:
                setattr(parent, name, _KERNELS[type(child)](child))
    return module

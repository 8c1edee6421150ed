"""Softmax attention, in the form that the backend lowers best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attend(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v: queries, keys and values [1, tokens, heads, d] -> [1, tokens, heads * d].

    bias broadcasts to [1, heads, queries, keys]. Heads stand behind tokens because linears leave them there, so that streams
    are joined, and every other step is taken, before anything is transposed.

    `fused` picks one scaled_dot_product_attention operation (Core ML for iOS 18 has one) instead of matmul, softmax, matmul
    (which every backend has, and XNNPACK and Vulkan delegate). Set it with `use_fused_attention`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fused = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [1, heads, tokens, d]
        if self.fused:
            return join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))
        # The scale goes on the queries, which are fewer than the logits and keep those small in fp16.
        logits = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
        if bias is not None:
            logits = logits + bias
        return join_heads(torch.matmul(torch.softmax(logits, dim=-1), value))


def use_fused_attention(module: nn.Module, fused: bool) -> nn.Module:
    """Switches every attention of a module to the fused operation or to the plain ones; returns the module."""
    for part in module.modules():
        if isinstance(part, Attend):
            part.fused = fused
    return module


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[1, tokens, heads * d] -> [1, tokens, heads, d]."""
    _, tokens, width = states.shape
    return states.reshape(1, tokens, heads, width // heads)


def join_heads(states: Tensor) -> Tensor:
    """[1, heads, tokens, d] -> [1, tokens, heads * d]."""
    _, heads, tokens, size = states.shape
    return states.transpose(1, 2).reshape(1, tokens, heads * size)

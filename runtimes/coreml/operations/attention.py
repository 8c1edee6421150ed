"""Fused attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.operations.registry import operation


@operation("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(width) + mask) v over [..., tokens, width]; a boolean mask is true where attention is allowed."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)

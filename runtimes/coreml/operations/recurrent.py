"""Recurrent layers over [steps, batch, features], computed in float32; only the results are rounded.

`gru` is left out: where its reset gate acts is documented in two ways, and nothing but a device could tell which holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtimes.coreml.operations.registry import Tensors, operation

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "linear": lambda x: x,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    try:
        return _ACTIVATIONS[name.lower()]
    except KeyError:
        raise ValueError(f"unknown recurrent activation {name!r}; known are {sorted(_ACTIVATIONS)}") from None


def _ordered(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(0) if reverse else x


@operation("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> Tensors:
    """-> all hidden states (or the last alone, as one step) and the last hidden state."""
    act = _activation(activation)
    reverse = direction == "reverse"
    hidden, states = initial_h, []
    for step in _ordered(x, reverse):
        total = step @ weight_ih.T + hidden @ weight_hh.T
        hidden = act(total if bias is None else total + bias)
        states.append(hidden)
    sequence = _ordered(torch.stack(states), reverse) if output_sequence else hidden.unsqueeze(0)
    return sequence, hidden


@operation("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> Tensors:
    """Gates in the order input, forget, output, cell. -> hidden states, last hidden state, last cell state."""
    if peephole is not None or peephole_back is not None:
        raise ValueError("peephole connections are not known to this executor")
    gate, cell_gate, out = _activation(recurrent_activation), _activation(cell_activation), _activation(activation)

    def run(reverse: bool, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor | None) -> Tensors:
        states = []
        for step in _ordered(x, reverse):
            total = step @ w_ih.T + h @ w_hh.T
            i, f, o, z = (total if b is None else total + b).chunk(4, dim=-1)
            new = cell_gate(z)
            if clip is not None:
                new = torch.clamp(new, -clip, clip)
            c = gate(f) * c + gate(i) * new
            h = gate(o) * out(c)
            states.append(h)
        return _ordered(torch.stack(states), reverse), h, c

    if direction != "bidirectional":
        sequence, h, c = run(direction == "reverse", initial_h, initial_c, weight_ih, weight_hh, bias)
    else:
        if weight_ih_back is None or weight_hh_back is None:
            raise ValueError("a bidirectional lstm needs weight_ih_back and weight_hh_back")
        (h_forward, h_back), (c_forward, c_back) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
        forward = run(False, h_forward, c_forward, weight_ih, weight_hh, bias)
        back = run(True, h_back, c_back, weight_ih_back, weight_hh_back, bias_back)
        sequence, h, c = (torch.cat(pair, dim=-1) for pair in zip(forward, back, strict=True))
    return sequence if output_sequence else h.unsqueeze(0), h, c

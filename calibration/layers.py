"""What is gathered at every linear, convolution and embedding of a module while a prompt runs through it and back.

Let x_t [in] be a layer's input at position t (a token or a pixel, at any step), g_t [out] the gradient of <probe, target> with
respect to its output there, and D the number of values of the target. An error E [out, in] of the weight moves the target by
dz with <probe, dz> = <G, E>, where G = sum_t g_t x_t^T, to first order; over probes of independent signs the mean of <G, E>^2
is |dz|^2 (Hutchinson 1989). Three things are gathered:

- moments: the mean of x_t x_t^T.
- sketches: G r for a few random sign vectors r [in], for which the mean of (G_o r)^2 is |G_o|^2. r stays the same over the
  steps of a prompt, so that their sum over calls is the sketch of the whole G.
- rounding, of linears: sum_t g_to^2 v_t, with v_t the variance of rounding x_t to 256 levels between its least and greatest
  value (step^2 / 12). These errors are independent of each other, so that they move the target by sum_o rounding[o] |W_o|^2.
- block_rounding, of linears: the same for rounding each block of `block_of(in)` inputs to whole multiples of its greatest
  magnitude / 127; they move the target by sum_o sum_b block_rounding[o, b] |W_ob|^2.

`sensitivity[o] = mean (G_o r)^2 / trace(moments)` then makes sum_o sensitivity[o] E_o moments E_o^T the expected |dz|^2 of any
error whose values are independent with equal variance, as rounding errors are: exactly, however positions and steps
correlate. For other errors it rests on the Kronecker-factored form G_o^T G_o ~ sensitivity[o] moments, with rows independent
(K-FAC: Martens & Grosse 2015; for convolutions, Grosse & Martens 2016).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

SKETCHES = 4
"""Random sign vectors a layer and prompt. With 64 prompts a row's sensitivity is known to 10 or 20 %, a layer's far better."""

POSITIONS = 1024
"""Positions of one call that the moments are taken over at most; more are drawn at random (of pixels there are many)."""

BLOCKS = (256, 128, 64, 32, 16)
"""Sizes of MatMulNBits' blocks, the largest first: with int8 activations the larger are the faster."""


@dataclass(frozen=True)
class Kind:
    """How a type of layer reads as rows times weight. `rows(module, x)` [n, in]; `project(module, x, r)` [positions, k] with
    r [in, k]; `outputs(g)` [positions, out]."""

    width: Callable[[Any], int]
    rows: Callable[[Any, Tensor], Tensor]
    project: Callable[[Any, Tensor, Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor]


def _last_axis(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _channels(tensor: Tensor) -> Tensor:
    """[1, C, h, w] -> [h w, C]."""
    return tensor.flatten(2)[0].T


def _linear_rows(_: nn.Linear, x: Tensor) -> Tensor:
    rows = _last_axis(x)
    return rows[_drawn(len(rows)).to(x.device)] if len(rows) > POSITIONS else rows


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """[1, C, h, w] -> [n, C kh kw], the values of a patch in the order of weight.reshape(out, -1)."""
    assert not isinstance(conv.padding, str)
    (top, left), (rows, columns), (down, right) = conv.padding, conv.kernel_size, conv.stride
    windows = F.pad(x, (left, left, top, top)).unfold(2, rows, down).unfold(3, columns, right)  # [1, C, h', w', kh, kw]
    height, width = windows.shape[2:4]
    drawn = _drawn(height * width).to(x.device)
    return windows[0][:, drawn // width, drawn % width].transpose(0, 1).flatten(1)


def _convolve(conv: nn.Conv2d, x: Tensor, signs: Tensor) -> Tensor:
    weight = signs.T.reshape(-1, conv.in_channels, *conv.kernel_size)
    return _channels(F.conv2d(x, weight, stride=conv.stride, padding=conv.padding))


def _rounding_variance(rows: Tensor) -> Tensor:
    """[positions]: the variance of rounding each row to 256 levels between its least and greatest value, 0 among them."""
    step = (rows.amax(dim=1).clamp(min=0) - rows.amin(dim=1).clamp(max=0)) / 255
    return step.square() / 12


def block_of(width: int) -> int:
    """Inputs of a linear that share a scale where they are rounded by blocks: the most that MatMulNBits has and that divide."""
    return next((size for size in BLOCKS if width % size == 0), width)


def _block_rounding_variance(rows: Tensor) -> Tensor:
    """[positions, blocks]: the variance of rounding each block to multiples of its greatest magnitude / 127."""
    return (rows.unflatten(1, (-1, block_of(rows.shape[1]))).abs().amax(dim=2) / 127).square() / 12


def _drawn(count: int) -> Tensor:
    """Positions for the moments: all, or `POSITIONS` different ones, the same for the same count."""
    if count <= POSITIONS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))[:POSITIONS]


KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind(lambda m: m.in_features, _linear_rows, lambda _, x, r: _last_axis(x) @ r, _last_axis),
    nn.Conv2d: Kind(lambda m: m.in_channels * m.kernel_size[0] * m.kernel_size[1], _patches, _convolve, _channels),
    # Its input is a row of the identity, and its weight stands transposed.
    nn.Embedding: Kind(lambda m: m.num_embeddings, lambda _, x: x.flatten(), lambda _, x, r: r[x.flatten()], _last_axis),
}


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that statistics are gathered of, by the name of their weight.

    An embedding whose table is read without a look-up (CLIP's positions) is among them, but gathers nothing.
    """
    found = {f"{name}.weight": part for name, part in module.named_modules() if type(part) in KINDS}
    for name, layer in found.items():
        plain = not isinstance(layer, nn.Conv2d) or (layer.groups == 1 and layer.dilation == (1, 1))
        assert plain, f"{name}: grouped and dilated convolutions have no statistics"
    return found


def signs(name: str, prompt: int, width: int, count: int) -> Tensor:
    """[width, count] random signs of a name and prompt, float32 on the CPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {prompt}".encode()))
    return torch.randint(0, 2, (width, count), generator=generator).float() * 2 - 1


@dataclass
class InputSums:
    """Of the inputs of one layer, or of several that read the same tensor: sums over `samples` positions."""

    moments: Tensor  # [in, in]; of an embedding [rows], how often each was looked up
    total: Tensor  # [in]; of an embedding, the same as moments
    samples: int = 0

    @property
    def trace(self) -> float:
        """Of the mean of x x^T."""
        return float((self.moments.diagonal() if self.moments.ndim == 2 else self.moments).sum()) / self.samples


@dataclass
class Sums:
    """What one piece has gathered so far. `leaders`: the layer whose input sums stand for this layer's too."""

    inputs: dict[str, InputSums] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    sketches: dict[str, Tensor] = field(default_factory=dict)  # [prompts, out, SKETCHES]
    rounding: dict[str, Tensor] = field(default_factory=dict)  # [out], of linears; the sum over prompts
    block_rounding: dict[str, Tensor] = field(default_factory=dict)  # [out, blocks], likewise

    def sensitivity(self, layer: str) -> Tensor:
        """float32 [out]; 0 where nothing but zeros came in."""
        trace = self.inputs[self.leaders[layer]].trace
        squares = self.sketches[layer].square().mean(dim=(0, 2))
        return squares / trace if trace else torch.zeros_like(squares)

    def mean_rounding(self, layer: str) -> Tensor:
        """float32 [out]; 0 for what is no linear."""
        prompts, out, _ = self.sketches[layer].shape
        return self.rounding[layer] / prompts if layer in self.rounding else self.sketches[layer].new_zeros(out)

    def mean_block_rounding(self, layer: str) -> Tensor:
        """float32 [out, blocks]; without blocks for what is no linear."""
        prompts, out, _ = self.sketches[layer].shape
        return self.block_rounding[layer] / prompts if layer in self.block_rounding else self.sketches[layer].new_zeros(out, 0)

    def save(self, path: Path) -> None:
        tensors = {f"sketch {name}": sketch for name, sketch in self.sketches.items()}
        tensors |= {f"rounding {name}": rounding for name, rounding in self.rounding.items()}
        tensors |= {f"block_rounding {name}": rounding for name, rounding in self.block_rounding.items()}
        for name, sums in self.inputs.items():
            tensors[f"moments {name}"] = sums.moments
            tensors[f"total {name}"] = sums.total
        samples = {name: sums.samples for name, sums in self.inputs.items()}
        metadata = {"leaders": json.dumps(self.leaders), "samples": json.dumps(samples)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Sums:
        with safe_open(path, framework="pt", device=str(device)) as file:
            leaders, samples = (json.loads(file.metadata()[key]) for key in ("leaders", "samples"))
            inputs = {
                name: InputSums(file.get_tensor(f"moments {name}"), file.get_tensor(f"total {name}"), count)
                for name, count in samples.items()
            }
            sketches = {name: file.get_tensor(f"sketch {name}") for name in leaders}
            names = [key.removeprefix("rounding ") for key in file.keys() if key.startswith("rounding ")]  # noqa: SIM118
            roundings = [{name: file.get_tensor(f"{kind} {name}") for name in names} for kind in ("rounding", "block_rounding")]
            return cls(inputs, leaders, sketches, *roundings)


class Observer:
    """Adds to `sums` what passes through the layers of `module`, inside `watching`.

    A layer's output carries a gradient even where its input does not, so that every backward pass reaches it.
    """

    def __init__(self, module: nn.Module, sums: Sums, prompts: int) -> None:
        self.layers = layers_of(module)
        self.sums = sums
        self.prompts = prompts
        self._prompt = 0
        self._seen = WeakTensorKeyDictionary()

    @contextmanager
    def watching(self, prompt: int) -> Iterator[None]:
        """Around one forward and backward pass of a prompt."""
        self._prompt = prompt
        self._seen = WeakTensorKeyDictionary()
        hooks = [layer.register_forward_hook(partial(self._forward, name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _forward(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kind, x = KINDS[type(layer)], args[0].detach()
        width = kind.width(layer)
        leader = self._seen.setdefault(args[0], name) if isinstance(layer, nn.Linear) else name
        self.sums.leaders[name] = leader
        if leader == name:
            self._add_inputs(name, kind.rows(layer, x), width)
        projected = kind.project(layer, x, signs(name, self._prompt, width, SKETCHES).to(x.device))
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        if name not in self.sums.sketches:
            self.sums.sketches[name] = output.new_zeros(self.prompts, kind.outputs(output).shape[1], SKETCHES)
        variances = None
        if isinstance(layer, nn.Linear):
            rows = _last_axis(x)
            variances = _rounding_variance(rows), _block_rounding_variance(rows)
        output.register_hook(partial(self._backward, name, kind, projected, variances))
        return output

    def _add_inputs(self, name: str, rows: Tensor, width: int) -> None:
        is_lookup = rows.ndim == 1
        if name not in self.sums.inputs:
            moments = torch.zeros((width,) if is_lookup else (width, width), device=rows.device)
            self.sums.inputs[name] = InputSums(moments, torch.zeros(width, device=rows.device))
        sums = self.sums.inputs[name]
        sums.samples += len(rows)
        if is_lookup:
            counts = torch.bincount(rows, minlength=width)
            sums.moments += counts
            sums.total += counts
        else:
            sums.moments.addmm_(rows.T, rows)
            sums.total += rows.sum(dim=0)

    def _backward(
        self, name: str, kind: Kind, projected: Tensor, variances: tuple[Tensor, Tensor] | None, gradient: Tensor
    ) -> None:
        outputs = kind.outputs(gradient)
        self.sums.sketches[name][self._prompt] += outputs.T @ projected
        if variances is not None:
            squares = outputs.square().T
            for sums, variance in zip((self.sums.rounding, self.sums.block_rounding), variances, strict=True):
                sums[name] = sums.get(name, 0) + squares @ variance

"""What a component declares: the contract of one exported graph, and how its mobile module gets the checkpoint's weights.

A mobile module is written for export: batch 1, fixed shapes, no control flow on data. Its `forward` takes the declared inputs
in order and returns a tuple in the order of the declared outputs. Its weights carry the upstream names (those of diffusers
and transformers) wherever they can; where they cannot, `sources` says which upstream tensor a weight is made of.

Constants that no checkpoint holds (timestep angles, causal masks) are non-persistent buffers that a module builds on
`torch.device("cpu")` by name, so that a module made under `torch.device("meta")` lacks nothing but weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from runtimes.graph import TensorSpec


class Weights(Protocol):
    """What a component asks of a checkpoint: tensors by folder and upstream name."""

    def tensor(self, folder: str, name: str) -> Tensor: ...

    def check(self, folder: str, expected: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Raises `UserError` naming the tensors that do not fit."""
        ...


@dataclass(frozen=True)
class Source:
    """The upstream tensor that a weight is made of: its name, its shape there, and the step from there to here."""

    name: str
    shape: tuple[int, ...]
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Component:
    """One exported graph. `ignored` are the beginnings of upstream names in `folder` that its computation does not need."""

    name: str
    folder: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    make: Callable[[], nn.Module]
    sources: Mapping[str, Source] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def blank(self) -> nn.Module:
        """The module with weights on the meta device: shapes without values, for a dry run."""
        with torch.device("meta"):
            return self.make().eval().requires_grad_(False)

    def reads(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every upstream tensor that `load` reads."""
        wanted = {}
        for name, value in self.blank().state_dict().items():
            source = self.sources.get(name, Source(name, tuple(value.shape)))
            wanted[source.name] = source.shape
        return wanted

    def weights(self, checkpoint: Weights) -> ComponentWeights:
        """Its weights in float32 by the names that they have here, each read when it is asked for."""
        shapes = {name: tuple(value.shape) for name, value in self.blank().state_dict().items()}
        return ComponentWeights(self, checkpoint, shapes)

    def load(self, checkpoint: Weights, left_out: Collection[str] = ()) -> nn.Module:
        """The module in float32, read tensor by tensor; `check_weights` has named before what does not fit.

        Tensors `left_out` stay on the meta device, for whoever puts others in their place.
        """
        module = self.blank()
        weights = self.weights(checkpoint)
        module.load_state_dict({name: weights[name] for name in weights if name not in left_out}, strict=False, assign=True)
        return module.eval().requires_grad_(False)


@dataclass(frozen=True)
class ComponentWeights(Mapping[str, Tensor]):
    """A component's tensors, read from the checkpoint one at a time: only those in use are in memory."""

    component: Component
    checkpoint: Weights
    shapes: Mapping[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> Tensor:
        shape, owner = self.shapes[name], self.component
        source = owner.sources.get(name, Source(name, shape))
        tensor = source.convert(self.checkpoint.tensor(owner.folder, source.name)).to(torch.float32).contiguous()
        assert tensor.shape == shape, f"{owner.name}: {name} is {tuple(tensor.shape)}, not {shape}"
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def check_weights(checkpoint: Weights, components: Iterable[Component]) -> None:
    """Checks every folder against all components that read it; give all of an export, even where few are wanted."""
    expected: dict[str, dict[str, tuple[int, ...]]] = {}
    ignored: dict[str, tuple[str, ...]] = {}
    for component in components:
        expected.setdefault(component.folder, {}).update(component.reads())
        ignored[component.folder] = ignored.get(component.folder, ()) + component.ignored
    for folder, tensors in expected.items():
        checkpoint.check(folder, tensors, ignored[folder])

"""What every format answers: reasons to refuse, found from shapes alone, and the artifact of a component."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from calibration.statistics import InputRounding
from export.compression.compress import with_stored
from export.compression.schemes import Scheme, WeightInfo, weight_infos
from export.compression.stored import IntegerWeight, StoredWeight
from runtimes.graph import TensorSpec

if TYPE_CHECKING:
    from export.components.component import Component

DEPLOYMENT_TARGETS = ("iOS17", "iOS18")


@dataclass(frozen=True)
class EmitOptions:
    """What a format may be told. author, licence and version go into artifacts that have a place for them."""

    deployment_target: str = "iOS17"
    author: str = ""
    licence: str = ""
    version: str = ""


@dataclass(frozen=True)
class Artifact:
    """One exported graph on disk.

    path: the file that a runtime loads, or the package folder; files: every file of it, relative to the bundle
    bits: stored bits a weight, palettes and scales included
    delegated: share of the multiply-accumulate operations that the backend runs (1 where there is no other)
    details: facts for the manifest (backend, rounding of activations, how floats are stored)
    """

    component: str
    format: str
    path: Path
    files: tuple[str, ...]
    nbytes: int
    bits: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    delegated: float = 1.0
    details: Mapping[str, str] = field(default_factory=dict)


class Format(Protocol):
    """A kind of artifact. `schemes` maps weight names to schemes; shapes come from the component's blank module."""

    @property
    def name(self) -> str: ...

    @property
    def rounding(self) -> InputRounding | None:
        """How the inputs of linears with integer weights are rounded to 8 bits; None where they are not."""
        ...

    def refuse(self, component: Component, schemes: Mapping[str, Scheme], options: EmitOptions) -> list[str]:
        """Every reason for which the backend would compute wrongly or cannot hold the schemes; empty if there is none."""
        ...

    def reference(self, module: nn.Module, stored: Mapping[str, StoredWeight]) -> nn.Module:
        """The compressed reference: decompressed weights and, where the backend rounds activations, that rounding."""
        ...

    def emit(self, component: Component, module: nn.Module, stored: Mapping[str, StoredWeight], folder: Path,
             options: EmitOptions) -> list[Artifact]:
        """Writes the component's artifacts into a bundle folder. The same arguments give the same bytes."""
        ...


def with_rounded_inputs(
    module: nn.Module, stored: Mapping[str, StoredWeight], rounded: Callable[[IntegerWeight], Callable[[Tensor], Tensor]]
) -> nn.Module:
    """A copy of the module with decompressed weights that rounds the inputs of linears of integer weights.

    `rounded(weight)` is what such a linear does to its input.
    """
    reference = with_stored(module, stored)
    for name, weight in stored.items():
        owner = reference.get_submodule(name.rpartition(".")[0])
        if isinstance(weight, IntegerWeight) and isinstance(owner, nn.Linear):
            owner.register_forward_pre_hook(_before(rounded(weight)))
    return reference


def _before(step: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, inputs: (step(inputs[0]), *inputs[1:])


def refuse_schemes(
    component: Component, schemes: Mapping[str, Scheme], refuse: Callable[[str, WeightInfo, Scheme], str | None]
) -> list[str]:
    """Each reason once: weights that the component does not have, and what `refuse(name, weight, scheme)` says of others."""
    infos = {info.name: info for info in weight_infos(component.blank())}
    reasons: dict[str, None] = {}
    for name, scheme in schemes.items():
        if name not in infos:
            reasons[f"{component.name} has no weight {name}; the recipe belongs to another model"] = None
        elif reason := refuse(f"{component.name}.{name}", infos[name], scheme):
            reasons[reason] = None
    return list(reasons)


def example_inputs(specs: Iterable[TensorSpec]) -> tuple[Tensor, ...]:
    """Zeros of the declared types and shapes, to trace with."""
    return tuple(torch.from_numpy(np.zeros(spec.shape, spec.dtype)) for spec in specs)


def export_graph(component: Component, module: nn.Module) -> ExportedProgram:
    """The component's graph in ATen operations, fixed shapes."""
    with torch.no_grad():
        return torch.export.export(module.eval(), example_inputs(component.inputs))


def artifact_files(root: Path, folder: Path) -> tuple[tuple[str, ...], int]:
    """Files below `root` (or `root` itself) relative to the bundle `folder`, and their bytes."""
    paths = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    return tuple(path.relative_to(folder).as_posix() for path in paths), sum(path.stat().st_size for path in paths)

"""Which runtimes there are, which format each one runs, and how a component of a bundle is loaded through one.

A new runtime is one loader and one entry in `RUNTIMES`. Loaders import their library when first used.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.bundle import ArtifactEntry, BundleError, ComponentEntry, Feed, Manifest, TensorEntry
from runtimes.graph import Graph, GraphError, TensorSpec, check_inputs

Loader = Callable[[Path, ComponentEntry, int | None], Graph]


@dataclass(frozen=True)
class Runtime:
    """`package` is the Python package that has to be installed for it; `load(path, component, threads)` loads one artifact.

    `imports`: the modules that `load` would import, for whoever wants to time it without them. `stand_in`: the package that
    computes on this system in the place of the format's own runtime, where there is one.
    """

    name: str
    format: str
    package: str
    load: Loader
    imports: tuple[str, ...] = ()
    stand_in: str | None = None

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def _coreml(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
    from runtimes import coreml

    if threads is not None and sys.platform != "darwin":
        import torch  # the executor off macOS computes with torch, whose threads belong to the process

        torch.set_num_threads(threads)
    return coreml.load(path, compute_units=component.compute_units or "ALL")


def _onnxruntime(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
    from runtimes import onnx

    return onnx.load(path, threads=threads)


def _executorch(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
    from runtimes import executorch

    return executorch.load(path, threads=threads)


# In the order in which "auto" tries them.
RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "coreml",
            "coreml",
            "coremltools",
            _coreml,
            ("runtimes.coreml", *(["coremltools"] if sys.platform == "darwin" else [])),
            None if sys.platform == "darwin" else "torch",
        ),
        Runtime("onnxruntime", "onnx", "onnxruntime", _onnxruntime, ("runtimes.onnx",)),
        Runtime("executorch", "executorch", "executorch", _executorch, ("runtimes.executorch", "executorch.runtime")),
    )
}


def choose_runtime(manifest: Manifest, name: str = "auto") -> Runtime:
    """The runtime called `name`, or for "auto" the first that is installed and has artifacts. Raises `BundleError`."""
    if name != "auto" and name not in RUNTIMES:
        raise BundleError(f"runtime {name!r} does not exist; choose from auto, {', '.join(RUNTIMES)}")
    fitting = [runtime for runtime in RUNTIMES.values() if runtime.format in manifest.formats]
    wanted = [runtime for runtime in fitting if name in ("auto", runtime.name)]
    if not wanted:
        has = ", ".join(manifest.formats)
        usable = ", ".join(runtime.name for runtime in fitting) or "none of this version's runtimes"
        if name == "auto":
            raise BundleError(f"the bundle holds artifacts for {has}, which no runtime here can load")
        raise BundleError(f"the bundle has no artifacts for runtime {name}; it holds {has} artifacts: use {usable}")
    installed = next((runtime for runtime in wanted if runtime.installed), None)
    if installed is None:
        raise BundleError(f"the bundle needs a package that is not installed: {' or '.join(r.package for r in wanted)}")
    return installed


def load_component(
    bundle: Path, entry: ComponentEntry, runtime: Runtime, threads: int | None = None, *, low_memory: bool = False
) -> Graph:
    """One component as one graph with the names of its contract, however many artifacts it is cut into.

    `low_memory`: of several artifacts one is in memory at a time; each is loaded anew whenever the component runs.
    """

    def load(artifact: ArtifactEntry) -> Graph:
        part = runtime.load(bundle / artifact.path, entry, threads)
        for kind, declared, found in (("inputs", artifact.inputs, part.inputs), ("outputs", artifact.outputs, part.outputs)):
            if set(specs(declared)) != set(found):
                raise GraphError(f"{artifact.path} has {kind} {_text(found)}; the manifest says {_text(specs(declared))}")
        return part

    if len(entry.artifacts) == 1:
        return load(entry.artifacts[0])
    if low_memory:
        return ChunkedGraph(entry, load)
    parts = {artifact.path: load(artifact) for artifact in entry.artifacts}
    return ChunkedGraph(entry, lambda artifact: parts[artifact.path])


class ChunkedGraph:
    """The artifacts of a chunked component, run one after another as its manifest entry feeds them.

    `part` gives the graph of an artifact when its turn comes.
    """

    def __init__(self, entry: ComponentEntry, part: Callable[[ArtifactEntry], Graph]) -> None:
        self.inputs = specs(entry.inputs)
        self.outputs = specs(entry.outputs)
        self._entry = entry
        self._part = part

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = check_inputs(self.inputs, inputs)
        for artifact in self._entry.artifacts:
            part = self._part(artifact)
            values |= part({spec.name: fed(artifact.feed(spec.name), values) for spec in part.inputs})
            del part  # before the next one is loaded
        return {spec.name: values[spec.name] for spec in self.outputs}


def fed(feed: Feed, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a chunk's input is given, of the tensors known by then."""
    tensor = values[feed.tensor]
    return tensor if feed.rows is None else tensor[:, slice(*feed.rows)]


def specs(entries: tuple[TensorEntry, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries)


def _text(tensors: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in tensors)

"""Golden inputs and outputs: recorded on real prompts at every step, shipped in the bundle, replayed by `verify`.

golden/<component>.safetensors, one for each component; of case k it holds
    case{k}.input.<name>                    what the float32 reference pipeline gave the component
    case{k}.reference.<name>                what the original float32 modules made of it
    case{k}.compressed.<format>.<name>      what the same modules make of it with the weights as that format stores them;
                                            left out where a format stores every weight of the component exactly
golden/images.safetensors, of prompt p
    prompt{p}.latents   float32 [steps + 1, channels, height, width]: the noise, then the latent after each step
    prompt{p}.image     float32 [3, height, width] in [0, 1]: what unmodified diffusers draws at that seed and those sigmas
A component that runs once a prompt has one case a prompt, the transformer one a prompt and step, in that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from runtimes.bundle import BundleError, GoldenCase, GoldenEntry, GoldenPrompt, GoldenTensors, describe_files

FOLDER = "golden"
IMAGES = f"{FOLDER}/images.safetensors"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Case:
    """One recorded call of one component. `prompt` is an index; `step` is None for what runs once a prompt."""

    prompt: int
    step: int | None
    inputs: Arrays
    reference: Arrays
    compressed: Mapping[str, Arrays] = field(default_factory=dict)  # by format

    def expected(self, format: str) -> Arrays:
        """What an artifact of this format should give: the compressed reference."""
        return self.compressed.get(format, self.reference)


@dataclass(frozen=True, eq=False)
class Drawing:
    """What unmodified diffusers draws of one prompt. latents [steps + 1, C, h, w]; image [3, H, W] in [0, 1]."""

    prompt: str
    seed: int
    latents: np.ndarray
    image: np.ndarray


def write_golden(bundle: Path, cases: Mapping[str, Sequence[Case]], drawings: Sequence[Drawing]) -> GoldenEntry:
    """Writes golden/ inside the bundle folder; `cases` is by component name. Returns what the manifest says about it."""
    components = [write_cases(bundle, component, recorded) for component, recorded in cases.items()]
    return golden_entry(bundle, write_drawings(bundle, drawings), components)


def write_cases(bundle: Path, component: str, cases: Sequence[Case]) -> GoldenTensors:
    """Writes the golden cases of one component."""
    (bundle / FOLDER).mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for k, case in enumerate(cases) for name, array in _flatten(k, case)}
    path = f"{FOLDER}/{component}.safetensors"
    save_file(tensors, bundle / path)
    entries = tuple(GoldenCase(prompt=case.prompt, step=case.step) for case in cases)
    return GoldenTensors(component=component, path=path, cases=entries, tensors=tuple(sorted(tensors)))


def write_drawings(bundle: Path, drawings: Sequence[Drawing]) -> tuple[GoldenPrompt, ...]:
    """Writes what unmodified diffusers draws."""
    (bundle / FOLDER).mkdir(parents=True, exist_ok=True)
    images = {}
    for p, drawing in enumerate(drawings):
        images[f"prompt{p}.latents"] = np.ascontiguousarray(drawing.latents, np.float32)
        images[f"prompt{p}.image"] = np.ascontiguousarray(drawing.image, np.float32)
    save_file(images, bundle / IMAGES)
    return tuple(GoldenPrompt(prompt=drawing.prompt, seed=drawing.seed) for drawing in drawings)


def golden_entry(bundle: Path, prompts: Sequence[GoldenPrompt], components: Sequence[GoldenTensors]) -> GoldenEntry:
    """What the manifest says of the files in golden/."""
    files = describe_files(bundle, [FOLDER])
    return GoldenEntry(prompts=tuple(prompts), components=tuple(components), images=IMAGES, files=files)


def read_cases(bundle: Path, golden: GoldenEntry, component: str) -> Iterator[Case]:
    """The cases of one component, one in memory at a time."""
    entry = next((e for e in golden.components if e.component == component), None)
    if entry is None:
        recorded = [e.component for e in golden.components]
        raise BundleError(f"{bundle} records no golden cases of {component!r}; it has {recorded}")
    yield from read_entry(bundle, entry)


def read_entry(bundle: Path, entry: GoldenTensors) -> Iterator[Case]:
    """The same, of the component that `entry` is about."""
    for k, case in enumerate(entry.cases):
        names = [name for name in entry.tensors if name.startswith(f"case{k}.")]
        inputs: dict[str, np.ndarray] = {}
        reference: dict[str, np.ndarray] = {}
        compressed: dict[str, dict[str, np.ndarray]] = {}
        for name, array in _read(bundle / entry.path, names).items():
            kind, _, rest = name.removeprefix(f"case{k}.").partition(".")
            if kind == "compressed":
                format, _, rest = rest.partition(".")
                compressed.setdefault(format, {})[rest] = array
            else:
                (inputs if kind == "input" else reference)[rest] = array
        yield Case(case.prompt, case.step, inputs, reference, compressed)


def read_drawings(bundle: Path, golden: GoldenEntry) -> Iterator[Drawing]:
    yield from read_images(bundle, golden.prompts)


def read_images(bundle: Path, prompts: Sequence[GoldenPrompt]) -> Iterator[Drawing]:
    """What unmodified diffusers drew of these prompts."""
    for p, entry in enumerate(prompts):
        arrays = _read(bundle / IMAGES, [f"prompt{p}.latents", f"prompt{p}.image"])
        yield Drawing(entry.prompt, entry.seed, arrays[f"prompt{p}.latents"], arrays[f"prompt{p}.image"])


def _flatten(k: int, case: Case) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in case.inputs.items():
        yield f"case{k}.input.{name}", array
    for name, array in case.reference.items():
        yield f"case{k}.reference.{name}", array
    for format, outputs in case.compressed.items():
        for name, array in outputs.items():
            yield f"case{k}.compressed.{format}.{name}", array


def _read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None

"""What calibration finds out about every weight, and the files it lies in.

<folder>/statistics.json                what was calibrated, and the file and tensors of every weight; written last
<folder>/<piece>.safetensors            of the weights of one piece (a component, or one of a transformer's blocks):
    <weight>.moments, <weight>.mean     once for all weights that read the same tensor
    <weight>.sensitivity, <weight>.rounding, <weight>.block_rounding
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from calibration.errors import CalibrationError
from calibration.layers import Sums

INDEX = "statistics.json"

InputRounding = Literal["row", "block"]
"""How a runtime rounds a linear's inputs to 8 bits: one scale and zero point a row (XNNPACK), or one scale for each block of
`block_of(in)` inputs in it (MatMulNBits)."""


@dataclass(frozen=True)
class Subject:
    """What statistics are of: a checkpoint by its fingerprint, at a resolution (width, height), on prompts along sigmas."""

    fingerprint: str
    prompts: tuple[str, ...]
    sigmas: tuple[float, ...]
    resolution: tuple[int, int]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Of one weight W [out, in] and its inputs x; a convolution's x is the patch, in the order of weight.reshape(out, -1).

    An error E of W moves the model's final latents by sum_o sensitivity[o] E_o moments E_o^T: the mean squared error of a
    latent value over the variance of latent values, to first order (layers.py says under which assumptions). In the VAE
    decoder the same goes for the values of the picture in [0, 1].

    moments      float32 [in, in], the mean of x x^T
    mean         float32 [in], the mean of x
    sensitivity  float32 [out]
    rounding     float32 [out]; rounding a linear's inputs to 8 bits a row moves the latents by sum_o rounding[o] |W_o|^2
    block_rounding  float32 [out, blocks]; rounding them by blocks moves the latents by sum_o,b block_rounding[o, b] |W_ob|^2
    samples      positions that the means are over: tokens or pixels, of all steps and prompts

    An embedding's W is [rows, width]: moments and mean are float32 [rows], the share of each row among the look-ups, and
    sensitivity is [width]; an error E moves the latents by sum_r sum_o moments[r] sensitivity[o] E[r, o]^2.
    """

    moments: np.ndarray
    mean: np.ndarray
    sensitivity: np.ndarray
    rounding: np.ndarray
    block_rounding: np.ndarray
    samples: int

    @property
    def is_lookup(self) -> bool:
        """Whether the weight is an embedding, whose inputs are rows to look up."""
        return self.moments.ndim == 1

    def input_rounding(self, weight: np.ndarray, by: InputRounding) -> float:
        """What rounding the inputs of a linear to 8 bits does to the final latents; 0 for other layers."""
        if self.is_lookup or self.block_rounding.shape[1] == 0:
            return 0.0
        squares = np.square(weight, dtype=np.float64).reshape(*self.block_rounding.shape, -1).sum(axis=2)
        return float((self.block_rounding * squares).sum() if by == "block" else self.rounding @ squares.sum(axis=1))

    def damage(self, error: np.ndarray) -> float:
        """What an error of the weight, of its shape, does to the final latents (or the picture), as said above."""
        error = error.astype(np.float32)
        if self.is_lookup:
            return float(self.moments @ np.square(error) @ self.sensitivity)
        error = error.reshape(len(self.sensitivity), -1)
        return float(self.sensitivity @ ((error @ self.moments) * error).sum(axis=1))


@dataclass(frozen=True)
class Place:
    """Where a weight's statistics lie. `inputs`: the weight under whose name the tensors about its inputs stand."""

    file: str
    inputs: str
    samples: int


@dataclass(frozen=True)
class Statistics:
    """The statistics of a model; a weight's tensors are read when asked for.

    `places` is by component and by the weight's name within it, such as "transformer" and
    "transformer_blocks.0.attn.to_q.weight", however many pieces the component was cut into.
    """

    folder: Path
    subject: Subject
    places: Mapping[str, Mapping[str, Place]]

    def layer(self, component: str, weight: str) -> LayerStatistics:
        """Raises KeyError for a weight without statistics, `CalibrationError` where a file is damaged."""
        place = self.places[component][weight]
        path = self.folder / place.file
        try:
            with safe_open(path, framework="numpy") as file:
                moments, mean = (file.get_tensor(f"{place.inputs}.{kind}") for kind in ("moments", "mean"))
                kinds = ("sensitivity", "rounding", "block_rounding")
                sensitivity, rounding, blocks = (file.get_tensor(f"{weight}.{kind}") for kind in kinds)
                return LayerStatistics(moments, mean, sensitivity, rounding, blocks, place.samples)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{path} cannot be read ({error}); remove {self.folder} and calibrate again") from error


def save_piece(path: Path, sums: Sums) -> None:
    """The statistics of one piece, from what it gathered."""
    tensors = {f"{name}.sensitivity": sums.sensitivity(name) for name in sums.leaders}
    tensors |= {f"{name}.rounding": sums.mean_rounding(name) for name in sums.leaders}
    tensors |= {f"{name}.block_rounding": sums.mean_block_rounding(name) for name in sums.leaders}
    for name, inputs in sums.inputs.items():
        tensors[f"{name}.moments"] = inputs.moments / inputs.samples
        tensors[f"{name}.mean"] = inputs.total / inputs.samples
    places = {name: asdict(Place(path.name, leader, sums.inputs[leader].samples)) for name, leader in sums.leaders.items()}
    beside = path.with_suffix(".part")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside, {"places": json.dumps(places)})
    beside.rename(path)


def save_index(folder: Path, subject: Subject, files: Mapping[str, str]) -> Statistics:
    """Completes a folder whose pieces are all saved; `files` says of which component each file is."""
    places: dict[str, dict[str, Place]] = {}
    for file, component in files.items():
        with safe_open(folder / file, framework="pt") as opened:
            found = json.loads(opened.metadata()["places"])
        places.setdefault(component, {}).update({name: Place(**place) for name, place in found.items()})
    statistics = Statistics(folder, subject, places)
    listed = {c: {name: asdict(place) for name, place in weights.items()} for c, weights in places.items()}
    beside = folder / f"{INDEX}.part"
    beside.write_text(json.dumps({"subject": asdict(subject), "places": listed}, indent=1) + "\n", encoding="utf-8")
    beside.rename(folder / INDEX)
    return statistics


def load_statistics(folder: Path) -> Statistics:
    """The statistics of a completed folder. Raises `CalibrationError` for any other."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        subject = found["subject"]
        return Statistics(
            folder,
            Subject(
                subject["fingerprint"],
                tuple(subject["prompts"]),
                tuple(subject["sigmas"]),
                (subject["resolution"][0], subject["resolution"][1]),
            ),
            {c: {name: Place(**place) for name, place in weights.items()} for c, weights in found["places"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{folder / INDEX} cannot be read ({error}); remove the folder and calibrate again") from error

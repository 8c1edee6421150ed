"""What a benchmark measured, as JSON: on a computer by `export-flash bench`, on a phone by an app, the same fields for both.

Where others have a name it is theirs, in snake case: `start_datetime`, `environment_info`, `backend_settings`, `framework`,
`delegate`, `measured_samples`, `measured_duration` from MLPerf Mobile's app; `benchmark_model`, `quantization`,
`model_load_time`, `device`, `arch`, `os`, `total_mem` from ExecuTorch's benchmark apps. Times are seconds, sizes are bytes.
`python -m runtimes.harness.results` prints the JSON Schema, which runtimes/benchmark.schema.json holds.

Version 2 adds what a device measured over a cable says: `conditions`, `sustained`, `placements`, `chip`, and null for the
cores, memory and baseline that a device does not tell. A result of version 1 has none of these and is read as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtimes.bundle import BundleError, ImageSize, Manifest, Sha256

SCHEMA_VERSION: Literal[2] = 2
IMAGE = "image"
"""Name of the row about a whole picture, from prompt to pixels."""

LoadMode = Literal["mmap", "read"]
Unit = Literal["cpu", "gpu", "neural_engine", "unknown"]
# Android's names, android.os.PowerManager.THERMAL_STATUS_*, from 0 to 6.
ThermalStatus = Literal["none", "light", "moderate", "severe", "critical", "emergency", "shutdown"]
Against = Literal["diffusers", "torch", "torch-compile"]
Seconds = Annotated[float, Field(ge=0, description="seconds")]
Sample = Annotated[float, Field(gt=0, description="seconds; a clock that gives 0 is too coarse")]
Bytes = Annotated[int, Field(ge=0, description="bytes")]
Share = Annotated[float, Field(ge=0, le=1)]
# A statistic may differ from that of the samples by what printing them to the microsecond costs.
RELATIVE, ABSOLUTE = 1e-6, 1e-6


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Latency(_Model):
    """Runs after the warm-up, in the order they ran, and their statistics.

    Percentiles interpolate linearly between the sorted samples (type 7 of Hyndman and Fan 1996, numpy's default).
    """

    p50: Seconds
    p90: Seconds
    p99: Seconds
    min: Seconds
    max: Seconds
    mean: Seconds
    measured_samples: int = Field(ge=1)
    measured_duration: Seconds = Field(description="sum of the samples")
    samples: tuple[Sample, ...] = Field(min_length=1)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Latency:
        """The statistics of at least one sample, in seconds."""
        return cls(**_statistics(samples), samples=tuple(samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        """25th and 75th percentile, seconds."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)

    @model_validator(mode="after")
    def _is_of_its_samples(self) -> Latency:
        for name, value in _statistics(self.samples).items():
            if not math.isclose(getattr(self, name), value, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
                raise ValueError(f"{name} is {getattr(self, name)}, but that of the samples is {value:.9g}")
        return self


class LoadTime(_Model):
    """Loading in a process that has its libraries already: for the first time, and again after it was released."""

    first: Seconds
    warm: Seconds


class Memory(_Model):
    """Resident memory of the row's process: once libraries and inputs are in it, and at most while it loaded and ran."""

    baseline_resident: Bytes | None = Field(description="bytes; null: what runs the artifact tells the peak alone")
    peak_resident: Bytes


class Row(_Model):
    """One component, or the whole picture. A sample is one call of the component, or one picture."""

    name: str = Field(min_length=1, description=f'a component of the manifest, or "{IMAGE}"')
    delegate: str | None = Field(description="compute units or backend that ran it, as the manifest names them")
    bytes: Bytes = Field(description="of the artifacts")
    load_mode: LoadMode | None = Field(description="whether an artifact stays mapped into memory; null: not known")
    model_load_time: LoadTime
    warm_up: tuple[Seconds, ...] = Field(description="runs before those that are measured")
    latency: Latency
    memory: Memory | None = Field(description="null: the system does not tell")


class BenchmarkModel(_Model):
    """Which bundle was measured."""

    name: str
    target: str
    quantization: str = Field(description="the recipe's name")
    fingerprint: Sha256 = Field(description="the checkpoint's, from the manifest")
    digest: Sha256 = Field(description="the manifest's own")
    image_size: ImageSize
    steps: int = Field(ge=1)


class BackendSettings(_Model):
    """What ran the artifacts."""

    framework: str = Field(description="coreml, onnxruntime, executorch; off macOS 'coreml on torch'")
    framework_version: str
    format: str
    threads: int | None = Field(ge=1, description="null: the runtime's own choice")


class EnvironmentInfo(_Model):
    """The machine."""

    platform: Literal["linux", "macos", "android", "ios"]
    device: str = Field(description="the phone's model, or the computer's processor")
    arch: str
    os: str
    cores: int | None = Field(ge=1, description="null: the device does not tell")
    total_mem: Bytes | None = Field(description="bytes; null: the device does not tell")
    chip: str | None = Field(default=None, description="as the device calls it; null: it does not tell")


class Ratio(_Model):
    """Time of the artifact over time of the other, run by run: median and quartiles over the pairs. Below 1: the artifact is
    faster."""

    median: float = Field(gt=0)
    q25: float = Field(gt=0)
    q75: float = Field(gt=0)


class Pairs(_Model):
    """The artifact and something else run in turns, A B A B: sample k of both is pair k."""

    name: str = Field(min_length=1, description=f'a component of the manifest, or "{IMAGE}"')
    artifact: Latency
    other: Latency
    ratio: Ratio

    @classmethod
    def of(cls, name: str, artifact: Sequence[float], other: Sequence[float]) -> Pairs:
        """Pairs from the samples of both, seconds."""
        ratio = Ratio(**_ratio(artifact, other))
        return cls(name=name, artifact=Latency.of(artifact), other=Latency.of(other), ratio=ratio)

    @model_validator(mode="after")
    def _is_of_its_samples(self) -> Pairs:
        if len(self.artifact.samples) != len(self.other.samples):
            raise ValueError(f"{self.name}: {len(self.artifact.samples)} samples cannot pair {len(self.other.samples)}")
        for name, value in _ratio(self.artifact.samples, self.other.samples).items():
            if not math.isclose(getattr(self.ratio, name), value, rel_tol=RELATIVE):
                raise ValueError(f"ratio.{name} is {getattr(self.ratio, name)}, but that of the samples is {value:.9g}")
        return self


class Comparison(_Model):
    """The original beside the artifacts, each in a process of its own."""

    against: Against
    versions: Mapping[str, str] = Field(description="of the libraries that ran the other side")
    pairs: tuple[Pairs, ...] = Field(min_length=1)


class Condition(_Model):
    """How warm and how charged a device is at one moment. Temperatures are degrees Celsius."""

    thermal_status: ThermalStatus | None = Field(description="null: the system does not tell")
    temperatures: Mapping[str, float] = Field(description="by sensor, as the system names them")
    battery_level: Share | None
    battery_temperature: float | None
    powered: bool | None = Field(description="whether it is on a charger or cable that charges")


class Conditions(_Model):
    """Before the first measurement and after the last."""

    before: Condition
    after: Condition


class Sustained(_Model):
    """One row run without a pause for some time, in a process of its own: what remains of its speed once the device is warm."""

    name: str = Field(min_length=1, description="of the row")
    asked: Seconds = Field(description="how long it was to run, seconds")
    latency: Latency
    first: Seconds = Field(description="median of the first quarter of the samples")
    last: Seconds = Field(description="median of the last quarter of the samples")

    @classmethod
    def of(cls, name: str, asked: float, samples: Sequence[float]) -> Sustained:
        """From at least one sample, in the order they ran, seconds."""
        return cls(name=name, asked=asked, latency=Latency.of(samples), **_ends(samples))

    @property
    def trend(self) -> float:
        """Last over first: above 1, it became slower."""
        return self.last / self.first

    @model_validator(mode="after")
    def _is_of_its_samples(self) -> Sustained:
        for name, value in _ends(self.latency.samples).items():
            if not math.isclose(getattr(self, name), value, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
                raise ValueError(f"{name} is {getattr(self, name)}, but that of the samples is {value:.9g}")
        return self


class PlacedOperations(_Model):
    """The operations of one kind that one unit of the chip is to run."""

    operator: str = Field(description="as the ML program names it, without the opset")
    unit: Unit
    count: int = Field(ge=1)
    cost: Share = Field(description="of the estimated cost of the whole artifact")


class Placement(_Model):
    """Where Core ML means to run one artifact (MLComputePlan): an estimate of the system's own, made without running it."""

    name: str = Field(min_length=1, description="a component of the manifest")
    artifact: str = Field(description="its path in the bundle")
    requested: str = Field(description="compute units, as the manifest names them")
    cost: Mapping[Unit, Share] = Field(description="share of the estimated cost by unit")
    operations: tuple[PlacedOperations, ...] = Field(description="the costly first")
    warning: str | None = Field(description="where what was asked for is not what is going to happen")


class Result(_Model):
    """One benchmark of one bundle through one runtime."""

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    host: bool = Field(description="true: measured on a computer, which says nothing about a phone's speed")
    start_datetime: AwareDatetime
    benchmark_model: BenchmarkModel
    backend_settings: BackendSettings
    environment_info: EnvironmentInfo
    rows: tuple[Row, ...] = Field(min_length=1)
    comparison: Comparison | None = None
    conditions: Conditions | None = Field(default=None, description="null: not asked of the system")
    sustained: Sustained | None = Field(default=None, description="null: not asked for")
    placements: tuple[Placement, ...] = Field(default=(), description="Core ML alone")

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @model_validator(mode="after")
    def _is_consistent(self) -> Result:
        names = [row.name for row in self.rows]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is listed twice")
        if self.host != (self.environment_info.platform in ("linux", "macos")):
            raise ValueError(f"host is {self.host}, but the platform is {self.environment_info.platform}")
        return self


def describe_model(manifest: Manifest) -> BenchmarkModel:
    """What a result says about the bundle of a manifest."""
    return BenchmarkModel(
        name=manifest.model.name,
        target=manifest.target,
        quantization=manifest.recipe.name,
        fingerprint=manifest.model.fingerprint,
        digest=manifest.digest,
        image_size=manifest.image_size,
        steps=manifest.steps,
    )


def parse_result(text: str, where: str) -> Result:
    """The result in a JSON text. Raises `BundleError`, one line that begins with `where`."""
    try:
        return Result.model_validate(json.loads(text))
    except ValidationError as error:
        raise BundleError(f"{where} is no benchmark result: {_complaint(error)}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not valid JSON: {error}") from None


def read_result(path: Path) -> Result:
    """The result in a file. Raises `BundleError`, one line: no such file, not JSON, a field that does not fit."""
    try:
        return parse_result(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BundleError(f"{path} is not valid JSON: it is no text in UTF-8") from None


def now() -> datetime:
    """The present time, in whole seconds and UTC."""
    return datetime.now(UTC).replace(microsecond=0)


def schema() -> str:
    """The JSON Schema of a result, as shipped in runtimes/benchmark.schema.json."""
    return json.dumps(Result.model_json_schema(mode="serialization"), indent=2) + "\n"


def _statistics(samples: Sequence[float]) -> dict[str, Any]:
    p50, p90, p99 = np.percentile(samples, [50, 90, 99])
    return {
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "min": min(samples),
        "max": max(samples),
        "mean": math.fsum(samples) / len(samples),
        "measured_samples": len(samples),
        "measured_duration": math.fsum(samples),
    }


def _ends(samples: Sequence[float]) -> dict[str, float]:
    quarter = math.ceil(len(samples) / 4)
    return {"first": float(np.median(samples[:quarter])), "last": float(np.median(samples[-quarter:]))}


def _ratio(artifact: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(np.divide(artifact, other), [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def _complaint(error: ValidationError) -> str:
    """The first complaint as one line: where, and what is wrong."""
    first: Any = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["ctx"]["error"]) if "error" in first.get("ctx", {}) else first["msg"]
    return " ".join((f"{place}: {message}" if place else message).split())


if __name__ == "__main__":
    print(schema(), end="")

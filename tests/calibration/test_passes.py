"""How a calibration runs: resumed after any stop, found again in the cache, one block in memory, failures in one line."""

from __future__ import annotations

import errno
import shutil
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch import nn

from calibration import units
from calibration.statistics import Statistics
from calibration.store import CACHE, Writer, default_cache, locked
from export.checkpoint import Checkpoint
from export.components.component import Component
from export.errors import UserError
from tests.calibration.conftest import Calibrate


@dataclass
class Listener:
    """Remembers what it is told."""

    stages: list[tuple[str, int]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))

    def step(self, detail: str) -> None:
        self.steps.append(detail)


class Killed(BaseException):
    """What ends a process in the middle of its work."""


def files(statistics: Statistics) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in statistics.folder.iterdir()}


def test_a_run_killed_again_and_again_ends_in_the_same_bytes_and_loses_one_unit_each_time(
    monkeypatch: pytest.MonkeyPatch, run: Calibrate, two: Statistics, tmp_path: Path
) -> None:
    counts, append, rename = Counter[str](), Writer.append, Path.rename

    def dies_every(count: int, what: str) -> None:
        counts[what] += 1
        if counts[what] % count == 0:
            raise Killed

    def dying_append(writer: Writer, array: np.ndarray) -> None:
        dies_every(23, "append")
        append(writer, array)

    def dying_rename(path: Path, target: Path) -> Path:
        dies_every(31, "rename")
        return rename(path, target)

    monkeypatch.setattr(Writer, "append", dying_append)
    monkeypatch.setattr(Path, "rename", dying_rename)
    listener, kills = Listener(), 0
    while True:
        try:
            resumed = run(2, tmp_path, progress=listener)
            break
        except Killed:
            kills += 1
    assert kills >= 5
    assert resumed.folder.name == two.folder.name
    assert files(resumed) == files(two)
    left = [total for _, total in listener.stages]
    assert left[0] < len(listener.steps) <= left[0] + kills
    assert left == sorted(left, reverse=True)


def test_what_is_finished_is_returned_at_once(
    monkeypatch: pytest.MonkeyPatch, run: Calibrate, two: Statistics, tmp_path: Path
) -> None:
    shutil.copytree(two.folder, tmp_path / two.folder.name)
    monkeypatch.setattr(Component, "load", lambda *_: pytest.fail("weights were read"))
    listener = Listener()
    assert run(2, tmp_path, progress=listener).places == two.places
    assert not listener.stages


def test_nothing_but_the_statistics_stays_behind(two: Statistics) -> None:
    pieces = [f"transformer_chunk{i}of3" for i in (1, 2, 3)]
    names = {f"{name}.safetensors" for name in ("text_encoder", "text_encoder_2", "conditioner", "vae_decoder", *pieces)}
    assert files(two).keys() == {*names, "statistics.json", "lock"}


def test_one_piece_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch, run: Calibrate, tmp_path: Path) -> None:
    load, alive, most, loaded = Component.load, weakref.WeakSet[nn.Module](), 0, Counter[str]()

    def counted(component: Component, checkpoint: Checkpoint) -> nn.Module:
        nonlocal most
        module = load(component, checkpoint)
        alive.add(module)
        most = max(most, len(alive))
        loaded[component.name] += 1
        return module

    monkeypatch.setattr(Component, "load", counted)
    run(1, tmp_path)
    assert most == 1
    assert loaded["transformer_chunk2of3"] == 4  # in both steps: forward and back


def test_other_prompts_are_calibrated_anew(run: Calibrate, two: Statistics, tmp_path: Path) -> None:
    assert run(1, tmp_path).folder.name != two.folder.name


def test_what_passes_between_blocks_is_kept_or_computed_again_with_the_same_statistics(
    monkeypatch: pytest.MonkeyPatch, run: Calibrate, two: Statistics, tmp_path: Path
) -> None:
    kept, computed = Listener(), Listener()
    assert files(run(2, tmp_path / "kept", progress=kept)) == files(two)
    monkeypatch.setattr(units, "KEPT", 0)
    assert files(run(2, tmp_path / "computed", progress=computed)) == files(two)
    again = len(computed.steps) - len(kept.steps)
    assert again == sum("transformer" in step and "back" not in step for step in kept.steps) - 2  # but the last of two steps


def test_only_what_the_way_back_asks_for_is_kept(monkeypatch: pytest.MonkeyPatch, run: Calibrate, tmp_path: Path) -> None:
    """At the turn: no states between blocks, but what encoders, conditioner and steps gave."""
    monkeypatch.setattr(units, "KEPT", 0)

    class Stopping(Listener):
        def step(self, detail: str) -> None:
            if detail.endswith("back"):
                raise Killed

    with pytest.raises(Killed):
        run(2, tmp_path, progress=Stopping())
    (work,) = tmp_path.glob("*/work")
    kept = {path.name for path in work.iterdir()} - {"done"}
    encoded = {f"text_encoder{suffix}.{name}" for suffix in ("", "_2") for name in ("hidden_states", "pooled")}
    made = {"conditioner.encoder_hidden_states", "conditioner.modulation", "image", "latent.1", "latent.2"}
    assert kept == encoded | made | {"step0.velocity", "step1.velocity"}


class Refused(NamedTuple):
    images: dict[str, np.ndarray] | bytes
    said: str


LATENTS = np.zeros((2, 4, 8, 12), np.float32)


@pytest.mark.parametrize(
    "case",
    [
        Refused(b"not safetensors", "cannot be read as safetensors"),
        Refused({"pixels": LATENTS}, "has no tensor latents; it holds pixels"),
        Refused({"latents": LATENTS[:1]}, r"latents is \[1, 4, 8, 12\]; expected \[2, 4, 8, 12\]: one latent a prompt"),
        Refused({"latents": LATENTS[..., :8]}, r"latents is \[2, 4, 8, 8\]; expected \[2, 4, 8, 12\]"),
        Refused({"latents": np.full_like(LATENTS, np.inf)}, "holds NaN or infinite values"),
    ],
    ids=lambda case: case.said[:20],
)
def test_images_that_do_not_fit_are_one_line(case: Refused, run: Calibrate, tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    if isinstance(case.images, bytes):
        path.write_bytes(case.images)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in case.images.items()}, path)
    with pytest.raises(UserError, match=case.said) as error:
        run(2, tmp_path, images=path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["mps", "tpu"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str, run: Calibrate, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--calibration-device {device} is not available on this computer; choose from .*cpu"):
        run(1, tmp_path, device=device)


def test_a_cache_that_cannot_be_written_is_one_line(run: Calibrate, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"cannot write .*Not a directory; .*{CACHE}"):
        run(1, tmp_path / "file")


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, run: Calibrate, two: Statistics, tmp_path: Path
) -> None:
    writes, append = 0, Writer.append

    def full(writer: Writer, array: np.ndarray) -> None:
        nonlocal writes
        writes += 1
        if writes > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(writer, array)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "append", full)
        with pytest.raises(UserError, match=rf"cannot write .*No space left on device; free some room .*{CACHE}"):
            run(2, tmp_path)
    listener = Listener()
    assert files(run(2, tmp_path, progress=listener)) == files(two)
    assert not listener.steps[0].startswith("text_encoder:")


def test_too_little_room_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, run: Calibrate, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    listener = Listener()
    with pytest.raises(UserError, match=r"GB of activations in .*, where 0\.0 GB are free"):
        run(1, tmp_path, progress=listener)
    assert not listener.steps


def test_two_processes_do_not_calibrate_the_same(run: Calibrate, two: Statistics, tmp_path: Path) -> None:
    with locked(tmp_path / two.folder.name), pytest.raises(UserError, match="another process calibrates the same now"):
        run(2, tmp_path)


def test_the_cache_is_the_users_own_or_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    assert default_cache() == Path.home() / ".cache" / "export-flash" / "calibration"
    monkeypatch.setenv(CACHE, str(tmp_path))
    assert default_cache() == tmp_path / "calibration"

"""The whole way to an Android phone and back, with stand-ins: a script called `adb` that runs the phone's shell scripts here,
in a folder of its own, and a script in the place of onnxruntime_perf_test. No phone has been measured by these tests."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from export.checkpoint import open_checkpoint
from export.families.family import GraphOptions
from runtimes.bundle import load_manifest
from runtimes.harness.latency import WARM_UP, open_bundle
from runtimes.harness.on_device import adb
from runtimes.harness.on_device.android import Android, _Phone
from runtimes.harness.on_device.device import Asked, DeviceError, artifact_inputs
from runtimes.harness.on_device.registry import connect
from runtimes.harness.on_device.runners import ExecutorRunner
from runtimes.harness.results import Result, parse_result
from tests.models import TinyModel, write_checkpoint
from tests.onnx_bundles import write_onnx_bundle
from tests.runtimes.harness.test_latency import Heard
from tests.runtimes.harness.test_on_device import BATTERY, EXECUTOR_RUNNER, PROPERTIES, THERMAL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for a phone's shell is Linux's")

ADB = """\
import os, shutil, sys
home, arguments = os.environ["STAND_IN_PHONE"], sys.argv[1:]
def here(text):
    return text.replace("/data/local/tmp", home + "/tmp")
if arguments == ["devices", "-l"]:
    print("List of devices attached")
    print("FAKE123                device product:a model:Stand_in device:a transport_id:1")
    sys.exit()
assert arguments[:2] == ["-s", "FAKE123"], arguments
verb, *rest = arguments[2:]
if verb == "push":
    for file in rest[:-1]:
        shutil.copy(file, here(rest[-1]))
elif os.path.exists(home + "/unplugged"):
    sys.exit("error: device 'FAKE123' not found")
else:
    path = home + "/bin:" + os.environ["PATH"]
    os.execvpe("sh", ["sh", "-c", here(rest[0])], os.environ | {"PATH": path})
"""
PERF_TEST = """\
import os, sys, time
mode = os.environ.get("STAND_IN_RUNNER", "")
if mode == "fail":
    sys.exit("onnxruntime::Model: kernel not found")
if mode == "hang":
    time.sleep(600)
*_, model, result = sys.argv
options = dict(zip(sys.argv[1:-2], sys.argv[2:-1]))
assert os.path.exists(model) and os.path.exists(os.path.dirname(model) + "/test_data_set_0/input_0.pb"), os.getcwd()
print("Session creation time cost: 0.25 s\\nFirst inference time cost: 196 ms")
with open(result, "a") as file:
    for number in range(int(options["-r"] if options["-m"] == "times" else options["-t"])):
        file.write(f"model,{(number + 1) / 100},{1 << 20},48,{number}\\n")
"""


def script(path: Path, text: str, interpreter: str = sys.executable) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two components; the transformer is in two chunks, its weights beside its graph."""
    model = TinyModel(layers=2, dual_layers=(0,), text_layers=2, sample_size=8)
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("models") / "smallest", model)))
    folder = tmp_path_factory.mktemp("bundles") / "android"
    options = GraphOptions(64, 64, (1.0, 0.5, 0.0), chunks=2)
    write_onnx_bundle(folder, checkpoint, options, only=["text_encoder", "transformer"], external=["transformer"])
    return folder


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands in for a phone; adb is on PATH."""
    home = tmp_path / "phone"
    (home / "tmp").mkdir(parents=True)
    script(tmp_path / "path" / "adb", ADB)
    script(home / "bin" / "getprop", f"cat <<'END'\n{PROPERTIES}END\n", "/bin/sh")
    dumps = f"case $1 in battery) cat <<'END'\n{BATTERY}END\n;; *) cat <<'END'\n{THERMAL}END\n;; esac\n"
    script(home / "bin" / "dumpsys", dumps, "/bin/sh")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_PHONE", str(home))
    monkeypatch.delenv(adb.SERIAL, raising=False)
    return home


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    program = script(tmp_path / "build" / "onnxruntime_perf_test", PERF_TEST)
    (program.parent / "libonnxruntime.so").write_bytes(b"")
    return program


def measure(bundle: Path, runner: Path, asked: Asked) -> tuple[Result, Heard]:
    device, heard = connect("android", runner), Heard()
    opened = open_bundle(bundle, device.runtime)
    device.check(opened, asked)
    return device.measure(opened, asked, heard), heard


def test_every_component_is_pushed_run_collected_and_removed(bundle: Path, phone: Path, runner: Path) -> None:
    result, heard = measure(bundle, runner, Asked(threads=2, iterations=5))
    assert [row.name for row in result.rows] == ["text_encoder", "transformer"]
    text, transformer = result.rows
    assert text.latency.samples == pytest.approx([(WARM_UP + number) / 100 for number in range(1, 6)])
    assert text.warm_up == pytest.approx((0.196, 0.01, 0.02, 0.03)) and text.model_load_time.first == 0.25
    assert transformer.latency.p50 == pytest.approx(2 * text.latency.p50)  # the sum of both chunks
    assert transformer.model_load_time.warm == 0.5
    assert text.memory is not None and (text.memory.baseline_resident, text.memory.peak_resident) == (None, 1 << 20)
    assert not result.host and result.benchmark_model.digest == load_manifest(bundle).digest
    facts = result.environment_info
    assert (facts.platform, facts.device, facts.chip) == ("android", "samsung SM-A526B", "QTI SM7225")
    assert facts.os == "Android 14 (UP1A.231005.007)" and facts.cores and facts.total_mem
    assert result.conditions is not None and result.conditions.after.thermal_status == "light"
    assert result.backend_settings.framework_version.startswith("of onnxruntime_perf_test ")
    assert parse_result(result.to_json(), "x") == result
    assert [total for _, total in heard.stages] == [len(steps) for steps in heard.steps] == [3, 6]
    assert [*(phone / "tmp").iterdir()] == []


def test_chunk_after_the_first_takes_what_the_first_gives(bundle: Path) -> None:
    opened = open_bundle(bundle)
    first, second = artifact_inputs(opened, opened.components[1])
    given = {tensor.name for tensor in opened.components[1].inputs}
    assert set(first) <= given and not set(second) <= given
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in opened.components[1].artifacts[1].inputs}
    assert {name: (str(array.dtype), array.shape) for name, array in second.items()} == wanted


def test_sustained_run_is_of_one_artifact(bundle: Path, phone: Path, runner: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="transformer is in 2 pieces, and onnxruntime_perf_test runs one alone"):
        measure(bundle, runner, Asked(None, 1, sustained=4))
    model = TinyModel(layers=2, dual_layers=(0,), text_layers=2, sample_size=8)
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "model", model)))
    write_onnx_bundle(tmp_path / "one", checkpoint, GraphOptions(64, 64, (1.0, 0.0)), only=["text_encoder"])
    result, _ = measure(tmp_path / "one", runner, Asked(None, 1, sustained=4))
    assert result.sustained is not None and result.sustained.latency.measured_samples == 4
    assert (result.sustained.name, result.sustained.first, result.sustained.last) == ("text_encoder", 0.01, 0.04)


def test_failure_says_why_and_leaves_nothing(
    bundle: Path, phone: Path, runner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_RUNNER", "fail")
    with pytest.raises(DeviceError, match="onnxruntime_perf_test failed on FAKE123: onnxruntime::Model: kernel not") as caught:
        measure(bundle, runner, Asked(None, 1))
    assert "\n" not in str(caught.value) and [*(phone / "tmp").iterdir()] == []


def test_phone_that_is_unplugged_is_named_with_what_it_may_keep(bundle: Path, phone: Path, runner: Path) -> None:
    class Unplugging(Heard):
        def step(self, detail: str) -> None:
            (phone / "unplugged").touch()

    device = connect("android", runner)
    with pytest.raises(DeviceError, match=r"'FAKE123' not found; /data/local/tmp/export-flash/\w+ may be left on FAKE123"):
        device.measure(open_bundle(bundle, device.runtime), Asked(None, 1), Unplugging())


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ctrl_c_ends_what_runs_on_the_phone_and_leaves_nothing(bundle: Path, phone: Path, runner: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom runtimes.harness.latency import open_bundle\n"
        "from runtimes.harness.on_device.device import Asked\nfrom runtimes.harness.on_device.registry import connect\n"
        "class Deaf:\n    def stage(self, name, total): pass\n    def step(self, detail): pass\n"
        "device = connect('android', Path(sys.argv[2]))\n"
        "device.measure(open_bundle(Path(sys.argv[1]), device.runtime), Asked(None, 1), Deaf())\n"
    )
    environ = os.environ | {"STAND_IN_RUNNER": "hang", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, "-c", code, str(bundle), str(runner)]
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    number = phone / "tmp" / "export-flash" / load_manifest(bundle).digest / "pid"
    try:
        wait_for(lambda: process.poll() is not None or (number.exists() and number.read_text().endswith("\n")))
        assert process.poll() is None, process.communicate()[1]
        running = int(number.read_text())
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to adb as well
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
        wait_for(lambda: not Path(f"/proc/{running}").exists())
        assert [*(phone / "tmp").iterdir()] == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_executor_runner_is_heard_through_logcat(phone: Path, tmp_path: Path) -> None:
    program = script(tmp_path / "build" / "executor_runner", "exit 0\n", "/bin/sh")
    lines = "\n".join(line.partition("] ")[2] for line in EXECUTOR_RUNNER.splitlines())
    script(phone / "bin" / "logcat", f'echo "$@" > {phone}/asked\ncat <<\'END\'\n{lines}\nEND\n', "/bin/sh")
    device = adb.Adb("adb", "FAKE123")
    opened = asked = heard = None
    measured = _Phone(device, ExecutorRunner(), program, "/data/local/tmp/here", opened, asked, heard)  # type: ignore[arg-type]
    device.shell("mkdir -p /data/local/tmp/here")
    measured.push_program()
    assert measured._run(["--num_executions=3"]).samples == pytest.approx((0.05125, 0.048, 0.0495))
    words = (phone / "asked").read_text().split()
    assert words[:3] == ["-d", "-v", "raw"] and words[3].startswith("--pid=") and words[4:] == ["ExecuTorch:I", "*:S"]
    assert not (phone / "tmp" / "here" / "pid").exists()


def test_phone_without_a_program_and_program_that_is_not_there(phone: Path, runner: Path) -> None:
    assert isinstance(connect("android:FAKE123", runner), Android)
    with pytest.raises(DeviceError, match=r"FAKE123 \(Stand_in\) needs a program that runs artifacts: give --runner"):
        connect("android")
    with pytest.raises(DeviceError, match="--runner nowhere/executor_runner is no file"):
        connect("android", Path("nowhere/executor_runner"))

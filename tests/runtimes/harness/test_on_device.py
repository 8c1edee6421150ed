"""Devices as far as they go without one: parsers on the tools' real formats, compute plans, refusals. No phone was measured.

The texts are what real tools print: `adb devices -l` of adb 29 and 35, `dumpsys thermalservice` of a Galaxy A52 5G,
`dumpsys battery`, the log of ExecuTorch's executor_runner, the output of onnxruntime_perf_test.
"""

from __future__ import annotations

import inspect
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from coremltools.models import compute_device, compute_plan
from coremltools.models.ml_program.experimental import compute_plan_utils, perf_utils, remote_device
from onnx import TensorProto, numpy_helper
from rich.console import Console

from runtimes.bundle import BundleError
from runtimes.harness.on_device import adb, iphone
from runtimes.harness.on_device.android import check_program
from runtimes.harness.on_device.device import Asked, DeviceError
from runtimes.harness.on_device.placement import place
from runtimes.harness.on_device.registry import connect
from runtimes.harness.on_device.runners import ExecutorRunner, PerfTest, choose_runner
from runtimes.harness.on_device.tables import notes, placement_table
from runtimes.harness.results import Condition, Conditions, Sustained
from tests.runtimes.harness.test_results import result_of

DEVICES = """\
List of devices attached
R5CR30ABCDE            device usb:1-1 product:a52xqxx model:SM_A526B device:a52xq transport_id:1
192.168.1.20:5555      device product:oriole model:Pixel_6 device:oriole transport_id:7
emulator-5554          offline transport_id:2
0A041FDD4003B1         unauthorized usb:1-2 transport_id:3
99231FFAZ00ABC         no permissions (user in plugdev group; are your udev rules wrong?); see \
[http://developer.android.com/tools/device.html] usb:1-3 transport_id:4

"""
THERMAL = """\
IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 1
Thermal Status: 1
Cached temperatures:
\tTemperature{mValue=99.0, mType=0, mName=AP, mStatus=3}
HAL Ready: true
HAL connection:
\tThermalHAL 2.0 connected: yes
Current temperatures from HAL:
\tTemperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
\tTemperature{mValue=23.8, mType=2, mName=BAT, mStatus=0}
\tTemperature{mValue=0.0, mType=2, mName=SUBBAT, mStatus=0}
\tTemperature{mValue=4200.0, mType=6, mName=vbat, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=88, mType=5, mName=tpu_cooling}
Temperature static thresholds from HAL:
\tTemperatureThreshold{mType=0, mName=AP, mHotThrottlingThresholds=[NaN, 76.0, NaN, NaN, NaN, NaN, 115.0]}
"""
BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Dock powered: false
  Max charging current: 500000
  Max charging voltage: 5000000
  Charge counter: 2848000
  status: 2
  health: 2
  present: true
  level: 54
  scale: 100
  voltage: 3906
  temperature: 221
  technology: Li-ion
"""
PROPERTIES = """\
[ro.board.platform]: [lahaina]
[ro.build.id]: [UP1A.231005.007]
[ro.build.version.release]: [14]
[ro.product.cpu.abi]: [arm64-v8a]
[ro.product.manufacturer]: [samsung]
[ro.product.model]: [SM-A526B]
[ro.soc.manufacturer]: [QTI]
[ro.soc.model]: [SM7225]
"""
EXECUTOR_RUNNER = """\
I 00:00:00.000612 executorch:executor_runner.cpp:401] Resetting threadpool with num threads = 4
I 00:00:00.020101 executorch:executor_runner.cpp:512] Model file transformer.pte is loaded.
I 00:00:00.110000 executorch:executor_runner.cpp:640] Model loaded in 89.500000 ms.
I 00:00:00.210000 executorch:executor_runner.cpp:811] Iteration 1 of 3: 51.250000 ms
I 00:00:00.260000 executorch:executor_runner.cpp:811] Iteration 2 of 3: 48.000000 ms
I 00:00:00.310000 executorch:executor_runner.cpp:811] Iteration 3 of 3: 49.500000 ms
I 00:00:00.310001 executorch:executor_runner.cpp:820] Model executed successfully 3 time(s) in 148.750000 ms.
"""
PERF_TEST = """\
Setting intra_op_num_threads to 4
Session creation time cost: 0.217932 s
First inference time cost: 196 ms
Total inference time cost: 0.2983 s
Total inference requests: 3
Average inference time cost: 99.4333 ms
Total inference run time: 0.29835 s
Number of inferences per second: 10.0553
Avg CPU usage: 48 %
Peak working set size: 271122432 bytes
"""
PERF_FILE = "transformer,0.0995086,271122432,48,0\ntransformer,0.101519,271122432,48,1\ntransformer,0.0972724,271122432,48,2\n"


def test_attached_devices_are_read_with_state_and_model() -> None:
    found = adb.parse_devices(DEVICES)
    assert [(device.serial, device.state, device.model) for device in found] == [
        ("R5CR30ABCDE", "device", "SM_A526B"),
        ("192.168.1.20:5555", "device", "Pixel_6"),
        ("emulator-5554", "offline", None),
        ("0A041FDD4003B1", "unauthorized", None),
        ("99231FFAZ00ABC", "no permissions", None),
    ]
    assert adb.parse_devices("List of devices attached\n\n") == ()


@pytest.mark.parametrize(
    ("lines", "wanted", "complaint"),
    [
        ([], None, "no device is attached"),
        ([1, 2], None, r"2 devices are attached; choose one with android:SERIAL: R5CR30ABCDE \(SM_A526B\), 192.168.1.20:5555"),
        ([3], None, "emulator-5554: offline; unplug it"),
        ([4], None, "0A041FDD4003B1: unauthorized; allow this computer in the dialog"),
        ([5], None, "99231FFAZ00ABC: no permissions; let your user open it"),
        ([1], "nosuch", r"android:nosuch is not attached; adb sees R5CR30ABCDE \(SM_A526B\)"),
        ([1, 4], "0A041FDD4003B1", "0A041FDD4003B1: unauthorized"),
    ],
)
def test_device_that_cannot_be_chosen_is_one_line(
    lines: list[int], wanted: str | None, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(adb.SERIAL, raising=False)
    text = DEVICES.splitlines()
    with pytest.raises(DeviceError, match=complaint) as caught:
        adb.choose(adb.parse_devices("\n".join([text[0], *(text[number] for number in lines)])), wanted)
    assert "\n" not in str(caught.value)


def test_serial_of_the_option_goes_before_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(adb.SERIAL, "R5CR30ABCDE")
    devices = adb.parse_devices(DEVICES)
    assert adb.choose(devices, None).serial == "R5CR30ABCDE"
    assert adb.choose(devices, "192.168.1.20:5555").serial == "192.168.1.20:5555"
    monkeypatch.setenv(adb.SERIAL, "other")
    with pytest.raises(DeviceError, match="ANDROID_SERIAL=other is not attached"):
        adb.choose(devices, None)
    monkeypatch.delenv(adb.SERIAL)
    assert adb.choose([devices[0], devices[2]], None).serial == "R5CR30ABCDE"  # the only one that can be used


def test_heat_and_charge_are_those_of_now() -> None:
    condition = adb.parse_condition(THERMAL, BATTERY)
    assert condition.thermal_status == "light" and condition.temperatures == {"AP": 25.6, "BAT": 23.8}
    assert (condition.battery_level, condition.battery_temperature, condition.powered) == (0.54, 22.1, True)
    nothing = adb.parse_condition("Can't find service: thermalservice\n", "")
    assert nothing == Condition(
        thermal_status=None, temperatures={}, battery_level=None, battery_temperature=None, powered=None
    )


def test_facts_of_a_phone() -> None:
    properties = adb.parse_properties(PROPERTIES.replace("\n", "\r\n"))
    assert adb.name_device(properties) == ("samsung SM-A526B", "QTI SM7225", "Android 14 (UP1A.231005.007)")
    old = {key: value for key, value in properties.items() if not key.startswith("ro.soc")}
    assert adb.name_device(old)[1] == "lahaina" and adb.name_device({})[1] is None
    assert adb.parse_memory("MemTotal:        5637152 kB\nMemFree: 1 kB\n") == 5637152 * 1024
    assert [adb.parse_cores(text) for text in ("0-7\n", "0-3,6\n", "0\n", "no such file")] == [8, 5, 1, None]


def test_runs_of_executor_runner_are_read_from_stderr_and_from_logcat() -> None:
    run = ExecutorRunner().parse(EXECUTOR_RUNNER, "")
    assert run.load == pytest.approx(0.0895) and run.samples == pytest.approx((0.05125, 0.048, 0.0495)) and run.peak is None
    raw = "\n".join(line.partition("] ")[2] for line in EXECUTOR_RUNNER.splitlines())
    assert ExecutorRunner().parse(f"--------- beginning of main\n{raw}\n", "") == run


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("", r'told no time of a run: .* "Iteration 1 of N: ... ms"$'),
        ("Model executed successfully 3 time(s) in 148.75 ms.\n", "told no time of a run: .*; its last words: Model executed"),
        (EXECUTOR_RUNNER.replace("Iteration 2 of 3", "x"), "has 2 of 3 runs, the phone dropped some"),
        (EXECUTOR_RUNNER.replace("Model loaded in", "x"), "no time of loading"),
    ],
)
def test_log_that_lacks_something_is_refused_by_name(said: str, complaint: str) -> None:
    with pytest.raises(DeviceError, match=complaint):
        ExecutorRunner().parse(said, "")


def test_runs_of_perf_test_are_read() -> None:
    run = PerfTest().parse(PERF_TEST, PERF_FILE)
    assert (run.load, run.before, run.peak) == (0.217932, (0.196,), 271122432)
    assert run.samples == (0.0995086, 0.101519, 0.0972724)
    with pytest.raises(DeviceError, match="told no times; its last words: there is no test data for model x"):
        PerfTest().parse("there is no test data for model x\n", "")


def test_runners_are_called_as_their_sources_say() -> None:
    assert ExecutorRunner().arguments("a.pte", ("x.bin", "y.bin"), 4, 33) == (
        "--model_path=a.pte", "--inputs=x.bin,y.bin", "--method_name=forward", "--num_executions=33", "--cpu_threads=4",
    )  # fmt: skip
    assert "--num_executions=200" in ExecutorRunner().lasting("a.pte", (), None, 0.3, 60)
    assert PerfTest().arguments("a/model.onnx", (), 4, 33) == (
        "-e", "cpu", "-o", "99", "-A", "-m", "times", "-r", "33", "-x", "4", "-y", "1", "a/model.onnx", "result.csv",
    )  # fmt: skip
    assert PerfTest().lasting("a/model.onnx", (), None, 0.3, 59.5)[5:9] == ("-m", "duration", "-t", "60")


def test_inputs_are_written_as_the_runners_read_them(tmp_path: Path) -> None:
    inputs = {"ids": np.arange(3, dtype=np.int64)[None], "x": np.ones((1, 2), np.float32)}
    names = ExecutorRunner().write_inputs(inputs, tmp_path, "a.pte")
    assert [(tmp_path / name).read_bytes() for name in names] == [array.tobytes() for array in inputs.values()]
    names = PerfTest().write_inputs(inputs, tmp_path, "text_encoder/model.onnx")
    assert names[1] == "text_encoder/test_data_set_0/input_1.pb"
    read = TensorProto.FromString((tmp_path / names[0]).read_bytes())
    assert read.name == "ids" and np.array_equal(numpy_helper.to_array(read), inputs["ids"])


def test_program_is_known_by_its_name_or_by_the_runtime() -> None:
    assert choose_runner(Path("executor_runner_vulkan"), None).runtime == "executorch"
    assert choose_runner(Path("my_tool"), "onnxruntime").name == "onnxruntime_perf_test"
    with pytest.raises(DeviceError, match="my_tool is not called executor_runner or onnxruntime_perf_test"):
        choose_runner(Path("my_tool"), None)
    with pytest.raises(DeviceError, match="--runtime coreml has no program for Android"):
        choose_runner(Path("executor_runner"), "coreml")


def test_program_of_another_processor_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "executor_runner"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + (62).to_bytes(2, "little"))
    check_program(program, "x86_64")
    with pytest.raises(DeviceError, match="was built for x86_64, and the phone is arm64-v8a"):
        check_program(program, "arm64-v8a")
    program.write_bytes(b"MZ")
    with pytest.raises(DeviceError, match="it is no ELF file"):
        check_program(program, "arm64-v8a")


@pytest.mark.skipif(sys.platform == "darwin", reason="there they may be measured")
@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("mac", "Core ML itself, which only macOS has, and this is linux"),
        ("mac:mine", "only this one can be measured"),
        ("iphone", r"needs macOS with Xcode.*this is linux.*--import FILE"),
        ("watch", "--device watch does not exist; choose from mac, iphone, android, or iphone:NAME, android:SERIAL"),
    ],
)
def test_devices_that_cannot_be_here_are_one_line(device: str, complaint: str) -> None:
    with pytest.raises(DeviceError, match=complaint) as caught:
        connect(device)
    assert "\n" not in str(caught.value)


def test_android_without_adb_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="needs adb, which is not on PATH"):
        connect("android")


def test_sustained_time_is_a_time() -> None:
    for seconds in (0.0, -1.0, float("nan"), 1e6):
        with pytest.raises(BundleError, match="is not a time to run for"):
            Asked(None, 1, seconds)


@dataclass
class Plan:
    """What `MLComputePlan` answers, of coremltools' own classes."""

    model_structure: Any
    answers: dict[int, tuple[Any, Any]]

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        return self.answers[id(operation)][0]

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        return self.answers[id(operation)][1]


def plan_of(*operations: tuple[str, type | None, float | None]) -> Plan:
    """A plan of (operator, compute device's class, cost); the last operation lies in a block of the one before."""
    made, answers = [], {}
    for name, kind, cost in operations:
        operation = compute_plan.MLModelStructureProgramOperation({}, name, [], [], None)
        made.append(operation)
        unit = None if kind is None else kind.__new__(kind)
        usage = None if unit is None else compute_plan.MLComputePlanDeviceUsage(unit, [unit])
        answers[id(operation)] = (usage, None if cost is None else compute_plan.MLComputePlanCost(cost))
    made[-2].blocks.append(compute_plan.MLModelStructureProgramBlock([], [made[-1]], []))
    block = compute_plan.MLModelStructureProgramBlock([], made[:-1], [])
    program = compute_plan.MLModelStructureProgram({"main": compute_plan.MLModelStructureProgramFunction([], block)})
    return Plan(compute_plan.MLModelStructure(None, program, None), answers)


NE, CPU = compute_device.MLNeuralEngineComputeDevice, compute_device.MLCPUComputeDevice
LINEAR = (("const", None, None), ("ios18.linear", NE, 0.5), ("ios18.linear", NE, 0.3))
MOSTLY = (*LINEAR, ("cond", CPU, 0.0), ("ios18.gather", CPU, 0.2))
HARDLY = (("ios18.linear", CPU, 0.7), ("cond", None, 0.1), ("ios18.softmax", NE, 0.2))


def test_plan_is_summed_by_operator_and_unit() -> None:
    placed = place(plan_of(*MOSTLY), "transformer", "transformer.mlpackage", "CPU_AND_NE")
    assert placed.cost == pytest.approx({"neural_engine": 0.8, "cpu": 0.2}) and placed.warning is None
    found = [(each.operator, each.unit, each.count, each.cost) for each in placed.operations]
    assert found == [("linear", "neural_engine", 2, 0.8), ("gather", "cpu", 1, 0.2), ("cond", "cpu", 1, 0.0)]


def test_neural_engine_that_was_asked_for_and_hardly_runs_is_a_warning() -> None:
    plan = plan_of(*HARDLY)
    warned = place(plan, "transformer", "transformer.mlpackage", "CPU_AND_NE")
    assert warned.warning == "the Neural Engine was asked for, and is to run 20% of the estimated cost"
    assert warned.cost["unknown"] == pytest.approx(0.1)
    assert place(plan, "transformer", "transformer.mlpackage", "ALL").warning is None
    silent = place(plan_of(("linear", NE, None), ("x", NE, None)), "a", "b", "CPU_AND_NE")
    assert silent.warning == "the Neural Engine was asked for, and the plan gives no cost to tell by"
    with pytest.raises(DeviceError, match="no ML program"):
        place(Plan(compute_plan.MLModelStructure(None, None, None), {}), "a", "b", "ALL")


def test_interface_of_coremltools_is_the_one_that_is_called() -> None:
    def names(function: Any) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    benchmarker = perf_utils.MLModelBenchmarker
    assert names(benchmarker.__init__) == ["model", "device"]
    assert names(benchmarker.benchmark_load) == ["iterations"]
    assert names(benchmarker.benchmark_predict) == ["inputs", "iterations", "warmup"]
    assert benchmarker.Measurement.from_samples([2.0]).samples == [2.0]
    assert names(remote_device.Device.prepare_for_model_debugging) == ["credentials", "working_directory", "clean"]
    assert names(remote_device.Device.get_connected_devices) == ["device_type"]
    assert names(compute_plan_utils.load_compute_plan_from_path_on_device) == ["path", "compute_units", "device"]
    assert names(compute_plan.MLComputePlan.load_from_path) == ["path", "compute_units"]
    fields = {"name", "identifier", "udid", "os_version", "os_build_number", "developer_mode_state", "session"}
    assert fields <= set(remote_device.Device.__dataclass_fields__)
    credentials = remote_device.AppSigningCredentials(**iphone.signature({"DEVELOPMENT_TEAM": "ABCDE12345"}))
    assert (credentials.development_team, credentials.provisioning_profile_uuid) == ("ABCDE12345", None)


def phone(name: str, mode: str = "enabled") -> SimpleNamespace:
    return SimpleNamespace(name=name, identifier=f"id of {name}", udid=f"udid of {name}", developer_mode_state=mode)


def test_iphone_is_chosen_or_refused_in_one_line() -> None:
    first, second = phone("Ann's iPhone"), phone("iPhone 2")
    assert iphone.choose([first], None) is first and iphone.choose([first, second], "udid of iPhone 2") is second
    refusals: list[tuple[list[SimpleNamespace], str | None, str]] = [
        ([], None, r"no iPhone is connected; .*--import FILE"),
        ([first, second], None, "2 are connected; choose one with iphone:NAME: Ann's iPhone, iPhone 2"),
        ([first], "mine", "iphone:mine is not connected; there is Ann's iPhone"),
        ([phone("x", "disabled")], None, "x is not in developer mode"),
    ]
    for connected, which, complaint in refusals:
        with pytest.raises(DeviceError, match=complaint):
            iphone.choose(connected, which)
    for environ, complaint in (({}, "set DEVELOPMENT_TEAM"), ({"PROVISIONING_PROFILE": "x"}, r"needs the PRODUCT_BUNDLE")):
        with pytest.raises(DeviceError, match=complaint):
            iphone.signature(environ)


def test_hardware_of_an_iphone_is_read_from_devicectl() -> None:
    hardware = {
        "cpuType": {"name": "arm64e"}, "deviceType": "iPhone", "marketingName": "iPhone 15 Pro", "productType": "iPhone16,1",
        "udid": "00008130-000A",
    }  # fmt: skip
    text = json.dumps({"info": {}, "result": {"devices": [{"hardwareProperties": hardware}]}})
    assert iphone.parse_hardware(text, "00008130-000A") == iphone.Hardware("iPhone 15 Pro (iPhone16,1)", "arm64e")
    with pytest.raises(DeviceError, match="devicectl does not list x"):
        iphone.parse_hardware(text, "x")


def test_sustained_run_compares_its_quarters() -> None:
    run = Sustained.of("transformer", 60, [1.0, 1.0, 1.2, 1.4, 1.5, 1.5, 2.0, 3.0])
    assert (run.first, run.last, run.trend) == (1.0, 2.5, 2.5)
    assert Sustained.model_validate_json(run.model_dump_json()) == run
    with pytest.raises(ValueError, match=r"last is 1\.0, but that of the samples is 2\.5"):
        Sustained.model_validate(run.model_dump() | {"last": 1.0})


def test_all_of_it_is_shown_at_80_columns() -> None:
    condition = adb.parse_condition(THERMAL, BATTERY)
    placements = (
        place(plan_of(*MOSTLY), "text_encoder_2", "text_encoder_2.mlpackage", "CPU_AND_NE"),
        place(plan_of(*HARDLY), "transformer", "transformer.mlpackage", "CPU_AND_NE"),
    )
    found = {
        "conditions": Conditions(before=condition, after=condition),
        "sustained": Sustained.of("transformer", 60, [1.0, 2.0]),
        "placements": placements,
    }
    result = result_of(host=False).model_copy(update=found)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(placement_table(placements))
    assert "…" not in console.export_text()
    assert [*notes(result)] == [
        "warning: transformer.mlpackage: the Neural Engine was asked for, and is to run 20% of the estimated cost",
        "before: thermal status light, warmest AP at 25.6 °C, battery 54% at 22.1 °C, on a charger",
        "after: thermal status light, warmest AP at 25.6 °C, battery 54% at 22.1 °C, on a charger",
        "transformer for 60 s: 2 runs, 1000 ms at first and 2000 ms at last (medians of a quarter), 2.00 times",
    ]

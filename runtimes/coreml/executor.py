"""Executes an ML program with torch on the CPU, operation by operation.

What is modelled
- A value that the program declares float16 is a float16 tensor between operations: every operation rounds its result once,
  to nearest even, and what lies beyond 65504 becomes infinity, as on a device.
- Inside an operation everything is computed and accumulated in float32 (a matrix product, a norm, a softmax, a fused
  attention, a mean), and only its result is rounded. Sums have torch's order.
- Operations that the program keeps apart are rounded apart: attention written as matmul, softmax, matmul has float16 logits.
- Float32 values stay float32. Compressed weights are decompressed exactly, then rounded to the declared type.

What is not: a device's own fusions, its lower-precision accumulations (the Neural Engine adds float16 products in ways that
are not documented), and flushing of subnormal numbers. So the executor tells a wrong graph from a right one, and shows where
float16's range ends; the last bits of a result are the device's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtimes.coreml.compressed import CONSTANT_EXPRESSIONS
from runtimes.coreml.constants import Constant, Stored, WeightCache, constants_of, to_tensor
from runtimes.coreml.datatypes import STRING
from runtimes.coreml.operations import OPERATIONS, Implementation, Parameter
from runtimes.coreml.package import open_package
from runtimes.coreml.program import UNKNOWN, Block, Literal, Named, Operation, Source, all_operations, read_program
from runtimes.coreml.ranges import ValueRange, measure
from runtimes.graph import GraphError, TensorSpec, check_inputs

DEFAULT_MEMORY_LIMIT = 2 << 30

_CONTROL_FLOW = ("cond", "while_loop")


@dataclass(frozen=True)
class Intermediate:
    """One value computed on the way: the operation's type, the value's name in the program, and the value itself."""

    operation: str
    name: str
    value: np.ndarray


@dataclass(frozen=True)
class _Computed:
    """A result as stored, and as it was before it was rounded to the declared type."""

    operation: Operation
    output: Named
    value: Tensor
    exact: Tensor


@dataclass(frozen=True)
class _Feed:
    """A parameter that gets its value while the program runs."""

    name: str
    parameter: Parameter
    sources: tuple[str | Constant, ...]


@dataclass(frozen=True)
class _Step:
    """An operation with everything decided that is known before a run. `last_uses` are freed after it."""

    operation: Operation
    implementation: Implementation | None  # None for control flow
    fixed: dict[str, Any]
    feeds: tuple[_Feed, ...]
    plans: tuple[_Plan, ...]
    last_uses: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """A block, ready to run. `shared` are the values that several operations take in float32."""

    block: Block
    steps: tuple[_Step, ...]
    constants: Mapping[str, Constant]
    shared: frozenset[str]


class Executor:
    """A loaded package; call it with named arrays (see `runtimes.graph.Graph`).

    Weights stay in the memory-mapped file until they are used. Decompressed and widened ones are kept, up to
    `memory_limit_bytes`. Raises `GraphError` at load for an operation, or an input of one, that is not known.
    """

    def __init__(self, path: Path, memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT) -> None:
        program = read_program(open_package(path))
        self._path = path
        self._weights = WeightCache(memory_limit_bytes)
        self.inputs: tuple[TensorSpec, ...] = program.input_specs
        self.outputs: tuple[TensorSpec, ...] = program.output_specs
        _check_known(path, program.block)
        try:
            self._plan = _plan(program.block, {})
        except GraphError as error:
            raise GraphError(f"{path}: {error}") from error

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = self._input_values(inputs)
        for _ in self._run(self._plan, values, exact=False):
            pass
        return {spec.name: _to_array(self._value(spec.name, values, self._plan), spec.dtype) for spec in self.outputs}

    @property
    def held_bytes(self) -> int:
        """Bytes of decompressed and widened weights now in memory."""
        return self._weights.held_bytes

    @torch.inference_mode()  # as a decorator it covers each step of the generator, not what the caller does between them
    def intermediates(self, inputs: Mapping[str, np.ndarray]) -> Iterator[Intermediate]:
        """Runs the graph and yields every computed value, in the program's order, while it is in memory.

        Values inside a loop come once an iteration.
        """
        for computed in self._run(self._plan, self._input_values(inputs), exact=False):
            assert computed.output.type is not None
            array = _to_array(computed.value, computed.output.type.dtype.name)
            yield Intermediate(computed.operation.type, computed.output.name, array)

    @torch.inference_mode()
    def ranges(self, inputs: Mapping[str, np.ndarray]) -> list[ValueRange]:
        """Runs the graph and reports for every floating-point value how near it comes to float16's range.

        Magnitudes are taken before an operation's result is rounded, so an overflow shows how far beyond the range it lies.
        """
        return [
            measure(computed.operation.type, computed.output.name, computed.exact, computed.value)
            for computed in self._run(self._plan, self._input_values(inputs), exact=True)
            if computed.value.is_floating_point()
        ]

    def _input_values(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        arrays = check_inputs(self.inputs, inputs)
        tensors = {name: torch.from_numpy(array if array.flags.writeable else array.copy()) for name, array in arrays.items()}
        return {name: tensor.int() if tensor.dtype is torch.uint16 else tensor for name, tensor in tensors.items()}

    def _value(self, name: str, values: Mapping[str, Tensor], plan: _Plan) -> Tensor:
        """A block's output, which may be a constant."""
        if name in values:
            return values[name]
        return self._weights.get(plan.constants[name], widen=False)

    def _run(self, plan: _Plan, values: dict[str, Tensor], exact: bool) -> Generator[_Computed, None, None]:
        """Runs a block over `values`, which afterwards holds its outputs; yields each result.

        With `exact`, float16 kernels of torch are avoided, so that every result is there before it is rounded.
        """
        wide: dict[str, Tensor] = {}
        for step in plan.steps:
            if step.implementation is None:
                results = yield from self._control(step, values, exact)
            else:
                results = self._compute(step, step.implementation, plan, values, wide, exact)
            for output, result in zip(step.operation.outputs, results, strict=True):
                value = _stored(step.operation, output, result)
                values[output.name] = value
                yield _Computed(step.operation, output, value, result)
            for name in step.last_uses:
                values.pop(name, None)
                wide.pop(name, None)

    def _compute(
        self,
        step: _Step,
        implementation: Implementation,
        plan: _Plan,
        values: Mapping[str, Tensor],
        wide: dict[str, Tensor],
        exact: bool,
    ) -> tuple[Tensor, ...]:
        widen = exact or not implementation.stored

        def fetch(source: str | Constant) -> Tensor:
            if not isinstance(source, str):
                return self._weights.get(source, widen)
            value = values[source]
            if not widen or value.dtype is not torch.float16:
                return value
            if source not in plan.shared:
                return value.float()
            if source not in wide:
                wide[source] = value.float()
            return wide[source]

        arguments = dict(step.fixed)
        for feed in step.feeds:
            tensors = tuple(fetch(source) for source in feed.sources)
            arguments[feed.name] = _argument(feed.parameter, tensors)
        try:
            results = implementation.function(**arguments)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise GraphError(f"{self._path}: operation {step.operation} failed: {reason}") from error
        return results if isinstance(results, tuple) else (results,)

    def _control(self, step: _Step, values: dict[str, Tensor], exact: bool) -> Generator[_Computed, None, tuple[Tensor, ...]]:
        """`cond` runs one of two blocks; `while_loop` its second as long as the first gives true."""

        def run(plan: _Plan, arguments: tuple[Tensor, ...]) -> Generator[_Computed, None, tuple[Tensor, ...]]:
            scope = values | {each.name: argument for each, argument in zip(plan.block.inputs, arguments, strict=True)}
            yield from self._run(plan, scope, exact)
            return tuple(self._value(name, scope, plan) for name in plan.block.outputs)

        feeds = {feed.name: tuple(self._control_input(source, values) for source in feed.sources) for feed in step.feeds}
        if step.operation.type == "cond":
            (predicate,) = feeds["pred"]
            return (yield from run(step.plans[0 if bool(predicate) else 1], ()))
        state = feeds["loop_vars"]
        while True:
            (proceed,) = yield from run(step.plans[0], state)
            if not bool(proceed):
                return state
            state = yield from run(step.plans[1], state)

    def _control_input(self, source: str | Constant, values: Mapping[str, Tensor]) -> Tensor:
        return values[source] if isinstance(source, str) else self._weights.get(source, widen=False)


def _check_known(path: Path, block: Block) -> None:
    """Raises `GraphError` with every kind of operation that is not known, each with one output as an example."""
    unknown: dict[str, Operation] = {}
    for operation in all_operations(block):
        kind = operation.type
        if kind != "const" and kind not in _CONTROL_FLOW and kind not in OPERATIONS and kind not in CONSTANT_EXPRESSIONS:
            unknown.setdefault(kind, operation)
    if unknown:
        listed = ", ".join(str(operation) for operation in unknown.values())
        raise GraphError(f"{path}: the executor does not know these operations: {listed}")


def _plan(block: Block, outer: Mapping[str, Constant]) -> _Plan:
    """Decides all that does not depend on the inputs. `outer` are the constants of the blocks around this one."""
    constants = dict(outer)
    steps: list[_Step] = []
    for operation in block.operations:
        if operation.type == "const" or operation.type in CONSTANT_EXPRESSIONS:
            constants |= constants_of(operation, constants)
        else:
            steps.append(_step(operation, constants))
    alive = set(block.outputs)
    freed: list[_Step] = []
    uses: Counter[str] = Counter()
    for step in reversed(steps):
        names = _names_used(step) | {each.name for each in step.operation.outputs}
        last_uses = tuple(sorted(names - alive))
        alive |= names
        freed.append(_Step(step.operation, step.implementation, step.fixed, step.feeds, step.plans, last_uses))
        if step.implementation is not None and not step.implementation.stored:
            uses.update({source for feed in step.feeds for source in feed.sources if isinstance(source, str)})
    shared = frozenset(name for name, count in uses.items() if count > 1)
    return _Plan(block, tuple(reversed(freed)), constants, shared)


def _names_used(step: _Step) -> set[str]:
    """Runtime values that the step reads, those that only its inner blocks read included."""
    names = {source for feed in step.feeds for source in feed.sources if isinstance(source, str)}
    for plan in step.plans:
        names |= set(plan.block.outputs)
        for inner in plan.steps:
            names |= _names_used(inner)
    return names


def _step(operation: Operation, constants: Mapping[str, Constant]) -> _Step:
    if operation.type in _CONTROL_FLOW:
        feeds = tuple(
            _Feed(name, Parameter("tensors", True), tuple(_resolve(source, constants) for source in sources))
            for name, sources in operation.inputs.items()
        )
        plans = tuple(_plan(block, constants) for block in operation.blocks)
        return _Step(operation, None, {}, feeds, plans, ())
    implementation = OPERATIONS[operation.type]
    fixed: dict[str, Any] = {}
    feeds = ()
    for name, sources in operation.inputs.items():
        if name not in implementation.parameters:
            raise GraphError(f"operation {operation} has an input {name!r} that this executor does not know")
        parameter = implementation.parameters[name]
        resolved = tuple(_resolve(source, constants) for source in sources)
        argument = _fixed_argument(parameter, resolved, widen=not implementation.stored)
        if argument is None:
            feeds += (_Feed(name, parameter, resolved),)
        else:
            fixed[name] = argument
    for name, parameter in implementation.parameters.items():
        if parameter.required and name not in operation.inputs:
            raise GraphError(f"operation {operation} lacks its input {name!r}")
    return _Step(operation, implementation, fixed, feeds, (), ())


def _resolve(source: Source, constants: Mapping[str, Constant]) -> str | Constant:
    if isinstance(source, Literal):
        return Stored(source)
    return constants.get(source, source)


def _fixed_argument(parameter: Parameter, sources: tuple[str | Constant, ...], widen: bool) -> Any:
    """The argument, if it can be worked out at load: tensors in the weight file wait until they are used, hence None."""
    constants = [source for source in sources if not isinstance(source, str)]
    if len(constants) < len(sources):
        return None
    if parameter.kind == "number":
        return constants[0].array().item()
    if parameter.kind == "numbers":
        return tuple(item for constant in constants for item in constant.array().reshape(-1).tolist())
    if any(constant.in_file for constant in constants):
        return None
    return _argument(parameter, tuple(to_tensor(constant, widen) for constant in constants))


def _argument(parameter: Parameter, tensors: tuple[Tensor, ...]) -> Any:
    """Values computed while running, in the form that the parameter wants."""
    match parameter.kind:
        case "tensor":
            return tensors[0]
        case "tensors":
            return tensors
        case "number":
            return tensors[0].item()
        case _:
            return tuple(item for tensor in tensors for item in tensor.reshape(-1).tolist())


def _stored(operation: Operation, output: Named, result: Tensor) -> Tensor:
    """The result in the declared type, after a check against the declared shape."""
    if output.type is None or output.type.dtype is STRING:
        raise GraphError(f"operation {operation} returns {output.name!r}, which is no tensor")
    declared = output.type.shape
    if len(declared) != result.dim() or any(
        want not in (UNKNOWN, got) for want, got in zip(declared, result.shape, strict=True)
    ):
        raise GraphError(f"operation {operation} gave shape {tuple(result.shape)}; the program declares {declared}")
    return result.to(output.type.dtype.storage)


def _to_array(tensor: Tensor, dtype: str) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return np.array(array, dtype=dtype)  # a copy: the tensor may share the weight file's pages or an input's memory

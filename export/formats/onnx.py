"""ONNX for ONNX Runtime: float32 in and out, weights rewritten by name before the graph is optimised.

Linears become MatMulNBits (QOperator form: the QDQ form leaves 8 bits unquantized), convolutions an int8 constant with a
per-channel DequantizeLinear, embeddings a gather of int8 rows and of their scales. Weights of 16 bits are float16 constants
that a Cast widens: half the bytes on disk, float32 arithmetic.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from calibration.statistics import InputRounding
from export.compression.compress import mean_bits, with_stored
from export.compression.ladders import Activations
from export.compression.schemes import IntegerScheme, PaletteScheme, Scheme, WeightInfo
from export.compression.stored import FloatWeight, IntegerWeight, StoredWeight, pack_bits
from export.errors import UserError
from export.formats.format import (
    Artifact,
    EmitOptions,
    artifact_files,
    example_inputs,
    refuse_schemes,
    with_rounded_inputs,
)
from export.formats.onnx_kernels import MICROSOFT, TRANSLATIONS, use_kernels

if TYPE_CHECKING:
    from export.components.component import Component

OPSET = 20  # the first with Gelu
MATMUL_BITS = (4, 8)
MATMUL_BLOCKS = (16, 32, 64, 128, 256)
ACCURACY_LEVELS: dict[Activations, int] = {"float": 0, "int8": 4}  # of MatMulNBits


@dataclass(frozen=True)
class OnnxFormat:
    """`<component>/model.onnx` and `model.onnx.data`.

    activations: "float" keeps the inputs of linears in float32; "int8" has MatMulNBits round them, each block of a row to
    multiples of its greatest magnitude / 127, and multiply integers. That is faster, and its loss is part of `reference`.
    """

    name: str = "onnx"
    activations: Activations = "float"

    @property
    def rounding(self) -> InputRounding | None:
        return "block" if self.activations == "int8" else None

    def refuse(self, component: Component, schemes: Mapping[str, Scheme], options: EmitOptions) -> list[str]:
        return refuse_schemes(component, schemes, _refuse_scheme)

    def reference(self, module: nn.Module, stored: Mapping[str, StoredWeight]) -> nn.Module:
        if self.rounding is None:
            return with_stored(module, stored)
        return with_rounded_inputs(module, stored, lambda weight: lambda states: round_per_block(states, weight.block))

    def emit(self, component: Component, module: nn.Module, stored: Mapping[str, StoredWeight], folder: Path,
             options: EmitOptions) -> list[Artifact]:
        with torch.no_grad():
            program = torch.onnx.export(
                traceable(module, stored),
                example_inputs(component.inputs),
                dynamo=True,
                custom_translation_table=TRANSLATIONS,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[spec.name for spec in component.inputs],
                output_names=[spec.name for spec in component.outputs],
            )
        assert program is not None
        model = program.model
        _insert_integers(model.graph, stored, component.name, ACCURACY_LEVELS[self.activations])
        model.opset_imports[MICROSOFT] = 1
        program.optimize()
        _insert_halves(model.graph, stored)
        _strip(model)

        path = folder / component.name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        ir.save(model, path / "model.onnx", external_data="model.onnx.data")
        files, nbytes = artifact_files(path, folder)
        details = {"opset": str(OPSET)}
        if self.rounding is not None:
            details["activations"] = "int8 before integer linears, a scale a block of the weight's size in every row"
        return [Artifact(component.name, self.name, path / "model.onnx", files, nbytes, mean_bits(stored), component.inputs,
                         component.outputs, details=details)]


def round_per_block(states: Tensor, block: int) -> Tensor:
    """Each block of the last axis rounded to multiples of its greatest magnitude / 127: MatMulNBits' accuracy level 4."""
    blocks = states.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    ints = torch.round(blocks * torch.where(largest > 0, 127.0 / largest, 0.0))
    return (ints * (largest / 127.0)).flatten(-2)


def traceable(module: nn.Module, stored: Mapping[str, StoredWeight]) -> nn.Module:
    """A copy of the module with the decompressed weights, in the form that ONNX Runtime computes fastest."""
    return use_kernels(with_stored(module, stored)).eval()


def _refuse_scheme(name: str, info: WeightInfo, scheme: Scheme) -> str | None:
    if isinstance(scheme, PaletteScheme):
        return f"{name}: ONNX Runtime has no palettes; use 4- or 8-bit block integers"
    if not isinstance(scheme, IntegerScheme):
        return None
    if scheme.input_bits != 8:
        return f"{name}: MatMulNBits rounds its inputs to 8 bits or not at all, not to {scheme.input_bits}"
    if info.kind == "linear":
        if scheme.bits not in MATMUL_BITS:
            return f"MatMulNBits does not hold {scheme.bits} bits; choose from {', '.join(map(str, MATMUL_BITS))}"
        if scheme.block not in MATMUL_BLOCKS:
            return f"MatMulNBits has no blocks of {scheme.block}; choose from {', '.join(map(str, MATMUL_BLOCKS))}"
        if info.row % scheme.block:
            return f"{name}: blocks of {scheme.block} do not divide its {info.row} inputs"
        return None
    if info.kind == "other":
        return f"{name}: only linears, convolutions and embeddings are stored as integers"
    if scheme.bits != 8 or scheme.block is not None:
        owner = "an embedding" if info.kind == "embedding" else "a convolution"
        return f"{name}: the weight of {owner} takes 8-bit integers with one scale a row"
    return None


def _insert_integers(graph: ir.Graph, stored: Mapping[str, StoredWeight], component: str, accuracy_level: int) -> None:
    """Rewrites every use of an integer weight. Raises UserError naming a weight that is not there or feeds something else."""
    for name, weight in stored.items():
        if not isinstance(weight, IntegerWeight):
            continue
        value = graph.initializers.get(name)
        uses = list(value.uses()) if value is not None else []
        if value is None or not uses:
            raise UserError(f"{component}: the ONNX graph does not hold {name}; store it as float16 in the recipe")
        for node, index in uses:
            replace = _REWRITES.get(node.op_type)
            if replace is None:
                raise UserError(f"{component}: {name} feeds {node.op_type}, which takes no integers; "
                                "store it as float16 in the recipe")
            replace(_Use(graph, node, index, name, weight, accuracy_level))
        del graph.initializers[name]


@dataclass(frozen=True)
class _Use:
    """One use of an integer weight: input `index` of `node`."""

    graph: ir.Graph
    node: ir.Node
    index: int
    name: str
    weight: IntegerWeight
    accuracy_level: int

    def constant(self, suffix: str, array: np.ndarray) -> ir.Value:
        """An initializer of the graph, made once a weight."""
        name = f"{self.name}.{suffix}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(_initializer(name, array))
        return self.graph.initializers[name]

    def insert(self, op_type: str, inputs: list[ir.Value | None], shape: ir.Shape | None, before: ir.Node,
               dtype: ir.DataType = ir.DataType.FLOAT, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain)
        node.outputs[0].dtype, node.outputs[0].shape = dtype, shape
        self.graph.insert_before(before, node)
        return node.outputs[0]


def _transposed(use: _Use) -> None:
    """Transpose(weight) -> MatMul becomes MatMulNBits."""
    for matmul, index in list(use.node.outputs[0].uses()):
        if matmul.op_type != "MatMul" or index != 1:
            raise UserError(f"{use.name} feeds {matmul.op_type} after a transpose, which takes no integers")
        add, bias = _bias_after(matmul, use.weight.shape[0])
        _supersede(use.graph, add or matmul, _matmul_nbits(use, matmul, bias))
        if add is not None:
            use.graph.remove(matmul, safe=True)
    use.graph.remove(use.node, safe=True)


def _gemm(use: _Use) -> None:
    """Gemm(states, weight, bias) of a linear on one row a batch becomes MatMulNBits and Add."""
    gemm = use.node
    plain = gemm.attributes.get_float("alpha", 1.0) == gemm.attributes.get_float("beta", 1.0) == 1.0
    if use.index != 1 or not plain or gemm.attributes.get_int("transA") or not gemm.attributes.get_int("transB"):
        raise UserError(f"{use.name} feeds a Gemm that is no linear, which takes no integers")
    _supersede(use.graph, gemm, _matmul_nbits(use, gemm, gemm.inputs[2] if len(gemm.inputs) > 2 else None))


def _bias_after(matmul: ir.Node, outputs: int) -> tuple[ir.Node | None, ir.Value | None]:
    """The only reader of a product if it adds a constant [outputs], and that constant."""
    uses = list(matmul.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or matmul.outputs[0].is_graph_output():
        return None, None
    add, index = uses[0]
    bias = add.inputs[1 - index]
    if bias is None or not bias.is_initializer() or bias.shape is None or bias.shape.numpy() != (outputs,):
        return None, None
    return add, bias


def _matmul_nbits(use: _Use, node: ir.Node, bias: ir.Value | None) -> ir.Value:
    """states @ weight.T + bias: B uint8 [out, blocks, block * bits / 8], scales float32 [out, blocks]."""
    weight = use.weight
    rows, blocks = weight.scales.shape
    # MatMulNBits stores unsigned numbers around the zero point 2**(bits - 1), which it assumes when given none.
    unsigned = (weight.ints.astype(np.int16) + (1 << (weight.bits - 1))).astype(np.uint8)
    packed = pack_bits(unsigned, weight.bits).reshape(rows, blocks, -1)
    states = node.inputs[0]
    assert states is not None
    inputs: list[ir.Value | None] = [states, use.constant("ints", packed), use.constant("scales", weight.scales)]
    return use.insert(
        "MatMulNBits",
        inputs if bias is None else [*inputs, None, None, bias],
        node.outputs[0].shape,
        node,
        domain=MICROSOFT,
        K=weight.shape[1],
        N=rows,
        bits=weight.bits,
        block_size=weight.block,
        accuracy_level=use.accuracy_level,
    )


def _conv(use: _Use) -> None:
    """The weight becomes DequantizeLinear(ints, scales) along the output channels."""
    if use.index != 1:
        raise UserError(f"{use.name} is not the weight of its convolution")
    ints, scales = use.constant("ints", use.weight.ints), use.constant("scales", use.weight.scales[:, 0])
    dense = use.insert("DequantizeLinear", [ints, scales], ir.Shape(use.weight.shape), use.node, axis=0)
    use.node.replace_input_with(use.index, dense)


def _gather(use: _Use) -> None:
    """Rows are gathered as integers, and only those widened and scaled."""
    if use.index != 0:
        raise UserError(f"{use.name} is not the table of its gather")
    ids = use.node.inputs[1]
    assert ids is not None
    shape = use.node.outputs[0].shape
    assert shape is not None
    ints = use.insert("Gather", [use.constant("ints", use.weight.ints), ids], shape, use.node, ir.DataType.INT8, axis=0)
    one_a_row = ir.Shape((*shape[:-1], 1))
    scales = use.insert("Gather", [use.constant("scales", use.weight.scales), ids], one_a_row, use.node, axis=0)
    wide = use.insert("Cast", [ints], shape, use.node, to=ir.DataType.FLOAT)
    _supersede(use.graph, use.node, use.insert("Mul", [wide, scales], shape, use.node))


_REWRITES: dict[str, Callable[[_Use], None]] = {"Gather": _gather, "Conv": _conv, "Transpose": _transposed, "Gemm": _gemm}


def _initializer(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def _supersede(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """`value` takes the place and the name of the node's only output."""
    old = node.outputs[0]
    value.name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _insert_halves(graph: ir.Graph, stored: Mapping[str, StoredWeight]) -> None:
    """Stores every large float32 constant that float16 holds exactly as float16 with a Cast.

    Optimisation has transposed and renamed constants by now; that their values survive float16 in every bit is what counts.
    """
    sizes = {int(np.prod(weight.shape)) for weight in stored.values() if isinstance(weight, FloatWeight) and weight.bits == 16}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size not in sizes:
            continue
        wide = tensor.numpy()
        half = wide.astype(np.float16)
        if not np.array_equal(half.astype(np.float32).view(np.uint32), wide.view(np.uint32)):
            continue
        narrow = _initializer(f"{name}.half", half)
        graph.register_initializer(narrow)
        cast = ir.node("Cast", [narrow], attributes={"to": ir.DataType.FLOAT})
        cast.outputs[0].dtype, cast.outputs[0].shape, cast.outputs[0].name = ir.DataType.FLOAT, value.shape, f"{name}.float"
        graph.insert_before(graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]


def _strip(model: ir.Model) -> None:
    """Removes what tracing noted about its own machine: stack traces and module paths are neither small nor reproducible."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()

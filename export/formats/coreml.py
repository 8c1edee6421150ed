"""Core ML: an ML program in fp16 whose compressed weights are `constexpr_lut_to_dense`, our palettes and indices bit by bit,
followed by `constexpr_blockwise_shift_scale` where rows have scales.

coremltools converts the graph with decompressed weights; then every constant that carries a palettized weight is replaced. A
weight is found by its name (`p_<path>_to_fp16`), and in a layout that conversion may have changed; in both cases the constant
must equal the decompressed weight in every bit, so the replacement cannot change the graph's result.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from export.compression.compress import mean_bits, with_stored
from export.compression.schemes import FloatScheme, IntegerScheme, Scheme, weight_infos
from export.compression.stored import PALETTE_BITS, VECTOR_BITS, PaletteWeight, StoredWeight, pack_bits
from export.errors import UserError
from export.formats.format import DEPLOYMENT_TARGETS, Artifact, EmitOptions, artifact_files, export_graph
from runtimes.graph import TensorSpec
from runtimes.quiet import quiet

with quiet():  # it lists the optional modules that it does not find
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.converter import ConverterRegistry, mil_convert_to_proto
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipeline
    from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource

if TYPE_CHECKING:
    from calibration.statistics import InputRounding
    from export.components.component import Component

# What a reader of the package sees beside each input and output.
DESCRIPTIONS = {
    "input_ids": "Token ids of the prompt, start and end tokens included, padded to the fixed length",
    "hidden_states": "Last but one hidden states of the text encoder",
    "hidden_states_2": "Last but one hidden states of the second text encoder",
    "pooled": "Projected embedding of the end token",
    "pooled_2": "Projected embedding of the end token, second text encoder",
    "encoder_hidden_states": "Context tokens of the prompt, embedded, the null token last",
    "modulation": "Adaptive layer norm vectors; the conditioner gives one row a step",
    "latent": "Latent image",
    "velocity": "Flow velocity; the sampler adds (sigma_next - sigma) * velocity to the latent",
    "image": "RGB image in [0, 1]",
}
_DTYPES = {"float32": np.float32, "int32": np.int32}
_DATA = "com.apple.CoreML"


@dataclass(frozen=True)
class CoreMLFormat:
    """`<component>.mlpackage`, float32 and int32 at its boundary."""

    name: str = "coreml"
    rounding: InputRounding | None = None

    def refuse(self, component: Component, schemes: Mapping[str, Scheme], options: EmitOptions) -> list[str]:
        target = options.deployment_target
        reasons: dict[str, None] = {}
        if target not in DEPLOYMENT_TARGETS:
            reasons[f"--deployment-target {target} is not known; choose from {', '.join(DEPLOYMENT_TARGETS)}"] = None
        for spec in (*component.inputs, *component.outputs):
            if spec.dtype not in _DTYPES or not spec.name.isidentifier():
                reasons[f"{component.name}: Core ML cannot take {spec.name} ({spec.dtype}); use --contract flash"] = None
        shapes = {info.name: info.shape for info in weight_infos(component.blank())}
        for name, scheme in schemes.items():
            if name not in shapes:
                reasons[f"{component.name} has no weight {name}; the recipe belongs to another model"] = None
            elif reason := _refuse_scheme(f"{component.name}.{name}", shapes[name], scheme, target):
                reasons[reason] = None
        return list(reasons)

    def reference(self, module: nn.Module, stored: Mapping[str, StoredWeight]) -> nn.Module:
        return with_stored(module, stored)

    def emit(self, component: Component, module: nn.Module, stored: Mapping[str, StoredWeight], folder: Path,
             options: EmitOptions) -> list[Artifact]:
        exported = export_graph(component, with_stored(module, stored)).run_decompositions({})
        _simplify(exported)
        target = getattr(ct.target, options.deployment_target)
        mb.name_count.clear()  # names must not depend on what this process converted before
        program = ct.convert(
            exported,
            convert_to="milinternal",
            inputs=[ct.TensorType(name=spec.name, shape=spec.shape, dtype=_DTYPES[spec.dtype]) for spec in component.inputs],
            outputs=[ct.TensorType(name=spec.name, dtype=_DTYPES[spec.dtype]) for spec in component.outputs],
            compute_precision=ct.precision.FLOAT16,
            minimum_deployment_target=target,
        )
        palettes = {name: weight for name, weight in stored.items() if isinstance(weight, PaletteWeight)}
        _insert_palettes(program, palettes, _graph_names(exported), component.name, options.deployment_target)
        _number_constants(program)

        path = folder / f"{component.name}.mlpackage"
        with tempfile.TemporaryDirectory() as weights:
            spec, _ = mil_convert_to_proto(program, "milinternal", "mlprogram", ConverterRegistry, PassPipeline.EMPTY,
                                           specification_version=target.value, weights_dir=weights)
            _describe(spec, component, options)
            _write_package(path, spec.SerializeToString(deterministic=True), Path(weights) / "weight.bin", component.name)
        files, nbytes = artifact_files(path, folder)
        details = {"deployment_target": options.deployment_target, "compute_precision": "float16"}
        return [Artifact(component.name, self.name, path, files, nbytes, mean_bits(stored), component.inputs, component.outputs,
                         details=details)]


def _refuse_scheme(name: str, shape: tuple[int, ...], scheme: Scheme, target: str) -> str | None:
    if isinstance(scheme, IntegerScheme):
        return f"{name}: Core ML stores palettes and float16 here, not {scheme.bits}-bit integers"
    if isinstance(scheme, FloatScheme):
        return None if scheme.bits == 16 else f"{name}: Core ML stores float16 here, not float{scheme.bits}"
    if scheme.bits not in PALETTE_BITS:
        return f"--bits {scheme.bits} is not a Core ML palette size; choose from {', '.join(map(str, PALETTE_BITS))}"
    if target == "iOS17" and scheme.bits == 3:
        return "palettes of 3 bits need --deployment-target iOS18; iOS17 has 1, 2, 4, 6, 8"
    if target == "iOS17" and scheme.group:
        return "palettes by groups of channels need --deployment-target iOS18; iOS17 has one palette a tensor"
    if target == "iOS17" and scheme.scaled:
        return "palettes with a scale per output channel need --deployment-target iOS18; iOS17 has palettes alone"
    if target == "iOS17" and scheme.vector > 1:
        return "palettes of vectors need --deployment-target iOS18; iOS17 has one weight an entry"
    if scheme.vector not in (1, 2) or (scheme.vector == 2 and scheme.bits not in VECTOR_BITS):
        return (f"{name}: palettes of {scheme.bits} bits do not hold vectors of {scheme.vector}; "
                f"those of 2 weights have {', '.join(map(str, VECTOR_BITS))} bits")
    if scheme.group and shape[0] % scheme.group:
        return f"{name}: groups of {scheme.group} channels do not divide {shape[0]}"
    if (scheme.group or shape[0]) % scheme.vector:
        return f"{name}: vectors of {scheme.vector} channels do not divide {scheme.group or shape[0]}"
    return None


def _simplify(exported: ExportedProgram) -> None:
    """Takes out what coremltools does not know or lowers badly in fp16."""
    graph = exported.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            substitute = node.args[0]
        elif node.target is torch.ops.aten.group_norm.default:
            substitute = _as_instance_norm(node)
        else:
            continue
        node.replace_all_uses_with(substitute)
        exported.graph_signature.replace_all_uses(node.name, substitute.name)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _as_instance_norm(node: Node) -> Node:
    """Group norm of [1, C, h, w] as instance norm of [1, groups, C / groups * h, w].

    coremltools would write it out as means and squares: in fp16 these overflow once an activation passes 256. Instance norm is
    one operation, which every compute unit accumulates in higher precision.
    """
    states, groups, weight, bias = (*node.args, None, None)[:4]
    epsilon = node.args[4] if len(node.args) > 4 else 1e-5
    assert isinstance(states, Node) and isinstance(groups, int)
    value = states.meta["val"]
    batch, channels, height, width = value.shape
    graph, aten = node.graph, torch.ops.aten
    with graph.inserting_before(node):

        def call(target: Any, *args: Any) -> Node:
            made = graph.call_function(target, args)
            fake = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
            made.meta["val"] = target(*fake)
            return made

        grouped = call(aten.view.default, states, [batch, groups, channels // groups * height, width])
        normed = call(aten.instance_norm.default, grouped, None, None, None, None, True, 0.1, epsilon, False)
        result = call(aten.view.default, normed, [batch, channels, height, width])
        if weight is not None:
            result = call(aten.mul.Tensor, result, call(aten.view.default, weight, [1, channels, 1, 1]))
        if bias is not None:
            result = call(aten.add.Tensor, result, call(aten.view.default, bias, [1, channels, 1, 1]))
    return result


def _graph_names(exported: ExportedProgram) -> dict[str, str]:
    """Weight name -> name of its placeholder in the graph, which coremltools keeps."""
    return {weight: placeholder for placeholder, weight in exported.graph_signature.inputs_to_parameters.items()}


def _insert_palettes(program: Any, stored: Mapping[str, PaletteWeight], graph_names: Mapping[str, str], component: str,
                     target: str) -> None:
    """Replaces the constant of every palettized weight. Raises UserError naming those that are not in the program."""
    block = program.functions["main"]
    constants = {op.outputs[0].name: op for op in block.find_ops(op_type="const")
                 if isinstance(op.outputs[0].val, np.ndarray) and op.outputs[0].val.dtype == np.float16}
    missing = []
    replaced: dict[str, str] = {}
    for name, weight in stored.items():
        dense = weight.dense()
        placeholder = graph_names.get(name, "")
        named = [constants[key] for key in (f"{placeholder}_to_fp16", placeholder) if key in constants]
        found = _find(dense, [*named, *(op for op in constants.values() if op.outputs[0].val.size == dense.size)])
        if found is None:
            missing.append(name)
            continue
        constant, order = found
        if constant.name in replaced:  # two equal weights were merged into one constant
            continue
        replaced[constant.name] = name
        _replace(block, constant, weight, order, target)
    if missing:
        raise UserError(f"{component}: the converted Core ML program does not hold {', '.join(missing)}; "
                        f"store {'it' if len(missing) == 1 else 'them'} as float16 in the recipe")


def _number_constants(program: Any) -> None:
    """Numbers const_<n> in the order of the program: coremltools makes some while it goes through a set, whose order differs
    from process to process."""
    numbers: dict[str, int] = {}
    for operation in program.functions["main"].operations:
        for output in operation.outputs:
            if match := re.fullmatch(r"const_(\d+)(.*)", output.name):
                name = f"const_{numbers.setdefault(match[1], len(numbers))}{match[2]}"
                if operation.name == output.name:
                    operation.name = name
                output.name = name


def _find(dense: np.ndarray, constants: list[Any]) -> tuple[Any, tuple[int, ...]] | None:
    """The first constant that equals the weight bit by bit, and the order of axes in which it does."""
    pattern = dense.view(np.uint16)
    for constant in constants:
        value = constant.outputs[0].val.view(np.uint16)
        for order in itertools.permutations(range(dense.ndim)):
            turned = pattern.transpose(order)
            if value.shape == turned.shape and np.array_equal(value, turned):
                return constant, order
    return None


def _replace(block: Any, constant: Any, weight: PaletteWeight, order: tuple[int, ...], target: str) -> None:
    indices = np.ascontiguousarray(weight.indices.transpose(order))
    name = f"{constant.outputs[0].name}_palettized"
    # New operations must come from somewhere in the source for the program to validate: from where their constant came.
    scopes = [ScopeInfo(source=source, data=data) for source, data in constant.scopes.items()
              if source is not ScopeSource.COREMLTOOLS_GRAPH_PASS]
    with block, mb.scope(*scopes):
        if target == "iOS17":
            dense = mb.constexpr_lut_to_dense(indices=pack_bits(indices, weight.bits), lut=weight.palettes[0, :, 0],
                                              shape=np.array(indices.shape, np.uint32), before_op=constant, name=name)
        else:
            # The palettes' rank is that of the indices + 2: groups along the axis that was axis 0, then entries and vector.
            axis = order.index(0)
            along = (*[1] * axis, -1, *[1] * (indices.ndim - axis - 1))
            kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{weight.bits}"))
            vectors = {"vector_axis": axis} if weight.vector > 1 else {}
            dense = mb.constexpr_lut_to_dense(indices=indices.astype(kind),
                                              lut=weight.palettes.reshape(*along, *weight.palettes.shape[1:]),
                                              before_op=constant, name=name, **vectors)
            if weight.scales is not None:
                dense = mb.constexpr_blockwise_shift_scale(data=dense, scale=weight.scales.reshape(along),
                                                           before_op=constant, name=f"{name}_scaled")
    block.replace_uses_of_var_after_op(anchor_op=constant, old_var=constant.outputs[0], new_var=dense, no_check_var_types=True)
    block.remove_ops([constant])


def _describe(spec: Any, component: Component, options: EmitOptions) -> None:
    description = spec.description
    for features, specs in ((description.input, component.inputs), (description.output, component.outputs)):
        declared = {entry.name: entry for entry in specs}
        for feature in features:
            feature.shortDescription = _description(declared[feature.name])
    metadata = description.metadata
    metadata.shortDescription = f"{component.name} of a few-step text-to-image model, exported by export-flash"
    metadata.author, metadata.license, metadata.versionString = options.author, options.licence, options.version
    metadata.userDefined["com.github.apple.coremltools.version"] = ct.__version__
    metadata.userDefined["com.github.apple.coremltools.source"] = f"torch=={torch.__version__}"


def _description(spec: TensorSpec) -> str:
    text = DESCRIPTIONS.get(spec.name, spec.name.replace("_", " "))
    return f"{text}: {spec.dtype} {list(spec.shape)}"


def _write_package(path: Path, model: bytes, weights: Path, name: str) -> None:
    """An .mlpackage with identifiers that depend on names alone (coremltools draws random ones)."""
    shutil.rmtree(path, ignore_errors=True)
    data = path / "Data" / _DATA
    (data / "weights").mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(model)
    if weights.exists():
        shutil.move(weights, data / "weights" / "weight.bin")
    items = {
        _identifier(name, "model"): {"author": _DATA, "description": "CoreML Model Specification", "name": "model.mlmodel",
                                     "path": f"{_DATA}/model.mlmodel"},
        _identifier(name, "weights"): {"author": _DATA, "description": "CoreML Model Weights", "name": "weights",
                                       "path": f"{_DATA}/weights"},
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": _identifier(name, "model")}
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def _identifier(name: str, part: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"export-flash/{name}/{part}")).upper()

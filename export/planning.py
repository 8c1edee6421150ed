"""What an export is going to make: components, formats, schemes, expected bytes and every refusal, without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from calibration.prompts import read_prompts
from export.budgets import Budget, check_uncalibrated, choose_budget
from export.calibrating import CalibrationOptions, device_of
from export.checkpoint import Checkpoint, open_checkpoint
from export.components.component import Component, check_weights
from export.compression.ladders import Activations, ladder
from export.compression.recipe import RecipeFile, check_fits, read_recipe
from export.compression.schemes import FloatScheme, Plan, Scheme, WeightInfo, plan, weight_infos
from export.effort import CALIBRATION_PASSES, LARGE, affordable_prompts, duration, macs, macs_per_second
from export.errors import UserError
from export.families import read_family
from export.families.family import Contract, Family, GraphOptions
from export.formats.format import EmitOptions, Format
from export.lora import Lora
from export.rewrites import Rewrites, rewrites_of
from export.sigmas import choose_sigmas
from export.targets import ROUNDING_FORMATS, ROUNDING_TWICE, Target, choose_formats, load_format
from runtimes.tokenizer import Tokenizer

# Golden cases and graphs beside the stored weights, and what formats write on the way.
SPARE_BYTES = 64 << 20
# Of float32 weights that run at a time; small models are run whole.
STRETCH_BYTES = 256 << 20


Check = Literal["pictures", "step"]
"""How far artifacts are compared with the original: whole pictures, or one denoising step and one decode."""


@dataclass(frozen=True)
class Effort:
    """Multiply-accumulates of a picture's parts: what runs once a prompt, one step, the decoder."""

    once: int
    step: int
    decoder: int

    def picture(self, steps: int) -> int:
        return self.once + steps * self.step + self.decoder


@dataclass(frozen=True)
class ExportOptions:
    """What a user asks of one target. None: the checkpoint's or the target's own, or what fits the model's size.

    bits, size_budget (bytes), preset and recipe are four ways to say how large it may get: at most one of them.
    """

    model: str
    tokenizer: Path | None = None
    loras: tuple[Lora, ...] = ()
    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    resolution: tuple[int, int] | None = None
    bits: float | None = None
    size_budget: int | None = None
    preset: str | None = None
    recipe: Path | None = None
    calibrate: bool = True
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    contract: Contract = "flash"
    activations: Activations = "float"
    rewrites: Rewrites | None = None
    deployment_target: str = "iOS18"
    formats: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    chunks: int | None = None
    check: Check | None = None
    golden_prompts: int | None = None
    measured_prompts: int | None = None


@dataclass(frozen=True)
class Part:
    """One component: its pieces in order (one, or a transformer's chunks), and of each format each piece's plan.

    stretches: the same computation in the order in which this computer runs it, where whole pieces are too large for that
    """

    name: str
    pieces: tuple[Component, ...]
    plans: Mapping[str, tuple[Plan, ...]]
    stretches: tuple[Component, ...]

    def expected_bytes(self, format: str) -> int:
        return sum(piece.expected_bytes() for piece in self.plans[format])

    def with_mean_bits(self, bits: Mapping[str, float]) -> Part:
        """The same, with what weights that have a choice are going to take on average, by format."""
        plans = {format: tuple(replace(plan, mean_bits=bits[format]) for plan in found) for format, found in self.plans.items()}
        return replace(self, plans=plans)


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is settled before the long work begins.

    budgets: by format, bytes for the weights that have a choice
    activations: what linears multiply, where a format leaves the choice
    calibration: None where nothing is going to be calibrated
    recipe: choices made before, which leave none
    """

    target: Target
    checkpoint: Checkpoint
    family: Family
    graph: GraphOptions
    emit: EmitOptions
    budget: Budget
    budgets: Mapping[str, int]
    activations: Activations
    recipe: RecipeFile | None
    calibration: CalibrationOptions | None
    formats: tuple[Format, ...]
    parts: tuple[Part, ...]
    exported: frozenset[str]
    tokenizers: Mapping[str, Tokenizer]
    check: Check
    golden_prompts: int
    measured_prompts: int
    effort: Effort
    notes: tuple[str, ...] = field(default=())

    @property
    def is_large(self) -> bool:
        """Whether running the model takes this computer long."""
        return self.effort.picture(len(self.graph.sigmas) - 1) > LARGE

    @property
    def expected_bytes(self) -> int:
        """Of the weights of all artifacts."""
        wanted = [part for part in self.parts if part.name in self.exported]
        return sum(part.expected_bytes(format.name) for part in wanted for format in self.formats)

    @property
    def needed_bytes(self) -> int:
        """What an export asks the disk for."""
        return 2 * self.expected_bytes + SPARE_BYTES


def make_plan(target: Target, options: ExportOptions) -> ExportPlan:
    """Opens the checkpoint and plans. Raises `UserError` with every reason to refuse, one a line."""
    names = choose_formats(target, options.formats)
    _check_activations(options.activations, target, names)
    formats = tuple(load_format(name, options.activations) for name in names)
    recipe, budget = _asked(target, options)
    device_of(options.calibration)
    checkpoint = open_checkpoint(options.model, options.tokenizer, options.loras)
    family = read_family(checkpoint)
    sigmas = choose_sigmas(checkpoint, options.steps, options.sigmas)
    width, height = options.resolution or family.default_resolution
    rewrites = options.rewrites or rewrites_of(options.contract)
    graph = GraphOptions(width, height, sigmas.values, options.contract, rewrites, options.chunks or 1)
    components = family.components(graph)
    check_weights(checkpoint, components)
    exported = _chosen(options.components, list(dict.fromkeys(_owner(component) for component in components)))
    schemes = _Schemes(options, budget, recipe)
    parts, budgets = _parts(components, formats, exported, schemes)
    while options.chunks is None and rewrites.hoist_conditioner and _largest_chunk(parts) > target.chunk_bytes:
        graph = replace(graph, chunks=graph.chunks + 1)
        parts, budgets = _parts(family.components(graph), formats, exported, schemes)
    parts = _with_stretches(parts, family, graph)
    if recipe is not None:
        _check_recipe(recipe, parts, exported, formats)
    licence = checkpoint.licence or "see the checkpoint's own terms"
    emit = EmitOptions(options.deployment_target, author=checkpoint.name, licence=licence, version="1")
    reasons = [
        reason
        for part in parts
        if part.name in exported
        for format in formats
        for piece, piece_plan in zip(part.pieces, part.plans[format.name], strict=True)
        for candidates in _recipes(piece_plan)
        for reason in format.refuse(piece, candidates, emit)
    ]
    if reasons:
        raise UserError("\n".join(dict.fromkeys(reasons)))
    tokenizers = {name: Tokenizer.from_checkpoint(path) for name, path in checkpoint.tokenizers.items()}
    notes = (*checkpoint.notes, *([sigmas.note] if sigmas.note else []))
    calibrates = options.calibrate and any(_compresses(part) for part in parts if part.name in exported)
    effort = _effort(parts)
    is_large = effort.picture(len(graph.sigmas) - 1) > LARGE
    check: Check = options.check or ("step" if is_large else "pictures")
    calibration = _affordable(options.calibration, effort.picture(len(graph.sigmas) - 1)) if calibrates else None
    return ExportPlan(
        target,
        checkpoint,
        family,
        graph,
        emit,
        budget,
        budgets,
        options.activations,
        recipe,
        calibration,
        formats,
        parts,
        exported,
        tokenizers,
        check,
        options.golden_prompts or (1 if is_large else 2),
        options.measured_prompts or (1 if is_large else 4),
        effort,
        (*notes, *(_large_notes(effort, len(graph.sigmas) - 1, check, calibration) if is_large else ())),
    )


def _effort(parts: tuple[Part, ...]) -> Effort:
    counts = {part.name: macs(part.pieces) for part in parts}
    step, decoder = counts.pop("transformer"), counts.pop("vae_decoder")
    return Effort(sum(counts.values()), step, decoder)


def _affordable(options: CalibrationOptions, picture: int) -> CalibrationOptions:
    """The same, with as many of the built-in prompts as a model of this size is calibrated on by default."""
    return options if options.prompts is not None else replace(options, count=affordable_prompts(picture))


def _large_notes(effort: Effort, steps: int, check: Check, calibration: CalibrationOptions | None) -> list[str]:
    """What a large model's export is going to compute, and about how long that takes here."""
    speed, picture = macs_per_second(), effort.picture(steps)
    compared = "one denoising step and one decode" if check == "step" else "whole pictures"
    other = "--check pictures draws them whole" if check == "step" else "--check step is faster"
    notes = [
        f"a picture takes {picture / 1e12:.1f} T multiply-accumulates, about {duration(picture / speed)} here; artifacts are "
        f"compared over {compared} ({other})"
    ]
    if calibration is not None:
        count = (calibration.count or 0) if calibration.prompts is None else len(read_prompts(calibration.prompts))
        takes = duration(CALIBRATION_PASSES * count * picture / speed)
        notes.append(f"calibration on {count} prompts takes about {takes}; --calibration-prompts FILE takes others, or more")
    return notes


def _check_activations(activations: Activations, target: Target, names: tuple[str, ...]) -> None:
    choices = {"float": names, "int8": ROUNDING_FORMATS, "int16": ROUNDING_TWICE}
    if frozenset(choices[activations]).isdisjoint(names):
        whose = "ONNX and ExecuTorch" if activations == "int8" else "ExecuTorch"
        raise UserError(f"--activations {activations} is a choice of {whose}, and --target {target.name} makes "
                        f"{', '.join(names)} here; leave it out")


def _asked(target: Target, options: ExportOptions) -> tuple[RecipeFile | None, Budget]:
    """The recipe, or how much the weights may take."""
    if not options.calibrate and options.calibration != CalibrationOptions():
        raise UserError("--no-calibration leaves nothing for --calibration-... to do; leave out one or the other")
    if options.recipe is not None:
        if options.bits is not None or options.size_budget is not None or options.preset is not None:
            raise UserError("--recipe has made the choice that --bits, --size-budget and --preset ask for; give one of them")
        if options.activations == "int16":
            raise UserError("--recipe has made the choice that --activations int16 asks for; analyze with it, or leave it out")
        return read_recipe(options.recipe), Budget(f"--recipe {options.recipe}")
    budget = choose_budget(target, options.bits, options.size_budget, options.preset)
    if not options.calibrate:
        check_uncalibrated(budget)
    return None, budget


@dataclass(frozen=True)
class _Schemes:
    """Which schemes a weight may have."""

    options: ExportOptions
    budget: Budget
    recipe: RecipeFile | None

    def plan(self, component: str, infos: tuple[WeightInfo, ...], format: str) -> Plan:
        bits = self.budget.bits or 16.0
        if self.recipe is not None:
            chosen = self.recipe.schemes(format, component)
            return Plan(infos, {info.name: (chosen.get(info.name, FloatScheme(16)),) for info in infos})
        if not (self.options.calibrate and self.budget.compresses):
            return plan(infos, format, int(bits), 16 if self.options.activations == "int16" else 8)
        deployment_target, activations = self.options.deployment_target, self.options.activations
        return Plan(infos, {info.name: ladder(info, format, deployment_target, activations) for info in infos}, bits)


def _parts(
    components: tuple[Component, ...], formats: tuple[Format, ...], exported: frozenset[str], schemes: _Schemes
) -> tuple[tuple[Part, ...], dict[str, int]]:
    """The parts, and by format the bytes for the weights that have a choice."""
    parts = tuple(_part(name, components, formats, schemes) for name in dict.fromkeys(_owner(c) for c in components))
    budgets, spread = dict[str, int](), dict[str, float]()
    for format in (format.name for format in formats):
        plans = [plan for part in parts if part.name in exported for plan in part.plans[format]]
        budgets[format] = schemes.budget.spend(plans, format) if any(plan.is_open for plan in plans) else 0
        spread[format] = 8 * budgets[format] / max(1, sum(info.count for plan in plans for info in plan.undecided))
    return tuple(part.with_mean_bits(spread) for part in parts), budgets


def _with_stretches(parts: tuple[Part, ...], family: Family, graph: GraphOptions) -> tuple[Part, ...]:
    """The transformer in stretches of at most STRETCH_BYTES, or of one block."""
    (transformer,) = (part for part in parts if part.name == "transformer")
    plans = next(iter(transformer.plans.values()))
    count = -(-4 * sum(info.count for plan in plans for info in plan.weights) // STRETCH_BYTES)
    chunks = min(family.blocks, count)
    if not graph.rewrites.hoist_conditioner or chunks <= len(transformer.pieces):
        return parts
    fine = tuple(c for c in family.components(replace(graph, chunks=chunks)) if _owner(c) == transformer.name)
    return tuple(replace(part, stretches=fine) if part is transformer else part for part in parts)


def _largest_chunk(parts: tuple[Part, ...]) -> int:
    """Expected bytes of the transformer's largest piece in any format."""
    (transformer,) = (part for part in parts if part.name == "transformer")
    return max(piece.expected_bytes() for plans in transformer.plans.values() for piece in plans)


def _part(name: str, components: tuple[Component, ...], formats: tuple[Format, ...], schemes: _Schemes) -> Part:
    pieces = tuple(component for component in components if _owner(component) == name)
    infos = [weight_infos(piece.blank()) for piece in pieces]
    return Part(name, pieces, {f.name: tuple(schemes.plan(name, info, f.name) for info in infos) for f in formats}, pieces)


def _check_recipe(recipe: RecipeFile, parts: tuple[Part, ...], exported: frozenset[str], formats: tuple[Format, ...]) -> None:
    for format in formats:
        shapes = {
            part.name: {info.name: info.shape for plan in part.plans[format.name] for info in plan.weights}
            for part in parts
            if part.name in exported
        }
        check_fits(recipe, shapes, format.name)


def _compresses(part: Part) -> bool:
    return any(
        not isinstance(scheme, FloatScheme)
        for plans in part.plans.values()
        for plan in plans
        for schemes in plan.candidates.values()
        for scheme in schemes
    )


def _recipes(plan: Plan) -> list[dict[str, Scheme]]:
    """Recipes that between them hold every scheme that any weight may get."""
    longest = max((len(schemes) for schemes in plan.candidates.values()), default=1)
    return [{name: schemes[min(i, len(schemes) - 1)] for name, schemes in plan.candidates.items()} for i in range(longest)]


def _owner(component: Component) -> str:
    return component.name.partition("_chunk")[0]


def _chosen(wanted: tuple[str, ...], known: list[str]) -> frozenset[str]:
    for name in wanted:
        if name not in known:
            raise UserError(f"--component {name} is none of this export; choose from {', '.join(known)}")
    return frozenset(wanted or known)

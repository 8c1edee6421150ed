"""What an export is going to make: components, formats, schemes, expected bytes and every refusal, without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from export.checkpoint import Checkpoint, open_checkpoint
from export.components.component import Component, check_weights
from export.compression.schemes import Plan, Scheme, plan, weight_infos
from export.errors import UserError
from export.families import read_family
from export.families.family import Contract, Family, GraphOptions
from export.formats.format import EmitOptions, Format
from export.rewrites import Rewrites, rewrites_of
from export.sigmas import choose_sigmas
from export.targets import Target, choose_formats, load_format
from runtimes.tokenizer import Tokenizer

BITS = (16, 8, 6)
# Golden cases and graphs beside the stored weights, and what formats write on the way.
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportOptions:
    """What a user asks of one target. None: the checkpoint's or the target's own."""

    model: str
    tokenizer: Path | None = None
    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    resolution: tuple[int, int] | None = None
    bits: int | None = None
    contract: Contract = "flash"
    rewrites: Rewrites | None = None
    deployment_target: str = "iOS17"
    formats: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    chunks: int | None = None
    golden_prompts: int = 2


@dataclass(frozen=True)
class Part:
    """One component: its pieces in order (one, or a transformer's chunks), and of each format each piece's plan."""

    name: str
    pieces: tuple[Component, ...]
    plans: Mapping[str, tuple[Plan, ...]]

    def expected_bytes(self, format: str) -> int:
        return sum(piece.expected_bytes() for piece in self.plans[format])


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is settled before the long work begins."""

    target: Target
    checkpoint: Checkpoint
    family: Family
    graph: GraphOptions
    emit: EmitOptions
    bits: int
    formats: tuple[Format, ...]
    parts: tuple[Part, ...]
    exported: frozenset[str]
    tokenizers: Mapping[str, Tokenizer]
    golden_prompts: int
    notes: tuple[str, ...] = field(default=())

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
    formats = tuple(load_format(name) for name in choose_formats(target, options.formats))
    bits = target.default_bits if options.bits is None else options.bits
    if bits not in BITS:
        raise UserError(_refuse_bits(bits, formats))
    checkpoint = open_checkpoint(options.model, options.tokenizer)
    family = read_family(checkpoint)
    sigmas = choose_sigmas(checkpoint, options.steps, options.sigmas)
    width, height = options.resolution or family.default_resolution
    rewrites = options.rewrites or rewrites_of(options.contract)
    graph = GraphOptions(width, height, sigmas.values, options.contract, rewrites, options.chunks or 1)
    components = family.components(graph)
    check_weights(checkpoint, components)
    parts = _parts(components, formats, bits)
    while options.chunks is None and rewrites.hoist_conditioner and _largest_chunk(parts) > target.chunk_bytes:
        graph = replace(graph, chunks=graph.chunks + 1)
        parts = _parts(family.components(graph), formats, bits)
    exported = _chosen(options.components, [part.name for part in parts])
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
    return ExportPlan(
        target, checkpoint, family, graph, emit, bits, formats, parts, exported, tokenizers, options.golden_prompts, notes
    )


def _parts(components: tuple[Component, ...], formats: tuple[Format, ...], bits: int) -> tuple[Part, ...]:
    return tuple(_part(name, components, formats, bits) for name in dict.fromkeys(_owner(c) for c in components))


def _largest_chunk(parts: tuple[Part, ...]) -> int:
    """Expected bytes of the transformer's largest piece in any format."""
    (transformer,) = (part for part in parts if part.name == "transformer")
    return max(piece.expected_bytes() for plans in transformer.plans.values() for piece in plans)


def _part(name: str, components: tuple[Component, ...], formats: tuple[Format, ...], bits: int) -> Part:
    pieces = tuple(component for component in components if _owner(component) == name)
    infos = [weight_infos(piece.blank()) for piece in pieces]
    return Part(name, pieces, {format.name: tuple(plan(info, format.name, bits) for info in infos) for format in formats})


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


def _refuse_bits(bits: int, formats: tuple[Format, ...]) -> str:
    if any(format.name == "coreml" for format in formats) and bits not in (1, 2, 3, 4, 6, 8, 16):
        return f"--bits {bits} is not a Core ML palette size; choose from {', '.join(map(str, BITS))}"
    return f"--bits {bits} is not offered; choose from {', '.join(map(str, BITS))}"

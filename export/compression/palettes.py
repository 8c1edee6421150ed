"""Palettes of a weight: optimal ones of single weights, good ones of vectors of two, either with a scale per output channel.

float16 has at most 65,536 values, so a tensor of any size is a histogram, and the optimal clusters of sorted values are
intervals: a shortest path of `entries` arcs over the gaps between levels, where the arc (s, e) costs the squared error of the
levels s..e-1 around their mean. These costs obey the quadrangle inequality (X. Wu, Optimal quantization by matrix searching,
J. Algorithms 12, 1991), from which follows all that makes the search fast:
- The least cost is convex in the number of arcs. So the path of exactly `entries` arcs is the shortest path of any number of
  arcs for some penalty on each, or is spliced from two such paths (Aggarwal, Schieber, Tokuyama, Finding a minimum-weight
  k-link path in graphs with the concave Monge property, Discrete & Computational Geometry 12, 1994).
- The best predecessor grows with the node. For one penalty, `_shortest_paths` solves a block of nodes at a time: widely spaced
  ones first, then those in between. Groups of channels are solved side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.compression.parallel import in_order
from export.compression.stored import PALETTE_BITS, VECTOR_BITS, PaletteWeight

Floats = NDArray[np.floating]
Doubles = NDArray[np.float64]
Singles = NDArray[np.float32]
Nodes = NDArray[np.intp]
Fit = tuple[NDArray[np.float16], NDArray[np.uint8]]  # palette [entries, vector], indices [rows / vector, ...]

_ALL_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
_MINUS_ZERO = 0x8000
# Codes of the finite values from least to greatest, -0 left out.
_ASCENDING = np.flatnonzero(np.isfinite(_ALL_VALUES) & (np.arange(1 << 16) != _MINUS_ZERO))
_ASCENDING = _ASCENDING[np.argsort(_ALL_VALUES[_ASCENDING])]
_FINITE = _ALL_VALUES[_ASCENDING]
_SIDE_BY_SIDE = 64  # groups whose palettes are searched in one go, which outweighs numpy's cost of a call
_NEGLIGIBLE = 2.0**-50  # a share of the importance that prefix sums cannot hold
_ROUGH = 16  # levels a cluster of the merged histogram that gives the first penalty
_GUESSES = 4  # penalties tried by extrapolation before the secant, which cannot fail
_SCALE_ROUNDS = 3
_TRACE = 1e-6  # least share of the mean weight that a pair of no weight counts
_LLOYD_ROUNDS, _LLOYD_ENOUGH = 60, 1e-4  # at most so many, and only as long as one takes away this share of the error
_CELLS = 1 << 16  # pairs of weights that a vector palette is fitted to; more of them are merged on a grid
_CHUNK = 1 << 14


@dataclass(frozen=True, eq=False)
class Palette:
    """values float16 [2**bits], ascending; indices uint8 in the shape of the fitted tensor."""

    values: NDArray[np.float16]
    indices: NDArray[np.uint8]


def fit_palette(values: NDArray[np.float16], bits: int, weights: Floats | None = None) -> Palette:
    """The palette of 2**bits entries with the least (weighted) squared error, entries then rounded to float16.

    values: float16, any shape; weights: importance of each value, the same shape, not negative.
    Raises ValueError on values that are not finite and on bits that no palette has.
    """
    _check(values, bits, 1, weights)
    palettes, indices = _fit_scalars([values], bits, None if weights is None else [weights])[0]
    return Palette(palettes[:, 0], indices)


def palettize(values: NDArray[np.float16], bits: int, group: int | None = None, weights: Floats | None = None,
              scaled: bool = False, vector: int = 1) -> PaletteWeight:
    """One palette for the tensor, or one for every `group` consecutive rows of axis 0.

    weights: importance of each value, the same shape, not negative
    scaled: a scale for every row before the palette, fitted together with it; never a larger error than without
    vector: rows that share an index. Palettes of single weights are optimal; those of vectors are a local optimum.
    Raises ValueError on values that are not finite, and on bits, groups and vectors that do not fit.
    """
    _check(values, bits, vector, weights)
    rows = values.shape[0] if values.ndim else 0
    size = group or rows
    if not size or rows % size:
        raise ValueError(f"groups of {size} rows do not divide {rows} rows")
    if size % vector:
        raise ValueError(f"vectors of {vector} rows do not divide groups of {size} rows")
    plain = _palettize(values, bits, size, weights, vector)
    return _with_scales(values, plain, size, weights) if scaled else plain


def nearest(palette: NDArray[np.float16], values: Floats) -> NDArray[np.uint8]:
    """Index of the nearest entry (the lower on a tie) of an ascending palette [entries], for values of any shape."""
    exact = palette.astype(np.float64)
    return np.searchsorted((exact[:-1] + exact[1:]) / 2, values, side="left").astype(np.uint8)


def nearest_vectors(palette: Floats, values: Floats, weights: Floats | None = None) -> NDArray[np.uint8]:
    """Index of the nearest entry of a palette [entries, vector], for values [..., vector].

    weights: of the values' shape, weigh the squared differences. Computed in float32: of entries that are nearly as near,
    either may be chosen.
    """
    entries = palette.astype(np.float32)
    squares = np.square(entries)
    # sum w (x - c)^2 = ... - 2 sum (w x) c + sum w c^2: a product of matrices, of which the greatest negative counts.
    factors = np.ascontiguousarray((entries if weights is None else np.concatenate((entries, -squares / 2), axis=1)).T)
    constant = -squares.sum(axis=1) / 2
    flat = np.ascontiguousarray(values, np.float32).reshape(-1, palette.shape[1])
    metric = None if weights is None else np.ascontiguousarray(weights, np.float32).reshape(flat.shape)
    indices = np.empty(len(flat), np.uint8)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start:start + _CHUNK]
        if metric is None:
            closeness = part @ factors
            closeness += constant
        else:
            weight = metric[start:start + _CHUNK]
            closeness = np.concatenate((part * weight, weight), axis=1) @ factors
        indices[start:start + _CHUNK] = closeness.argmax(axis=1)
    return indices.reshape(values.shape[:-1])


def _check(values: NDArray[np.float16], bits: int, vector: int, weights: Floats | None) -> None:
    if bits not in PALETTE_BITS:
        raise ValueError(f"palettes of {bits} bits do not exist; choose from {', '.join(map(str, PALETTE_BITS))}")
    if vector not in (1, 2):
        raise ValueError(f"an entry of a palette holds 1 or 2 weights, not {vector}")
    if vector == 2 and bits not in VECTOR_BITS:
        raise ValueError(f"palettes of pairs have {', '.join(map(str, VECTOR_BITS))} bits, not {bits}")
    if values.dtype != np.float16:
        raise ValueError(f"palettes are fitted to float16 values, not {values.dtype}")
    if values.size == 0:
        raise ValueError("a palette needs at least one value")
    if not np.isfinite(values).all():
        raise ValueError("palettes cannot hold NaN or infinite values")
    if weights is not None and (weights.shape != values.shape or not np.isfinite(weights).all() or weights.min() < 0):
        raise ValueError("palette weights are finite, not negative, and one a value")


# ---- one palette a group


def _palettize(values: NDArray[np.float16], bits: int, size: int, weights: Floats | None, vector: int,
               start: NDArray[np.float16] | None = None) -> PaletteWeight:
    """Palettes for every `size` rows, groups on all cores. start: where vector palettes [groups, entries, 2] set out from."""
    groups = range(len(values) // size)

    def some(numbers: Sequence[int]) -> list[Fit]:
        parts = [slice(number * size, (number + 1) * size) for number in numbers]
        weighed = None if weights is None else [weights[part] for part in parts]
        if vector == 1:
            return _fit_scalars([values[part] for part in parts], bits, weighed)
        return [_fit_vectors(values[part], bits, None if weights is None else weights[part],
                             None if start is None else start[number]) for part, number in zip(parts, numbers, strict=True)]

    together = _SIDE_BY_SIDE if vector == 1 else 1
    batches = [groups[first:first + together] for first in groups[::together]]
    fits = [fit for batch in in_order(some, batches) for fit in batch]
    return PaletteWeight(bits, np.stack([palette for palette, _ in fits]), np.concatenate([indices for _, indices in fits]))


def _fit_scalars(parts: Sequence[NDArray[np.float16]], bits: int, weights: Sequence[Floats] | None) -> list[Fit]:
    """The optimal palette of each part."""
    codes = [np.ascontiguousarray(part).reshape(-1).view(np.uint16) for part in parts]
    histograms = [_histogram(code, None if weights is None else weights[place], 1 << bits) for place, code in enumerate(codes)]
    palettes = _optimal_entries(histograms, 1 << bits)
    return [(palette[:, None], _table(palette).take(code).reshape(part.shape))
            for part, code, palette in zip(parts, codes, palettes, strict=True)]


def _histogram(codes: NDArray[np.uint16], weights: Floats | None, entries: int) -> tuple[Doubles, Doubles]:
    """Distinct values ascending (-0 and 0 are one), and how often each occurs or its summed weight.

    Values without weight are left out, unless there are entries for all, or none has any weight.
    """
    mass = _counted(codes, None)
    if weights is not None and np.count_nonzero(mass) > entries:
        sums = _counted(codes, np.asarray(weights, np.float64).reshape(-1))
        if sums.any():
            mass = np.where(sums > _NEGLIGIBLE * sums.sum(), sums, 0)
    present = np.flatnonzero(mass)
    return _FINITE[present], mass[present]


def _counted(codes: NDArray[np.uint16], weights: Doubles | None) -> Doubles:
    """Occurrences or summed weight of every finite value, ascending."""
    sums = np.bincount(codes, weights, 1 << 16)
    sums[0] += sums[_MINUS_ZERO]
    return sums[_ASCENDING].astype(np.float64)


def _optimal_entries(histograms: Sequence[tuple[Doubles, Doubles]], entries: int) -> list[NDArray[np.float16]]:
    """Cluster means of each histogram, ascending; of fewer levels than entries the levels, the last one repeated."""
    palettes = []
    for (levels, mass), starts in zip(histograms, optimal_intervals(histograms, entries), strict=True):
        means = np.add.reduceat(mass * levels, starts) / np.add.reduceat(mass, starts)
        palettes.append(np.pad(means, (0, entries - means.size), mode="edge").astype(np.float16))
    return palettes


def _table(palette: NDArray[np.float16]) -> NDArray[np.uint8]:
    """What `nearest` says of every float16, by its code."""
    exact = palette.astype(np.float64)
    ends = np.searchsorted(_FINITE, (exact[:-1] + exact[1:]) / 2, side="right")
    table = np.zeros(1 << 16, np.uint8)
    table[_ASCENDING] = np.repeat(np.arange(len(palette), dtype=np.uint8), np.diff(ends, prepend=0, append=len(_FINITE)))
    table[_MINUS_ZERO] = table[0]
    return table


# ---- optimal intervals of a histogram


def optimal_intervals(histograms: Sequence[tuple[Doubles, Doubles]], clusters: int) -> list[Nodes]:
    """First level of each of the at most `clusters` intervals with the least squared error around their weighted means, for
    every histogram (levels ascending, their mass positive). A histogram's result does not depend on the others."""
    searches = [_Search(levels, mass, clusters) for levels, mass in histograms]
    open_ones = [search for search in searches if search.nodes > clusters]
    rough = [(search, search.merged()) for search in open_ones if search.nodes >= 4 * _ROUGH * clusters]
    rough = [(search, merged) for search, merged in rough if merged.nodes > clusters]
    _run([merged for _, merged in rough])
    for search, merged in rough:
        search.penalty = merged.penalty
    _run(open_ones)
    return [search.starts for search in searches]


def _parts(levels: Doubles, mass: Doubles, count: int) -> Nodes:
    """Number of the interval that each level falls into, of at most `count` that a good palette would about have."""
    density = np.cumsum(np.cbrt(mass * np.square(np.gradient(levels))))
    return np.minimum(density / density[-1] * count, count - 1).astype(np.intp)


class _Search:
    """The search for a histogram's best `clusters` intervals. `starts`, the first level of each, are all levels until it ends.

    Ends with the `penalty` that led to it.
    """

    def __init__(self, levels: Doubles, mass: Doubles, clusters: int) -> None:
        share = mass / mass.sum()
        total = np.cumsum(share)
        self.levels, self.share = levels, share
        # Prefix sums grow outwards from the median, where the levels are dense and their differences small.
        median = int(np.searchsorted(total, 0.5))
        centred = levels - levels[median]
        self.nodes = len(levels)
        self.mass = np.concatenate(([0.0], total))
        self.first = _from_node(median, share * centred)
        self.second = _from_node(median, share * np.square(centred))
        self.clusters = clusters
        self.starts = self.more = np.arange(self.nodes, dtype=np.intp)
        self.fewer = np.zeros(1, np.intp)
        # Panter and Dite (1951): many clusters err by (integral of density^(1/3))^3 / 12 clusters^2; less its derivative.
        width = np.gradient(levels) if self.nodes > 1 else np.ones(1)
        self.penalty = float(np.cbrt(share * np.square(width)).sum() ** 3 / (6 * clusters**3))
        self._trials = 0
        self._secant = False

    def merged(self) -> _Search:
        """The same search among fewer levels, each of which stands for several."""
        firsts = np.flatnonzero(np.diff(_parts(self.levels, self.share, _ROUGH * self.clusters), prepend=-1))
        mass = np.add.reduceat(self.share, firsts)
        return _Search(np.add.reduceat(self.share * self.levels, firsts) / mass, mass, self.clusters)

    def learn(self, starts: Nodes) -> None:
        """Takes the shortest path for the penalty; either it has the right number of arcs, or there is a better penalty."""
        count = len(starts)
        between = len(self.fewer) < count < len(self.more)
        if count == self.clusters:
            self.starts = starts
            return
        if self._secant and not between:  # then all paths between the two cost the same at this penalty
            self.starts = _spliced(self.fewer, self.more, self.clusters, self.nodes)
            return
        if between and count < self.clusters:
            self.fewer = starts
        elif between:
            self.more = starts
        self._trials += 1
        self._secant = self._trials >= _GUESSES or (len(self.fewer) > 1 and len(self.more) < self.nodes)
        if self._secant:
            self.penalty = (self._cost(self.fewer) - self._cost(self.more)) / (len(self.more) - len(self.fewer))
        else:
            self.penalty *= (count / self.clusters) ** 3

    def _cost(self, starts: Nodes) -> float:
        """Squared error of the intervals around their means."""
        ends = np.append(starts[1:], self.nodes)
        moment = np.square(self.first[ends] - self.first[starts]) / (self.mass[ends] - self.mass[starts])
        return float((self.second[ends] - self.second[starts] - moment).sum())


def _from_node(origin: int, terms: Doubles) -> Doubles:
    """Prefix sums [terms + 1] that are 0 at the node before term `origin`, added up outwards from there."""
    return np.concatenate((-np.cumsum(terms[:origin][::-1])[::-1], [0.0], np.cumsum(terms[origin:])))


def _spliced(fewer: Nodes, more: Nodes, clusters: int, end: int) -> Nodes:
    """A path of `clusters` arcs from two shortest ones: along `fewer` to an arc that contains one of `more`, and on along that.

    By the quadrangle inequality it and the path of what is left over cost no more than the two.
    """
    skipped = len(more) - clusters
    inner = np.append(more, end)[skipped + 1:][:len(fewer)]
    place = int(np.argmax(inner <= np.append(fewer[1:], end)))
    return np.concatenate((fewer[:place + 1], more[place + skipped + 1:]))


def _run(searches: list[_Search]) -> None:
    """Brings every search to its end, side by side."""
    while searches:
        mass, first, second = (np.concatenate([getattr(search, name) for search in searches]) for name in
                               ("mass", "first", "second"))
        ends = np.cumsum([search.nodes + 1 for search in searches]) - 1
        starts = ends - [search.nodes for search in searches]
        before = _shortest_paths(mass, first, second, starts, ends, np.array([search.penalty for search in searches]))
        for search, start, end in zip(searches, starts, ends, strict=True):
            path = []
            while end > start:
                end = before[end]
                path.append(end - start)
            search.learn(np.array(path[::-1], np.intp))
        searches = [search for search in searches if len(search.starts) > search.clusters]


def _shortest_paths(mass: Doubles, first: Doubles, second: Doubles, starts: Nodes, ends: Nodes, penalties: Doubles) -> Nodes:
    """Best predecessor of every node. Nodes starts[i]..ends[i] are one histogram's, whose arcs cost penalties[i] more each.

    `cost` (of the best path to a node) grows with the node. So with the nodes up to `front` solved, a node e behind it has its
    predecessor among them if by this its cost is at most cost[front + 1] + penalty: any other predecessor costs as much.
    """
    # cost less the prefix sum of second moments: cost[e] = gain[e] + second[e], and then an arc (s, e) adds
    # penalty - (first[e] - first[s])^2 / (mass[e] - mass[s]) to the gain.
    gain = np.zeros(mass.size)
    gain[starts] = -second[starts]
    before = np.zeros(mass.size, np.intp)
    before[starts] = starts

    def solve(nodes: Nodes, low: Nodes, high: Nodes) -> None:
        """gain, without the last penalty, and predecessor of some nodes, of which the latter lies in low..high."""
        lengths = high - low + 1
        offsets = np.cumsum(lengths) - lengths
        candidates = np.arange(int(lengths.sum()))
        candidates += np.repeat(low - offsets, lengths)
        moment = np.repeat(first[nodes], lengths)
        moment -= first[candidates]
        moment *= moment
        weight = np.repeat(mass[nodes], lengths)
        weight -= mass[candidates]
        moment /= weight
        total = gain[candidates]
        total -= moment
        best = np.minimum.reduceat(total, offsets)
        hits = np.flatnonzero(total == np.repeat(best, lengths))
        gain[nodes] = best
        before[nodes] = candidates[hits[np.searchsorted(hits, offsets)]]

    front = starts.copy()
    sizes = np.full(starts.size, 8)
    active = np.arange(starts.size)
    while active.size:
        known = front[active]
        size = np.minimum(sizes[active], ends[active] - known)
        offsets = np.cumsum(size) - size
        step = np.arange(1, int(size.sum()) + 1) - np.repeat(offsets, size)
        begin = np.repeat(known, size)
        nodes, last = begin + step, np.repeat(known + size, size)

        # So wide apart that the first nodes, of which only the least predecessor is known, cost about as much as the rest.
        spacing = 1 << max(0, int(np.ceil(np.log2(max(1.0, np.mean(known - before[known])) / 8))))
        chosen = np.flatnonzero((step & (spacing - 1) == 0) | (nodes == last))
        solve(nodes[chosen], before[begin[chosen]], begin[chosen])
        while spacing > 1:
            half = spacing // 2
            chosen = np.flatnonzero(step & (spacing - 1) == half)
            if chosen.size:
                low = before[nodes[chosen] - half]
                # Rounding can make the bounds of a nearly tied node cross by a step.
                high = np.maximum(low, before[np.minimum(nodes[chosen] + half, last[chosen])])
                solve(nodes[chosen], low, high)
            spacing = half

        gain[nodes] += np.repeat(penalties[active], size)
        cost = gain[nodes] + second[nodes]
        certain = cost <= np.repeat(cost[offsets] + penalties[active], size)
        reached = np.minimum.reduceat(np.where(certain, np.repeat(size, size), step - 1), offsets)
        front[active] = known + reached
        sizes[active] = np.where(reached == size, 2 * size, reached + reached // 4 + 2)
        active = active[front[active] < ends[active]]
    return before


# ---- a scale for every output channel


def _with_scales(values: NDArray[np.float16], plain: PaletteWeight, size: int, weights: Floats | None) -> PaletteWeight:
    """Scales and palettes by turns: palettes of the scaled rows, weighted so that the error is that of the rows themselves;
    then for each row the scale with the least error. The best of all rounds, of which the palettes alone are one."""
    rows = values.reshape(len(values), -1).astype(np.float32)
    importance = np.ones((1, 1), np.float32) if weights is None else weights.reshape(rows.shape).astype(np.float32)

    def error(weight: PaletteWeight) -> float:
        """Not finite where a product with a scale overflows float16."""
        with np.errstate(invalid="ignore"):
            return float((np.square(weight.dequantize().reshape(rows.shape) - rows) * importance).sum(dtype=np.float64))

    best = PaletteWeight(plain.bits, plain.palettes, plain.indices, np.ones(len(rows), np.float16))
    least = error(best)
    # Around 1, so that the palette keeps the magnitude of the weights: a scale of 1e-5 would be a subnormal float16.
    total = np.broadcast_to(importance, rows.shape).sum(axis=1)
    spread = np.sqrt((np.square(rows) * importance).sum(axis=1) / np.where(total > 0, total, 1))
    typical = float(np.sqrt(np.mean(np.square(spread, dtype=np.float64))))
    scales = _storable(spread / typical if typical else spread)
    start = plain.palettes if plain.vector > 1 else None
    for _ in range(_SCALE_ROUNDS):
        normal = np.clip(rows / scales[:, None].astype(np.float32), -65504, 65504).astype(np.float16).reshape(values.shape)
        squares = np.square(scales.astype(np.float32))[:, None] * importance
        fitted = _palettize(normal, plain.bits, size, np.broadcast_to(squares, rows.shape).reshape(values.shape), plain.vector,
                            start)
        start = fitted.palettes if plain.vector > 1 else None
        entries = fitted.dequantize().reshape(rows.shape)
        share = entries * importance
        energy = np.einsum("ij,ij->i", share, entries)
        refitted = np.einsum("ij,ij->i", share, rows) / np.where(energy > 0, energy, 1)
        scales = _storable(np.where(energy > 0, refitted, scales))
        candidate = PaletteWeight(plain.bits, fitted.palettes, fitted.indices, scales)
        if (found := error(candidate)) < least:
            best, least = candidate, found
    return best


def _storable(scales: Floats) -> NDArray[np.float16]:
    """float16 scales, positive and normal; what is not (a row of zeros) becomes 1."""
    half = scales.clip(0, 65504).astype(np.float16)
    return np.where(half < np.finfo(np.float16).tiny, np.float16(1), half)


# ---- two weights an entry


def _fit_vectors(values: NDArray[np.float16], bits: int, weights: Floats | None, start: NDArray[np.float16] | None
                 ) -> Fit:
    """Lloyd's method on pairs of rows, from `start` or from points far apart; no worse than two scalar palettes of half the
    bits."""
    pairs = _pairs(values.astype(np.float32))
    metric = None
    if weights is not None and weights.any():
        # A trace of weight where there is none, so that these too get an entry near them.
        metric = _pairs(np.maximum(weights / weights.mean(), _TRACE).astype(np.float32))
    points, mass = pairs, np.ones_like(pairs) if metric is None else metric
    if len(pairs) > _CELLS:
        points, mass = _merged(values, pairs, mass)

    entries, error = _lloyd(points, mass, _far_apart(points, mass, 1 << bits) if start is None else start.astype(np.float32))
    if start is None:
        halves = [palette[:, 0] for palette, _ in _fit_scalars([values[0::2], values[1::2]], bits // 2, (
            None if weights is None else [weights[0::2], weights[1::2]]))]
        grid = np.stack(np.meshgrid(*halves, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)
        if _error(points, mass, grid, nearest_vectors(grid, points, mass)).sum(dtype=np.float64) < error:
            entries, _ = _lloyd(points, mass, grid)
    palette = entries.astype(np.float16)
    return palette, nearest_vectors(palette, pairs, metric).reshape(len(values) // 2, *values.shape[1:])


def _pairs(rows: Singles) -> Singles:
    """[2 n, ...] -> [pairs, 2], the two of a pair from consecutive rows."""
    return np.ascontiguousarray(rows.reshape(len(rows) // 2, 2, -1).transpose(0, 2, 1)).reshape(-1, 2)


def _merged(values: NDArray[np.float16], pairs: Singles, mass: Singles) -> tuple[Singles, Singles]:
    """Weighted means and weights [cells, 2] of the pairs in each cell of a grid of 256 x 256, finer where there are more."""
    codes = np.ascontiguousarray(values).reshape(-1).view(np.uint16)
    levels, counts = _histogram(codes, None, _CELLS)
    rungs = _parts(levels, counts, 256) if len(levels) > 256 else np.arange(len(levels))
    table = np.zeros(1 << 16, np.uint16)
    table[levels.astype(np.float16).view(np.uint16)] = rungs
    table[_MINUS_ZERO] = table[0]
    places = table[pairs.astype(np.float16).view(np.uint16)]
    cells = places[:, 0] << np.uint16(8) | places[:, 1]
    sums = np.stack([np.bincount(cells, mass[:, place], _CELLS) for place in range(2)], axis=1)
    moments = np.stack([np.bincount(cells, mass[:, place] * pairs[:, place], _CELLS) for place in range(2)], axis=1)
    held = sums.any(axis=1)
    return (moments[held] / sums[held]).astype(np.float32), sums[held].astype(np.float32)


def _far_apart(points: Singles, mass: Singles, entries: int) -> Singles:
    """Entries drawn from the points, each with odds of its error by those already drawn (k-means++), by a fixed seed."""
    generator = np.random.default_rng(0)
    chosen = np.empty((entries, 2), np.float32)
    chosen[0] = points[int(mass.sum(axis=1).argmax())]
    error = np.square(points - chosen[0]) * mass
    far = error.sum(axis=1)
    for place in range(1, entries):
        odds = np.cumsum(far, dtype=np.float64)
        drawn = int(np.searchsorted(odds, generator.random() * odds[-1], side="right"))
        chosen[place] = points[min(drawn, len(points) - 1)]
        np.minimum(far, (np.square(points - chosen[place]) * mass).sum(axis=1), out=far)
    return chosen


def _lloyd(points: Singles, mass: Singles, entries: Singles) -> tuple[Singles, float]:
    """Entries after rounds of nearest points and weighted means, and their error. Unused ones move to bad points."""
    count = len(entries)
    least, best = np.inf, entries
    for _ in range(_LLOYD_ROUNDS):
        nearest_entry = nearest_vectors(entries, points, mass)
        error = _error(points, mass, entries, nearest_entry)
        total = float(error.sum(dtype=np.float64))
        gained = least - total
        if gained > 0:
            least, best = total, entries
        if gained <= _LLOYD_ENOUGH * total:
            break
        sums = np.stack([np.bincount(nearest_entry, mass[:, place], count) for place in range(2)], axis=1)
        moments = np.stack([np.bincount(nearest_entry, mass[:, place] * points[:, place], count) for place in range(2)], axis=1)
        entries = np.where(sums > 0, moments / np.where(sums > 0, sums, 1), entries).astype(np.float32)
        unused = np.flatnonzero(sums.sum(axis=1) == 0)
        worst = np.argsort(-error, kind="stable")[:len(unused)]
        entries[unused[:len(worst)]] = points[worst]
    return best, least


def _error(points: Singles, mass: Singles, entries: Singles, indices: NDArray[np.uint8]) -> Singles:
    """Squared error of each point [points]."""
    return (np.square(points - entries[indices]) * mass).sum(axis=1)

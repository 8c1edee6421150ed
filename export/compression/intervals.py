"""Optimal intervals of a histogram: what k-means is in one dimension, solved exactly.

The best clusters of sorted values are intervals: a shortest path of `clusters` arcs over the gaps between levels, where the
arc (s, e) costs the squared error of the levels s..e-1 around their mean. These costs obey the quadrangle inequality (X. Wu,
Optimal quantization by matrix searching, J. Algorithms 12, 1991), from which follows all that makes the search fast:
- The least cost is convex in the number of arcs. So the path of exactly `clusters` arcs is the shortest path of any number of
  arcs for some penalty on each, or is spliced from two such paths (Aggarwal, Schieber, Tokuyama, Finding a minimum-weight
  k-link path in graphs with the concave Monge property, Discrete & Computational Geometry 12, 1994).
- The best predecessor grows with the node. For one penalty, `_shortest_paths` solves a block of nodes at a time: widely spaced
  ones first, then those in between. Histograms are solved side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Nodes = NDArray[np.intp]
Histogram = tuple[Doubles, Doubles]  # levels ascending, and the mass of each, which is positive

_ROUGH = 16  # levels a cluster of the merged histogram that gives the first penalty
_AT_ONCE = 640_000  # levels whose paths are searched side by side: few calls of numpy, each on about as much as caches hold
_PROBES = 32  # of the end of a block, at once
_GUESSES = 4  # penalties tried by extrapolation before the secant, which cannot fail


def optimal_intervals(histograms: Sequence[Histogram], clusters: int) -> list[Nodes]:
    """First level of each of the at most `clusters` intervals with the least squared error around their weighted means, for
    every histogram. A histogram's result does not depend on the others."""
    searches = [_Search(levels, mass, clusters) for levels, mass in histograms]
    open_ones = [search for search in searches if search.nodes > clusters]
    rough = [(search, search.merged()) for search in open_ones if search.nodes >= 4 * _ROUGH * clusters]
    rough = [(search, merged) for search, merged in rough if merged.nodes > clusters]
    _finish([merged for _, merged in rough])
    for search, merged in rough:
        search.penalty = merged.penalty
    _finish(open_ones)
    return [search.starts for search in searches]


def parts(levels: Doubles, mass: Doubles, count: int) -> Nodes:
    """Number of the interval that each level falls into, of at most `count` that a good palette would about have."""
    density = _density(levels, mass)
    return np.minimum(density / density[-1] * count, count - 1).astype(np.intp)


def _density(levels: Doubles, mass: Doubles) -> Doubles:
    """About how many intervals of a good palette end up to each level, times a factor: the integral of density^(1/3) (Panter
    and Dite, Quantization distortion in pulse-count modulation with nonuniform spacing of levels, Proc. IRE 39, 1951)."""
    width = np.empty_like(levels)  # to half-way to the neighbours; at the ends as if there were neighbours as far away
    if len(levels) > 1:
        gaps = np.diff(levels)
        width[0], width[-1] = gaps[0], gaps[-1]
        width[1:-1] = (gaps[1:] + gaps[:-1]) / 2
    else:
        width[:] = 1
    width *= width
    width *= mass
    return np.cumsum(np.cbrt(width))


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
        moments = share * centred
        self.nodes = len(levels)
        self.mass = np.concatenate(([0.0], total))
        self.first = _from_node(median, moments)
        self.second = _from_node(median, moments * centred)
        self.clusters = clusters
        self.starts = self.more = np.arange(self.nodes, dtype=np.intp)
        self.fewer = np.zeros(1, np.intp)
        # Many clusters err by (integral of density^(1/3))^3 / 12 clusters^2; less its derivative.
        self.density = _density(levels, share)
        self.penalty = float(self.density[-1] ** 3 / (6 * clusters**3))
        self._trials = 0
        self._secant = False

    def merged(self) -> _Search:
        """The same search among fewer levels, each of which stands for several."""
        count = _ROUGH * self.clusters
        firsts = np.unique(np.searchsorted(self.density[:-1], self.density[-1] / count * np.arange(count)))
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


def _finish(searches: list[_Search]) -> None:
    """Brings every search to its end."""
    while searches:
        blocks = np.cumsum([search.nodes for search in searches]) // _AT_ONCE
        for block in np.unique(blocks):
            together = [searches[place] for place in np.flatnonzero(blocks == block)]
            for search, starts in zip(together, _solve_side_by_side(together), strict=True):
                search.learn(starts)
        searches = [search for search in searches if len(search.starts) > search.clusters]


def _solve_side_by_side(searches: Sequence[_Search]) -> list[Nodes]:
    """First levels of the intervals that are the shortest path of every search for its penalty."""
    mass, first, second = (np.concatenate([getattr(search, name) for search in searches])
                           for name in ("mass", "first", "second"))
    ends = np.cumsum([search.nodes + 1 for search in searches]) - 1
    begins = ends - [search.nodes for search in searches]
    before = _shortest_paths(mass, first, second, begins, ends, np.array([search.penalty for search in searches]))
    paths = []
    for begin, node in zip(begins, ends, strict=True):
        path = []
        while node > begin:
            node = before[node]
            path.append(node - begin)
        paths.append(np.array(path[::-1], np.intp))
    return paths


def _shortest_paths(mass: Doubles, first: Doubles, second: Doubles, starts: Nodes, ends: Nodes, penalties: Doubles) -> Nodes:
    """Best predecessor of every node. Nodes starts[i]..ends[i] are one histogram's, whose arcs cost penalties[i] more each.

    The cost of the best path to a node grows with the node. So with the nodes up to `front` solved, a node e behind it has its
    predecessor among them if by this its cost is at most cost[front + 1] + penalty: any other predecessor costs as much.
    """
    paths = _Paths(mass, first, second, starts)
    front = starts.copy()
    sizes = np.full(starts.size, 8)
    active = np.arange(starts.size)
    while active.size:
        known, penalty = front[active], penalties[active]
        size = np.minimum(sizes[active], ends[active] - known)
        paths.solve_block(known, size, penalty)
        reached = paths.certain(known, size, penalty)
        front[active] = known + reached
        sizes[active] = np.where(reached == size, 2 * size, reached + reached // 8 + 2)
        active = active[front[active] < ends[active]]
    return paths.before


class _Paths:
    """The cheapest paths to the nodes of many histograms, as far as they are known.

    gain: cost of the path less the prefix sum of second moments, so that the arc (s, e) adds to it
          penalty - (first[e] - first[s])^2 / (mass[e] - mass[s])
    """

    def __init__(self, mass: Doubles, first: Doubles, second: Doubles, starts: Nodes) -> None:
        self.mass, self.first, self.second = mass, first, second
        self.gain = np.zeros(mass.size)
        self.gain[starts] = -second[starts]
        self.before = np.zeros(mass.size, np.intp)
        self.before[starts] = starts

    def solve_block(self, known: Nodes, size: Nodes, penalty: Doubles) -> None:
        """The nodes known[i] + 1 ... known[i] + size[i] of every histogram, with predecessors up to known[i]."""
        # So wide apart that the first nodes, of which only the least predecessor is known, cost about as much as the rest.
        spacing = 1 << max(0, int(np.ceil(np.log2(max(1.0, np.mean(known - self.before[known])) / 8))))
        last = known + size
        counts = -(-size // spacing)
        begin = np.repeat(known, counts)
        nodes = np.minimum(_ladders(known + spacing, counts, spacing), np.repeat(last, counts))
        self._solve(nodes, self.before[begin], begin, np.repeat(penalty, counts))
        while spacing > 1:
            half = spacing // 2
            counts = (size + half) // spacing
            nodes = _ladders(known + half, counts, spacing)
            low = self.before[nodes - half]
            # Rounding can make the bounds of a nearly tied node cross by a step.
            high = np.maximum(low, self.before[np.minimum(nodes + half, np.repeat(last, counts))])
            self._solve(nodes, low, high, np.repeat(penalty, counts))
            spacing = half

    def _solve(self, nodes: Nodes, low: Nodes, high: Nodes, penalty: Doubles) -> None:
        """gain and predecessor of some nodes, of which the latter lies in low..high."""
        if not nodes.size:
            return
        lengths = high - low + 1
        offsets = np.cumsum(lengths) - lengths
        candidates = np.repeat(low - offsets, lengths)
        candidates += np.arange(candidates.size)
        moment = np.repeat(self.first.take(nodes), lengths)
        moment -= self.first.take(candidates)
        moment *= moment
        weight = np.repeat(self.mass.take(nodes), lengths)
        weight -= self.mass.take(candidates)
        moment /= weight
        total = self.gain.take(candidates)
        total -= moment
        best = np.minimum.reduceat(total, offsets)
        hits = np.flatnonzero(total == np.repeat(best, lengths))
        if hits.size > nodes.size:  # ties: the first of each node
            hits = hits[np.searchsorted(hits, offsets)]
        self.gain[nodes] = best + penalty
        self.before[nodes] = candidates.take(hits)

    def certain(self, known: Nodes, size: Nodes, penalty: Doubles) -> Nodes:
        """How many nodes of a block have their best predecessor among the known ones. Costs grow, so it is searched for by
        probes, ever closer together."""
        limit = self.gain[known + 1] + self.second[known + 1] + penalty
        least, beyond = np.ones_like(size), size + 1
        while (beyond - least).max() > 1:
            apart = -(-(beyond - least) // _PROBES)
            steps = least[:, None] + apart[:, None] * np.arange(1, _PROBES + 1)
            nodes = known[:, None] + np.minimum(steps, beyond[:, None] - 1)
            below = np.count_nonzero(self.gain.take(nodes) + self.second.take(nodes) <= limit[:, None], axis=1)
            beyond = np.minimum(least + apart * (below + 1), beyond)
            least = np.minimum(least + apart * below, beyond - 1)
        return least


def _ladders(firsts: Nodes, counts: Nodes, spacing: int) -> Nodes:
    """counts[i] numbers from firsts[i] on, `spacing` apart, one ladder after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - spacing * before, counts) + np.arange(0, spacing * int(counts.sum()), spacing)

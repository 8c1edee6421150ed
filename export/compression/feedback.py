"""Error feedback: columns are rounded in order of importance, and those still to come make up for each one's rounding error.

On inputs x with second moments H = mean x x^T, an error E of a weight [out, in] makes the weighted squared output error
sum_o s_o E_o H E_o^T. With H = (I + U) D (I + U)^T, U strictly upper triangular and D diagonal, that is the sum over columns of
D_k |(E + E U)_k|^2, and (E + E U)_k is the rounding error of column k where it is rounded as w_k + sum_{j<k} E_j U_jk. This is
GPTQ (Frantar et al. 2022) in the form of LDLQ (Chee et al. 2023, QuIP, theorem 2): one Cholesky factor, no inverse. D_k is what
an error of column k costs once the later columns have made up for what they can, so it weights the columns where palettes and
scales are fitted.

Then by turns: each column is rounded again given all others, best at w_k + sum_{j != k} E_j H_jk / H_kk; and with the codes
fixed, entries or scales solve the linear least squares that is left (conjugate gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky

from export.compression.integers import fit_scales, integer_range, quantize, storable_scales
from export.compression.palettes import nearest_vectors, palettize
from export.compression.schemes import IntegerScheme, PaletteScheme
from export.compression.stored import IntegerWeight, PaletteWeight, StoredWeight
from export.errors import UserError

Array = NDArray[np.float64]  # what is solved for
Matrix = NDArray[np.float32]  # what is multiplied: errors of a part in 10^7 are lost in rounding
Codes = NDArray[np.uint8] | NDArray[np.int8]

# Share of the moments' mean diagonal that is added to their diagonal, and what that share grows by for every input a sample. Of
# the shares 0.001 to 1 the best compromise on prompts not calibrated on; few samples tell little of how inputs go together.
DAMPING = 0.02
DAMPING_PER_INPUT = 0.01
CLEARLY = 0.7  # of what the weighted palette alone leaves: where feedback gains so little, an unweighted one may be better
SPAN = 128  # columns between two matrix products; within, a column waits for the one before it
TURNS = 2  # of fitting entries or scales, then codes
# Values from which on a weight is swept once, then fitted, and not turned, and a fit takes one step. In the mean of a scheme
# flash-mini's weights would lose 0.1 to 0.4 dB without turns, and at most 0.07 by the fits.
LARGE = 1 << 20
STEPS = 4  # of conjugate gradients in one fit
FIT_ROWS = 512  # rows that the entries of one palette are fitted to


def store_with_feedback(
    name: str,
    values: NDArray[np.floating],
    scheme: PaletteScheme | IntegerScheme,
    moments: NDArray[np.floating],
    sensitivity: NDArray[np.floating] | None = None,
    samples: int | None = None,
) -> StoredWeight:
    """The stored weight of values [out, in...] with a small `objective`: never more than that of plain rounding.

    moments: [in, in], mean of x x^T over calibration inputs (a convolution's patches in the order of values.reshape(out, -1)),
        or `centre`d ones where the module's bias is corrected afterwards. An input that was always 0 is rounded plainly.
    sensitivity: [out], importance of a squared error of each output; all equal if None.
    samples: inputs that the moments are the mean of; as good as endless if None.
    Raises UserError naming the weight where the scheme cannot hold it or the statistics do not fit it.
    """
    out = values.shape[0]
    rows = np.ones(out) if sensitivity is None else sensitivity.astype(np.float64)
    matrix = values.reshape(out, -1).astype(np.float32)
    _check(name, matrix, moments, rows)
    try:
        curvature = _Curvature.of(moments.astype(np.float64), _damping(matrix.shape[1], samples))
        start: StoredWeight
        codebook: _Codebook
        if isinstance(scheme, PaletteScheme):
            if (largest := np.abs(matrix).max()) > np.finfo(np.float16).max:
                raise ValueError(f"{largest:g} is more than float16 can hold")
            half = values.astype(np.float16)
            importance = (rows[:, None] * curvature.in_place(curvature.cost)).reshape(values.shape)
            start = palettize(half, scheme.bits, scheme.group, importance, scheme.scaled, scheme.vector)
            codebook = _Palettes(start, rows)
        else:
            start = quantize(values, scheme.bits, scheme.block, scheme.bfloat16_scales)
            codebook = _Integers(matrix, scheme, curvature)
    except ValueError as error:
        raise UserError(f"{name} {list(values.shape)}: {error}") from None

    def loss_of(weight: StoredWeight) -> float:
        error = matrix - weight.dequantize().reshape(matrix.shape)
        return (_weighted_loss if matrix.size >= LARGE else objective)(error, moments, rows)

    best, least = start, loss_of(start)
    enough = CLEARLY * least
    for codes in _descend(np.ascontiguousarray(matrix.T[curvature.order]), codebook, curvature, rows):
        candidate = codebook.stored(curvature.in_place(codes), values.shape)
        loss = loss_of(candidate)
        if loss < least:
            best, least = candidate, loss
    if least > enough and isinstance(scheme, PaletteScheme):
        plain = palettize(half, scheme.bits, scheme.group, None, scheme.scaled, scheme.vector)
        return min(best, plain, key=loss_of)
    return best


def objective(
    error: NDArray[np.floating], moments: NDArray[np.floating], sensitivity: NDArray[np.floating] | None = None
) -> float:
    """sum_o sensitivity[o] E_o moments E_o^T of a weight's error [out, in...]: the mean weighted squared output error."""
    return _weighted_loss(error.astype(np.float64), moments, sensitivity)


def _weighted_loss(
    error: NDArray[np.floating], moments: NDArray[np.floating], sensitivity: NDArray[np.floating] | None
) -> float:
    """`objective`, multiplied in the error's own precision."""
    rows = error.reshape(error.shape[0], -1)
    losses = ((rows @ moments.astype(rows.dtype)) * rows).sum(axis=1, dtype=np.float64)
    return float(losses.sum() if sensitivity is None else sensitivity.astype(np.float64) @ losses)


def column_costs(moments: NDArray[np.floating], samples: int | None = None) -> Array:
    """[in]: what a squared rounding error of each input column costs once the later columns have made up for what they can.

    It is the diagonal of D: with e the errors of plain rounding, sum_o s_o sum_k D_k e_ok^2 is what error feedback leaves (Chee
    et al. 2023, theorem 2), where rounding errors are independent of each other.
    """
    exact = moments.astype(np.float64)
    order = _order(exact)
    factor = _factor(_reverse(exact, order, _damping(len(moments), samples)))
    return _in_place(order, np.square(factor.diagonal()))


def centre(moments: NDArray[np.floating], mean: NDArray[np.floating]) -> Array:
    """moments - mean mean^T: the second moments that count where a bias takes the mean error out (correction.py)."""
    exact = mean.astype(np.float64)
    return moments.astype(np.float64) - np.outer(exact, exact)


def _damping(inputs: int, samples: int | None) -> float:
    return DAMPING + (DAMPING_PER_INPUT * inputs / samples if samples else 0)


def _check(name: str, matrix: Matrix, moments: NDArray[np.floating], rows: Array) -> None:
    out, row = matrix.shape
    if not np.isfinite(matrix).all():
        raise UserError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
    if moments.shape != (row, row) or rows.shape != (out,):
        shapes = f"moments {list(moments.shape)} and sensitivity {list(rows.shape)}"
        raise UserError(f"the statistics of {name} [{out}, {row}] do not fit: {shapes}; calibrate again")
    if not np.isfinite(moments).all() or not np.isfinite(rows).all() or rows.min() < 0:
        raise UserError(f"the statistics of {name} are not finite or have a negative sensitivity; calibrate again")


@dataclass(frozen=True, eq=False)
class _Curvature:
    """Damped second moments H, columns in the order of rounding: those of largest diagonal first (act-order).

    order: [in], the column at each place; damped: H; feedback: U; cost: the diagonal of D
    """

    order: NDArray[np.intp]
    damped: Matrix
    feedback: Matrix
    cost: Array

    @classmethod
    def of(cls, moments: Array, damping: float) -> _Curvature:
        order = _order(moments)
        reverse = _reverse(moments, order, damping)
        damped = reverse[::-1, ::-1].astype(np.float32)
        factor = _factor(reverse)
        feedback = factor.astype(np.float32)
        feedback /= feedback.diagonal().copy()
        np.fill_diagonal(feedback, 0)
        return cls(order, damped, feedback, np.square(factor.diagonal()))

    def descent(self) -> Matrix:
        """H_jk / H_kk, 0 where j = k."""
        coupling = self.damped / self.damped.diagonal()
        np.fill_diagonal(coupling, 0)
        return coupling

    def in_place(self, ordered: NDArray) -> NDArray:
        return _in_place(self.order, ordered)


def _order(moments: Array) -> NDArray[np.intp]:
    return np.argsort(-moments.diagonal(), kind="stable")


def _in_place(order: NDArray[np.intp], ordered: NDArray) -> NDArray:
    """Columns (axis 0) back where the weight has them."""
    back = np.empty_like(ordered)
    back[order] = ordered
    return back


def _reverse(moments: Array, order: NDArray[np.intp], damping: float) -> Array:
    """H with the last column first."""
    back = order[::-1]
    damped = moments[np.ix_(back, back)]
    np.fill_diagonal(damped, damped.diagonal() + damping * (moments.diagonal().mean() or 1.0))
    return damped


def _factor(reverse: Array) -> Array:
    """R, upper triangular: H = R R^T. LAPACK's factor is lower triangular, so that of the reverse, reversed, is the upper one.

    Overwrites its argument.
    """
    return cholesky(reverse.T, lower=True, overwrite_a=True, check_finite=False)[::-1, ::-1]


class _Codebook(Protocol):
    """What a scheme lets weights be: a code each, and values linear in what they share. Columns (axis 0) are in the order of
    rounding, rows on axis 1; codes are [in, out], or [in, out / vector]."""

    def blank(self, columns: int) -> Codes: ...

    def round(self, column: int, target: Matrix) -> tuple[NDArray[np.integer], Matrix]:
        """Codes of the values nearest to target [out], and those values."""
        ...

    def values(self, codes: Codes) -> Matrix: ...

    def refit(self, codes: Codes, weights: Matrix, damped: Matrix, rows: Array) -> None:
        """Moves what weights share to the least loss that these codes allow. May renumber the codes in place."""
        ...

    def stored(self, codes: Codes, shape: tuple[int, ...]) -> StoredWeight:
        """The stored weight of `shape`, from codes with the columns where the weight has them."""
        ...


class _Palettes:
    """entries [groups, 2**bits, vector], ascending where vector is 1; scales [out], all 1 where the scheme has none."""

    def __init__(self, start: PaletteWeight, rows: Array) -> None:
        self.start = start
        self._settle(start.palettes.astype(np.float32))
        units = start.shape[0] // start.vector
        self.scales = np.ones(start.shape[0], np.float32) if start.scales is None else start.scales.astype(np.float32)
        # Entries of all groups lie in one table; `base` is where those of each row (or pair of rows) begin.
        self.base = np.repeat(np.arange(start.groups) << start.bits, units // start.groups)
        self.rows = np.maximum(rows, np.finfo(np.float32).eps * rows.max() or 1.0)  # nearest pairs need some weight

    def blank(self, columns: int) -> Codes:
        return np.zeros((columns, len(self.base)), np.uint8)

    def round(self, column: int, target: Matrix) -> tuple[NDArray[np.integer], Matrix]:
        unscaled = target / self.scales
        index = self._nearest(unscaled) if self.start.vector == 1 else self._nearest_vectors(unscaled)
        values = self.entries.reshape(-1, self.start.vector)[index].reshape(-1)
        return index - self.base, values * self.scales

    def _nearest(self, target: Matrix) -> NDArray[np.intp]:
        """Place in the table, by bisection in the palettes of all rows at once; the lower of two as near."""
        index, step = self.base.copy(), 1 << (self.start.bits - 1)
        while step:
            index += step * (target > self.middles[index + (step - 1)])
            step >>= 1
        return index

    def _nearest_vectors(self, target: Matrix) -> NDArray[np.intp]:
        vector = self.start.vector
        parts = [part.reshape(self.start.groups, -1, vector) for part in (target, self.rows * np.square(self.scales))]
        found = [nearest_vectors(palette.astype(np.float16), values, weights)
                 for palette, values, weights in zip(self.entries, *parts, strict=True)]
        return self.base + np.concatenate(found)

    def values(self, codes: Codes) -> Matrix:
        table = self.entries.reshape(-1, self.start.vector)
        return table[codes + self.base].reshape(len(codes), -1) * self.scales

    def refit(self, codes: Codes, weights: Matrix, damped: Matrix, rows: Array) -> None:
        vector, shape = self.start.vector, self.entries.shape
        units = np.arange(0, len(self.base), max(1, weights.shape[1] // shape[0] // FIT_ROWS))
        places = np.arange(vector)
        picked = (units[:, None] * vector + places).reshape(-1)
        slots = ((codes[:, units] + self.base[units])[:, :, None] * vector + places).reshape(len(codes), -1)
        found = _least_squares(
            self.entries.reshape(shape[0], -1),
            lambda entries: entries.reshape(-1)[slots],
            lambda values: np.bincount(slots.reshape(-1), values.reshape(-1), self.entries.size).astype(np.float64),
            self.scales[picked],
            weights[:, picked],
            damped,
            rows[picked],
        )
        entries = found.astype(np.float16).astype(np.float32).reshape(shape)
        if vector == 1:
            order = np.argsort(entries, axis=1, kind="stable")
            entries = np.take_along_axis(entries, order, axis=1)
            codes[:] = np.argsort(order, axis=1, kind="stable").reshape(-1)[codes + self.base]
        self._settle(entries)
        if self.start.scales is not None:
            unscaled = self.values(codes) / self.scales
            scales = _least_squares(self.scales[:, None], lambda scales: scales.T, _column_sum, unscaled, weights, damped, rows)
            half = scales[:, 0].clip(0, 65504).astype(np.float16).astype(np.float32)
            self.scales = np.where(half < np.finfo(np.float16).tiny, self.scales, half)

    def _settle(self, entries: Matrix) -> None:
        self.entries = entries
        table = entries.reshape(-1)
        self.middles = (table[1:] + table[:-1]) / 2  # of use where vector is 1, and then within a group

    def stored(self, codes: Codes, shape: tuple[int, ...]) -> PaletteWeight:
        indices = np.ascontiguousarray(codes.T, np.uint8).reshape(-1, *shape[1:])
        scales = None if self.start.scales is None else self.scales.astype(np.float16)
        return PaletteWeight(self.start.bits, self.entries.astype(np.float16), indices, scales)


class _Integers:
    """scales [out, blocks]: settled before the first column, so that columns of any block may be rounded in any order."""

    def __init__(self, matrix: Matrix, scheme: IntegerScheme, curvature: _Curvature) -> None:
        self.scheme = scheme
        self.curvature = curvature
        size = scheme.block or matrix.shape[1]
        self.block = curvature.order // size
        cost = curvature.in_place(curvature.cost).reshape(-1, size)
        self.scales = fit_scales(matrix.reshape(len(matrix), -1, size), scheme.bits, scheme.bfloat16_scales, cost)

    def blank(self, columns: int) -> Codes:
        return np.zeros((columns, len(self.scales)), np.int8)

    def round(self, column: int, target: Matrix) -> tuple[NDArray[np.integer], Matrix]:
        scale = self.scales[:, self.block[column]]
        codes = np.clip(np.rint(target / scale), *integer_range(self.scheme.bits))
        return codes.astype(np.int8), codes * scale

    def values(self, codes: Codes) -> Matrix:
        return codes * self._spread(self.scales)

    def refit(self, codes: Codes, weights: Matrix, damped: Matrix, rows: Array) -> None:
        slope = codes.astype(np.float32)
        scales = _least_squares(self.scales, self._spread, self._gather, slope, weights, damped, rows)
        positive = np.where(scales > 0, scales, self.scales).astype(np.float32)
        self.scales = storable_scales(positive, self.scheme.bfloat16_scales)

    def _spread(self, scales: Matrix) -> Matrix:
        return scales.T[self.block]

    def _gather(self, values: Matrix) -> Array:
        blocks = self.curvature.in_place(values).reshape(self.scales.shape[1], -1, len(self.scales))
        return blocks.sum(axis=1, dtype=np.float64).T

    def stored(self, codes: Codes, shape: tuple[int, ...]) -> IntegerWeight:
        ints = np.ascontiguousarray(codes.T, np.int8).reshape(shape)
        return IntegerWeight(self.scheme.bits, ints, self.scales, 2 if self.scheme.bfloat16_scales else 4)


def _descend(weights: Matrix, codebook: _Codebook, curvature: _Curvature, rows: Array) -> Iterator[Codes]:
    """Codes [in, out] after the first sweep and after each turn, each with less damped loss; the same array every time."""
    codes = codebook.blank(len(weights))
    errors = np.zeros_like(weights)
    _sweep(weights, errors, codes, codebook, curvature.feedback, first=True)
    if weights.size >= LARGE:
        codebook.refit(codes, weights, curvature.damped, rows)
        yield codes
        return
    coupling = curvature.descent()
    for turn in range(TURNS + 1):
        if turn:
            codebook.refit(codes, weights, curvature.damped, rows)
            errors = weights - codebook.values(codes)
        _sweep(weights, errors, codes, codebook, coupling, first=False)
        yield codes


def _sweep(weights: Matrix, errors: Matrix, codes: Codes, codebook: _Codebook, coupling: Matrix, first: bool) -> None:
    """Rounds every column k at w_k + sum_j errors_j coupling_jk, and renews its errors and codes in place.

    weights, errors: [in, out]. first: the errors are 0 and `coupling` is upper triangular.
    """
    for start in range(0, len(weights), SPAN):
        span = slice(start, start + SPAN)
        within = np.ascontiguousarray(coupling[span, span].T)
        before = slice(0, start) if first else slice(None)
        targets = weights[span] + coupling[before, span].T @ errors[before] - within @ errors[span]
        for place, target in enumerate(targets):
            column = start + place
            codes[column], values = codebook.round(column, target + within[place] @ errors[span])
            errors[column] = weights[column] - values


def _least_squares(
    parameters: Matrix,
    spread: Callable[[Matrix], Matrix],
    gather: Callable[[Matrix], Array],
    slope: Matrix,
    weights: Matrix,
    damped: Matrix,
    rows: Array,
) -> Array:
    """Parameters [systems, unknowns] nearer to the least weighted loss of weights - slope * spread(parameters), [in, out].

    `gather` is the transpose of `spread`. Conjugate gradients, preconditioned by the diagonal, for all systems side by side.
    """

    weighted = slope * rows.astype(np.float32)

    def pull(values: Matrix) -> Array:
        return gather((damped @ values) * weighted).reshape(parameters.shape)

    def push(values: Array) -> Matrix:
        return slope * spread(values.astype(np.float32))

    diagonal = gather(damped.diagonal()[:, None] * slope * weighted).reshape(parameters.shape)
    inverse = np.divide(1, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
    found = parameters.astype(np.float64)
    residual = pull(weights - push(found))
    direction = inverse * residual
    power = (residual * direction).sum(axis=1, keepdims=True)
    enough = 1e-6 * power
    for _ in range(1 if weights.size >= LARGE else STEPS):
        image = pull(push(direction))
        bend = (direction * image).sum(axis=1, keepdims=True)
        length = np.divide(power, bend, out=np.zeros_like(power), where=(bend > 0) & (power > enough))
        found += length * direction
        residual -= length * image
        step = inverse * residual
        last, power = power, (residual * step).sum(axis=1, keepdims=True)
        if (power <= enough).all():
            break
        direction = step + np.divide(power, last, out=np.zeros_like(power), where=last > 0) * direction
    return found


def _column_sum(values: Matrix) -> Array:
    return values.sum(axis=0, dtype=np.float64)

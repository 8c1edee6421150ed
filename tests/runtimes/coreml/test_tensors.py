"""Operations that move, make, order or index elements, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.runtimes.coreml.cases import RNG, Case, bits, check, ints, normal, unary
from tests.runtimes.coreml.mil import mb, types

X = normal(2, 3, 4)
IMAGE = normal(2, 8, 4, 6)


def tf_depth_to_space(x: Tensor) -> Tensor:
    """Element by element: output channel c at (2y + i, 2x + j) is input channel (2i + j) * channels + c at (y, x)."""
    n, c, h, w = x.shape
    out = torch.zeros(n, c // 4, 2 * h, 2 * w, dtype=x.dtype)
    for i in range(2):
        for j in range(2):
            first = (2 * i + j) * (c // 4)
            out[:, :, i::2, j::2] = x[:, first : first + c // 4]
    return out


def tf_space_to_batch(x: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, 1, 1))
    return torch.cat([padded[:, :, i::2, j::3] for i in range(2) for j in range(3)])


def tf_batch_to_space(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    out = torch.zeros(n // 6, c, 2 * h, 3 * w, dtype=x.dtype)
    for i in range(2):
        for j in range(3):
            block = (3 * i + j) * (n // 6)
            out[:, :, i::2, j::3] = x[block : block + n // 6]
    return out[:, :, 1:-1, : 3 * w - 2]


SHAPING = [
    unary("reshape", lambda x: x.reshape(4, 6), X, shape=[4, 6]),
    unary("reshape", lambda x: x.reshape(2, 12), X, shape=[2, -1]),
    Case("reshape-zero", {"x": X}, lambda x: mb.reshape(x=x, shape=[0, -1, 2]), lambda x: x.reshape(2, 6, 2), 7),
    unary("reshape", lambda x: x.reshape(1, 2, 3, 4), X, shape=[1, -1, 0, 0]),
    unary("reshape", lambda x: x.reshape(1, 1, 6, 4), X, shape=[0, 1, -1, 0]),
    Case(
        "reshape-computed",
        {"x": X, "y": normal(3, 8)},
        lambda x, y: mb.reshape(x=x, shape=mb.shape(x=y)),
        lambda x, _: x.reshape(3, 8),
    ),
    Case(
        "reshape_like",
        {"x": normal(6, 2), "a": normal(3, 5), "b": normal(7, 4)},
        lambda x, a, b: mb.reshape_like(x=x, ref_tensors=(a, b), begins=(0, 1), ends=(1, 0), end_masks=(False, True)),
        lambda x, *_: x.reshape(3, 4),
    ),
    unary("flatten2d", lambda x: x.reshape(2, 12), X),
    unary("flatten2d", lambda x: x.reshape(6, 4), X, axis=-1),
    unary("expand_dims", lambda x: x.reshape(1, 2, 3, 4, 1), X, axes=[0, -1]),
    unary("expand_dims", lambda x: x.reshape(2, 1, 1, 3, 4), X, axes=[2, 1]),
    unary("squeeze", lambda x: x.reshape(3, 4), normal(1, 3, 1, 4)),
    unary("squeeze", lambda x: x.reshape(1, 3, 4), normal(1, 3, 1, 4), axes=[-2]),
    unary("squeeze", lambda x: x.reshape(3, 1, 4), normal(1, 3, 1, 4), axes=[0]),
    unary("transpose", lambda x: x.permute(2, 0, 1), X, perm=[-1, 0, 1]),
    unary("shape", lambda x: torch.tensor(x.shape), X),
    unary("tile", lambda x: x.repeat(1, 2, 3), X, reps=[1, 2, 3]),
    unary("reverse", lambda x: x.flip(0, 1, 2), X),
    unary("reverse", lambda x: x.flip(-1), X, axes=[-1]),
    Case(
        "reverse_sequence",
        {"x": normal(3, 5, 2)},
        lambda x: mb.reverse_sequence(x=x, lengths=[2, 5, 0], seq_axis=1, batch_axis=0),
        lambda x: torch.stack([torch.cat((row[:n].flip(0), row[n:])) for row, n in zip(x, (2, 5, 0), strict=True)]),
    ),
    unary("sliding_windows", lambda x: x.unfold(1, 2, 1).permute(0, 1, 3, 2), X, axis=1, size=2),
    unary("sliding_windows", lambda x: x.unfold(2, 2, 2), X, axis=-1, size=2, stride=2),
    Case(
        "concat",
        {"x": X, "y": normal(2, 5, 4)},
        lambda x, y: mb.concat(values=(x, y), axis=-2),
        lambda x, y: torch.cat((x, y), 1),
    ),
    Case("concat-one", {"x": X}, lambda x: mb.concat(values=(x,), axis=0), lambda x: x),
    Case(
        "concat-interleaved",
        {"x": X, "y": normal(2, 3, 4)},
        lambda x, y: mb.concat(values=(x, y), axis=1, interleave=True),
        lambda x, y: torch.stack([each for i in range(3) for each in (x[:, i], y[:, i])], 1),
    ),
    Case(
        "stack",
        {"x": X, "y": normal(2, 3, 4)},
        lambda x, y: mb.stack(values=(x, y), axis=-1),
        lambda x, y: torch.stack((x, y), -1),
    ),
    unary("split", lambda x: x.chunk(2, -1), X, num_splits=2, axis=-1),
    unary("split", lambda x: x.split([1, 2], 1), X, split_sizes=[1, 2], axis=1),
    unary("split", lambda x: x.split([3, 1], 2), X, num_splits=2, split_sizes=[3, 1], axis=2),
    unary("depth_to_space", tf_depth_to_space, IMAGE, block_size=2),
    unary("space_to_depth", lambda x: torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1), IMAGE, block_size=2),
    unary("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE, upscale_factor=2),
    unary("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), IMAGE, downscale_factor=np.uint32(2)),
    unary("space_to_batch", tf_space_to_batch, IMAGE, block_shape=[2, 3], paddings=[[1, 1], [0, 0]]),
    unary("batch_to_space", tf_batch_to_space, normal(12, 2, 3, 4), block_shape=[2, 3], crops=[[1, 1], [0, 2]]),
]


def sliced(name: str, *places: Any, x: np.ndarray = X, **options: Any) -> Case:
    return Case(
        f"slice-{name}",
        {"x": x},
        lambda x: mb.slice_by_index(x=x, **options),
        lambda x: torch.from_numpy(x.numpy()[places].copy()),
    )


def updated(name: str, *places: Any, **options: Any) -> Case:
    update = normal(*X[places].shape)

    def expected(x: Tensor) -> Tensor:
        result = x.numpy().copy()
        result[places] = update
        return torch.from_numpy(result)

    return Case(f"slice_update-{name}", {"x": X}, lambda x: mb.slice_update(x=x, update=update, **options), expected)


SLICES = [
    sliced("plain", slice(0, 2), slice(1, 3), slice(0, 4, 2), begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2]),
    sliced("negative", slice(0, 2), slice(-2, -1), slice(-3, 4), begin=[0, -2, -3], end=[2, -1, 4]),
    sliced(
        "backwards",
        slice(None),
        slice(2, 0, -1),
        slice(None, None, -2),
        begin=[0, 2, 0],
        end=[0, 0, 0],
        stride=[1, -1, -2],
        begin_mask=[True, False, True],
        end_mask=[True, False, True],
    ),
    sliced(
        "masks",
        slice(None),
        slice(1, None),
        slice(None, 3),
        begin=[9, 1, 9],
        end=[9, 9, 3],
        begin_mask=[True, False, True],
        end_mask=[True, True, False],
    ),
    sliced(
        "squeezed",
        1,
        slice(None),
        -1,
        begin=[1, 0, -1],
        end=[0, 0, 0],
        begin_mask=[False, True, False],
        end_mask=[False, True, False],
        squeeze_mask=[True, False, True],
    ),
    sliced("int32", slice(1, 3), x=ints(-5, 5, 6), begin=[1], end=[3]),
    unary("slice_by_size", lambda x: x[1:, 1:3, :2], X, begin=[1, 1, 0], size=[1, 2, 2]),
    unary("slice_by_size", lambda x: x[:, 1:, -2:], X, begin=[0, 1, -2], size=[2, -1, 2]),
    updated("plain", slice(0, 1), slice(1, 3), slice(0, 4, 2), begin=[0, 1, 0], end=[1, 3, 4], stride=[1, 1, 2]),
    updated(
        "backwards",
        slice(None),
        slice(None),
        slice(3, 0, -1),
        begin=[0, 0, 3],
        end=[0, 0, 0],
        stride=[1, 1, -1],
        begin_mask=[True, True, False],
        end_mask=[True, True, False],
    ),
    updated(
        "squeezed",
        slice(None),
        1,
        slice(None),
        begin=[0, 1, 0],
        end=[0, 0, 0],
        begin_mask=[True, False, True],
        end_mask=[True, False, True],
        squeeze_mask=[False, True, False],
    ),
]

TABLE = normal(4, 5, 3)
BATCHED = ints(0, 5, 4, 2)


def scattered(mode: str, start: np.ndarray, places: Any, updates: np.ndarray) -> Tensor:
    """numpy's unbuffered in-place operations, which treat repeated places one after the other."""
    result = start.astype(np.float64)
    if mode == "update":
        result[places] = updates
    else:
        apply = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum}[
            mode
        ]
        apply.at(result, places, updates.astype(np.float64))
    return torch.from_numpy(result)


def scatter_cases() -> list[Case]:
    cases = []
    for mode in ("update", "add", "sub", "mul", "div", "max", "min"):
        places = np.int32([1, 3, 0]) if mode == "update" else np.int32([1, 3, 1])
        rows = RNG.uniform(0.5, 2, (4, 3, 3)).astype(np.float32)
        cases.append(
            Case(
                f"scatter-{mode}",
                {"x": TABLE, "u": rows},
                lambda x, u, mode=mode, places=places: mb.scatter(data=x, indices=places, updates=u, axis=1, mode=mode),
                lambda x, u, mode=mode, places=places: scattered(mode, x.numpy(), (slice(None), places), u.numpy()),
            )
        )
        points = np.int32([[0, 1], [3, 4], [2, 2]]) if mode == "update" else np.int32([[0, 1], [3, 4], [0, 1]])
        values = RNG.uniform(0.5, 2, (3, 3)).astype(np.float32)
        cases.append(
            Case(
                f"scatter_nd-{mode}",
                {"x": TABLE, "u": values},
                lambda x, u, mode=mode, points=points: mb.scatter_nd(data=x, indices=points, updates=u, mode=mode),
                lambda x, u, mode=mode, points=points: scattered(mode, x.numpy(), tuple(points.T), u.numpy()),
            )
        )
        along = np.int32(np.argsort(RNG.random((4, 2, 3)), axis=1)) if mode == "update" else ints(0, 5, 4, 2, 3)
        changes = RNG.uniform(0.5, 2, (4, 2, 3)).astype(np.float32)
        grid = np.indices(along.shape)
        cases.append(
            Case(
                f"scatter_along_axis-{mode}",
                {"x": TABLE, "u": changes},
                lambda x, u, mode=mode, along=along: mb.scatter_along_axis(
                    data=x, indices=along, updates=u, axis=-2, mode=mode
                ),
                lambda x, u, mode=mode, along=along, grid=grid: scattered(
                    mode, x.numpy(), (grid[0], along, grid[2]), u.numpy()
                ),
            )
        )
    return cases


def indexed(name: str, build: Any, expected: Any, specification: int = 9) -> Case:
    return Case(name, {"x": TABLE}, build, lambda x: torch.from_numpy(np.asarray(expected(x.numpy()))), specification)


NEGATIVE = np.int32([[0, -1], [2, 1]])
ALONG = ints(0, 5, 4, 2, 3)
POINTS = np.int32([[[0, 1], [3, 4]], [[2, 2], [1, 0]]])
INDEXING = [
    indexed("gather-default-axis", lambda x: mb.gather(x=x, indices=np.int32([3, 0, 3])), lambda x: x[[3, 0, 3]]),
    indexed("gather-scalar", lambda x: mb.gather(x=x, indices=np.int32(2), axis=1), lambda x: x[:, 2]),
    indexed("gather-negative-ios16", lambda x: mb.gather(x=x, indices=NEGATIVE, axis=-1), lambda x: x[:, :, NEGATIVE], 7),
    indexed(
        "gather-batched",
        lambda x: mb.gather(x=x, indices=BATCHED, axis=1, batch_dims=1),
        lambda x: np.stack([row[each] for row, each in zip(x, BATCHED, strict=True)]),
    ),
    indexed(
        "gather-batched-last",
        lambda x: mb.gather(x=x, indices=BATCHED % 3, axis=2, batch_dims=1),
        lambda x: np.stack([row[:, each] for row, each in zip(x, BATCHED % 3, strict=True)]),
    ),
    indexed(
        "gather_along_axis",
        lambda x: mb.gather_along_axis(x=x, indices=ALONG, axis=-2),
        lambda x: np.take_along_axis(x, ALONG, 1),
    ),
    indexed("gather_nd", lambda x: mb.gather_nd(x=x, indices=POINTS), lambda x: x[POINTS[..., 0], POINTS[..., 1]]),
    indexed(
        "gather_nd-batched",
        lambda x: mb.gather_nd(x=x, indices=BATCHED[..., None], batch_dims=1),
        lambda x: np.stack([row[each] for row, each in zip(x, BATCHED, strict=True)]),
    ),
    *scatter_cases(),
]

PADS = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
SORTABLE = RNG.permutation(24).reshape(2, 3, 4).astype(np.float32)
MAKING = [
    *(
        Case(
            f"pad-{mode}-{len(pads)}",
            {"x": X},
            lambda x, mode=mode, pads=pads: mb.pad(x=x, pad=pads, mode=mode),
            lambda x, mode=mode, pads=pads: torch.from_numpy(
                np.pad(x.numpy(), [(0, 0)] * (3 - len(pads) // 2) + np.reshape(pads, (-1, 2)).tolist(), PADS[mode])
            ),
        )
        for mode in PADS
        for pads in ([1, 2], [2, 0, 0, 3], [1, 1, 0, 2, 1, 0])
    ),
    unary("pad", lambda x: F.pad(x, (1, 0), value=1.5), X, pad=[1, 0], constant_val=1.5),
    Case("fill", {"x": X}, lambda x: mb.fill(shape=mb.shape(x=x), value=2.5), lambda x: torch.full_like(x, 2.5)),
    Case("fill-default", {"x": X}, lambda x: mb.fill(shape=mb.shape(x=x)), torch.zeros_like),
    Case("fill_like", {"x": X}, lambda x: mb.fill_like(ref_tensor=x, value=3), lambda x: torch.full(x.shape, 3)),
    Case(
        "range_1d",
        {"n": np.int32([7])},
        lambda n: mb.range_1d(start=1, end=mb.squeeze(x=n), step=2),
        lambda n: torch.tensor([1, 3, 5]),
    ),
    Case(
        "one_hot",
        {"x": np.int32([[0, 2], [1, 5]])},
        lambda x: mb.one_hot(indices=x, one_hot_vector_size=3),
        lambda x: (x[..., None] == torch.arange(3)).int(),
    ),
    Case(
        "one_hot-values",
        {"x": np.int32([0, 2])},
        lambda x: mb.one_hot(indices=x, one_hot_vector_size=3, axis=0, on_value=2.5, off_value=-1.0),
        lambda x: torch.where(x == torch.arange(3)[:, None], 2.5, -1.0).double(),
    ),
    unary("cumsum", lambda x: x.cumsum(0), X),
    unary("cumsum", lambda x: x.cumsum(1), X, axis=1),
    unary("cumsum", lambda x: x.cumsum(-1) - x, X, axis=-1, exclusive=True),
    unary("cumsum", lambda x: x.flip(1).cumsum(1).flip(1), X, axis=1, reverse=True),
    unary("cumsum", lambda x: x.flip(1).cumsum(1).flip(1) - x, X, axis=1, exclusive=True, reverse=True),
    unary("cumsum", lambda x: x.cumsum(0), ints(-5, 5, 6), axis=0),
    unary("band_part", lambda x: x, X),
    unary("band_part", torch.tril, X, lower=-1, upper=0),
    unary("band_part", torch.triu, X, lower=0, upper=-1),
    unary("band_part", lambda x: x.triu(-1).tril(1), X, lower=1, upper=1),
    unary("non_zero", torch.nonzero, bits(3, 5)),
    unary("non_zero", torch.nonzero, np.float32([0, 2, 0, -1])),
    unary("topk", lambda x: tuple(x.topk(2)), SORTABLE, k=2),
    unary("topk", lambda x: tuple(x.topk(3, dim=1, largest=False)), SORTABLE, k=3, axis=1, ascending=True),
    unary("topk", lambda x: tuple(x.sort(0, descending=True)), SORTABLE, k=2, axis=0),
    unary("topk", lambda x: x.topk(2).values, SORTABLE, k=2, return_indices=False),
    unary("topk", lambda x: tuple(x.topk(2)), SORTABLE, k=2, output_indices_dtype="uint16"),
    unary("argsort", lambda x: x.argsort(-1, descending=True), SORTABLE),
    unary("argsort", lambda x: x.argsort(1), SORTABLE, axis=1, ascending=True),
]


@pytest.mark.parametrize("case", SHAPING + SLICES + INDEXING + MAKING, ids=lambda case: case.name[:60])
def test_tensor_operation_equals_numpy(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_conditional_runs_the_chosen_branch(tmp_path: Path) -> None:
    def build(x: Any, flag: Any) -> Any:
        chosen = mb.cond(
            pred=mb.squeeze(x=mb.cast(x=flag, dtype="bool")),
            _true_fn=lambda: mb.add(x=x, y=1.0),
            _false_fn=lambda: mb.mul(x=mb.add(x=x, y=2.0), y=x),
        )
        return mb.sub(x=chosen, y=x)

    for flag in (0, 1):
        inputs = {"x": X, "flag": np.int32([flag])}
        case = Case("cond", inputs, build, lambda x, flag: torch.ones_like(x) if flag.item() else (x + 2) * x - x)
        check(case, tmp_path / str(flag))


def test_loop_repeats_its_body_while_the_condition_holds(tmp_path: Path) -> None:
    def build(x: Any, n: Any) -> Any:
        count = mb.squeeze(x=n)
        _, total = mb.while_loop(
            _cond=lambda i, total: mb.less(x=i, y=count),
            _body=lambda i, total: (mb.add(x=i, y=1), mb.add(x=mb.mul(x=total, y=0.5), y=x)),
            loop_vars=(0, mb.identity(x=x)),
        )
        return mb.add(x=total, y=x)

    def expected(x: Tensor, n: Tensor) -> Tensor:
        total = x
        for _ in range(int(n)):
            total = total * 0.5 + x
        return total + x

    for n in (0, 3):
        check(Case("loop", {"x": X, "n": np.int32([n])}, build, expected), tmp_path / str(n))


def test_types_smaller_than_32_bits_pass_through(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        small = mb.cast(x=x, dtype="uint8")
        wide = mb.cast(x=x, dtype="uint16")
        assert small.dtype == types.uint8 and wide.dtype == types.uint16
        return mb.reshape(x=small, shape=[3, 2]), mb.gather(x=X, indices=wide, axis=2)

    places = np.int32([0, 3, 1, 2, 2, 0])
    check(Case("types", {"x": places}, build, lambda x: (x.reshape(3, 2), torch.from_numpy(X)[:, :, x].double())), tmp_path)

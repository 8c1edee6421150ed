"""Convolutions, pooling, norms, resizing and recurrent layers against torch in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.runtimes.coreml.cases import RNG, Case, check, ints, normal, positive, unary
from tests.runtimes.coreml.mil import mb

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def double(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array).double()


def conv_case(
    name: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    pads: list[int],
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
    bias: bool = True,
    **options: Any,
) -> Case:
    """`pads` is what torch has to pad, (before, after) of each spatial dimension, to arrive at the same result."""
    kernel, offset = normal(*weight), normal(weight[0]) if bias else None
    rank = len(x) - 2
    for key, value in (("bias", offset), ("strides", strides), ("dilations", dilations), ("groups", groups)):
        if value is not None:
            options[key] = value

    def expected(x: Tensor) -> Tensor:
        flat = [pads[2 * dim + side] for dim in reversed(range(rank)) for side in (0, 1)]
        padded = F.pad(x, flat)
        return CONV[rank](padded, double(kernel), double(offset), strides or 1, 0, dilations or 1, groups)

    return Case(name, {"x": normal(*x)}, lambda x: mb.conv(x=x, weight=kernel, **options), expected)


CONVOLUTIONS = [
    conv_case("conv1d", (2, 3, 9), (5, 3, 3), [0, 0]),
    conv_case("conv2d-defaults", (1, 3, 7, 8), (5, 3, 3, 3), [0] * 4, bias=False),
    conv_case("conv3d", (1, 2, 4, 5, 6), (3, 2, 2, 3, 2), [0] * 6),
    conv_case("conv2d-same", (1, 3, 7, 8), (5, 3, 3, 3), [1] * 4, pad_type="same"),
    conv_case("conv2d-same-even", (1, 3, 7, 8), (5, 3, 4, 2), [1, 2, 0, 1], pad_type="same"),
    conv_case("conv2d-same-lower-even", (1, 3, 7, 8), (5, 3, 4, 2), [2, 1, 1, 0], pad_type="same_lower"),
    conv_case("conv2d-same-stride", (1, 3, 7, 8), (5, 3, 3, 3), [1, 1, 0, 1], strides=[2, 2], pad_type="same"),
    conv_case("conv2d-same-dilated", (1, 3, 7, 8), (5, 3, 3, 3), [2] * 4, dilations=[2, 2], pad_type="same"),
    conv_case("conv2d-custom", (1, 3, 7, 8), (5, 3, 3, 3), [0, 1, 2, 1], pad_type="custom", pad=[0, 1, 2, 1]),
    conv_case("conv2d-custom-even", (1, 3, 7, 8), (5, 3, 3, 3), [1, 1, 2, 2], [2, 1], pad_type="custom", pad=[1, 1, 2, 2]),
    conv_case("conv2d-groups", (1, 4, 7, 8), (6, 2, 3, 3), [0] * 4, strides=[1, 2], groups=2),
    conv_case("conv2d-depthwise", (1, 4, 7, 8), (8, 1, 3, 3), [0] * 4, groups=4),
]


def transposed_case(
    name: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    crops: list[int],
    extra: list[int] | None = None,
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
    **options: Any,
) -> Case:
    """The full transposed convolution, then `crops` off its edges; `extra` is torch's output_padding."""
    kernel, offset = normal(*weight), normal(weight[1] * groups)
    rank = len(x) - 2
    for key, value in (("strides", strides), ("dilations", dilations), ("groups", groups)):
        if value is not None:
            options[key] = value

    def expected(x: Tensor) -> Tensor:
        full = TRANSPOSED[rank](x, double(kernel), double(offset), strides or 1, 0, extra or 0, groups, dilations or 1)
        places = [slice(crops[2 * dim], full.shape[2 + dim] - crops[2 * dim + 1]) for dim in range(rank)]
        return full[(..., *places)]

    return Case(name, {"x": normal(*x)}, lambda x: mb.conv_transpose(x=x, weight=kernel, bias=offset, **options), expected)


TRANSPOSED_CONVOLUTIONS = [
    transposed_case("transposed1d", (1, 3, 6), (3, 4, 3), [0, 0], strides=[2]),
    transposed_case("transposed2d", (1, 3, 4, 5), (3, 4, 3, 2), [0] * 4, strides=[2, 3], dilations=[2, 1]),
    transposed_case("transposed3d", (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), [0] * 6, strides=[2, 2, 2]),
    transposed_case(
        "transposed2d-custom", (1, 3, 4, 5), (3, 4, 4, 4), [1, 1, 1, 0], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 0]
    ),
    transposed_case("transposed2d-same", (1, 3, 4, 5), (3, 4, 4, 3), [1, 1, 0, 1], strides=[2, 2], pad_type="same"),
    transposed_case(
        "transposed2d-output-shape",
        (1, 3, 4, 5),
        (3, 4, 3, 3),
        [1, 1, 1, 1],
        extra=[1, 1],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        output_shape=[1, 4, 8, 10],
    ),
    transposed_case("transposed2d-groups", (1, 4, 4, 5), (4, 3, 3, 3), [0] * 4, groups=2),
]


def pool_case(name: str, kind: str, expected: Any, x: np.ndarray, **options: Any) -> Case:
    return Case(name, {"x": x}, lambda x: getattr(mb, kind)(x=x, **options), expected)


IMAGE = normal(2, 3, 7, 9)
POOLING = [
    pool_case(
        "max1d", "max_pool", lambda x: F.max_pool1d(x, 3, 2), normal(1, 2, 8), kernel_sizes=[3], strides=[2], pad_type="valid"
    ),
    pool_case(
        "max2d-same",
        "max_pool",
        lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, 1),
        IMAGE,
        kernel_sizes=[2, 2],
        pad_type="same",
    ),
    pool_case(
        "max2d-same-lower",
        "max_pool",
        lambda x: F.max_pool2d(F.pad(x, (1, 0, 1, 0), value=-torch.inf), 2, 1),
        IMAGE,
        kernel_sizes=[2, 2],
        pad_type="same_lower",
    ),
    pool_case(
        "max2d-ceil",
        "max_pool",
        lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
        IMAGE,
        kernel_sizes=[2, 2],
        strides=[2, 2],
        pad_type="valid",
        ceil_mode=True,
    ),
    pool_case(
        "max2d-custom",
        "max_pool",
        lambda x: F.max_pool2d(x, 3, 2, 1),
        IMAGE,
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
    ),
    pool_case(
        "max3d",
        "max_pool",
        lambda x: F.max_pool3d(x, 2, 2),
        normal(1, 2, 4, 4, 4),
        kernel_sizes=[2, 2, 2],
        strides=[2, 2, 2],
        pad_type="valid",
    ),
    pool_case("avg1d", "avg_pool", lambda x: F.avg_pool1d(x, 3, 1), normal(1, 2, 8), kernel_sizes=[3], pad_type="valid"),
    pool_case(
        "avg2d-counted",
        "avg_pool",
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        IMAGE,
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
    ),
    pool_case(
        "avg2d-excluded",
        "avg_pool",
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        IMAGE,
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        exclude_padding_from_average=True,
    ),
    pool_case(
        "avg2d-ceil",
        "avg_pool",
        lambda x: F.avg_pool2d(x, 4, 3, 1, ceil_mode=True),
        IMAGE,
        kernel_sizes=[4, 4],
        strides=[3, 3],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        ceil_mode=True,
    ),
    pool_case(
        "avg3d", "avg_pool", lambda x: F.avg_pool3d(x, 2, 1), normal(1, 2, 3, 4, 4), kernel_sizes=[2, 2, 2], pad_type="valid"
    ),
    pool_case("l2", "l2_pool", lambda x: F.lp_pool2d(x, 2, 2, 2), IMAGE, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"),
]

GAMMA, BETA, MEAN, VARIANCE = positive(3), normal(3), normal(3), positive(3)
WIDE_GAMMA, WIDE_BETA = positive(7, 9), normal(7, 9)
MIDDLE_GAMMA, MIDDLE_BETA = positive(3, 7), normal(3, 7)


def middle_norm(x: Tensor) -> Tensor:
    mean, variance = x.mean((1, 2), keepdim=True), x.var((1, 2), correction=0, keepdim=True)
    gamma, beta = double(MIDDLE_GAMMA), double(MIDDLE_BETA)
    assert gamma is not None and beta is not None
    return (x - mean) / (variance + 1e-3).sqrt() * gamma[..., None] + beta[..., None]


NORMS = [
    unary("batch_norm", lambda x: F.batch_norm(x, double(MEAN), double(VARIANCE)), IMAGE, mean=MEAN, variance=VARIANCE),
    unary(
        "batch_norm",
        lambda x: F.batch_norm(x, double(MEAN), double(VARIANCE), double(GAMMA), double(BETA), eps=1e-3),
        IMAGE,
        mean=MEAN,
        variance=VARIANCE,
        gamma=GAMMA,
        beta=BETA,
        epsilon=np.float32(1e-3),
    ),
    unary("instance_norm", F.instance_norm, IMAGE),
    unary(
        "instance_norm", lambda x: F.instance_norm(x, weight=double(GAMMA), bias=double(BETA)), IMAGE, gamma=GAMMA, beta=BETA
    ),
    unary("layer_norm", lambda x: F.layer_norm(x, x.shape), IMAGE, axes=[0, 1, 2, 3]),
    unary("layer_norm", lambda x: F.layer_norm(x, (9,), eps=1e-3), IMAGE, axes=[-1], epsilon=np.float32(1e-3)),
    unary(
        "layer_norm",
        lambda x: F.layer_norm(x, (7, 9), double(WIDE_GAMMA), double(WIDE_BETA)),
        IMAGE,
        axes=[2, -1],
        gamma=WIDE_GAMMA,
        beta=WIDE_BETA,
    ),
    unary("layer_norm", middle_norm, IMAGE, axes=[1, 2], gamma=MIDDLE_GAMMA, beta=MIDDLE_BETA, epsilon=np.float32(1e-3)),
    unary("l2_norm", lambda x: x / (x.square().sum((1, 2, 3), keepdim=True) + 1e-6).sqrt(), IMAGE),
    unary("local_response_norm", lambda x: F.local_response_norm(x, 3), IMAGE, size=3),
    unary(
        "local_response_norm", lambda x: F.local_response_norm(x, 2, 0.1, 0.5, 2.0), IMAGE, size=2, alpha=0.1, beta=0.5, k=2.0
    ),
]


def resize_reference(mode: str, height: int, width: int) -> Any:
    """Bilinear weights written out from the definition of each sampling mode."""

    def matrix(n: int, m: int) -> np.ndarray:
        i = np.arange(m)
        points = {
            "STRICT_ALIGN_CORNERS": i * (n - 1) / max(m - 1, 1),
            "ALIGN_CORNERS": i * (n - 1) / (m - 1) if m > 1 else np.array([(n - 1) / 2]),
            "DEFAULT": i * n / m,
            "UNALIGN_CORNERS": (i + 0.5) * n / m - 0.5,
            "OFFSET_CORNERS": (i + 0.5) * max(1, n - 1) / m,
        }[mode].clip(0, n - 1)
        return np.maximum(0, 1 - np.abs(points[:, None] - np.arange(n)))

    def expected(x: Tensor) -> Tensor:
        rows, columns = matrix(x.shape[-2], height), matrix(x.shape[-1], width)
        return torch.from_numpy(rows @ x.numpy() @ columns.T)

    return expected


MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "UNALIGN_CORNERS", "OFFSET_CORNERS")


def sampling_case(padding: str, sampling: str, align: bool, coordinates: str = "normalized_minus_one_to_one") -> Case:
    grid = RNG.uniform(-1.6, 1.6, (2, 5, 6, 2)).astype(np.float32)
    torch_padding = {"constant": "zeros", "border": "border", "reflection": "reflection", "symmetric": "reflection"}[padding]
    given = (grid + 1) / 2 if coordinates == "normalized_zero_to_one" else grid
    return Case(
        f"resample-{padding}-{sampling}-{align}-{coordinates}",
        {"x": IMAGE, "grid": given},
        lambda x, grid: mb.resample(
            x=x,
            coordinates=grid,
            sampling_mode=sampling,
            padding_mode=padding,
            padding_value=0.0,
            coordinates_mode=coordinates,
            align_corners=align,
        ),
        lambda x, _: F.grid_sample(x, torch.from_numpy(grid).double(), sampling, torch_padding, align),
    )


THETA = np.float32([[0.8, 0.1, 0.05, -0.2, 0.9, 0.1], [0.6, 0.0, 0.2, 0.1, 0.7, 0.0]])
RESIZING = [
    unary(
        "upsample_nearest_neighbor",
        lambda x: F.interpolate(x, scale_factor=(2, 3)),
        IMAGE,
        scale_factor_height=2,
        scale_factor_width=3,
    ),
    unary(
        "upsample_nearest_neighbor",
        lambda x: F.interpolate(x, (10, 13)),
        IMAGE,
        scale_factor_height=1.5,
        scale_factor_width=1.5,
    ),
    unary("resize_nearest_neighbor", lambda x: F.interpolate(x, (5, 20)), IMAGE, target_size_height=5, target_size_width=20),
    unary(
        "upsample_bilinear",
        resize_reference("STRICT_ALIGN_CORNERS", 14, 27),
        IMAGE,
        scale_factor_height=2,
        scale_factor_width=3,
    ),
    unary(
        "upsample_bilinear",
        lambda x: F.interpolate(x, (14, 27), mode="bilinear"),
        IMAGE,
        scale_factor_height=2,
        scale_factor_width=3,
        align_corners=False,
    ),
    *(
        unary(
            "resize_bilinear",
            resize_reference(mode, *size),
            IMAGE,
            target_size_height=size[0],
            target_size_width=size[1],
            sampling_mode=mode,
        )
        for mode in MODES
        for size in ((5, 12), (1, 9))
    ),
    *(
        unary("resize", resize_reference(mode, 5, 12), IMAGE, shape=[1, 5, 12], resized_dims=np.uint32(2), sampling_mode=mode)
        for mode in MODES
    ),
    unary("resize", resize_reference("DEFAULT", 7, 4), IMAGE, shape=[0, 4], resized_dims=np.uint32(2)),
    unary(
        "resize",
        lambda x: F.interpolate(x, (5, 12), mode="nearest-exact"),
        IMAGE,
        shape=[5, 12],
        resized_dims=np.uint32(2),
        interpolation_mode="NEAREST_NEIGHBOR",
        sampling_mode="UNALIGN_CORNERS",
    ),
    unary("crop", lambda x: x[..., 1:5, 3:9], IMAGE, crop_height=[1, 2], crop_width=[3, 0]),
    *(sampling_case(padding, "bilinear", align) for padding in ("constant", "border") for align in (True, False)),
    sampling_case("reflection", "bilinear", True),
    sampling_case("symmetric", "bilinear", False),
    sampling_case("border", "nearest", True),
    sampling_case("constant", "bilinear", True, "normalized_zero_to_one"),
    unary(
        "affine",
        lambda x: F.grid_sample(
            x,
            F.affine_grid(torch.from_numpy(THETA).double().reshape(2, 2, 3), [2, 3, 5, 6], align_corners=True),
            align_corners=True,
        ),
        IMAGE,
        transform_matrix=THETA,
        output_height=5,
        output_width=6,
        sampling_mode="bilinear",
        padding_mode="constant",
        padding_value=0.0,
        coordinates_mode="normalized_minus_one_to_one",
        align_corners=True,
    ),
    unary(
        "crop_resize",
        lambda x: torch.stack(
            [
                resize_reference("ALIGN_CORNERS", 3, 4)(x[1, :, 1:6, 2:8]),
                resize_reference("ALIGN_CORNERS", 3, 4)(x[0, :, 0:3, 4:9]),
            ]
        ),
        IMAGE,
        boxes=np.float32([[1, 2, 5, 7], [0, 4, 2, 8]]),
        box_indices=np.int32([1, 0]),
        target_height=3,
        target_width=4,
        sampling_mode="ALIGN_CORNERS",
    ),
]

STEPS = normal(5, 2, 4)


def lstm_case(direction: str, sequence: bool) -> Case:
    both = direction == "bidirectional"
    layer = torch.nn.LSTM(4, 3, bidirectional=both).double()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    def gates(name: str) -> np.ndarray:
        """torch's input, forget, cell, output -> input, forget, output, cell."""
        i, f, g, o = getattr(layer, name).detach().chunk(4)
        return torch.cat((i, f, o, g)).float().numpy()

    weights = {
        "weight_ih": gates("weight_ih_l0"),
        "weight_hh": gates("weight_hh_l0"),
        "bias": gates("bias_ih_l0") + gates("bias_hh_l0"),
    }
    if both:
        weights |= {
            "weight_ih_back": gates("weight_ih_l0_reverse"),
            "weight_hh_back": gates("weight_hh_l0_reverse"),
            "bias_back": gates("bias_ih_l0_reverse") + gates("bias_hh_l0_reverse"),
        }
    width = 6 if both else 3

    def expected(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        count = 2 if both else 1
        start = (h.reshape(2, count, 3).transpose(0, 1).contiguous(), c.reshape(2, count, 3).transpose(0, 1).contiguous())
        turned = x.flip(0) if direction == "reverse" else x
        with torch.no_grad():
            states, (last_h, last_c) = layer(turned, start)
        final_h, final_c = last_h.transpose(0, 1).reshape(2, width), last_c.transpose(0, 1).reshape(2, width)
        ordered = states.flip(0) if direction == "reverse" else states
        return (ordered if sequence else final_h[None]), final_h, final_c

    return Case(
        f"lstm-{direction}-{sequence}",
        {"x": STEPS, "h": normal(2, width), "c": normal(2, width)},
        lambda x, h, c: mb.lstm(x=x, initial_h=h, initial_c=c, direction=direction, output_sequence=sequence, **weights),
        expected,
    )


W_IH, W_HH, BIAS = normal(3, 4), normal(3, 3), normal(3)


def rnn_reference(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, bias = (torch.from_numpy(each).double() for each in (W_IH, W_HH, BIAS))
    states = []
    for step in x:
        h = torch.tanh(step @ w_ih.T + h @ w_hh.T + bias)
        states.append(h)
    return torch.stack(states), h


RECURRENT = [
    *(lstm_case(direction, sequence) for direction in ("forward", "reverse", "bidirectional") for sequence in (True, False)),
    Case(
        "rnn",
        {"x": STEPS, "h": normal(2, 3)},
        lambda x, h: mb.rnn(x=x, initial_h=h, weight_ih=W_IH, weight_hh=W_HH, bias=BIAS, output_sequence=True),
        rnn_reference,
    ),
]

SCALES, ZEROS = np.float32([0.5, 0.25, 0.1]), np.int8([1, -2, 3])
LEVELS = ints(-128, 128, 2, 3, 4).astype(np.int8)
SCALE, ZERO = torch.from_numpy(SCALES).double().reshape(1, 3, 1), torch.from_numpy(ZEROS).reshape(1, 3, 1)
QUANTIZATION = [
    Case(
        "quantize",
        {"x": IMAGE * 3},
        lambda x: mb.quantize(input=x, scale=np.float32(0.05), output_dtype="int8"),
        lambda x: (x / 0.05).round().clamp(-128, 127).int(),
    ),
    Case(
        "quantize-channels",
        {"x": IMAGE * 9},
        lambda x: mb.quantize(input=x, scale=SCALES, zero_point=ZEROS, axis=1, output_dtype="int8"),
        lambda x: ((x / SCALE[..., None]).round() + ZERO[..., None]).clamp(-128, 127).int(),
    ),
    Case(
        "dequantize-channels",
        {"x": LEVELS},
        lambda x: mb.dequantize(input=x, scale=SCALES, zero_point=ZEROS, axis=-2),
        lambda x: (x.double() - ZERO) * SCALE,
    ),
    Case("dequantize", {"x": LEVELS}, lambda x: mb.dequantize(input=x, scale=np.float32(0.5)), lambda x: x.double() * 0.5),
]


@pytest.mark.parametrize(
    "case",
    CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS + POOLING + NORMS + RESIZING + RECURRENT + QUANTIZATION,
    ids=lambda case: case.name[:60],
)
def test_layer_equals_float64(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)

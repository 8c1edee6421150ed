"""Resizing and resampling of the last two dimensions.

A sampling mode says where on the input the outputs lie. With n inputs and m outputs, element i lies at

    STRICT_ALIGN_CORNERS  i (n - 1) / (m - 1)              ALIGN_CORNERS   the same, but the middle for m = 1
    DEFAULT               i n / m                          UNALIGN_CORNERS (i + 1/2) n / m - 1/2
    OFFSET_CORNERS        (i + 1/2) max(1, n - 1) / m

clamped to [0, n - 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.operations.registry import Ints, operation


def _points(start: Tensor, end: Tensor, count: int, mode: str) -> Tensor:
    """[...] first and last coordinate -> [..., count] sampling points, unclamped."""
    places = torch.arange(count, dtype=torch.float32)
    span = (end - start).unsqueeze(-1)
    first = start.unsqueeze(-1)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return first + (span / 2 if mode == "ALIGN_CORNERS" else 0 * span)
        return first + places * span / (count - 1)
    if mode == "DEFAULT":
        return first + places * (span + 1) / count
    if mode == "UNALIGN_CORNERS":
        return first + (places + 0.5) * (span + 1) / count - 0.5
    if mode == "OFFSET_CORNERS":
        return first + (places + 0.5) * span.clamp(min=1) / count
    raise ValueError(f"unknown sampling mode {mode!r}")


def _axis_points(size: int, count: int, mode: str) -> Tensor:
    return _points(torch.tensor(0.0), torch.tensor(float(size - 1)), count, mode).clamp(0, size - 1)


def _interpolate(x: Tensor, dim: int, points: Tensor) -> Tensor:
    """Linear interpolation of one dimension at the given points, which lie inside it."""
    low = points.floor().long()
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    weight = (points - low).reshape([-1 if each == dim % x.dim() else 1 for each in range(x.dim())])
    return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)


def _nearest_indices(size: int, count: int) -> Tensor:
    """floor(i n / m), in integers."""
    return torch.arange(count) * size // count


def _resize_nearest(x: Tensor, height: int, width: int) -> Tensor:
    rows, columns = x.shape[-2:]
    if height % rows == 0 and width % columns == 0:
        return x.repeat_interleave(height // rows, -2).repeat_interleave(width // columns, -1)
    return x.index_select(-2, _nearest_indices(rows, height)).index_select(-1, _nearest_indices(columns, width))


def _resize_bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    if mode == "UNALIGN_CORNERS" and x.dim() == 4:
        return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    x = _interpolate(x, -2, _axis_points(x.shape[-2], height, mode))
    return _interpolate(x, -1, _axis_points(x.shape[-1], width, mode))


def _scaled(x: Tensor, height: float, width: float) -> tuple[int, int]:
    return int(x.shape[-2] * height), int(x.shape[-1] * width)


@operation("upsample_nearest_neighbor", stored=True)
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    return _resize_nearest(x, *_scaled(x, scale_factor_height, scale_factor_width))


@operation("resize_nearest_neighbor", stored=True)
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _resize_nearest(x, target_size_height, target_size_width)


@operation("upsample_bilinear")
def upsample_bilinear(
    x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1, align_corners: bool = True
) -> Tensor:
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS"
    return _resize_bilinear(x, *_scaled(x, scale_factor_height, scale_factor_width), mode)


@operation("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    return _resize_bilinear(x, target_size_height, target_size_width, sampling_mode)


@operation("resize")
def resize(
    x: Tensor, shape: Ints, resized_dims: int, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Tensor:
    """The last `resized_dims` sizes of `shape` are the targets; 0 keeps a dimension.

    The nearest element is the one at or before the point for DEFAULT, and the closest one otherwise.
    """
    dtype = x.dtype
    result = x if x.is_floating_point() or interpolation_mode != "LINEAR" else x.double()
    for dim, target in zip(range(-resized_dims, 0), shape[len(shape) - resized_dims :], strict=True):
        if target in (0, x.shape[dim]) and sampling_mode != "OFFSET_CORNERS":
            continue
        points = _axis_points(x.shape[dim], target or x.shape[dim], sampling_mode)
        if interpolation_mode == "LINEAR":
            result = _interpolate(result, dim, points.to(result.dtype))
        elif interpolation_mode == "NEAREST_NEIGHBOR":
            exact = _nearest_indices(x.shape[dim], target) if sampling_mode == "DEFAULT" else (points + 0.5).floor().long()
            result = result.index_select(dim, exact.clamp(max=x.shape[dim] - 1))
        else:
            raise ValueError(f"unknown interpolation mode {interpolation_mode!r}")
    return result.to(dtype)


def _reflect(points: Tensor, low: float, high: float) -> Tensor:
    """Points mirrored at both bounds until they lie between them."""
    span = high - low
    if span <= 0:
        return torch.full_like(points, low)
    offset = torch.remainder(points - low, 2 * span)
    return low + torch.where(offset > span, 2 * span - offset, offset)


def _pixels(images: Tensor, rows: Tensor, columns: Tensor, fill: float) -> Tensor:
    """images: [batch, channels, h, w]; rows, columns: whole numbers [batch, H, W] -> [batch, channels, H, W].

    A place outside the image has the value `fill`.
    """
    batch, channels, height, width = images.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    flat = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).long()
    index = flat.reshape(batch, 1, -1).expand(-1, channels, -1)
    values = images.flatten(2).gather(2, index).reshape(batch, channels, *rows.shape[1:])
    return torch.where(inside.unsqueeze(1), values, torch.tensor(fill, dtype=images.dtype))


def _sample(images: Tensor, y: Tensor, x: Tensor, nearest: bool, fill: float) -> Tensor:
    """images: [batch, channels, h, w] at pixel coordinates y, x: [batch, H, W]."""
    if nearest:
        return _pixels(images, y.round(), x.round(), fill)
    top, left = y.floor(), x.floor()
    down, right = (y - top).unsqueeze(1), (x - left).unsqueeze(1)
    above = torch.lerp(_pixels(images, top, left, fill), _pixels(images, top, left + 1, fill), right)
    below = torch.lerp(_pixels(images, top + 1, left, fill), _pixels(images, top + 1, left + 1, fill), right)
    return torch.lerp(above, below, down)


def _to_pixels(coordinates: Tensor, size: int, mode: str, align_corners: bool) -> Tensor:
    if mode == "unnormalized":
        return coordinates
    if mode == "normalized_minus_one_to_one":
        unit = (coordinates + 1) / 2
    elif mode == "normalized_zero_to_one":
        unit = coordinates
    else:
        raise ValueError(f"unknown coordinates mode {mode!r}")
    return unit * (size - 1) if align_corners else unit * size - 0.5


@operation("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """x: [batch, channels, h, w] sampled at coordinates [batch, H, W, 2], each (x, y) -> [batch, channels, H, W]."""
    height, width = x.shape[-2:]
    points = []
    for size, axis in ((height, 1), (width, 0)):
        point = _to_pixels(coordinates[..., axis].to(x.dtype), size, coordinates_mode.lower(), align_corners)
        if padding_mode == "border":
            point = point.clamp(0, size - 1)
        elif padding_mode == "reflection":
            point = _reflect(point, 0, size - 1)
        elif padding_mode == "symmetric":
            point = _reflect(point, -0.5, size - 0.5).clamp(0, size - 1)
        elif padding_mode != "constant":
            raise ValueError(f"unknown padding mode {padding_mode!r}")
        points.append(point)
    if sampling_mode not in ("bilinear", "nearest"):
        raise ValueError(f"unknown sampling mode {sampling_mode!r}")
    return _sample(x, points[0], points[1], sampling_mode == "nearest", padding_value)


@operation("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Samples x at the affine image of the output's own grid; transform_matrix: [batch or 1, 6], rows x then y."""
    if coordinates_mode.lower() != "normalized_minus_one_to_one":
        raise ValueError(f"unknown coordinates mode {coordinates_mode!r} of affine")
    matrix = transform_matrix.reshape(-1, 2, 3).expand(x.shape[0], -1, -1)
    grid = F.affine_grid(matrix, [x.shape[0], 1, output_height, output_width], align_corners=align_corners)
    return resample(x, grid, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)


def _corners(boxes: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[boxes, 4] in the given convention -> top, left, bottom, right."""
    first, second, third, fourth = boxes.unbind(-1)
    if mode.endswith("WIDTH_FIRST"):
        first, second, third, fourth = second, first, fourth, third
    if mode.startswith("CORNERS"):
        return first, second, third, fourth
    if mode.startswith("CENTER_SIZE"):
        return first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2
    raise ValueError(f"unknown box coordinate mode {mode!r}")


@operation("crop_resize")
def crop_resize(
    x: Tensor,
    boxes: Tensor | None = None,
    box_indices: Tensor | None = None,
    roi: Tensor | None = None,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    """Boxes of x: [batch, channels, h, w], each resized bilinearly; beyond the image lies `pad_value`.

    iOS 17: boxes [n, 4] of the images `box_indices` [n] -> [n, channels, H, W]. Before: roi [n, 1, 4, 1, 1] of every image
    -> [n, batch, channels, H, W], or [n, 1, 5, 1, 1] with the image's index in front -> [n, 1, channels, H, W].
    """
    batch, channels, height, width = x.shape
    if roi is not None:
        rows = roi.flatten(1)
        crops_per_box = 1 if rows.shape[1] == 5 else batch
        images = rows[:, :1].long() if rows.shape[1] == 5 else torch.arange(batch).expand(len(rows), -1)
        boxes, images = rows[:, -4:].repeat_interleave(crops_per_box, 0), images.flatten()
    elif boxes is not None:
        crops_per_box = 0
        images = torch.arange(len(boxes)) if box_indices is None else box_indices.long()
    else:
        raise ValueError("crop_resize has neither boxes nor roi")
    top, left, bottom, right = _corners(boxes.to(x.dtype) * spatial_scale, box_coordinate_mode)
    if normalized_coordinates:
        top, bottom = top * (height - 1), bottom * (height - 1)
        left, right = left * (width - 1), right * (width - 1)
    y = _points(top, bottom, target_height, sampling_mode).unsqueeze(2).expand(-1, -1, target_width)
    z = _points(left, right, target_width, sampling_mode).unsqueeze(1).expand(-1, target_height, -1)
    outside = (y < 0) | (y > height - 1) | (z < 0) | (z > width - 1)
    crops = _sample(x[images], y.clamp(0, height - 1), z.clamp(0, width - 1), nearest=False, fill=0.0)
    crops = torch.where(outside.unsqueeze(1), torch.tensor(pad_value, dtype=x.dtype), crops)
    return crops if roi is None else crops.reshape(-1, crops_per_box, channels, target_height, target_width)

"""The demo's picture: sample images, and for each a map of which patches tofu made into one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tofu_fx.extras import need
from tofu_fx.plan.figure import new_figure

INK, PAPER, WRONG, OUTLINE, GREY = "#16324f", "#fdfaf3", "#c0392b", "#e8703a", "#555555"
# Inches.
CELL_HEIGHT, GAP, MARGIN, TOP, BOTTOM = 0.82, 0.13, 0.2, 1.45, 0.5

Segment = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class TokenMap:
    """One column of the picture.

    Attributes:
        title: such as "mlerp 0.5".
        notes: the lines under the title.
        groups: int64 `[n, patches]`, which final token each patch of each image went into, row by row.
        found: int64 `[n, 4]`, the digits that the reduced model read.
    """

    title: str
    notes: Sequence[str]
    groups: Tensor
    found: Tensor


def fill_groups(image: Tensor, groups: Tensor) -> Tensor:
    """The image with every group of several patches filled by the group's mean; a lone patch stays as it is.

    Args:
        image: float `[H, W]`.
        groups: int64 `[rows, columns]`, the group of each patch; H and W are multiples of rows and columns.
    """
    (rows, columns), (height, width) = groups.shape, image.shape
    cells = image.reshape(rows, height // rows, columns, width // columns).transpose(1, 2)
    patches = cells.reshape(rows * columns, -1)
    _, member = groups.flatten().unique(return_inverse=True)
    count = torch.bincount(member).float()
    total = torch.zeros_like(count).index_add_(0, member, patches.mean(1))
    filled = torch.where(count[member, None] > 1, (total / count)[member, None], patches)
    return filled.reshape(cells.shape).transpose(1, 2).reshape(image.shape)


def group_borders(groups: Tensor) -> list[Segment]:
    """Line segments ((x, y), (x, y)), in patches, between neighbours in `groups` `[rows, columns]` that differ."""
    below = [(row + 1, column) for row, column in (groups[1:] != groups[:-1]).nonzero().tolist()]
    beside = [(row, column + 1) for row, column in (groups[:, 1:] != groups[:, :-1]).nonzero().tolist()]
    flat: list[Segment] = [((column, row), (column + 1, row)) for row, column in below]
    upright: list[Segment] = [((column, row), (column, row + 1)) for row, column in beside]
    return flat + upright


def draw_token_maps(
    path: Path,
    images: Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    maps: Sequence[TokenMap],
    heading: str,
    caption: str,
) -> None:
    """Write the picture: one row an image, the image on the left, one column of patches for each map.

    Args:
        path: the PNG to write; its folder must exist.
        images: float `[n, 1, H, W]`, 0 to 1.
        labels: int64 `[n, 4]`, the digits from left to right.
        grid: rows and columns of patches.
        maps: the columns.
        heading: the title over everything.
        caption: the small print under everything.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    cell_width = CELL_HEIGHT * images.shape[-1] / images.shape[-2]
    width = 2 * MARGIN + (len(maps) + 1) * (cell_width + GAP) - GAP
    height = TOP + len(images) * (CELL_HEIGHT + GAP) + BOTTOM
    figure = new_figure(width, height)

    def write(x: float, from_top: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - from_top / height, text, **{"color": GREY, "fontsize": 9, **style})

    write(MARGIN, 0.42, heading, fontsize=14, fontweight="bold", color=INK)
    write(MARGIN, height - 0.22, caption)
    headers = [("scans", [f"{grid[0] * grid[1]} patches"]), *((map_.title, map_.notes) for map_ in maps)]
    for column, (title, notes) in enumerate(headers):
        x = MARGIN + column * (cell_width + GAP)
        write(x, 0.98, title, fontsize=12, fontweight="bold", color=INK)
        write(x, 1.22, "   ".join(notes))
        for row in range(len(images)):
            y = BOTTOM + (len(images) - 1 - row) * (CELL_HEIGHT + GAP) + GAP
            axes = figure.add_axes((x / width, y / height, cell_width / width, CELL_HEIGHT / height))
            if column == 0:
                _draw_patches(axes, images[row, 0], None, grid)
            else:
                map_ = maps[column - 1]
                _draw_patches(axes, images[row, 0], map_.groups[row].reshape(grid), grid)
                _mark_wrong(axes, map_.found[row], labels[row], grid)
    figure.savefig(path, dpi=150)


def _draw_patches(axes: Any, image: Tensor, groups: Tensor | None, grid: tuple[int, int]) -> None:
    rows, columns = grid
    colours = need("matplotlib.colors").LinearSegmentedColormap.from_list("ink", [PAPER, INK])
    shown = image if groups is None else fill_groups(image, groups)
    axes.imshow(shown.numpy(), cmap=colours, vmin=0, vmax=1, extent=(0, columns, rows, 0), aspect="auto")
    if groups is not None:
        collections = need("matplotlib.collections")
        axes.add_collection(collections.LineCollection(group_borders(groups), colors=OUTLINE, linewidths=0.6))
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color="#b9b4a8", linewidth=0.6)


def _mark_wrong(axes: Any, found: Tensor, labels: Tensor, grid: tuple[int, int]) -> None:
    rows, columns = grid
    for place, (read, label) in enumerate(zip(found.tolist(), labels.tolist(), strict=True)):
        if read != label:
            x = (place + 0.5) * columns / len(labels)
            box = {"facecolor": "white", "edgecolor": WRONG, "pad": 1.5, "linewidth": 0.8}
            axes.text(x, rows - 0.6, f"read as {read}", fontsize=7, color=WRONG, ha="center", va="bottom", bbox=box)

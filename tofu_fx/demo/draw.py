"""The demo's picture: sample digits, and for each a map of which patches tofu made into one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tofu_fx.demo.extra import need

INK, PAPER, RIGHT, WRONG, OUTLINE = "#16324f", "#fdfaf3", "#1b7f4b", "#c0392b", "#e8703a"


@dataclass(frozen=True)
class TokenMap:
    """One row of the picture.

    Attributes:
        title: such as "mlerp 0.5".
        notes: lines under the title.
        groups: int64 `[n, patches]`, which final token each patch of each image went into, row by row.
        predictions: int64 `[n]`, the digit that the reduced model named.
    """

    title: str
    notes: Sequence[str]
    groups: Tensor
    predictions: Tensor


def fill_groups(image: Tensor, groups: Tensor, grid: int) -> Tensor:
    """The image `[S, S]` with every group of several patches filled by the group's mean; a lone patch stays as it is.

    Args:
        image: float `[S, S]`.
        groups: int64 `[grid * grid]`.
        grid: patches a side; S is a multiple of it.
    """
    side = image.shape[-1] // grid
    patches = image.reshape(grid, side, grid, side).permute(0, 2, 1, 3).reshape(grid * grid, side * side)
    _, member = groups.unique(return_inverse=True)
    count = torch.zeros(int(member.max()) + 1).index_add_(0, member, torch.ones(len(member)))
    total = torch.zeros_like(count).index_add_(0, member, patches.mean(1))
    filled = torch.where(count[member, None] > 1, (total / count)[member, None].expand_as(patches), patches)
    return filled.reshape(grid, grid, side, side).permute(0, 2, 1, 3).reshape(image.shape)


def group_borders(groups: Tensor, grid: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Line segments ((x, y), (x, y)), in patches, between neighbouring patches of different groups."""
    cells = groups.reshape(grid, grid)
    down = [(row + 1, column) for row, column in (cells[1:] != cells[:-1]).nonzero().tolist()]
    across = [(row, column + 1) for row, column in (cells[:, 1:] != cells[:, :-1]).nonzero().tolist()]
    return [((column, row), (column + 1, row)) for row, column in down] + [
        ((column, row), (column, row + 1)) for row, column in across
    ]


def draw_token_maps(
    path: Path, images: Tensor, labels: Tensor, maps: Sequence[TokenMap], heading: str, caption: str
) -> None:
    """Write the picture: one column a digit, the photo on top, one row of patches for each map.

    Args:
        path: the PNG to write; its folder must exist.
        images: float `[n, 1, S, S]`, 0 to 1.
        labels: int64 `[n]`, what the digits are.
        maps: the rows.
        heading: the title over everything.
        caption: the small print under everything.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # The object interface with the Agg canvas: no display is needed and the caller's pyplot state is left alone.
    figure_module, agg = need("matplotlib.figure"), need("matplotlib.backends.backend_agg")
    columns, rows = len(images), len(maps) + 1
    left, top, bottom, cell = 2.0, 0.75, 0.45, 1.22
    width, height = left + columns * cell + 0.15, top + rows * cell + bottom
    figure = figure_module.Figure(figsize=(width, height), facecolor="white")
    agg.FigureCanvasAgg(figure)
    colours = need("matplotlib.colors").LinearSegmentedColormap.from_list("ink", [PAPER, INK])

    def axes_at(row: int, column: int) -> Any:
        gap = 0.1
        x, y = left + column * cell, height - top - (row + 1) * cell
        axes = figure.add_axes((x / width, y / height, (cell - gap) / width, (cell - gap) / height))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="#b9b4a8", linewidth=0.6)
        return axes

    def label_row(row: int, title: str, notes: Sequence[str]) -> None:
        x, middle = (left - 0.15) / width, height - top - (row + 0.5) * cell
        figure.text(x, (middle + 0.18) / height, title, ha="right", fontsize=11, fontweight="bold", color=INK)
        for place, note in enumerate(notes):
            figure.text(x, (middle - 0.04 - 0.19 * place) / height, note, ha="right", fontsize=8.5, color="#555555")

    figure.text(0.15 / width, 1 - 0.36 / height, heading, fontsize=13, fontweight="bold", color=INK)
    figure.text(0.15 / width, 0.17 / height, caption, fontsize=8.5, color="#555555")
    label_row(0, "photo", [f"{int(maps[0].groups.shape[1])} patches"] if maps else [])
    for column in range(columns):
        axes_at(0, column).imshow(images[column, 0].numpy(), cmap=colours, vmin=0, vmax=1)
    for row, token_map in enumerate(maps, start=1):
        label_row(row, token_map.title, token_map.notes)
        for column in range(columns):
            _draw_cell(axes_at(row, column), images[column, 0], token_map.groups[column], colours)
            named, label = int(token_map.predictions[column]), int(labels[column])
            if named != label:
                _mark_wrong(figure, (left + column * cell) / width, (height - top - (row + 1) * cell) / height, named)
    figure.savefig(path, dpi=150)


def _mark_wrong(figure: Any, x: float, y: float, named: int) -> None:
    box = {"facecolor": "white", "edgecolor": WRONG, "pad": 1.5, "linewidth": 0.8}
    figure.text(x + 0.004, y + 0.008, f"named {named}", fontsize=7, color=WRONG, bbox=box, zorder=5)


def _draw_cell(axes: Any, image: Tensor, groups: Tensor, colours: Any) -> None:
    grid = int(len(groups) ** 0.5)
    extent = (0, grid, grid, 0)
    axes.imshow(fill_groups(image, groups, grid).numpy(), cmap=colours, vmin=0, vmax=1, extent=extent)
    lines = need("matplotlib.collections").LineCollection(group_borders(groups, grid), colors=OUTLINE, linewidths=0.55)
    axes.add_collection(lines)
    axes.set(xlim=(0, grid), ylim=(grid, 0))

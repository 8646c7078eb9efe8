"""What every picture of tofu_fx shares: how a figure is made and saved, and the colours of the strategies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tofu_fx.errors import TofuError
from tofu_fx.extras import need

USER = "drawing a picture"
INK, GREY = "#16324f", "#8a8a8a"
#: strategy -> colour and marker; "none" is a site that keeps all of its tokens
LOOKS = {
    "prune": ("#c0392b", "v"),
    "mean": ("#e8a33a", "s"),
    "mlerp": ("#2471a3", "o"),
    "none": (GREY, "."),
}


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # The object interface with the Agg canvas: no display is needed and the caller's pyplot state is left alone.
    figure_module = need("matplotlib.figure", user=USER)
    canvas = need("matplotlib.backends.backend_agg", user=USER).FigureCanvasAgg
    figure = figure_module.Figure(figsize=(width, height), facecolor="white")
    canvas(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure; the ending of the path decides the format (PNG where there is none).

    Raises:
        TofuError: a folder that does not exist or cannot be written to, or an ending that matplotlib does not know.
    """
    known = sorted(figure.canvas.get_supported_filetypes())
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending and ending not in known:
        raise TofuError(f"picture {os.fspath(path)!r}: no format is called {ending!r}; use one of {', '.join(known)}")
    try:
        figure.savefig(path, dpi=150, format=ending or "png")
    except OSError as error:
        raise TofuError(f"picture {os.fspath(path)!r} cannot be written: {error.strerror or error}") from None

"""The paper's figures as files, drawn by matplotlib, which is an extra. Nothing here imports torch.

Letters: F H W a clip, T' h w the token grid.
"""
from pathlib import Path

import numpy as np

from common.files import whole_file
from common.libraries import library
from common.pictures import overlay

COLOURS = ("#0072b2", "#d55e00")
SCALE = 4  # screen pixels of a clip's pixel


def figure(width: float, height: float):
    """An empty figure of so many inches, which no window shows. Raises UserError where matplotlib
    is not installed."""
    module = library("matplotlib.figure", "Figures need")
    return module.Figure((width, height), layout="constrained", dpi=90)


def save(path: Path, drawn) -> None:
    """Write a figure as a PNG, the whole file or none. Raises OSError."""
    with whole_file(path) as part:
        drawn.savefig(part, format="png", pil_kwargs={"optimize": True})


def pictures(rows: list[list[tuple[str, np.ndarray]]], captions: list[str]):
    """A figure of rows of pictures (h, w, 3), each under its title; a row's caption stands above it.
    """
    columns = max(map(len, rows))
    drawn = figure(1.35 * columns, 1.85 * len(rows))
    for part, row, caption in zip(np.atleast_1d(drawn.subfigures(len(rows))), rows, captions):
        part.suptitle(caption, fontsize=8, x=.01, ha="left")
        for axis, (title, picture) in zip(np.atleast_1d(part.subplots(1, columns)), row):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=7)
        for axis in part.axes:
            axis.axis("off")
    return drawn


def glow(clip: np.ndarray, heat: np.ndarray, frame: int) -> np.ndarray:
    """Frame number `frame` of a clip (F, H, W, 3), with its map (T', h, w) in 0..1 over it."""
    return overlay(clip, heat, SCALE)[frame]


def matrix(names: list[str], values: np.ndarray):
    """A figure of correlations in -1..1, with their values."""
    drawn = figure(7.5, 6.5)
    axis = drawn.subplots()
    image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=50, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if abs(value) > .6 else "black"
        axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    drawn.colorbar(image, shrink=.7, label="Pearson correlation of the experts' mean logits")
    return drawn


def pairs(names: list[str], before: list, after: list, labels: tuple[str, str], title: str):
    """A figure of two bars a name with their 95 % intervals, each (mean, half)."""
    drawn = figure(7.5, 3.4)
    axis = drawn.subplots()
    for place, values, label, colour in zip((-.2, .2), (before, after), labels, COLOURS):
        means, halves = zip(*values)
        axis.bar(np.arange(len(names)) + place, means, .4, yerr=halves, label=label, color=colour,
                 error_kw={"elinewidth": 1, "ecolor": "#444444"})
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axis.set_ylabel("law error")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)
    return drawn

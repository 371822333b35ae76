"""Scores and tables."""
import numpy as np


def auc(scores, positive) -> float:
    """Chance that a positive's score exceeds a negative's, ties counting half. Both (N,), both kinds present."""
    _, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # equal scores share the mean of their ranks, which start at 1
    n = positive.sum()
    return float((rank[which][positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def markdown(rows) -> str:
    """{row: {column: value, or (mean, deviation)}} as a Markdown table that is also straight in a terminal."""
    def cell(value):
        return "" if value is None else f"{value:.3f}" if np.isscalar(value) else "{:.3f} ± {:.3f}".format(*value)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row if column != "se"))
    lines = [["", *columns]] + [[name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    widths = [max(map(len, one)) for one in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)

"""Scores of maps, means over runs, and tables in Markdown. numpy only."""
import numpy as np


def auc(scores, positive) -> float:
    """The chance that a positive's score exceeds a negative's, ties counting half.

    scores (N,). positive: bool (N,), with both kinds present.
    """
    _, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # equal scores share the mean of their ranks
    n = positive.sum()
    return float((rank[which][positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def mean_and_deviation(values):
    """(mean, standard deviation) over runs; of a single run, its value."""
    mean = float(np.mean(values))
    return (mean, float(np.std(values, ddof=1))) if len(values) > 1 else mean


def over_runs(tables) -> dict:
    """Tables {row: {column: value}} of several runs -> {row: {column: (mean, deviation)}} for the
    rows that all of them have."""
    common = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: {column: mean_and_deviation([table[name][column] for table in tables])
                   for column in tables[0][name]} for name in common}


# --- Markdown -----------------------------------------------------------------------------------
def markdown(rows) -> str:
    """{row: {column: value}} as a Markdown table that is also straight in a terminal.

    value: a number, (mean, deviation), text, or None for an empty cell.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(_cell(row.get(column)) for column in columns)])
    widths = [max(map(len, texts)) for texts in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(table_line(map(str.ljust, line, widths)) for line in lines)


def table_head(columns) -> str:
    """The first two lines of a table whose other lines are printed one by one, as they come."""
    return f"{table_line(columns)}\n{'|---' * len(columns)}|"


def table_line(cells) -> str:
    """One line of a table, from the texts of its cells."""
    return f"| {' | '.join(cells)} |"


def _cell(value) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if np.isscalar(value):
        return f"{value:.3f}"
    return "{:.3f} ± {:.3f}".format(*value)

"""Scores of maps, means and differences over runs, and tables in Markdown. numpy only.

Letters: N tokens, C phenomena, E_s semantic experts.
"""
import math

import numpy as np


def auc(scores, positive) -> float:
    """The chance that a positive's score exceeds a negative's, ties counting half.

    scores (N,). positive: bool (N,), with both kinds present.
    """
    _, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # equal scores share the mean of their ranks
    n = positive.sum()
    return float((rank[which][positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def average_precision(scores, positive) -> float:
    """Mean, over the positives, of the share of positives among all that score as high or higher.

    Equal scores enter together, so that a constant score gets the share of positives, which is the
    level of chance. scores (N,). positive: bool (N,), with a true one.
    """
    _, which, count = np.unique(-scores, return_inverse=True, return_counts=True)
    hits = np.bincount(which, positive)  # positives at each level, the highest first
    return float(hits @ (hits.cumsum() / count.cumsum()) / hits.sum())


# --- what routers know, and chance: what one that weighs all evenly scores ----------------------
def mean_auc(maps, positive) -> float:
    """How well maps tell where: the mean AUC over a clip's tokens, of each phenomenon of each clip
    of which some, and not all, of the tokens are positive. maps, positive: (clips, N, C)."""
    pairs = zip(np.moveaxis(maps, 1, 2).reshape(-1, maps.shape[1]),
                np.moveaxis(positive, 1, 2).reshape(-1, maps.shape[1]))
    return float(np.mean([auc(scores, some) for scores, some in pairs
                          if some.any() and not some.all()]))


def which_scores(maps, positive, there) -> dict:
    """How well maps tell which phenomenon a token follows: {score: (value, chance)}.

    - average precision over all pairs of token and phenomenon;
    - the share of positive tokens whose largest map is a phenomenon that is there;
    - AUC, over all pairs of clip and phenomenon, of the map's peak.

    maps, positive: (clips, N, C). there: (clips, C).
    """
    tokens = positive.any(-1)  # (clips, N)
    # Of equal maps each is the largest to a part.
    largest = maps == maps.max(-1, keepdims=True)
    right = (largest & positive).sum(-1) / largest.sum(-1)
    return {
        "which: average precision": (
            average_precision(maps.ravel(), positive.ravel()), float(positive.mean())),
        "which: right on positive tokens": (
            float(right[tokens].mean()), float(positive[tokens].mean())),
        "which: presence in the clip": (auc(maps.max(1).ravel(), there.ravel()), .5)}


def semantic_scores(rho, lift, there) -> dict:
    """How softly the semantic router weighs its experts, and whether it tells which phenomena a
    clip has: {score: (value, chance)}. An expert is used if its mean weight is above 1 / (4 E_s).

    rho: (clips, E_s), rows sum to 1. lift, there: (clips, C).
    """
    E = rho.shape[1]
    entropy = -(rho * np.log(np.maximum(rho, 1e-30))).sum(1).mean()
    return {
        "text: largest weight": (float(rho.max(1).mean()), 1 / E),
        "text: entropy": (float(entropy), math.log(E)),  # in nats
        "text: experts used": (int((rho.mean(0) > 1 / (4 * E)).sum()), E),
        "text: presence in the clip": (auc(lift.ravel(), there.ravel()), .5)}


# --- runs ---------------------------------------------------------------------------------------
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


T_95 = (12.71, 4.31, 3.19, 2.78, 2.58, 2.45, 2.37, 2.31, 2.27, 2.23)  # of Student's t, 1 .. 10 df


def paired(a, b) -> tuple[float, float]:
    """(mean of a - b, half of its 95 % interval), of {seed: [a value a clip]} with the same seeds
    and, at every seed, the same clips in the same order. Raises ValueError where they differ.

    The interval is for other seeds and other clips at once: half of Student's interval of the
    seeds' means and half of that of the clips' means, added as squares. It holds the truth in 95 to
    99 of 100 cases, whether seeds or clips make the spread. A single seed tells of clips alone, and
    a single value has no interval: NaN.
    """
    if a.keys() != b.keys():
        raise ValueError("the seeds differ")
    d = np.array([a[seed] for seed in a]) - np.array([b[seed] for seed in a])  # (seeds, clips)
    squares = 0.
    for means in (d.mean(1), d.mean(0)):
        df = len(means) - 1
        if df:
            t = T_95[df - 1] if df <= len(T_95) else 1.96 + 2.7 / df
            squares += t ** 2 * means.var(ddof=1) / len(means)
    return float(d.mean()), float(np.sqrt(squares)) if d.size > 1 else math.nan


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

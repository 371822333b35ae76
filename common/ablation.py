"""The ablation's tables: scores of runs, clip by clip, become means with intervals and Markdown.

    scores of each seed --> by_clip --> compared (paired over clips and seeds) --> write_table

ablate.py makes the runs. The JSON keeps them clip by clip, so that a later start, on this machine
or another, adds rows to the same table. Nothing here imports torch.
"""
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

from common import score
from common.files import handle_of, is_intact, read_json, sealed, take, write_text
from config import UserError
from physics import laws


NAMES = {  # scores of evaluate.measure's "which_where", as the table has them
    "which: average precision": "micro AP", "which: right on positive tokens": "right",
    "which: presence in the clip": "presence", "where: refinement maps": "location AUC",
    "text: largest weight": "largest weight", "text: experts used": "experts used",
}
LAW = "law: "  # begins the measure of a single law
TABLES = {  # title: its measures; with a difference beside each but for routing and single laws
    "Law errors": ("law error", "two phenomena", "found"),
    "What is kept": ("held-out loss", "held-out, weak", "dynamic degree", "motion elsewhere"),
    "Routing": tuple(NAMES.values()),
    "Law errors of each phenomenon": tuple(LAW + name for name in laws.LAWS),
}
COMPARED = ("Law errors", "What is kept")
INTRO = """# Ablation

Written by `python ablate.py`. Every row starts from the base of its seed. Values are means with their
95 % interval, and differences are from the first row of the row's group, paired over clips; intervals
hold the spread of seeds and of clips (a single seed tells of clips alone). *Law error* is of clips with
one phenomenon: 0 is lawful. *Held-out, weak* is the loss on stage one's clips: what is forgotten.
*Dynamic degree* is the change from frame to frame where the actors are, over that of the true clip, and
*motion elsewhere* that of the rest of the picture, over the same. *Time a step* is relative to all parts,
timed eagerly and in turns. *Paper* is its physical commonsense on Wan2.1-1.3B (a single run each) and the
difference from all parts; where ours points is said of the law error, of two seeds or more. *Experts
inverted* (the paper's Figure 8) are the same runs as all parts, with the semantic logits flipped.
"""


def by_clip(scores: dict) -> dict[str, list[float]]:
    """What evaluate.measure returned -> {measure: a value a clip}; of routers a single value."""
    clips = []  # [(phenomenon, actors, error, found) of each actor of a clip]
    for judged in scores["errors"]:
        if clips and len(clips[-1]) < clips[-1][0][1]:  # the other actor of the same clip
            clips[-1].append(judged)
        else:
            clips.append([judged])

    def mean(clip, place):
        return sum(actor[place] for actor in clip) / len(clip)

    values = {"law error": [mean(clip, 2) for clip in clips if len(clip) == 1],
              "two phenomena": [mean(clip, 2) for clip in clips if len(clip) == 2],
              "found": [mean(clip, 3) for clip in clips],
              "held-out loss": scores["held_out"],
              "held-out, weak": scores["held_out_weak"],
              "dynamic degree": scores["dynamic"],
              "motion elsewhere": [rest for clip, rest in zip(clips, scores["elsewhere"])
                                   if len(clip) == 1]}  # two leave no room beside them
    for name, column in NAMES.items():
        if name in scores["which_where"]:
            values[column] = [scores["which_where"][name]]
    for name in laws.LAWS:
        values[LAW + name] = [mean(clip, 2) for clip in clips if len(clip) == 1 and clip[0][0] == name]
    return {name: [round(value, 5) for value in some] for name, some in values.items() if some}


def compared(rows: dict[int, dict], reference: dict[int, dict] | None) -> dict:
    """{measure: [mean, half of its 95 % interval or None where there is none]} of {seed: by_clip},
    minus those of a reference with the same seeds if there is one."""
    found = {}
    for name in next(iter(rows.values())):
        a = {seed: row[name] for seed, row in rows.items()}
        b = {seed: [0.] * len(some) for seed, some in a.items()}
        if reference:
            b = {seed: row[name] for seed, row in reference.items() if name in row}
        if b:
            found[name] = [one if math.isfinite(one) else None for one in score.paired(a, b)]
    return found


def cell(name: str, value: list | None) -> str:
    """A mean and its interval, if it has one, as text."""
    digits = 4 if name.startswith("held-out") else 3
    known = [part for part in value or () if part is not None]
    return " ± ".join(f"{part:.{digits}f}" for part in known)


def facts(config: str, section: dict) -> str:
    """What a config's figures were made with."""
    runs = section["runs"].values()
    told = {"config": config, **section["shared"], **section["asked"]}
    for name in ("date", "revision", "measured by", "machine", "torch", "base"):
        told[name] = ", ".join(sorted({run[name] for run in runs}))
    return "\n".join(f"* {name}: {value}" for name, value in told.items())


def tables(lines: dict[str, dict[str, dict]]) -> str:
    """The Markdown of {"equal steps" | "equal time": {row: what the table tells}}."""
    text = ""
    for kind, rows in [(kind, rows) for kind, rows in lines.items() if rows]:
        for title, measures in TABLES.items():
            table = {}
            for row in rows.values():
                cells = table[row["row"]] = {}
                if title == "Law errors":
                    cells |= {"seeds": str(row["seeds"]), "trained (M)": f"{row['trained'] / 1e6:.2f}",
                              "time a step": f"{row['ratio']:.2f}" if row["ratio"] else "",
                              "steps": str(row["steps"])}
                for name in measures:
                    column = name.removeprefix(LAW)
                    cells[column] = cell(name, row["values"].get(name))
                    if title in COMPARED:
                        cells[f"{column}, difference"] = cell(name, row["differences"].get(name))
                if title == "Law errors":
                    cells["paper"] = row["paper"]
            text += f"\n### {title}, at {kind}\n\n{score.markdown(table)}\n"
    return text


def read_table(path: Path) -> dict:
    """{config: its section} of the JSON beside a table; empty where there is none. Raises
    UserError where it is damaged."""
    data = path.with_suffix(".json")
    if not data.is_file():
        return {}
    stored = read_json(data)
    if not (is_intact(stored) and stored.pop("digest", None)):
        raise UserError(f"{data} is damaged, or no table of this command: move it away, and all "
                        "runs are scored again.")
    return stored


def write_table(path: Path, stored: dict, lines: dict) -> None:
    """Write the JSON of {config: its section}, and the table of {config: its lines}; the JSON has
    these, too, for report.py."""
    stored = {name: section | {"lines": lines[name]} for name, section in stored.items()}
    write_text(path.with_suffix(".json"), json.dumps(sealed(stored)) + "\n")
    sections = [f"## {config}\n\n{facts(config, stored[config])}\n{tables(some)}"
                for config, some in lines.items()]
    write_text(path, "\n".join([INTRO, *sections]))


class Table:
    """A table's section of one config, to which any number of threads and processes add."""

    def __init__(self, path: Path, config: str, section: dict, lines_of: Callable):
        """section: as it is now. lines_of(section): what the Markdown tells of it."""
        self.path = path
        self.config = config
        self.section = section
        self.lines_of = lines_of
        self.thread = threading.Lock()

    def add(self, part: str, more: dict) -> None:
        """Write both files, with more "runs" or "ratios", and with what others wrote meanwhile."""
        with self.thread, handle_of(self.path.parent) as handle:
            take(handle, wait=True)
            stored = read_table(self.path)
            self.section = stored.setdefault(self.config, self.section)
            self.section[part] |= more
            write_table(self.path, stored,
                        {name: self.lines_of(one) for name, one in stored.items()})

    def has(self, job) -> bool:
        """Is an ablate.Job there, as it would be made today?"""
        return self.section["runs"].get(job.name, {}).get("key") == job.key

"""The ablation's tables: scores of runs, clip by clip, become means with intervals and Markdown.

    scores of each seed --> by_clip --> compared (paired over clips and seeds) --> write_table

ablate.py makes the runs. The JSON keeps them clip by clip, so that a later start, on this machine
or another, adds rows to the same table. Nothing here imports torch.
"""
import json
from pathlib import Path

from common import score
from common.files import is_intact, read_json, sealed, write_text
from config import UserError
from physics import laws


DIFFERENCES = ("law error", "two phenomena", "held-out loss")  # shown against the reference too
NAMES = {  # scores of evaluate.measure's "which_where", as the table has them
    "which: average precision": "micro AP", "which: right on positive tokens": "right",
    "which: presence in the clip": "presence", "where: refinement maps": "location AUC",
}
INTRO = """# Ablation

Written by `python ablate.py`. Every row starts from the same base of its seed. Values are means
with their 95 % interval, and differences are from the first row of the row's group, paired over
clips; intervals hold the spread of seeds and of clips (a single seed tells of clips alone). *Law
error* is of clips with one phenomenon: 0 is lawful. *Held-out, weak* is the loss on stage one's
clips: what is forgotten. *Time a step* is relative to all parts, timed eagerly and in turns.
*Dynamic degree* is the motion over that of the true clip. *Inversion* is by how much the law error
rises, of all scenes, when the semantic experts are inverted. *Paper* is its physical commonsense on
Wan2.1-1.3B (a single run each) and the difference from all parts; where ours points is said of the
law error.
"""


def by_clip(scores: dict) -> dict[str, list[float]]:
    """What evaluate.measure returned -> {measure: a value a clip}; of routers a single value."""
    errors = scores["errors"]
    values = {"law error": [error for _, n, error, _ in errors if n == 1],
              "two phenomena": [error for _, n, error, _ in errors if n == 2],
              "found": [float(found) for *_, found in errors],
              "held-out loss": scores["held_out"],
              "held-out, weak": scores["held_out_weak"]}
    for name, column in NAMES.items():
        if name in scores["which_where"]:
            values[column] = [scores["which_where"][name]]
    values["dynamic degree"] = scores["dynamic"]
    inverted = scores.get("inverted", [])
    values["inversion"] = [after - before for (*_, before, _), (*_, after, _) in zip(errors, inverted)]
    for name in laws.LAWS:
        values[f"law: {name}"] = [error for one, n, error, _ in errors if (one, n) == (name, 1)]
    return {name: [round(value, 5) for value in some] for name, some in values.items() if some}


def compared(runs: list[dict], reference: list[dict] | None) -> dict:
    """{measure: [mean, half of its 95 % interval]} of by_clip of each seed, minus those of a
    reference if there is one."""
    found = {}
    for name in runs[0]:
        a = {seed: run[name] for seed, run in enumerate(runs)}
        b = {seed: [0.] * len(some) for seed, some in a.items()}
        if reference:
            b = {seed: run[name] for seed, run in enumerate(reference) if name in run}
        if b:
            found[name] = list(score.paired(a, b))
    return found


def cell(name: str, value: list[float]) -> str:
    """A mean and its interval, as text."""
    digits = 4 if name.startswith("held-out") else 3
    return " ± ".join(f"{part:.{digits}f}" for part in value)


def facts(config: str, section: dict) -> str:
    """What a config's figures were made with."""
    made = [run["made"] for run in section["runs"].values()]
    told = {"config": config, "seeds": section["seeds"], **section["asked"]}
    for name in ("date", "revision", "machine", "torch"):
        told[name] = ", ".join(sorted({one[name] for one in made}))
    return "\n".join(f"* {name}: {value}" for name, value in told.items())


def tables(lines: dict[str, dict[str, dict]]) -> str:
    """The Markdown of {"equal steps" | "equal time": {row: what the table tells}}."""
    text = ""
    for title, rows in lines.items():
        table = {}
        per_law = {}
        for row in rows.values():
            values = row["values"]
            table[row["row"]] = {
                "trained (M)": f"{row['trained'] / 1e6:.2f}",
                "time a step": "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                "steps": str(row["steps"]),
                **{column: cell(column, value) for column, value in values.items()
                   if not column.startswith("law: ")},
                **{f"{column}, difference": cell(column, row["differences"][column])
                   for column in DIFFERENCES},
                "paper": row["paper"]}
            per_law[row["row"]] = {column.removeprefix("law: "): cell(column, value)
                                   for column, value in values.items()
                                   if column.startswith("law: ")}
        text += (f"\n### At {title}\n\n{score.markdown(table)}\n\n"
                 f"Law errors of each phenomenon:\n\n{score.markdown(per_law)}\n")
    return text


def read_table(path: Path) -> dict:
    """{config: its section} of the JSON beside a table; empty where there is none. Raises
    UserError where it is damaged."""
    data = path.with_suffix(".json")
    if not data.is_file():
        return {}
    stored = read_json(data)
    if not is_intact(stored):
        raise UserError(f"{data} is damaged: remove it, and all runs are scored again.")
    stored.pop("digest", None)
    return stored


def write_table(path: Path, stored: dict, lines: dict) -> None:
    """Write the JSON of {config: its section}, and the table of {config: its lines}."""
    write_text(path.with_suffix(".json"), json.dumps(sealed(stored)) + "\n")
    sections = [f"## {config}\n\n{facts(config, stored[config])}\n{tables(some)}"
                for config, some in lines.items()]
    write_text(path, "\n".join([INTRO, *sections]))

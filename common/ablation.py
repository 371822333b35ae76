"""The ablation's tables: scores of runs, clip by clip, become means with intervals and Markdown.

    scores.json of each seed --> by_clip --> compared (paired over clips and seeds) --> write_table

ablate.py makes the runs. Nothing here imports torch.
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
    return {name: some for name, some in values.items() if some}


def compared(rows: dict[int, dict], reference: dict[int, dict] | None) -> dict:
    """{measure: [mean, half of its 95 % interval]} of {seed: by_clip}, minus those of a reference
    if there is one."""
    found = {}
    for name in rows[0]:
        a = {seed: row[name] for seed, row in rows.items()}
        b = {seed: [0.] * len(some) for seed, some in a.items()}
        if reference:
            b = {seed: row[name] for seed, row in reference.items() if name in row}
        if b:
            found[name] = list(score.paired(a, b))
    return found


def cell(name: str, value: list[float]) -> str:
    """A mean and its interval, as text."""
    digits = 4 if name.startswith("held-out") else 3
    return " ± ".join(f"{part:.{digits}f}" for part in value)


def section(settings: dict, lines: dict[str, dict[str, dict]]) -> str:
    """The Markdown of one config. lines: {"equal steps" | "equal time": {row: what the table
    tells}}, as ablate.py makes them."""
    facts = "\n".join(f"* {name}: {value}" for name, value in settings.items())
    text = f"## {settings['config']}\n\n{facts}\n"
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


def write_table(path: Path, settings: dict, lines: dict) -> None:
    """Write the table and its JSON. What they hold of other configs stays."""
    data = path.with_suffix(".json")
    stored = {}
    if data.is_file():
        stored = read_json(data)
        if not is_intact(stored):
            raise UserError(f"{data} is damaged: remove it, and the other configs' tables with it.")
        stored.pop("digest", None)
    stored[settings["config"]] = {"settings": settings, "lines": lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(data, json.dumps(sealed(stored), indent=1) + "\n")
    write_text(path, "\n".join([INTRO, *(section(**one) for one in stored.values())]))

"""VBench: its *_eval_results.json become the quality score."""
import math
from pathlib import Path

from common import score
from common.files import join_some, read_json
from config import UserError

QUALITY = {  # dimension: (what counts as 0, what counts as 1, weight)
    "subject_consistency": (.1462, 1., 1.),
    "background_consistency": (.2615, 1., 1.),
    "temporal_flickering": (.6293, 1., 1.),
    "motion_smoothness": (.706, .9975, 1.),
    "dynamic_degree": (0., 1., .5),
    "aesthetic_quality": (0., 1., 1.),
    "imaging_quality": (0., 1., 1.),
}


def read_results(paths: list[str]) -> dict[str, float]:
    """{dimension: mean} of one or several files of results. Raises UserError for a value that is no
    share, and for a dimension that two files tell differently."""
    found = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"There is no file {path}: *_eval_results.json of VBench is expected.")
        for name, value in read_json(Path(path)).items():
            name = name.replace(" ", "_")
            mean = value[0] if isinstance(value, list) and value else value
            if type(mean) not in (int, float) or not 0 <= mean <= 1:
                raise UserError(f"{path}: {name} is {str(mean)[:40]}, not [mean, clips] with a "
                                "mean from 0 to 1.")
            if found.setdefault(name, mean) != mean:
                raise UserError(f"{path} says {mean} of {name}, and another file {found[name]}: "
                                "give the files of one model.")
    if not found:
        raise UserError(f"There is no result in {join_some(paths, 3)}.")
    return found


def normalised(name: str, mean: float) -> float:
    """Where a mean stands between what counts as 0 and as 1."""
    low, high, _ = QUALITY[name]
    return (mean - low) / (high - low)


def quality_score(means: dict[str, float]) -> float:
    """The weighted mean of the seven dimensions, NaN where one is missing: nothing is guessed."""
    if not QUALITY.keys() <= means.keys():
        return math.nan
    weights = {name: weight for name, (_, _, weight) in QUALITY.items()}
    total = sum(weights[name] * normalised(name, means[name]) for name in QUALITY)
    return total / sum(weights.values())


def show_quality(paths: list[str]) -> None:
    """--vbench: print the dimensions and the quality score. Raises UserError."""
    means = read_results(paths)
    rows = {name: {"mean": mean} for name, mean in means.items()}
    for name in QUALITY.keys() & means.keys():
        rows[name]["normalised"] = normalised(name, means[name])
        rows[name]["weight"] = f"{QUALITY[name][2]:g}"
    print(score.markdown(rows))

    outside = [name for name in rows if not 0 <= rows[name].get("normalised", 0) <= 1]
    if outside:
        print(f"Outside the range that VBench normalises by: {join_some(outside)}. The score takes "
              "them as they are.")
    missing = [name for name in QUALITY if name not in means]
    if missing:
        print(f"No quality score: {len(missing)} of its seven dimensions are missing: "
              f"{join_some(missing)}.")
        return
    print(f"Quality score: {100 * quality_score(means):.2f} of 100. Dynamic degree, a part of it, "
          "rewards any fast motion, right or wrong.")

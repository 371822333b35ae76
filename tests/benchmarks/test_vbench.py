"""VBench's results: the quality score by hand, and what is missing or odd is named."""
import json

import pytest

import evaluate
from benchmarks import vbench
from helpers import sentence

MEANS = {"subject_consistency": .9, "background_consistency": .95, "temporal_flickering": .98, "motion_smoothness": .99,
         "dynamic_degree": .6, "aesthetic_quality": .55, "imaging_quality": .65}
# (.9-.1462)/.8538 = .88288, (.95-.2615)/.7385 = .93230, (.98-.6293)/.3707 = .94605, (.99-.706)/.2915 = .97427:
# their sum 3.73549, + .5 * .6 + .55 + .65 = 5.23549, / 6.5 = .80546
SCORE = .80546


def results(path, means):
    """A file as VBench writes it."""
    path.write_text(json.dumps({name: [mean, [{"video_path": "a, b.mp4", "video_results": mean}]]
                                for name, mean in means.items()}))
    return str(path)


def test_the_quality_score_by_hand(tmp_path, capsys):
    assert vbench.quality_score(MEANS) == pytest.approx(SCORE, abs=1e-5)
    assert vbench.quality_score({name: high for name, (_, high, _) in vbench.QUALITY.items()}) == pytest.approx(1)
    assert vbench.quality_score({name: low for name, (low, *_) in vbench.QUALITY.items()}) == 0
    names = list(MEANS)
    first = results(tmp_path / "a_eval_results.json", {name: MEANS[name] for name in names[:4]})
    second = results(tmp_path / "b_eval_results.json", {name.replace("_", " "): MEANS[name] for name in names[3:]})
    evaluate.main(["--vbench", first, second])
    out = capsys.readouterr().out
    assert "Quality score: 80.55 of 100" in out and "missing" not in out and "Outside" not in out
    evaluate.main(["--vbench", first, "--vbench", second])
    assert capsys.readouterr().out == out


def test_missing_dimensions_are_named_and_not_guessed(tmp_path, capsys):
    some = {name: mean for name, mean in MEANS.items() if name not in ("temporal_flickering", "imaging_quality")}
    evaluate.main(["--vbench", results(tmp_path / "r.json", some | {"human_action": .8})])
    out = capsys.readouterr().out
    assert "No quality score: 2 of its seven dimensions are missing: temporal_flickering, imaging_quality." in out
    assert "Quality score:" not in out and "human_action" in out


def test_values_outside_the_range_are_named(tmp_path, capsys):
    evaluate.main(["--vbench", results(tmp_path / "r.json", MEANS | {"motion_smoothness": .999})])
    out = capsys.readouterr().out
    assert "Outside the range that VBench normalises by: motion_smoothness." in out and "Quality score: 81.0" in out


@pytest.mark.parametrize("content, piece", [
    ({"imaging_quality": [65.2, []]}, "imaging_quality is 65.2"),
    ({"imaging_quality": ["high", []]}, "imaging_quality is high"),
    ({"imaging_quality": [float("nan"), []]}, "imaging_quality is nan"),
    ({"imaging_quality": []}, "imaging_quality is []"),
    ({"imaging_quality": [True, []]}, "imaging_quality is True"),
    ({"imaging_quality": [.5, []]}, "says 0.5 of imaging_quality, and another file 0.65"),
    ({}, "There is no result in"), ([1], "is not a JSON object"), (None, "There is no file")])
def test_odd_files_are_one_sentence(tmp_path, content, piece):
    odd = tmp_path / "odd.json"
    if content is not None:
        odd.write_text(json.dumps(content))
    files = [str(odd)] if content in ({}, [1], None) else [results(tmp_path / "r.json", MEANS), str(odd)]
    assert piece in sentence(evaluate.main, ["--vbench", *files])

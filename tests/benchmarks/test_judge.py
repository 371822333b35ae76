"""The local judge: strict reading, a tiny random Qwen2.5-VL, one that always says "4", and going on where it stopped."""
import csv
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

pytest.importorskip("transformers", reason="the VLM needs transformers: pip install -r requirements.txt")
import evaluate
from benchmarks import judge
from common import files
from helpers import ROOT, drifting, sentence
from tiny_vlm import LETTERS, MARKS, make_vlm
from vlm import qwen

NASTY = ["a ball, a cup and a \"glass\"; it's 1/2 full", "two\nlines, and 球", "un été à la plage; l'eau bout"]


@pytest.mark.parametrize("answer, value", [
    ("4", 4), (" 4.", 4), ("**2**", 2), ("Score: five", 5), ("Four", 4), ("I would say 3, as it falls.", 3), ("(1)", 1),
    ("", 0), ("good", 0), ("0", 0), ("6", 0), ("zero", 0), ("ten", 0), ("45", 0), ("4.0", 0), ("4.5", 0), ("-4", 0),
    ("4/5", 0), ("4 of 5", 0), ("3 or 4", 0), ("one of the best: 4", 0), ("4 4", 0), ("4th", 0), ("someone", 0),
    ("fourteen", 0), ("1-5", 0), ("٤", 0)])
def test_exactly_one_number_from_1_to_5_is_a_score(answer, value):
    assert judge.read_answer(answer) == value


def say_four(folder):
    """Plant weights: what is said depends on the last token alone, "4" after anything but "4", then the end."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    four = len(MARKS) + LETTERS.index("4")
    for name, tensor in tensors.items():
        if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")) and "visual" not in name:
            tensor.zero_()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            one, other = torch.eye(len(tensor[0]))[:2]
            tensor.zero_()
            tensor[:] = one if "embed" in name else 0
            tensor[four] = other if "embed" in name else one
        if name.endswith("lm_head.weight"):
            tensor[MARKS.index("<|end|>")] = other
        if "visual" not in name and name.endswith("norm.weight"):
            tensor.fill_(1)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def vlms(tmp_path_factory):
    """A tiny Qwen2.5-VL of random weights, and one that always says "4"."""
    base = tmp_path_factory.mktemp("judges")
    random = make_vlm(base / "random", "qwen2_5_vl")
    return random, say_four(shutil.copytree(random, base / "four"))


@pytest.fixture
def clips(tmp_path):
    """Three clips of nasty prompts and a csv that names them."""
    folder = tmp_path / "my clips; a, b"
    folder.mkdir()
    rows = [(caption, f"it's {i}, \"a\".mp4") for i, caption in enumerate(NASTY)]
    for i, (_, name) in enumerate(rows):
        drifting(folder / name, i)
    with open(folder / "clips.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("caption", "videopath"), *rows])
    return folder


def rate(vlm, clips, *more):
    evaluate.main(["--judge", str(vlm), "--clips_dir", str(clips), "--device", "cpu", *map(str, more)])


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_planted_judge_always_says_four(vlms, clips, capsys):
    rate(vlms[1], clips)
    out = capsys.readouterr().out
    assert "0 clips as judged before, 3 to judge" in out and "100.0 (43.9 to 100.0)" in out  # 3 / (3 + 1.96^2)
    assert "not those of VideoPhy-2's rater" in out and "0 answers on SA and 0 on PC" in out
    for task in ("sa", "pc"):
        rows = rows_of(clips / f"judge_{task}.csv")
        assert [row["score"] for row in rows] == ["4.0"] * 3 and [row["caption"] for row in rows] == NASTY
    assert not list(clips.glob("*.part"))
    evaluate.main(["--videophy2", str(clips / "judge_sa.csv"), str(clips / "judge_pc.csv")])
    assert "| all | 3 " in capsys.readouterr().out  # the files are of the rater's form


def test_a_random_judge_is_not_understood(vlms, clips, capsys):
    rate(vlms[0], clips)
    assert "3 answers on SA and 3 on PC" in capsys.readouterr().out
    assert [row["score"] for row in rows_of(clips / "judge_sa.csv")] == ["0.0"] * 3


def test_both_questions_are_asked_of_each_clip(vlms, clips, monkeypatch, capsys):
    """Answers by the question: SA gets 2 and PC 5; captions stand in SA's question alone."""
    asked = []

    def answer(self, videos, owners, suffixes, words):
        asked.append([self.tokenizer.decode(suffix) for suffix in suffixes])
        assert owners == [0, 0] and videos.grid[0] == 17  # 33 frames, two a token
        return [self.tokenizer(digit).input_ids for digit in "25"]
    monkeypatch.setattr(qwen.VLM, "answer", answer)
    rate(vlms[0], clips)
    assert [row["score"] for row in rows_of(clips / "judge_sa.csv")] == ["2.0"] * 3
    assert [row["score"] for row in rows_of(clips / "judge_pc.csv")] == ["5.0"] * 3
    assert len(asked) == 3 and NASTY[0] in asked[0][0] and all(NASTY[0] not in pc for _, pc in asked)


def test_what_was_judged_is_not_judged_again(vlms, clips, monkeypatch, capsys):
    """Another file, caption or judge is; a stop in between loses nothing."""
    judged, ask = [], judge.ask

    def counted(vlm, path, caption):
        if len(judged) == 2 and stop:
            raise KeyboardInterrupt
        judged.append(path.name)
        return ask(vlm, path, caption)
    monkeypatch.setattr(judge, "ask", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        rate(vlms[1], clips)
    stop = False
    assert len(rows_of(clips / "judge_sa.csv")) == 2
    rate(vlms[1], clips)
    assert len(judged) == 3 and len(set(judged)) == 3
    monkeypatch.setattr(qwen.VLM, "from_folder", lambda *_: pytest.fail("nothing is to do"))
    rate(vlms[1], clips)
    monkeypatch.undo()
    monkeypatch.setattr(judge, "ask", counted)

    drifting(clips / judged[0], 9)
    rate(vlms[1], clips)
    assert judged[3:] == judged[:1]
    text = (clips / "clips.csv").read_text(encoding="utf-8")
    (clips / "clips.csv").write_text(text.replace("un été", "un hiver"), encoding="utf-8")
    rate(vlms[1], clips)
    assert len(judged) == 5
    rate(vlms[0], clips)
    assert len(judged) == 8 and len(rows_of(clips / "judge_pc.csv")) == 3


def test_a_bad_clip_concerns_itself_alone(vlms, clips, capsys):
    first, second, third = sorted(clips.glob("*.mp4"))
    first.write_bytes(b"no video")
    second.unlink()
    rate(vlms[1], clips)
    assert "Skipped: 2 (" in capsys.readouterr().out and len(rows_of(clips / "judge_sa.csv")) == 1
    third.unlink()
    assert "No clip could be judged: 3 (" in sentence(rate, vlms[1], clips)


def test_one_process_judges_a_folder(vlms, clips):
    with files.lock(clips):
        assert "Another process judges in" in sentence(rate, vlms[1], clips)


def people(path, clips, sa, pc):
    """People's scores: one file with both."""
    names = [row["videopath"] for row in rows_of(clips / "clips.csv")]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("pc", "videopath", "sa"), *zip(pc, names, sa), (3, "another.mp4", 3)])
    return path


def test_agreement_with_people(vlms, clips, tmp_path, monkeypatch, capsys):
    said = iter(["4", "1", "2", "2", "5", "x"])  # SA, PC of each clip
    monkeypatch.setattr(judge, "ask", lambda *_: [next(said), next(said)])
    file = people(tmp_path / "people.csv", clips, (5, 3, 4), (2, 4, 1))
    rate(vlms[1], clips, "--agree", file, file)
    table = capsys.readouterr().out.split("Agreement")[1]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in table.splitlines() if line.startswith("|")}
    # SA: 4 2 5 against 5 3 4, products 2, squares 14/3 and 2; ranks 2 1 3 against 3 1 2.
    assert cells["SA"][:4] == ["3", "3", f"{2 / (14 / 3 * 2) ** .5:.3f}", "0.500"] and cells["SA"][4].startswith("100.0 (")
    # PC: 1 2 and not understood, against 2 4 1; of the passes only the second differs.
    assert cells["PC"][:4] == ["3", "2", "1.000", "1.000"] and cells["PC"][4].startswith("66.7 (")


def test_correlations_by_hand():
    nan = float("nan")
    assert judge.correlations([1, 2, 3, 4], [1, 3, 2, 4]) == (pytest.approx(.8), pytest.approx(.8))
    assert judge.correlations([1, 2, 2, 3], [10, 20, 20, 90])[1] == pytest.approx(1)  # ties share their ranks
    # Ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3, 4.
    assert judge.correlations([1, 2, 2, 3], [5, 5, 7, 9])[1] == pytest.approx(3.75 / (4.5 * 4.5) ** .5)
    assert str(judge.correlations([4, 4, 4], [1, 2, 3])) == str((nan, nan)) == str(judge.correlations([4], [1]))


def test_a_judge_that_never_varies_has_no_correlation(vlms, clips, tmp_path, capsys):
    file = people(tmp_path / "people.csv", clips, (5, 3, 4), (2, 4, 1))
    rate(vlms[1], clips, "--agree", file, file)
    table = capsys.readouterr().out.split("Agreement")[1]
    assert table.count("none") == 4 and "66.7 (" in table and "33.3 (" in table


def test_mistakes_are_one_sentence(vlms, clips, tmp_path):
    assert "There is no VLM in gone" in sentence(rate, "gone", clips)
    (clips / "more.csv").write_text("caption,videopath\na,b\n")
    assert "No clip could be judged: 1 (b (missing))" in sentence(rate, vlms[1], clips / "more.csv")
    assert "has no rows" in sentence(rate, vlms[1], empty(clips / "none.csv"))
    assert "gone/clips.csv cannot be read" in sentence(rate, vlms[1], tmp_path / "gone")
    (clips / "more.csv").write_text("videopath\nb\n")
    assert "0 columns 'caption'" in sentence(rate, vlms[1], clips / "more.csv")
    (clips / "more.csv").write_text("videopath,sa,pc\nelse.mp4,3,3\n")
    agree = ("--agree", clips / "more.csv", clips / "more.csv")
    assert "no videopath of these" in sentence(rate, vlms[1], clips, *agree)
    (clips / "judge_sa.csv").unlink()
    (clips / "judge_sa.csv").mkdir()
    assert "judge_sa.csv cannot be written: it is a folder" in sentence(rate, vlms[1], clips)


def empty(path):
    path.write_text("caption,videopath\n")
    return path


@pytest.mark.parametrize("argv, piece", [
    ("--videophy2 a.csv", "expected 2 arguments"), ("--videophy2 a b --videophy2 c d", "takes two files, SA.csv and PC.csv, once"),
    ("--videophy2 a b --vbench c", "--videophy2 and --vbench are two commands"), ("--hard a", "--hard changes something only"),
    ("--other a b", "--other changes something only"), ("--vbench", "expected at least one argument"),
    ("--judge a", "--judge needs --clips_dir"), ("--clips_dir a", "only with --judge"), ("--agree a b", "only with --judge"),
    ("--videophy2 a b --run c", "--run is for a run, and --videophy2 reads none"), ("--flow_weights a", "with --dynamic"),
    ("--vbench a --steps 3", "--steps is for a run"), ("--vbench a --device cpu", "--device changes something only"),
    ("--dynamic world --flow_weights a", "known exactly"), ("--run a --hard b", "--hard changes something only")])
def test_flags_that_do_not_go_together_are_one_sentence(argv, piece):
    assert piece in sentence(evaluate.main, argv.split())


def test_the_command_ends_with_2_and_help_lists_every_flag(tmp_path):
    command = [sys.executable, ROOT / "evaluate.py"]
    done = subprocess.run([*command, "--videophy2", "gone.csv", "b.csv"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "gone.csv cannot be read as a csv file in UTF-8 (No such file or directory)." in done.stderr
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    for flag in ("videophy2", "other", "hard", "vbench", "dynamic", "flow_weights", "judge", "clips_dir", "agree", "run"):
        assert f"--{flag} " in shown

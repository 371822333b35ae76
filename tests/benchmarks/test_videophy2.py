"""VideoPhy-2's csv files: read whatever the prompts hold, joined by path, figures by hand."""
import csv
import io
import itertools
import math
import random

import pytest

import evaluate
from benchmarks import intervals, videophy2
from helpers import sentence

NASTY = [
    "a ball, a cup and a \"glass\"; it's 1/2 full",
    "two\nlines, and a tab\there",
    "un été à la plage; l'eau bout",
    "一个红球落在地上，弹起来",
    "كرة حمراء تسقط",
    "x" * 300,
    " spaces  in it ",
    "a 🎈 bursts"]


def write(path, scores, columns=("caption", "videopath", "score"), index=True, **how):
    """A csv file as pandas writes it: {videopath: score, or (caption, score)}."""
    text = io.StringIO(newline="")
    table = csv.writer(text, **how)
    table.writerow([""] * index + list(columns))
    for i, (name, score) in enumerate(scores.items()):
        caption, score = score if isinstance(score, tuple) else (name.split("-")[0], score)
        row = {"caption": caption, "videopath": name, "score": score}
        table.writerow([i] * index + [row.get(column, "extra") for column in columns])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


def pair(folder, sa, pc, name=""):
    return write(folder / f"{name}sa.csv", sa), write(folder / f"{name}pc.csv", pc)


def scored(folder, *scores, name=""):
    """Both files, from (SA, PC) of clips p00, p01, ..."""
    return pair(folder, *({f"p{i:02}-0.mp4": f"{both[which]:.1f}" for i, both in enumerate(scores)} for which in (0, 1)),
                name=name)


def shown(capsys, *argv):
    evaluate.main([str(word) for word in argv])
    return capsys.readouterr().out


def cells(text, row):
    """{column: cell} of the first table's row of this name in what is printed."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    at = next(i for i, line in enumerate(lines) if line[0] == row)
    head = next(line for line in reversed(lines[:at]) if line[0] == "" and not set("".join(line)) <= {"-"})
    return dict(zip(head, lines[at]))


# --- reading ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("columns", [*itertools.permutations(("caption", "videopath", "score"))])
def test_nasty_prompts_and_paths_come_back(tmp_path, columns):
    scores = {f"out dir/{prompt}.mp4": (prompt, f"{i % 6}.0") for i, prompt in enumerate(NASTY)}
    for index, quoting in itertools.product((True, False), (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)):
        path = write(tmp_path / "sa.csv", scores, (*columns, "more"), index, quoting=quoting)
        found = videophy2.read_scores(path, "SA")
        assert found == {name: (" ".join(caption.split()), float(score)) for name, (caption, score) in scores.items()}
        assert list(found) == sorted(scores)


def test_shapes_of_the_official_repository_are_read(tmp_path):
    """Float scores behind an index, a byte-order mark, ends of line of Windows, pc without captions."""
    sa = tmp_path / "sa.csv"
    sa.write_bytes("\ufeff,caption,videopath,score\r\n0,\"a, b\",v/1.mp4,4.0\r\n1,c,v/2.mp4,0.0\r\n".encode())
    pc = tmp_path / "pc.csv"
    pc.write_text(",videopath,score\n0,v/2.mp4,5.0\n1,v/1.mp4,4\n")
    assert videophy2.read_clips(sa, pc) == [
        videophy2.Clip("v/1.mp4", "a, b", 4, 4), videophy2.Clip("v/2.mp4", "c", 0, 5)]
    assert videophy2.read_clips(pc, sa)[0].caption == "a, b"  # which stands in one of the files alone
    people = tmp_path / "people.csv"  # one file with both tasks' columns
    people.write_text("\ufeffvideopath,caption,sa,pc\n1.mp4,a,4.5,2\n", encoding="utf-8")
    assert videophy2.read_clips(people, people) == [videophy2.Clip("1.mp4", "a", 4.5, 2)]


def test_the_order_of_rows_changes_nothing(tmp_path, capsys):
    scores = [(random.Random(i).randint(0, 5), random.Random(-i - 1).randint(0, 5)) for i in range(40)]
    sa, pc = scored(tmp_path, *scores)
    before = shown(capsys, "--videophy2", sa, pc)
    joint = sum(a >= 4 and b >= 4 for a, b in scores)
    assert 0 < joint < 20 and cells(before, "all")["joint, %"].startswith(f"{100 * joint / 40:.1f} (")
    first, *rows = pc.read_text().splitlines()
    random.Random(0).shuffle(rows)
    pc.write_text("\n".join([first, *rows]) + "\n")
    assert shown(capsys, "--videophy2", sa, pc) == before


@pytest.mark.parametrize("change, pieces", [
    (lambda rows: rows[:3] + rows[4:], ["sa.csv has videopaths that", "pc.csv lacks: 1 (p02-0.mp4)"]),
    (lambda rows: rows[:1], ["pc.csv has no rows"]),
    (lambda rows: rows[:2], ["lacks: 4 (p01-0.mp4, p02-0.mp4, p03-0.mp4 and 1 more)"]),
    (lambda rows: rows + ["9,new,new.mp4,3.0"], ["pc.csv has videopaths that", "sa.csv lacks: 1 (new.mp4)"]),
    (lambda rows: rows + rows[2:3], ["appear again in other rows: 1 (p01-0.mp4)"]),
    (lambda rows: [row.replace("4.0", "good") for row in rows], ["no number from 0 to 5: 2 (p00-0.mp4, p03-0.mp4)"]),
    (lambda rows: [row.replace("4.0", "") for row in rows], ["no number from 0 to 5: 2 (p00-0.mp4, p03-0.mp4)"]),
    (lambda rows: [row.replace("4.0", "nan") for row in rows], ["no number from 0 to 5: 2"]),
    (lambda rows: [row.replace("4.0", "6") for row in rows], ["no number from 0 to 5: 2"]),
    (lambda rows: [row + ",more" for row in rows[:1]] + rows[1:], ["more or fewer cells", "5 (1, 2, 3 and 2 more)"]),
    (lambda rows: rows[:2] + ["1,a, b,p01-0.mp4,4.0"], ["1 (2); are commas quoted?"]),
    (lambda rows: [rows[0].replace("score", "rating")] + rows[1:], ["0 columns 'score'"]),
    (lambda rows: [rows[0].replace("caption", "score")] + rows[1:], ["2 columns 'score'"]),
    (lambda rows: [row.replace(",p0", ",another p0", 1) if i == 2 else row for i, row in enumerate(rows)],
     ["have other captions", "1 (p01-0.mp4)"]),
    (lambda rows: rows[:2] + ["1,\"a,p01-0.mp4,4.0"], ["cannot be read as a csv file"]),
])
def test_what_is_wrong_with_a_file_is_said(tmp_path, change, pieces):
    sa, pc = scored(tmp_path, (4, 4), (5, 3), (2, 2), (4, 4), (1, 1))
    pc.write_text("\n".join(change(pc.read_text().splitlines())) + "\n")
    said = sentence(evaluate.main, ["--videophy2", str(sa), str(pc)])
    assert all(piece in said for piece in pieces), said


# --- figures ------------------------------------------------------------------------------------------------------
def test_wilson_by_hand():
    z2 = 1.959964 ** 2
    assert intervals.wilson(0, 10) == (0, pytest.approx(z2 / (10 + z2)))
    assert intervals.wilson(10, 10) == (pytest.approx(10 / (10 + z2)), pytest.approx(1))
    assert intervals.wilson(5, 20) == (pytest.approx(.1119, abs=1e-4), pytest.approx(.4687, abs=1e-4))
    for hits, n in ((5, 20), (150, 600), (1, 3)):  # the ends are where the score test is at its limit
        for end in intervals.wilson(hits, n):
            assert (hits / n - end) ** 2 == pytest.approx(z2 * end * (1 - end) / n)
    low, high = intervals.wilson(150, 600)
    assert (high - low) / 2 == pytest.approx(.035, abs=.001)  # what the paper's 25 of 600 is worth


def test_the_table_by_hand(tmp_path, capsys):
    """Eight clips: SA passes 4, PC 5, both 3; one answer on each was not understood."""
    files = scored(tmp_path, (4, 4), (5, 5), (4, 5), (5, 3), (3, 4), (2, 4), (1, 0), (0, 1))
    out = shown(capsys, "--videophy2", *files)
    row = cells(out, "all")
    low, high = (100 * end for end in intervals.wilson(3, 8))
    assert row["clips"] == "8" and row["joint, %"] == f"37.5 ({low:.1f} to {high:.1f})"
    assert row["SA >= 4, %"].startswith("50.0 (") and row["PC >= 4, %"].startswith("62.5 (")
    half = 1.959964 * math.sqrt(sum((x - 24 / 7) ** 2 for x in (4, 5, 4, 5, 3, 2, 1)) / 6 / 7)
    assert row["SA"] == f"{24 / 7:.2f} ± {half:.2f}" and row["PC"].startswith(f"{26 / 7:.2f} ±")
    assert "Not understood: 1 answers on SA and 1 on PC" in out and "hard" not in out and "narrow" not in out
    twice = {"a/p-0.mp4": 4, "a/p-1.mp4": 5}
    assert "2 clips of 1 prompts" in shown(capsys, "--videophy2", *pair(tmp_path, twice, twice))


def test_scores_of_which_none_was_understood_have_no_mean(tmp_path, capsys):
    row = cells(shown(capsys, "--videophy2", *scored(tmp_path, (0, 0), (0, 4))), "all")
    assert row["SA"] == "" and row["PC"] == "4.0" and row["joint, %"].startswith("0.0 (0.0 to ")


@pytest.mark.parametrize("name, text", [
    ("hard.txt", "p01\n\np00-0.mp4\nnot  there\n"),
    ("hard.csv", "\ufeffaction,caption\nhit,p01\nfall,p00-0.mp4\nfly,not there\n")])
def test_the_hard_subset_is_what_a_list_says(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    files = scored(tmp_path, (4, 4), (5, 3), (4, 5), (1, 1))
    out = shown(capsys, "--videophy2", *files, "--hard", tmp_path / name)
    assert cells(out, "hard")["clips"] == "2" and cells(out, "hard")["joint, %"].startswith("50.0 (")
    assert "0 by construction" in out and "CogVideoX-5B" in out and "no clip here: 1 (not there)" in out
    (tmp_path / name).write_text("caption\nsomething else\n")
    said = sentence(evaluate.main, ["--videophy2", *map(str, files), "--hard", str(tmp_path / name)])
    assert "names no prompt and no path" in said


def test_mcnemar_by_hand():
    assert intervals.mcnemar(0, 5) == intervals.mcnemar(5, 0) == 2 / 32
    assert intervals.mcnemar(3, 1) == 2 * (1 + 4) / 16
    assert intervals.mcnemar(2, 2) == intervals.mcnemar(0, 0) == 1
    assert 0 < intervals.mcnemar(0, 1000) < 1e-300 and intervals.mcnemar(2000, 2000) == 1  # without overflow


def test_the_bootstrap_draws_prompts_and_not_clips():
    assert intervals.bootstrap([[1], [1], [1]]) == (1, 1)
    rng = random.Random(0)
    gains = [rng.choice((-1, 0, 1)) for _ in range(200)]
    sd = math.sqrt(sum((g - sum(gains) / 200) ** 2 for g in gains) / 200)
    for copies in (1, 5):  # five equal clips of a prompt tell no more than one
        low, high = intervals.bootstrap([[gain] * copies for gain in gains])
        assert high - low == pytest.approx(2 * 1.96 * sd / math.sqrt(200), rel=.08)
        assert (low + high) / 2 == pytest.approx(sum(gains) / 200, abs=.02)
    low, high = intervals.bootstrap([[gain] for gain in gains for _ in range(5)])
    assert high - low == pytest.approx(2 * 1.96 * sd / math.sqrt(1000), rel=.08)


def test_two_models_are_compared_prompt_by_prompt(tmp_path, capsys):
    """Of four prompts this model alone passes two and the other one; the paths differ, captions and ranks count."""
    mine = {"b/p-0.mp4": ("p", 5), "b/p-1.mp4": ("p", 1), "b/q.mp4": ("q", 4), "b/r.mp4": ("r", 1), "b/s.mp4": ("s", 4)}
    theirs = {"z/s.mp4": ("s", 4), "z/r.mp4": ("r", 5), "z/p-1.mp4": ("p", 1), "z/p-0.mp4": ("p", 2), "z/q.mp4": ("q", 3)}
    files = pair(tmp_path, mine, mine)
    other = pair(tmp_path, theirs, theirs, "other_")
    (tmp_path / "hard.txt").write_text("q\nr\n")
    out = shown(capsys, "--videophy2", *files, "--other", *other, "--hard", tmp_path / "hard.txt")
    row = cells(out.split("Against")[1], "all")
    assert row["joint minus the other's, points"].startswith("+20.0 (")
    assert [row[name] for name in ("clips", "only this one passes", "only the other", "McNemar's p")] == ["5", "2", "1", "1"]
    hard = cells(out.split("Against")[1], "hard")
    assert hard["clips"] == "2" and hard["joint minus the other's, points"].startswith("+0.0 (-100.0 to +100.0)")
    assert "5 clips of 4 prompts" in out and "too narrow" in out

    alike = cells(shown(capsys, "--videophy2", *files, "--other", *files).split("Against")[1], "all")
    assert alike["joint minus the other's, points"] == "+0.0 (no spread, no interval)"

    del theirs["z/q.mp4"], theirs["z/p-1.mp4"]
    other = pair(tmp_path, theirs, theirs, "other_")
    said = sentence(evaluate.main, ["--videophy2", *map(str, files), "--other", *map(str, other)])
    assert "more or fewer clips than --videophy2 of these prompts: 2 (p, q)" in said
    plain = write(tmp_path / "plain.csv", {"a.mp4": 4}, ("videopath", "score"))
    said = sentence(evaluate.main, ["--videophy2", *map(str, files), "--other", str(plain), str(plain)])
    assert "without a caption" in said and "1 (a.mp4)" in said

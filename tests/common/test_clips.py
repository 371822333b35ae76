"""Files of prompts are read as they are meant, and every clip of a folder has a name of its own."""
import csv
import re

import numpy as np
import pytest

import common.clips
from common.clips import read_prompts, wanted
from helpers import ROOT, files_of, json_of, sentence

ODD = ["a ball, red; it falls", "a \"red\" ball's fall", "half/half\\or: not?", "ball " * 59 + "falls",
       "红球落在地板上", "एक लाल गेंद", "A ball", "a ball", "con", "..", "-rf *", "a ball ", "two\nlines", "🙂"]


def write_csv(path, rows, names=("caption", "longer")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    return str(path)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- prompts ------------------------------------------------------------------------------------------------
def test_a_table_gives_its_captions_and_what_is_sampled_from(tmp_path):
    path = write_csv(tmp_path / "p.csv", [(text, f"{text}, seen from afar") for text in ODD])
    assert read_prompts(path, "caption") == [(text, text) for text in ODD]
    assert read_prompts(path, "longer") == [(text, f"{text}, seen from afar") for text in ODD]
    lone = write_csv(tmp_path / "lone.csv", [[text] for text in ODD], names=["longer"])
    assert read_prompts(lone, "longer") == [(text, text) for text in ODD]  # no caption: the prompt is it
    (tmp_path / "BOM.CSV").write_bytes("\ufeffcaption,x\r\na ball,1\r\n\r\na cube,2\r\n".encode())
    assert read_prompts(str(tmp_path / "BOM.CSV"), "caption") == [("a ball", "a ball"), ("a cube", "a cube")]


def test_the_prompts_of_videophy2_come_along():
    path = str(ROOT / "prompts" / "videophy2.csv")
    pairs, longer = read_prompts(path, "caption"), read_prompts(path, "upsampled_caption")
    assert len(pairs) == len(set(pairs)) == 591 and [pair[0] for pair in longer] == [pair[0] for pair in pairs]
    assert all(len(prompt) > len(caption) for caption, prompt in longer[:100])
    names = [one.name for one in wanted(longer, 2, "readable")]
    assert len({name.casefold() for name in names}) == 1182 and max(map(len, names)) < 80
    assert [one.name for one in wanted(pairs, 5, "vbench")][-1] == f"{pairs[-1][0]}-4.mp4"
    assert "MIT" in (ROOT / "prompts" / "README.md").read_text()


@pytest.mark.parametrize("content, said", [
    (b"caption,longer\n", "holds no prompt"), (b"", "holds no prompt"),
    (b"text,longer\na,b\n", "has no column 'caption'; there are text, longer"),
    (b"caption;longer\na;b\n", "there are caption;longer"),
    (b"caption,longer\na ball,x\n ,y\n", "line 3, has nothing in column 'caption'"),
    (b"caption,longer\na, ball,x\n", "line 2, has more cells"),
    (b'caption\n"a ball\na cube\n', "is no csv after line 1"),
    (b"caption,caption\na,b\n", "two columns of one name"),
    (b"caption\na \0ball\n", "zero byte"), (b"caption\na \xff ball\n", "as UTF-8 text"),
    (b"caption\n" + b"a" * 140_000, "is no csv after line 1")])
def test_a_bad_table_is_one_sentence(tmp_path, content, said):
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    found = sentence(read_prompts, str(path), "caption")
    assert said in found and f"--prompts {path}" in found


# --- names --------------------------------------------------------------------------------------------------
def test_names_are_safe_different_and_stay_when_rows_are_added(tmp_path, capsys):
    clips = wanted([(text, text) for text in ODD], 3, "readable")
    names = [clip.name for clip in clips]
    assert len({name.casefold() for name in names}) == len(names) == 3 * len(ODD)
    for name in names:
        assert re.fullmatch(r"\w[\w-]*-[0-9a-f]{12}-[012]\.mp4", name)
        (tmp_path / name).write_text("")  # a disk takes it
        assert len(name.encode()) < 200
    assert names[0].startswith("a-ball-red-it-falls-") and names[12].startswith("红球落在地板上-")
    more = wanted([("new", "new")] + [(text, text) for text in reversed(ODD)], 4, "readable")
    assert {(clip.prompt, clip.index): clip.name for clip in more}.items() >= {
        (clip.prompt, clip.index): clip.name for clip in clips}.items()
    assert not capsys.readouterr().out

    # The longer prompt is part of a name: of the same caption, another clip.
    pairs = [("a ball", "a red ball"), ("a ball", "a blue ball"), ("a ball", "a red ball")]
    assert len({clip.name for clip in wanted(pairs, 1, "readable")}) == 2
    assert "1 of 3 prompts repeat" in capsys.readouterr().out


def test_the_suites_names_are_the_captions_or_refused():
    fine = [text for text in ODD if not re.search("[/\n]", text) and len(text) < 230]
    clips = wanted([(text, text + "!") for text in fine], 5, "vbench")
    assert [clip.name for clip in clips] == [f"{text}-{i}.mp4" for text in fine for i in range(5)]
    for text in ("half/half", "two\nlines", "ball " * 50, "球" * 80, "zero\0byte"):
        assert "cannot be a file's name" in sentence(wanted, [(text, text)], 1, "vbench")
    assert "one name" in sentence(wanted, [("a ball", "red"), ("a ball", "blue")], 1, "vbench")


def test_the_longest_name_that_is_taken_can_be_written(tmp_path):
    text = "球" * 76 + "ab"  # 230 bytes
    clip, = wanted([(text, text)], 1, "vbench")
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    common.clips.fill(tmp_path, [clip], [(frames, clip)], 4, {"seed": 0})
    assert (tmp_path / clip.name).stat().st_size > 500


# --- tables -------------------------------------------------------------------------------------------------
def test_tables_give_back_what_was_asked_for_and_name_only_clips_that_are_there(tmp_path):
    folder = tmp_path / "a, 'folder'; with \"signs\""
    folder.mkdir()
    clips = wanted([(text, f"{text} - longer") for text in ODD], 1, "readable")
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(KeyboardInterrupt):  # after five clips
        def made():
            yield from [(frames, clip) for clip in clips[:5]]
            raise KeyboardInterrupt
        common.clips.fill(folder, clips, made(), 4, {"seed": 7})
    for there in (clips[:5], clips):
        rows = read_csv(folder / "clips.csv")
        assert [(row["caption"], row["prompt"], row["index"], row["seed"]) for row in rows] == [
            (clip.caption, clip.prompt, str(clip.index), "7") for clip in there]
        assert [row["videopath"] for row in rows] == [str(folder / clip.name) for clip in there]
        assert json_of(folder / "prompts.json") == {clip.name: clip.caption for clip in there}
        left = common.clips.without_file(folder, clips)
        assert left == clips[len(there):]
        common.clips.fill(folder, clips, [(frames, clip) for clip in left], 4, {"seed": 7})
    assert (folder / "clips.csv").read_text().startswith("caption,videopath,prompt,seed,index\n")


def test_one_writer_at_a_time_who_clears_what_a_killed_one_left(tmp_path):
    folder = tmp_path / "new" / "clips"
    with common.clips.only_writer(folder):
        (folder / "a-0.mp4").write_text("")
        (folder / "b-0.mp4.4711.part").write_text("half")
        assert "Another process fills" in sentence(common.clips.only_writer(folder).__enter__)
    with common.clips.only_writer(folder):
        assert list(files_of(folder)) == ["a-0.mp4"]

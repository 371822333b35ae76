"""Annotations of every kind: WISA's answers, captions as people have them, names as systems spell them,
records that cannot be used."""
import csv
import json
import unicodedata

import pytest

import common.annotations
import common.video
import data
import physics.phenomena
from config import UserError, preset
from videos import movie, opened, pool_cfg


def folder_of(tmp_path, annotations, names=("a.mp4",)):
    folder = tmp_path / "videos"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    file = tmp_path / "annotations.json"
    file.write_text(annotations if isinstance(annotations, str) else json.dumps(annotations),
                    encoding="utf-8-sig")
    return common.annotations.Folder(folder, str(file))


def read_from(folder, name="", content=""):
    """The captions by file that a Folder finds, and what it skipped."""
    if name:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = common.annotations.Folder(folder)
    return {str(v.path.relative_to(folder)): v.caption for v in found.videos.values()}, found.skipped


@pytest.fixture
def folder(tmp_path):
    """A folder of two files that are named like videos."""
    for name in ("a.mp4", "b.mov"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names_of(indices):
    return [(*physics.phenomena.CATEGORIES, *common.annotations.OTHER_SLOTS)[i] for i in indices]


FLAT = {"phys_law": "stress", "n0": "soil: 1.2 to 1.6 g/cm3", "file": "a.mp4", "label": "Deformation ",
        "q0": "Deformation, collision", "q1": "no obvious thermodynamic phenomenon.", "q2": "scattering",
        "q3": "no",
        "q4": "1. object decomposition and splitting\n2. liquid objects appearance\n3. no change",
        "en_caption": "the long one", "en_caption_1": "short"}
FLAT_NAMES = ["collision", "deformation", "scattering", "no obvious thermodynamic phenomenon",
              "camera motion no",
              "liquids objects appearance", "object decomposition and splitting", "no change"]


@pytest.mark.parametrize("shape", ["list", "data", "nested"])
def test_wisa_records(tmp_path, shape):
    answers = {key: value for key, value in FLAT.items() if key[0] in "qn"}
    nested = {"captions": "the long one", "video_id": "a", "file": None, "physical_annotation": answers}
    folder = folder_of(tmp_path, {"list": [FLAT], "data": {"data": [FLAT]}, "nested": [nested]}[shape])
    video, = folder.videos.values()
    assert video.caption == "the long one" and video.path.name == "a.mp4"
    assert names_of(video.categories) == FLAT_NAMES and not folder.unknown and not folder.skipped


WISA = [  # the answers of WISA's three published examples, and their collection category
    (dict(q0="deformation, collision", q1="no obvious thermodynamic phenomenon.", q2="scattering", q3="no",
          q4="1. object decomposition and splitting\n2. gas objects appearance\n3. no change",
          label="Deformation "),
     ["collision", "deformation", "scattering", "no obvious thermodynamic phenomenon", "camera motion no",
      "gas objects appearance",
      "object decomposition and splitting", "no change"]),
    (dict(q0="liquid motion, deformation", q1="solidification, melting", q2="reflection, refraction", q3="no",
          q4="1. liquid objects appearance\n2. solid objects appearance\n"
             "3. object decomposition and splitting\n4. no change",
          label="Solidification"),
     ["liquid motion", "deformation", "melting", "solidification", "reflection", "refraction",
      "camera motion no", "liquids objects appearance",
      "solid objects appearance", "object decomposition and splitting", "no change"]),
    (dict(q0="liquid motion, deformation", q1="no obvious thermodynamic phenomenon.",
          q2="no obvious optical phenomenon", q3="no",
          q4="1. liquids objects appearance\n2. no change", label="Solid Objects Appearance"),
     ["liquid motion", "deformation", "no obvious thermodynamic phenomenon", "no obvious optical phenomenon",
      "camera motion no",
      "liquids objects appearance", "no change"]),
]


@pytest.mark.parametrize("answers, names", WISA)
def test_wisas_published_answers_parse_without_a_guess(answers, names):
    known, unknown = common.annotations.parse_labels(answers)
    assert sorted(names_of(known)) == sorted(names) and unknown == []
    seventeen = [name for name in names_of(known) if name in data.category_names(preset("debug"))]
    assert seventeen == [name for name in physics.phenomena.CATEGORIES if name in names]


def test_captions_long_or_short_with_or_without_the_law(tmp_path):
    folder = folder_of(tmp_path,
                       [FLAT, {"file": "b.mp4", "caption": "the only one"},
                        {"file": "c.mp4", "en_caption": "long alone"}],
                       names=("a.mp4", "b.mp4", "c.mp4"))

    def read(*how):
        again = common.annotations.Folder(folder.dir, str(tmp_path / "annotations.json"), *how)
        return [video.caption for video in again.videos.values()], again.skipped

    assert read() == read("long", False) == (["the long one", "the only one", "long alone"], [])
    assert read("long", True) == (["the long one stress", "the only one", "long alone"], [])
    assert read("short", False) == (["short", "the only one"], ["c.mp4 (no caption)"])
    assert read("short", True) == (["short stress", "the only one"], ["c.mp4 (no caption)"])


def test_labels_match_as_whole_names_only():
    known, unknown = common.annotations.parse_labels({
        "q0": "rigid-body motion; no collision, 2) Elastic Motions", "q1": ["melting", "vaporisation"],
        "q2": "interference and diffraction\nunnatural light source. reflection", "q3": "Yes.",
        "q4": "1. no change 2. yes"})
    assert names_of(known) == ["rigid body motion", "elastic motion", "melting",
                               "interference and diffraction",
                               "camera motion yes", "no change"]
    assert unknown == ["no collision", "vaporisation", "unnatural light source. reflection", "yes"]
    assert len(common.annotations.LABELS) == 29


def test_records_that_cannot_be_used_are_named(tmp_path):
    folder = folder_of(tmp_path, [
        {"file": "a.mp4", "caption": "fine"}, {"file": "./a.mp4", "caption": "again"}, {"file": "a.mp4"},
        {"caption": "no file"}, 7, {"file": "b.mp4", "caption": "b"}, {"video_id": 12, "caption": "number"},
        {"file": 3.5, "caption": ["x"]}, {"file": "nul\0.mp4", "caption": "b"},
        {"file": "elsewhere.mp4", "video_id": "second", "caption": [" listed ", "2"]}],
                       names=("a.mp4", "second.webm"))
    assert [v.caption for v in folder.videos.values()] == ["fine", "listed"]
    assert folder.skipped == [
        "./a.mp4 (named twice)", "a.mp4 (no caption)", "record 4 (names no file)", "record 5 (not an object)",
        "b.mp4 (missing)", "12 (missing)", "record 8 (names no file)", "nul\0.mp4 (missing)"]


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    outside = tmp_path / "outside.mp4"
    movie(outside)
    names = ["../outside.mp4", str(outside), "inner/../../outside.mp4", "..", "inner/../a.mp4"]
    folder = folder_of(tmp_path, {name: "c" for name in names})
    assert [video.path.name for video in folder.videos.values()] == ["a.mp4"]
    assert folder.skipped == [f"{name} (outside the folder)" for name in names[:4]]


@pytest.mark.parametrize("text, words", [
    ("{", "is not JSON"), ("[" * 100000, "is not JSON"), ("3", "another shape"), ('"a"', "another shape"),
    ("[1, 2]", "another shape"), ('{"a.mp4": 1}', "another shape"), ('{"data": 3}', "another shape"),
    ("null", "another shape")])
def test_annotations_of_another_kind_are_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as error:
        folder_of(tmp_path, text)
    assert "annotations.json" in str(error.value) and "{file: caption}" in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ other forms
BOTH = {"a.mp4": "a ball, red", "b.mov": "it melts"}


def test_captions_as_json_lines(folder):
    lines = [{"file": "a.mp4", "caption": "a ball, red"}, {"file_name": "b.mov", "text": "it melts"}]
    text = "\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\n\n"
    assert read_from(folder, "captions.jsonl", text) == (BOTH, [])
    odd = json.dumps({"file": "a.mp4", "caption": "one\u2028line"}, ensure_ascii=False) + '\n[1]\n{"file": "b.mov"}'
    assert read_from(folder, "captions.jsonl", odd) == (
        {"a.mp4": "one\u2028line"}, ["record 2 (not an object)", "b.mov (no caption)"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_captions_as_a_table(folder, delimiter):
    with open(folder / "captions.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([[" File", "q0", "Caption"], ["a.mp4", "melting", "a ball, red"], [],
                         ["b.mov", "", "it\nmelts"], ["b.mov", ""]])
    found = common.annotations.Folder(folder)
    assert [v.caption for v in found.videos.values()] == ["a ball, red", "it\nmelts"]
    assert names_of(found.videos[folder / "a.mp4"].categories) == ["melting"]
    assert found.skipped == ["b.mov (no caption)"]


def test_a_caption_whose_commas_are_not_quoted_is_not_cut(folder):
    read, skipped = read_from(folder, "captions.csv", "file,caption\na.mp4,a ball, red\nb.mov,it melts\n")
    assert read == {"b.mov": "it melts"}
    assert skipped == ["a.mp4 (more cells than columns, are its commas quoted?)"]


def test_captions_in_a_text_beside_each_video(folder):
    (folder / "in").mkdir()
    for name in ("in/c.MP4", "in/d.ts", "notes.md"):
        (folder / name).write_bytes(b"x")
    for name, text in (("a", "\ufeffa ball, red\n"), ("b", "it melts"), ("in/c", "c"), ("lonely", "nobody")):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    assert read_from(folder) == ({**BOTH, "in/c.MP4": "c"},
                                 ["lonely.txt (no video beside it)", "in/d.ts (no caption)"])
    (folder / "b.txt").write_bytes("gelée".encode("latin-1"))
    with pytest.raises(UserError, match="b.txt is not a text in UTF-8"):
        read_from(folder)


def test_the_first_form_that_is_there_is_read(folder):
    (folder / "a.txt").write_text("text")
    for name, text in (("captions.csv", "file,caption\na.mp4,table\n"),
                       ("captions.jsonl", '{"file": "a.mp4", "caption": "lines"}'),
                       ("captions.json", '{"a.mp4": "object"}')):
        before = read_from(folder)[0]["a.mp4"]
        assert read_from(folder, name, text)[0]["a.mp4"] != before
    assert read_from(folder)[0] == {"a.mp4": "object"}


@pytest.mark.parametrize("name, content, words", [
    ("captions.jsonl", b'{"file": "a.mp4", "caption": "c"}\n\n{"file', "is not JSON in line 3 in UTF-8"),
    ("captions.jsonl", '{"file": "a.mp4", "caption": "c"}'.encode("utf-16"), "is not JSON in UTF-8"),
    ("captions.jsonl", b"1\n2", "another shape"),
    ("captions.csv", b"a.mp4,a ball\nb.mov,it melts\n", "its first line does not name each column once"),
    ("captions.csv", b"file,caption,caption\na.mp4,a,b\n", "its first line does not name each column once"),
    ("captions.csv", b"", "its first line does not name each column once"),
    ("captions.csv", b'file,caption\na.mp4,"a ball\n', "is not CSV"),
    ("captions.csv", b"file,caption\na.mp4," + 200_000 * b"x", "is not CSV"),
    ("captions.csv", "file,caption\na.mp4,gel\u00e9e".encode("latin-1"), "is not CSV in UTF-8"),
    ("captions.csv", "file,caption\na.mp4,c".encode("utf-16"), "is not CSV in UTF-8")])
def test_broken_captions_are_one_sentence(folder, name, content, words):
    with pytest.raises(UserError, match=words) as error:
        read_from(folder, name, content)
    assert name in str(error.value) and ".csv" in str(error.value) and "\n" not in str(error.value)


def test_names_are_found_as_other_systems_spell_them(folder):
    composed, parted = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    (folder / "in").mkdir()
    for name in (f"in/{parted}.mp4", f"{composed}.webm", "SHOUT.MP4"):
        (folder / name).write_bytes(b"x")
    captions = {f"in\\{composed}.mp4": "1", f"{parted}.webm": "2", "SHOUT.mp4": "3", "A.mp4": "4", "..\\a.mp4": "5"}
    read, skipped = read_from(folder, "captions.json", json.dumps(captions))
    assert read == {f"in/{parted}.mp4": "1", f"{composed}.webm": "2", "SHOUT.MP4": "3"}
    assert skipped == ["A.mp4 (missing)", "..\\a.mp4 (missing)"]  # another stem is another video
    assert read_from(folder, "captions.json", '[{"video_id": "SHOUT", "caption": "bare"}]')[0] == {"SHOUT.MP4": "bare"}
    (folder / f"{parted}.webm").write_bytes(b"y")
    twins = read_from(folder, "captions.json", json.dumps({f"{composed}.WEBM": "which?", f"{parted}.webm": "mine"}))
    assert twins == ({f"{parted}.webm": "mine"}, [f"{composed}.WEBM (missing; 2 files are spelt like it)"])


def test_a_folder_without_captions_says_what_is_expected(folder):
    (folder / "readme.txt").write_text("about")
    with pytest.raises(UserError, match="There is no .*captions.json .*--annotations FILE.*WISA.*jsonl.*csv.*txt"):
        read_from(folder)


def test_captions_as_people_have_them_make_a_pool(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in "ab":
        movie(tmp_path / "videos" / f"{name}.mp4")
        (tmp_path / "videos" / f"{name}.txt").write_text(f"film {name}")
    pool = opened(pool_cfg(tmp_path, data_dir=str(tmp_path / "videos"), windows=1))
    assert sorted(pool.captions) == ["film a", "film b"] and "skipped" not in pool.summary

"""teacher.py, the command: a folder of videos becomes a folder of maps, whatever happens on the way."""
import json
import os
import re

import numpy as np
import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the teacher needs transformers: pip install -r requirements.txt")

import common.files  # noqa: E402
import common.store  # noqa: E402
import common.video  # noqa: E402
import physics.phenomena  # noqa: E402
from vlm import maps as vlm_maps  # noqa: E402
from vlm import qwen as vlm_qwen  # noqa: E402
from vlm import speed as vlm_speed  # noqa: E402
import config  # noqa: E402
import data  # noqa: E402
import teacher  # noqa: E402
from common.annotations import Video  # noqa: E402
from config import Stopped  # noqa: E402
from helpers import drifting, files_of, killed_when, sentence, written  # noqa: E402
from tiny_vlm import FILM, FILM_RECORDS, expected, make_maps, make_vlm, maps_of, teacher_flags  # noqa: E402


# ------------------------------------------------------------------------------------- the folder, end to end
def test_a_folder_of_videos_becomes_a_folder_of_maps(maps, films):
    index, stored = (json.loads((maps / name).read_text()) for name in ("index.json", "maps.json"))
    assert stored["key"] == index["key"] == common.files.digest(stored["settings"])
    assert (index["videos"], index["done"]) == (5, 4)
    assert [row[1] for row in index["clips"]] == ["a.mp4", "b.mp4", *["long.mp4"] * 3, "quiet.mp4"]
    assert sorted(os.listdir(maps / "clips")) == sorted(row[0] for row in index["clips"])
    asked = {"a.mp4": ["combustion", "melting"], "b.mp4": ["collision"], "long.mp4": ["rigid body motion"],
             "quiet.mp4": []}
    for file, name, start, end, content in index["clips"]:
        tensors, about = common.store.read_tensors(maps / "clips" / file)
        assert tensors["maps"].dtype == tensors["background"].dtype == torch.float16
        # those of the label
        labels = sorted(physics.phenomena.CATEGORIES[c] for c in about["categories"])
        assert labels == sorted(about["answers"]) == asked[name]
        assert tensors["maps"].shape == (len(asked[name]), 3, 4, 6)
        assert tensors["background"].shape == (3, 4, 6)
        assert about["times"] == [start, start + 2.5 / 8, start + 6.5 / 8] and about["times"][-1] == end
        assert about["size"] == [36, 52] and about["content"] == content == Video(name, films / name, "", []).content
        assert np.allclose(about["crop"], [0, (36 - 52 * 32 / 48) / 2, 52, (36 + 52 * 32 / 48) / 2])
        assert about["file"] == name and all(about["answers"].values()) and about["background"]
        assert np.allclose(tensors["background"].float().mean(), 1, atol=1e-3)
    assert [about["times"][0] for _, about in maps_of(maps, "long.mp4")] == [0, 9 / 8, 18 / 8]


@pytest.mark.parity
def test_a_map_is_the_eager_models_attention_to_the_file(maps, small_vlm, films):
    """From the mp4 to float16 by another way:
    decode, take the frames that latents show, one plain pass of the model."""
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    eager = kind.from_pretrained(small_vlm, attn_implementation="eager").eval()
    tokenizer = vlm_qwen.VLM.from_folder(small_vlm).tokenizer
    cut = common.video.Cut(frames=9, fps=8.0, windows=4, height=32, width=48)
    for name, taken in (("a.mp4", 0), ("long.mp4", 1)):
        tensors, about = maps_of(maps, name)[taken]
        frames = common.video.windows_of(films / name, cut)[taken].video[[0, 0, 2, 3, 6, 7]]
        asked = [(f"{physics.phenomena.CATEGORIES[c]}?", about["answers"][physics.phenomena.CATEGORIES[c]], one)
                 for c, one in zip(about["categories"], tensors["maps"])]
        for question, answer, stored in (*asked, ("behind?", about["background"], tensors["background"])):
            right, _ = expected(eager, "qwen2_5_vl", tokenizer, frames, 4.0, question, answer)
            right = right[1, :, 1].mean(0)  # of three layers the second; rows that predict the answer
            assert torch.allclose(stored.float().flatten(), right / right.sum() * 72, rtol=1e-3,
                                  atol=1e-3), question


def test_again_makes_nothing_new(maps_copy, small_vlm, films, capsys):
    before = files_of(maps_copy)
    times = {path: path.stat().st_mtime_ns for path in (maps_copy / "clips").iterdir()}
    make_maps(films, small_vlm, maps_copy)
    said = capsys.readouterr().out
    assert "0 maps made, 6 were there" in said and "6 of 4 of 5 videos" in said
    assert "skipped 2: absent.mp4 (missing), text.mp4 (Invalid data" in said
    assert "1 unknown category names: 'levitation' (1)" in said
    assert files_of(maps_copy) == before
    assert times == {path: path.stat().st_mtime_ns for path in (maps_copy / "clips").iterdir()}


def test_of_a_video_begun_the_rest_is_made(maps_copy, small_vlm, films, capsys):
    before = files_of(maps_copy)
    index = json.loads((maps_copy / "index.json").read_text())
    _, gone, _ = [row[0] for row in index["clips"] if row[1] == "long.mp4"]
    (maps_copy / "clips" / gone).unlink()
    times = {path: path.stat().st_mtime_ns for path in (maps_copy / "clips").iterdir()}
    make_maps(films, small_vlm, maps_copy)
    assert "1 maps made, 5 were there" in capsys.readouterr().out and files_of(maps_copy) == before
    assert times.items() <= {path: path.stat().st_mtime_ns
                             for path in (maps_copy / "clips").iterdir()}.items()


def test_a_full_disk_is_one_sentence(small_vlm, films, tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(common.store, "write_tensors", full)
    assert "No space left on device" in sentence(make_maps, films, small_vlm, tmp_path / "out", error=Stopped)


def test_one_bad_clip_of_a_group_costs_itself_alone(tmp_path):
    def look(empty):
        return vlm_qwen.AnswerAttention("" if empty else "words", torch.rand(1, 1, 2, 2, 2), empty)
    store = common.store.Store(tmp_path / "out", vlm_maps.MAPS, {})
    store.clips.mkdir(parents=True)
    group = [vlm_maps.VLMClip(f"clip {i}", None, 4.0, [0.0, 0.5], (8, 8), (0, 0, 8, 8), ["melting"],
                              f"{i}.safetensors") for i in range(4)]
    asked = []

    class Fake(vlm_qwen.VLM):
        def __init__(self):
            pass

        def ask(self, videos, fps, questions, settings, batch, answers):
            asked.append(questions)
            if len(asked) == 2:
                raise vlm_qwen.VLMError("not finite")
            return [[look(i == 2), look(i == 1)] for i in range(4)]

    class Bar:
        n = 0

        def update(self, n):
            self.n += n

    work, settings = teacher.Work(store, set(), [], Bar()), vlm_qwen.Settings()
    teacher.annotate(work, Fake(), settings, [group, group], 0)
    assert sorted(os.listdir(store.clips)) == ["0.safetensors", "2.safetensors", "3.safetensors"]
    assert (work.made, work.tally["empty"], work.bar.n) == (3, 1, 8)
    skipped = [name.split(" (")[0] for name in work.skipped]
    assert skipped == ["clip 1", "clip 0", "clip 1", "clip 2", "clip 3"]
    assert asked[0] == [[settings.question_for("melting"), settings.background]] * 4
    assert common.store.read_tensors(store.clips / "2.safetensors")[0]["maps"].shape == (0, 2, 2, 2)


def test_shards_make_what_one_process_makes(maps, small_vlm, films, tmp_path):
    for shard in ("1/2", "2/2"):
        make_maps(films, small_vlm, tmp_path / "halves", shard=shard)
    assert files_of(tmp_path / "halves") == files_of(maps)


@pytest.mark.parametrize("flags, words", [
    (dict(words=4), "words 3, now 4"), (dict(rate=9), "fps 8.0, now 9.0"),
    (dict(layers="0-1"), "layers [1], now [0, 1]"),
    (dict(question="a {name}?"), "question '{name}?', now 'a {name}?'")])
def test_other_settings_are_refused(maps_copy, small_vlm, films, flags, words):
    before = files_of(maps_copy)
    said = sentence(make_maps, films, small_vlm, maps_copy, **flags)
    assert words in said and "give another --out" in said and files_of(maps_copy) == before


def test_another_vlm_is_refused(maps_copy, films, tmp_path):
    other = make_vlm(tmp_path / "other", "qwen2_5_vl", seed=1, layers=3)
    assert "vlm '" in sentence(make_maps, films, other, maps_copy)


def test_a_truncated_map_is_named_once_left_out_and_made_again(maps_copy, small_vlm, films, capfd):
    before = files_of(maps_copy)
    path = maps_copy / "clips" / json.loads((maps_copy / "index.json").read_text())["clips"][0][0]
    path.write_bytes(path.read_bytes()[:-9])
    found, source = vlm_maps.Maps(maps_copy), ["a.mp4", 0.0, [36, 52], [0, 0, 52, 36]]
    assert found.on_tokens(source, np.zeros(1), (1, 2, 2), 17) is None
    assert found.on_tokens(source, np.zeros(1), (1, 2, 2), 17) is None
    err = capfd.readouterr().err
    assert err.count(path.name) == 1 and "left out (cut short)" in err and "teacher.py" in err
    make_maps(films, small_vlm, maps_copy, shard="2/2")  # another shard goes past it
    capfd.readouterr()
    make_maps(films, small_vlm, maps_copy)
    assert "1 maps made, 5 were there" in capfd.readouterr().out and files_of(maps_copy) == before


def test_an_empty_background_answer_leaves_the_video_out(small_vlm, films, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(FILM_RECORDS[:1]))
    said = sentence(make_maps, films, small_vlm, tmp_path / "out", answer="<|im_end|>",
                    annotations=tmp_path / "one.json")
    assert "No map could be made" in said
    assert "a.mp4 (the model answered the background question with nothing but special tokens)" in said


def test_denials_leave_the_map_out(small_vlm, films, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(FILM_RECORDS[:1]))
    out = make_maps(films, small_vlm, tmp_path / "out", answer="there is no {name}",
                    annotations=tmp_path / "one.json")
    assert "2 answers deny the phenomenon" in capsys.readouterr().out
    (tensors, about), = maps_of(out, "a.mp4")
    assert tensors["maps"].shape == (0, 3, 4, 6) and about["categories"] == [] and about["answers"] == {}
    assert about["background"] == "there is no background"
    for text, denies in {"No.": True, "It isn't there": True, "none of it": True, "I cannot see": True,
                         "a knot, now north": False}.items():
        assert bool(vlm_maps.DENIAL.search(text)) == denies


def test_a_short_video_is_taken_as_it_is(small_vlm, films, tmp_path):
    """Twelve frames, 49 asked for: the nine that latents could be of."""
    (tmp_path / "one.json").write_text(json.dumps(FILM_RECORDS[1:2]))
    out = make_maps(films, small_vlm, tmp_path / "out", frames_shown=49, annotations=tmp_path / "one.json")
    (tensors, about), = maps_of(out, "b.mp4")
    assert tensors["maps"].shape == (1, 3, 4, 6) and about["times"] == [0, 2.5 / 8, 6.5 / 8]


def test_a_video_too_short_for_latents_is_named(small_vlm, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    drifting(folder / "s.mp4", 0, frames=3, **FILM)
    (folder / "captions.json").write_text(json.dumps({"s.mp4": "short"}))
    assert "s.mp4 (too short, 0.38 s)" in sentence(make_maps, folder, small_vlm, tmp_path / "out")


def test_all_phenomena_by_switch_and_even_sampling(small_vlm, films, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(FILM_RECORDS[1:2]))
    out = make_maps(films, small_vlm, tmp_path / "out", "--all", sample=5, annotations=tmp_path / "one.json")
    (tensors, about), = maps_of(out, "b.mp4")
    assert tensors["maps"].shape == (17, 3, 4, 6) and about["categories"] == list(range(17))
    assert np.allclose(about["times"], [1 / 8, 5 / 8, 8 / 8])  # frames 0 2 4 6 8 of nine, the last one twice


@pytest.mark.parametrize("flags, words", [
    (dict(frames_shown=48), "1 + 4 m"), (dict(rate=0), "--rate"), (dict(rate="nan"), "--rate"),
    (dict(shard="3/2"), "--shard"), (dict(batch=-1), "--batch"),
    (dict(annotations="nowhere.json"), "nowhere.json"), (dict(windows_taken=-1), "--windows"),
    (dict(rows="tokens"), "--rows"), (dict(pixels=0), "--pixels"),
    (dict(layers="7"), "--layers"), (dict(words="few"), "--words"), (dict(question="{nom}"), "--question")])
def test_wrong_flags_are_one_sentence(small_vlm, films, tmp_path, flags, words):
    assert words in sentence(make_maps, films, small_vlm, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_is_one_sentence(tmp_path):
    say = lambda *argv: sentence(teacher.main, list(argv))  # noqa: E731
    assert "--train_tiny" in say() and "--out" in say("--videos", "x")
    assert "--annotate" in say("--annotate", "a/b")
    assert "nowhere" in say("--videos", "x", "--out", str(tmp_path / "o"), "--vlm", str(tmp_path / "nowhere"),
                            "--device", "cpu")


# ---------------------------------------------------------------------------------------------------- kill -9
@pytest.mark.kill
@pytest.mark.slow
def test_kill_9_loses_and_doubles_nothing(maps, small_vlm, films, tmp_path, capsys):
    out, there = tmp_path / "killed", tmp_path / "killed" / "clips"
    assert killed_when(lambda: len(written(there)) == 2,
                       ["teacher.py", *teacher_flags(films, small_vlm, out)])
    survived = written(there)
    assert 2 <= len(survived) < 6 and not (out / "index.json").exists()
    assert "once it has gone through" in sentence(vlm_maps.Maps, out)
    # what a kill in the midst of a write leaves
    (there / f"{'0' * 24}-0of1.safetensors.1of1.part").write_bytes(b"half")
    capsys.readouterr()
    make_maps(films, small_vlm, out)
    said = capsys.readouterr().out
    assert f"{6 - len(survived)} maps made, {len(survived)} were there" in said
    assert files_of(out) == files_of(maps)
    assert survived.items() <= written(there).items()


# ------------------------------------------------------------------------------------------- the tiny teacher
def test_report_and_preview_run_from_the_command_line(tiny, tmp_path, capsys):
    flags = ["--vlm", str(tiny.folder), "--config", "debug", "--frames", "4", "--height", "32", "--width",
             "32", "--colour_cues", "--clips", "5", "--threads", "1"]
    teacher.main([*flags, "--report", "--preview", str(tmp_path / "overlay.gif")])
    said = capsys.readouterr().out
    for row in ("frame differences", "location prior", "predict, layers default, subtract"):
        values = re.search(rf"\| {row} \| ([\d.]+) \|", said)
        assert values and 0 <= float(values[1]) <= 1
    assert re.search(r"affirm what is there [\d.]+, what is not [\d.]+,", said)
    import imageio.v3 as iio
    frames = iio.imread(tmp_path / "overlay.gif")
    assert len(frames) == 4 and frames.shape[2] >= 5 * 96


@pytest.mark.slow
def test_the_tiny_teacher_from_the_command_line_to_a_trained_branch(tmp_path, capsys):
    """--train_tiny writes a VLM and maps of the world's clips;
    shuffled maps hold the same maps, of other clips; training reads them."""
    import train
    world_flags = ["--config", "debug", "--colour_cues", "--pool_dir", str(tmp_path / "pool"),
                   "--world_clips", "24", "--val_clips", "4", "--threads", "1"]
    teacher.main(["--train_tiny", "--steps", "60", "--vlm", str(tmp_path / "tiny"), *world_flags])
    assert "28 of 28" in capsys.readouterr().out
    teacher.main(["--annotate", "mixed", "--kind", "shuffled", *world_flags])
    cfg = config.check(config.preset("debug", colour_cues=True, pool_dir=str(tmp_path / "pool"),
                                     world_clips=24, val_clips=4))
    pool = data.open_pool(cfg, progress=False)
    own, mixed = (vlm_maps.Maps(vlm_maps.world_maps(cfg, pool, name)) for name in ("tiny_vlm", "mixed"))

    def held(maps):
        return {name: maps.store.read(files[0][2]) for name, files in maps.of.items()}
    a, b = held(own), held(mixed)
    signature = lambda found: sorted(tensors["background"].numpy().tobytes() for tensors, _ in found.values())
    assert set(b) <= set(a) and set(signature(b)) <= set(signature(a))
    kinds = {source[0]: tuple(categories) for source, categories in zip(pool.sources, pool.categories)}
    several = [name for name in b if sum(kinds[other] == kinds[name] for other in kinds) > 1]
    assert several
    assert all(not torch.equal(a[name][0]["background"], b[name][0]["background"]) for name in several)
    run = ["--out_dir", str(tmp_path / "run"), "--base_steps", "2", "--physics_steps", "3", "--eval_every",
           "3", "--save_every", "3"]
    train.main(config.parse([*world_flags, *run, "--teacher", "tiny_vlm", "--background", "none"], ""))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("held_out" in line and line["held_out"].get("fine_align", 0) > 0 for line in log)


def test_benchmark_times_real_shapes_made_small(capsys):
    small = dict(text_config=dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
                                  bos_token_id=None, eos_token_id=1, pad_token_id=0,
                                  rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                                       mrope_section=[2, 3, 3])),
                 vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2,
                                    out_hidden_size=64))
    assert small["text_config"].keys() == vlm_speed.SEVEN_B["text_config"].keys()
    vlm_speed.print_times(vlm_speed.random_vlm("cpu", small), (4, 56, 84), words=3)
    said = capsys.readouterr().out
    rows = re.findall(r"\| (all at once|one by one) \| ([\d.]+) \| - \| ([\d.]+) \|", said)
    assert [name for name, *_ in rows] == ["all at once", "one by one"]
    for _, seconds, hours in rows:
        assert float(hours) == pytest.approx(20_000 * float(seconds) / 3600, abs=.09)
    with pytest.raises(config.UserError, match="needs a GPU"):
        teacher.main(["--benchmark", "--device", "cpu"])


@pytest.mark.parametrize("flags, words", [
    (["--train_tiny", "--vlm", "HERE"], "is there already"),
    (["--preview", "p.txt", "--vlm", "HERE"], ".gif"), (["--preview", "no/p.gif"], ".gif"),
    (["--report", "--truth", "none.json"], "--truth"),
    (["--videos", "v", "--out", "m", "--fps", "4"], "--fps"), (["--videos", "v", "--out", "m", "--frames", "8"], "--rate"),
    (["--annotate", "x", "--data_dir", "v"], "--data_dir"), (["--report", "--annotations", "a.json"], "--annotations"),
    (["--annotate", "x", "--minutes", "2"], "--minutes"), (["--annotate", "x", "--maps", "y"], "--maps"),
    (["--annotate", "x", "--clips", "5"], "--clips"), (["--annotate", "x", "--kind", "saliency", "--rows", "answer"], "--rows"),
    (["--report", "--clips", "100000000000"], "--clips"), (["--report", "--lr", "0.1"], "--lr"),
    (["--videos", "v", "--out", "m", "--frames_shown", "12"], "--frames_shown"), (["--train_tiny", "--steps", "-1"], "--steps"),
    ([], "Say what to do")])
def test_what_is_refused_before_any_work_and_deletes_nothing(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HERE").mkdir()
    (tmp_path / "HERE" / "model.safetensors").write_text("mine")
    with pytest.raises(config.UserError, match=re.escape(words)):
        teacher.main([*flags, "--config", "debug", "--world_clips", "8", "--val_clips", "2", "--device",
                      "cpu", "--threads", "1"])
    assert (tmp_path / "HERE" / "model.safetensors").read_text() == "mine"

"""encode.py, the command: shards, skipped videos, settings that changed, wrong flags, kill -9."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")
pytest.importorskip("ftfy", reason="needs ftfy: pip install -r requirements-extra.txt")

import common.store  # noqa: E402
import official.cache  # noqa: E402
from helpers import ROOT, drifting, files_of, killed_when, sentence, shorten, words_of, written  # noqa: E402
from tiny_weights import RECORDS, encode_flags, fill_cache, latents_of, make_weights  # noqa: E402


# ------------------------------------------------------------------------------------------------ the command
def test_a_second_encode_with_other_settings_is_refused(weights, videos, caches, tmp_path, monkeypatch):
    """Before there is any clip; without a lock both would write, and orphan each other's clips."""
    refused = []

    def begun(encoder, real=official.cache.Encoder.write_empty):
        for shard in ("1/1", "1/2"):
            refused.append(sentence(fill_cache, videos, weights["wan"], tmp_path / "out", windows=1, shard=shard))
        real(encoder)

    monkeypatch.setattr(official.cache.Encoder, "write_empty", begun)
    fill_cache(videos, weights["wan"], tmp_path / "out")
    assert "makes shard 1/1" in refused[0] and "windows 4, now 1" in refused[1]
    assert files_of(tmp_path / "out") == files_of(caches["wan"])  # the first went on


def test_shards_make_what_one_process_makes(weights, videos, caches, tmp_path, capsys):
    for shard in ("1/2", "2/2"):
        fill_cache(videos, weights["wan"], tmp_path / "halves", shard=shard)
        assert f"from {dict([('1/2', 3), ('2/2', 5)])[shard]} of 6 videos" in capsys.readouterr().out
    assert files_of(tmp_path / "halves") == files_of(caches["wan"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "halves" / "clips").iterdir()}
    fill_cache(videos, weights["wan"], tmp_path / "halves", shard="1/3")  # nothing is made twice
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "halves" / "clips").iterdir()}


def test_bad_videos_unknown_names_and_long_captions_are_counted(weights, videos, tmp_path, capsys):
    fill_cache(videos, weights["wan"], tmp_path / "out")
    said = capsys.readouterr()
    assert "7 clips made, 0 were there" in said.out and "7 from 5 of 6 videos" in said.out
    assert "skipped 2: absent.mp4 (missing), broken.mp4 (Invalid data" in said.out
    assert "1 unknown category names: 'levitation' (1)" in said.out
    assert "1 captions have more than 512 tokens" in said.out
    assert "6/6" in said.err  # the bar


def test_a_truncated_clip_is_made_again(cache_copy, weights, videos, capsys):
    before = files_of(cache_copy)
    path = cache_copy / "clips" / latents_of("wan", cache_copy).pool.files[3]
    path.write_bytes(path.read_bytes()[:-9])
    fill_cache(videos, weights["wan"], cache_copy)
    assert "1 clips made, 6 were there" in capsys.readouterr().out and files_of(cache_copy) == before


def test_what_changes_gets_another_name_and_is_read(weights, videos, cache_copy, tmp_path):
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))  # keeps times
    old = latents_of("wan", cache_copy).pool
    fill_cache(folder, weights["wan"], cache_copy)
    assert latents_of("wan", cache_copy).pool.files == old.files
    records = [{**record} for record in RECORDS]
    records[0]["en_caption"] = "another caption"
    (folder / "captions.json").write_text(json.dumps(records))
    drifting(folder / "b.mp4", 99)
    fill_cache(folder, weights["wan"], cache_copy)
    new = latents_of("wan", cache_copy).pool
    changed = [old.captions[i][:3] for i in range(7) if old.files[i] != new.files[i]]
    assert changed == ["a r", "ice"] and new.captions[0] == "another caption" and new.key != old.key


def test_captions_by_switch(weights, videos, tmp_path):
    (tmp_path / "two.json").write_text(json.dumps(RECORDS[:2]))
    fill_cache(videos, weights["wan"], tmp_path / "out", "--phys_law", captions="short",
               annotations=tmp_path / "two.json")
    assert latents_of("wan", tmp_path / "out").pool.captions == ["a ball gravity acts", "ice"]


def test_another_setting_is_refused(cache_copy, weights, videos):
    assert "fps 8.0, now 9.0" in sentence(fill_cache, videos, weights["wan"], cache_copy, fps=9)
    before = files_of(cache_copy)
    assert "lineage 'wan', now 'cogvideox'" in sentence(fill_cache, videos, weights["cogvideox"], cache_copy)
    assert files_of(cache_copy) == before


def test_other_weights_are_other_settings(cache_copy, videos, tmp_path):
    other = make_weights(tmp_path / "other", "wan", seed=1)
    said = sentence(fill_cache, videos, other, cache_copy)
    assert "vae" in said and "text_encoder" in said and "tokenizer" not in said


def test_a_damaged_empty_caption_is_made_again(cache_copy, weights, videos, capsys):
    before = files_of(cache_copy)
    shorten(cache_copy / "empty.safetensors")
    fill_cache(videos, weights["wan"], cache_copy)
    assert "0 clips made, 7 were there" in capsys.readouterr().out and files_of(cache_copy) == before


def test_a_folder_without_clips_may_change_its_settings(weights, videos, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(RECORDS[5:]))
    sentence(fill_cache, videos, weights["wan"], tmp_path / "out", annotations=tmp_path / "bad.json")
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[:1]))
    fill_cache(videos, weights["cogvideox"], tmp_path / "out", annotations=tmp_path / "one.json")
    latents = latents_of("cogvideox", tmp_path / "out")
    assert latents.pool.captions == [RECORDS[0]["en_caption"]] and "a single one" in latents.pool.summary


def test_none_left_is_one_sentence(weights, videos, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(RECORDS[5:]))
    said = sentence(fill_cache, videos, weights["wan"], tmp_path / "out", annotations=tmp_path / "bad.json")
    assert "No clip" in said and "absent.mp4 (missing), broken.mp4 (" in said


def test_bf16_is_what_float32_gives_to_rounding(weights, videos, caches, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[:1]))
    exact = latents_of("cogvideox", caches["cogvideox"])
    fill_cache(videos, weights["cogvideox"], tmp_path / "out", dtype="bf16",
               annotations=tmp_path / "one.json")
    tensors, _ = common.store.read_tensors(next((tmp_path / "out" / "clips").iterdir()))
    reference, _ = common.store.read_tensors(exact.pool.store.clips / exact.pool.files[0])
    for name in ("mean", "std", "text"):
        assert tensors[name].dtype == torch.bfloat16
        assert (tensors[name].float() - reference[name]).norm() < 0.05 * reference[name].norm(), name


@pytest.mark.parametrize("flags, words", [
    (dict(frames=8), "1 + 4 m"), (dict(height=24), "multiple of 16"), (dict(fps=0), "--fps"),
    (dict(fps="nan"), "--fps"),
    (dict(shard="3/2"), "--shard"), (dict(shard="x"), "--shard"),
    (dict(annotations="nowhere.json"), "nowhere.json"),
    (dict(captions="middling"), "captions"), (dict(windows=-1), "--windows")])
def test_wrong_flags_are_one_sentence(weights, videos, tmp_path, flags, words):
    assert words in sentence(fill_cache, videos, weights["wan"], tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_hold_a_cache(weights, videos, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot hold a cache" in sentence(fill_cache, videos, weights["wan"], tmp_path / "file")


# ---------------------------------------------------------------------------------------------------- kill -9
@pytest.mark.kill
@pytest.mark.slow
def test_kill_9_loses_and_doubles_nothing(weights, videos, caches, tmp_path, capsys):
    out, clips = tmp_path / "killed", tmp_path / "killed" / "clips"
    command = ["encode.py", *encode_flags(videos, weights["wan"], out)]
    assert killed_when(lambda: len(written(clips)) == 2, command)  # between two clips
    survived = written(clips)
    assert 2 <= len(survived) < 7 and not (out / "index.json").exists()
    assert killed_when(lambda: any(f.endswith(".part") and f[:24] not in str(survived)
                                   for f in os.listdir(clips)), command)
    capsys.readouterr()
    # what a kill in the midst of a write leaves
    (clips / f"{'0' * 24}-0of1.safetensors.1of1.part").write_bytes(b"half")
    fill_cache(videos, weights["wan"], out)
    said = capsys.readouterr().out
    assert files_of(out) == files_of(caches["wan"]) and "0 were there" not in said
    assert survived.items() <= written(clips).items()


@pytest.mark.slow
def test_errors_have_their_exit_codes(tmp_path):
    """The real command, as a process: 2, one sentence, no traceback."""
    line = [sys.executable, "encode.py", *words_of(dict(videos="x", weights=tmp_path, out="y"))]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "vae" in done.stderr

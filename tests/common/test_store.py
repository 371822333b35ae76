"""What is written is whole or not there:
files, and folders of clips that runs share, break off and find again."""
import concurrent.futures
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import common.files
import common.pool
import data
import runs
from common.store import Store
from config import Stopped, UserError
from drills import flips
from helpers import ROOT, flip, rewrite, sentence, unsealed
from official.cache import CACHE, CacheRow
from videos import opened, pool_cfg


# ------------------------------------------------------------------------------------------------------ files
def test_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    common.files.write_text(path, "old")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def full_disk(self, text, **_):
        with self.open("w") as f:
            f.write(text[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="No space"):
            common.files.write_text(path, "new text")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    common.files.write_text(path, "new text")
    assert path.read_text() == "new text" and list(tmp_path.iterdir()) == [path]


def test_a_new_text_is_whole_before_it_takes_the_old_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.json", {}
    path.write_text("old")
    replace = os.replace

    def watch(part, target):
        seen.update(old=path.read_text(), new=part.read_text())
        return replace(part, target)

    monkeypatch.setattr(os, "replace", watch)
    common.files.write_text(path, "new")
    assert seen == {"old": "old", "new": "new"}


# ---------------------------------------------------------------------------------------------------- folders
def test_an_existing_pool_is_not_built_again(tmp_path, monkeypatch):
    cfg = pool_cfg(tmp_path)
    opened(cfg)
    monkeypatch.setattr(data.SyntheticClips, "clips", lambda *_: pytest.fail("built again"))
    opened(cfg)


def break_video(path):
    (path / "video.u8").write_bytes((path / "video.u8").read_bytes()[:-1])


def break_masks(path):
    (path / "masks.u8").unlink()


def break_meta(path):
    (path / "meta.json").write_text((path / "meta.json").read_text()[:-40])


def change_meta(**entries):
    def change(path):
        rewrite(path / "meta.json", **entries)
    return change


@pytest.mark.parametrize("harm", [
    break_video, break_masks, break_meta, change_meta(train=[99]), change_meta(train=[]),
    change_meta(captions=3),
    change_meta(categories=[[77]] * 16), change_meta(mask_category=[[0, 99]] * 16), change_meta(held="no")])
def test_a_broken_pool_is_built_again(tmp_path, harm):
    cfg = pool_cfg(tmp_path)
    video = opened(cfg).video[:].copy()
    path, = (tmp_path / "pools").iterdir()
    harm(path)
    assert data.Pool.open(path, (4, 16, 16)) is None
    assert np.array_equal(opened(cfg).video, video) and list((tmp_path / "pools").iterdir()) == [path]


def test_half_built_pools_are_ignored_and_cleaned(tmp_path):
    cfg = pool_cfg(tmp_path)
    opened(cfg)
    path, = (tmp_path / "pools").iterdir()
    path.rename(path.with_name(path.name + ".dead"))  # as a build killed just before its renaming leaves it
    other = tmp_path / "pools" / "world-000000000000.live"
    other.mkdir()
    opened(cfg)
    assert {p.name for p in (tmp_path / "pools").iterdir()} == {path.name, other.name}


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def dies(self, progress):
        yield data.PoolClip(np.zeros((4, 16, 16, 3), np.uint8), "half", [0], ["a clip"])
        raise KeyboardInterrupt

    monkeypatch.setattr(data.SyntheticClips, "clips", dies)
    with pytest.raises(KeyboardInterrupt):
        opened(pool_cfg(tmp_path))
    assert list((tmp_path / "pools").iterdir()) == []


def test_two_runs_build_once(tmp_path, monkeypatch, capsys):
    import fcntl
    cfg, built, clips, flock = pool_cfg(tmp_path), [], data.SyntheticClips.clips, fcntl.flock
    begun, waits = threading.Event(), threading.Event()

    def slow(self, progress):
        built.append(1)
        begun.set()
        assert waits.wait(60)  # the second run stands before the lock while the first still builds
        yield from clips(self, progress)

    def seen(handle, how):
        if not how & fcntl.LOCK_NB:
            waits.set()
        return flock(handle, how)

    monkeypatch.setattr(data.SyntheticClips, "clips", slow)
    monkeypatch.setattr("fcntl.flock", seen)
    with concurrent.futures.ThreadPoolExecutor(2) as runs:
        first = runs.submit(opened, cfg)
        assert begun.wait(60)
        second = runs.submit(opened, cfg)
        assert np.array_equal(first.result().video, second.result().video)
    assert len(built) == 1 and "waiting for it" in capsys.readouterr().out


def test_without_locks_pools_are_built_all_the_same(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(37, "No locks available")  # some network drives

    monkeypatch.setattr("fcntl.flock", refuses)
    (tmp_path / "pools").mkdir()
    cfg = pool_cfg(tmp_path)
    opened(cfg)
    path, = (tmp_path / "pools").iterdir()
    break_video(path)
    # perhaps another run's, still being filled: it must be left alone
    beside = path.with_name(path.name + ".other")
    beside.mkdir()
    assert len(opened(cfg).captions) == 16 and beside.is_dir()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # writing more fails, as on a full disk
    try:
        with pytest.raises(Stopped, match="could not be written") as error:
            opened(pool_cfg(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value) and list((tmp_path / "pools").iterdir()) == []


def test_a_place_that_cannot_hold_clips_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--pool_dir .* cannot hold clips"):
        opened(pool_cfg(tmp_path, pool_dir=str(tmp_path / "file")))


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the workers under /proc")
def test_a_killed_build_leaves_no_process_and_nothing_that_is_opened(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
import data
from config import preset
cfg = preset("debug", world_clips=99_999, threads=2, pool_dir={str(tmp_path / 'pools')!r})
data.open_pool(cfg, progress=False)
""")
    run = subprocess.Popen([sys.executable, script])
    try:
        videos = (tmp_path / "pools").glob
        part = wait_for(lambda: [p for p in videos("world-*/video.u8") if p.stat().st_size])[0].parent
        workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    finally:
        run.kill()
        run.wait()
    assert len(workers) >= 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert part.suffix and data.Pool.open(part, (4, 16, 16)) is None


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return answer


# ------------------------------------------------------------------------------- bytes that the disk changed
def test_no_file_that_a_run_reads_back_is_read_as_something_else(tmp_path, monkeypatch):
    """The drill in short: each kind of file with eight flipped bits and two cuts."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")
    runs.without_previews(monkeypatch)
    for kind, (path, read) in flips.kinds_in(tmp_path).items():
        tally = flips.drill(path, read, 8, 2, random.Random(kind))
        assert not tally["other"] and not tally["traceback"] and tally["noticed"], (kind, tally)


@pytest.mark.parametrize("file", ["video.u8", "masks.u8"])
def test_a_damaged_clip_stops_the_run_and_the_next_start_builds_the_pool_anew(file, tmp_path, monkeypatch):
    cfg = pool_cfg(tmp_path)
    right = opened(cfg)
    whole = right.clips(range(16)).copy()
    path = right.path / file
    path.write_bytes(bytes(100) + path.read_bytes()[100:])  # a block that the disk gives back as zeros
    pool = opened(cfg)
    assert np.array_equal(pool.clips([15, 3]), whole[[15, 3]])  # those are sound
    clips = data.Clips(cfg, pool, data.Tokenizer(["c"]))
    first = pool.train.index(0)
    monkeypatch.setattr(clips, "row", lambda position: pool.train[position])
    said = sentence(clips.batch, [first + 1, first], error=Stopped)
    assert "Clip 0 in" in said and "--resume" in said and str(right.path) in said
    assert np.array_equal(opened(cfg).clips(range(16)), whole)


def test_a_label_that_changed_in_meta_json_is_noticed(tmp_path):
    cfg = pool_cfg(tmp_path)
    path = opened(cfg).path
    meta = json.loads((path / "meta.json").read_text())
    meta["categories"][3] = [7]
    (path / "meta.json").write_text(json.dumps(meta))
    assert data.Pool.open(path, (4, 16, 16)) is None


def test_a_pool_of_before_has_no_checksums_and_is_read(tmp_path):
    cfg = pool_cfg(tmp_path)
    pool = opened(cfg)
    meta = unsealed(pool.path / "meta.json")
    del meta["checksums"]
    (pool.path / "meta.json").write_text(json.dumps(meta))
    before = (pool.path / "meta.json").read_bytes()
    old = opened(cfg)
    assert old.key == pool.key and np.array_equal(old.clips(range(16)), pool.clips(range(16)))
    assert (pool.path / "meta.json").read_bytes() == before


def test_a_clip_is_looked_at_once(tmp_path, monkeypatch):
    pool, seen, real = opened(pool_cfg(tmp_path)), [], common.pool.checksum
    monkeypatch.setattr(common.pool, "checksum", lambda *bytes: seen.append(1) or real(*bytes))
    for rows in ([1, 2], [2, 3, 3], [1]):
        pool.clips(rows)
    assert len(seen) == 3


# -------------------------------------------------------------------------------------------------- two writers
def made(folder, shard=(0, 1), clip="a", **settings):
    """One clip written to a store of these settings."""
    with Store.create(folder, CACHE, settings, shard) as store:
        file = f"{store.name([clip])}-0of1.safetensors"
        store.write(store.clips / file, {"mean": torch.ones(2)}, {"text_length": 1})
        store.write_index({store.name([clip]): None}, lambda file, _: CacheRow(file, clip, clip, []))


def test_a_store_that_is_written_to_refuses_other_settings(tmp_path):
    """Before there is any clip that the second could see."""
    with Store.create(tmp_path, CACHE, {"fps": 8}):
        manifest = (tmp_path / "cache.json").read_bytes()
        said = sentence(made, tmp_path, (1, 2), fps=9)
        assert "fps 8, now 9" in said and (tmp_path / "cache.json").read_bytes() == manifest
    made(tmp_path, fps=9)  # nobody wrote a clip
    assert "fps 9, now 8" in sentence(made, tmp_path, fps=8)


def test_the_same_shard_twice_is_refused_and_others_go_on(tmp_path):
    with Store.create(tmp_path, CACHE, {"fps": 8}, (0, 2)) as store:
        half = store.clips / "x.1of2.part"
        half.write_bytes(b"what the first is writing")
        assert "makes shard 1/2 of" in sentence(made, tmp_path, (0, 2), fps=8)
        made(tmp_path, (1, 2), fps=8)
        assert half.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.json", "clips", "index.json"]
    made(tmp_path, (0, 2), fps=8)
    assert not half.exists()


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from common.files import lock
with lock(Path(sys.argv[2]), "held"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    (tmp_path / "1of1.lock").touch()
    line = [sys.executable, "-c", HOLD, str(ROOT), str(tmp_path / "1of1.lock")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        assert "makes shard 1/1" in sentence(made, tmp_path, fps=8)
        owner.kill()
    made(tmp_path, fps=8)
    assert not (tmp_path / "1of1.lock").exists()


def test_a_lock_is_not_had_on_a_file_that_its_owner_has_removed(tmp_path, monkeypatch):
    """Between opening it and locking it: a third process may hold a new file of the same name by then."""
    path = tmp_path / "1of1.lock"
    path.touch()
    monkeypatch.setattr(common.files, "take", lambda handle: path.unlink() or path.touch() or True)
    with pytest.raises(UserError, match="held"), common.files.lock(path, "held"):
        pytest.fail("two hold it")


def test_without_locks_stores_are_written_all_the_same(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuses)
    made(tmp_path, fps=8)
    monkeypatch.setattr(common.files, "fcntl", None)  # as on Windows
    made(tmp_path, clip="b", fps=8)
    assert len(os.listdir(tmp_path / "clips")) == 2


@pytest.mark.parametrize("field", ["text_length", "mean", "caption"])
def test_what_a_clip_says_beside_its_numbers_is_checked(field, tmp_path):
    """Its header, and index.json: one bit of a length, a name, a caption."""
    made(tmp_path, clip="caption", fps=8)
    store = Store.open(tmp_path, CACHE)
    path = tmp_path / "index.json" if field == "caption" else store.clips / store.rows[0].file
    flip(path, path.read_bytes().rindex(field.encode()) + 1, bit=0)
    if field == "caption":
        assert "index.json is damaged" in sentence(Store.open, tmp_path, CACHE)
    else:
        assert store.read(store.rows[0].file) is None and not store.is_sound(path)


def test_a_store_of_before_has_no_digests_and_is_read(tmp_path):
    made(tmp_path, fps=8)
    rewrite(tmp_path / "index.json")  # without its digest
    store = Store.open(tmp_path, CACHE)
    path = store.clips / store.rows[0].file
    tensors, about = store.read(path.name)
    old = {name: value for name, value in about.items() if name != "digest"}
    safetensors.torch.save_file(tensors, path, {"about": json.dumps(old)})
    assert Store.open(tmp_path, CACHE).read(path.name)[1] == old

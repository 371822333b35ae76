"""What is written is whole or not there:
files, and folders of clips that runs share, break off and find again."""
import concurrent.futures
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import common.files
import data
from config import Stopped, UserError
from helpers import rewrite
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

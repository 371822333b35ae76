"""Kill `teacher.py --videos` again and again, at moments nobody chose, and see whether its maps end as if nothing had happened.

    python tests/drills/kill_teacher.py             20 kills (about three minutes on two quiet cores)
    python tests/drills/kill_teacher.py --kills 4 --family qwen3_vl

A VLM of random weights and videos of a second. One folder of maps is made by a process that is left alone, the other by
one that gets `kill -9` and is started again, over and over: after so many clips, a moment later, and every fifth time
while the program is starting. At the end both folders must hold the same files, byte for byte, and no map that was there
before a kill may have been made twice. Exit code 1 when anything differs.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_maps import FLAGS, files_of, movie  # noqa: E402
from test_teacher import FAMILIES, make_vlm  # noqa: E402


def start(folder: Path, out: Path) -> subprocess.Popen:
    fields = dict(videos=folder / "videos", vlm=folder / "vlm", out=out, device="cpu", threads=1, **FLAGS)
    line = [sys.executable, "teacher.py", *(word for f, value in fields.items() for word in (f"--{f}", str(value)))]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=alone)


def finish(folder: Path, out: Path) -> None:
    program = start(folder, out)
    err = program.communicate()[1].decode(errors="replace")
    if program.returncode:
        sys.exit(f"teacher.py ended with {program.returncode}:\n{err[-2000:]}")


def clips(out: Path) -> dict[str, int]:
    """{finished map: when it was written}."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "clips").glob("*.safetensors")}


def kill_at(program: subprocess.Popen, out: Path, n: int, delay: float) -> bool:
    """Wait until there are n maps, then a moment, then kill -9. False when the program ended by itself before."""
    while len(clips(out)) < n and program.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    program.kill()
    program.communicate()
    return program.returncode == -signal.SIGKILL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--family", default=FAMILIES[0], choices=FAMILIES)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; without it they are others each time")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    moments, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="kill-teacher-"))
    n, killed, whole = 8 * args.kills, folder / "killed", folder / "whole"

    make_vlm(folder / "vlm", args.family, layers=3)
    (folder / "videos").mkdir()
    for i in range(n):
        if i < 8:
            movie(folder / "videos" / f"{i}.mp4", i)
        else:  # the name counts, too
            shutil.copy2(folder / "videos" / f"{i % 8}.mp4", folder / "videos" / f"{i}.mp4")
    labels = ("combustion", "melting, collision", "", "gas motion")
    records = [{"file": f"{i}.mp4", "caption": f"clip {i}", "q0": labels[i % 4]} for i in range(n)]
    (folder / "videos" / "captions.json").write_text(json.dumps(records))
    began = time.perf_counter()
    finish(folder, whole)
    alone = time.perf_counter() - began
    print(f"left alone: {n} clips in {alone:.0f} s; moments from seed {seed}", flush=True)

    landed, twice = 0, 0
    for i in range(args.kills):
        before, program = clips(killed), start(folder, killed)
        if i % 5 == 4:  # anywhere in the first seconds: imports, loading weights, looking at what is there
            hit = kill_at(program, killed, -1, moments.uniform(0, min(10, alone)))
        else:  # spread over the clips; of those written in this round at least one
            hit = kill_at(program, killed, max(int((i + moments.random()) / args.kills * n), len(before) + 1), moments.uniform(0, 0.2))
        landed += hit
        after = clips(killed)
        twice += sum(after.get(name) != written for name, written in before.items())
        half = [path.name for path in killed.rglob("*.part")]
        print(f"kill {i + 1:2d} of {args.kills}: {'after' if hit else 'came too late, after'} {len(after)} clips"
              f"{', half a file beside them' if half else ''}", flush=True)
        if not hit:
            break
    before = clips(killed)
    finish(folder, killed)
    twice += sum(clips(killed).get(name) != written for name, written in before.items())

    a, b = files_of(killed), files_of(whole)
    different = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    for name in different[:10]:
        print(f"  differs: {name}")
    if different or twice:
        print(f"{landed} kills: {len(different)} files differ from those made without, {twice} maps were lost or made twice; both are "
              f"in {folder}.")
        return 1
    shutil.rmtree(folder)
    print(f"{landed} kills: all {len(a)} files are byte for byte those of the run left alone, and no map was made twice.")
    return 0 if landed else 1


if __name__ == "__main__":
    sys.exit(main())

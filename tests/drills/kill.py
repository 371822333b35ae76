"""Kill a program again and again, at moments nobody chose,
and see whether it ends as if nothing had happened.

    python tests/drills/kill.py                     train.py, 20 kills (about five minutes on two quiet cores)
    python tests/drills/kill.py --subject encode    encode.py (about three minutes), teacher likewise
    python tests/drills/kill.py --kills 4 --steps 120

The work is done twice: by a process that is left alone, and by one that gets `kill -9` and is started again,
over and over: at moments spread over the work, and every fifth time while the program is starting.

train    The debug preset, saving every third step and logging each, so that kills fall into saves,
         validations, previews, log lines and the change of stage. At the end the last, the best and the base
         checkpoint must agree to the bit, and so must the logs but for the clock.
encode   Random weights and videos of a second. At the end both folders must hold the same files, byte for
         byte, and no clip that was there before a kill may have been made twice.
teacher  The same, with a VLM of random weights and its maps.

Exit code 1 when anything differs.
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

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import drifting, files_of, words_of, written  # noqa: E402


# --- what is killed: how much there is to do, how it is started, how far it is, and what differs at the end
class Train:
    unit, longest_start, longest_delay = "steps", 6, 0.15

    def __init__(self, folder: Path, args):
        self.folder, self.total = folder, args.steps

    def command(self, out: Path) -> list[str]:
        fields = dict(config="debug", out_dir=out, pool_dir=self.folder / "pool", base_steps=self.total // 2,
                      physics_steps=self.total - self.total // 2, batch_size=4, threads=1, device="cpu",
                      save_every=3,
                      log_every=1, eval_every=7, preview_every=20, preview_steps=1, guidance=1)
        # `--resume` only once there is something to resume from; before, the same command starts again
        begun = any((out / "checkpoints").glob("step*.pt"))
        return ["train.py", *words_of(fields), *["--resume"] * begun]

    def done(self, out: Path) -> int:
        """The last step in the log, -1 when there is none; a killed run may have left half a line."""
        try:
            return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, IndexError, ValueError):
            return -1

    def kept(self, out: Path) -> dict:
        """Nothing: checkpoints are replaced by newer ones."""
        return {}

    def half_done(self, out: Path) -> list[Path]:
        return list((out / "checkpoints").glob("*.tmp"))

    def compare(self, killed: Path, whole: Path) -> list[str]:
        found = []
        for name in (f"step{self.total:06d}.pt", "best.pt", "base.pt"):
            a, b = (torch.load(out / "checkpoints" / name, weights_only=True) for out in (killed, whole))
            found += differences(a, b, name)
        a, b = ([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
                for out in (killed, whole))
        if len(a) != len(b):
            return found + [f"log.jsonl has {len(a)} lines, {len(b)} in the run left alone"]
        return found + differences(a, b, "log.jsonl")


class Encode:
    unit, longest_start, longest_delay = "clips", 10, 0.2
    film = dict(height=40, width=68)

    def __init__(self, folder: Path, args):
        self.folder, self.total = folder, 8 * args.kills
        self.write_model(args)
        (folder / "videos").mkdir()
        for i in range(self.total):
            if i < 8:
                drifting(folder / "videos" / f"{i}.mp4", i, **self.film)
            else:  # the name counts, too
                shutil.copy2(folder / "videos" / f"{i % 8}.mp4", folder / "videos" / f"{i}.mp4")
        (folder / "videos" / "captions.json").write_text(json.dumps(self.captions()))

    def write_model(self, args) -> None:
        from tiny_weights import make_weights
        make_weights(self.folder / "model", args.lineage)

    def captions(self):
        return {f"{i}.mp4": f"a ball falls {i} times" for i in range(self.total)}

    def command(self, out: Path) -> list[str]:
        fields = dict(videos=self.folder / "videos", weights=self.folder / "model", out=out, frames=9, fps=8,
                      height=32,
                      width=64, text_batch=4, device="cpu")
        return ["encode.py", *words_of(fields)]

    def done(self, out: Path) -> int:
        return len(self.kept(out))

    def kept(self, out: Path) -> dict[str, int]:
        """{finished clip: when it was written}: it must not be made again."""
        return written(out / "clips")

    def half_done(self, out: Path) -> list[Path]:
        return list(out.rglob("*.part"))

    def compare(self, killed: Path, whole: Path) -> list[str]:
        a, b = files_of(killed), files_of(whole)
        return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


class Teacher(Encode):
    unit, film = "maps", dict(height=36, width=52)

    def write_model(self, args) -> None:
        from tiny_vlm import make_vlm
        make_vlm(self.folder / "model", args.family, layers=3)

    def captions(self):
        labels = ("combustion", "melting, collision", "", "gas motion")
        return [{"file": f"{i}.mp4", "caption": f"clip {i}", "q0": labels[i % 4]} for i in range(self.total)]

    def command(self, out: Path) -> list[str]:
        from tiny_vlm import teacher_flags
        return ["teacher.py", *teacher_flags(self.folder / "videos", self.folder / "model", out)]


SUBJECTS = dict(train=Train, encode=Encode, teacher=Teacher)


def differences(a, b, at: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a if key not in ("seconds", "digest") for d in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{at}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [at]


# --- the killing
def start(line: list[str]) -> subprocess.Popen:
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *line], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE,
                            env=alone)


def finish(line: list[str]) -> None:
    program = start(line)
    err = program.communicate()[1].decode(errors="replace")
    if program.returncode:
        sys.exit(f"{' '.join(line)} ended with {program.returncode}:\n{err[-2000:]}")


def kill_at(program: subprocess.Popen, progress, target: int, delay: float) -> bool:
    """Wait until `progress()` is at the target, then a moment, then kill -9.
    False when it ended by itself before."""
    while progress() < target and program.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    program.kill()
    program.communicate()
    return program.returncode == -signal.SIGKILL


def drill(subject, killed: Path, kills: int, moments: random.Random, alone: float) -> tuple[int, int]:
    """-> how many kills landed, and how much of what was there before a kill has been made again."""
    def remade(before: dict) -> int:
        after = subject.kept(killed)
        return sum(after.get(name) != when for name, when in before.items())

    landed = twice = 0
    for i in range(kills):
        kept, target = subject.kept(killed), -1
        # anywhere in the first seconds: imports, looking at what is there
        longest = min(subject.longest_start, alone)
        if i % 5 != 4:  # spread over the work; in this round at least one step is taken
            target = max(int((i + moments.random()) / kills * subject.total), subject.done(killed) + 1)
            longest = subject.longest_delay
        hit = kill_at(start(subject.command(killed)), lambda: subject.done(killed), target,
                      moments.uniform(0, longest))
        landed, twice = landed + hit, twice + remade(kept)
        half = ", half a file beside them" if subject.half_done(killed) else ""
        when = "after" if hit else "came too late, after"
        print(f"kill {i + 1:2d} of {kills}: {when} {subject.done(killed)} {subject.unit}{half}", flush=True)
        if not hit:
            break
    kept = subject.kept(killed)
    finish(subject.command(killed))
    return landed, twice + remade(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", choices=SUBJECTS, default="train")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400, help="train: of both stages together")
    parser.add_argument("--lineage", default="wan", choices=("wan", "cogvideox"), help="encode")
    parser.add_argument("--family", default="qwen2_5_vl", choices=("qwen2_5_vl", "qwen3_vl"), help="teacher")
    parser.add_argument("--seed", type=int, default=None,
                        help="of the moments; without it they are others each time")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix=f"kill-{args.subject}-"))
    killed, whole, subject = folder / "killed", folder / "whole", SUBJECTS[args.subject](folder, args)

    began = time.perf_counter()
    finish(subject.command(whole))
    alone = time.perf_counter() - began
    print(f"left alone: {subject.total} {subject.unit} in {alone:.0f} s; moments from seed {seed}; {folder}",
          flush=True)

    landed, twice = drill(subject, killed, args.kills, random.Random(seed), alone)
    found = subject.compare(killed, whole)
    for name in found[:10]:
        print(f"  differs: {name}")
    if found or twice:
        made = f", {twice} {subject.unit} were lost or made twice" if subject.kept(whole) else ""
        print(f"{landed} kills: {len(found)} differences from what was left alone{made}.")
        print(f"Both are in {folder}.")
        return 1
    shutil.rmtree(folder)
    print(f"{landed} kills: everything is to the bit what it is when left alone, and nothing was made twice.")
    return 0 if landed else 1


if __name__ == "__main__":
    sys.exit(main())

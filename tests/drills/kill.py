"""Kill a training run again and again, at moments nobody chose, and see whether it ends as if nothing had happened.

    python tests/drills/kill.py             20 kills (about five minutes on two quiet cores)
    python tests/drills/kill.py --kills 4 --steps 120

Two runs of the debug preset are the same but for this: one is left alone, the other gets `kill -9` and `--resume`, over
and over. It saves every third step and logs each, so that kills fall into saves, validations, previews, log lines and
the change of stage; every fifth one falls while the program is starting. At the end the last, the best and the base
checkpoint must agree to the bit, and so must the logs but for the clock. Exit code 1 when anything differs.
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


def command(folder: Path, out: Path, steps: int) -> list[str]:
    fields = dict(config="debug", out_dir=out, pool_dir=folder / "pool", base_steps=steps // 2,
                  physics_steps=steps - steps // 2, batch_size=4, threads=1, device="cpu", save_every=3, log_every=1,
                  eval_every=7, preview_every=20, preview_steps=1, guidance=1)
    return [sys.executable, "train.py", *(word for f, value in fields.items() for word in (f"--{f}", str(value)))]


def start(line: list[str]) -> subprocess.Popen:
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=alone)


def finish(line: list[str]) -> None:
    program = start(line)
    err = program.communicate()[1].decode(errors="replace")
    if program.returncode:
        sys.exit(f"{' '.join(line)} ended with {program.returncode}:\n{err[-2000:]}")


def logged(run: Path) -> int:
    """The last step in the log, -1 when there is none; a killed run may have left half a line."""
    try:
        return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return -1


def kill_at(program: subprocess.Popen, run: Path, step: int, delay: float) -> bool:
    """Wait until the run has logged the step, then a moment, then kill -9. False when it ended by itself before."""
    while logged(run) < step and program.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    program.kill()
    program.communicate()
    return program.returncode == -signal.SIGKILL


def differences(a, b, at: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a if key != "seconds" for d in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{at}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [at]


def compare(run: Path, whole: Path, steps: int) -> list[str]:
    found = []
    for name in (f"step{steps:06d}.pt", "best.pt", "base.pt"):
        a, b = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (run, whole))
        found += differences(a, b, name)
    a, b = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (run, whole))
    if len(a) != len(b):
        return found + [f"log.jsonl has {len(a)} lines, {len(b)} in the run left alone"]
    return found + differences(a, b, "log.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400, help="of both stages together")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; without it they are others each time")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    moments, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="kill-drill-"))
    run, whole = folder / "killed", folder / "whole"

    began = time.perf_counter()
    finish(command(folder, whole, args.steps))
    alone = time.perf_counter() - began
    print(f"left alone: {args.steps} steps in {alone:.0f} s; moments from seed {seed}; {folder}", flush=True)

    landed = 0
    for i in range(args.kills):
        # `--resume` only once there is something to resume from; before, the same command starts again
        resumed = bool(list((run / "checkpoints").glob("step*.pt")))
        program, before = start(command(folder, run, args.steps) + ["--resume"] * resumed), logged(run)
        if i % 5 == 4:  # anywhere in the first seconds: imports, reading the checkpoint, rewriting the log
            hit = kill_at(program, run, -1, moments.uniform(0, min(6, alone)))
        else:  # spread over the run, so that both stages and the border get theirs
            step = max(int((i + moments.random()) / args.kills * args.steps), before + 1)
            hit = kill_at(program, run, step, moments.uniform(0, 0.15))
        landed += hit
        saves, half = (sorted(p.name for p in (run / "checkpoints").glob(kind)) for kind in ("step*.pt", "*.tmp"))
        print(f"kill {i + 1:2d} of {args.kills}: {'after' if hit else 'came too late, after'} step {logged(run)} "
              f"was logged, newest save {saves[-1] if saves else 'none'}{', half a save beside it' if half else ''}", flush=True)
        if not hit:
            break
    finish(command(folder, run, args.steps) + ["--resume"] * bool(list((run / "checkpoints").glob("step*.pt"))))

    found = compare(run, whole, args.steps)
    for path in found[:10]:
        print(f"  differs: {path}")
    if found:
        print(f"{landed} kills: {len(found)} differences from the run left alone; both are in {folder}.")
        return 1
    shutil.rmtree(folder)
    print(f"{landed} kills: checkpoints agree to the bit with the run left alone, and so do the logs.")
    return 0 if landed else 1


if __name__ == "__main__":
    sys.exit(main())

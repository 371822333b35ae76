"""Kill processes of a torchrun again and again, and see whether the run ends as if nothing had happened.

    python tests/drills/cluster.py                  30 kills, about ten minutes on two quiet cores
    python tests/drills/cluster.py --kills 4 --steps 60

The debug preset is trained twice by two processes: left alone, and with one kill after the other, in turn
    worker   kill -9 of one of the two, at a random moment: torchrun starts both again
    save     kill -9 of the first one, as soon as a checkpoint is being written
    term     SIGTERM to torchrun, which passes it on: both end the step, save and end; then started with --resume
At the end every checkpoint must be the same to the bit, and so must the logs but for the clock; no file may be
left half-written under its own name. Exit code 1 when anything differs.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common.checkpoints import read_checkpoint  # noqa: E402
from helpers import words_of  # noqa: E402
from runs import checkpoint, differences, lines, names  # noqa: E402

KINDS = ("worker", "save", "term")


def start(out: Path, folder: Path, steps: int) -> subprocess.Popen:
    """torchrun with two processes of train.py; --resume where there is something to go on from."""
    fields = dict(config="debug", out_dir=out, pool_dir=folder / "pool", base_steps=steps // 2, threads=1,
                  physics_steps=steps - steps // 2, batch_size=4, device="cpu", save_every=3, log_every=1, eval_every=7,
                  preview_every=20, preview_steps=1, guidance=1, report=False)
    resume = ["--resume"] * any((out / "checkpoints").glob("step*.pt"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts",
               "1000", "--", "train.py", *words_of(fields), *resume]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    log = open(folder / "output.txt", "a")
    return subprocess.Popen(command, cwd=ROOT, env=quiet, stdout=log, stderr=log)


def workers(torchrun: subprocess.Popen) -> list[int]:
    """Process numbers of what torchrun has started, the first process first."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


def steps_logged(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for(ready, torchrun: subprocess.Popen) -> bool:
    """Wait until `ready()`; False when torchrun has ended before that."""
    while torchrun.poll() is None:
        if ready():
            return True
        time.sleep(0.002)
    return False


def strike(kind: str, torchrun: subprocess.Popen, out: Path, rng: random.Random) -> bool:
    """One kill, a while after the run has taken a step since the last one. False when the run was done before."""
    before = steps_logged(out)
    if not wait_for(lambda: steps_logged(out) not in (0, before), torchrun):
        return False
    if kind == "save":
        if not wait_for(lambda: list((out / "checkpoints").glob("*.part")), torchrun):
            return False
    else:
        time.sleep(rng.uniform(0, 1.5))
    if torchrun.poll() is not None:
        return False
    if kind == "term":
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait()
        return True
    alive = workers(torchrun)
    victim = 0 if kind == "save" else rng.randrange(len(alive))
    os.kill(alive[victim], signal.SIGKILL)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone, out = folder / "alone", folder / "killed"
        assert start(alone, folder, args.steps).wait() == 0, (folder / "output.txt").read_text()

        done = {kind: 0 for kind in KINDS}
        torchrun = start(out, folder, args.steps)
        began = time.time()
        while sum(done.values()) < args.kills:
            kind = KINDS[sum(done.values()) % len(KINDS)]
            if not strike(kind, torchrun, out, rng):
                break
            done[kind] += 1
            print(f"kill {sum(done.values())}: {kind}, {steps_logged(out)} lines, {time.time() - began:.0f} s", flush=True)
            if torchrun.poll() is not None:
                torchrun = start(out, folder, args.steps)
        code = torchrun.wait()
        if code:
            print((folder / "output.txt").read_text()[-3000:])

        for path in (out / "checkpoints").glob("*.pt"):
            read_checkpoint(path)  # raises where it cannot be read
        apart = [d for file in names(alone) for d in differences(checkpoint(alone, file), checkpoint(out, file), file)]
        same_log = lines(alone) == lines(out)
        print(f"killed {done}; exit code {code}; {len(apart)} differences in {names(alone)}, same log: {same_log}")
        sys.exit(bool(code or apart or not same_log or sum(done.values()) < args.kills))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

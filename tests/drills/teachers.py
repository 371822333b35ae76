"""What the teacher buys: stage two trained with exact masks, a VLM's maps, frame differences, shuffled maps, no alignment.

    python teacher.py --train_tiny --colour_cues && python tests/drills/teachers.py --seeds 0 1 2

For each seed one backbone, and from it a run a teacher, in the world with colour cues (that the tiny VLM learned). All
are scored against exact masks, which only the first row has seen. Runs that are there are not made again.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TEACHERS = {"exact masks": [], "tiny VLM": ["--teacher", "tiny_vlm"], "frame differences": ["--teacher", "saliency"],
            "shuffled maps": ["--teacher", "shuffled"],
            "no alignment": ["--fine_weight", "0", "--coarse_weight", "0"]}


def run(*command: str) -> None:
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def again(out: str) -> list[str]:
    """What a run that was stopped half-way needs."""
    return ["--resume"] * any((ROOT / out / "checkpoints").glob("step*.pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base_steps", default="3100")
    parser.add_argument("--physics_steps", default="450")
    parser.add_argument("--negatives", default="0.1",
                        help="pull to zero where maps are not positive, in all rows alike: closes the hole in the "
                        "paper's mask")
    parser.add_argument("--world_clips", default="16000", help="those that the tiny VLM's maps were made of")
    parser.add_argument("--out", default="runs/teachers")
    parser.add_argument("--pool_dir", default="data")
    parser.add_argument("--threads", default="0")
    parser.add_argument("--n", default="8", help="clips a law in the evaluation")
    args = parser.parse_args()
    world = ["--config", "small", "--colour_cues", "--pool_dir", args.pool_dir, "--threads", args.threads,
             "--world_clips", args.world_clips]
    for kind in ("saliency", "shuffled"):
        run("teacher.py", "--annotate", kind, "--kind", kind, *world)
    found = {name: [] for name in TEACHERS}
    for seed in args.seeds:
        base = f"{args.out}/base{seed}"
        if not (ROOT / base / "checkpoints/base.pt").exists():
            run("train.py", *world, "--seed", str(seed), "--base_steps", args.base_steps, "--physics_steps", "0",
                "--out_dir", base, *again(base))
        for name, flags in TEACHERS.items():
            out = f"{args.out}/{name.replace(' ', '_')}{seed}"
            if not (ROOT / out / "checkpoints" / f"step{int(args.physics_steps):06d}.pt").exists():
                run("train.py", *world, "--seed", str(seed), "--init_from", base, "--physics_steps", args.physics_steps,
                    "--negatives", args.negatives, "--out_dir", out, *flags, *again(out))
            run("evaluate.py", "--run", out, "--n", args.n, "--precision", "bf16", "--checkpoint", "last")
            found[name].append(json.loads((ROOT / out / "evaluation.json").read_text()))
    levels = list(next(iter(found.values()))[0]["localisation"]["rows"]["location prior"])
    print("\n| stage two learned from | " + " | ".join(f"AUC, {level}" for level in levels) + " | laws | found |")
    print("|" + "---|" * (len(levels) + 3))
    cell = lambda values: f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if values[1:] else "")
    for name, tables in found.items():
        auc = [[table["localisation"]["rows"]["refinement maps"][level] for table in tables] for level in levels]
        laws = [[table["laws"]["rows"]["generated"][column] for table in tables] for column in ("all", "found")]
        print(f"| {name} | " + " | ".join(map(cell, auc + laws)) + " |")


if __name__ == "__main__":
    main()

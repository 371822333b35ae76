"""The ablation of the paper, in one command: every row from the same bases, at equal steps and at
equal time.

    python ablate.py --config small --seeds 3             all rows; docs/ablation.md and .json
    python ablate.py --rows paper --jobs 2                 one group; two runs at a time
    python ablate.py --rows default,lora,physical          some rows

    base (weak physics) of each seed --> --init_from: a run a row --> scores --> table

Rows are data: flags of train.py. A row of another cost a step than the default is trained twice,
for the default's steps and for as many as fit into the default's time. What a step takes is
measured here, side by side and in turns: logs of runs that shared a machine tell nothing of it.
Started again, the command goes on, also on another machine: the table's .json holds the scores of
all finished runs, clip by clip, and a run is made again where its row or its preset has changed.
"""
import concurrent.futures
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import bench
import config
import diffusion
import evaluate
import sample
from common.ablation import by_clip, compared, read_table, write_table
from common.files import cores, digest, lock
from common.paths import check_writable
from common.run import git_revision, resolve
from config import Config, Stopped, UserError, flag
from experts import ProPhy, invert
from model import build_backbone


# --- the rows -------------------------------------------------------------------------------------
EQUAL = "equal"  # as a LoRA's rank: the one with the parameters of the default branch


@dataclass(frozen=True)
class Row:
    """A row of a table. Without flags it is the base itself."""
    says: str  # its name in the table
    flags: dict | None  # of train.py, beside those that the whole group has
    paper: float | None = None  # physical commonsense (%) on Wan2.1-1.3B, the paper's Tables 3, 4
    maps: tuple[str, ...] = ()  # flags of teacher.py that make its maps


LORA = {"physical_blocks": "", "lora_rank": EQUAL}
ALL_WEIGHTS = {"physical_blocks": "", "freeze_backbone": False}
PHYSICAL = {"semantic": False, "refinement": False}
FROZEN = {"train_physical": False}
GROUPS = {  # the first row of a group is what its others are compared with
    "paper": {
        "default": Row("all parts", {}, 65.0),
        "backbone": Row("backbone alone", None, 57.8),
        "all_weights": Row("all weights trained on", ALL_WEIGHTS),
        "lora": Row("LoRA of equal parameters", LORA, 58.2),
        "physical": Row("physical blocks alone", PHYSICAL),
        "semantic": Row("physical blocks + SEB", {"refinement": False}, 62.2),
        "refinement": Row("physical blocks + REB", {"semantic": False}, 62.7),
        "semantic_alone": Row("SEB alone, blocks stay copies", FROZEN | {"refinement": False}),
        "refinement_alone": Row("REB alone, blocks stay copies", FROZEN | {"semantic": False}),
        "bce": Row("BCE for the relative loss", {"coarse_loss": "bce"}, 64.3),
        "no_alignment": Row("no alignment", {"coarse_weight": 0.0, "fine_weight": 0.0}),
        "no_balance": Row("alignment without balance", {"balance_weight": 0.0}, 58.3),
        "balance_alone": Row("balance without fine alignment", {"fine_weight": 0.0}),
        "injection_zero": Row("injection: zero-initialised", {"injection": "zero"}),
        "injection_plain": Row("injection: plain +", {"injection": "plain"}),
        "negatives_0": Row("negatives 0", {"negatives": 0.0}),
        "negatives_0.02": Row("negatives 0.02", {"negatives": 0.02}),
        "negatives_0.1": Row("negatives 0.1", {"negatives": 0.1}),
    },
    "few": {
        "few_default": Row("100 clips: all parts", {"world_clips": 100}),
        "few_lora": Row("100 clips: LoRA of equal parameters", LORA | {"world_clips": 100}),
        "few_physical": Row("100 clips: physical blocks alone", PHYSICAL | {"world_clips": 100}),
        "few_all_weights": Row("100 clips: all weights", ALL_WEIGHTS | {"world_clips": 100}),
    },
    "teachers": {
        "exact": Row("teacher: exact masks", {}),
        "tiny_vlm": Row("teacher: tiny VLM", {"teacher": "tiny_vlm"}, maps=("--train_tiny",)),
        "saliency": Row("teacher: frame differences", {"teacher": "saliency"},
                        maps=("--annotate", "saliency", "--kind", "saliency")),
        "shuffled": Row("teacher: shuffled maps", {"teacher": "shuffled"},
                        maps=("--annotate", "shuffled", "--kind", "shuffled")),
        "no_teacher": Row("teacher: none", {"coarse_weight": 0.0, "fine_weight": 0.0}),
    },
}
# Colour cues are what the tiny VLM learned; `negatives` closes the hole in the paper's mask.
DRAWN = ("config", "colour_cues", "pool_dir", "threads", "world_clips", "val_clips", "frames",
         "height", "width")  # what teacher.py must know of the clips
WORLDS = {"teachers": {"colour_cues": True, "negatives": 0.1}}  # flags of a group with its own base
ROWS = {name: row for rows in GROUPS.values() for name, row in rows.items()}
GROUP_OF = {name: group for group, rows in GROUPS.items() for name in rows}


def chosen(text: str) -> list[str]:
    """"few,lora" -> names of rows in the table's order, with what each is compared with; all of
    them where it is empty. Raises UserError."""
    wanted = [word.strip() for word in text.split(",")] if text else list(GROUPS)
    unknown = [word for word in wanted if word not in ROWS and word not in GROUPS]
    if unknown:
        raise UserError(f"--rows has no {unknown[0]!r}: there are the groups {', '.join(GROUPS)} "
                        f"and the rows {', '.join(ROWS)}.")
    names = {name for word in wanted for name in GROUPS.get(word, [word])}
    return [name for name in ROWS if name in names | {reference_of(name) for name in names}]


def reference_of(name: str) -> str:
    """The row that this one is compared with."""
    return next(iter(GROUPS[GROUP_OF[name]]))


def fields_of(name: str, rank: int) -> dict:
    """{field of Config: value} of a row. rank: of a LoRA of equal parameters."""
    flags = WORLDS.get(GROUP_OF[name], {}) | (ROWS[name].flags or {})
    return {field: rank if value == EQUAL else value for field, value in flags.items()}


# --- equal parameters, equal time -----------------------------------------------------------------
def equal_rank(cfg: Config) -> int:
    """The rank of the LoRA whose trained parameters come nearest to those of cfg's branch."""
    with torch.device("meta"):  # counts need no memory
        branch, lora = (
            sum(p.numel() for p in ProPhy(build_backbone(one, 1), one).branch_state().values())
            for one in (cfg, replace(cfg, physical_blocks="", lora_rank=1)))
    return max(round(branch / lora), 1)  # a LoRA grows in proportion to its rank


def cost_of(cfg: Config) -> str:
    """What makes a training step of stage two dear or cheap: rows that agree in it are timed once,
    and need no second run for equal time."""
    shape = (*config.marked(config.BRANCH), "freeze_backbone")
    return digest([getattr(cfg, name) for name in shape])


NOISE = .03  # of a ratio of two times


def measure_ratios(cfg: Config, rows: dict[str, Config], rounds: int) -> dict[str, float]:
    """{row: seconds of its training step over those of cfg's}, all timed in turns; 1 where they
    differ by less than such a measurement tells."""
    first = {cost_of(one): name for name, one in (*rows.items(), ("all parts", cfg))}
    seconds = bench.in_turns(
        {name: bench.training_step(rows.get(name, cfg), "physics")[0] for name in first.values()},
        rounds)
    ratios = {name: seconds[first[cost_of(one)]] / seconds["all parts"]
              for name, one in rows.items()}
    return {name: 1. if abs(ratio - 1) < NOISE else ratio for name, ratio in ratios.items()}


def steps_in_time(steps: int, ratio: float) -> int:
    """How many steps fit into the time of the default's `steps`, if each takes `ratio` as long."""
    return max(int(steps / ratio), 1)


# --- runs -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One run of train.py, in the folder OUT/name."""
    name: str
    row: str
    fields: dict  # of Config, beside those that all runs share
    steps: int  # its last one


SCORING = ("n", "pairs", "clips", "judged_seed")  # flags that the scores depend on
ELSEWHERE = ("threads", "pool_dir", "init_from")  # fields that may differ from machine to machine


def key_of(job: Job, shared: dict) -> str:
    """A hash of all that makes the run what it is: a row or a preset that was changed since has
    another. Fields at their default are left out, so that a new one changes nothing."""
    cfg = config.preset(**shared | job.fields)
    told = {name: value for name, value in vars(cfg).items() if name not in ELSEWHERE}
    told = {name: value for name, value in told.items() if value != getattr(Config, name)}
    return digest(told | {"steps": job.steps})[:16]


def words(fields: dict) -> list[str]:
    """Fields of Config as a command line."""
    return [word for name, value in fields.items()
            for word in (f"--{name}", str(value))]


def call(script: str, *flags: str) -> None:
    """Run a command of this project. Raises Stopped with its last sentence where it fails."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Stopped(said[-1])


def train_run(out: Path, job: Job, shared: dict) -> None:
    """Train a run to its end: from its start, from where it stopped, or not at all. Raises Stopped,
    or UserError where the folder holds another run."""
    run = out / job.name
    fields = shared | job.fields | {"out_dir": str(run)}
    if "init_from" in fields:  # train.py refuses what only stage one would read
        fields = {name: value for name, value in fields.items() if name not in ("base_steps", "lr")}
    checkpoints = run / "checkpoints"
    if any(checkpoints.glob("step*.pt")):
        fields["resume"] = True
        del fields["threads"]  # it goes on with those that it was started with
    if not (checkpoints / f"step{job.steps:06d}.pt").is_file():
        return call("train.py", *words(fields))
    stored = config.load(run / "config.json")
    may_change = config.marked(config.MAY_CHANGE)
    other = [name for name, value in fields.items()
             if name not in may_change and getattr(stored, name) != value]
    if other:
        raise UserError(f"{run} was trained with another --{other[0]}: remove it, or give another "
                        "--out_dir.")


def score_run(run: Path, job: Job, how: dict) -> dict:
    """What the table's JSON keeps of a run. how: flags of evaluate.measure."""
    loaded = sample.load_run(run, "last")
    cfg, model = loaded[:2]
    trained = 0
    if isinstance(model, ProPhy):
        some = model.branch_state().values() if cfg.freeze_backbone else model.parameters()
        trained = sum(p.numel() for p in some)
    flags = SimpleNamespace(**how, edit=None, only_laws=False)
    scores = evaluate.measure(loaded, flags)
    if cfg.semantic and job.row == reference_of(job.row):
        # The paper's Figure 8, on the row that others are compared with: the experts inverted.
        flags = SimpleNamespace(**how, edit=invert, only_laws=True)
        scores["inverted"] = evaluate.measure(loaded, flags)["errors"]
    return {"steps": job.steps, "trained": trained, "made": made_with(), "values": by_clip(scores)}


def made_with() -> dict[str, str]:
    """What may differ between the runs of a table that was made in several starts."""
    return {"date": str(date.today()), "revision": git_revision()[:9] or "unknown",
            "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__}


def do_all(jobs: list[Job], work: Callable[[Job], None], at_once: int, threads: int) -> dict:
    """work(job) of each, some at a time -> {name: why it failed}."""
    failed = {}
    bar = tqdm(total=len(jobs), unit="run", dynamic_ncols=True)
    pool = concurrent.futures.ThreadPoolExecutor(
        at_once, initializer=torch.set_num_threads, initargs=(threads,))
    with bar, pool:
        started = {pool.submit(work, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(started):
                try:
                    future.result()
                except Exception as e:  # one row must not take the others with it
                    name = started[future].name
                    failed[name] = str(e) or type(e).__name__
                    bar.write(f"{name} failed: {failed[name]}", file=sys.stderr)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # those under way got the same signal, and save
            raise
    return failed


# --- beside the paper -----------------------------------------------------------------------------
def verdict(name: str, difference: list[float]) -> str:
    """The paper's figure of a row against its default's, and where ours points. difference: of the
    law error. Physical commonsense is better where it is higher, and a law error where lower."""
    paper = ROWS[name].paper
    ours = ROWS[reference_of(name)].paper
    if paper is None:
        return ""
    if paper == ours:
        return f"{paper:.1f}"
    mean, half = difference
    if abs(mean) <= half:
        points = "cannot be told apart"
    else:
        points = "same direction" if (mean < 0) == (paper > ours) else "opposite"
    return f"{paper:.1f} ({paper - ours:+.1f}): {points}"


# --- the command ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flags:
    """The command line, but for the fields of Config that all runs share (READS)."""
    seeds: int = flag(3, marks=(100,))  # runs a row, with --seed 0, 1, ...
    rows: str = ""  # names or groups (paper, few, teachers), commas between; empty = all
    out_dir: str = ""  # folder of the runs; empty = runs/ablation/<config>
    jobs: int = 1  # runs at a time, which share the threads
    table: str = "docs/ablation.md"  # where the tables go; beside it a .json with their figures
    rounds: int = 10  # of timing the rows' steps in turns
    n: int = 16  # clips a law
    pairs: int = 48  # clips of two phenomena
    clips: int = 128  # held-out clips for losses and routing
    judged_seed: int = evaluate.JUDGED_SEED  # world of the prompts: another for choices

    READS = ("config pool_dir device precision threads base_steps physics_steps world_clips "
             "val_clips batch_size frames height width dim physical_blocks lr physics_lr "
             "preview_steps guidance")

    def check(self):
        chosen(self.rows)
        if not self.table.endswith(".md"):
            raise UserError(f"--table is a Markdown file, NAME.md, not {self.table!r}.")


def open_section(stored: dict, flags: Flags, cfg: Config) -> dict:
    """What the table's JSON has of this config; a fresh section at the first start: what was asked
    for, fields of Config that all runs `shared`, {row: time of a step over the default's}, runs.
    Raises UserError where something else was asked for."""
    preset = config.preset(cfg.config)
    asked = {name: getattr(cfg, name) for name in Flags.READS.split()
             if name not in ELSEWHERE and getattr(cfg, name) != getattr(preset, name)}
    asked |= {name: getattr(flags, name) for name in SCORING}
    section = stored.setdefault(cfg.config, {"asked": asked, "ratios": {}, "runs": {}})
    before = section["asked"]
    other = [name for name in before | asked if before.get(name) != asked.get(name)]
    if other:
        raise UserError(f"{flags.table} was made with another --{other[0]}: give the same, or "
                        "another --table.")
    section["seeds"] = flags.seeds  # of which the table tells
    if "shared" not in section:  # compiled rows could not be timed side by side
        found = resolve(replace(cfg, compile="off"))[0]
        given = [name for name in asked if name not in SCORING]
        section["shared"] = {name: getattr(found, name) for name in (
            *given, "config", "device", "precision", "compile")}
    return section


def make_maps(cfg: Config, jobs: list[Job]) -> None:
    """The maps of teachers that are not there yet. Raises Stopped."""
    from vlm import open_maps
    for job in [job for job in jobs if ROWS[job.row].maps and job.fields["seed"] == 0]:
        one = replace(cfg, **job.fields)
        try:
            open_maps(one)
        except UserError:
            print(f"Making the maps of {ROWS[job.row].says!r}.", flush=True)
            of = {key: getattr(one, key) for key in DRAWN}
            call("teacher.py", *ROWS[job.row].maps, *words(of))


def runs_of(row: str, seeds: int, ratios: dict) -> dict[str, list[str]]:
    """{"steps" | "time": [the run of each seed]} of a row."""
    if ROWS[row].flags is None:
        return {"steps": [base_of(row, seed) for seed in range(seeds)]}
    runs = {"steps": [f"{row}-{seed}" for seed in range(seeds)]}
    in_time = "" if ratios[row] == 1 else "-time"
    return runs | {"time": [run + in_time for run in runs["steps"]]}


def base_of(row: str, seed: int) -> str:
    """The run that this row starts from."""
    group = GROUP_OF[row]
    return f"base-{group}-{seed}" if group in WORLDS else f"base-{seed}"


def jobs_of(own: dict, ratios: dict, cfg: Config, seeds: int, out: Path) -> tuple[list, list]:
    """-> jobs of the bases, and of the rows ({name: fields of Config})."""
    bases = {}
    jobs = {}
    for row, seed in [(row, seed) for row in own for seed in range(seeds)]:
        base = base_of(row, seed)
        world = WORLDS.get(GROUP_OF[row], {})
        bases[base] = Job(base, "backbone", world | {"seed": seed, "physics_steps": 0},
                          cfg.base_steps)
        if ROWS[row].flags is None:
            continue
        fields = own[row] | {"seed": seed, "init_from": str(out / base)}
        in_time = steps_in_time(cfg.physics_steps, ratios[row])
        for kind, runs in runs_of(row, seeds, ratios).items():
            steps = in_time if kind == "time" else cfg.physics_steps
            name = runs[seed]
            jobs.setdefault(name, Job(name, row, fields | {"physics_steps": steps}, steps))
    return list(bases.values()), list(jobs.values())


def lines_of(section: dict) -> dict:
    """{"equal steps" | "equal time": {row: what the table tells}} of the rows of which every seed
    was scored, and their reference too."""
    ratios = section["ratios"]
    done = section["runs"]
    values = {}
    for row in [row for row in ROWS if ROWS[row].flags is None or row in ratios]:
        for kind, runs in runs_of(row, section["seeds"], ratios).items():
            if all(run in done for run in runs):
                values[row, kind] = [done[run] for run in runs]
    lines = {"equal steps": {}, "equal time": {}}
    for (row, kind), runs in values.items():
        reference = values.get((reference_of(row), "steps"))
        if reference is None:
            continue
        ours = [run["values"] for run in runs]
        differences = compared(ours, [run["values"] for run in reference])
        lines[f"equal {kind}"][row] = {
            "row": ROWS[row].says, "steps": runs[0]["steps"], "ratio": ratios.get(row),
            "trained": runs[0]["trained"], "values": compared(ours, None),
            "differences": differences, "paper": verdict(row, differences["law error"])}
    return lines


def main(flags: Flags, cfg: Config) -> None:
    """Train, score and tabulate. Raises UserError before work starts, and Stopped at its end where
    a row failed."""
    evaluate.check_run(f"--config {cfg.config}", cfg, diffusion.build(cfg), ("laws",),
                       cfg.preview_steps)
    table = Path(flags.table)
    check_writable(table)  # before hours of work
    section = open_section(read_table(table), flags, cfg)
    threads = max(cores(cfg.threads) // flags.jobs, 1)
    torch.set_num_threads(threads)
    shared = section["shared"] | {"threads": threads, "pool_dir": cfg.pool_dir}
    cfg = replace(cfg, **shared)
    out = Path(flags.out_dir or f"runs/ablation/{cfg.config}")
    out.mkdir(parents=True, exist_ok=True)
    with lock(out, f"Another process works in {out}: wait for it, or give another --out_dir."):
        # What a step of a row takes is measured once: the runs of other starts depend on it.
        rank = equal_rank(cfg)
        own = {row: fields_of(row, rank) for row in chosen(flags.rows)}
        untimed = {row: replace(cfg, **fields) for row, fields in own.items()
                   if row not in section["ratios"] and ROWS[row].flags is not None}
        if untimed:
            section["ratios"] |= measure_ratios(cfg, untimed, flags.rounds)

        how = {name: getattr(flags, name) for name in SCORING}
        how |= {"batch": cfg.batch_size, "seed": 0, "steps": cfg.preview_steps,
                "guidance": cfg.guidance, "precision": cfg.precision}  # one noise, to pair clips

        def work(job: Job) -> None:
            key = key_of(job, shared)
            train_run(out, job, shared)
            if not is_done(job):
                keep(job.name, {"key": key, **score_run(out / job.name, job, how)})

        def is_done(job: Job) -> bool:
            return section["runs"].get(job.name, {}).get("key") == key_of(job, shared)

        def keep(name: str, made: dict) -> None:
            with writing:
                section["runs"][name] = made
                stored = read_table(table) | {cfg.config: section}
                write_table(table, stored, {config: lines_of(one) for config, one in stored.items()})

        writing = threading.Lock()
        bases, jobs = jobs_of(own, section["ratios"], cfg, flags.seeds, out)
        jobs = [job for job in jobs if not is_done(job)]
        needed = {Path(job.fields["init_from"]).name for job in jobs}
        bases = [job for job in bases if job.name in needed or not is_done(job)]
        make_maps(cfg, jobs)
        failed = do_all(bases, work, flags.jobs, threads)
        ready = [job for job in jobs if Path(job.fields["init_from"]).name not in failed]
        failed |= do_all(ready, work, flags.jobs, threads)
    print(f"{flags.table} and its .json have the tables.")
    if failed:
        raise Stopped(f"These runs failed: {', '.join(failed)}; the same command makes them again.")


if __name__ == "__main__":
    title = "The ablation: every row from the same bases, at equal steps and at equal time."
    config.entry(lambda: main(*config.parse_with(Flags, sys.argv[1:], title)))

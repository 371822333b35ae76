"""The ablation of the paper, in one command: every row from the same bases, at equal steps and at
equal time.

    python ablate.py --config small --seeds 3             all rows; docs/ablation.md and .json
    python ablate.py --rows paper --jobs 2                 one group; two runs at a time
    python ablate.py --rows default,lora,physical          some rows

    base (weak physics) of each seed --> --init_from: a run a row --> scores --> table

Rows are data: flags of train.py. A row whose step costs more or less than the default's is trained
twice, for the default's steps and for as many as fit into the default's time. What a step takes is
measured here, side by side and in turns: logs of runs that shared a machine tell nothing of it.

Started again, the command goes on. The table's .json holds the scores of all finished runs, clip by
clip, so it needs no run folders for that, and another machine can add rows. A run is made again
where its row or its preset has changed. On another machine a base is trained again from its seed,
and may differ in its last bits: the table says how many bases its rows start from.
"""
import concurrent.futures
import contextlib
import hashlib
import platform
import subprocess
import sys
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
from common.ablation import Table, by_clip, compared, read_table
from common.files import cores, digest, lock
from common.paths import check_writable
from common.run import git_revision, pick_device, resolve
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
    of: str = ""  # no run of its own: that of this row, with its semantic experts inverted


LORA = {"physical_blocks": "", "lora_rank": EQUAL}
ALL_WEIGHTS = {"physical_blocks": "", "freeze_backbone": False}
PHYSICAL = {"semantic": False, "refinement": False}
FROZEN = {"train_physical": False}
GROUPS = {  # the first row of a group is what its others are compared with
    "paper": {
        "default": Row("all parts", {}, 65.0),
        "inverted": Row("all parts, experts inverted", {}, of="default"),
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
        "tiny_vlm": Row("teacher: tiny VLM", {"teacher": "tiny_vlm"}),
        "saliency": Row("teacher: frame differences", {"teacher": "saliency"}),
        "shuffled": Row("teacher: shuffled maps", {"teacher": "shuffled"}),
        "no_teacher": Row("teacher: none", {"coarse_weight": 0.0, "fine_weight": 0.0}),
    },
}
# Flags of a group with its own base. Colour cues are what the tiny VLM learned; `negatives` closes
# the hole in the paper's mask.
WORLDS = {"teachers": {"colour_cues": True, "negatives": 0.1}}
TEACHERS = {  # name of maps: flags of teacher.py; the last ones are made of the first ones
    "tiny_vlm": ("--annotate", "tiny_vlm"),
    "saliency": ("--annotate", "saliency", "--kind", "saliency"),
    "shuffled": ("--annotate", "shuffled", "--kind", "shuffled"),
}
LESSONS = 2700  # steps of training the tiny VLM
DRAWN = ("config", "colour_cues", "pool_dir", "threads", "world_clips", "val_clips", "frames",
         "height", "width")  # what teacher.py must know of the clips
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
    shape = (*config.marked(config.BRANCH), "freeze_backbone", "train_physical")
    return digest([getattr(cfg, name) for name in shape])


NOISE = .05  # of a ratio of two times


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
SCORING = ("n", "pairs", "clips", "judged_seed")  # flags that the scores depend on
ELSEWHERE = ("threads", "pool_dir", "out_dir")  # fields that may differ from start to start


@dataclass(frozen=True)
class Job:
    """A run of train.py, and its scores."""
    name: str  # in the table's JSON
    row: str
    fields: dict  # of Config; a row has those of its base's stage one, too
    key: str  # a hash of them
    folder: str
    base: "Job | None" = None  # where it starts

    @property
    def steps(self) -> int:
        return self.fields["physics_steps" if self.base else "base_steps"]


def key_of(fields: dict, known: list[str]) -> str:
    """A hash of all that makes a run what it is. known: the fields of Config when the table was
    begun. One that was added since tells nothing as long as it has its default."""
    cfg = vars(config.preset(**fields))
    told = {name: value for name, value in cfg.items() if name not in ELSEWHERE
            and (name in known or value != getattr(Config, name))}
    return digest(told)[:12]


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


def train_run(out: Path, job: Job) -> Path:
    """Train a run to its end: from its start, from where it stopped, or not at all. -> its folder.
    Raises Stopped."""
    run = out / job.folder
    last = run / "checkpoints" / f"step{job.steps:06d}.pt"
    if last.is_file():
        return run
    fields = job.fields | {"out_dir": str(run), "report": False}
    if job.base:
        fields["init_from"] = str(out / job.base.folder)
        for name in ("base_steps", "lr"):  # train.py refuses what only stage one would read
            fields.pop(name, None)
    if any(last.parent.glob("step*.pt")):
        fields["resume"] = True
        del fields["threads"]  # it goes on with those that it was started with
    call("train.py", *words(fields))
    if not last.is_file():  # a signal stopped it, and it saved
        raise Stopped("it was interrupted.")
    return run


def score_run(out: Path, job: Job, how: dict) -> dict:
    """What the table's JSON keeps of a finished run. how: flags of evaluate.measure."""
    def load(one):
        device = one.fields["device"]
        return sample.load_run(out / one.folder, f"step{one.steps:06d}.pt", device)

    loaded = cfg, model, *_ = load(job)
    base = load(job.base)[1] if job.base else model
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in base.parameters())
    trained = 0
    if job.base:
        some = model.branch_state() if cfg.freeze_backbone else dict(model.named_parameters())
        trained = sum(p.numel() for name, p in some.items()
                      if cfg.train_physical or not name.startswith("physical."))
    edit = invert if ROWS[job.row].of else None
    scores = evaluate.measure(loaded, SimpleNamespace(**how, edit=edit))
    return {"key": job.key, "steps": job.steps, "trained": trained, "values": by_clip(scores),
            "base": hashlib.sha256(weights).hexdigest()[:9], "date": str(date.today()),
            "revision": git_revision()[:9] or "unknown", "measured by": evaluate.code_version(),
            "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__}


def do_all(jobs: list[Job], work: Callable[[Job], None], at_once: int, threads: int) -> dict:
    """work(job) of each, some at a time -> {name: why it failed}."""
    failed = {}
    if not jobs:
        return failed
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
def verdict(name: str, difference: list) -> str:
    """The paper's figure of a row against its default's, and where ours points. difference: of the
    law error. Physical commonsense is better where it is higher, and a law error where lower."""
    paper = ROWS[name].paper
    ours = ROWS[reference_of(name)].paper
    if paper is None:
        return ""
    if paper == ours:
        return f"{paper:.1f}"
    mean, half = difference
    if half is None or not abs(mean) > half:
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
        table = Path(self.table)
        if table.suffix != ".md" or (table.exists() and not table.with_suffix(".json").exists()):
            raise UserError("--table is a Markdown file, NAME.md, which is new or was written by "
                            f"this command, not {self.table!r}.")


def open_section(stored: dict, flags: Flags, cfg: Config) -> dict:
    """What the table's JSON has of this config; a fresh section at the first start: what was asked
    for, fields of Config that all runs `shared`, those that it `known`, {row: time of a step over
    the default's}, runs. Raises UserError where something else was asked for."""
    preset = config.preset(cfg.config)
    given = {name: getattr(cfg, name) for name in Flags.READS.split()
             if name not in ELSEWHERE and getattr(cfg, name) != getattr(preset, name)}
    asked = given | {name: getattr(flags, name) for name in SCORING}
    section = stored.get(cfg.config)
    if section is None:  # compiled rows could not be timed side by side
        found = resolve(replace(cfg, compile="off"))[0]
        auto = {name: getattr(found, name) for name in ("device", "precision", "compile")}
        shared = given | {"config": cfg.config, "base_steps": cfg.base_steps} | auto
        section = {"asked": asked, "shared": shared, "known": sorted(vars(cfg)), "ratios": {},
                   "runs": {}}
    before = section["asked"]
    other = [name for name in before | asked if before.get(name) != asked.get(name)]
    if other:
        raise UserError(f"{flags.table} was made with another --{other[0]}: give the same, or "
                        "another --table.")
    pick_device(section["shared"]["device"])  # has this machine one?
    return section


def make_maps(cfg: Config, jobs: list[Job], out: Path) -> None:
    """The maps of teachers that are not there yet. Where that fails, so will their rows."""
    from vlm import open_maps
    asked = {job.fields.get("teacher"): job for job in jobs}
    if "shuffled" in asked:
        asked.setdefault("tiny_vlm", asked["shuffled"])
    for name in [name for name in TEACHERS if name in asked]:
        one = replace(cfg, **asked[name].fields | {"teacher": name})
        flags = TEACHERS[name]
        if name == "tiny_vlm":
            folder = out / "tiny_vlm"
            train = () if folder.is_dir() else ("--train_tiny", "--steps", str(LESSONS))
            flags = (*flags, "--vlm", str(folder), *train)
        try:
            open_maps(one)
        except UserError:
            print(f"Making the maps of {name}.", flush=True)
            with contextlib.suppress(Stopped):
                call("teacher.py", *flags, *words({key: getattr(one, key) for key in DRAWN}))


def jobs_of(rows: list[str], seeds: range, section: dict, cfg: Config) -> dict:
    """{(row, "steps" | "time"): {seed: Job}} of the rows whose times are known. A row as dear as the
    default has the same run for both."""
    rank = equal_rank(cfg)

    def job(name, row, fields, base=None):
        key = key_of(fields, section["known"])
        # A row of another one's runs has its folder, and its name in the JSON.
        trained_as = name.replace(row, ROWS[row].of, 1) if ROWS[row].of else name
        return Job(name, row, fields, key, f"{trained_as}-{key}", base)

    jobs = {}
    for row, seed in [(row, seed) for row in rows for seed in seeds]:
        group = GROUP_OF[row]
        shared = section["shared"] | WORLDS.get(group, {}) | {"seed": seed}
        world = f"{group}-" if group in WORLDS else ""
        base = job(f"base-{world}{seed}", "backbone", shared | {"physics_steps": 0})
        if ROWS[row].flags is None:
            jobs.setdefault((row, "steps"), {})[seed] = base
        elif row in section["ratios"]:
            ratio = section["ratios"][row]
            fields = shared | fields_of(row, rank)
            for kind, name, steps in (
                    ("steps", f"{row}-{seed}", cfg.physics_steps),
                    ("time", f"{row}-{seed}-time", steps_in_time(cfg.physics_steps, ratio))):
                name = f"{row}-{seed}" if ratio == 1 else name
                jobs.setdefault((row, kind), {})[seed] = job(
                    name, row, fields | {"physics_steps": steps}, base)
    return jobs


def lines_of(section: dict) -> dict:
    """{"equal steps" | "equal time": {row: what the table tells}}, of the seeds of a row that are
    scored and that its reference has, too. Runs of a row or a preset that changed since do not
    count."""
    runs = section["runs"]
    seeds = range(1 + max(int(name.split("-time")[0].split("-")[-1]) for name in runs)) if runs else ()
    jobs = jobs_of(list(ROWS), seeds, section, config.preset(**section["shared"]))
    done = {place: {seed: runs[job.name] for seed, job in some.items()
                    if runs.get(job.name, {}).get("key") == job.key}
            for place, some in jobs.items()}
    lines = {"equal steps": {}, "equal time": {}}
    for (row, kind), some in done.items():
        reference = done.get((reference_of(row), "steps"), {})
        common = [seed for seed in some if seed in reference]
        if not common:
            continue
        ours, theirs = ({seed: one[seed]["values"] for seed in common} for one in (some, reference))
        differences = compared(ours, theirs)
        first = some[common[0]]
        lines[f"equal {kind}"][row] = {
            "row": ROWS[row].says, "seeds": len(common), "steps": first["steps"],
            "trained": first["trained"], "ratio": section["ratios"].get(row),
            "values": compared(ours, None), "differences": differences,
            "paper": verdict(row, differences["law error"]) if len(common) > 1 else ""}
    return lines


def main(flags: Flags, cfg: Config) -> None:
    """Train, score and tabulate. Raises UserError before work starts, and Stopped at its end where
    a row failed."""
    if not (cfg.base_steps and cfg.physics_steps):
        raise UserError("An ablation needs both stages: --base_steps and --physics_steps above 0.")
    evaluate.check_run(f"--config {cfg.config}", cfg, diffusion.build(cfg), ("laws",),
                       cfg.preview_steps)
    threads = max(cores(cfg.threads) // flags.jobs, 1)
    torch.set_num_threads(threads)
    path = Path(flags.table)
    check_writable(path)  # before hours of work
    table = Table(path, cfg.config, open_section(read_table(path), flags, cfg), lines_of)
    here = {"threads": threads, "pool_dir": str(Path(cfg.pool_dir).resolve())}
    cfg = replace(cfg, **table.section["shared"] | here)
    out = Path(flags.out_dir or f"runs/ablation/{cfg.config}").resolve()
    check_writable(out / "run")
    with lock(out, f"Another process works in {out}: wait for it, or give another --out_dir."):
        # What a step of a row takes is measured once: the runs of other starts depend on it.
        rows = chosen(flags.rows)
        rank = equal_rank(cfg)
        untimed = {row: replace(cfg, **fields_of(row, rank)) for row in rows
                   if row not in table.section["ratios"] and ROWS[row].flags is not None}
        table.add("ratios", measure_ratios(cfg, untimed, flags.rounds) if untimed else {})

        # One noise for all rows, so that clips are paired.
        how = {name: getattr(flags, name) for name in SCORING}
        how |= {"batch": cfg.batch_size, "seed": 0, "steps": cfg.preview_steps,
                "guidance": cfg.guidance, "precision": cfg.precision}

        def work(job: Job) -> None:
            train_run(out, job)
            if not table.has(job):
                table.add("runs", {job.name: score_run(out, job, how)})

        # Bases, then what starts from them, then what looks at the same runs in another way.
        section = table.section | {"shared": table.section["shared"] | here}
        asked = jobs_of(rows, range(flags.seeds), section, cfg)
        jobs = [job for some in asked.values() for job in some.values() if not table.has(job)]
        jobs = list({job.name: job for job in jobs}.values())
        bases = {job.base.name: job.base for job in jobs if job.base}
        bases |= {job.name: job for job in jobs if not job.base}
        make_maps(cfg, jobs, out)
        failed = do_all(list(bases.values()), work, flags.jobs, threads)
        for later in (False, True):
            ready = [job for job in jobs if job.base and job.base.name not in failed
                     and bool(ROWS[job.row].of) == later]
            failed |= do_all(ready, work, flags.jobs, threads)
    print(f"{flags.table} and its .json have the tables.")
    if failed:
        raise Stopped(f"These runs failed: {', '.join(failed)}; the same command tries them again.")


if __name__ == "__main__":
    title = "The ablation: every row from the same bases, at equal steps and at equal time."
    config.entry(lambda: main(*config.parse_with(Flags, sys.argv[1:], title)))

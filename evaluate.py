"""Do generated clips obey physics, and does the branch know where it happens? Two tables of a run.

    python evaluate.py --run runs/small               both, kept in runs/small/evaluation.json
    python evaluate.py --run runs/a --run runs/b      both for each run, then mean and spread

*Law errors.* Each phenomenon of the world has one law and one detector (physics/laws.py), which
measures the law from pixels alone. The same detectors judge the true clips, their frames shuffled,
their middle frame repeated, and noise: these rows say what the figures are worth.

*Localisation.* True clips with decoys are noised to t and passed once through the network, and the
refinement router's maps P'_r are compared with the exact masks: AUC over a clip's tokens, for each
phenomenon in it. Rivals: where that phenomenon usually is, and the backbone's own attention from
video to the words of that phenomenon.

Left out on purpose: how the clips look (a blurred ball that falls rightly is right), and judges
that are networks.

Letters: F frames, B clips, N video tokens, L text tokens.
"""
import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import sample
import world
from common.files import is_intact, read_json, sealed, write_text
from common.run import pick_device
from common.score import auc, markdown, over_runs
from common.video import pixels
from config import Stopped, UserError, flag, stream
from experts import ProPhy
from physics import PHENOMENA, laws


JUDGED_SEED = 999  # the world whose captions are prompts: no run trains on it
SELECTED = data.HELD_OUT + 200_000  # the first of the clips that choose an attention head
SCORED = data.HELD_OUT + 100_000  # the first of the clips that are scored
PRIOR_CLIPS = 2000  # training clips behind the location priors
LEVELS = (.7, .5, .2)  # noise at which the maps are scored


# --- the table of laws --------------------------------------------------------------------------
def law_table(loaded, flags) -> dict:
    """{"rows": {row: law_errors}} over flags.n clips a law: first what bounds the figures, then
    what the model makes. loaded: as sample.load_run returns it."""
    cfg, model, process, tokenizer, _ = loaded
    rng = stream(flags.seed, "scored scenes")
    drawing = world.drawing(cfg, two=0, ood="")
    clips = [world.make_clip(JUDGED_SEED, 1000 * i + j, phenomenon=name, **drawing)
             for i, name in enumerate(laws.LAWS) for j in range(flags.n)]
    actors = [clip.actors[0] for clip in clips]

    # Clips that obey, and clips that cannot.
    true = np.stack([clip.video for clip in clips])  # (clips, F, H, W, 3)
    videos = {"simulator": true,
              "frames shuffled": np.stack([video[rng.permutation(cfg.frames)] for video in true]),
              "frozen": true[:, [cfg.frames // 2] * cfg.frames],
              "noise": rng.integers(0, 256, true.shape, dtype=np.uint8)}
    rows = {name: laws.law_errors(some, actors) for name, some in videos.items()}

    # What the model makes of the same captions; without its branch, from the same noise.
    models = {"generated": model}
    if isinstance(model, ProPhy):
        models["backbone alone"] = model.backbone
    prompts = [clip.caption for clip in clips]
    for name, one in models.items():
        one = sample.RunModel(cfg, one, process, tokenizer, flags.precision)
        made = sample.generate(one, prompts, seed=flags.seed, steps=flags.steps,
                               guidance=flags.guidance, batch=flags.batch)
        rows[name] = laws.law_errors(np.stack([clip for clip, _ in made]), actors)
    return {"rows": rows}


# --- localisation -------------------------------------------------------------------------------
@dataclass
class Occurrence:
    """One phenomenon in one clip: where it happens, and which words of the caption tell of it."""
    category: int
    side: str
    positive: np.ndarray  # bool (N,) tokens of which it covers a quarter
    words: list[int]  # their places in the caption

    @property
    def scorable(self) -> bool:
        return bool(self.positive.any() and not self.positive.all())


def occurrences(clip, cfg) -> list[Occurrence]:
    """The phenomena of a clip of the world. Their words are those of the template from which
    world.py made the caption: noun, verb and colour."""
    found = []
    for actor in clip.actors:
        positive = data.covered(torch.from_numpy(actor.mask), cfg.grid).numpy()
        # Where in the caption does the phrase begin, and how many words has it?
        phrases = "|".join(PHENOMENA[actor.phenomenon].phrases)
        phrases = phrases.format(c=actor.colour, d=actor.colour2, s="(?:small |large )?")
        before, phrase, _ = re.split(f"({phrases})", clip.caption, maxsplit=1)
        first = len(data.Tokenizer.split(before))
        last = min(first + len(data.Tokenizer.split(phrase)), cfg.text_len)
        found.append(Occurrence(actor.category, actor.side, positive, list(range(first, last))))
    return found


def location_priors(cfg) -> dict:
    """{category: (N,)} and {(category, side): (N,)}: how often each token is positive in training
    clips."""
    masks = {}
    drawing = world.drawing(cfg)
    for i in range(min(PRIOR_CLIPS, cfg.world_clips)):
        for one in occurrences(world.make_clip(cfg.world_seed, i, **drawing), cfg):
            for key in (one.category, (one.category, one.side)):
                masks.setdefault(key, []).append(one.positive)
    return {key: np.mean(some, 0) for key, some in masks.items()}


def attention_maps(backbone, x_t, time, text, length) -> torch.Tensor:
    """(B, layers, 2, heads, N, L): how much each video token attends to each word, plainly and as a
    share of its attention to the caption's real words."""
    tokens, condition = backbone.embed(x_t, time, text, length)
    real = torch.arange(text.shape[1], device=text.device) < length[:, None]  # (B, L)
    maps = []  # (B, 2, heads, N, L) each
    for block in backbone.blocks:
        plain = block.attention_map(tokens, condition).float() * real[:, None, None]
        share = plain / plain.sum(-1, keepdim=True).clamp(min=1e-9)
        maps.append(torch.stack([plain, share], 1))
        tokens = block(tokens, condition)
    return torch.stack(maps, 1)


@torch.no_grad()
def observe(loaded, flags, indices, t):
    """What the network shows of the phenomena in the world's clips of these indices (a range), all
    with a decoy, noised to t.

    Yields for each phenomenon its Occurrence; its map P'_r (N,), None where there is no branch; and
    the attention (layers, 2, heads, N) of each video token to its words.
    """
    cfg, model, process, tokenizer, _ = loaded
    device = next(model.parameters()).device
    branch = isinstance(model, ProPhy)
    drawing = world.drawing(cfg, decoys=1., ood=flags.ood)
    for start in range(0, len(indices), flags.batch):
        some = indices[start:start + flags.batch]
        made = [world.make_clip(cfg.world_seed, i, **drawing) for i in some]

        # Captions and noised clips as tensors.
        text, length = tokenizer.encode_all([clip.caption for clip in made], cfg.text_len)
        text = text.to(device)  # (B, L)
        length = length.to(device)
        x = pixels(np.stack([clip.video for clip in made]))  # (B, 3, F, H, W)
        eps = process.draw(flags.seed, some, x.shape[1:])[1]
        now = torch.full((len(made),), t)
        x_t = process.noise(x, now, eps).to(device)
        time = process.model_time(now).to(device)

        # One pass through the network, and one through the backbone alone for its attention.
        backbone = model
        with torch.autocast(device.type, torch.bfloat16, enabled=flags.precision == "bf16"):
            if branch:
                backbone = model.backbone
                lift = model(x_t, time, text, length)[1].refinement_lift  # (B, N, E_cat)
            attention = attention_maps(backbone, x_t, time, text, length).cpu().numpy()
        for b, clip in enumerate(made):
            for one in occurrences(clip, cfg):
                refinement = lift[b, :, one.category].float().cpu().numpy() if branch else None
                yield one, refinement, attention[b][..., one.words].sum(-1)


def best_head(observations) -> tuple | None:
    """(layer, reading, head) of the attention with the best mean AUC; None if none is scorable."""
    aucs = [np.apply_along_axis(auc, -1, attention, one.positive)
            for one, _, attention in observations if one.scorable]  # (layers, 2, heads) each
    return np.unravel_index(np.mean(aucs, 0).argmax(), aucs[0].shape) if aucs else None


def localisation_table(loaded, flags) -> dict:
    """{"rows": {row: {noise level: mean AUC over phenomena}}, and how many were scored and skipped,
    which heads}.

    A phenomenon is scored where some, and not all, of a clip's tokens are positive. Rows:
    - the maps P'_r;
    - the share of training clips in which a token is positive: the same map for all clips of a
      phenomenon, and again for each side, which is harder, as the caption tells the side;
    - the backbone's attention, with layer, head and reading (plain, or as a share of the attention
      to the whole caption) chosen by best mean AUC at that noise level on half as many other clips.
    """
    cfg = loaded[0]
    priors = location_priors(cfg)
    never = np.zeros(math.prod(cfg.grid))  # the prior of what no training clip shows
    rows = {}
    heads = {}
    for t in tqdm(LEVELS, desc="localisation", unit="noise level", leave=False):
        others = range(SELECTED, SELECTED + max(flags.clips // 2, 1))
        head = best_head(observe(loaded, flags, others, t))
        seen = list(observe(loaded, flags, range(SCORED, SCORED + flags.clips), t))
        scored = [shown for shown in seen if shown[0].scorable]
        if head is None or not scored:
            raise UserError(f"No phenomenon of {flags.clips} clips can be scored on {cfg.grid} "
                            "tokens: raise --clips.")

        aucs = {}
        for one, refinement, attention in scored:
            maps = {"refinement maps": refinement,
                    "location prior": priors.get(one.category, never),
                    "prior given the side": priors.get((one.category, one.side), never),
                    "backbone's best attention": attention[head]}
            for name, scores in maps.items():
                if scores is not None:
                    aucs.setdefault(name, []).append(auc(scores, one.positive))

        level = f"{t:.0%} noise"
        layer, reading, number = head
        heads[level] = f"layer {layer}, head {number}, {('plain', 'share')[reading]}"
        for name, values in aucs.items():
            rows.setdefault(name, {})[level] = float(np.mean(values))
    return {"rows": rows, "scored": len(scored), "skipped": len(seen) - len(scored),
            "attention": heads}


PARTS = {"laws": law_table, "localisation": localisation_table}
SETTINGS = {  # the flags that a table depends on
    "laws": ("n", "seed", "steps", "guidance", "precision"),
    "localisation": ("clips", "seed", "ood", "precision"),
}


# --- one run ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flags:
    """The command line."""
    run: list[str] = flag([])  # run folder; several: mean and spread over them
    n: int = 16  # clips a law
    clips: int = 128  # held-out clips for the localisation
    seed: int = 0  # of the noise
    checkpoint: str = "best"  # best | last | base (end of stage one) | a file in checkpoints/
    steps: int = flag(0, marks=(10**4,))  # sampling steps; 0 = those of the run's previews
    guidance: float = 0.0  # classifier-free guidance; 0 = that of the run's previews
    only: str = flag("", ("", *PARTS))  # one table; empty = both
    ood: str = flag("", config.CHOICES["ood"])  # draw this out of its range, for localisation alone
    batch: int = 16  # clips at a time
    device: str = flag("auto", config.CHOICES["device"])  # auto = cuda, else mps, else cpu
    precision: str = flag("auto", config.CHOICES["precision"])  # auto = the run's, on its device

    IDLE = (  # as in rules.py
        ("n steps guidance", "without --only localisation"), ("clips ood", "without --only laws"))

    def check(self):
        if not self.run:
            raise UserError("Say --run DIR; --help lists every flag.")
        least = {"n": 1, "clips": 1, "batch": 1, "seed": 0, "steps": 0, "guidance": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise UserError(f"--{name} must be {low} or more, not {value}.")


def check_run(run, cfg, process, parts, steps) -> None:
    """Can these parts be measured of this run? Raises UserError."""
    if cfg.data_dir:
        raise UserError(f"{run} was trained on videos; laws and exact masks are known of the "
                        "physics world alone.")
    few = cfg.frames < laws.FEWEST_FRAMES or min(cfg.height, cfg.width) < laws.FEWEST_PIXELS
    if "laws" in parts and few:
        raise UserError(f"Laws are measured on {laws.FEWEST_FRAMES} frames of {laws.FEWEST_PIXELS} "
                        f"pixels or more, and {run} makes {cfg.frames} of {cfg.width} x "
                        f"{cfg.height}; --only localisation works.")
    try:
        process.times(steps)
    except ValueError as e:
        raise UserError(f"--steps {steps}: {e}") from None


def with_defaults(flags, cfg, device):
    """The flags, with what they leave open taken from the run."""
    precision = flags.precision
    if precision == "auto":
        as_trained = device == cfg.device and cfg.precision == "bf16"
        precision = "bf16" if device == "cuda" or as_trained else "fp32"
    return replace(flags, steps=flags.steps or cfg.preview_steps, ood=flags.ood or cfg.ood,
                   guidance=flags.guidance or cfg.guidance, precision=precision)


def version_of(run, checkpoint, step) -> dict:
    """What else a table depends on: the checkpoint, and the code that measures and draws."""
    path = sample.find_checkpoint(Path(run) / "checkpoints", checkpoint)
    files = [Path(__file__), Path(laws.__file__), *world.SOURCES]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    return dict(checkpoint=path.name, step=step, saved=path.stat().st_mtime_ns, code=code)


def read_stored(path) -> dict:
    """The tables of an evaluation.json; none where it is missing or damaged."""
    try:
        stored = read_json(path)
    except UserError:
        return {}
    intact = is_intact(stored)
    stored.pop("digest", None)
    return stored if intact and all(isinstance(part, dict) for part in stored.values()) else {}


def evaluate_run(run, flags) -> dict:
    """{part: table} of one run. What evaluation.json holds for this checkpoint, this code and these
    settings is not measured again. Raises UserError, or Stopped if the file cannot be written."""
    device = pick_device(flags.device)
    loaded = cfg, _, process, _, info = sample.load_run(run, flags.checkpoint, device)
    parts = [flags.only] if flags.only else list(PARTS)
    flags = with_defaults(flags, cfg, device)
    check_run(run, cfg, process, parts, flags.steps)
    version = version_of(run, flags.checkpoint, info["step"])

    path = Path(run) / "evaluation.json"
    stored = read_stored(path)
    for part in parts:
        made_with = {name: getattr(flags, name) for name in SETTINGS[part]} | version
        if stored.get(part, {}).get("settings") == made_with:
            print(f"{run}: {part} as {path.name} has them.")
            continue
        table = {"settings": made_with, **PARTS[part](loaded, flags)}
        # Another process may have written another part meanwhile.
        stored = {**stored, **read_stored(path), part: table}
        try:
            write_text(path, json.dumps(sealed(stored), indent=2))
        except OSError as e:
            raise Stopped(f"{path} could not be written ({e.strerror or e}).") from None
    return {part: stored[part] for part in parts}


# --- the command --------------------------------------------------------------------------------
def rows_shown(table) -> dict:
    """The rows of a table without the standard error, which stands below it."""
    return {name: {column: value for column, value in row.items() if column != "se"}
            for name, row in table["rows"].items()}


def describe(part, table) -> None:
    """Print a table, and what its figures rest on."""
    print(markdown(rows_shown(table)))
    if part == "laws":
        n, se = table["settings"]["n"], table["rows"]["generated"]["se"]
        print(f"Errors in 0..1, {n} clips a law; standard error of the generated clips' mean over "
              f"all laws {se:.3f}.")
    else:
        heads = "; ".join(f"{level}: {head}" for level, head in table["attention"].items())
        print(f"AUC, {table['scored']} phenomena ({table['skipped']} more had no positive or no "
              f"negative token). Attention chosen: {heads}.")


def main(argv) -> None:
    """Print the tables of each run, and of several their means. Raises UserError."""
    flags = config.parse_flags(Flags, argv, "Law errors of generated clips, and how well the "
                                            "routing finds where physics happens.")
    for run in flags.run[1:]:  # to measure the first takes minutes
        cfg, _, process, *_ = sample.load_run(run, flags.checkpoint)
        check_run(run, cfg, process, flags.only or PARTS, flags.steps or cfg.preview_steps)
    done = []
    for run in flags.run:
        done.append(evaluate_run(run, flags))
        for part, table in done[-1].items():
            print(f"\n{run}, {part}")
            describe(part, table)
    if len(done) > 1:
        for part in done[0]:
            print(f"\n{len(done)} runs, {part}: mean ± standard deviation")
            print(markdown(over_runs([rows_shown(tables[part]) for tables in done])))


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

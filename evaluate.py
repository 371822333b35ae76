"""Do generated clips obey physics, and does the branch know where it happens? Two tables from a run folder.

    python evaluate.py --run runs/small                        both tables, kept in runs/small/evaluation.json
    python evaluate.py --run runs/a --run runs/b --run runs/c  the same for each, then mean and spread over them

*Law errors.* Each phenomenon of the world has one law and one detector, which measures the law from pixels alone. It
knows what a caption tells (side, colours, phenomenon), the constants of nature and the furniture of the room; it does
not know how large or how fast this actor is. A detector follows a state y(t) (a height, an area, an angle), fits the
law to it, and reports, unless its docstring says more,

    error = min(1, max(|k^ / k - 1|, 1 - R^2))

with k^ the fitted constant, k the true one, and 1 - R^2 the share of y's variance that the fit leaves unexplained:
that is what shuffled frames fail by, and still ones have k^ = 0. Where too little of the right colour is found on the
right side, the error is 1. The same detectors judge the true clips, their frames shuffled, their middle frame repeated,
and noise: these rows say what the figures are worth.

*Localisation.* True clips with decoys are noised to t, passed once through the network, and the refinement router's
maps P'_r compared with the exact masks: AUC over a clip's tokens, for each phenomenon in it. Rivals: where that
phenomenon usually is, and the backbone's own attention from video to the words of that phenomenon.

Left out on purpose: how the clips look (a blurred ball that falls rightly is right), and judges that are networks.

Letters: F frames, h w pixels of a cell, B clips, N video tokens, L text tokens.
"""
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import sample
import world
from common.files import write_text
from common.run import pick_device
from common.score import auc, markdown
from config import Stopped, UserError, stream
from experts import ProPhy
from physics.laws import FEWEST_FRAMES, FEWEST_PIXELS, LAWS, Scene, law_errors
from physics.phenomena import PHENOMENA


JUDGED_SEED = 999  # the world whose captions are prompts: no run trains on it
SELECTED, SCORED = data.HELD_OUT + 200_000, data.HELD_OUT + 100_000  # first clips that choose a head, that are scored
PRIOR_CLIPS = 2000  # training clips behind the location priors
LEVELS = (.7, .5, .2)  # noise at which the maps are scored


# -------------------------------------------------------------------------------------------------------- table of laws
def drawing(cfg, **changed) -> dict:
    """Arguments of world.make_clip that draw what the run was trained on, with some changed."""
    names = "frames", "height", "width", "decoys", "two", "colour_cues"
    return {name: getattr(cfg, name) for name in names} | changed


def law_table(loaded, batch, n, seed, steps, guidance, precision) -> dict:
    """{"rows": {row: law_errors}} over n clips a law: first what bounds the figures, then what the model makes."""
    cfg, model, process, tokenizer, _ = loaded
    rng = stream(seed, "scored scenes")
    clips = [world.make_clip(JUDGED_SEED, 1000 * i + j, phenomenon=name, **drawing(cfg, two=0))
             for i, name in enumerate(LAWS) for j in range(n)]
    scenes = [Scene.of(clip.actors[0]) for clip in clips]
    true = np.stack([clip.video for clip in clips])  # (clips, F, H, W, 3)
    rows = {"simulator": true,
            "frames shuffled": np.stack([video[rng.permutation(cfg.frames)] for video in true]),
            "frozen": true[:, [cfg.frames // 2] * cfg.frames],
            "noise": rng.integers(0, 256, true.shape, dtype=np.uint8)}
    rows = {name: law_errors(videos, scenes) for name, videos in rows.items()}
    models = {"generated": model}
    if isinstance(model, ProPhy):
        models["backbone alone"] = model.backbone  # from the same noise
    for name, one in models.items():
        videos, _ = sample.generate(one, process, tokenizer, cfg, [clip.caption for clip in clips], seed=seed,
                                    steps=steps, guidance=guidance, batch=batch, precision=precision)
        rows[name] = law_errors(videos, scenes)
    return {"rows": rows}


# --------------------------------------------------------------------------------------------------------- localisation
@dataclass
class Sight:
    """One phenomenon of a clip: where it is, and which words of the caption tell of it."""
    category: int
    side: str
    positive: np.ndarray  # bool (N,) tokens of which it covers a quarter
    words: list[int]  # their places in the caption

    @property
    def scorable(self) -> bool:
        return bool(self.positive.any() and not self.positive.all())


def sights(clip, cfg) -> list[Sight]:
    """Its phenomena. The words are those of the template that world.py made the caption from: noun, verb and colour."""
    found = []
    for actor in clip.actors:
        cover = data.resample(torch.from_numpy(actor.mask).float(), cfg.grid).flatten().numpy()
        phrases = [phrase.format(c=actor.colour, d=actor.colour2, s=size)
                   for phrase in PHENOMENA[actor.phenomenon].phrases for size in ("", "small ", "large ")]
        phrase = next(phrase for phrase in phrases if phrase in clip.caption)
        first = len(data.Tokenizer.split(clip.caption[:clip.caption.index(phrase)]))
        words = range(first, min(first + len(data.Tokenizer.split(phrase)), cfg.text_len))
        found.append(Sight(actor.category, actor.side, cover >= data.POSITIVE - 1e-6, list(words)))
    return found


def location_priors(cfg) -> dict:
    """{category: (N,)} and {(category, side): (N,)}: how often each token is positive in training clips."""
    seen = {}
    for i in range(min(PRIOR_CLIPS, cfg.world_clips)):
        for sight in sights(world.make_clip(cfg.world_seed, i, ood=cfg.ood, **drawing(cfg)), cfg):
            for key in (sight.category, (sight.category, sight.side)):
                seen.setdefault(key, []).append(sight.positive)
    return {key: np.mean(positives, 0) for key, positives in seen.items()}


def attention_maps(backbone, x_t, time, text, length) -> torch.Tensor:
    """(B, layers, 2, heads, N, L): how much each video token attends to each word, as it is and as a share of its
    attention to the caption's real words."""
    tokens, condition = backbone.embed(x_t, time, text, length)
    real = torch.arange(text.shape[1], device=text.device) < length[:, None]  # (B, L)
    maps = []
    for block in backbone.blocks:
        attention = block.attention_map(tokens, condition).float() * real[:, None, None]  # (B, heads, N, L)
        maps.append(torch.stack([attention, attention / attention.sum(-1, keepdim=True).clamp(min=1e-9)], 1))
        tokens = block(tokens, condition)
    return torch.stack(maps, 1)


@torch.no_grad()
def observe(loaded, first, clips, t, seed, ood, precision, batch):
    """Yield (sight, P'_r (N,) or None, attention to its words (layers, 2, heads, N)) for each phenomenon in `clips`
    clips of the world from index `first` on, all with a decoy, noised to t."""
    cfg, model, process, tokenizer, _ = loaded
    device, branch = next(model.parameters()).device, isinstance(model, ProPhy)
    backbone = model.backbone if branch else model
    for start in range(first, first + clips, batch):
        indices = range(start, min(start + batch, first + clips))
        made = [world.make_clip(cfg.world_seed, i, ood=ood, **drawing(cfg, decoys=1.)) for i in indices]
        ids, n_words = zip(*(tokenizer.encode(clip.caption, cfg.text_len) for clip in made))
        text, length = torch.stack(ids).to(device), torch.tensor(n_words, device=device)
        x = torch.from_numpy(np.stack([clip.video for clip in made])).permute(0, 4, 1, 2, 3) / 127.5 - 1
        eps = process.draw(seed, indices, x.shape[1:])[1]
        now = torch.full((len(made),), t)
        x_t, time = process.noise(x, now, eps).to(device), process.model_time(now).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            lift = model(x_t, time, text, length)[1].refinement_lift if branch else None  # (B, N, E_cat)
            attention = attention_maps(backbone, x_t, time, text, length).cpu().numpy()
        for b, clip in enumerate(made):
            for sight in sights(clip, cfg):
                yield (sight, None if lift is None else lift[b, :, sight.category].float().cpu().numpy(),
                       attention[b][..., sight.words].sum(-1))


def localisation_table(loaded, batch, clips, seed, ood, precision) -> dict:
    """{"rows": {row: {noise level: mean AUC over phenomena}}, and how many were scored and skipped, which heads}.

    A phenomenon is scored where some, and not all, of a clip's tokens are positive. Rows: the maps P'_r; the share of
    training clips in which a token is positive (the same map for all clips of a phenomenon, and again for each side:
    harder, as the caption tells the side); the backbone's attention, with layer, head and reading (plain, or as a share
    of the attention to the whole caption) chosen by best mean AUC at that noise level on other clips, half as many.
    """
    priors, rows, heads = location_priors(loaded[0]), {}, {}
    nowhere, seen = np.zeros(math.prod(loaded[0].grid)), {}
    for t in tqdm(LEVELS, desc="localisation", unit="noise level", leave=False):
        level = f"{t:.0%} noise"
        others = observe(loaded, SELECTED, max(clips // 2, 1), t, seed, ood, precision, batch)
        tried = [np.apply_along_axis(auc, -1, attention, sight.positive)
                 for sight, _, attention in others if sight.scorable]  # each (layers, 2, heads)
        seen = list(observe(loaded, SCORED, clips, t, seed, ood, precision, batch))
        scored = [one for one in seen if one[0].scorable]
        if not tried or not scored:
            raise UserError(f"No phenomenon of {clips} clips can be scored on {loaded[0].grid} tokens: raise --clips.")
        best = np.unravel_index(np.mean(tried, 0).argmax(), tried[0].shape)
        heads[level] = f"layer {best[0]}, head {best[2]}, {('plain', 'share')[best[1]]}"
        maps = {"refinement maps": lambda sight, lift, attention: lift,
                "location prior": lambda sight, lift, attention: priors.get(sight.category, nowhere),
                "prior given the side": lambda sight, *_: priors.get((sight.category, sight.side), nowhere),
                "backbone's best attention": lambda sight, lift, attention: attention[best]}
        if scored[0][1] is None:
            del maps["refinement maps"]
        for name, read in maps.items():
            rows.setdefault(name, {})[level] = float(np.mean([auc(read(*one), one[0].positive) for one in scored]))
    return {"rows": rows, "scored": len(scored), "skipped": len(seen) - len(scored), "attention": heads}


# ------------------------------------------------------------------------------------------------------ tables and runs
def over_runs(tables) -> dict:
    """Tables of several runs -> {row: {column: (mean, standard deviation over runs)}}, rows that all of them have."""
    return {name: {column: (float(np.mean(values)), float(np.std(values, ddof=1)))
                   for column in row if column != "se" for values in [[table[name][column] for table in tables]]}
            for name, row in tables[0].items() if all(name in table for table in tables)}

PARTS = {"laws": law_table, "localisation": localisation_table}


def evaluate_run(run, args) -> dict:
    """{part: table} of one run; what evaluation.json holds for this checkpoint, code and settings is not done again."""
    device = pick_device(args.device)
    loaded = cfg, _, process, _, info = sample.load_run(run, args.checkpoint, device)
    parts = [args.only] if args.only else list(PARTS)
    if cfg.data_dir:
        raise UserError(f"{run} was trained on videos; laws and exact masks are known of the physics world alone.")
    if "laws" in parts and (cfg.frames < FEWEST_FRAMES or min(cfg.height, cfg.width) < FEWEST_PIXELS):
        raise UserError(f"Laws are measured on {FEWEST_FRAMES} frames of {FEWEST_PIXELS} pixels or more, and {run} "
                        f"makes {cfg.frames} of {cfg.width} x {cfg.height}; --only localisation works.")
    steps = args.steps or cfg.preview_steps
    try:
        process.times(steps)
    except ValueError as e:
        raise UserError(f"--steps {steps}: {e}") from None
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" or (device == cfg.device and cfg.precision == "bf16") else "fp32"
    settings = {"laws": dict(n=args.n, seed=args.seed, steps=steps, guidance=args.guidance or cfg.guidance),
                "localisation": dict(clips=args.clips, seed=args.seed, ood=args.ood or cfg.ood)}
    checkpoint = sample.find_checkpoint(Path(run) / "checkpoints", args.checkpoint)
    code = hashlib.sha256(Path(__file__).read_bytes() + Path(world.__file__).read_bytes()).hexdigest()[:12]
    basis = dict(checkpoint=checkpoint.name, step=info["step"], saved=checkpoint.stat().st_mtime_ns, code=code)

    path, tables = Path(run) / "evaluation.json", {}
    stored = read_stored(path)
    for part in parts:
        chosen = settings[part] | dict(precision=precision)
        if stored.get(part, {}).get("settings") == chosen | basis:
            print(f"{run}: {part} as {path.name} has them.")
        else:
            stored[part] = {"settings": chosen | basis, **PARTS[part](loaded, args.batch, **chosen)}
            try:
                write_text(path, json.dumps(stored, indent=2))
            except OSError as e:
                raise Stopped(f"{path} could not be written ({e.strerror or e}).") from None
        tables[part] = stored[part]
    return tables


def read_stored(path) -> dict:
    try:
        stored = json.loads(path.read_text())
        return stored if isinstance(stored, dict) and all(isinstance(part, dict) for part in stored.values()) else {}
    except (OSError, ValueError):
        return {}


def describe(part, table) -> None:
    print(markdown(table["rows"]))
    if part == "laws":
        print(f"Errors in 0..1, {table['settings']['n']} clips a law; standard error of the generated clips' mean over "
              f"all laws {table['rows']['generated']['se']:.3f}.")
    else:
        heads = "; ".join(f"{level}: {head}" for level, head in table["attention"].items())
        print(f"AUC, {table['scored']} phenomena ({table['skipped']} more had no positive or no negative token). "
              f"Attention chosen: {heads}.")


# -------------------------------------------------------------------------------------------------------------- command
def parse(argv):
    parser = config.Parser("Law errors of generated clips, and how well the routing finds where physics happens.")
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="DIR", help="run folder; several: mean and spread over them")
    add("--n", type=int, default=16, help="clips a law")
    add("--clips", type=int, default=128, help="held-out clips for the localisation")
    add("--seed", type=int, default=0, help="of the noise")
    add("--checkpoint", default="best", help="best | last | base (end of stage one) | a file in the run's checkpoints/")
    add("--steps", type=int, default=0, help="sampling steps; 0 = those of the run's previews")
    add("--guidance", type=float, default=0, help="classifier-free guidance; 0 = that of the run's previews")
    add("--only", choices=list(PARTS), help="one table")
    add("--ood", choices=config.CHOICES["ood"], default="",
        help="draw this of the localisation's clips outside its usual range (captions do not tell it: no use for laws)")
    add("--batch", type=int, default=16, help="clips at a time")
    add("--device", choices=config.CHOICES["device"], default="auto", help="auto = cuda, else mps, else cpu")
    add("--precision", choices=config.CHOICES["precision"], default="auto", help="auto = the run's, on its device")
    args = parser.parse_args(argv)
    for name, least in (("n", 1), ("clips", 1), ("batch", 1), ("seed", 0), ("steps", 0), ("guidance", 0)):
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be {least} or more, not {getattr(args, name)}.")
    return args


def main(argv) -> None:
    args = parse(argv)
    done = []
    for run in args.run:
        done.append(evaluate_run(run, args))
        for part, table in done[-1].items():
            print(f"\n{run}, {part}")
            describe(part, table)
    for part in done[0] if len(done) > 1 else ():
        print(f"\n{len(done)} runs, {part}: mean ± standard deviation")
        print(markdown(over_runs([tables[part]["rows"] for tables in done])))


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

"""Do generated clips obey physics, and does the branch know which and where? Two tables of a run.

    python evaluate.py --run runs/small               both, kept in runs/small/evaluation.json
    python evaluate.py --run runs/a --run runs/b      both for each run, then mean and spread
    python evaluate.py --videophy2 SA.csv PC.csv      files of public benchmarks: benchmarks/

*Law errors.* Each phenomenon of the world has one law and one detector (physics/laws.py), which
measures the law from pixels alone. Rows of true and of spoilt clips say what the figures are worth.
How clips look is left out on purpose: a blurred ball that falls rightly is right.

*Localisation.* True clips with decoys are noised to t and passed once through the network, and the
refinement router's maps P'_r are compared with the exact masks: where is a phenomenon (rivals: its
usual place, and the backbone's attention to its words), and which one is it?

Letters: F frames, B clips, N video tokens, L text tokens, C phenomena.
"""
import hashlib
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import benchmarks
import config
import data
import sample
import world
from common import score
from common.files import is_intact, read_json, sealed, write_text
from common.run import pick_device
from common.video import pixels
from config import Stopped, UserError, flag, stream
from experts import ProPhy, Routing
from physics import CATEGORIES, PHENOMENA, laws

JUDGED_SEED = 999  # the world whose captions are prompts: no run trains on it
PAIRS = 1_000_000  # the first of the clips that show two phenomena
SELECTED = data.HELD_OUT + 200_000  # the first of the clips that choose an attention head
SCORED = data.HELD_OUT + 100_000  # the first of the clips that are scored
MANY = 48  # clips a law, at least, of the rows that bound the figures
PRIOR_CLIPS = 2000  # training clips behind the location priors
OF_WORLD = [CATEGORIES.index(name) for name in laws.LAWS]  # the world's phenomena, C
LEVELS = (.7, .5, .2)  # noise at which the maps are scored


# --- the table of laws --------------------------------------------------------------------------
def scenes_to_judge(cfg, flags, physics="true") -> list:
    """Clips of the judged world, whose captions are prompts: flags.n a law, then flags.pairs that
    show two phenomena."""
    drawing = world.drawing(cfg, two=1., ood="", physics=physics)
    single = [world.make_clip(flags.judged_seed, 1000 * i + j, phenomenon=name, **drawing)
              for i, name in enumerate(laws.LAWS) for j in range(flags.n)]
    return single + [world.make_clip(flags.judged_seed, PAIRS + j, **drawing)
                     for j in range(flags.pairs)]


def generated(loaded, model, scenes, flags) -> list:
    """The clips that a model makes of the scenes' captions, uint8 (F, H, W, 3) each."""
    cfg, _, process, tokenizer, _ = loaded
    one = sample.RunModel(cfg, model, process, tokenizer, flags.precision)
    how = {name: getattr(flags, name) for name in ("seed", "steps", "guidance", "batch", "edit")}
    return [clip for clip, _ in sample.generate(one, [scene.caption for scene in scenes], **how)]


def another(scenes, i):
    """The next scene that caption i is wrong of: other phenomena, beginning on the other side."""
    mine = scenes[i]
    return next(scene for scene in scenes[i + 1:] + scenes[:i]
                if scene.actors[0].side != mine.actors[0].side
                and not set(scene.categories) & set(mine.categories))


def bounds(cfg, flags) -> dict:
    """{row: (videos, scenes)} of clips that obey, and of clips that cannot. They cost little, so
    there are as many as a steady mean needs."""
    many = SimpleNamespace(judged_seed=flags.judged_seed, n=max(flags.n, MANY), pairs=flags.pairs)
    scenes = scenes_to_judge(cfg, many)
    rng = stream(flags.seed, "scored scenes")
    true = np.stack([scene.video for scene in scenes])  # (clips, F, H, W, 3)
    videos = {"simulator": true,
              "frames shuffled": [video[rng.permutation(cfg.frames)] for video in true],
              "reversed": true[:, ::-1],
              "frozen": true[:, [cfg.frames // 2] * cfg.frames],
              "weak physics": [clip.video for clip in scenes_to_judge(cfg, many, "weak")],
              "wrong caption": [another(scenes, i).video for i in range(len(scenes))],
              "noise": rng.integers(0, 256, true.shape, dtype=np.uint8)}
    return {name: (some, scenes) for name, some in videos.items()}


def law_table(loaded, flags) -> dict:
    """{"rows": {row: laws.law_means}}: first what bounds the figures, then what the model makes of
    the same captions; without its branch, from the same noise. loaded: as sample.load_run returns
    it."""
    cfg, model, *_ = loaded
    videos = bounds(cfg, flags)
    scenes = scenes_to_judge(cfg, flags)
    models = {"backbone alone": model}
    if isinstance(model, ProPhy):
        models = {"backbone alone": model.backbone} if model.leaves_backbone else {}
        models["with the branch"] = model
    for name, one in models.items():
        videos[name] = generated(loaded, one, scenes, flags), scenes
    return {"rows": {name: laws.law_means(laws.judge(*both)) for name, both in videos.items()}}


# --- localisation -------------------------------------------------------------------------------
@dataclass
class Occurrence:
    """One phenomenon in one clip: where it happens, and which words of the caption tell of it."""
    category: int
    side: str
    positive: np.ndarray  # bool (N,) tokens of which it covers a quarter
    words: list[int]  # their places in the caption
    attention: np.ndarray | None = None  # (layers, 2, heads, N), from video tokens to these words

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


def noised(loaded, flags, indices, drawing, t=None):
    """The judged world's clips of these indices (a range), drawn so, noised to t or, without it,
    each to a time of its own.

    Yields for each batch its clips, the network's arguments, and what process.loss takes after a
    prediction.
    """
    cfg, model, process, tokenizer, _ = loaded
    device = next(model.parameters()).device
    for start in range(0, len(indices), flags.batch):
        some = indices[start:start + flags.batch]
        made = [world.make_clip(flags.judged_seed, i, **drawing) for i in some]
        text, length = tokenizer.encode_all([clip.caption for clip in made], cfg.text_len)
        x = pixels(np.stack([clip.video for clip in made]))  # (B, 3, F, H, W)
        now, eps = process.draw(flags.seed, some, x.shape[1:])
        if t is not None:
            now = torch.full((len(made),), t)
        inputs = process.noise(x, now, eps), process.model_time(now), text, length
        yield made, [value.to(device) for value in inputs], (now, x, eps)


@dataclass
class Seen:
    """What the network shows of one clip; None for what it has not."""
    occurrences: list[Occurrence]
    lift: np.ndarray | None  # P'_r (N, E_cat)
    semantic: np.ndarray | None  # rho_s (E_s,)
    semantic_lift: np.ndarray | None  # (E_cat,)


@torch.no_grad()
def observe(loaded, flags, indices, t, ood="", attention=False) -> list[Seen]:
    """What the network shows of these clips of the judged world, all with a decoy, noised to t; the
    attention, too, if asked. Raises UserError where no phenomenon is scorable."""
    cfg, model, *_ = loaded
    drawing = world.drawing(cfg, decoys=1., ood=ood)
    seen = []
    for clips, inputs, _ in noised(loaded, flags, indices, drawing, t):
        # One pass through the network, and one through the backbone alone for its attention.
        backbone = model
        routing = Routing()
        half = flags.precision == "bf16"
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=half):
            if isinstance(model, ProPhy):
                backbone = model.backbone
                _, routing = model(*inputs, flags.edit)
            maps = attention_maps(backbone, *inputs).cpu().numpy() if attention else None
        said = [None if some is None else some.float().cpu().numpy() for some in (
            routing.refinement_lift, routing.semantic, routing.semantic_lift)]
        for b, clip in enumerate(clips):
            found = occurrences(clip, cfg)
            for one in found if attention else ():
                one.attention = maps[b][..., one.words].sum(-1)
            seen.append(Seen(found, *(None if some is None else some[b] for some in said)))

    if not any(one.scorable for clip in seen for one in clip.occurrences):
        raise UserError(f"No phenomenon of {len(indices)} clips can be scored on {cfg.grid} "
                        "tokens: raise --clips.")
    return seen


def best_head(seen) -> tuple:
    """(layer, reading, head) of the attention with the best mean AUC."""
    aucs = [np.apply_along_axis(score.auc, -1, one.attention, one.positive)  # (layers, 2, heads)
            for clip in seen for one in clip.occurrences if one.scorable]
    return np.unravel_index(np.mean(aucs, 0).argmax(), aucs[0].shape)


def laid_out(seen, map_of) -> np.ndarray:
    """(clips, N, C): map_of(Occurrence), (N,), where it belongs among the world's phenomena, and
    zeros elsewhere."""
    N = len(seen[0].occurrences[0].positive)
    maps = np.zeros((len(seen), N, len(CATEGORIES)))
    for row, clip in zip(maps, seen):
        for one in clip.occurrences:
            row[:, one.category] = map_of(one)
    return maps[..., OF_WORLD]


def routing_scores(seen) -> dict:
    """{score: (value, chance)} of what the network's routers show, as common/score.py has them."""
    positive = laid_out(seen, lambda one: one.positive) > 0
    there = laid_out(seen, lambda one: 1)[:, 0] > 0  # (clips, C)
    scores = {}
    if seen[0].lift is not None:
        maps = np.stack([clip.lift for clip in seen])[..., OF_WORLD]
        scores |= {"where: refinement maps": (score.mean_auc(maps, positive), .5),
                   **score.which_scores(maps, positive, there)}
    if seen[0].semantic is not None:
        lift = np.stack([clip.semantic_lift for clip in seen])[:, OF_WORLD]
        scores |= score.semantic_scores(np.stack([clip.semantic for clip in seen]), lift, there)
    return scores


def localisation_table(loaded, flags) -> dict:
    """{"rows": {row: {"chance": value, noise level: value}}, and what describe tells}.

    Rows "where" are score.mean_auc of
    - the share of training clips in which a token is positive: the same map for all clips of a
      phenomenon, and again for each side, which is harder, as the caption tells the side;
    - the backbone's attention, with layer, head and reading (plain, or as a share of the attention
      to the whole caption) chosen by best mean AUC at that noise level on half as many other clips;
    - the maps P'_r.
    Rows "which" are of these maps, too, rows "text" of the semantic router, which sees no noise.
    """
    priors = location_priors(loaded[0])
    rows = {}
    heads = {}
    for t in tqdm(LEVELS, desc="localisation", unit="noise level", leave=False):
        others = range(SELECTED, SELECTED + max(flags.clips // 2, 1))
        head = best_head(observe(loaded, flags, others, t, flags.ood, attention=True))
        indices = range(SCORED, SCORED + flags.clips)
        seen = observe(loaded, flags, indices, t, flags.ood, attention=True)

        # A phenomenon that no training clip shows has no prior.
        rivals = {"location prior": lambda one: priors.get(one.category, 0),
                  "prior given the side": lambda one: priors.get((one.category, one.side), 0),
                  "backbone's best attention": lambda one: one.attention[head]}
        positive = laid_out(seen, lambda one: one.positive) > 0
        found = {f"where: {name}": (score.mean_auc(laid_out(seen, map_of), positive), .5)
                 for name, map_of in rivals.items()}

        level = f"{t:.0%} noise"
        layer, reading, number = head
        heads[level] = f"layer {layer}, head {number}, {('plain', 'share')[reading]}"
        for name, (value, chance) in (found | routing_scores(seen)).items():
            row = rows.setdefault(name, {"chance": chance})
            row["any noise" if name.startswith("text") else level] = value
    scorable = [one.scorable for clip in seen for one in clip.occurrences]
    return {"rows": rows, "scored": sum(scorable), "skipped": scorable.count(False),
            "attention": heads}


# --- one model, clip by clip --------------------------------------------------------------------
@torch.no_grad()
def held_out_losses(loaded, flags, physics) -> list[float]:
    """The diffusion loss of each of flags.clips clips that no run saw, at times and noise that
    depend on flags.seed alone."""
    cfg, model, process, tokenizer, _ = loaded
    one = sample.RunModel(cfg, model, process, tokenizer, flags.precision)
    drawing = world.drawing(cfg, ood="", physics=physics)
    indices = range(SCORED, SCORED + flags.clips)
    losses = []
    for _, inputs, truth in noised(loaded, flags, indices, drawing):
        with torch.autocast(one.device.type, torch.bfloat16, enabled=flags.precision == "bf16"):
            prediction, _ = one.predict(*inputs, flags.edit)
        losses += process.loss(prediction.cpu(), *truth).tolist()
    return losses


def measure(loaded, flags) -> dict:
    """What ablate.py compares of a model (loaded: as sample.load_run returns it), clip by clip, so
    that differences can be paired. JSON-able:
    - errors: laws.judge of the clips made of scenes_to_judge;
    - dynamic, elsewhere: their laws.motion, each over that of the true clip's actors;
    - held_out, held_out_weak: held_out_losses on true and on weak physics;
    - which_where: {score: value} at 50 % noise; what the model has not is left out.
    flags: those of Flags, none left open; judged_seed: the world of all clips, another one for
    choices than in reports; edit: None or a function of the semantic logits.
    """
    scenes = scenes_to_judge(loaded[0], flags)
    videos = generated(loaded, loaded[1], scenes, flags)
    motion = np.array([laws.motion(video, scene) for video, scene in zip(videos, scenes)])
    motion /= np.array([laws.motion(scene.video, scene)[:1] for scene in scenes])
    seen = observe(loaded, flags, range(SCORED, SCORED + flags.clips), .5)
    return {"errors": laws.judge(videos, scenes),
            "dynamic": motion[:, 0].tolist(), "elsewhere": motion[:, 1].tolist(),
            "held_out": held_out_losses(loaded, flags, "true"),
            "held_out_weak": held_out_losses(loaded, flags, "weak"),
            "which_where": {name: one for name, (one, _) in routing_scores(seen).items()}}


PARTS = {"laws": law_table, "localisation": localisation_table}
SETTINGS = {  # the flags that a table depends on
    "laws": ("n", "pairs", "seed", "steps", "guidance", "precision"),
    "localisation": ("clips", "seed", "ood", "precision")}


# --- one run ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flags:
    """The command line."""
    run: list[str] = flag([])  # run folder; several: mean and spread over them
    n: int = 16  # clips a law
    pairs: int = 24  # clips of two phenomena
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

    judged_seed = JUDGED_SEED  # no flags, but what `measure` may be asked as well
    edit = None

    IDLE = (  # as in rules.py
        ("n pairs steps guidance", "without --only localisation"),
        ("clips ood", "without --only laws"))

    def check(self):
        if not self.run:
            raise UserError("Say --run DIR, or a benchmark's files; --help lists every flag.")


def check_run(run, cfg, process, parts, steps) -> None:
    """Can these parts be measured of this run? Raises UserError."""
    if cfg.data_dir:
        raise UserError(f"{run} was trained on videos; laws and exact masks are known of the "
                        "physics world alone.")
    few = cfg.frames < laws.FEWEST_FRAMES or min(cfg.height, cfg.width) < laws.FEWEST_PIXELS
    if "laws" in parts and few:
        raise UserError(f"Laws are measured on {laws.FEWEST_FRAMES} frames of {laws.FEWEST_PIXELS} "
                        f"pixels or more, and {run} makes {cfg.frames} of {cfg.width} x "
                        f"{cfg.height}; evaluate.py --only localisation works.")
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
    return dict(checkpoint=path.name, step=step, saved=path.stat().st_mtime_ns, code=code_version())


def code_version() -> str:
    """A hash of the code that measures and draws."""
    files = [Path(__file__), Path(laws.__file__), Path(score.__file__), *world.SOURCES]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


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
    rows = table["rows"]
    print(score.markdown(rows_shown(table)))
    if part == "localisation":
        heads = "; ".join(f"{level}: {head}" for level, head in table["attention"].items())
        print(f"Where and presence: AUC; {table['scored']} phenomena ({table['skipped']} more had "
              f"no positive or no negative token). Attention chosen: {heads}.")
        return
    for row, names in laws.LAWFUL.items():
        print(f"{row}: these hold all the same: {', '.join(laws.LAWS[n].__name__ for n in names)}.")
    print("Errors in 0..1, {n} clips a law, {pairs} of two phenomena. What matters, ± standard "
          "error:".format(**table["settings"]))
    for name in ("backbone alone", "with the branch", "simulator"):
        if name in rows:
            print("{0}: {all:.3f} ± {se:.3f}, two {two:.3f}".format(name, **rows[name]))


def main(argv) -> None:
    """Print the tables of each run, and of several their means. Raises UserError."""
    given = config.read_flags(argv, __doc__.partition("\n")[0], Flags, benchmarks.Flags)
    if benchmarks.run(given):
        return
    flags = config.take_flags(Flags, given)
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
            print(score.markdown(score.over_runs([rows_shown(tables[part]) for tables in done])))


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

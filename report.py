"""One page to look at: what runs learned, what they draw, where they look; and the paper's figures.

    python report.py --run runs/small                      runs/small/report.html
    python report.py --run runs/a --run runs/b             report.html: both side by side
    python report.py --ablation docs/ablation_short.json   report.html: its rows
    python report.py --figures --run runs/small [--vlm DIR]    figures 4, 6, 7 and 8 as files

    run folder --curves, previews, films, correlation--> data --common/page.py--> one file

train.py writes the page of its run at the end. The page needs no network and no other file. Law
errors are those that evaluate.py left in the run folder: to measure them takes minutes.

Letters: n clips, F H W video, T' h w token grid, N tokens, C phenomena, E_s semantic experts.
"""
import contextlib
import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import align
import config
import data
import diffusion
import evaluate
import sample
import world
from common import figures, score
from common.ablation import read_table
from common.files import write_text
from common.libraries import library
from common.page import as_bytes, curves, film, number, page, previews
from common.paths import check_writable
from common.pictures import ClipRouting, enlarge, tint
from common.run import description, pick_device, read_log
from config import Config, Stopped, UserError, flag
from experts import invert
from physics import laws

TIMES = 8  # of sampling at which maps are shown
MOST_PROMPTS = 8
PREVIEWS = 1_400_000  # bytes of all previews of a page, which in all must stay below 5 MB
FILMS = 1_400_000  # of all films
MAPS = 400_000  # of all maps
CAPTIONS = 16  # of each phenomenon, for the correlation of experts
SHOWN_FIRST = ("combustion", "rigid body motion", "elastic motion", "liquid motion")
TOLD = ("config", "git", "torch", "transformers", "python", "device", "precision", "compile",
        "base_steps", "physics_steps", "seed", "data_dir", "physics", "teacher")


# --- what a model does --------------------------------------------------------------------------
class Recorder(sample.RunModel):
    """A model that remembers what its routers said at every step of sampling."""

    def predict(self, *inputs):
        out, self.newest = super().predict(*inputs)
        return out, self.newest

    def draw(self, denoise, seed, index, steps, guidance, watch):
        self.said = []  # [(t, Routing)]

        def remember(t):
            self.said.append((t, self.newest))
            watch(t)
        return super().draw(denoise, seed, index, steps, guidance, remember)


def open_model(run: Path, device: str) -> Recorder:
    """The model of a run folder, for its clips. Raises UserError where it has none."""
    cfg, net, process, tokenizer, info = sample.load_run(run, device=device)
    return Recorder(cfg, net, process, tokenizer, info=info)


def films(model: Recorder, prompts: list[str], share: float) -> list[dict]:
    """For each prompt its clip without the branch (where stage two left the backbone alone) and
    with it, the maps along sampling, and the semantic weights. share: of a page's bytes."""
    cfg = model.cfg
    how = dict(prompts=prompts, seed=cfg.seed, steps=cfg.preview_steps, guidance=cfg.guidance,
               batch=len(prompts))
    clips = [clip for clip, _ in sample.generate(model, **how)]
    most = int(share * FILMS / 2 / len(prompts))
    found = [{"prompt": prompt, "with": film(clip, most)} for prompt, clip in zip(prompts, clips)]
    said = [(t, routing) for t, routing in model.said if routing]
    if not said:
        return found

    if model.net.leaves_backbone:
        for one, (clip, _) in zip(found, sample.generate(sample.bare(model), **how)):
            one["without"] = film(clip, most)
    present = model.info["categories_present"]
    names = data.category_names(cfg)
    times = np.unique(np.linspace(0, len(said) - 1, TIMES).round().astype(int))
    for i, one in enumerate(found):
        seen = [ClipRouting.of(routing, i, t, cfg.grid) for t, routing in [said[j] for j in times]]
        if seen[0].semantic is not None:
            one["semantic"] = [round(float(weight), 4) for weight in seen[0].semantic]
        if seen[0].lift is not None and present:
            lifts = [each.lift[..., present] for each in seen]
            text, grid = as_bytes(lifts, int(share * MAPS / len(prompts)))
            one["maps"] = {"bytes": text, "grid": grid, "times": [each.t for each in seen],
                           "names": [names[category] for category in present]}
    return found


def worlds_prompts(n: int) -> list[str]:
    """Captions of the judged world, one a phenomenon, those that show most first."""
    names = [*SHOWN_FIRST, *(name for name in laws.LAWS if name not in SHOWN_FIRST)]
    return [world.make_clip(evaluate.JUDGED_SEED, i, phenomenon=name).caption
            for i, name in enumerate(names[:n])]


# --- which phenomena share experts --------------------------------------------------------------
@torch.no_grad()
def semantic_logits(model: sample.RunModel, captions: list[str]) -> np.ndarray:
    """What the semantic router says of captions, (n, E_s). It reads text alone: the clip that the
    network takes beside it is empty."""
    cfg = model.cfg
    text, length = (words.to(model.device) for words in model.read(captions))
    x = torch.zeros(len(captions), 3, cfg.frames, cfg.height, cfg.width, device=model.device)
    t = torch.zeros(len(captions), device=model.device)
    _, condition = model.net.backbone.embed(x, t, text, length)
    logits, *_ = model.net.semantic.route(condition.text, condition.text_length)
    return logits.float().cpu().numpy()


def correlation(model: sample.RunModel) -> dict:
    """{"names", "values"}: Pearson's correlation, over the experts, of the mean logits of each pair
    of phenomena, in an order in which neighbours are alike; None where nothing varies."""
    rows = []
    for name in laws.LAWS:
        captions = [world.make_clip(evaluate.JUDGED_SEED, i, phenomenon=name, frames=2, height=16,
                                    width=16).caption for i in range(CAPTIONS)]
        rows.append(semantic_logits(model, captions).mean(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.corrcoef(rows)
    order = chain(values)
    return {"names": [list(laws.LAWS)[i] for i in order],
            "values": values[order][:, order].round(3).tolist()}


def chain(likeness: np.ndarray) -> list[int]:
    """An order that begins with the one that is least like all others and goes on, each time, with
    the one that is most like the last."""
    left = set(range(len(likeness)))
    order = [int(likeness.sum(0).argmin())]
    while left := left - {order[-1]}:
        order.append(max(sorted(left), key=lambda i: likeness[order[-1], i]))
    return order


# --- the page -----------------------------------------------------------------------------------
def run_data(run: Path, prompts: list[str], device: str, share: float) -> dict:
    """All that the page tells of a run. share: of the page's bytes. Raises UserError where there is
    no run."""
    cfg = config.load(run / "config.json")
    told = {name: value for name, value in description(run).items() if name != "digest"}
    of_world = not (cfg.data_dir or cfg.latent)
    found = {"name": run.resolve().name, "folder": str(run), "physics_world": of_world,
             "fps": sample.play_fps(cfg), "settings": told,
             "curves": curves(read_log(run / "log.jsonl"), cfg),
             "samples": previews(run / "samples", int(share * PREVIEWS)),
             "previews": len(list(run.glob("samples/step*.gif"))), **scores(run, cfg)}

    prompts = prompts or (worlds_prompts(4) if of_world else [])
    try:
        model = open_model(run, device)
    except UserError as e:
        found["why"] = f"No films: {e}"
        return found
    if not prompts:
        found["why"] = "No films: this run learned from videos, so say --prompt."
        return found
    sample.warn(model.tokenizer, cfg, prompts)
    found["films"] = films(model, prompts, share)
    found["step"] = model.info["step"]
    # Of two experts every correlation is 1 or -1.
    if getattr(model.net, "semantic", None) is not None and of_world and cfg.semantic_experts > 2:
        found["correlation"] = correlation(model)
    return found


def scores(run: Path, cfg: Config) -> dict:
    """What evaluate.py left in the run folder: {"laws", "localisation"}, each its rows and of what
    they are; or {"to_measure": the command}. What another version wrote counts as not measured."""
    found = {}
    stored = evaluate.read_stored(run / "evaluation.json")
    for part, row in (("laws", "simulator"), ("localisation", "where: location prior")):
        table = stored.get(part, {})
        rows = table.get("rows")
        if isinstance(rows, dict) and row in rows and all(
                isinstance(one, dict) and all(value is None or number(value) is not None
                                              for value in one.values()) for one in rows.values()):
            how = table.get("settings", {})
            clips = f"{how.get('clips')} clips"
            if part == "laws":
                clips = f"{how.get('n')} clips a law"
            of = f"{how.get('checkpoint')} of step {how.get('step')}, {clips}"
            found[part] = {"rows": rows, "of": of}
    if "laws" not in found:
        with contextlib.suppress(UserError):  # where no law can be measured
            evaluate.check_run(run, cfg, diffusion.build(cfg), ("laws",), cfg.preview_steps)
            found["to_measure"] = f"python evaluate.py --run {shlex.quote(str(run))}"
    return found


def ablation_data(path: str) -> dict:
    """{config: {"equal steps" | "equal time": rows}} of an ablation's JSON. Raises UserError."""
    file = Path(path)
    if file.suffix != ".json" or not file.is_file():
        raise UserError(f"There is no file {path}: --ablation takes the .json that ablate.py writes.")
    stored = read_table(file)
    if not all(isinstance(one, dict) and "lines" in one for one in stored.values()):
        raise UserError(f"{file} has no rows to show: start the same ablate.py command again, "
                        "which adds them without new runs.")
    return {name: one["lines"] for name, one in stored.items()}


def write_page(out: Path, runs: Sequence[Path], ablation: str = "", prompts: Sequence[str] = (),
               device: str = "cpu") -> None:
    """Write the page of these run folders. Raises UserError for what is no run or no ablation, and
    Stopped where the page cannot be written."""
    shown = {"about": f"{date.today()}; made by report.py", "told": TOLD, "runs": []}
    shown["ablation"] = ablation_data(ablation) if ablation else None
    for run in runs:  # before the films of the first one are made
        config.load(Path(run) / "config.json")
    check_writable(out)
    for run in runs:
        shown["runs"].append(run_data(Path(run), list(prompts), device, 1 / len(runs)))
    names = [run["name"] for run in shown["runs"]]
    for run in shown["runs"]:
        if names.count(run["name"]) > 1:  # several folders end alike
            run["name"] = run["folder"]
    try:
        write_text(out, page(shown))
    except OSError as e:
        raise Stopped(f"{out} could not be written ({e.strerror or e}).") from None


# --- the paper's figures ------------------------------------------------------------------------
CLEAREST = min(evaluate.LEVELS)  # the noise at which the base model's attention sees most
CLIPS_SHOWN = 4
COLUMNS = 5  # frames of a clip
ORANGE = (255, 120, 40)


def some_of(n: int) -> list[int]:
    """COLUMNS places of n, evenly."""
    return np.linspace(0, n - 1, COLUMNS).round().astype(int).tolist()


def strip(clip: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Frames of a clip (F, H, W, 3), each with its title."""
    large = enlarge(clip, figures.SCALE)
    return [(f"frame {f + 1}", large[f]) for f in some_of(len(clip))]


def figure_4(model: Recorder, asked, vlm_dir: str, out: Path) -> str:
    """Where the teacher looks, and where the best head of the base model's attention looks, on the
    same clips and tokens. Returns what there is to say of it."""
    from vlm import maps, qwen
    cfg = model.cfg
    loaded = cfg, model.net, model.process, model.tokenizer, model.info
    vlm = qwen.VLM.from_folder(vlm_dir, asked.device)
    settings = vlm.settings()

    # The head is chosen on other clips.
    others = range(evaluate.SELECTED, evaluate.SELECTED + max(asked.clips // 2, 1))
    indices = range(evaluate.SCORED, evaluate.SCORED + asked.clips)
    head = evaluate.best_head(evaluate.observe(loaded, asked, others, CLEAREST, attention=True))
    seen = evaluate.observe(loaded, asked, indices, CLEAREST, attention=True)

    rows = {}  # {caption: pictures}
    aucs = []  # [(teacher's, base model's)]
    for index, found in zip(tqdm(indices, desc="asking the teacher", leave=False), seen):
        clip = world.make_clip(asked.judged_seed, index, **world.drawing(cfg, decoys=1., ood=""))
        names = [actor.phenomenon for actor in clip.actors]
        *answers, behind = vlm.ask_about([clip.video], len(clip.video), [names], settings)[0]
        for actor, one, answer in zip(clip.actors, found.occurrences, answers):
            if not one.scorable:
                continue
            own = align.relative(answer.density(sinks=settings.sinks),
                                 behind.density(sinks=settings.sinks))
            both = (maps.on_grid(own, cfg.grid).numpy(), one.attention[head].reshape(cfg.grid))
            aucs.append([score.auc(heat.flatten(), one.positive) for heat in both])
            if len(clip.actors) == 1 and len(rows) < CLIPS_SHOWN:
                f = cfg.frames // 2
                large = enlarge(clip.video, figures.SCALE)[f]
                exact = tint(clip.video, actor.mask, ORANGE, .7)
                rows[clip.caption] = [("clip", large), ("exact mask", exact[f])] + [
                    (f"{who}, AUC {auc:.2f}", figures.glow(clip.video, peak_one(heat), f))
                    for who, heat, auc in zip(("teacher", "base model"), both, aucs[-1])]
    if not rows:
        raise UserError(f"None of {asked.clips} clips shows one phenomenon alone: raise --clips.")
    figures.save(out / "teacher.png", figures.pictures([*rows.values()], [*rows]))
    teacher, base = np.transpose(aucs).tolist()
    mean, half = score.paired({0: teacher}, {0: base})
    return (f"Figure 4: AUC of the teacher {np.mean(teacher):.3f}, of the base model's attention "
            f"{np.mean(base):.3f} (layer {head[0]}, head {head[2]}, {CLEAREST:.0%} noise), {mean:+.3f} "
            f"± {half:.3f}: {len(aucs)} phenomena of {asked.clips} clips.")


def peak_one(heat: np.ndarray) -> np.ndarray:
    """A map of which only the positive part counts, with a peak of 1."""
    heat = np.maximum(heat, 0)
    return heat / max(heat.max(), 1e-9)


def figure_6(model: Recorder, out: Path) -> str:
    """Which phenomena share experts."""
    found = correlation(model)
    names = found["names"]
    values = np.array(found["values"])
    figures.save(out / "correlation.png", figures.matrix(names, values))
    pairs = [(values[i, j], f"{names[i]} and {names[j]}")
             for i, j in itertools.combinations(range(len(names)), 2)]
    (low, least), (high, most) = min(pairs), max(pairs)
    return f"Figure 6: most alike {most} ({high:.2f}), least {least} ({low:.2f})."


def figure_7(model: Recorder, asked, prompts: list[str], out: Path) -> str:
    """Where the router looks: over the frames of a clip, and over the steps of sampling."""
    cfg = model.cfg
    names = data.category_names(cfg)
    rows = []
    captions = []
    made = list(sample.generate(model, prompts, seed=asked.seed, steps=asked.steps,
                                guidance=asked.guidance, batch=len(prompts)))
    for i, (clip, routing) in enumerate(made):
        best = max(model.info["categories_present"], key=lambda c: routing.lift[..., c].max())
        middle = cfg.frames // 2
        said = [model.said[j] for j in some_of(len(model.said))]
        along = [ClipRouting.of(one, i, t, cfg.grid) for t, one in said]
        rows += [strip(clip),
                 [("", figures.glow(clip, routing.lift[..., best], f)) for f in some_of(cfg.frames)],
                 [(f"t = {one.t:.2f}", figures.glow(clip, one.lift[..., best], middle))
                  for one in along]]
        captions += [prompts[i], f"P'_r of {names[best]} at t = {routing.t:.2f}",
                     f"the same map of frame {middle + 1}, from noise to clip"]
    figures.save(out / "router_maps.png", figures.pictures(rows, captions))
    return f"Figure 7: maps of {len(prompts)} clips, over frames and over the steps of sampling."


def figure_8(model: Recorder, asked, prompts: list[str], out: Path) -> str:
    """Expert inversion: clips of the same noise, and law errors, before and after."""
    cfg = model.cfg
    loaded = cfg, model.net, model.process, model.tokenizer, model.info
    scenes = evaluate.scenes_to_judge(cfg, asked)
    clips = []  # [[a clip a prompt] as they are, and inverted]
    errors = []  # [[an error a scene]]
    for edit in (None, invert):
        clips.append([clip for clip, _ in sample.generate(
            model, prompts, seed=asked.seed, steps=asked.steps, guidance=asked.guidance, edit=edit,
            batch=len(prompts))])
        judged = SimpleNamespace(**vars(asked) | {"edit": edit})
        videos = evaluate.generated(loaded, model.net, scenes, judged)
        errors.append([error for *_, error, _ in laws.judge(videos, scenes)])

    rows = [strip(clip) for both in zip(*clips) for clip in both]
    captions = [text for prompt in prompts for text in (prompt, "experts inverted")]
    figures.save(out / "inversion_clips.png", figures.pictures(rows, captions))
    places = {name: [i for i, scene in enumerate(scenes) if scene.actors[0].phenomenon == name]
              for name in laws.LAWS}
    bars = [[score.paired({0: [some[i] for i in of]}, {0: [0.] * len(of)}) for of in places.values()]
            for some in errors]
    mean, half = score.paired({0: errors[1]}, {0: errors[0]})
    title = f"inverted minus as it is: {mean:+.3f} ± {half:.3f} ({len(scenes)} clips of one run)"
    drawn = figures.pairs([*places], *bars, ("as it is", "experts inverted"), title)
    figures.save(out / "inversion_laws.png", drawn)
    return f"Figure 8: law error, {title}."


def draw_figures(run: Path, flags: "Flags", device: str) -> None:
    """Draw what this run has to show, and say what came out. Raises UserError where it has no
    branch with both routers, and Stopped where a file cannot be written."""
    library("matplotlib.figure", "Figures need")  # before the work
    model = open_model(run, device)
    if None in (getattr(model.net, name, None) for name in ("semantic", "refinement")):
        raise UserError(f"{run} has no branch with both routers, which figures 6 to 8 are about.")
    evaluate.check_run(run, model.cfg, model.process, ("laws",), model.cfg.preview_steps)
    out = Path(flags.out or "docs/figures")
    check_writable(out / "teacher.png")
    asked = evaluate.with_defaults(evaluate.Flags(n=flags.n, pairs=0, clips=flags.clips), model.cfg,
                                   device)
    asked = SimpleNamespace(**asdict(asked) | dict(judged_seed=evaluate.JUDGED_SEED, edit=None,
                                                   device=device))
    prompts = flags.prompt or worlds_prompts(CLIPS_SHOWN)
    try:
        if flags.vlm:
            colourful = replace(model.cfg, colour_cues=flags.colour_cues)
            print(figure_4(replace(model, cfg=colourful), asked, flags.vlm, out))
        print(figure_6(model, out))
        print(figure_7(model, asked, prompts[:2], out))
        print(figure_8(model, asked, prompts, out))
    except OSError as e:
        raise Stopped(f"{out} could not be written to ({e.strerror or e}).") from None
    print(f"They are in {out}.")


# --- the command --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flags:
    """The command line."""
    run: list[str] = flag([])  # run folder; several are shown side by side
    ablation: str = ""  # .json that ablate.py wrote: its rows with their intervals
    out: str = ""  # the page; empty = report.html, of one run in its folder. --figures: a folder
    prompt: list[str] = flag([])  # of the clips that are shown; none = captions of the world
    figures: bool = False  # draw the paper's figures 6, 7 and 8 of a run, instead of a page
    vlm: str = ""  # folder of a Qwen-VL, for figure 4
    colour_cues: bool = False  # draw figure 4's clips as its tiny VLM was taught
    n: int = 8  # clips a law, for figure 8
    clips: int = 64  # clips asked about, for figure 4
    device: str = flag("auto", config.CHOICES["device"])  # auto = cuda, else mps, else cpu

    IDLE = (  # as in rules.py
        ("ablation", "without --figures"),
        ("prompt device", "with --run"),
        ("vlm n", "with --figures"),
        ("colour_cues clips", "with --vlm"))

    def check(self) -> None:
        """Raises UserError with the first broken rule."""
        if not self.run and not self.ablation:
            raise UserError("Say --run DIR (made by train.py), or --ablation FILE.json.")
        if self.figures and len(self.run) != 1:
            raise UserError("--figures is about one --run.")
        if len(self.prompt) > MOST_PROMPTS:
            raise UserError(f"--prompt may be given {MOST_PROMPTS} times, not {len(self.prompt)}.")
        if any(not data.Tokenizer.split(prompt) for prompt in self.prompt):
            raise UserError("A --prompt is empty: it has no word.")
        if not self.figures and self.out and Path(self.out).suffix != ".html":
            raise UserError(f"--out must end in .html, not {Path(self.out).name!r}.")


def main(argv: list[str]) -> None:
    """Raises UserError before work starts, and Stopped."""
    flags = config.parse_flags(Flags, argv, __doc__.partition("\n")[0])
    device = pick_device(flags.device)
    if flags.figures:
        return draw_figures(Path(flags.run[0]), flags, device)
    folder = flags.run[0] if len(flags.run) == 1 else ""  # the page of several runs is of none
    out = Path(flags.out or Path(folder, "report.html"))
    write_page(out, [Path(run) for run in flags.run], flags.ablation, flags.prompt, device)
    print(f"wrote {out}")


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

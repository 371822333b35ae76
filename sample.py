"""From a run folder to clips one can look at: GIF or MP4, with the routers' maps or experts inverted.

    python sample.py --run runs/small --prompt "a red ball bounces on the left"
    python sample.py --run runs/small --prompt "..." --show_routing
                                        which phenomenon the router sees where
    python sample.py --run runs/small --prompt "..." --invert_experts
                                        the paper's Figure 8: the same noise, other experts
    python sample.py --run runs/small --prompt "..." --with_and_without
                                        the same noise without and with the branch, where it looked
    python sample.py --weights DIR --prompt "..." [--branch FILE]
                                        an official model, bare or with a branch
    python sample.py ... --prompts FILE.csv --out DIR
                                        an mp4 a clip and tables of them, as raters read them

    run folder --load_run--> model --generate--> clips, routing --cells, sheet--> one moving picture

A clip is a function of (seed, its index), whatever else is in its batch. Another batch size
changes rounding only: in float32 one number in 30,000 moves by one level of 255.

Letters: n clips, B clips of a batch, L words, F H W video, T' h w token grid, E_s semantic experts,
E_cat phenomena.
"""
import copy
import dataclasses
import functools
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import config
import data
import diffusion
import rules
from common import clips
from common.paths import check_writable
from common.pictures import (MOST_PIXELS, ClipRouting, check_fps, comparison_cell, enlarge,
                             plain_cell, routing_cell, save, save_gif, sheet)
from common.checkpoints import build, find_checkpoint, read_checkpoint
from common.run import description, pick_device, pick_precision
from common.video import to_bytes
from config import Config, UserError, flag
from experts import ProPhy, invert
from model import Backbone, build_backbone


# --- clips --------------------------------------------------------------------------------------
@dataclass
class RunModel:
    """A model that was trained here, as `generate` takes it. official.clips.OfficialModel has the
    same attributes and methods."""
    cfg: Config
    net: Backbone | ProPhy  # in eval mode
    process: diffusion.Process
    tokenizer: data.Tokenizer
    precision: str = "fp32"
    info: dict | None = None  # what load_run says of the checkpoint

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Word ids (n, L) and lengths (n,), on the CPU; an empty prompt has length 0."""
        return self.tokenizer.encode_all(prompts, self.cfg.text_len)

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor, length: Tensor, edit):
        """The network's outputs, and its Routing (None of a bare backbone). All rows in one forward:
        up to 1.6 times as fast on a CPU, never slower."""
        if isinstance(self.net, ProPhy):
            return self.net(x_t, t, text, length, edit)
        return self.net(x_t, t, text, length), None

    def draw(self, denoise: Callable, seed: int, index: Sequence[int], *how) -> np.ndarray:
        """Clips uint8 (B, F, H, W, 3), the noise of each a function of (seed, its index). how: steps,
        guidance and watch of Process.sample."""
        shape = (3, self.cfg.frames, self.cfg.height, self.cfg.width)
        noise = self.process.draw(seed, index, shape)[1].to(self.device)
        half = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            x = self.process.sample(denoise, noise, *how)
        return to_bytes(x).cpu().numpy()


def generate(model, prompts: list[str], *, indices: Sequence[int] | None = None, seed: int = 0,
             steps: int = 25, guidance: float = 1.5, negative: str = "", edit=None, batch: int = 8,
             progress: bool = True) -> Iterator[tuple[np.ndarray, ClipRouting | None]]:
    """For each prompt its clip, uint8 (F, H, W, 3), and its ClipRouting (None where the model tells
    of none), as soon as its batch is made.

    model: a RunModel or an official one. A clip's noise belongs to (seed, its index): its place in
    the list unless `indices` says otherwise. `edit` changes the semantic logits (experts.invert).
    Guidance sets the prompt against `negative` under the same `edit`; guidance 1 never asks for that.
    Routing is that of the step nearest t = 0.5: late enough for objects to be there, early enough
    for the routers to matter still.
    """
    indices = indices or range(len(prompts))
    texts = list(dict.fromkeys([*prompts, negative]))  # each is read once
    row_of = {text: row for row, text in enumerate(texts)}
    words, lengths = model.read(texts)
    copies = 1 if guidance == 1 else 2
    bar = tqdm(total=math.ceil(len(prompts) / batch) * steps, unit="step", disable=not progress,
               desc="sampling, edited" if edit else "sampling", dynamic_ncols=True)
    for start in range(0, len(prompts), batch):
        # The prompts of this batch; with guidance, as many times the negative one behind them.
        rows = [row_of[prompt] for prompt in prompts[start:start + batch]]
        B = len(rows)
        rows += [row_of[negative]] * (copies - 1) * B
        text = words[rows].to(model.device)  # (copies B, L) ids, or (copies B, L, D_text)
        length = lengths[rows].to(model.device)
        said = {"t": math.inf}  # the newest routing, and the one to show with its time

        def denoise(x_t, t):
            x_t = x_t.repeat(copies, 1, 1, 1, 1)
            out, said["newest"] = model.predict(x_t, t.repeat(copies), text, length, edit)
            return out[:B], out[B:] if copies == 2 else None

        def watch(t):
            if abs(t - 0.5) < abs(said["t"] - 0.5):
                said.update(t=t, shown=said["newest"])
            bar.update()

        index = indices[start:start + batch]
        for i, clip in enumerate(model.draw(denoise, seed, index, steps, guidance, watch)):
            yield clip, ClipRouting.of(said["shown"], i, said["t"], model.cfg.grid)
    bar.close()


# --- run folder ---------------------------------------------------------------------------------
def load_run(run_dir, checkpoint: str = "best", device: str = "cpu"):
    """-> cfg, model (averaged weights, eval mode), process, tokenizer, dict(step, stage,
    categories_present).

    checkpoint: best | last | base (the end of stage one) | a file in checkpoints/. The model is a
    Backbone before it has its branch and a ProPhy after. Weights are read without unpickling code.
    Raises UserError for what is missing or broken.
    """
    run = Path(run_dir)
    cfg = config.check(config.load(run / "config.json"))
    if cfg.latent and not cfg.freeze_backbone:
        raise UserError(f"{run} trained an official backbone along (--freeze_backbone false): python "
                        f"encode.py --export {run} --out DIR writes it, and sample.py --weights DIR "
                        "--branch DIR/branch.safetensors makes its clips.")
    if cfg.latent:
        raise UserError(f"{run} is a branch for official weights: sample.py --weights {cfg.weights} "
                        f"--branch {run}/branch.safetensors makes its clips, and no law is measured "
                        "on them.")
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    path = find_checkpoint(run / "checkpoints", checkpoint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on what it then refuses
            stored = read_checkpoint(path)
    except Exception as e:  # a damaged archive raises one of many types
        raise UserError(f"{path} is damaged or no checkpoint ({type(e).__name__}).") from None

    # Whatever does not fit shows in one of many errors; all of them mean the same.
    try:
        model = build(cfg, len(tokenizer), stored)
        present = description(run).get("categories_present", [])
        info = dict(step=stored["step"], stage=stored["stage"], categories_present=present)
        if not all(0 <= i < cfg.categories for i in present):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        raise UserError(f"{path} does not fit its run's config.json and tokenizer.json: they describe "
                        "another model.") from None
    return cfg, model.to(device).eval(), diffusion.build(cfg), tokenizer, info


# --- files --------------------------------------------------------------------------------------
def play_fps(cfg: Config) -> float:
    """A synthetic clip lasts one second, however many frames it has; videos play as they were
    sampled."""
    return cfg.fps if cfg.data_dir or cfg.latent else cfg.frames


def bare(model):
    """The same model without its branch. Raises UserError where stage two changed more than that."""
    if not isinstance(model.net, ProPhy):
        return model
    if not model.net.leaves_backbone:
        raise UserError("Stage two changed the backbone itself: --checkpoint base, or --weights "
                        "without --branch, has it as it was.")
    alone = copy.copy(model)
    alone.net = model.net.backbone
    return alone


def preview(path, model: RunModel, prompts: dict[str, list[int]]) -> None:
    """A GIF of one clip a prompt, at least 128 pixels high, sampled as the config says for previews.
    Of a branch: the clip of the same noise without it, then with it, and where the router looked.

    prompts: {prompt: indices of the phenomena it names, which the map is chosen from}.
    """
    cfg = model.cfg
    make = functools.partial(generate, prompts=list(prompts), seed=cfg.seed,
                             steps=cfg.preview_steps, guidance=cfg.guidance, progress=False)
    scale = max(4, math.ceil(128 / cfg.height))
    made = list(make(model))
    if getattr(model.net, "leaves_backbone", False):
        names = data.category_names(cfg)
        cells = [comparison_cell(first, *one, prompt, scale, {i: names[i] for i in named})
                 for (first, _), one, (prompt, named) in zip(make(bare(model)), made, prompts.items())]
    else:
        cells = [plain_cell(clip, prompt, "", scale) for (clip, _), prompt in zip(made, prompts)]
    save_gif(path, sheet(cells), play_fps(cfg))


# --- the command --------------------------------------------------------------------------------
# Between commands that fill one folder these may differ; any other flag shapes its clips.
MAY_DIFFER = ("prompt", "prompts", "n", "batch", "device", "out", "guidance")  # until it is known


@dataclass(frozen=True)
class Flags:
    """The command line."""
    # --- which model
    run: str = ""  # run folder that train.py made
    checkpoint: str = "best"  # best | last | base (end of stage one) | a file in the run's checkpoints/
    no_branch: bool = False  # the bare backbone, for comparison
    weights: str = ""  # official model in diffusers' layout
    branch: str = ""  # --weights: branch.safetensors of a run beside them

    # --- which clips
    prompt: list[str] = flag([])  # what the clip shows; may be given several times
    prompts: str = ""  # text file with a prompt a line, or a .csv with a column of them
    column: str = "caption"  # --prompts FILE.csv: which column to sample from
    n: int | None = None  # clips a prompt; None = 4, with --weights or into a folder 1
    seed: int = 0  # of the noise; clip i of a prompt depends on (seed, i) alone
    steps: int | None = flag(None, marks=(10**4,))  # sampling steps; None = 25, with --weights 50
    guidance: float | None = None  # classifier-free; 1 = off; None = 1.5, with --weights 6, Wan 5
    negative: str = ""  # --weights: what guidance leads away from
    solver: str = ""  # --weights: ddim | dpm (CogVideoX), unipc | wan-euler (Wan); empty = the folder's
    dynamic: bool = False  # --weights: CogVideoX's dynamic guidance
    frames: int = flag(0, marks=(2**14,))  # --weights: frames of the clip; 0 = as the model was trained
    height: int = flag(0, marks=(2**14,))  # --weights: pixels; 0 = as the model was trained
    width: int = flag(0, marks=(2**14,))  # --weights: pixels; 0 = as the model was trained

    # --- how they are made and shown
    show_routing: bool = False  # with each clip, a heat map per trained phenomenon, expert weights
    with_and_without: bool = False  # clips without and with the branch, its strongest map beside
    invert_experts: bool = False  # flip the semantic router's logits; the two side by side
    expert: list[str] = flag([])  # 3=+2: raise the logit of semantic expert 3 by 2; several times
    scale: int = 0  # screen pixels per pixel; 0 = so that a clip is about 256 high
    fps: float = 0  # frames shown a second; 0 = as the clips were made
    batch: int | None = None  # clips at a time; None = 8, into a folder 1, so that bits stay the same
    tiled: bool = False  # --weights: decode in tiles, which needs less memory
    device: str = flag("auto", config.CHOICES["device"])  # auto = cuda, else mps, else cpu
    precision: str = flag("auto", config.CHOICES["precision"])  # auto = bf16 on cuda, else fp32
    out: str = ""  # clip.gif, clip.mp4, or --prompts: a folder; empty = RUN/samples/<prompt>.gif
    names: str = flag("readable", ("readable", "vbench"))  # in a folder; vbench: <caption>-<number>.mp4

    IDLE = (  # as in rules.py
        ("checkpoint batch scale", "without --weights"),
        ("negative", "without --guidance 1.0"))

    def check(self) -> None:
        """Raises UserError with the first broken rule."""
        self.shifts()
        for broken, sentence in rules.sample_rules(self):
            if broken:
                raise UserError(sentence)
        if self.fps:
            check_fps(Path("clip.mp4" if self.fills else self.out or "clip.gif"), self.fps)

    @property
    def fills(self) -> bool:
        """Is --out a folder to fill with clips?"""
        return bool(self.prompts and self.out and not Path(self.out).suffix)

    def shifts(self) -> list[tuple[int, float]]:
        """What --expert asks for: (number of the expert from 1, what its logit gains). Raises
        UserError."""
        found = []
        for text in self.expert:
            match = re.fullmatch(r"(\d{1,4})=([+-]?\d{1,2}(?:\.\d{1,9})?)", text)
            if not match:
                raise UserError("--expert must be NUMBER=CHANGE, such as 3=+2, with a change of less "
                                f"than 100, not {text!r}.")
            found.append((int(match[1]), float(match[2])))
        return found


def edit_of(flags: Flags, model, told: str) -> Callable | None:
    """What is done to semantic logits (B, E_s). Raises UserError, with what is `told` of the model,
    where it lacks what is to be changed or shown."""
    semantic = getattr(model.net, "semantic", None)
    if flags.show_routing and semantic is None:
        if getattr(model.net, "refinement", None) is None or not model.info.get("categories_present"):
            raise UserError(f"--show_routing needs a router; {told}.")
    if flags.with_and_without and bare(model) is model:
        raise UserError(f"--with_and_without needs a branch; {told}.")
    shifts = flags.shifts()
    if not flags.invert_experts and not shifts:
        return None
    if semantic is None:
        name = "expert" if shifts else "invert_experts"
        raise UserError(f"--{name} needs a semantic router; {told}.")
    experts = model.cfg.semantic_experts
    change = torch.zeros(experts)
    for number, amount in shifts:
        if not 1 <= number <= experts:
            raise UserError(f"--expert {number} is none of this model's experts, 1 to {experts}.")
        change[number - 1] += amount  # an expert named twice gains both
    return (lambda logits: logits + change.to(logits)) if shifts else invert


def all_prompts(flags: Flags) -> list[tuple[str, str]]:
    """(caption, prompt) of each that --prompt and --prompts ask for. Raises UserError."""
    pairs = [(prompt, prompt) for prompt in flags.prompt]
    if flags.prompts:
        pairs += clips.read_prompts(flags.prompts, flags.column)
    if not pairs:
        raise UserError('Say what to generate: --prompt "..." or --prompts FILE.')
    for _, prompt in pairs:
        if not data.Tokenizer.split(prompt):
            raise UserError(f"The prompt {prompt!r} is empty: it has no word.")
    return pairs


def warn(tokenizer: data.Tokenizer, cfg: Config, prompts: list[str]) -> None:
    """Say on stderr which words the run never read, and whether prompts are cut."""
    unknown = dict.fromkeys(word for prompt in prompts for word in tokenizer.unknown(prompt))
    if unknown:
        print(f"Warning: the run never read {', '.join(unknown)}; the model cannot know what that "
              "is.", file=sys.stderr)
    if any(len(tokenizer.split(prompt)) > cfg.text_len for prompt in prompts):
        print(f"Warning: prompts are cut after {cfg.text_len} words.", file=sys.stderr)


def open_out(flags: Flags) -> Path:
    """The path to write, its folder made and found writable before any clip is."""
    name = re.sub(r"[^a-z0-9]+", "-", flags.prompt[0].lower())[:60].strip("-") or "clip"
    said = {"bare": flags.no_branch, "routing": flags.show_routing, "experts": flags.expert,
            "with-and-without": flags.with_and_without, "inverted": flags.invert_experts}
    name += "".join(f"-{word}" for word, given in said.items() if given)
    out = Path(flags.out or f"{flags.run or Path(flags.branch).parent}/samples/{name}.gif")
    check_writable(out)
    return out


def main(argv: list[str]) -> None:
    """From the command line to clips. Raises UserError and Stopped."""
    flags = config.parse_flags(Flags, argv,
                               "Generate clips from a run folder, or with an official model.")
    device = pick_device(flags.device)
    pairs = all_prompts(flags)
    alone = flags.fills or flags.weights  # each clip in a file of its own
    n, batch = (1, 1) if alone else (4, 8)
    flags = dataclasses.replace(
        flags, prompt=[prompt for _, prompt in pairs], device=device, n=flags.n or n,
        batch=flags.batch or batch, steps=flags.steps or (50 if flags.weights else 25),
        precision=pick_precision(flags.precision, device))
    if flags.fills:
        return fill_folder(flags, clips.wanted(pairs, flags.n, flags.names))
    config.only_one_process()

    # Everything that can be refused is refused before the first step.
    model, edit = open_model(flags)
    out = open_out(flags)
    fps = flags.fps or play_fps(model.cfg)
    prompts = [prompt for prompt in flags.prompt for _ in range(flags.n)]
    make = maker(flags, model, prompts, list(range(flags.n)) * len(flags.prompt))
    cells = cells_of(flags, model, edit, prompts, make)
    if not flags.weights:
        cells = list(cells)
        pair = len(cells[0])
        group = pair * (flags.n if len(flags.prompt) > 1 else 1)
        save(out, sheet([cell for row in cells for cell in row], pair, group), fps)
        print(f"wrote {out}")
        return

    # Each clip of an official model is written when it is done, for it took minutes.
    shown = (clip for clip, _ in make(model, edit=edit))
    if flags.show_routing or flags.with_and_without:
        shown = (sheet(row, len(row)) for row in cells)
    for i, frames in enumerate(shown):
        path = out if len(prompts) == 1 else out.with_stem(f"{out.stem}-{i}")
        save(path, frames, fps)
        print(f"wrote {path}")


def fill_folder(flags: Flags, asked: list[clips.Wanted]) -> None:
    """Make the clips that have no file yet, and the tables of all that were asked for. Raises
    UserError and Stopped."""
    out = Path(flags.out)
    settings = {name: value for name, value in dataclasses.asdict(flags).items()
                if name not in MAY_DIFFER}
    settings |= {name: str(Path(settings[name]).resolve()) for name in ("run", "weights", "branch")
                 if settings[name]}
    with clips.only_writer(out):
        # Is it as the folder was begun: the flags before weights are read, then what these say.
        clips.check_settings(out, settings)
        model, edit = open_model(flags)
        left = clips.without_file(out, asked)
        make = maker(flags, model, [one.prompt for one in left], [one.index for one in left])
        settings |= dict(step=model.info.get("step"), guidance=make.keywords["guidance"])
        clips.check_settings(out, settings)

        scale = 1 if flags.weights else scale_of(flags, model.cfg)
        frames = (enlarge(clip, scale) for clip, _ in make(model, edit=edit)) if left else ()
        clips.fill(out, asked, zip(frames, left), flags.fps or play_fps(model.cfg), settings)
    print(f"wrote {out / 'clips.csv'}")


def maker(flags: Flags, model, prompts: list[str], indices: list[int]) -> Callable:
    """`generate`, told all that the command line says of these clips of a model."""
    guidance = flags.guidance
    if guidance is None:
        guidance = model.cfg.guidance if flags.weights else 1.5
    return functools.partial(generate, prompts=prompts, indices=indices, seed=flags.seed,
                             steps=flags.steps, guidance=guidance, negative=flags.negative,
                             batch=flags.batch)


def open_model(flags: Flags) -> tuple:
    """The model of --run or --weights, and its edit. Raises UserError where it cannot do what is
    asked for."""
    if flags.weights:
        from official import clips as theirs
        dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
        model = theirs.OfficialModel(
            flags.weights, flags.device, dtype, "" if flags.no_branch else flags.branch,
            solver=flags.solver, dynamic=flags.dynamic, tiled=flags.tiled, frames=flags.frames,
            height=flags.height, width=flags.width)
        told = "give --branch, a file trained with one"
    else:
        model = open_run(flags)
        told = f"this {model.info['stage']} model of {flags.run} has none"
    edit = edit_of(flags, model, told)
    try:
        model.process.times(flags.steps, getattr(model, "solver", None))
        if flags.dynamic:
            model.process.dynamic(1.0, 0, flags.steps)
    except ValueError as e:
        asked = f"--steps {flags.steps}" + " --dynamic" * flags.dynamic
        raise UserError(f"{asked}: {e}") from None
    return model, edit


def open_run(flags: Flags) -> RunModel:
    """The model of --run, whose clips fit into one picture. Raises UserError."""
    cfg, net, process, tokenizer, info = load_run(flags.run, flags.checkpoint, flags.device)
    model = RunModel(cfg, net, process, tokenizer, flags.precision, info)
    n = 1 if flags.fills else flags.n * len(flags.prompt)
    size = 4 if flags.show_routing else 1  # a routing cell is as large as four clips
    versions = 3 if flags.with_and_without else 2 if flags.invert_experts or flags.expert else 1
    scale = scale_of(flags, cfg)
    if n * versions * size * cfg.frames * cfg.height * cfg.width * scale**2 > MOST_PIXELS:
        raise UserError(f"{n} clips at --scale {scale} make too large a picture: lower --n or "
                        "--scale, or with --prompts give a folder as --out.")
    warn(tokenizer, cfg, flags.prompt)
    return bare(model) if flags.no_branch else model


def scale_of(flags: Flags, cfg: Config) -> int:
    """Screen pixels per pixel of a clip."""
    return flags.scale or max(1, round(256 / cfg.height))


def cells_of(flags: Flags, model, edit: Callable | None, prompts: list[str],
             make: Callable) -> Iterator[list[np.ndarray]]:
    """For each clip its cells in a picture, one a version. make: as `maker` gives it."""
    versions = {"": (model, None)}  # of the same prompts and the same noise
    if flags.with_and_without:
        versions = {"without": (bare(model), None), "with": (model, None)}
    elif edit:
        label = f"expert {' '.join(flags.expert)}" if flags.expert else "inverted"
        versions = {"plain": (model, None), label: (model, edit)}
    made = zip(*(make(one, edit=how) for one, how in versions.values()))

    # One cell a clip, its versions side by side; or one cell for both, with a map.
    names = {i: data.category_names(model.cfg)[i] for i in model.info.get("categories_present", ())}
    scale = 2 if flags.weights else scale_of(flags, model.cfg)
    for shown, prompt in zip(made, prompts):
        if flags.weights:
            shown = [model.shown(*one) for one in shown]
        if flags.with_and_without:
            yield [comparison_cell(shown[0][0], *shown[1], prompt, scale, names)]
        elif flags.show_routing:
            yield [routing_cell(clip, prompt, label, scale, routing, names)
                   for label, (clip, routing) in zip(versions, shown)]
        else:
            yield [plain_cell(clip, prompt, label, scale) for label, (clip, _) in zip(versions, shown)]


if __name__ == "__main__":
    config.entry(main, sys.argv[1:], ranks=True)

"""From a run folder to clips one can look at: GIF or MP4, the routers drawn beside them, experts inverted.

    python sample.py --run runs/small --prompt "a red ball bounces on the left"
    python sample.py --run runs/small --prompt "..." --show_routing      which phenomenon the router sees where
    python sample.py --run runs/small --prompt "..." --invert_experts    the paper's Figure 8: same noise, other experts
    python sample.py --weights DIR --prompt "..." [--branch FILE]        an official model, bare or with a branch

    run folder --load_run--> model --generate--> clips + what the routers said --cells, sheet--> one moving picture

A clip is a function of (seed, its index), whatever else is in its batch. In float32 another batch size makes the matrix
library add in another order (3e-6 where pixels span -1..1), which moves one number in 30,000 by one level of 255.
Filling every batch up to one size would undo even that and make a single clip eight times as slow. Nothing trains here.

Letters: n clips, B clips of a batch, F H W video, T' h w token grid, E_s semantic experts, E_cat phenomena.
"""
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import diffusion
from common.pictures import (
    MOST_PIXELS,
    ClipRouting,
    overlay,
    plain_cell,
    routing_cell,
    save,
    save_gif,
    sheet,
)
from common.run import pick_device
from config import Config, UserError
from experts import ProPhy, invert
from model import build_backbone
from official.clips import generate_official, load_official


# --- clips ------------------------------------------------------------------------------------------------------------
def generate(model, process: diffusion.Process, tokenizer: data.Tokenizer, cfg: Config, prompts: list[str], *,
             indices=None, seed: int = 0, steps: int = 25, guidance: float = 1.5, edit=None, batch: int = 8,
             precision: str = "fp32", progress: bool = True) -> tuple[np.ndarray, list[ClipRouting | None]]:
    """One clip a prompt: videos uint8 (n, F, H, W, 3), and a ClipRouting a clip (None if the model is a bare backbone).

    `model` is a CogVideoX or a ProPhy in eval mode. A clip's noise belongs to (seed, its index): its place in the list
    unless `indices` says otherwise. `edit` changes the semantic logits (experts.invert). Guidance sets the prompt
    against an empty caption under the same `edit`; guidance 1 never asks for the empty one. Routing is that of the step
    nearest t = 0.5: late enough for objects to be there, early enough for the routers to matter still.
    """
    device, branch = next(model.parameters()).device, isinstance(model, ProPhy)
    indices = range(len(prompts)) if indices is None else indices
    looked_at = min(process.times(steps)[:-1], key=lambda t: abs(t - 0.5))
    shape, videos, routings = (3, cfg.frames, cfg.height, cfg.width), [], []
    bar = tqdm(total=math.ceil(len(prompts) / batch) * steps, desc="sampling, edited" if edit else "sampling",
               unit="step", disable=not progress, dynamic_ncols=True)
    for start in range(0, len(prompts), batch):
        ids, n_words = zip(*(tokenizer.encode(prompt, cfg.text_len) for prompt in prompts[start : start + batch]))
        text, length, B = torch.stack(ids).to(device), torch.tensor(n_words, device=device), len(ids)  # (B, L), (B,)
        noise = process.draw(seed, indices[start : start + B], shape)[1].to(device)
        copies = 1 if guidance == 1 else 2
        if copies == 2:  # with and without caption in one forward: up to 1.6 times as fast on a CPU, never slower
            text, length = torch.cat([text, 0 * text]), torch.cat([length, 0 * length])
        said = {}  # the routing of the newest step, and the one of the step that is shown

        def denoise(x_t, t):
            x_t, t = x_t.repeat(copies, 1, 1, 1, 1), t.repeat(copies)
            if branch:
                out, said["newest"] = model(x_t, t, text, length, edit)
            else:
                out = model(x_t, t, text, length)
            return out[:B], out[B:] if copies == 2 else None

        def watch(t):
            if t == looked_at:
                said["shown"] = said.get("newest")
            bar.update()

        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            x = process.sample(denoise, noise, steps, guidance, watch)
        levels = ((x.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().byte()
        videos.append(levels.permute(0, 2, 3, 4, 1).cpu().numpy())  # (B, 3, F, H, W) -> (B, F, H, W, 3)
        routings += [clip_routing(said["shown"], i, looked_at, cfg.grid) if branch else None for i in range(B)]
    bar.close()
    return np.concatenate(videos), routings


def clip_routing(routing, i: int, t: float, grid: tuple[int, int, int]) -> ClipRouting:
    """What a batch's Routing, made at diffusion time t, says of its clip i."""
    lift, rho = (None if r is None else r[i].float().cpu().numpy() for r in (routing.refinement_lift, routing.semantic))
    return ClipRouting(None if lift is None else lift.reshape(*grid, -1), rho, t)  # (N, E_cat) -> (T', h, w, E_cat)


# --- run folder -------------------------------------------------------------------------------------------------------
def load_run(run_dir, checkpoint: str = "best", device: str = "cpu"):
    """-> cfg, model (averaged weights, eval mode), process, tokenizer, dict(step, stage, categories_present).

    checkpoint: best | last | base (the end of stage one) | a file in checkpoints/. The model is a CogVideoX before it
    has its branch and a ProPhy after. Weights are read without unpickling code. Raises UserError for what is missing or
    broken.
    """
    run = Path(run_dir)
    cfg = config.check(config.load(run / "config.json"))
    if cfg.latent and not cfg.freeze_backbone:
        raise UserError(f"{run} trained an official backbone along (--freeze_backbone false): sample.py cannot make its "
                        "clips yet.")
    if cfg.latent:
        raise UserError(f"{run} is a branch for official weights: sample.py --weights {cfg.weights} --branch "
                        f"{run}/branch.safetensors makes its clips, and no law is measured on them.")
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    path = find_checkpoint(run / "checkpoints", checkpoint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on what it then refuses
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged archive raises one of many types
        raise UserError(f"{path} is damaged or no checkpoint ({type(e).__name__}).") from None
    try:
        model = build_backbone(cfg, len(tokenizer))
        if stored["stage"] == "physics":
            model = ProPhy(model, cfg)
        model.load_state_dict(stored["model"])
        strangers = model.load_state_dict(stored["ema"], strict=False).unexpected_keys  # it holds what was trained
        present = json.loads((run / "config.json").read_text()).get("categories_present", [])
        info = dict(step=int(stored["step"]), stage=str(stored["stage"]), categories_present=[int(i) for i in present])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        strangers = True
    if strangers or not all(0 <= i < cfg.categories for i in info["categories_present"]):
        raise UserError(f"{path} does not fit its run's config.json and tokenizer.json: they describe another model.")
    return cfg, model.to(device).eval(), diffusion.build(cfg), tokenizer, info


def find_checkpoint(folder: Path, name: str) -> Path:
    """The file that best | last | base | a file's own name stands for. Raises UserError where there is none."""
    steps = sorted((p for p in folder.glob("step*.pt") if p.stem[4:].isdigit()), key=lambda p: int(p.stem[4:]))
    if name == "last" or (name == "best" and not (folder / "best.pt").is_file()):
        if not steps:
            raise UserError(f"{folder} holds no checkpoint yet: train first, or wait for the first save.")
        return steps[-1]
    path = folder / (name if name.endswith(".pt") else f"{name}.pt")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.pt"))) or "no checkpoint"
        raise UserError(f"There is no {path}; its folder holds {there}.")
    return path


# --- files ------------------------------------------------------------------------------------------------------------
def play_fps(cfg: Config) -> float:
    """A world clip lasts one second, however many frames it has; videos play as they were sampled."""
    return cfg.fps if cfg.data_dir else cfg.frames


def preview(path, model, process, tokenizer, cfg: Config, prompts: list[str], *, seed: int, steps: int, guidance: float,
            precision: str, scale: int = 4, present: list | None = None) -> None:
    """A GIF of one clip a prompt, at least 128 pixels high; with the branch, a heat map beside each.

    `present`: for each prompt the indices of the phenomena it names; the map with the highest peak among them is shown.
    Without it there is no map: that of a phenomenon which is not there was never trained there, and glows at random.
    """
    videos, routings = generate(model, process, tokenizer, cfg, prompts, seed=seed, steps=steps, guidance=guidance,
                                precision=precision, progress=False)
    scale, names, cells = max(scale, math.ceil(128 / cfg.height)), data.category_names(cfg), []
    for clip, routing, prompt, named in zip(videos, routings, prompts, present or [()] * len(prompts)):
        beside = None
        if named and routing and routing.lift is not None:
            strongest = max(named, key=lambda c: routing.lift[..., c].max())
            beside = names[strongest], overlay(clip, routing.lift[..., strongest], scale)
        cells.append(plain_cell(clip, prompt, "", scale, beside))
    save_gif(path, sheet(cells), play_fps(cfg))


# --- command ----------------------------------------------------------------------------------------------------------
def parse(argv: list[str]):
    """Command line -> namespace. Raises UserError with the first broken rule."""
    parser = config.Parser("Generate clips from a run folder, or with an official model.")
    add = parser.add_argument
    add("--run", default="", metavar="DIR", help="run folder that train.py made")
    add("--weights", default="", metavar="DIR", help="official model in diffusers' layout")
    add("--branch", default="", metavar="FILE", help="--weights: branch.safetensors of a run beside them")
    add("--negative", default="", help="--weights: what guidance leads away from")
    add("--solver", default="", help="--weights: ddim | dpm (CogVideoX), unipc | wan-euler (Wan); empty = the folder's")
    add("--dynamic", action="store_true", help="--weights: CogVideoX's dynamic guidance")
    add("--tiled", action="store_true", help="--weights: decode in tiles, which needs less memory")
    for name in ("frames", "height", "width"):
        add(f"--{name}", type=int, default=0, help=f"--weights: {name} of the clip; 0 = as the model was trained")
    add("--prompt", action="append", default=[], help="what the clip shows; may be given several times")
    add("--prompts", metavar="FILE", help="text file with a prompt a line")
    add("--n", type=int, help="clips a prompt; None = 4, with --weights 1")
    add("--seed", type=int, default=0, help="of the noise; clip i of a prompt depends on (seed, i) alone")
    add("--steps", type=int, help="sampling steps; None = 25, with --weights 50")
    add("--guidance", type=float, help="classifier-free guidance; 1 = off; None = 1.5, with --weights 6, Wan 5")
    add("--checkpoint", default="best", help="best | last | base (end of stage one) | a file in the run's checkpoints/")
    add("--no_branch", action="store_true", help="the bare backbone, for comparison")
    add("--show_routing", action="store_true", help="with each clip, a heat map a trained phenomenon, expert weights")
    add("--invert_experts", action="store_true", help="flip the semantic router's logits; the two side by side")
    add("--scale", type=int, default=0, help="screen pixels a pixel; 0 = so that a clip is about 256 high")
    add("--fps", type=float, default=0, help="frames shown a second; 0 = as the clips were made")
    add("--batch", type=int, default=8, help="clips at a time")
    add("--device", choices=config.CHOICES["device"], default="auto", help="auto = cuda, else mps, else cpu")
    add("--precision", choices=config.CHOICES["precision"], default="auto", help="auto = bf16 on cuda, else fp32")
    add("--out", metavar="FILE", help="clip.gif or clip.mp4; without it RUN/samples/<prompt>.gif")
    args = parser.parse_args(argv)
    if not args.run and not args.weights:
        raise UserError("Say which model: --run DIR (made by train.py), or --weights DIR (an official one).")
    if args.run and args.weights:
        raise UserError("Give --run or --weights, not both; what a run trained beside official weights is attached by "
                        "--branch RUN/branch.safetensors.")
    official = "branch", "negative", "solver", "dynamic", "tiled", "frames", "height", "width"
    only = [f"--{name}" for name in official if getattr(args, name)]
    if only and not args.weights:
        raise UserError(f"{', '.join(only)} belongs to --weights.")
    if args.weights and args.show_routing:
        raise UserError("--show_routing is for models trained here; official ones have no picture of it yet.")
    usual = (1, 50, None) if args.weights else (4, 25, 1.5)
    for name, value in zip(("n", "steps", "guidance"), usual):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    for name, least in (("n", 1), ("steps", 1), ("batch", 1), ("seed", 0), ("scale", 0), ("fps", 0), ("guidance", 0),
                        ("frames", 0), ("height", 0), ("width", 0)):
        if getattr(args, name) is not None and not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be {least} or more, not {getattr(args, name)}.")
    if args.no_branch and (args.show_routing or args.invert_experts):
        raise UserError("--show_routing and --invert_experts need the branch that --no_branch leaves out.")
    if args.out and Path(args.out).suffix.lower() not in (".gif", ".mp4"):
        raise UserError(f"--out must end in .gif or .mp4, not {Path(args.out).name!r}.")
    args.prompt += read_prompts(args.prompts) if args.prompts else []
    if not args.prompt:
        raise UserError('Say what to generate: --prompt "..." or --prompts FILE.')
    for prompt in args.prompt:
        if not data.Tokenizer.split(prompt):
            raise UserError(f"The prompt {prompt!r} is empty: it has no word.")
    return args


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line, empty lines left out. Raises UserError."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path} cannot be read as UTF-8 text ({type(e).__name__}).") from None
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt.")
    return prompts


def warn(tokenizer: data.Tokenizer, cfg: Config, prompts: list[str]) -> None:
    """Say on stderr which words the run never read, and whether prompts are cut."""
    unknown = dict.fromkeys(word for prompt in prompts for word in tokenizer.unknown(prompt))
    if unknown:
        print(f"Warning: the run never read {', '.join(unknown)}; the model cannot know what that is.", file=sys.stderr)
    if any(len(tokenizer.split(prompt)) > cfg.text_len for prompt in prompts):
        print(f"Warning: prompts are cut after {cfg.text_len} words.", file=sys.stderr)


def open_out(args) -> Path:
    """The path to write, its folder made and found writable before any clip is."""
    name = re.sub(r"[^a-z0-9]+", "-", args.prompt[0].lower())[:60].strip("-") or "clip"
    name += "-bare" * args.no_branch + "-routing" * args.show_routing + "-inverted" * args.invert_experts
    out = Path(args.out or f"{args.run or Path(args.branch).parent}/samples/{name}.gif")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"The folder {out.parent} cannot be made ({e.strerror}).") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"{out} cannot be written.")
    return out


def main(argv: list[str]) -> None:
    """From the command line to a file of clips. Raises UserError and Stopped."""
    # --- everything that can be refused is refused before the first step
    args = parse(argv)
    device = pick_device(args.device)
    if args.weights:
        return main_official(args, device)
    cfg, model, process, tokenizer, info = load_run(args.run, args.checkpoint, device)
    model = model.backbone if args.no_branch and isinstance(model, ProPhy) else model
    names = {i: data.category_names(cfg)[i] for i in info["categories_present"]}
    semantic, refinement = getattr(model, "semantic", None), getattr(model, "refinement", None)
    if args.show_routing and semantic is None and (refinement is None or not names):
        raise UserError(f"--show_routing needs a router; this {info['stage']} model of {args.run} has none to show.")
    if args.invert_experts and semantic is None:
        raise UserError(f"--invert_experts needs a semantic router; this {info['stage']} model of {args.run} has none.")
    versions = {"plain": None, "inverted": invert} if args.invert_experts else {"": None}
    prompts = [prompt for prompt in args.prompt for _ in range(args.n)]
    scale = args.scale or max(1, round(256 / cfg.height))
    cells = len(prompts) * len(versions) * (4 if args.show_routing else 1)  # a routing cell is as large as four clips
    if cells * cfg.frames * cfg.height * cfg.width * scale**2 > MOST_PIXELS:
        raise UserError(f"{len(prompts)} clips at --scale {scale} make too large a picture: lower --n or --scale.")
    try:
        process.times(args.steps)
    except ValueError as e:
        raise UserError(f"--steps {args.steps}: {e}") from None
    out = open_out(args)
    warn(tokenizer, cfg, args.prompt)

    precision = args.precision if args.precision != "auto" else "bf16" if device == "cuda" else "fp32"
    made = {label: generate(model, process, tokenizer, cfg, prompts, indices=list(range(args.n)) * len(args.prompt),
                            seed=args.seed, steps=args.steps, guidance=args.guidance, edit=edit, batch=args.batch,
                            precision=precision) for label, edit in versions.items()}
    cells = []
    for i, prompt in enumerate(prompts):
        for label, (videos, routings) in made.items():
            cells.append(routing_cell(videos[i], prompt, label, scale, routings[i], names) if args.show_routing
                         else plain_cell(videos[i], prompt, label, scale))
    group = len(versions) * (args.n if len(args.prompt) > 1 else 1)
    save(out, sheet(cells, len(versions), group), args.fps or play_fps(cfg))
    print(f"wrote {out}")


def main_official(args, device: str) -> None:
    """Clips of an official model, one file a clip: each is written when it is done, for it took minutes."""
    precision = args.precision if args.precision != "auto" else "bf16" if device == "cuda" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = {name: getattr(args, name) for name in ("frames", "height", "width")}
    branch = "" if args.no_branch else args.branch
    loaded = cfg, model, process, _ = load_official(args.weights, device, dtype, branch, **sizes)
    if args.invert_experts and getattr(model, "semantic", None) is None:
        raise UserError("--invert_experts needs a semantic router: give --branch, a file trained with one.")
    try:
        process.times(args.steps, args.solver or None)
        if args.dynamic:
            process.dynamic(1.0, 0, args.steps)
    except ValueError as e:
        raise UserError(str(e)) from None
    out = open_out(args)
    guidance = {"wan": 5.0}.get(cfg.lineage, 6.0) if args.guidance is None else args.guidance
    prompts = [prompt for prompt in args.prompt for _ in range(args.n)]
    clips = generate_official(args.weights, loaded, prompts, negative=args.negative, seed=args.seed, steps=args.steps,
                              guidance=guidance, solver=args.solver, dynamic=args.dynamic, tiled=args.tiled,
                              edit=invert if args.invert_experts else None, device=device, dtype=dtype)
    for i, clip in enumerate(clips):
        path = out if len(prompts) == 1 else out.with_stem(f"{out.stem}-{i}")
        save(path, clip, args.fps or cfg.fps)
        print(f"wrote {path}")


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

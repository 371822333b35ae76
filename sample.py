"""From a run folder to clips one can look at: GIF or MP4, the routers drawn beside them, experts inverted.

    python sample.py --run runs/small --prompt "a red ball bounces on the left"
    python sample.py --run runs/small --prompt "..." --show_routing      where the refinement router sees which phenomenon
    python sample.py --run runs/small --prompt "..." --invert_experts    the paper's Figure 8: the same noise, the other experts

    run folder --load_run--> model --generate--> clips uint8 (n, F, H, W, 3) + ClipRouting --sheet--> one moving picture

A clip is a function of (seed, its index), whatever else is in its batch. In float32 another batch size makes the matrix library
add up in another order (3e-6 in a pixel of -1..1), which moves one pixel in thirty thousand by one level of 255; filling
batches up to one size would undo that and make a single clip eight times as slow, so it is left. Nothing here trains.

Letters: n clips, F H W video, T' h w token grid, E_s semantic experts, E_cat phenomena.
"""
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import data
import diffusion
import world
from config import Config, Stopped, UserError
from experts import ProPhy, invert
from model import CogVideoX


@dataclass
class ClipRouting:
    """What the routers said of one clip at diffusion time t; None where a part is switched off."""

    lift: np.ndarray | None  # P'_r on the token grid, float32 (T', h, w, E_cat)
    semantic: np.ndarray | None  # rho_s, float32 (E_s,)
    t: float


# --- clips ----------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def generate(model, process: diffusion.Process, tokenizer: data.Tokenizer, cfg: Config, prompts: list[str], *, indices=None, seed: int = 0,
             steps: int = 25, guidance: float = 1.5, edit=None, batch: int = 8, precision: str = "fp32", progress: bool = True):
    """One clip a prompt: (videos uint8 (n, F, H, W, 3), [ClipRouting or None a clip]).

    `model` is a CogVideoX or a ProPhy in eval mode. A clip's noise belongs to (seed, its index), its place in the list unless
    `indices` says otherwise. `edit` changes the semantic logits (experts.invert). Guidance sets the prompt against an empty
    caption, under the same `edit`; guidance 1 never asks for the empty one. Routing is that of the step nearest t = 0.5:
    late enough for objects to be seen, early enough for the routers to matter still.
    """
    device, branch = next(model.parameters()).device, isinstance(model, ProPhy)
    indices = list(range(len(prompts))) if indices is None else list(indices)
    looked_at = min(process.times(steps)[:-1], key=lambda t: abs(t - 0.5))
    encoded = [tokenizer.encode(prompt, cfg.text_len) for prompt in prompts]
    bar = tqdm(total=math.ceil(len(prompts) / batch) * steps, desc="sampling" if edit is None else "sampling, edited", unit="step",
               disable=not progress, dynamic_ncols=True)
    videos, routings = [], []
    for start in range(0, len(prompts), batch):
        chosen = slice(start, start + batch)
        text = torch.stack([ids for ids, _ in encoded[chosen]]).to(device)  # (B, L)
        length = torch.tensor([n for _, n in encoded[chosen]], device=device)  # (B,)
        noise = process.draw(seed, indices[chosen], (3, cfg.frames, cfg.height, cfg.width))[1].to(device)
        B, latest, kept, waiting = len(text), None, None, None

        def forward(x_t, t, text, length):
            nonlocal latest
            if not branch:
                return model(x_t, t, text, length)
            prediction, latest = model(x_t, t, text, length, edit=edit)
            return prediction

        def conditional(x_t, t):
            nonlocal waiting
            if guidance == 1:
                return forward(x_t, t, text, length)
            # With and without caption in one forward: up to 1.6 times as fast for few clips on a CPU, no slower for many.
            twice = [torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, 0 * text]), torch.cat([length, 0 * length])]
            prediction, waiting = forward(*twice).chunk(2)
            return prediction

        def watch(t):
            nonlocal kept
            kept = latest if t == looked_at else kept
            bar.update()

        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            x = process.sample(conditional, noise, steps, guidance, lambda x_t, t: waiting, watch)
        levels = (x.nan_to_num().clamp(-1, 1) + 1) * 127.5
        videos.append(levels.round().byte().permute(0, 2, 3, 4, 1).cpu().numpy())
        routings += [clip_routing(kept, i, cfg, looked_at) if branch else None for i in range(B)]
    bar.close()
    return np.concatenate(videos), routings


def clip_routing(routing, i: int, cfg: Config, t: float) -> ClipRouting:
    """Row i of a batch's Routing (captioned clips come first)."""
    lift, rho = routing.refinement_lift, routing.semantic
    return ClipRouting(None if lift is None else lift[i].float().cpu().numpy().reshape(*cfg.grid, -1),  # (N, E_cat) -> (T', h, w, E_cat)
                       None if rho is None else rho[i].float().cpu().numpy(), t)


# --- run folder -----------------------------------------------------------------------------------------------------------
def load_run(run_dir, checkpoint: str = "best", device: str = "cpu"):
    """-> (cfg, model with averaged weights in eval mode, process, tokenizer, dict(step, stage, categories_present)).

    checkpoint: best | last | base (the end of stage one) | a file in checkpoints/. The model is a CogVideoX before the branch
    is there and a ProPhy after. Weights are read without unpickling code. Raises UserError for whatever is missing or broken.
    """
    run = Path(run_dir)
    cfg = config.check(config.load(run / "config.json"))
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    path = find_checkpoint(run / "checkpoints", checkpoint)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged archive raises one of many types
        raise UserError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): it is damaged, half-written or something else.") from None
    try:
        model = CogVideoX(cfg, len(tokenizer))
        if stored["stage"] == "physics":
            model = ProPhy(model, cfg)
        model.load_state_dict(stored["model"])
        strangers = model.load_state_dict(stored["ema"], strict=False).unexpected_keys  # averages of what the stage trained
        info = dict(step=int(stored["step"]), stage=str(stored["stage"]), categories_present=categories_present(run, cfg))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        strangers = True
    if strangers:
        raise UserError(f"{path} does not fit {run / 'config.json'} and its tokenizer: they describe another model.")
    return cfg, model.to(device).eval(), diffusion.build(cfg), tokenizer, info


def find_checkpoint(folder: Path, name: str) -> Path:
    steps = sorted((p for p in folder.glob("step*.pt") if p.stem[4:].isdigit()), key=lambda p: int(p.stem[4:]))
    if name == "last" or (name == "best" and not (folder / "best.pt").is_file()):
        if not steps:
            raise UserError(f"{folder} holds no checkpoint yet: train first, or wait for its first save.")
        return steps[-1]
    path = folder / (name if name.endswith(".pt") else f"{name}.pt")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.pt"))) or "no checkpoint"
        raise UserError(f"There is no {path}; {folder} holds {there}.")
    return path


def categories_present(run: Path, cfg: Config) -> list[int]:
    """Indices of the phenomena that the run's data trained."""
    stored = json.loads((run / "config.json").read_text()).get("categories_present", [])
    return [i for i in stored if i in range(cfg.categories)]


def pick_device(name: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in there if there[device])
    if not there[name]:
        raise UserError(f"--device {name} is not available here.")
    return name


# --- pictures -------------------------------------------------------------------------------------------------------------
PAPER, PLATE, INK, FAINT = (17, 19, 25), (29, 32, 41), (232, 234, 240), (136, 142, 156)
GAP, LINE = 8, 17  # pixels between things, and of a line of text
HEAT = np.stack([np.interp(np.linspace(0, 1, 256), (0, .25, .5, .75, 1), c)  # dark violet to pale yellow, brightness rising
                 for c in ((40, 110, 205, 250, 255), (10, 25, 50, 145, 245), (80, 130, 95, 30, 160))], axis=-1)


class Panel:
    """A still picture with moving tiles on it."""

    def __init__(self, width: int, height: int):
        from PIL import Image, ImageDraw  # lazily: training needs no pictures until its first preview
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw, self.tiles = ImageDraw.Draw(self.image), []

    def write(self, x: int, y: int, text: str, colour=INK, size: int = 13, room: int | None = None, anchor: str = "la") -> None:
        """One line; where `room` is too small the letters shrink."""
        while room and size > 7 and font(size).getlength(text) > room:
            size -= 1
        self.draw.text((x, y), text, fill=colour, font=font(size), anchor=anchor)

    def place(self, x: int, y: int, frames: np.ndarray) -> None:
        self.tiles.append((x, y, frames))

    def frames(self) -> np.ndarray:
        """uint8 (F, H, W, 3)."""
        out = np.repeat(np.asarray(self.image)[None], len(self.tiles[0][2]), axis=0)
        for x, y, tile in self.tiles:
            out[:, y : y + tile.shape[1], x : x + tile.shape[2]] = tile
        return out


def font(size: int):
    from PIL import ImageFont
    return ImageFont.load_default(size)


def wrap(text: str, room: int, size: int = 13) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = lines[:-1] + [longer] if font(size).getlength(longer) <= room or not lines[-1] else [*lines, word]
    return lines


def overlay(clip: np.ndarray, heat: np.ndarray, scale: int) -> np.ndarray:
    """A map in 0..1 (T', h, w) glowing over the darkened grey clip uint8 (F, H, W, 3) -> (F, H scale, W scale, 3).

    Colour and opacity both stand for the value, on a scale that is the same for every map. Between token centres the map is
    interpolated for the eye; in time it is not.
    """
    n_frames, H, W, _ = clip.shape
    fine = F.interpolate(torch.from_numpy(heat.clip(0, 1))[:, None].float(), (H * scale, W * scale), mode="bilinear")[:, 0].numpy()
    value = fine.repeat(n_frames // len(heat), axis=0)[..., None]  # (F, H scale, W scale, 1)
    grey = 0.6 * world.enlarge(clip, scale).mean(-1, keepdims=True)
    return (grey + 0.9 * value * (HEAT[(255 * value[..., 0]).astype(np.uint8)] - grey)).round().clip(0, 255).astype(np.uint8)


def colour_bar(panel: Panel, x: int, y: int, width: int) -> None:
    ramp = np.linspace(0, 1, width)[None, :, None].repeat(9, axis=0)  # drawn as overlay draws a mid-grey pixel
    panel.place(x, y, (60 + 0.9 * ramp * (HEAT[(255 * ramp[..., 0]).astype(np.uint8)] - 60)).astype(np.uint8)[None])


def bars(panel: Panel, x: int, y: int, width: int, height: int, rho: np.ndarray) -> None:
    """Semantic weights rho_s (E_s,) as horizontal bars from 0 to 1, with the experts' numbers."""
    panel.draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 6, fill=PLATE)
    panel.write(x + 10, y + 8, "semantic router rho_s, bars 0 to 1", FAINT, 12, width - 20)
    pitch = (height - 36) / len(rho)
    size, thick, room = int(min(13, max(7, pitch - 4))), max(2, int(pitch * 0.55)), width - 84
    for e, weight in enumerate(rho):
        middle = int(y + 30 + (e + 0.5) * pitch)
        box = (x + 34, middle - thick // 2, x + 34 + room, middle - thick // 2 + thick)
        panel.write(x + 26, middle, str(e + 1), FAINT, size, anchor="rm")
        panel.draw.rectangle(box, fill=PAPER)
        panel.draw.rectangle((*box[:2], x + 34 + round(room * float(weight)), box[3]), fill=(92, 160, 255))
        panel.write(x + width - 8, middle, f"{weight:.2f}", INK, size, anchor="rm")


def plain_cell(clip, text: str, label: str, scale: int, beside=None, lines: int = 0) -> np.ndarray:
    """A clip, beside it one heat map (name, frames) if there is one, below it the caption."""
    h, w, top = clip.shape[1] * scale, clip.shape[2] * scale, LINE + 2 if label or beside else 0
    width = 2 * w + GAP if beside else w
    wrapped = wrap(text, width)
    panel = Panel(width, top + h + 6 + LINE * max(lines, len(wrapped)))
    panel.write(0, 0, label, FAINT, room=w)
    panel.place(0, top, world.enlarge(clip, scale))
    if beside:
        panel.write(w + GAP, 0, beside[0], FAINT, room=w)
        panel.place(w + GAP, top, beside[1])
    for i, line in enumerate(wrapped):
        panel.write(0, top + h + 4 + i * LINE, line)
    return panel.frames()


def routing_cell(clip, text: str, label: str, scale: int, routing: ClipRouting, names: dict[int, str]) -> np.ndarray:
    """Clip and semantic weights above, below them a heat map of half the size for each phenomenon of names {index: name}."""
    small, columns = max(1, scale // 2), 4
    h, w = clip.shape[1] * scale, clip.shape[2] * scale
    h_map, w_map = clip.shape[1] * small, clip.shape[2] * small
    width = max(columns * w_map + (columns - 1) * GAP, 2 * w + GAP)
    wrapped = wrap(text, width)
    maps = names if routing.lift is not None else {}
    y_maps = LINE + 2 + h + 8 + LINE * len(wrapped) + (LINE + 12 if maps else 0)
    panel = Panel(width, y_maps + math.ceil(len(maps) / columns) * (h_map + LINE + GAP))
    panel.write(0, 0, label or "clip", FAINT)
    panel.place(0, LINE + 2, world.enlarge(clip, scale))
    if routing.semantic is not None:
        bars(panel, w + GAP, LINE + 2, width - w - GAP, h, routing.semantic)
    for i, line in enumerate(wrapped):
        panel.write(0, LINE + 2 + h + 6 + i * LINE, line)
    if maps:
        panel.write(0, y_maps - LINE - 4, f"refinement router P'_r at t = {routing.t:.2f}", FAINT, 12, width // 2)
        panel.write(width - 102, y_maps - LINE - 4, "0", FAINT, 12, anchor="ra")
        colour_bar(panel, width - 96, y_maps - LINE - 1, 80)
        panel.write(width, y_maps - LINE - 4, "1", FAINT, 12, anchor="ra")
    for i, (category, name) in enumerate(maps.items()):
        x, y = i % columns * (w_map + GAP), y_maps + i // columns * (h_map + LINE + GAP)
        peak = float(routing.lift[..., category].max())
        panel.write(x, y, name, INK if peak >= 0.5 else FAINT, 12, w_map)
        panel.place(x, y + LINE, overlay(clip, routing.lift[..., category], small))
    return panel.frames()


def sheet(cells: list[np.ndarray], together: int = 1) -> np.ndarray:
    """Cells (F, h, w, 3) in rows about as wide as a screen; `together` neighbours stay in one row. -> (F, H, W, 3)."""
    h, w = max(c.shape[1] for c in cells), cells[0].shape[2]
    options = range(together, len(cells) + 1, together)
    columns = min(options, key=lambda c: abs(math.log(c * (w + GAP) / (math.ceil(len(cells) / c) * (h + GAP)) / 1.6)))
    rows = math.ceil(len(cells) / columns)
    out = np.empty((len(cells[0]), rows * (h + GAP) + GAP, columns * (w + 2 * GAP), 3), np.uint8)
    out[:] = PAPER
    for i, cell in enumerate(cells):
        y, x = GAP + i // columns * (h + GAP), GAP + i % columns * (w + 2 * GAP)
        out[:, y : y + cell.shape[1], x : x + w] = cell
    return out


# --- files ----------------------------------------------------------------------------------------------------------------
def save(path: Path, frames: np.ndarray, fps: float) -> None:
    """GIF or MP4 by suffix; whoever looks finds the whole file or none. Raises Stopped when it cannot be written."""
    try:
        save_mp4(path, frames, fps) if path.suffix.lower() == ".mp4" else world.save_gif(path, frames, fps)
    except OSError as e:
        raise Stopped(f"{path} could not be written ({e.strerror or e}).") from None


def save_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """H.264 (MPEG-4 where the library lacks it) in yuv420p, which every player shows and which needs even sides."""
    import av
    import imageio.v3 as iio
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    partial = path.with_name(f"{path.stem}.{os.getpid()}.part.mp4")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    try:
        iio.imwrite(partial, frames, plugin="pyav", codec=codec, fps=float(fps), out_pixel_format="yuv420p")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def play_fps(cfg: Config) -> float:
    """A world clip lasts one second, however many frames it has; videos play as they were sampled."""
    return cfg.fps if cfg.data_dir else cfg.frames


def preview(path, model, process, tokenizer, cfg: Config, prompts: list[str], *, seed: int, steps: int, guidance: float, precision: str,
            scale: int = 4, present=None) -> None:
    """A GIF of one clip a prompt, at least 128 pixels high; with the branch, the map with the highest peak beside each.

    `present`: indices of the phenomena to choose from, those that the run trains; None = all.
    """
    videos, routings = generate(model, process, tokenizer, cfg, prompts, seed=seed, steps=steps, guidance=guidance, precision=precision, progress=False)
    scale, names, cells = max(scale, math.ceil(128 / cfg.height)), data.category_names(cfg), []
    present = list(range(cfg.categories)) if present is None else list(present)
    for clip, routing, prompt in zip(videos, routings, prompts):
        beside = None
        if routing is not None and routing.lift is not None and present:
            strongest = max(present, key=lambda c: routing.lift[..., c].max())
            beside = names[strongest], overlay(clip, routing.lift[..., strongest], scale)
        cells.append(plain_cell(clip, prompt, "", scale, beside))
    world.save_gif(path, sheet(cells), play_fps(cfg))


# --- command --------------------------------------------------------------------------------------------------------------
def parse(argv: list[str]):
    parser = config.Parser("Generate clips from a run folder.")
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="run folder that train.py made")
    add("--prompt", action="append", default=[], help="what the clip shows; may be given several times")
    add("--prompts", metavar="FILE", help="text file with a prompt a line")
    add("--n", type=int, default=4, help="clips a prompt")
    add("--seed", type=int, default=0, help="of the noise; clip i of a prompt depends on (seed, i) alone")
    add("--steps", type=int, default=25, help="sampling steps")
    add("--guidance", type=float, default=1.5, help="classifier-free guidance; 1 = off")
    add("--checkpoint", default="best", help="best | last | base (end of stage one) | a file in the run's checkpoints/")
    add("--no_branch", action="store_true", help="the bare backbone, for comparison")
    add("--show_routing", action="store_true", help="beside each clip a heat map for each phenomenon the run trained, and the semantic weights")
    add("--invert_experts", action="store_true", help="flip the semantic router's logits; plain and inverted clips side by side")
    add("--scale", type=int, default=0, help="screen pixels a pixel; 0 = so that a clip is about 256 high")
    add("--fps", type=float, default=0, help="frames shown a second; 0 = as the clips were made")
    add("--batch", type=int, default=8, help="clips at a time")
    add("--device", choices=config.CHOICES["device"], default="auto", help="auto = cuda, else mps, else cpu")
    add("--precision", choices=config.CHOICES["precision"], default="auto", help="auto = bf16 on cuda, else fp32")
    add("--out", metavar="FILE", help="clip.gif or clip.mp4; without it RUN/samples/<prompt>.gif")
    args = parser.parse_args(argv)
    for name, least in (("n", 1), ("steps", 1), ("batch", 1), ("seed", 0), ("scale", 0), ("fps", 0), ("guidance", -math.inf)):
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= least):
            raise UserError(f"--{name} must be {'a finite number' if least == -math.inf else f'{least} or more'}, not {value}.")
    if args.show_routing and args.no_branch:
        raise UserError("--show_routing needs the branch that --no_branch leaves out.")
    if args.invert_experts and args.no_branch:
        raise UserError("--invert_experts needs the branch that --no_branch leaves out.")
    if args.out and Path(args.out).suffix.lower() not in (".gif", ".mp4"):
        raise UserError(f"--out must end in .gif or .mp4, not {Path(args.out).name!r}.")
    args.prompt += read_prompts(args.prompts) if args.prompts else []
    if not args.prompt:
        raise UserError("Say what to generate: --prompt \"...\" or --prompts FILE.")
    for prompt in args.prompt:
        if not data.Tokenizer.split(prompt):
            raise UserError(f"The prompt {prompt!r} is empty: it has no word.")
    return args


def read_prompts(path: str) -> list[str]:
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path} cannot be read ({getattr(e, 'strerror', None) or 'not a UTF-8 text file'}).") from None
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt.")
    return prompts


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    cfg, model, process, tokenizer, info = load_run(args.run, args.checkpoint, device)
    if args.no_branch and isinstance(model, ProPhy):
        model = model.backbone
    if args.show_routing and (not isinstance(model, ProPhy) or model.semantic is model.refinement):  # both None: nothing routes
        raise UserError(f"--show_routing needs a router, and the {info['stage']} model of {args.run} has none.")
    if args.invert_experts and getattr(model, "semantic", None) is None:
        raise UserError(f"--invert_experts needs the semantic router, and the {info['stage']} model of {args.run} has none.")
    try:
        process.times(args.steps)
    except ValueError as e:
        raise UserError(f"--steps: {e}") from None
    warn(tokenizer, cfg, args.prompt)
    out = open_out(args)

    precision = args.precision if args.precision != "auto" else "bf16" if device == "cuda" else "fp32"
    prompts = [prompt for prompt in args.prompt for _ in range(args.n)]
    settings = dict(indices=list(range(args.n)) * len(args.prompt), seed=args.seed, steps=args.steps, guidance=args.guidance,
                    batch=args.batch, precision=precision)
    versions = {"plain": None, "inverted": invert} if args.invert_experts else {"": None}
    made = {label: generate(model, process, tokenizer, cfg, prompts, edit=edit, **settings) for label, edit in versions.items()}

    scale = args.scale or max(1, round(256 / cfg.height))
    names = {i: data.category_names(cfg)[i] for i in info["categories_present"]}
    cells = []
    for i, prompt in enumerate(prompts):
        for label, (videos, routings) in made.items():
            if args.show_routing:
                cells.append(routing_cell(videos[i], prompt, label, scale, routings[i], names))
            else:
                cells.append(plain_cell(videos[i], prompt, label, scale))
    save(out, sheet(cells, len(versions)), args.fps or play_fps(cfg))
    print(f"wrote {out}")


def warn(tokenizer: data.Tokenizer, cfg: Config, prompts: list[str]) -> None:
    unknown = sorted({word for prompt in prompts for word in tokenizer.unknown(prompt)})
    if unknown:
        print(f"Warning: the run never read {', '.join(unknown)}; the model cannot know what is meant.", file=sys.stderr)
    if any(len(tokenizer.split(prompt)) > cfg.text_len for prompt in prompts):
        print(f"Warning: prompts are cut after {cfg.text_len} words.", file=sys.stderr)


def open_out(args) -> Path:
    """The path to write, its folder made and found writable before any work is done."""
    name = re.sub(r"[^a-z0-9]+", "-", args.prompt[0].lower())[:60].strip("-") or "clip"
    name += "-bare" * args.no_branch + "-routing" * args.show_routing + "-inverted" * args.invert_experts
    out = Path(args.out) if args.out else Path(args.run) / "samples" / f"{name}.gif"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"The folder {out.parent} cannot be made ({e.strerror}).") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"{out} cannot be written.")
    return out


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

"""Every knob of nanoProPhy, once: one frozen dataclass, named presets, command-line flags made from its fields.

A field's trailing comment is its meaning, and `--help` prints exactly that comment. `parse` turns the command line
into a checked `Config`; `check` holds the rules that tie fields together. Nothing here imports torch, so a typo costs
no start-up.

"ours" marks a value the paper (arXiv 2512.05564) does not state.
"""
import argparse
import dataclasses
import functools
import inspect
import json
import math
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class UserError(Exception):
    """The user must change something before work can start: one sentence on stderr, exit code 2."""


class Stopped(Exception):
    """Work had to stop half-way (full disk, diverged loss): one sentence on stderr, exit code 1."""


@dataclass(frozen=True)
class Config:
    # --- the run
    config: str = "small"  # name of the preset the other fields start from
    out_dir: str = ""  # run folder; empty = runs/<config>
    seed: int = 0  # weights, noise, clip order and caption dropout
    device: str = "auto"  # auto (cuda, else mps, else cpu) | cuda | mps | cpu
    threads: int = 0  # CPU threads; 0 = every core
    precision: str = "auto"  # auto | fp32 | bf16 (autocast; weights and optimizer stay float32)
    compile: str = "auto"  # torch.compile of the blocks: auto | on | off
    resume: bool = False  # go on from the newest checkpoint in out_dir
    weights: str = ""  # folder of official weights (diffusers layout): the backbone of stage two
    init_from: str = ""  # run folder whose trained backbone is taken, so that stage one is skipped
    dry_run: bool = False  # print parameters, FLOPs and memory of a step, and stop
    stop_at: int = 0  # save and stop after this many steps, as Ctrl-C would; 0 = at the end

    # --- clips
    data_dir: str = ""  # folder of videos; empty = the physics world of world.py
    cache: str = ""  # folder of latents and text embeddings that encode.py made, for official models
    annotations: str = ""  # captions.json or a WISA list; empty = the folder's captions.json
    frames: int = 12  # frames a clip
    height: int = 32  # pixels
    width: int = 32  # pixels
    fps: float = 8.0  # frames a second taken from a video (a world clip always lasts one second)
    windows: int = 4  # clips cut from one long video at most
    pool_dir: str = "data"  # where drawn or decoded clips wait on disk, shared by runs with the same settings
    world_clips: int = 16000  # clips of the world in the pool
    world_seed: int = 0  # which world; runs of several seeds share one
    decoys: float = 0.6  # share of scenes with a still object that looks like an actor
    two: float = 0.4  # share of scenes with two phenomena
    colour_cues: bool = False  # each phenomenon in a colour of its own: an easier world
    ood: str = ""  # draw this outside its usual range: speed | radius | gravity
    categories: int = 17  # 17 physical laws of WISA | 29 with its "no obvious ...", camera and object-state slots
    val_clips: int = 64  # held-out clips for the validation loss
    caption_dropout: float = 0.1  # share of captions emptied, so that guidance has an unconditional model

    # --- backbone
    lineage: str = "cogvideox"  # cogvideox (joint attention with the text) | wan (cross-attention to it)
    text_len: int = 24  # text tokens; longer captions are cut with a warning
    text_dim: int = 0  # width of text embeddings made beforehand (T5: 4096); 0 = words, learned along
    text_depth: int = 1  # blocks of the text encoder that learns the words, where the official models have T5
    latent: bool = False  # the network works on latents of a VAE that shrinks time by 4, height and width by 8
    channels: int = 3  # of a pixel, or of a latent (16)
    dim: int = 128  # width D
    depth: int = 6  # blocks
    heads: int = 4  # attention heads; dim / heads must divide by 16 for the three axes of RoPE
    ffn: int = 0  # hidden width of the feed-forward; 0 = 4 D
    time_dim: int = 32  # cogvideox: width of the time embedding that feeds the expert adaLN
    freq_dim: int = 128  # wan: sines and cosines of the time
    positions: str = "both"  # both (added and rotated, ours) | integer (rotated) | fitted (5B) | sincos (added, 2B)
    fit_height: int = 30  # fitted: rows of tokens it was trained on
    fit_width: int = 45  # fitted: columns
    patch_t: int = 2  # frames a token
    patch: int = 8  # pixels a token's side

    # --- diffusion
    process: str = "flow"  # flow (rectified flow) | vpred (CogVideoX: scaled-linear betas, zero terminal SNR)
    predict: str = "x"  # what the network outputs under flow: x | v | eps; the loss is always weighted as v
    time_mean: float = 0.0  # flow: t = sigmoid(N(mean, std)); above 0 leans towards noise
    time_std: float = 1.2  # flow: spread of the logit-normal times
    shift: float = 3.0  # flow: t -> s t / (1 + (s - 1) t), in training and sampling; captions decide near pure noise
    snr_shift: float = 1.0  # vpred: CogVideoX-2B has 3, 5B has 1

    # --- physical branch
    semantic: bool = True  # Semantic Expert Block (Eq. 1)
    refinement: bool = True  # Refinement Expert Block (Eq. 2)
    physical_blocks: str = "1,3,5"  # backbone blocks beside which a physical block stands (ours); empty = no branch
    injection: str = "zero"  # zero (through a zero-initialised linear; ours) | plain (the figure's bare +)
    semantic_experts: int = 8  # E_s (ours)
    refinement_experts: int = 16  # E_r (ours): more than the world has phenomena
    top_k: int = 2  # experts a token (ours)
    map_rank: int = 0  # factors of a basis map over time, space and width (ours); 0 = full maps, as the paper has them
    residual: bool = True  # x + REB(x) (ours); false = REB(x) alone
    renormalise: bool = False  # divide the chosen probabilities by their sum (ours: no)
    lora_rank: int = 0  # LoRA on the backbone's blocks, the paper's rival (there without the branch); 0 = none
    lora_alpha: float = 0.0  # LoRA is scaled by alpha / rank; 0 = rank
    lora_targets: str = "to_q,to_k,to_v,to_out"  # linear layers that get one

    # --- losses (Eq. 6)
    coarse_weight: float = 0.1  # of L_coarse
    fine_weight: float = 0.02  # of L_fine_align
    balance_weight: float = 0.01  # of L_fine_balance
    coarse_loss: str = "relative"  # relative (Eq. 3-4) | bce (the ablation's rival)
    reduction: str = "mean"  # of L_coarse over pairs and L_fine_align over entries: mean (ours) | sum (as printed)
    teacher: str = ""  # folder of maps that teacher.py made (or the world's, by name); empty = the world's exact masks
    background: str = "subtract"  # maps against those of a generic question: subtract (paper) | divide | none
    negatives: float = 0.0  # pull to zero where the paper's mask M is 0: absent phenomena, rest of VLM maps (0 = paper)

    # --- training
    base_steps: int = 3100  # stage one: the backbone alone
    physics_steps: int = 450  # stage two: the branch, attached to the trained backbone
    checkpointing: bool = False  # keep only the input of each block and compute it again in the backward pass
    freeze_backbone: bool = True  # stage two trains the branch only, as the paper does
    batch_size: int = 16  # clips a step
    optimizer: str = "muon"  # muon (block matrices; AdamW for the rest) | adamw (everything)
    lr: float = 4e-3  # peak, stage one
    physics_lr: float = 4e-3  # peak, stage two
    schedule: str = "linear"  # after the warm-up: linear (to zero at the stage's end) | constant
    warmup: int = 50  # steps from zero to the peak, each stage
    weight_decay: float = 0.01  # on matrices
    clip: float = 1.0  # gradient norm
    ema: float = 0.998  # decay of the averaged weights that are sampled
    log_every: int = 10  # steps
    eval_every: int = 500  # steps between validation losses
    save_every: int = 500  # steps between checkpoints
    preview_every: int = 1000  # steps between preview GIFs; 0 = only at the end
    preview_steps: int = 25  # sampling steps of a preview
    guidance: float = 1.5  # classifier-free guidance of previews; 1 = off

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens along time, height and width."""
        frames, height, width = self.frames, self.height, self.width
        if self.latent:  # the first frame stands alone; CogVideoX 1.5 pads an odd number of latent frames
            frames = math.ceil((1 + (frames - 1) // 4) / self.patch_t) * self.patch_t
            height, width = height // 8, width // 8
        return frames // self.patch_t, height // self.patch, width // self.patch

    @property
    def run_dir(self) -> Path:
        return Path(self.out_dir or f"runs/{self.config}")

    @property
    def physical_at(self) -> tuple[int, ...]:
        """Indices of the backbone blocks that have a physical block beside them."""
        return tuple(int(i) for i in self.physical_blocks.split(",") if i.strip())

OFFICIAL = dict(latent=True, channels=16, text_dim=4096, patch=2, patch_t=1, predict="v", map_rank=64, batch_size=2,
                base_steps=0, physics_steps=2000, optimizer="adamw", lr=1e-5, physics_lr=1e-5, weight_decay=1e-4,
                warmup=100, schedule="constant", preview_steps=50, checkpointing=True)
COG = OFFICIAL | dict(lineage="cogvideox", text_len=226, time_dim=512, process="vpred", frames=49, height=480,
                      width=720, fps=8.0, guidance=6.0)
WAN = OFFICIAL | dict(lineage="wan", text_len=512, freq_dim=256, positions="integer", frames=81, height=480, width=832,
                      fps=16.0, shift=5.0, guidance=5.0)
PRESETS = {
    "small": dict(negatives=0.02),  # the defaults above: two CPU cores, about twelve minutes
    "small-wan": dict(negatives=0.02, lineage="wan"),  # the same in the other lineage
    # official models: their architecture is exact; branch, optimizer and schedule are ours
    "cogvideox-2b": COG | dict(dim=1920, depth=30, heads=30, positions="sincos", snr_shift=3.0,
                               physical_blocks="4,9,14,19,24,29"),
    "cogvideox-5b": COG | dict(dim=3072, depth=42, heads=48, positions="fitted", physical_blocks="6,13,20,27,34,41"),
    "cogvideox1.5-5b": COG | dict(dim=3072, depth=42, heads=48, positions="integer", fit_height=150, fit_width=150,
                                  patch_t=2, frames=81, height=768, width=1360, fps=16.0,
                                  physical_blocks="6,13,20,27,34,41"),
    "wan-1.3b": WAN | dict(dim=1536, depth=30, heads=12, ffn=8960, physical_blocks="4,9,14,19,24,29"),
    "wan-14b": WAN | dict(dim=5120, depth=40, heads=40, ffn=13824, physical_blocks="9,19,29,39"),
    "debug": dict(frames=4, height=16, width=16, patch=4, dim=32, depth=2, heads=2, time_dim=16,
                  physical_blocks="0,1", semantic_experts=4, refinement_experts=4, world_clips=64, val_clips=8,
                  batch_size=8, base_steps=30, physics_steps=20, warmup=5, ema=0.9, precision="fp32",
                  compile="off", log_every=5, eval_every=25, save_every=25, preview_every=0, preview_steps=4),
}
PRESETS["full"] = PRESETS["cogvideox-5b"]  # the paper's larger backbone
CHOICES = {
    "device": ("auto", "cuda", "mps", "cpu"), "precision": ("auto", "fp32", "bf16"), "compile": ("auto", "on", "off"),
    "ood": ("", "speed", "radius", "gravity"), "categories": (17, 29), "process": ("flow", "vpred"),
    "predict": ("x", "v", "eps"), "lineage": ("cogvideox", "wan"), "positions": ("both", "integer", "fitted", "sincos"),
    "injection": ("zero", "plain"), "coarse_loss": ("relative", "bce"), "reduction": ("mean", "sum"),
    "background": ("subtract", "divide", "none"), "optimizer": ("muon", "adamw"), "schedule": ("linear", "constant"),
}
MAY_BE_ZERO = {"seed", "threads", "stop_at", "world_seed", "base_steps", "physics_steps", "warmup", "weight_decay",
               "preview_every", "guidance", "time_mean", "coarse_weight", "fine_weight", "balance_weight", "negatives",
               "decoys", "two", "caption_dropout", "ema", "text_dim", "ffn", "map_rank",
               "lora_rank", "lora_alpha"}
MAY_CHANGE = {"out_dir", "resume", "dry_run", "stop_at", "log_every", "eval_every", "save_every", "preview_every",
              "preview_steps", "guidance", "base_steps", "physics_steps", "pool_dir"}  # on --resume; others are fixed


def check(cfg: Config) -> Config:
    """Return cfg, or raise UserError with the first broken rule in one sentence."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if f.name in CHOICES and value not in CHOICES[f.name]:
            choices = ", ".join(str(c) or "(empty)" for c in CHOICES[f.name])
            raise UserError(f"--{f.name} must be one of {choices}, not {value!r}.")
        if f.type in (int, float) and f.name not in CHOICES:
            if f.type is int and abs(value) >= 2**63:
                raise UserError(f"--{f.name} is too large a number.")
            least = -math.inf if f.name == "time_mean" else 0
            if not math.isfinite(value) or value < least or (value == 0 and f.name not in MAY_BE_ZERO):
                right = "a finite number" if least else "zero or more" if f.name in MAY_BE_ZERO else "more than zero"
                raise UserError(f"--{f.name} must be {right}, not {value}.")
    for name in ("decoys", "two", "caption_dropout", "ema"):
        if getattr(cfg, name) > 1 or (name == "ema" and cfg.ema == 1):
            raise UserError(f"--{name} is a share and must lie between 0 and 1, not {getattr(cfg, name)}.")
    if cfg.latent:
        check_latent(cfg)
    else:
        for size, patch in (("frames", "patch_t"), ("height", "patch"), ("width", "patch")):
            if getattr(cfg, size) % getattr(cfg, patch):
                raise UserError(f"--{size} {getattr(cfg, size)} does not divide into patches of {getattr(cfg, patch)} "
                                f"(--{patch}).")
        if not cfg.data_dir and not (16 <= cfg.height <= 128 and 16 <= cfg.width <= 128 and 2 <= cfg.frames <= 256):
            raise UserError(f"The world draws 16 to 128 pixels and 2 to 256 frames, not {cfg.frames} x {cfg.height} x "
                            f"{cfg.width}.")
    if cfg.dim % cfg.heads or (cfg.dim // cfg.heads) % 16:
        raise UserError(f"--dim / --heads must be a multiple of 16, not {cfg.dim} / {cfg.heads}.")
    if cfg.time_dim % 2:
        raise UserError(f"--time_dim must be even, not {cfg.time_dim}.")
    if not re.fullmatch(r"\s*(\d+\s*(,\s*\d+\s*)*)?", cfg.physical_blocks):
        raise UserError(f"--physical_blocks is a list such as 1,3,5, not {cfg.physical_blocks!r}.")
    if not set(cfg.lora_targets.split(",")) <= {"to_q", "to_k", "to_v", "to_out"}:
        raise UserError(f"--lora_targets is a list of to_q, to_k, to_v, to_out, not {cfg.lora_targets!r}.")
    at = cfg.physical_at
    if list(at) != sorted(set(at)) or any(i >= cfg.depth for i in at):
        raise UserError(f"--physical_blocks must rise and stay below --depth {cfg.depth}, not {cfg.physical_blocks!r}.")
    if cfg.physics_steps and not at and not cfg.lora_rank:
        raise UserError("Stage two has nothing to train: give --physical_blocks or --lora_rank, or --physics_steps 0 "
                        "for the backbone alone.")
    if cfg.init_from and not cfg.physics_steps:
        raise UserError("--init_from starts at stage two, which --physics_steps 0 leaves out.")
    if not cfg.init_from and not cfg.base_steps and not cfg.latent:
        raise UserError("Stage two needs a trained backbone: give --base_steps, or --init_from RUN.")
    if cfg.top_k > cfg.refinement_experts:
        raise UserError(f"--top_k {cfg.top_k} is more than --refinement_experts {cfg.refinement_experts}.")
    if cfg.process == "vpred" and cfg.preview_steps > 1000:
        raise UserError(f"--process vpred has 1000 steps; --preview_steps {cfg.preview_steps} cannot be taken.")
    pairs = cfg.physics_steps and cfg.semantic and at and cfg.coarse_weight and cfg.coarse_loss == "relative"
    if cfg.batch_size == 1 and pairs:
        raise UserError("--batch_size 1 leaves L_coarse no pair of clips to compare: use more, or --coarse_loss bce, "
                        "or --coarse_weight 0.")
    if cfg.ood and cfg.data_dir:
        raise UserError("--ood is for the world; videos from --data_dir are as they are.")
    return cfg


def check_latent_size(cfg: Config) -> None:
    """What VAE and patches can cut. Raises UserError."""
    if (cfg.frames - 1) % 4 or cfg.height % (8 * cfg.patch) or cfg.width % (8 * cfg.patch):
        raise UserError(f"An official model needs 1 + 4 m frames and sides that divide by {8 * cfg.patch}, not "
                        f"{cfg.frames} x {cfg.height} x {cfg.width}.")


def check_latent(cfg: Config) -> None:
    """The rules of training on latents. Raises UserError."""
    check_latent_size(cfg)
    if not cfg.text_dim:
        raise UserError("--latent needs --text_dim: text embeddings come from the cache, as latents do.")
    if not cfg.dry_run and not (cfg.weights and cfg.cache):
        raise UserError(f"{cfg.config} needs --weights DIR (an official model) and --cache DIR (encode.py makes it), "
                        "or --dry_run.")
    if cfg.base_steps or cfg.init_from or cfg.data_dir:
        raise UserError("An official backbone comes from --weights and its clips from --cache: --base_steps, "
                        "--init_from and --data_dir are for models trained here.")


# --- the command line -------------------------------------------------------------------------------------------------
@functools.cache
def meanings(cls) -> dict[str, str]:
    """{field: its trailing comment} of a dataclass, read from its source so that each meaning is written once."""
    return dict(re.findall(r"^    (\w+): [^=\n]+? = .*?  # (.*)$", inspect.getsource(cls), re.M))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one sentence instead of a usage page."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]}; --help lists every flag.")


def flag(default, choices: tuple = (), name: str = ""):
    """A field with choices, or whose flag has another name than the field (where Config has that one)."""
    make = {"default_factory": list} if default == [] else {"default": default}
    return dataclasses.field(**make, metadata={"choices": choices, "flag": name})


def add_flags(parser: Parser, cls, leave_out: set[str] = frozenset()) -> None:
    """Every field of a dataclass as a flag. Its type (int, float, str, bool, `int | None`, list[str]: may be given
    several times) says how the text is read, its trailing comment is the help."""
    for f in dataclasses.fields(cls):
        if f.name in leave_out:
            continue
        default = [] if f.default is dataclasses.MISSING else f.default
        kind = next(t for t in (bool, int, float, str) if t.__name__ in str(f.type))
        how = dict(type=kind, metavar=kind.__name__.upper())
        if kind is bool:
            how = dict(type=boolean, nargs="?", const=True, metavar="true|false")
        elif default == []:
            how["action"] = "append"
        if f.metadata.get("choices"):
            how = dict(type=kind, choices=f.metadata["choices"])
        meaning = f"{meanings(cls)[f.name]} [{default}]".replace("%", "%%")
        # SUPPRESS: only flags that were given reach the namespace; they override the preset and nothing else does.
        flag_name = f.metadata.get("flag") or f.name
        parser.add_argument(f"--{flag_name}", dest=f.name, default=argparse.SUPPRESS, help=meaning, **how)


def parse(argv: list[str], description: str) -> "Config":
    """Command line -> checked Config: the preset's values, then the flags given. Raises UserError."""
    return parse_with(None, argv, description)[1]


def parse_flags(cls, argv: list[str], description: str):
    """Command line -> an instance of a command's own frozen dataclass of flags. Raises UserError.

    A dataclass with a method `check()` has it called: it raises UserError with the first broken rule.
    """
    parser = Parser(description)
    add_flags(parser, cls)
    return checked(cls(**vars(parser.parse_args(argv))))


def parse_with(cls, argv: list[str], description: str):
    """Command line -> (an instance of cls, or None; checked Config): for a command that has flags of its own beside
    those of the Config. A flag of cls hides the Config's of the same name. Raises UserError."""
    parser, own = Parser(description), {f.name for f in dataclasses.fields(cls)} if cls else set()
    if cls:
        add_flags(parser, cls)
        own |= {f.metadata.get("flag") or f.name for f in dataclasses.fields(cls)}
    parser.add_argument("--config", default=argparse.SUPPRESS, help=f"preset: {', '.join(PRESETS)} [small]")
    add_flags(parser, Config, {"config"} | own)
    given = vars(parser.parse_args(argv))
    mine = {f.name: given.pop(f.name) for f in dataclasses.fields(cls) if f.name in given} if cls else {}
    cfg = preset(**given)
    if cfg.resume:  # fields that were not given again are as the run was started
        cfg = dataclasses.replace(load(cfg.run_dir / "config.json"), **given)
    return checked(cls(**mine)) if cls else None, check(cfg)


def checked(flags):
    """These flags, once their own rules hold. Raises UserError."""
    if hasattr(flags, "check"):
        flags.check()
    return flags


# --- random numbers ---------------------------------------------------------------------------------------------------
STREAMS = {  # each draw of the project has a number of its own, so that none depends on another
    "time": 0, "noise": 1, "caption dropout": 2, "order": 3, "scored scenes": 4, "latent": 5, "held-out latent": 6,
    "lessons": 11, "shuffle": 17}


def stream(seed: int, name: str, *index: int):
    """numpy's generator for one draw: a function of the run's seed, what is drawn, and where, so that nothing depends
    on batch size, world size or restarts."""
    return np.random.default_rng([seed, STREAMS[name], *index])


# --- presets and run folders ------------------------------------------------------------------------------------------
def preset(config: str = "small", **overrides) -> Config:
    """The named preset with some fields replaced. Unchecked."""
    if config not in PRESETS:
        raise UserError(f"There is no preset {config!r}; there are {', '.join(PRESETS)}.")
    return Config(**{**PRESETS[config], **overrides, "config": config})


def load(path: Path) -> Config:
    """Config of a run folder's config.json (extra keys such as the git revision are ignored). Raises UserError."""
    try:
        stored = json.loads(path.read_text())
        known = [f for f in dataclasses.fields(Config) if f.name in stored]  # a field added since has its default
        return Config(**{f.name: f.type(stored[f.name]) for f in known})
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}.") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as e:
        raise UserError(f"{path} is not a config of this version ({type(e).__name__}: {e}).") from None


def entry(main, *args) -> None:
    """Run main(*args) as a program: UserError exits 2, Stopped exits 1, both with one sentence and no traceback."""
    try:
        main(*args)
    except UserError as e:
        sys.exit(_say(e, 2))
    except Stopped as e:
        sys.exit(_say(e, 1))
    except KeyboardInterrupt:  # outside the training loop, which saves first
        sys.exit(_say(Stopped("Interrupted."), 130))
    except BrokenPipeError:  # `python evaluate.py | head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _say(error: Exception, code: int) -> int:
    print(error, file=sys.stderr)
    return code

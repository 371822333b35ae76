"""Every knob of nanoProPhy, once: a frozen dataclass, named presets, flags made from its fields.

A field's line says all that is known of it: default, choices, range, where others must agree in it,
and its meaning, which `--help` prints. `parse` turns the command line into a checked `Config`;
`check` asks rules.py for what ties fields together. Any other command has a small dataclass of its own
for `parse_flags` or `parse_with`. Nothing here imports torch, so a typo costs no start-up.
"ours" marks a value that the paper (arXiv 2512.05564) does not state.
"""
import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import textwrap
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rules


class UserError(Exception):
    """The user must change something before work can start: one sentence on stderr, exit code 2."""


class Stopped(Exception):
    """Work had to stop half-way (full disk, diverged loss): one sentence on stderr, exit code 1."""


# --- what a field may be marked with --------------------------------------------------------------
NETWORK = "network"  # shapes the backbone: weights, and a branch beside them, must agree in it
INIT = "init"  # --init_from takes the backbone of a run only where this agrees too
BRANCH = "branch"  # shapes the branch or LoRA, or the clips that set the grid of the basis maps
CACHE = "cache"  # shapes the latents and text embeddings of a cache
MAY_CHANGE = "may change"  # may be given anew with --resume, where every other field is fixed
MAY_BE_ZERO = "may be zero"  # a number whose default is 0 may be zero too; others are above zero
SHARE = "share"  # a number from 0 to 1
SIGNED = "signed"  # may be below zero
# A number among the marks is the most that the field may be. Without one, it is:
MOST = 10**6
MOST_SEED = 2**63 - 1  # of fields with "seed" in their name: torch reads no larger ones


def flag(default, choices: tuple = (), marks: tuple = (), words: int | str = 1):
    """A field with choices or marks. One whose default is [] takes so many words ("+": one or more)
    each time its flag is given."""
    metadata = {"choices": choices, "marks": marks, "words": words}
    if default == []:
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def knob(default, *marks: str | int, choices: tuple = ()):
    """A field of Config with marks or choices."""
    return flag(default, choices, marks)


@dataclass(frozen=True)
class Config:
    """All that a run of train.py depends on; a run folder's config.json holds it."""
    # --- the run
    config: str = "small"  # name of the preset the other fields start from
    out_dir: str = knob("", MAY_CHANGE)  # run folder; empty = runs/<config>
    seed: int = 0  # weights, noise, clip order and caption dropout
    device: str = knob("auto", choices=("auto", "cuda", "mps", "cpu"))  # auto = cuda, else mps, else cpu
    threads: int = knob(0, 1024)  # CPU threads; 0 = every core
    precision: str = knob("auto", choices=("auto", "fp32", "bf16"))  # bf16: autocast; weights stay fp32
    compile: str = knob("auto", choices=("auto", "on", "off"))  # torch.compile of the blocks
    resume: bool = knob(False, MAY_CHANGE)  # go on from the newest checkpoint in out_dir
    weights: str = ""  # folder of official weights (diffusers layout): the backbone of stage two
    init_from: str = ""  # run folder whose trained backbone is taken, so that stage one is skipped
    dry_run: bool = knob(False, MAY_CHANGE)  # print parameters, FLOPs, memory of a step, and stop
    stop_at: int = knob(0, MAY_CHANGE)  # save and stop after so many steps, as Ctrl-C would; 0 = end

    # --- backbone
    lineage: str = knob(  # cogvideox (joint attention with the text) | wan (cross-attention to it)
        "cogvideox", NETWORK, CACHE, choices=("cogvideox", "wan"))
    dim: int = knob(128, NETWORK, 2**15)  # width D
    depth: int = knob(6, NETWORK, 1000)  # blocks
    heads: int = knob(4, NETWORK)  # attention heads; dim / heads must divide by 16 for 3-axis RoPE
    ffn: int = knob(0, NETWORK)  # hidden width of the feed-forward; 0 = 4 D
    time_dim: int = knob(32, NETWORK)  # cogvideox: width of the time embedding for the expert adaLN
    freq_dim: int = 128  # wan: sines and cosines of the time
    text_dim: int = knob(0, NETWORK, CACHE)  # of stored embeddings (T5: 4096); 0 = learned words
    text_len: int = knob(24, NETWORK, CACHE, 2**13)  # text tokens; longer captions are cut with a warning
    text_depth: int = knob(1, INIT, 1000)  # blocks of the encoder of learned words, in place of T5
    latent: bool = False  # work on latents of a VAE that shrinks time by 4, height and width by 8
    channels: int = knob(3, NETWORK, CACHE)  # of a pixel, or of a latent (16)
    patch_t: int = knob(2, NETWORK)  # frames a token
    patch: int = knob(8, NETWORK)  # pixels of a token's side
    positions: str = knob(  # both (added and rotated, ours) | integer (rotated) | fitted (5B) | sincos (2B)
        "both", NETWORK, choices=("both", "integer", "fitted", "sincos"))
    fit_height: int = 30  # fitted: rows of tokens it was trained on
    fit_width: int = 45  # fitted: columns

    # --- physical branch
    physical_blocks: str = knob("1,3,5", BRANCH)  # those with a physical block (ours); empty = none
    train_physical: bool = True  # false = physical blocks stay copies, so that experts learn alone
    semantic: bool = knob(True, BRANCH)  # Semantic Expert Block (Eq. 1)
    refinement: bool = knob(True, BRANCH)  # Refinement Expert Block (Eq. 2)
    injection: str = knob(  # place (of its neighbour; ours) | zero (linear from zero) | plain (bare +)
        "place", BRANCH, choices=("place", "zero", "plain"))
    semantic_experts: int = knob(8, BRANCH, 2**12)  # E_s (ours)
    refinement_experts: int = knob(16, BRANCH, 2**12)  # E_r (ours): more than the world has phenomena
    top_k: int = knob(2, BRANCH)  # experts a token (ours)
    map_rank: int = knob(0, BRANCH)  # factors of a basis map (ours); 0 = full maps, as the paper's
    semantic_temperature: float = knob(1.0, BRANCH)  # of the semantic router's softmax (ours)
    renormalise: bool = knob(True, BRANCH)  # divide chosen probabilities by their sum (ours)
    categories: int = knob(  # 17 laws of WISA | 29 with its "no obvious", camera and state slots
        17, BRANCH, choices=(17, 29))
    lora_rank: int = knob(0, BRANCH)  # LoRA on the backbone's blocks, the paper's rival; 0 = none
    lora_alpha: float = knob(0.0, BRANCH)  # LoRA is scaled by alpha / rank; 0 = rank
    lora_targets: str = knob("to_q,to_k,to_v,to_out", BRANCH)  # linear layers that get one

    # --- diffusion
    process: str = knob(  # flow (rectified flow) | vpred (CogVideoX: scaled-linear, zero terminal SNR)
        "flow", INIT, choices=("flow", "vpred"))
    predict: str = knob(  # what the network outputs under flow; the loss is always weighted as v
        "x", INIT, choices=("x", "v", "eps"))
    time_mean: float = knob(0.0, SIGNED)  # flow: t = sigmoid(N(mean, std)); above 0: more noise
    time_std: float = 1.2  # flow: spread of the logit-normal times
    shift: float = 3.0  # flow: t -> s t / (1 + (s - 1) t); more noise, where captions decide
    snr_shift: float = 1.0  # vpred: CogVideoX-2B has 3, 5B has 1

    # --- losses (Eq. 6)
    coarse_weight: float = knob(0.1, MAY_BE_ZERO)  # of L_coarse
    fine_weight: float = knob(0.02, MAY_BE_ZERO)  # of L_fine_align
    balance_weight: float = knob(0.01, MAY_BE_ZERO)  # of L_fine_balance
    semantic_balance_weight: float = 0.0  # of an even use of the semantic experts (ours)
    coarse_loss: str = knob("relative", choices=("relative", "bce"))  # Eq. 3-4 | ablation's rival
    reduction: str = knob("mean", choices=("mean", "sum"))  # of L_coarse, L_fine_align; sum = as printed
    teacher: str = ""  # maps of teacher.py: a folder, or the world's by name; empty = exact masks
    background: str = knob(  # maps against a generic question's: subtract (paper) | divide | none
        "subtract", choices=("subtract", "divide", "none"))
    # `negatives` has two meanings. With the world's exact masks it is the weight of the phenomena
    # that a clip does not show: their maps should be zero everywhere. With a teacher's maps it is
    # the weight of a small pull to zero at those tokens of a shown phenomenon that are not positive.
    negatives: float = 0.0  # masks: weight of absent phenomena; maps: pull to zero; 0 = paper

    # --- clips
    data_dir: str = ""  # folder of videos; empty = the physics world of world.py
    base_data_dir: str = ""  # folder of general videos for stage one; empty = data_dir for both
    cache: str = ""  # folder of latents and text embeddings by encode.py, for official models
    annotations: str = ""  # captions or a WISA list: .json, .jsonl, .csv; empty = the folder's
    frames: int = knob(12, BRANCH, CACHE, 2**14)  # frames a clip
    height: int = knob(32, BRANCH, CACHE, 2**14)  # pixels
    width: int = knob(32, BRANCH, CACHE, 2**14)  # pixels
    fps: float = knob(8.0, BRANCH, 1000)  # frames a second of a video; a world clip lasts one second
    windows: int = 4  # clips cut from one long video at most
    pool_dir: str = knob("data", MAY_CHANGE)  # where drawn or decoded clips wait for like runs
    world_clips: int = knob(12000, 10**7)  # clips of the world in the pool
    world_seed: int = 0  # which world; runs of several seeds share one
    decoys: float = knob(0.6, SHARE)  # share of scenes with a still object that looks like an actor
    two: float = knob(0.4, SHARE)  # share of scenes with two phenomena
    colour_cues: bool = False  # each phenomenon in a colour of its own: an easier world
    ood: str = knob("", choices=("", "speed", "radius", "gravity"))  # draw this outside its usual range
    physics: str = knob(  # stage one's world: true | weak (slower, forwards or backwards) | still
        "weak", choices=("true", "weak", "still"))
    val_clips: int = 64  # held-out clips for the validation loss
    caption_dropout: float = knob(0.1, SHARE)  # share of captions emptied, for guidance

    # --- training
    base_steps: int = knob(1000, MAY_CHANGE, MAY_BE_ZERO)  # stage one: the backbone alone
    physics_steps: int = knob(1200, MAY_CHANGE, MAY_BE_ZERO)  # stage two: the branch beside it
    checkpointing: bool = False  # keep only each block's input and compute it again going backward
    keep_attention: bool = knob(False, MAY_CHANGE)  # checkpointing, but attention is not computed again
    freeze_backbone: bool = True  # stage two trains the branch only, as the paper does
    batch_size: int = knob(16, 2**14)  # clips a step, of all processes
    micro_batch: int = knob(0, MAY_CHANGE)  # clips a process takes at once; 0 = all of its share
    optimizer: str = knob("muon", choices=("muon", "adamw"))  # muon: block matrices, AdamW the rest
    lr: float = 4e-3  # peak, stage one
    physics_lr: float = 4e-3  # peak, stage two
    schedule: str = knob("linear", choices=("linear", "constant"))  # after warm-up; linear: to zero
    warmup: int = knob(50, MAY_BE_ZERO)  # steps from zero to the peak, each stage
    weight_decay: float = knob(0.01, MAY_BE_ZERO)  # on matrices
    clip: float = 1.0  # gradient norm
    ema: float = knob(0.998, SHARE)  # decay of the averaged weights that are sampled
    log_every: int = knob(10, MAY_CHANGE)  # steps
    eval_every: int = knob(500, MAY_CHANGE)  # steps between validation losses
    save_every: int = knob(500, MAY_CHANGE)  # steps between checkpoints
    preview_every: int = knob(1000, MAY_CHANGE, MAY_BE_ZERO)  # steps between GIFs; 0 = at the end
    preview_steps: int = knob(25, MAY_CHANGE, 10**4)  # sampling steps of a preview
    guidance: float = knob(1.5, MAY_CHANGE, MAY_BE_ZERO)  # classifier-free, of previews; 1 = off
    report: bool = knob(True, MAY_CHANGE)  # write report.html, a page to look at, at the end

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens along time, height and width."""
        frames, height, width = self.frames, self.height, self.width
        if self.latent:  # the first frame stands alone; CogVideoX 1.5 pads to an even number
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


def marked(mark: str) -> tuple[str, ...]:
    """The fields of Config that carry this mark, in the order in which they stand there."""
    return tuple(f.name for f in dataclasses.fields(Config) if mark in f.metadata.get("marks", ()))


CHOICES = {f.name: f.metadata["choices"] for f in dataclasses.fields(Config)
           if f.metadata.get("choices")}  # for commands that have the same flag


# --- presets and run folders ----------------------------------------------------------------------
OFFICIAL = dict(
    latent=True, channels=16, text_dim=4096, patch=2, patch_t=1, predict="v", map_rank=64,
    batch_size=2, base_steps=0, physics_steps=2000, optimizer="adamw", lr=1e-5, physics_lr=1e-5,
    weight_decay=1e-4, warmup=100, schedule="constant", preview_steps=50, checkpointing=True)
COG = OFFICIAL | dict(
    lineage="cogvideox", text_len=226, time_dim=512, process="vpred", guidance=6.0,
    frames=49, height=480, width=720, fps=8.0)
WAN = OFFICIAL | dict(
    lineage="wan", text_len=512, freq_dim=256, positions="integer", shift=5.0, guidance=5.0,
    frames=81, height=480, width=832, fps=16.0)
# Two CPU cores, about 15 minutes. Why these values: docs/experiments.md.
SMALL = dict(
    physical_blocks="0,1,2,3,4,5", semantic_experts=16,
    semantic_temperature=4.0, semantic_balance_weight=0.005, negatives=0.3, fine_weight=0.1)
PRESETS = {
    "small": SMALL,
    "small-wan": SMALL | dict(lineage="wan"),
    # Official models: their architecture is exact; branch, optimizer and schedule are ours.
    "cogvideox-2b": COG | dict(
        dim=1920, depth=30, heads=30, positions="sincos", snr_shift=3.0,
        physical_blocks="4,9,14,19,24,29"),
    "cogvideox-5b": COG | dict(
        dim=3072, depth=42, heads=48, positions="fitted", physical_blocks="6,13,20,27,34,41"),
    "cogvideox1.5-5b": COG | dict(
        dim=3072, depth=42, heads=48, positions="integer", fit_height=150, fit_width=150,
        patch_t=2, frames=81, height=768, width=1360, fps=16.0, physical_blocks="6,13,20,27,34,41"),
    "wan-1.3b": WAN | dict(
        dim=1536, depth=30, heads=12, ffn=8960, physical_blocks="4,9,14,19,24,29"),
    "wan-14b": WAN | dict(dim=5120, depth=40, heads=40, ffn=13824, physical_blocks="9,19,29,39"),
    "debug": dict(
        frames=4, height=16, width=16, patch=4, dim=32, depth=2, heads=2, time_dim=16,
        physical_blocks="0,1", semantic_experts=4, refinement_experts=4, world_clips=64,
        val_clips=8, batch_size=8, base_steps=30, physics_steps=20, warmup=5, ema=0.9,
        precision="fp32", compile="off", log_every=5, eval_every=25, save_every=25,
        preview_every=0, preview_steps=4),
}
PRESETS["full"] = PRESETS["cogvideox-5b"]  # the paper's larger backbone


def preset(config: str = "small", **overrides) -> Config:
    """The named preset with some fields replaced. Unchecked."""
    if config not in PRESETS:
        raise UserError(f"There is no preset {config!r}; there are {', '.join(PRESETS)}.")
    return Config(config=config, **PRESETS[config] | overrides)


def load(path: Path) -> Config:
    """Config of a run folder's config.json. Raises UserError. A field that was added since the run
    has its default; other keys, such as the git revision, are ignored."""
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict) or "config" not in stored:  # every version has written it
            raise ValueError("it names no preset")
        cfg = Config(**stored_fields(stored))
        check_fields(cfg)
        return cfg
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}.") from None
    except (OSError, ValueError, RecursionError, UserError) as e:
        raise UserError(f"{path} is not a config of this version: {str(e).rstrip('.')}.") from None


def stored_fields(stored: dict) -> dict:
    """The fields of Config among what a file has stored. Raises UserError for a wrong type."""
    kinds = {f.name: f.type for f in dataclasses.fields(Config) if f.name in stored}
    for name, kind in kinds.items():
        value = stored[name]
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise UserError(f"--{name} must be of type {kind.__name__}, not {value!r}.")
    return {name: stored[name] for name in kinds}


# --- rules ----------------------------------------------------------------------------------------
def check(cfg: Config) -> Config:
    """Return cfg, or raise UserError with the first broken rule in one sentence."""
    check_fields(cfg)
    if cfg.latent:
        check_latent_size(cfg)
    of_clips = rules.latent_rules if cfg.latent else rules.pixel_rules
    for some in (of_clips, rules.model_rules, rules.training_rules):
        for broken, sentence in some(cfg):
            if broken:
                raise UserError(sentence)
    return cfg


def check_fields(flags) -> None:
    """Each field of Config, or of a command's flags, by itself: its choices, or its range."""
    for f in dataclasses.fields(flags):
        value, choices = getattr(flags, f.name), f.metadata.get("choices")
        if choices and value not in (*choices, f.default):
            listed = ", ".join(str(choice) or "(empty)" for choice in choices)
            raise UserError(f"--{f.name} must be one of {listed}, not {value!r}.")
        if choices or type(value) not in (int, float):
            continue
        marks = f.metadata.get("marks", ())
        most = next((mark for mark in marks if type(mark) is int), MOST)
        if "seed" in f.name:
            most = MOST_SEED
        if SIGNED in marks:
            right, words = abs(value) <= most, f"a finite number within {most:,}"
        elif SHARE in marks:
            right, words = 0 <= value <= 1, "a share between 0 and 1"
        elif MAY_BE_ZERO in marks or not f.default:
            right, words = value >= 0, "0 or more"
        else:
            right, words = value > 0, "1 or more" if type(value) is int else "more than zero"
        if not right or not -math.inf < value < math.inf:
            raise UserError(f"--{f.name} must be {words}, not {value}.")
        if value > most:
            raise UserError(f"--{f.name} must be {most:,} or less, not {value}.")


def check_given(flags, given: dict) -> None:
    """Is every flag of a command line used? flags: the Config, or a command's flags, whose class
    may have a table IDLE as rules.py has it. Raises UserError."""
    table = rules.IDLE if isinstance(flags, Config) else getattr(flags, "IDLE", ())
    for name, conditions in rules.idle(flags, given, table):
        raise UserError(f"--{name} changes something only {conditions}.")


def check_latent_size(cfg: Config) -> None:
    """What VAE and patches can cut. Raises UserError."""
    side = 8 * cfg.patch
    if (cfg.frames - 1) % 4 or cfg.height % side or cfg.width % side:
        raise UserError(f"An official model needs 1 + 4 m frames and sides that divide by {side}, "
                        f"not {cfg.frames} x {cfg.height} x {cfg.width}.")


# --- the command line -----------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one sentence instead of a usage page."""

    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]}; --help lists every flag.")


@functools.cache
def meanings(cls) -> dict[str, str]:
    """{field: its trailing comment} of a dataclass, read from its source so that each meaning is
    written once. Where a field takes two lines, the first one has the comment."""
    source = textwrap.dedent(inspect.getsource(cls))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))


def boolean(text: str) -> bool:
    """True or false, from the word. Raises ValueError for any other."""
    return bool(("false", "true").index(text.lower()))


def read_flags(argv: list[str], description: str, *classes) -> dict:
    """{flag: value} of what a command line gives of the fields of these dataclasses. Where two have
    a field of the same name, the flag is the first one's.

    The type (int, float, str, bool, `int | None`, list[str]) says how the text is read. Of a bool
    the flag alone means true, and `--x false` can be said. Only flags that were given are in the
    answer (SUPPRESS): they override a preset, and nothing else does.
    """
    presets = f"Presets for --config: {', '.join(PRESETS)}." if Config in classes else None
    parser = Parser(description=description, epilog=presets, usage="%(prog)s [flags]",
                    allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    added = set()
    for cls, f in [(cls, f) for cls in classes for f in dataclasses.fields(cls)]:
        if f.name in added:
            continue
        added.add(f.name)

        # A list or an `int | None` is read as what stands inside it.
        kind = (*typing.get_args(f.type), f.type)[0]
        choices = [str(choice) for choice in f.metadata.get("choices", ()) if choice != ""]
        how = dict(type=kind, metavar="|".join(choices) or kind.__name__.upper())
        if kind is bool:
            how = dict(type=boolean, metavar="true|false", nargs="?", const=True)
        default = f.default
        if typing.get_origin(f.type) is list:
            how |= dict(action="extend", nargs=f.metadata["words"])
            default = ""

        # The help is the field's meaning, and its default in brackets; a list has none.
        meaning = f"{meanings(cls)[f.name]} [{default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", help=meaning, **how)
    return vars(parser.parse_args(argv))


def take_flags(cls, given: dict):
    """Move the flags of cls out of those given, into a checked instance. Raises UserError."""
    names = [f.name for f in dataclasses.fields(cls)]
    own = {name: given.pop(name) for name in names if name in given}
    flags = cls(**own)
    check_fields(flags)
    if hasattr(flags, "check"):
        flags.check()
    check_given(flags, own)
    return flags


def parse_flags(cls, argv: list[str], description: str):
    """Command line -> an instance of a command's own frozen dataclass of flags. Raises UserError.
    A dataclass with a method `check()` has it called: it holds the rules that tie its fields."""
    return take_flags(cls, read_flags(argv, description, cls))


def parse_with(cls, argv: list[str], description: str):
    """Command line -> (an instance of cls, checked Config): for a command that has flags of its own
    beside those of Config. A flag of cls hides Config's of the same name, and `cls.READS` may name
    the fields of Config that the command reads. Raises UserError."""
    given = read_flags(argv, description, cls, Config)
    flags = take_flags(cls, given)
    unread = set(given) - set(getattr(cls, "READS", " ".join(given)).split())
    if unread:
        raise UserError(f"--{min(unread)} changes nothing here: it is for other commands.")
    cfg = preset(**given)
    if cfg.resume:  # fields that were not given again are as the run was started
        cfg = dataclasses.replace(load(cfg.run_dir / "config.json"), **given)
    check(cfg)
    if not (cfg.resume or cfg.dry_run):  # a run may be resumed by its own command line again
        check_given(cfg, given)
    return flags, cfg


def parse(argv: list[str], description: str) -> Config:
    """Command line -> checked Config: a preset's values, then the flags given. Raises UserError."""
    return parse_with(dataclasses.make_dataclass("NoFlags", ()), argv, description)[1]


def rank() -> tuple[int, int]:
    """(number of this process from 0, how many torchrun started to share the work); (0, 1) without
    torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def only_one_process() -> None:
    """Raises UserError under torchrun, for what its processes would do several times over."""
    if rank()[1] > 1:
        raise UserError("This is no work to share: start it with python, not with torchrun, which is "
                        "for train.py, encode.py, teacher.py and sample.py --prompts FILE --out DIR.")


def entry(main, *args, ranks: bool = False) -> None:
    """Run main(*args) as a program: a UserError exits 2, Stopped 1, both with one sentence.

    ranks: may processes of torchrun share its work?
    """
    for terminal in (sys.stdout, sys.stderr):  # half a character, or a name that is not UTF-8
        if hasattr(terminal, "reconfigure"):
            terminal.reconfigure(errors="backslashreplace")
    try:
        if not ranks:
            only_one_process()
        return main(*args)
    except (UserError, Stopped) as e:
        sentence, code = e, 2 if isinstance(e, UserError) else 1
        if getattr(e, "said", False):  # by the first of several processes
            sys.exit(code)
    except KeyboardInterrupt:  # outside the training loop, which saves first
        sentence, code = "Interrupted.", 130
    except BrokenPipeError:  # `python evaluate.py | head`
        return signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(sentence, file=sys.stderr)
    sys.exit(code)


# --- random numbers -------------------------------------------------------------------------------
STREAMS = {  # one number per kind of draw; previews share "noise" with training, at their own indices
    "time": 0, "noise": 1, "caption dropout": 2, "order": 3, "scored scenes": 4, "latent": 5,
    "held-out latent": 6, "lessons": 11, "shuffle": 17}


def stream(seed: int, name: str, *index: int):
    """A generator of numpy for one draw: a function of the run's seed, what is drawn, and where, so
    that nothing depends on batch size, world size or restarts."""
    return np.random.default_rng([seed, STREAMS[name], *index])

"""Which fields of a Config, and which flags of sample.py, go together: broken rules as sentences, and
flags that nothing reads.

config.py and sample.py ask this file. Nothing here knows their classes, only the fields of these.
"""
import re
from pathlib import Path

# Which flags are used only with, or without, another one: one condition of a row is enough, and
# where flags stand in several rows each of these must hold.
IDLE = (
    ("annotations windows base_data_dir", "with --data_dir"),
    ("base_data_dir", "with --physics_steps"),  # --data_dir is not read without
    ("weights cache", "with --latent"),
    ("fps", "with --data_dir or with --latent"),
    ("world_clips world_seed decoys two colour_cues ood physics", "without --data_dir"),
    ("world_clips world_seed decoys two colour_cues ood physics pool_dir text_depth preview_every "
     "preview_steps guidance", "without --latent"),
    ("negatives", "with --teacher or without --data_dir"),  # and with the world's masks
    ("background", "with --teacher"),
    ("time_dim", "with --lineage cogvideox"),
    ("freq_dim", "with --lineage wan"),
    ("fit_height fit_width", "with --positions fitted or with --latent"),
    ("snr_shift", "with --process vpred"),
    ("predict time_mean time_std shift", "with --process flow"),
    ("base_steps lr physics base_data_dir", "without --init_from"),  # which skips stage one
    ("keep_attention", "with --checkpointing"),
    ("lora_alpha lora_targets", "with --lora_rank"),
    ("train_physical injection semantic_experts semantic_temperature semantic_balance_weight "
     "refinement_experts top_k map_rank coarse_weight coarse_loss fine_weight balance_weight teacher",
     "with --physical_blocks"),
    ("semantic_experts semantic_temperature semantic_balance_weight map_rank coarse_weight coarse_loss",
     "with --semantic"),
    ("refinement_experts top_k renormalise fine_weight balance_weight teacher",
     "with --refinement"),
)


def idle(flags, given: dict, table: tuple):
    """Of the flags that were given a value, each that the table calls idle, and what would use it."""
    for names, conditions in table:
        used = False
        for how, name, value in re.findall(r"(with|without) --(\w+) ?(?!or )(\S*)", conditions):
            have = getattr(flags, name)
            used |= bool(str(have) == value if value else have) == (how == "with")
        yield from [(name, conditions) for name in names.split() if given.get(name) and not used]


# Each of the following yields its rules one after the other: is it broken, and what to say then.
def pixel_rules(cfg):
    """What patches can cut and the world can draw."""
    for size, patch in (("frames", "patch_t"), ("height", "patch"), ("width", "patch")):
        n, step = getattr(cfg, size), getattr(cfg, patch)
        yield n % step, f"--{size} {n} does not divide into patches of {step} (--{patch})."
    drawn = 16 <= cfg.height <= 128 and 16 <= cfg.width <= 128 and 2 <= cfg.frames <= 256
    yield not cfg.data_dir and not drawn, (
        "The world draws 16 to 128 pixels and 2 to 256 frames, not "
        f"{cfg.frames} x {cfg.height} x {cfg.width}.")
    yield cfg.ood and cfg.data_dir, (
        "--ood is for the world; videos from --data_dir are as they are.")


def latent_rules(cfg):
    """What training on latents needs."""
    yield not cfg.train_physical, (
        "--train_physical false is for models trained here: a published branch has its blocks.")
    yield not cfg.text_dim, (
        "--latent needs --text_dim: text embeddings come from the cache as well.")
    yield not cfg.dry_run and not (cfg.weights and cfg.cache), (
        f"{cfg.config} needs --weights DIR (an official model) and --cache DIR (encode.py makes "
        "it), or --dry_run.")
    yield cfg.base_steps or cfg.init_from or cfg.data_dir, (
        "An official backbone comes from --weights and its clips from --cache: --base_steps, "
        "--init_from and --data_dir are for models trained here.")


def model_rules(cfg):
    """What the backbone, and the branch beside it, can be built with."""
    yield cfg.dim % cfg.heads or (cfg.dim // cfg.heads) % 16, (
        f"--dim / --heads must be a multiple of 16, not {cfg.dim} / {cfg.heads}.")
    yield cfg.time_dim % 2, f"--time_dim must be even, not {cfg.time_dim}."
    blocks, targets = cfg.physical_blocks, cfg.lora_targets
    yield not re.fullmatch(r"\s*(\d+\s*(,\s*\d+\s*)*)?", blocks), (
        f"--physical_blocks is a list such as 1,3,5, not {blocks!r}.")
    yield not set(targets.split(",")) <= {"to_q", "to_k", "to_v", "to_out"}, (
        f"--lora_targets is a list of to_q, to_k, to_v, to_out, not {targets!r}.")
    at = cfg.physical_at
    yield list(at) != sorted(set(at)) or any(i >= cfg.depth for i in at), (
        f"--physical_blocks must rise and stay below --depth {cfg.depth}, not {blocks!r}.")
    experts = cfg.refinement_experts
    yield cfg.top_k > experts, (
        f"--top_k {cfg.top_k} is more than --refinement_experts {experts}.")


def training_rules(cfg):
    """What the two stages, the previews and L_coarse need."""
    total = cfg.base_steps + cfg.physics_steps
    yield total >= 10**6, (
        "A run has at most 999,999 steps, for its checkpoints are named by six digits, not "
        f"--base_steps {cfg.base_steps} and --physics_steps {cfg.physics_steps}.")
    branch = cfg.physical_at and (cfg.train_physical or cfg.semantic or cfg.refinement)
    nothing = not (branch or cfg.lora_rank) and cfg.freeze_backbone
    yield cfg.physics_steps and nothing, (
        "Stage two has nothing to train: give --physical_blocks or --lora_rank, or "
        "--freeze_backbone false to train all weights on, or --physics_steps 0 for the backbone "
        "alone.")
    yield cfg.init_from and not cfg.physics_steps, (
        "--init_from starts at stage two, which --physics_steps 0 leaves out.")
    yield not cfg.init_from and not cfg.base_steps and not cfg.latent, (
        "Stage two needs a trained backbone: give --base_steps or --init_from RUN.")
    yield cfg.ema == 1, "--ema 1 would keep the initial weights for ever: give less."
    steps = cfg.preview_steps
    yield cfg.process == "vpred" and steps > 1000, (
        f"--process vpred has 1000 steps; --preview_steps {steps} cannot be taken.")
    router = cfg.physics_steps and cfg.semantic and cfg.physical_at
    compares = cfg.coarse_weight and cfg.coarse_loss == "relative"
    yield router and compares and cfg.batch_size == 1, (
        "--batch_size 1 leaves L_coarse no pair of clips to compare: use more, or --coarse_loss "
        "bce, or --coarse_weight 0.")


# --- flags of sample.py -------------------------------------------------------------------------
COMPARED = ("with_and_without", "invert_experts", "expert")  # a picture shows two versions
OFFICIAL_ONLY = ("branch", "negative", "solver", "dynamic", "tiled", "frames", "height", "width")


def sample_rules(flags):
    """One model, one layout of a picture, and a file or a folder that can hold it."""
    yield not flags.run and not flags.weights, (
        "Say which model: --run DIR (made by train.py), or --weights DIR (an official one).")
    yield flags.run and flags.weights, (
        "Give --run or --weights, not both; what a run trained beside official weights is attached "
        "by --branch RUN/branch.safetensors.")
    only = [f"--{name}" for name in OFFICIAL_ONLY if getattr(flags, name)]
    yield only and not flags.weights, f"{', '.join(only)} belongs to --weights."

    # What is shown beside a clip, or in its place.
    compared = [f"--{name}" for name in COMPARED if getattr(flags, name)]
    need = ["--show_routing"] * flags.show_routing + compared
    listed = ", ".join(need)
    yield len(compared) > 1 or (flags.with_and_without and flags.show_routing), (
        f"Give one of {listed}: a picture has one layout and compares two versions.")
    yield flags.no_branch and need, f"{listed} needs the branch that --no_branch leaves out."
    yield flags.weights and need and not flags.branch, (
        f"{listed} needs a branch: give --branch, a file that train.py made.")
    yield flags.fills and (flags.show_routing or flags.with_and_without), (
        f"{listed} makes a picture: --out must end in .gif or .mp4.")

    # Where it goes.
    out = Path(flags.out or "clip.gif")
    yield not flags.fills and out.suffix.lower() not in (".gif", ".mp4"), (
        f"--out must end in .gif or .mp4, not {out.name!r}; with --prompts it may be a folder, "
        "without a dot in its name.")
    yield flags.names != "readable" and not flags.fills, (
        "--names is for the clips of --prompts FILE --out DIR.")
    yield flags.column != "caption" and not flags.prompts.lower().endswith(".csv"), (
        "--column is for --prompts FILE.csv.")
    for name in ("n", "steps", "batch"):
        yield getattr(flags, name) == 0, f"--{name} must be 1 or more, not 0."

"""Names in and out: the weights of somebody else's video transformer as ours, and ours as theirs.

    config.json        --read_config-->  Config and the naming of the tensors
    *.safetensors      --load_pretrained-->  a Backbone, filled tensor by tensor
    Backbone           --save_backbone-->  a folder that diffusers reads

Three layouts are known: diffusers' of CogVideoX, diffusers' of Wan, and Wan's original one (read
only). A naming is a list of regular expressions, each with an example beside it; the checkpoint's
names are published and do not change.
"""
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import config
from common.files import join_some, read_json, whole_file, write_text
from common.libraries import fingerprint, tensor_files
from common.checkpoints import same_architecture
from config import Config, Stopped, UserError
from model import MODELS, Backbone
from official.folder import check_index, network_folder, only_known

# Our name -> the checkpoint's, as regular expressions.
COG_NAMES = {
    r"^blocks\.": "transformer_blocks.",  # blocks.3.norm1 ...
    r"\.to_out\.": ".to_out.0.",
    r"\.ff\.0\.": ".ff.net.0.proj.",
    r"\.ff\.2\.": ".ff.net.2.",
    r"^time_embedding\.0\.": "time_embedding.linear_1.",
    r"^time_embedding\.2\.": "time_embedding.linear_2.",
    r"^patch_proj\.": "patch_embed.proj.",
    r"^text_proj\.": "patch_embed.text_proj.",
    r"^norm_out\.": "norm_out.norm.",
    r"^modulate_out\.": "norm_out.linear.",
}
WAN_NAMES = {
    r"\.to_out\.": ".to_out.0.",
    r"\.ff\.0\.": ".ffn.net.0.proj.",
    r"\.ff\.2\.": ".ffn.net.2.",
    r"(^|\.)table$": r"\1scale_shift_table",  # of each block, and of the head
    r"^patch_proj\.": "patch_embedding.",
    r"^text_proj\.0\.": "condition_embedder.text_embedder.linear_1.",
    r"^text_proj\.2\.": "condition_embedder.text_embedder.linear_2.",
    r"^time_embedding\.0\.": "condition_embedder.time_embedder.linear_1.",
    r"^time_embedding\.2\.": "condition_embedder.time_embedder.linear_2.",
    r"^time_proj\.": "condition_embedder.time_proj.",
}
WAN_ORIGINAL_NAMES = {
    r"^table$": "head.modulation",
    r"\.table$": ".modulation",
    r"^proj_out\.": "head.head.",
    r"^patch_proj\.": "patch_embedding.",
    r"^text_proj\.": "text_embedding.",
    r"^time_proj\.": "time_projection.1.",
    r"\.ff\.": ".ffn.",
    r"\.norm2\.": ".norm3.",  # our norm2 stands before cross-attention
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.": ".o.",
    r"\.to_([qkv])\.": r".\1.",  # to_q -> q
}
# Before every name in files that were made for ComfyUI, which has one file for several models.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# Those of Wan's tensors that stay float32, in our names.
WAN_IN_FLOAT32 = r"table$|^time_embedding|\.norm2\."

# What model.py takes for granted, in the words of their config.json.
COG_FIXED = dict(
    flip_sin_to_cos=True, freq_shift=0, ofs_embed_dim=None, attention_bias=True,
    activation_fn="gelu-approximate", timestep_activation_fn="silu",
    norm_elementwise_affine=True, norm_eps=1e-5, spatial_interpolation_scale=1.875,
    temporal_interpolation_scale=1.0, use_learned_positional_embeddings=False, dropout=0.0)
WAN_FIXED = dict(
    cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, image_dim=None,
    added_kv_proj_dim=None)
WAN_ORIGINAL_FIXED = dict(model_type="t2v", eps=1e-6)


# --- their config -------------------------------------------------------------------------------
# Our fields of Config, and theirs that say the same.
COG_FIELDS = dict(
    heads="num_attention_heads", depth="num_layers", channels="in_channels",
    time_dim="time_embed_dim", text_dim="text_embed_dim", text_len="max_text_seq_length",
    patch="patch_size")
WAN_FIELDS = dict(
    heads="num_attention_heads", depth="num_layers", channels="in_channels",
    text_dim="text_dim", ffn="ffn_dim", freq_dim="freq_dim")
WAN_ORIGINAL_FIELDS = dict(
    heads="num_heads", depth="num_layers", channels="in_dim", dim="dim", ffn="ffn_dim",
    freq_dim="freq_dim", text_len="text_len")


def cog_fields(theirs: dict) -> dict:
    """Our other fields of a CogVideoX. Rotary positions with patches over time are those of 1.5."""
    dim = theirs["num_attention_heads"] * theirs["attention_head_dim"]
    patch_t = theirs.get("patch_size_t")
    rotary = "integer" if patch_t else "fitted"
    return dict(
        lineage="cogvideox",
        dim=dim,
        ffn=4 * dim,
        patch_t=patch_t or 1,
        positions=rotary if theirs["use_rotary_positional_embeddings"] else "sincos",
        fit_height=theirs["sample_height"] // theirs["patch_size"],
        fit_width=theirs["sample_width"] // theirs["patch_size"])


def wan_fields(theirs: dict) -> dict:
    """Our other fields of a Wan in diffusers' layout."""
    patch_t, patch, patch_width = theirs["patch_size"]
    if patch != patch_width:
        raise ValueError("patches that are not square")
    return dict(
        lineage="wan",
        dim=theirs["num_attention_heads"] * theirs["attention_head_dim"],
        text_len=512,
        patch_t=patch_t,
        patch=patch,
        positions="integer")


def wan_original_fields(theirs: dict) -> dict:
    """Our other fields of a Wan in its original layout."""
    return dict(
        lineage="wan",
        text_dim=theirs.get("text_dim", 4096),
        patch_t=1,
        patch=2,
        positions="integer")


# _class_name: what must be as we take it for granted, fields that say the same, a function that
# gives our other fields, names of tensors.
LAYOUTS = {
    "CogVideoXTransformer3DModel": (COG_FIXED, COG_FIELDS, cog_fields, COG_NAMES),
    "WanTransformer3DModel": (WAN_FIXED, WAN_FIELDS, wan_fields, WAN_NAMES),
    "WanModel": (WAN_ORIGINAL_FIXED, WAN_ORIGINAL_FIELDS, wan_original_fields, WAN_ORIGINAL_NAMES),
}


def read_config(folder: Path) -> tuple[Config, dict[str, str]]:
    """config.json of a transformer's folder -> our fields, and the naming of its tensors.

    Raises UserError for a file that is not there, or that says what model.py cannot build.
    """
    # What it says, and whether that is a model as we take it for granted.
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no weights: it has no config.json.")
    theirs = read_json(path)
    kind = theirs.get("_class_name")
    if kind not in LAYOUTS:
        raise UserError(f"{path} describes a {kind}; known are {', '.join(LAYOUTS)}.")
    fixed, same, others, names = LAYOUTS[kind]
    only_known(path, theirs, fixed)

    # Our fields, whose sizes must be possible.
    try:
        fields = {ours: theirs[name] for ours, name in same.items()} | others(theirs)
        if any(type(value) is int and not 0 <= value < 2**20 for value in fields.values()):
            raise ValueError("impossible sizes")
        if fields["dim"] % fields["heads"]:
            raise ValueError("heads that do not divide the width")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{path} is not the config of a video transformer "
                        f"({type(e).__name__}: {e}).") from None
    if theirs.get("out_channels", theirs.get("out_dim")) not in (None, fields["channels"]):
        raise UserError(f"{path} has another number of channels out than in.")
    return replace(config.preset("small"), latent=True, **fields), names


def their_config(cfg: Config) -> dict:
    """The config.json that diffusers reads."""
    kind = "WanTransformer3DModel" if cfg.lineage == "wan" else "CogVideoXTransformer3DModel"
    fixed, same, *_ = LAYOUTS[kind]
    # Some of `same` stand here as well: they keep their places in the file.
    theirs = dict(
        _class_name=kind,
        num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads,
        num_layers=cfg.depth,
        in_channels=cfg.channels,
        out_channels=cfg.channels,
        **fixed)
    theirs |= {name: getattr(cfg, ours) for ours, name in same.items()}
    if cfg.lineage == "wan":
        patch = [cfg.patch_t, cfg.patch, cfg.patch]
        return theirs | dict(patch_size=patch, rope_max_seq_len=1024)
    return theirs | dict(
        patch_size_t=cfg.patch_t if cfg.positions == "integer" else None,
        sample_frames=49,
        sample_height=cfg.fit_height * cfg.patch,
        sample_width=cfg.fit_width * cfg.patch,
        use_rotary_positional_embeddings=cfg.positions != "sincos")


# --- their tensors ------------------------------------------------------------------------------
def renamed(name: str, rules: dict[str, str]) -> str:
    """Our name of a tensor in the checkpoint's naming."""
    for ours, theirs in rules.items():
        name = re.sub(ours, theirs, name)
    return name


def stored_shape(name: str, shape: torch.Size, cfg: Config) -> list[int]:
    """The shape that a checkpoint has for our tensor: a patch projection is stored as the
    convolution it is, but for CogVideoX 1.5, where it is a linear layer too."""
    if name != "patch_proj.weight" or (cfg.lineage == "cogvideox" and cfg.positions == "integer"):
        return list(shape)
    time = [cfg.patch_t] if cfg.lineage == "wan" else []
    return [cfg.dim, cfg.channels, *time, cfg.patch, cfg.patch]


def from_stored(name: str, tensor: Tensor, cfg: Config) -> Tensor:
    """A checkpoint's tensor as ours. Wan's head writes a patch with its channels last, but ours
    writes them first, like the input."""
    if name == "patch_proj.weight":
        return tensor.flatten(1)
    if cfg.lineage == "wan" and name.startswith("proj_out."):
        return tensor.unflatten(0, (-1, cfg.channels)).transpose(0, 1).flatten(0, 1)
    return tensor


def to_stored(name: str, tensor: Tensor, cfg: Config) -> Tensor:
    """The inverse of from_stored."""
    if name == "patch_proj.weight":
        return tensor.reshape(stored_shape(name, tensor.shape, cfg))
    if cfg.lineage == "wan" and name.startswith("proj_out."):
        return tensor.unflatten(0, (cfg.channels, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    return tensor


# --- in -----------------------------------------------------------------------------------------
def load_pretrained(folder, device="cpu", dtype: torch.dtype | None = None) -> Backbone:
    """An official checkpoint, in diffusers' or (Wan) the original layout: our model, in eval mode.

    `folder` has config.json and .safetensors, or a `transformer/` that does. `dtype` None keeps the
    stored one; Wan's time embedding, tables and cross-attention norms stay float32, as diffusers
    keeps them. The model is laid out on the meta device and filled tensor by tensor from mapped
    files: memory holds the weights once, plus one tensor. Raises UserError with one sentence,
    before anything large is read, where names or shapes do not fit.
    """
    check_index(Path(folder))
    folder = network_folder(folder)
    cfg, names = read_config(folder)
    files = tensor_files(folder)
    if prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in files)), ""):
        raise UserError(f"The tensors in {folder} are named {prefix}*, as ComfyUI names them: save "
                        f"them without {prefix!r}, or take the official folder.")
    with torch.device("meta"):
        model = MODELS[cfg.lineage](cfg)
    layout = model.state_dict()
    ours = {renamed(name, names): name for name in layout}
    for what, odd in (("lacks", ours.keys() - files), ("has unknown", files.keys() - ours)):
        if odd:
            raise UserError(f"{folder} {what} {join_some(sorted(odd), 3)}.")

    # The files are mapped: of a tensor that does not fit, its numbers are never read.
    state = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for theirs in file.keys():
                name = ours[theirs]
                tensor = file.get_tensor(theirs)
                shape = stored_shape(name, layout[name].shape, cfg)
                if list(tensor.shape) != shape:
                    raise UserError(f"{theirs} in {path} has the shape {list(tensor.shape)}, not "
                                    f"{shape}.")
                if not tensor.isfinite().all():
                    raise UserError(f"{theirs} in {path} holds numbers that are not finite.")

                # Ours, where and in which type it is wanted; a copy has no tie to the mapped file.
                in_float32 = cfg.lineage == "wan" and re.search(WAN_IN_FLOAT32, name)
                wanted = torch.float32 if in_float32 and dtype else dtype
                state[name] = from_stored(name, tensor, cfg).to(device, wanted, copy=True)
    model.load_state_dict(state, assign=True)
    return model.eval()


def open_backbone(cfg: Config, device: torch.device) -> tuple[Backbone, str]:
    """--weights: the frozen backbone that stage two stands beside, and its files' fingerprint.

    Raises UserError where they are of another architecture than cfg says.
    """
    half = cfg.precision == "bf16" and cfg.freeze_backbone  # what trains is kept in float32
    model = load_pretrained(cfg.weights, device, torch.bfloat16 if half else torch.float32)
    same_architecture(f"--weights {cfg.weights}", model.cfg, cfg, config.NETWORK)
    model.requires_grad_(False)  # it has no optimizer and no average until stage two says so
    return model, fingerprint(network_folder(cfg.weights))


# --- out ----------------------------------------------------------------------------------------
def save_pretrained(model: Backbone, folder: Path, shard_bytes: int = 5 * 2**30) -> None:
    """Write a backbone as diffusers reads it: config.json, safetensors, an index of several ones.

    Raises UserError for a model with learned words, which diffusers has no place for; Stopped when
    the disk is full.
    """
    cfg = model.cfg
    if not cfg.text_dim or cfg.positions == "both":
        raise UserError("A backbone that learned its own words or positions has no place in "
                        "diffusers' layout.")
    names = WAN_NAMES if cfg.lineage == "wan" else COG_NAMES
    state = {renamed(name, names): to_stored(name, tensor, cfg)
             for name, tensor in model.state_dict().items()}
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, tensors in plan.filename_to_tensors.items():
            with whole_file(folder / file) as part:
                held = {name: state[name].cpu() for name in tensors}
                save_file(held, part, metadata={"format": "pt"})
        if plan.is_sharded:
            index = dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename)
            path = folder / "diffusion_pytorch_model.safetensors.index.json"
            write_text(path, json.dumps(index, indent=2))
        write_text(folder / "config.json", json.dumps(their_config(cfg), indent=2))
    except (OSError, SafetensorError) as e:
        raise Stopped(f"The weights could not be written to {folder} ({e}).") from None

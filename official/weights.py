"""Names in and out: somebody else's weights of a video transformer, as ours, and back."""
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import config
from common.files import write_text
from config import Config, Stopped, UserError
from model import MODELS, Backbone


COG_NAMES = (  # our name -> that of the diffusers checkpoint, as regular expressions
    (r"^blocks\.", "transformer_blocks."), (r"\.to_out\.", ".to_out.0."), (r"\.ff\.0\.", ".ff.net.0.proj."),
    (r"\.ff\.2\.", ".ff.net.2."), (r"^time_embedding\.0\.", "time_embedding.linear_1."),
    (r"^time_embedding\.2\.", "time_embedding.linear_2."), (r"^patch_proj\.", "patch_embed.proj."),
    (r"^text_proj\.", "patch_embed.text_proj."), (r"^norm_out\.", "norm_out.norm."),
    (r"^modulate_out\.", "norm_out.linear."))
WAN_NAMES = (
    (r"\.to_out\.", ".to_out.0."), (r"\.ff\.0\.", ".ffn.net.0.proj."), (r"\.ff\.2\.", ".ffn.net.2."),
    (r"(^|\.)table$", r"\1scale_shift_table"), (r"^patch_proj\.", "patch_embedding."),
    (r"^text_proj\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_proj\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_proj\.", "condition_embedder.time_proj."))
WAN_ORIGINAL_NAMES = (  # our norm2, which stands before cross-attention, is the original's norm3
    (r"^table$", "head.modulation"), (r"\.table$", ".modulation"), (r"^proj_out\.", "head.head."),
    (r"^patch_proj\.", "patch_embedding."), (r"^text_proj\.", "text_embedding."),
    (r"^time_proj\.", "time_projection.1."), (r"\.ff\.", ".ffn."), (r"\.norm2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."), (r"\.to_out\.", ".o."), (r"\.to_([qkv])\.", r".\1."))


def renamed(name: str, rules) -> str:
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


def stored_shape(name: str, shape: torch.Size, cfg: Config) -> list[int]:
    """The shape that a checkpoint has for our tensor: a patch projection is stored as the convolution it is, but for
    CogVideoX 1.5, where it is a linear layer too."""
    if name != "patch_proj.weight" or (cfg.lineage == "cogvideox" and cfg.positions == "integer"):
        return list(shape)
    time = [cfg.patch_t] if cfg.lineage == "wan" else []
    return [cfg.dim, cfg.channels, *time, cfg.patch, cfg.patch]


def from_stored(name: str, tensor: Tensor, cfg: Config) -> Tensor:
    """A checkpoint's tensor as ours. Wan's head writes a patch channels last; ours, like the input, channels first."""
    if name == "patch_proj.weight":
        return tensor.flatten(1)
    if cfg.lineage == "wan" and name.startswith("proj_out."):
        p = cfg.patch
        return tensor.unflatten(0, (cfg.patch_t, p, p, cfg.channels)).movedim(3, 0).flatten(0, 3)
    return tensor


def to_stored(name: str, tensor: Tensor, cfg: Config) -> Tensor:
    """The inverse of from_stored."""
    if name == "patch_proj.weight":
        return tensor.reshape(stored_shape(name, tensor.shape, cfg))
    if cfg.lineage == "wan" and name.startswith("proj_out."):
        p = cfg.patch
        return tensor.unflatten(0, (cfg.channels, cfg.patch_t, p, p)).movedim(0, 3).flatten(0, 3).contiguous()
    return tensor

COG_FIXED = dict(  # what this file takes for granted of a CogVideoX
    flip_sin_to_cos=True, freq_shift=0, ofs_embed_dim=None, attention_bias=True, activation_fn="gelu-approximate",
    timestep_activation_fn="silu", norm_elementwise_affine=True, norm_eps=1e-5, spatial_interpolation_scale=1.875,
    temporal_interpolation_scale=1.0, use_learned_positional_embeddings=False, dropout=0.0)
WAN_FIXED = dict(
    cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, image_dim=None, added_kv_proj_dim=None)
WAN_ORIGINAL_FIXED = dict(model_type="t2v", eps=1e-6)


def read_config(folder: Path) -> tuple[Config, tuple]:
    """config.json of a transformer folder -> our fields, and the naming of its tensors. Raises UserError."""
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text())
        kind = theirs["_class_name"]
        rules = {"CogVideoXTransformer3DModel": (COG_FIXED, COG_NAMES), "WanTransformer3DModel": (WAN_FIXED, WAN_NAMES),
                 "WanModel": (WAN_ORIGINAL_FIXED, WAN_ORIGINAL_NAMES)}
        if kind not in rules:
            raise UserError(f"{path} describes a {kind}; known are {', '.join(rules)}.")
        fixed, names = rules[kind]
        for field, value in fixed.items():
            if theirs.get(field, value) != value:
                raise UserError(f"{path} has {field} = {theirs[field]!r}; only {value!r} is known here.")
        fields = {"CogVideoXTransformer3DModel": cog_fields, "WanTransformer3DModel": wan_fields,
                  "WanModel": wan_original_fields}[kind](theirs)
        if theirs.get("out_channels", theirs.get("out_dim")) not in (None, fields["channels"]):
            raise UserError(f"{path} has another number of channels out than in.")
        if any(type(v) is int and not 0 <= v < 2**20 for v in fields.values()) or fields["dim"] % fields["heads"]:
            raise ValueError("impossible sizes")
    except FileNotFoundError:
        raise UserError(f"{folder} holds no weights: it has no config.json.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{path} is not the config of a video transformer ({type(e).__name__}: {e}).") from None
    return replace(config.preset("small"), latent=True, **fields), names


def cog_fields(theirs: dict) -> dict:
    dim, p = theirs["num_attention_heads"] * theirs["attention_head_dim"], theirs["patch_size"]
    rotary, pt = theirs["use_rotary_positional_embeddings"], theirs.get("patch_size_t")
    return dict(lineage="cogvideox", dim=dim, heads=theirs["num_attention_heads"], depth=theirs["num_layers"],
                ffn=4 * dim, time_dim=theirs["time_embed_dim"], text_dim=theirs["text_embed_dim"], patch=p,
                text_len=theirs["max_text_seq_length"], channels=theirs["in_channels"], patch_t=pt or 1,
                positions="integer" if rotary and pt else "fitted" if rotary else "sincos",
                fit_height=theirs["sample_height"] // p, fit_width=theirs["sample_width"] // p)


def wan_fields(theirs: dict) -> dict:
    (pt, p, q), heads = theirs["patch_size"], theirs["num_attention_heads"]
    if p != q:
        raise ValueError("patches that are not square")
    return dict(lineage="wan", dim=heads * theirs["attention_head_dim"], heads=heads, depth=theirs["num_layers"],
                ffn=theirs["ffn_dim"], freq_dim=theirs["freq_dim"], text_dim=theirs["text_dim"], text_len=512,
                patch_t=pt, patch=p, channels=theirs["in_channels"], positions="integer")


def wan_original_fields(theirs: dict) -> dict:
    return dict(lineage="wan", dim=theirs["dim"], heads=theirs["num_heads"], depth=theirs["num_layers"],
                ffn=theirs["ffn_dim"], freq_dim=theirs["freq_dim"], text_dim=theirs.get("text_dim", 4096),
                text_len=theirs["text_len"], patch_t=1, patch=2, channels=theirs["in_dim"], positions="integer")


def their_config(cfg: Config) -> dict:
    """The config.json that diffusers reads."""
    heads = dict(num_attention_heads=cfg.heads, attention_head_dim=cfg.dim // cfg.heads, num_layers=cfg.depth,
                 in_channels=cfg.channels, out_channels=cfg.channels)
    if cfg.lineage == "wan":
        return dict(_class_name="WanTransformer3DModel", **heads, **WAN_FIXED, text_dim=cfg.text_dim, ffn_dim=cfg.ffn,
                    freq_dim=cfg.freq_dim, patch_size=[cfg.patch_t, cfg.patch, cfg.patch], rope_max_seq_len=1024)
    return dict(_class_name="CogVideoXTransformer3DModel", **heads, **COG_FIXED, time_embed_dim=cfg.time_dim,
                text_embed_dim=cfg.text_dim, max_text_seq_length=cfg.text_len, patch_size=cfg.patch,
                patch_size_t=cfg.patch_t if cfg.positions == "integer" else None, sample_frames=49,
                sample_height=cfg.fit_height * cfg.patch, sample_width=cfg.fit_width * cfg.patch,
                use_rotary_positional_embeddings=cfg.positions != "sincos")


def shards_of(folder: Path) -> dict[str, Path]:
    """{tensor: its file} of one or many .safetensors files. Raises UserError."""
    found = sorted(folder.glob("*.safetensors"))
    where = {}
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            wanted = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index} cannot be read ({type(e).__name__}).") from None
        missing = sorted(str(name) for name in wanted if folder / str(name) not in found)
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, which its {index.name} names.")
        found = [folder / name for name in sorted(wanted)]
    if not found:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = ", only pickled weights, which are not opened: convert them first" if pickled else ""
        raise UserError(f"{folder} holds no .safetensors file{why}.")
    for path in found:
        try:
            with safe_open(path, framework="pt") as shard:
                where.update(dict.fromkeys(shard.keys(), path))
        except (SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{path} is damaged or no safetensors file ({e}).") from None
    return where


def load_pretrained(folder, device="cpu", dtype: torch.dtype | None = None) -> Backbone:
    """An official checkpoint, in diffusers' or (Wan) the original layout, as our model, in eval mode.

    `folder` has config.json and .safetensors, or a `transformer/` that does. `dtype` None keeps the stored one; Wan's
    time embedding, tables and cross-attention norms stay float32, as diffusers keeps them. The model is laid out on the
    meta device and filled tensor by tensor from mapped files: memory holds the weights once, plus one tensor. Raises
    UserError with one sentence, before anything large is read, where names or shapes do not fit.
    """
    folder = Path(folder)
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    cfg, names = read_config(folder)
    where = shards_of(folder)
    with torch.device("meta"):
        model = MODELS[cfg.lineage](cfg)
    ours = {renamed(name, names): name for name in model.state_dict()}
    shapes = {name: stored_shape(name, tensor.shape, cfg) for name, tensor in model.state_dict().items()}
    check_names(folder, set(ours), set(where))
    for path in sorted(set(where.values())):
        with safe_open(path, framework="pt") as shard:
            for theirs in shard.keys():
                name, part = ours[theirs], shard.get_slice(theirs)
                if part.get_shape() != shapes[name]:
                    raise UserError(f"{theirs} in {path} has the shape {part.get_shape()}, not {shapes[name]}.")
                if part.get_dtype() not in ("F32", "F16", "BF16", "F64"):
                    raise UserError(f"{theirs} in {path} is stored as {part.get_dtype()}; floating point is needed.")
                tensor = shard.get_tensor(theirs)
                if not tensor.isfinite().all():
                    raise UserError(f"{theirs} in {path} holds numbers that are not finite.")
                keep = cfg.lineage == "wan" and re.search(r"table$|^time_embedding|\.norm2\.", name)
                tensor = from_stored(name, tensor, cfg).to(device, torch.float32 if keep and dtype else dtype)
                owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(owner, leaf, nn.Parameter(tensor.clone() if tensor.is_cpu else tensor))  # no tie to the file
    return model.eval()


def check_names(folder: Path, wanted: set[str], found: set[str]) -> None:
    """Raises UserError that names missing or extra tensors, three of each."""
    for what, names in (("lacks", wanted - found), ("has unknown", found - wanted)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{folder} {what} {some}.")


def save_pretrained(model: Backbone, folder, shard_bytes: int = 5 * 2**30) -> None:
    """Write a backbone in the layout that diffusers reads: config.json, safetensors, and an index if there are several.
    Raises UserError for a model with learned words, which diffusers has no place for; Stopped when the disk is full."""
    cfg, folder = model.cfg, Path(folder)
    if not cfg.text_dim or cfg.positions == "both":
        raise UserError("A backbone that learned its own words or positions has no place in diffusers' layout.")
    names, shards, size = WAN_NAMES if cfg.lineage == "wan" else COG_NAMES, [[]], 0
    state = model.state_dict()
    for name, tensor in state.items():
        size += tensor.nbytes
        if shards[-1] and size > shard_bytes:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append(name)
    stem, weight_map = "diffusion_pytorch_model", {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, shard in enumerate(shards):
            file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {renamed(name, names): to_stored(name, state[name], cfg).cpu() for name in shard}
            save_file(tensors, folder / (file + ".tmp"), metadata={"format": "pt"})
            (folder / (file + ".tmp")).replace(folder / file)
            weight_map.update(dict.fromkeys(tensors, file))
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in state.values())
            index = dict(metadata=dict(total_size=total), weight_map=weight_map)
            write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2))
        write_text(folder / "config.json", json.dumps(their_config(cfg), indent=2))
    except (OSError, SafetensorError) as e:
        raise Stopped(f"The weights could not be written to {folder} ({e}).") from None

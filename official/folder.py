"""A folder of official weights: which lineage it is, and what tells it from another."""
from dataclasses import dataclass, replace
from pathlib import Path

import config
from common.files import read_json
from common.libraries import fingerprint
from config import Config, UserError


def network_folder(weights) -> Path:
    """Where a folder of official weights has its video transformer."""
    part = Path(weights) / "transformer"
    return part if part.is_dir() else Path(weights)


@dataclass(frozen=True)
class Lineage:
    """What differs between the families of models."""
    name: str
    pipeline: str  # class in diffusers of the whole folder
    vae: str  # class in diffusers
    text: str  # class in transformers
    reader: str  # the text encoder's model_type
    preset: Config  # of the captions and clips that they were trained on
    lists: tuple  # in the VAE's config: of its four levels, and of statistics of the channels
    fixed: dict  # what else that must say: with four levels, 4 x 8 x 8 pixels are a latent one


LINEAGES = (
    Lineage("cogvideox", "CogVideoXPipeline", "AutoencoderKLCogVideoX", "T5EncoderModel", "t5",
            config.preset("cogvideox-5b"), ("block_out_channels",),
            dict(in_channels=3, out_channels=3, temporal_compression_ratio=4)),
    Lineage("wan", "WanPipeline", "AutoencoderKLWan", "UMT5EncoderModel", "umt5",
            config.preset("wan-1.3b"), ("dim_mult", "latents_mean", "latents_std"),
            dict(in_channels=3, out_channels=3, scale_factor_temporal=4, scale_factor_spatial=8,
                 patch_size=None, is_residual=False, temperal_downsample=[False, True, True])),
)
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")  # of a whole folder


def only_known(path: Path, theirs: dict, fixed: dict) -> None:
    """Raises UserError for a field of a config that is there with another value than `fixed`."""
    for field, value in fixed.items():
        if theirs.get(field, value) != value:
            raise UserError(f"{path} has {field} = {theirs[field]!r}; only {value!r} is known "
                            "here.")


def check_index(weights: Path) -> None:
    """Raises UserError for a folder of another pipeline than ours, or with more in it: Wan 2.2 has
    a second transformer for the noisy times, or times of their own for each token."""
    path = weights / "model_index.json"
    index = read_json(path) if path.exists() else {}
    known = [one.pipeline for one in LINEAGES]
    kind = index.get("_class_name", known[0])
    if kind not in known:
        raise UserError(f"{path} is of {kind!r}; {' or '.join(known)} is expected.")
    if (weights / "transformer_2").is_dir():
        index["transformer_2"] = "a folder"
    for field, value in index.items():
        if field[:1] != "_" and field not in PARTS and value not in (None, False, [None, None]):
            raise UserError(f"{weights} has {field} ({value}), which is not known here: models of "
                            "one transformer are.")


def lineage_of(weights: Path) -> Lineage:
    """The lineage of a folder of weights, from its VAE's config; the transformer's, where there is
    one, must agree and tells CogVideoX 1.5 and 2B from 5B. Raises UserError."""
    check_index(weights)
    path = weights / "vae" / "config.json"
    vae = read_json(path)
    kind = vae.get("_class_name")
    lineage = next((one for one in LINEAGES if one.vae == kind), None)
    if lineage is None:
        names = " or ".join(one.vae for one in LINEAGES)
        raise UserError(f"{path} is of {kind!r}; {names} is expected.")
    check_vae(path, vae, lineage)
    path = weights / "transformer" / "config.json"
    if path.exists():
        transformer = read_json(path)
        if lineage.name not in str(transformer.get("_class_name")).lower():
            raise UserError(f"{weights} mixes a {kind} with a {transformer.get('_class_name')}.")
        if channels := channels_of(vae):
            only_known(path, transformer, {"in_channels": channels})
        if lineage.name == "cogvideox":
            if transformer.get("patch_size_t"):
                return replace(lineage, preset=config.preset("cogvideox1.5-5b"))
            if transformer.get("use_rotary_positional_embeddings") is False:
                return replace(lineage, preset=config.preset("cogvideox-2b"))
    return lineage


def channels_of(vae: dict) -> int | None:
    """Of the latents, if a VAE's config says."""
    return vae.get("z_dim") or vae.get("latent_channels")


def check_vae(path: Path, vae: dict, lineage: Lineage) -> None:
    """Raises UserError for a VAE of other strides, or whose statistics are of other channels."""
    only_known(path, vae, lineage.fixed)
    channels = channels_of(vae) or 16
    for field, n in zip(lineage.lists, (4, channels, channels)):
        value = vae.get(field, [0] * n)
        if not isinstance(value, list) or len(value) != n:
            raise UserError(f"{path} has {field} = {value}; {n} entries are needed here.")


def identity(weights: Path) -> dict[str, str]:
    """{part: fingerprint} of what a cache is made with, as its settings have it. CogVideoX-2B and
    5B share their VAE but for the scale in its config: a cache of one is wrong for the other, and
    nothing but this would tell. Raises UserError for a part that is not there."""
    parts = {name: Path(weights) / name for name in ("vae", "text_encoder", "tokenizer")}
    for part in parts.values():
        if not part.is_dir():
            raise UserError(f"There is no folder {part}.")
    return {name: fingerprint(part) for name, part in parts.items()}

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
    vae: str  # class in diffusers
    text: str  # class in transformers
    reader: str  # the text encoder's model_type
    preset: Config  # of the captions and clips that they were trained on


LINEAGES = (
    Lineage("cogvideox", "AutoencoderKLCogVideoX", "T5EncoderModel", "t5",
            config.preset("cogvideox-5b")),
    Lineage("wan", "AutoencoderKLWan", "UMT5EncoderModel", "umt5", config.preset("wan-1.3b")),
)


def lineage_of(weights: Path) -> Lineage:
    """The lineage of a folder of weights, from its VAE's config; the transformer's, where there is
    one, must agree and tells CogVideoX 1.5 from 1.0. Raises UserError."""
    path = weights / "vae" / "config.json"
    kind = read_json(path).get("_class_name")
    lineage = next((one for one in LINEAGES if one.vae == kind), None)
    if lineage is None:
        names = " or ".join(one.vae for one in LINEAGES)
        raise UserError(f"{path} is of {kind!r}; {names} is expected.")
    path = weights / "transformer" / "config.json"
    if path.exists():
        transformer = read_json(path)
        if lineage.name not in str(transformer.get("_class_name")).lower():
            raise UserError(f"{weights} mixes a {kind} with a {transformer.get('_class_name')}.")
        if lineage.name == "cogvideox" and transformer.get("patch_size_t"):
            return replace(lineage, preset=config.preset("cogvideox1.5-5b"))
    return lineage


def identity(weights: Path) -> dict[str, str]:
    """{part: fingerprint} of what a cache is made with, as its settings have it. CogVideoX-2B and
    5B share their VAE but for the scale in its config: a cache of one is wrong for the other, and
    nothing but this would tell. Raises UserError for a part that is not there."""
    parts = {name: Path(weights) / name for name in ("vae", "text_encoder", "tokenizer")}
    for part in parts.values():
        if not part.is_dir():
            raise UserError(f"There is no folder {part}.")
    return {name: fingerprint(part) for name, part in parts.items()}

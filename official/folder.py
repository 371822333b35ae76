"""A folder of official weights: which lineage it is, and what tells it from another."""
from dataclasses import dataclass
from pathlib import Path

import config
from common.files import read_json
from common.libraries import fingerprint
from config import UserError


def network_folder(weights) -> Path:
    """Where a folder of official weights has its video transformer."""
    part = Path(weights) / "transformer"
    return part if part.is_dir() else Path(weights)


LINEAGES = {  # VAE's class in diffusers, text encoder's in transformers, its model_type, a preset
    "cogvideox": ("AutoencoderKLCogVideoX", "T5EncoderModel", "t5", "cogvideox-5b"),
    "wan": ("AutoencoderKLWan", "UMT5EncoderModel", "umt5", "wan-1.3b"),
}


@dataclass(frozen=True)
class Lineage:
    """What differs between the families of models: classes of the libraries, and what their presets
    say of the captions and the clips that they were trained on."""
    name: str
    vae: str  # class in diffusers
    text: str  # class in transformers
    reader: str  # the text encoder's model_type
    text_len: int
    frames: int
    fps: float
    height: int
    width: int
    guidance: float


def lineage_of(weights: Path) -> Lineage:
    """The lineage of a folder of weights, from its VAE's config; the transformer's, where there is
    one, must agree and tells CogVideoX 1.5 from 1.0. Raises UserError."""
    weights = Path(weights)
    kind = read_json(weights / "vae" / "config.json").get("_class_name")
    name = next((name for name, (vae, *_) in LINEAGES.items() if vae == kind), None)
    if name is None:
        names = " or ".join(vae for vae, *_ in LINEAGES.values())
        raise UserError(f"{weights / 'vae' / 'config.json'} is of {kind!r}; {names} is expected.")
    vae, text, reader, preset = LINEAGES[name]
    if (weights / "transformer" / "config.json").exists():
        transformer = read_json(weights / "transformer" / "config.json")
        if name not in str(transformer.get("_class_name")).lower():
            raise UserError(f"{weights} mixes a {kind} with a {transformer.get('_class_name')}.")
        if name == "cogvideox" and transformer.get("patch_size_t"):
            preset = "cogvideox1.5-5b"
    own = config.preset(preset)
    return Lineage(name, vae, text, reader, own.text_len,
                   own.frames, own.fps, own.height, own.width, own.guidance)


def identity(weights: Path) -> dict[str, str]:
    """{part: fingerprint} of what a cache is made with, as its settings have it. CogVideoX-2B and
    5B share their VAE but for the scale in its config: a cache of one is wrong for the other, and
    nothing but this would tell. Raises UserError for a part that is not there."""
    parts = {name: Path(weights) / name for name in ("vae", "text_encoder", "tokenizer")}
    for part in parts.values():
        if not part.is_dir():
            raise UserError(f"There is no folder {part}.")
    return {name: fingerprint(part) for name, part in parts.items()}

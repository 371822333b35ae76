"""A folder of official weights: which lineage it is, whether its files are whole, what tells it from another."""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import nn

import config
from common.files import join_some, read_json
from common.libraries import library_error_as_sentence
from config import UserError


def network_folder(weights) -> Path:
    """Where a folder of official weights has its video transformer."""
    part = Path(weights) / "transformer"
    return part if part.is_dir() else Path(weights)

BLOCK, BLOCKS = 2**16, 256  # bytes and number of the samples that tell weights apart
FLOATS = ("F64", "F32", "F16", "BF16")
SUFFIXES = (".json", ".model", ".safetensors", ".txt")  # of the files that a model is


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
    return Lineage(name, vae, text, reader, own.text_len, own.frames, own.fps, own.height, own.width,
                   own.guidance)


def tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor: its file} of all .safetensors files in a folder, or of those that its index names; their headers are
    read. Raises UserError with one sentence for what is missing, damaged or pickled."""
    files = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise UserError(f"{index} cannot be read: it names no files.")
        files = [folder / str(name) for name in sorted(set(named.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(f"{folder} lacks {join_some(missing)}, which its {index.name} names.")
    if not files:
        raise UserError(f"{folder} holds no .safetensors file; pickled weights (.bin, .pt) are not opened.")
    found = {}
    for path in files:
        try:
            with safetensors.safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (safetensors.SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{path} is damaged or no safetensors file ({e}).") from None
    return found


def check_weights(folder: Path) -> None:
    """Raises UserError with one sentence unless the folder's safetensors files are all there, whole, and of floats."""
    for path in set(tensor_files(folder).values()):
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():
                if file.get_slice(name).get_dtype() not in FLOATS:
                    raise UserError(f"{name} in {path} is not stored as floating point numbers.")


def load(kind, folder: Path, **how) -> nn.Module:
    """A model of a library's class, in eval mode, on the CPU. Raises UserError with one sentence for weights that are
    missing, damaged, pickled, of another shape, or not finite."""
    read_json(folder / "config.json")
    check_weights(folder)
    with library_error_as_sentence(folder):
        model, info = kind.from_pretrained(str(folder), use_safetensors=True, local_files_only=True,
                                           output_loading_info=True, **how)
    for what, key in (("lacks", "missing_keys"), ("does not fit its config in", "mismatched_keys")):
        if info.get(key):  # the libraries would fill these with random numbers
            raise UserError(f"{folder} {what} {join_some(map(str, info[key]), 3)}.")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{name} in {folder} holds numbers that are not finite.")
    return model.eval().requires_grad_(False)


def fingerprint(folder: Path) -> str:
    """A hash that tells weights apart: small files whole; of a large one its size and 256 blocks spread over it, since
    training moves every weight and twenty gigabytes need not be read for that."""
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES):
        size = path.stat().st_size
        sha.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for at in range(0, size, max(BLOCK, size // BLOCKS)):
                file.seek(at)
                sha.update(file.read(BLOCK))
    return sha.hexdigest()[:16]


def identity(weights: Path) -> dict[str, str]:
    """{part: fingerprint} of what a cache is made with, as its settings have it. CogVideoX-2B and 5B share their VAE
    but for the scale in its config: a cache of one is wrong for the other, and nothing but this would tell. Raises
    UserError for a part that is not there."""
    parts = {name: Path(weights) / name for name in ("vae", "text_encoder", "tokenizer")}
    for part in parts.values():
        if not part.is_dir():
            raise UserError(f"There is no folder {part}.")
    return {name: fingerprint(part) for name, part in parts.items()}

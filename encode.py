"""What stands around a large video model: text encoder and VAE, from libraries, and a cache of what they say.

    prompt  --TextEncoder-->  (L, D_text)        pixels  --VAE.encode-->  latent  --VAE.decode-->  pixels

    python encode.py --videos DIR --annotations FILE --weights DIR --out CACHE [--shard 1/8]

Nothing of the method is here. The weights are a local folder in diffusers' layout (tokenizer/, text_encoder/, vae/; a
transformer/ only tells the lineage), read from safetensors alone. transformers and diffusers are imported when needed.

The two lineages differ in ways that no error message tells of:
*CogVideoX.* T5 reads 226 tokens **without** a mask: pads are read like words, and their rows are kept, because the
official model was trained so. Its VAE works through time in chunks of 8 frames (the first one longer), and GroupNorm
takes its statistics over a chunk: the chunk size is part of the model. Its latent is drawn: mean and std are kept.
*Wan.* umT5 reads 512 tokens **with** a mask; rows past the caption's end are zero. Text is cleaned first. The VAE norms
each position by itself, so its chunks are exact. The latent is the mean, normed a channel; the VAE runs in float32.

The cache is a folder: cache.json (settings, and a hash of them), empty.safetensors (the text embedding of "", for
captions that are dropped), clips/KEY-NofM.safetensors (window N of M of a video), index.json (what a reader lists, so
that it opens no clip). KEY is a hash of the settings, the weights, the caption, the categories, and the video's name,
size and time of change. Not of its bytes: a resume would read terabytes to learn that nothing has changed. The price: a
copy made without its times is encoded again; it is never taken for something else.
A file is written under another name and renamed, so that it is whole or absent: a killed run is just started again.

Letters: B clips, F H W frames and pixels, f h w the latent grid, C its channels, L text tokens.
"""
import contextlib
import hashlib
import html
import importlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn
from tqdm import tqdm

import config
import data
from config import Stopped, UserError

FORMAT = 1  # of the cache's files
GROUP = 64  # videos whose captions are encoded together, before the text encoder leaves the device to the VAE
BLOCK, BLOCKS = 2**16, 256  # bytes and number of the samples that tell weights apart
FLOATS = ("F64", "F32", "F16", "BF16")
SUFFIXES = (".json", ".model", ".safetensors", ".txt")  # of the files that a model is


@dataclass(frozen=True)
class Lineage:
    """What differs between the families of models, and the size of clip that each was trained on."""
    name: str
    vae: str  # class in diffusers
    text: str  # class in transformers
    reader: str  # the text encoder's model_type
    text_len: int
    frames: int
    fps: float
    height: int
    width: int


LINEAGES = (
    Lineage("cogvideox", "AutoencoderKLCogVideoX", "T5EncoderModel", "t5", 226, 49, 8.0, 480, 720),
    Lineage("wan", "AutoencoderKLWan", "UMT5EncoderModel", "umt5", 512, 81, 16.0, 480, 832),
)
COG_15 = dict(frames=81, fps=16.0, height=768, width=1360)  # told by its transformer's patch over time


# -------------------------------------------------------------------------------------------------- a folder of weights
def library(name: str):
    """The module of an extra package, or UserError with what to install."""
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"Official weights need {name}, which cannot be imported ({e}): pip install -r "
                        "requirements-extra.txt.") from None
    if name in ("transformers", "diffusers"):  # their remarks and bars are not ours; their errors stay
        logging = importlib.import_module(f"{name}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return module


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: a folder in diffusers' layout is expected, with tokenizer, text_encoder "
                        "and vae in it.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({getattr(e, 'strerror', None) or 'it is not JSON'}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.")
    return value


def lineage_of(weights: Path) -> Lineage:
    """The lineage of a folder of weights, from its VAE's config; the transformer's, where there is one, must agree and
    tells CogVideoX 1.5 from 1.0. Raises UserError."""
    weights = Path(weights)
    kind = read_json(weights / "vae" / "config.json").get("_class_name")
    lineage = next((known for known in LINEAGES if known.vae == kind), None)
    if lineage is None:
        names = " or ".join(known.vae for known in LINEAGES)
        raise UserError(f"{weights / 'vae' / 'config.json'} is of {kind!r}; {names} is expected.")
    if (weights / "transformer" / "config.json").exists():
        transformer = read_json(weights / "transformer" / "config.json")
        if lineage.name not in str(transformer.get("_class_name")).lower():
            raise UserError(f"{weights} mixes a {kind} with a {transformer.get('_class_name')}.")
        if lineage.name == "cogvideox" and transformer.get("patch_size_t"):
            lineage = replace(lineage, **COG_15)
    return lineage


def check_weights(folder: Path) -> None:
    """Raises UserError with one sentence unless the folder's safetensors files are all there, whole, and of floats."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise UserError(f"{index} names no files.")
        files = [folder / str(name) for name in sorted(set(named.values()))]
    if not files:
        raise UserError(f"{folder} holds no .safetensors file; pickled weights (.bin, .pt) are not opened.")
    for path in files:
        try:
            with safetensors.safe_open(path, "pt") as file:
                odd = [name for name in file.keys() if file.get_slice(name).get_dtype() not in FLOATS]
        except FileNotFoundError:
            raise UserError(f"{folder} lacks {path.name}, which its index names.") from None
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f"{path} is damaged or no safetensors file ({e}).") from None
        if odd:
            raise UserError(f"{odd[0]} in {path} is not stored as floating point numbers.")


@contextlib.contextmanager
def one_sentence(folder: Path):
    """Whatever a library raises over the files in a folder, as a UserError."""
    try:
        yield
    except Exception as e:
        said = " ".join((str(e) or type(e).__name__).split())
        raise UserError(f"{folder} cannot be loaded: {said[:300].rstrip('.!')}.") from None


def load(kind, folder: Path, **how) -> nn.Module:
    """A model of a library's class, in eval mode, on the CPU. Raises UserError with one sentence for weights that are
    missing, damaged, pickled, of another shape, or not finite."""
    read_json(folder / "config.json")
    check_weights(folder)
    with one_sentence(folder):
        model, info = kind.from_pretrained(str(folder), use_safetensors=True, local_files_only=True,
                                           output_loading_info=True, **how)
    for what, key in (("lacks", "missing_keys"), ("does not fit its config in", "mismatched_keys")):
        if info.get(key):  # the libraries would fill these with random numbers
            raise UserError(f"{folder} {what} {data.listed(map(str, info[key]), 3)}.")
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


def pick_device(name: str) -> str:
    """`auto` is the best there is: cuda, else mps, else cpu. Raises UserError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(name, name == "auto"):
        raise UserError(f"--device {name} is not available here.")
    return next(d for d in there if there[d]) if name == "auto" else name


# ----------------------------------------------------------------------------------------------------------------- text
def clean(text: str) -> str:
    """Wan's cleaning: broken encodings mended, HTML entities resolved twice, white space collapsed."""
    text = html.unescape(html.unescape(library("ftfy").fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class TextEncoder:
    """T5-v1.1 (CogVideoX) or umT5 (Wan) with its tokenizer. Stays on the CPU but for the time of a call."""

    def __init__(self, weights: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        """weights: the folder with tokenizer/ and text_encoder/. Raises UserError."""
        weights, transformers = Path(weights), library("transformers")
        self.lineage, self.device = lineage_of(weights), torch.device(device)
        kind = read_json(weights / "text_encoder" / "config.json").get("model_type")
        if kind != self.lineage.reader:
            raise UserError(f"{weights / 'text_encoder'} is of {kind!r}; {self.lineage.name} has a "
                            f"{self.lineage.reader!r}.")
        self.model = load(getattr(transformers, self.lineage.text), weights / "text_encoder", dtype=dtype,
                          ignore_mismatched_sizes=True)  # load() says which; transformers would not
        folder = weights / "tokenizer"
        read_json(folder / "tokenizer_config.json")
        if not (folder / "tokenizer.json").exists():  # CogVideoX has spiece.model alone, which these read
            library("sentencepiece")
            library("google.protobuf")
        with one_sentence(folder):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    @property
    def dim(self) -> int:
        """D_text."""
        return self.model.config.d_model

    def prepare(self, prompt: str) -> str:
        prompt = prompt.encode("utf-8", "replace").decode()  # JSON may hold halves of a letter
        return clean(prompt) if self.lineage.name == "wan" else prompt

    def too_long(self, prompts: list[str]) -> int:
        """How many have more tokens than the model reads, so that their ends are cut."""
        ids = self.tokenizer([self.prepare(prompt) for prompt in prompts]).input_ids
        return sum(len(row) > self.lineage.text_len for row in ids)

    @torch.no_grad()
    def __call__(self, prompts: list[str], batch: int = 8) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D_text) in the model's dtype and lengths (B,) int64, on the CPU, as the official pipelines
        make them (diffusers, `_get_t5_prompt_embeds`). A length counts the tokens that are not padding; 0 for an empty
        prompt, as everywhere in data.py, though its end-of-text token is embedded."""
        embeddings, lengths = [], []
        with memory("a smaller --text_batch needs less"), on(self.model, self.device):
            for at in range(0, len(prompts), batch):
                texts = [self.prepare(prompt) for prompt in prompts[at:at + batch]]
                tokens = self.tokenizer(texts, padding="max_length", max_length=self.lineage.text_len, truncation=True,
                                        return_tensors="pt")
                ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)  # (B, L)
                if self.lineage.name == "wan":
                    embedding = self.model(ids, attention_mask=mask).last_hidden_state
                    embedding = embedding.masked_fill(mask[..., None] == 0, 0)
                else:  # no mask on purpose
                    embedding = self.model(ids).last_hidden_state
                embeddings.append(embedding.to("cpu", self.model.dtype))
                empty = torch.tensor([not text.strip() for text in texts])
                lengths.append(tokens.attention_mask.sum(1).masked_fill(empty, 0))
        return torch.cat(embeddings), torch.cat(lengths)


@contextlib.contextmanager
def on(model: nn.Module, device: torch.device):
    """The model is on the device inside, and on the CPU again afterwards."""
    model.to(device)
    try:
        yield
    finally:
        if device.type != "cpu":
            model.to("cpu")
            torch.cuda.empty_cache()


@contextlib.contextmanager
def memory(hint: str):
    """Running out of the device's memory is one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise Stopped(f"The device's memory is full: {hint}.") from None


# ------------------------------------------------------------------------------------------------------------------ VAE
class VAE:
    """AutoencoderKLCogVideoX or AutoencoderKLWan of diffusers, with its chunks over time as diffusers has them.

    The first frame alone, then every four, are a latent frame; (B, 3, 1 + 4 m, 8 h, 8 w) <-> (B, C, 1 + m, h, w).

    CogVideoX decodes an even number of latent frames f to 4 f frames, not 4 f - 3: its sizes are 1 + 8 m frames.
    """

    def __init__(self, weights: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, tiled: bool = False):
        """weights: the folder with vae/. tiled: in overlapping tiles that are blended, as diffusers does: less memory,
        slightly other numbers. Raises UserError."""
        self.lineage, self.device, diffusers = lineage_of(weights), torch.device(device), library("diffusers")
        dtype = torch.float32 if self.lineage.name == "wan" else dtype  # as it was trained and is run
        folder = Path(weights) / "vae"
        self.model = load(getattr(diffusers, self.lineage.vae), folder, torch_dtype=dtype).to(self.device)
        if self.lineage.name == "wan":
            mean, std = self.model.config.latents_mean, self.model.config.latents_std
        else:  # `invert_scale_latents` and the like concern image conditions only
            mean, std = [0.0], [1 / self.model.config.scaling_factor]
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1) for v in (mean, std))
        if tiled:
            self.model.enable_tiling()

    @property
    def channels(self) -> int:
        return self.model.config.z_dim if self.lineage.name == "wan" else self.model.config.latent_channels

    @torch.no_grad()
    def encode(self, video: Tensor) -> dict[str, Tensor]:
        """video (B, 3, F, H, W) in [-1, 1] -> {"mean", and for CogVideoX "std"}: each (B, C, f, h, w) float32 on the
        VAE's device, in the network's scale. CogVideoX trains on mean + std * noise, Wan on the mean."""
        with memory("--tiled needs less"):
            found = [self.model.encode(clip.to(self.device, self.model.dtype)).latent_dist for clip in video.split(1)]
        latent = {"mean": (torch.cat([d.mean for d in found]).float() - self.mean) / self.std}
        if self.lineage.name == "cogvideox":
            latent["std"] = torch.cat([d.std for d in found]).float() / self.std
        return latent

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, C, f, h, w) in the network's scale -> (B, 3, F, H, W) float32 in [-1, 1], on the VAE's device."""
        latent = latent.to(self.device, torch.float32) * self.std + self.mean
        with memory("--tiled needs less"):
            found = [self.model.decode(z.to(self.model.dtype)).sample for z in latent.split(1)]
        return torch.cat(found).float().clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------------- cache
def parse(argv: list[str]):
    parser = config.Parser("Turn a folder of videos into latents and text embeddings, once, for training.")
    add = parser.add_argument
    add("--videos", required=True, help="folder of videos")
    add("--annotations", default="", help="captions.json or a WISA list; empty = the folder's captions.json")
    add("--weights", required=True, help="folder in diffusers' layout: tokenizer, text_encoder, vae")
    add("--out", required=True, help="folder of the cache; started again, it goes on where it was stopped")
    add("--shard", default="1/1", help="i/n: encode every n-th video from the i-th on; one process a shard")
    add("--frames", type=int, help="frames a clip, 1 + 4 m; None = the lineage's")
    add("--fps", type=float, help="frames a second; None = the lineage's")
    add("--height", type=int, help="pixels, a multiple of 16; None = the lineage's")
    add("--width", type=int, help="pixels, a multiple of 16; None = the lineage's")
    add("--windows", type=int, default=4, help="clips cut from one long video at most")
    add("--captions", default="long", choices=("long", "short"), help="which one of a WISA record")
    add("--phys_law", action="store_true", help="captions are followed by the record's phys_law")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the text encoder, CogVideoX's VAE, and what is stored; auto = bf16 on cuda, else fp32")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto = cuda, else mps, else cpu")
    add("--tiled", action="store_true", help="VAE in tiles: less memory, slightly other latents")
    add("--text_batch", type=int, default=8, help="captions encoded at once")
    return parser.parse_args(argv)


def check(args) -> tuple[int, int]:
    """Raises UserError with the first broken rule; returns the shard as (i from 0, n)."""
    for name in ("frames", "fps", "height", "width", "windows", "text_batch"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be more than zero, not {getattr(args, name)}.")
    if args.frames % 4 != 1:
        raise UserError(f"--frames must be 1 + 4 m (5, 9, ... 49, 81), not {args.frames}: the VAE takes the first one "
                        "alone and four at a time after it.")
    for name in ("height", "width"):
        if getattr(args, name) % 16:
            raise UserError(f"--{name} must be a multiple of 16, not {getattr(args, name)}: 8 pixels are a latent one, "
                            "and 2 of those a token.")
    return shard_of(args.shard)


def shard_of(text: str) -> tuple[int, int]:
    """"i/n" -> (i from 0, n). Raises UserError."""
    shard = re.fullmatch(r"(\d+)/(\d+)", text)
    if not shard or not 1 <= int(shard[1]) <= int(shard[2]):
        raise UserError(f"--shard is i/n with i from 1 to n, such as 1/8, not {text!r}.")
    return int(shard[1]) - 1, int(shard[2])


class Store:
    """The cache's folder, as one shard writes it."""
    manifest = "cache.json"

    def __init__(self, out: Path, settings: dict, tag: str):
        """Makes the folder; UserError where it is of other settings. tag: ends the names of the shard's unfinished
        files."""
        self.out, self.clips, self.key, self.tag = out, out / "clips", data.digest(settings), tag
        try:
            self.clips.mkdir(parents=True, exist_ok=True)
            for folder in (self.out, self.clips):
                for leftover in folder.glob(f"*.{tag}.part"):  # of this shard's run that was killed
                    leftover.unlink()
            if (out / self.manifest).exists() and any(self.clips.iterdir()):
                self.compare(read_json(out / self.manifest).get("settings") or {}, settings)
            else:
                self.write_json(self.manifest, {"key": self.key, "settings": settings})
        except OSError as e:
            raise UserError(f"--out {out} cannot hold a cache: {e.strerror or e}.") from None

    def compare(self, old: dict, new: dict) -> None:
        other = [f"{field} {old.get(field)!r}, now {new[field]!r}" for field in new if old.get(field) != new[field]]
        if other:
            raise UserError(f"{self.out} holds clips of other settings ({'; '.join(other)}): give another --out.")

    def write_json(self, name: str, value) -> None:
        part = self.out / f"{name}.{self.tag}.part"
        part.write_text(json.dumps(value), encoding="utf-8")
        os.replace(part, self.out / name)

    def name(self, video: data.Video) -> str:
        """What the files of a video's clips begin with."""
        stat = os.stat(video.path)
        return data.digest([self.key, video.name, stat.st_size, stat.st_mtime_ns, video.caption, video.categories])[:24]

    def there(self) -> dict[str, list[str]]:
        """{name of a video: its clips' files, in order}, from the names alone."""
        found = {}
        for file in os.listdir(self.clips):
            if match := re.fullmatch(r"([0-9a-f]{24})-(\d+)of(\d+)\.safetensors", file):
                found.setdefault(match[1], []).append((int(match[2]), file))
        return {name: [file for _, file in sorted(files)] for name, files in found.items()}

    def sound(self, path: Path) -> bool:
        """Is there a whole file of these settings?"""
        try:
            return data.read_about(path)["key"] == self.key
        except (OSError, ValueError, KeyError):
            return False

    def row(self, file: str, video: data.Video) -> tuple:
        """What index.json says of a clip's file."""
        return file, video.name, video.caption, video.categories

    def write_index(self, videos: list[data.Video], names: list[str]) -> dict:
        """index.json over all shards' clips that are there. Shards that end together: the one that writes last looks
        again afterwards, so nothing that was there by then is missing from what stays."""
        def look():
            there = self.there()
            rows = [self.row(file, video) for video, name in zip(videos, names) for file in there.get(name, ())]
            done = sum(name in there for name in names)
            return {"key": self.key, "videos": len(videos), "done": done, "clips": rows}

        index = None
        while index != (index := look()):
            self.write_json("index.json", index)
        return index


def complete(files: list[str]) -> bool:
    """Do the names of a video's clips say that none is missing?"""
    return bool(files) and len(files) == int(re.search(r"of(\d+)\.", files[0])[1])


def fill(store: Store, folder: data.Folder, todo: dict[str, data.Video], have: set[str], text: TextEncoder, vae: VAE,
         dtype: torch.dtype, args, bar: tqdm) -> tuple[int, int]:
    """Encode these videos ({name in the store: video}) but for the files in `have`. Returns how many clips were made,
    and how many captions were cut; the videos that gave none are noted in folder.skipped."""
    made, cut, names = 0, 0, {id(video): name for name, video in todo.items()}
    for at in range(0, len(todo), GROUP):
        videos = list(todo.values())[at:at + GROUP]
        captions = [video.caption for video in videos]
        # Always the same number at once: a batch of another shape may round differently, and a clip would then depend
        # on what was done before the run was interrupted, or on its shard.
        embeddings, lengths = text(captions + [""] * (-len(captions) % args.text_batch), args.text_batch)
        cut += text.too_long(captions)
        for (video, windows), embedding, length in zip(folder.read(videos), embeddings, lengths):
            if isinstance(windows, str):
                folder.skipped.append(f"{video.name} ({windows})")
                windows = []
            for window in windows:
                file = f"{names[id(video)]}-{window.number}of{window.taken}.safetensors"
                if file not in have:
                    latent = vae.encode(data.pixels(window.video)[None])
                    if not all(part.isfinite().all() for part in latent.values()):
                        folder.skipped.append(f"{video.name} (its latent is not finite)")
                        continue
                    tensors = {"text": stored_text(embedding, int(length), text.lineage, dtype),
                               **{part: value[0].to("cpu", dtype) for part, value in latent.items()}}
                    store_clip(store, file, tensors, video, window, int(length), args)
                    made += 1
            bar.update()
    return made, cut


def stored_text(embedding: Tensor, length: int, lineage: Lineage, dtype: torch.dtype) -> Tensor:
    """(L, D_text), without the zeros behind Wan's captions; the reader puts them back."""
    rows = max(length, 1) if lineage.name == "wan" else len(embedding)  # the empty caption has its end-of-text token
    return embedding[:rows].to(dtype).clone()


def store_clip(store: Store, file: str, tensors: dict[str, Tensor], video: data.Video, window: data.Window, length: int,
               args) -> None:
    """One clip's file: its tensors, the 29 categories, and where it comes from."""
    categories = torch.zeros(len(data.LABELS), dtype=torch.uint8)
    categories[video.categories] = 1
    about = {"key": store.key, "caption": video.caption, "file": video.name, "text_length": length, "size": window.size,
             "times": [window.start, window.start + args.frames / args.fps], "crop": window.crop}
    data.write_tensors(store.clips / file, {**tensors, "categories": categories}, about, store.tag)


def settings_of(args, lineage: Lineage, weights: Path, dtype: torch.dtype) -> dict:
    """All that shapes the cache's numbers, but for the videos themselves."""
    vae, text = (read_json(weights / part / "config.json") for part in ("vae", "text_encoder"))
    fields = ("frames", "fps", "height", "width", "windows", "captions", "phys_law", "tiled")
    return {"format": FORMAT, "lineage": lineage.name, **{field: getattr(args, field) for field in fields},
            "dtype": str(dtype).removeprefix("torch."), "text_len": lineage.text_len, "text_dim": text.get("d_model"),
            "channels": vae.get("z_dim") or vae.get("latent_channels"),
            **identity(weights)}


def main(argv: list[str]) -> None:
    """Check everything, see what is there, encode what is not, list it. Raises UserError and Stopped."""
    args = parse(argv)
    weights = Path(args.weights)
    lineage = lineage_of(weights)
    for name in ("frames", "fps", "height", "width"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(lineage, name))
    (first, shards), device = check(args), pick_device(args.device)
    if lineage.name == "cogvideox" and args.frames % 8 != 1:
        print(f"CogVideoX's VAE gives {args.frames + 3} frames back for {args.frames}; of 1 + 8 m it gives as many.",
              file=sys.stderr)
    bf16 = args.dtype == "bf16" or args.dtype == "auto" and device == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    cfg = config.preset("small", data_dir=args.videos, annotations=args.annotations, frames=args.frames, fps=args.fps,
                        height=args.height, width=args.width, windows=args.windows)
    cfg = replace(cfg, threads=min(4, data.cores(cfg)))  # each reads ahead a video's clips, a hundred megabytes apiece
    folder = data.Folder(cfg, args.captions, args.phys_law)
    store = Store(Path(args.out), settings_of(args, lineage, weights, dtype), f"{first + 1}of{shards}")

    made, cut, videos = 0, 0, list(folder.videos.values())
    try:
        # --- what is there
        names, there = [store.name(video) for video in videos], store.there()
        mine = dict(list(zip(names, videos))[first::shards])
        have = {file for name in mine for file in there.get(name, ()) if store.sound(store.clips / file)}
        todo = {name: video for name, video in mine.items()
                if not complete([file for file in there.get(name, ()) if file in have])}

        # --- what is not
        empty_there = store.sound(store.out / "empty.safetensors")
        if todo or not empty_there:
            text, vae = TextEncoder(weights, device, dtype), VAE(weights, device, dtype, args.tiled)
            if not empty_there:
                embeddings, _ = text([""] * args.text_batch, args.text_batch)
                empty = {"text": stored_text(embeddings[0], 0, lineage, dtype)}
                about = {"key": store.key, "text_length": 0}
                data.write_tensors(store.out / "empty.safetensors", empty, about, store.tag)
            with tqdm(total=len(mine), initial=len(mine) - len(todo), desc="encoding", unit="video") as bar:
                made, cut = fill(store, folder, todo, have, text, vae, dtype, args, bar)
        index = store.write_index(videos, names)
    except OSError as e:
        raise Stopped(f"{e.filename or store.out} cannot be read or written any more: {e.strerror or e}.") from None

    # --- what came of it
    skipped = f"; skipped {len(folder.skipped)}: {data.listed(folder.skipped)}" if folder.skipped else ""
    if not index["clips"]:
        raise UserError(f"No clip could be made from {args.videos}{skipped or '; the annotations name no video'}.")
    cut = f"; {cut} captions have more than {lineage.text_len} tokens and are cut" if cut else ""
    print(f"{made} clips made, {len(have)} were there; {store.out} holds {len(index['clips'])} from {index['done']} of "
          f"{index['videos']} videos{cut}{skipped}{folder.strangers()}")


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

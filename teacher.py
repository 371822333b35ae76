"""The teacher: where a vision-language model (VLM) looks as it describes a phenomenon, as maps that teach the router.

    video, phenomenon --question--> VLM --attention of the rows that predict its answer--> a map over the video's tokens
    video ------------background question--> VLM ----------------------------------------> the same, to be subtracted

    python teacher.py --videos DIR --annotations FILE --vlm DIR --out MAPS [--shard 1/8]   maps for train.py --teacher
    python teacher.py --train_tiny --colour_cues     a VLM of a tenth of a million parameters, and its maps of the world
    python teacher.py --report --colour_cues         how well maps find what they are asked for, where truth is known
    python teacher.py --preview overlay.gif          question, answer, map, background map, difference, exact mask

Nothing imports this file: training reads the maps that it leaves on disk. Qwen2.5-VL and Qwen3-VL of transformers do
the looking; the tiny one has the very architecture of Qwen2.5-VL, so a laptop runs the same lines as a GPU. Steps:

1. *Prefill.* The video comes first in the prompt, so that all questions share its keys and values.
2. *Answers*, greedily, all questions at once.
3. *Attention.* One more pass over question and answer. The model's attention function is ours, registered through
   transformers' `AttentionInterface`: it hands on to the library's fused kernel, and computes beside it, in float32,
   the few rows that are wanted. No S x S matrix is made (54 GB for a 7B model and 26 frames), and the model stays on
   its fused kernels: in bf16, eager attention changes the answers.
4. *Density.* Mean over rows, heads and layers, then renormalised over the video's tokens, times their number: uniform
   attention is 1. Heads that ignore the video carry no weight that way.
5. *On disk* on the VLM's own grid, with the times and the rectangle it covers: data.py finds any clip's tokens in it.

Left out on purpose: attention rollout (needs all matrices), several GPUs for one VLM, several videos in a prompt.

Letters: B videos, Q questions, F frames, t h w the VLM's video tokens (N in all), P prefix tokens, R rows, h heads.
"""
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import align
import config
import data
import encode
import world
from config import Config, Stopped, UserError

KINDS = ("question", "predict", "answer")  # rows: of the question's words; that predict the answer's tokens; of these
DENIAL = re.compile(r"\b(no|not|cannot|none|nowhere)\b|n't\b", re.IGNORECASE)
LITTLE = 0.02  # of all attention on the video: less in every layer suggests a broken prompt (a guess, not calibrated)
ALIKE = 0.95  # cosine of map and background above which the difference is mostly noise (likewise)


class VLMError(UserError):
    """The VLM, the video or the question will not do: one sentence."""


# ------------------------------------------------------------------------------------------------------------ questions
CUES = {  # the visible thing, never the law: attention goes to what can be seen
    "collision": "the objects at the point where they hit each other",
    "rigid body motion": "the solid object that moves without changing its shape",
    "elastic motion": "the object that bounces, stretches or springs back",
    "liquid motion": "the liquid that pours, flows or splashes",
    "gas motion": "the smoke, steam or mist that drifts",
    "deformation": "the object that is bent, pressed or squeezed",
    "melting": "the solid that turns into drops and puddles",
    "solidification": "the liquid that becomes hard or freezes",
    "vaporization": "the liquid that boils, with bubbles and steam",
    "liquefaction": "the droplets that form on a cold surface",
    "explosion": "the blast, the flash and the flying pieces",
    "combustion": "the flames and what they burn",
    "reflection": "the mirror image or the beam that is thrown back",
    "refraction": "the object or beam that looks bent through glass or water",
    "scattering": "the haze, beam or glow of scattered light",
    "interference and diffraction": "the coloured bands and rings of light",
    "unnatural light source": "the lamp, laser or screen that shines",
}


@dataclass(frozen=True)
class Settings:
    """How to ask and how to read attention. A folder's teacher.json may hold other values: the tiny VLM's does."""

    question: str = "Describe the {name} in this video: {cue}. Say what it is and where it happens, in one sentence."
    background: str = ("Describe the background of this video: the scene behind everything that moves. Say what it is "
                       "and where it is, in one sentence.")
    answer: str = ""  # this answer, such as "{name}", instead of the VLM's own: 5 to 70 times cheaper
    words: int = 64  # tokens of an answer, at most
    rows: str = "predict"  # question | predict | answer
    layers: str = ""  # first-last, counted from 0; empty = from L // 2 to before 4 L // 5
    heads: str = ""  # layer.head, layer.head ...; empty = every head
    sinks: float = 1.0  # a map is cut at this quantile of itself, which tames tokens that draw attention always

    def ask(self, name: str) -> str:
        return self.question.format(name=name, cue=CUES.get(name, name))

    def say(self, name: str) -> str:
        """The answer that is put into the VLM's mouth."""
        return self.answer.format(name=name)


def layers_of(text: str, n: int) -> list[int]:
    """The layers that `Settings.layers` names, of n. Raises VLMError."""
    if not text:
        return list(range(n // 2, max(4 * n // 5, n // 2 + 1)))
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < n:
        raise VLMError(f"--layers is first-last, from 0 to {n - 1} here, not {text!r}.")
    return list(range(first, last + 1))


def heads_of(text: str, layers: list[int], n: int) -> dict[int, list[int]]:
    """{layer: its heads} that `Settings.heads` names, of n a layer. Raises VLMError."""
    chosen = {layer: [] for layer in layers}
    for part in text.replace(" ", "").split(",") if text else ():
        found = re.fullmatch(r"(\d+)\.(\d+)", part)
        if not found or int(found[1]) not in chosen or int(found[2]) >= n:
            raise VLMError(f"--heads is a list of layer.head with layers among {layers[0]}-{layers[-1]} and heads "
                           f"below {n}, not {part!r}.")
        chosen[int(found[1])].append(int(found[2]))
    if not text:
        return {layer: list(range(n)) for layer in layers}
    return {layer: heads for layer, heads in chosen.items() if heads}


# --------------------------------------------------------------------------------------------------- frames for the VLM
def aligned_frames(n: int) -> np.ndarray:
    """Of n = 1 + 4 m frames those that make VLM token row j show what latent j of a causal VAE shows: (0, 0), (2, 3),
    (6, 7) ... Latent j has the frames 4 j - 3 .. 4 j; the pair has the same middle. Raises VLMError."""
    if n < 1 or n % 4 != 1:
        raise VLMError(f"A causal VAE with temporal stride 4 takes 1 + 4 m frames (e.g. 49 or 81), not {n}.")
    pairs = 4 * np.arange((n + 3) // 4)[:, None] - [2, 1]
    return pairs.clip(min=0).flatten()


def uniform_frames(n: int, k: int) -> np.ndarray:
    """k of n frames, evenly spread over all of them."""
    return ((np.arange(k) + .5) * n / k).astype(int)


def check_video(video, merged: int) -> np.ndarray:
    """A video as uint8 (F, H, W, 3); floats must lie in [0, 1]. Raises VLMError."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3:
        raise VLMError(f"A video must be 4-dimensional, (frames, height, width, 3); got shape {video.shape}.")
    if len(video) < merged:
        raise VLMError(f"This video has {len(video)} frame(s) but the model merges {merged} frames into one token: "
                       f"give at least {merged}.")
    if video.dtype == np.uint8:
        return video
    low, high = float(video.min()), float(video.max())
    if not (0 <= low and high <= 1):
        raise VLMError(f"Float frames must lie in [0, 1]; got [{low:.2f}, {high:.2f}] (a VAE input in [-1, 1]? use "
                       "(x + 1) / 2).")
    return (video * 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------ the attention function
ATTENTION = "watched_sdpa"  # the name under which transformers knows `watched_attention`


def watched_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, watcher=None, **how):
    """The library's sdpa attention, with somebody who watches.

    query (B, heads, S, d) and key, value (B, groups, P + S, d) come rotated, and joined with the cache: nothing of the
    model's projections, norms and positions has to be known here. watcher: what the model's forward was given under
    this name; watcher(query, key, mask, scaling, output) -> the output (B, S, heads, d) to go on with.
    """
    sdpa = encode.library("transformers").AttentionInterface()["sdpa"]
    output, weights = sdpa(module, query, key, value, attention_mask, **how)
    if watcher is not None:
        output = watcher(query, key, attention_mask, how["scaling"], output)
    return output, weights


def register_attention() -> None:
    """Tell transformers of `watched_attention`, and that it takes the masks that sdpa takes: without the second line
    the mask would be dropped without a word (`RowMaps` notices)."""
    transformers = encode.library("transformers")
    transformers.AttentionInterface.register(ATTENTION, watched_attention)
    transformers.AttentionMaskInterface.register(ATTENTION, transformers.AttentionMaskInterface()["sdpa"])


def library_changed(what: str) -> UserError:
    """The error when transformers does not do what `VLM` relies on. It concerns every clip, so it is no VLMError, for
    which a clip would be skipped."""
    version = encode.library("transformers").__version__
    return UserError(f"transformers {version} {what}: this release may have changed; README names those that were "
                     "tested.")


class RowMaps:
    """Watches one pass after a prefix: where some rows look, layer by layer, computed in float32."""

    def __init__(self, rows: list[list[list[int]]], prefix: "Prefix", heads: dict[int, list[int]]):
        """rows: of each question, of each kind, counted from the end of the prefix. heads: {layer: its heads}."""
        self.rows, self.prefix, self.heads = rows, prefix, heads
        self.layer = 0  # the library calls once a layer, the first layer first
        self.maps = {}  # {layer: (Q, kinds, N)}

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, output: Tensor) -> Tensor:
        if key.shape[2] != len(self.prefix.ids) + query.shape[2]:
            raise library_changed(f"passes {key.shape[2]} keys to attention, not those of the cache and the question")
        if mask is None and query.shape[2] > 1:
            raise library_changed("drops the attention mask of a registered attention function")
        if self.layer in self.heads:
            self.maps[self.layer] = torch.stack([self.of_question(*one, scaling)
                                                 for one in zip(self.rows, query, key)])
        self.layer += 1
        return output

    def of_question(self, kinds: list[list[int]], query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """(kinds, N) mean attention to the video of one question's rows. query (heads, R, d), key (groups, P + R, d)."""
        wanted = sorted({row for rows in kinds for row in rows})
        q = query[:, wanted].float().unflatten(0, (len(key), -1))  # (groups, heads of a group, rows, d)
        score = torch.einsum("ghrd,gsd->ghrs", q, key.float())
        score = score.flatten(0, 1)[self.heads[self.layer]] * scaling  # (heads, rows, P + R)
        place = len(self.prefix.ids) + torch.tensor(wanted, device=key.device)
        future = torch.arange(key.shape[1], device=key.device) > place[:, None]
        attention = score.masked_fill(future, -math.inf).softmax(-1)
        seen = attention[..., self.prefix.columns.to(key.device)].mean(0)  # (rows, N)
        if not seen.isfinite().all():
            raise VLMError(f"Attention of layer {self.layer} is not finite ({key.dtype}). Qwen-VL overflows in "
                           "float16: load it with dtype=torch.bfloat16.")
        return torch.stack([seen[[wanted.index(row) for row in rows]].mean(0) if rows else seen.new_zeros(seen.shape[1])
                            for rows in kinds])


# -------------------------------------------------------------------------------------------------------------- the VLM
@dataclass
class Prefix:
    """Some videos of one shape, prefilled."""
    cache: object  # keys and values of their prompts up to the question, a row a video
    ids: list[int]  # tokens of it, the same for all
    grid: tuple[int, int, int]  # t h w of the video tokens, after merging
    columns: Tensor  # (N,) their places among `ids`: Qwen3-VL has time stamps between frames
    fps: float


@dataclass
class Look:
    """One answer, and where its rows looked."""
    answer: str
    maps: Tensor  # (layers, kinds, t, h, w) float32: mean attention of rows and heads, unnormalised
    empty: bool  # nothing but special tokens

    def density(self, layers: slice | list = slice(None), kind: int = 0, sinks: float = 1.0) -> Tensor:
        """(t, h, w) float32, mean 1: layers averaged, renormalised over the video, cut at a quantile."""
        raw = self.maps[layers, kind].mean(0)
        density = raw * raw.numel() / raw.sum().clamp(min=1e-30)
        if sinks < 1:
            density = density.clamp(max=density.flatten().quantile(sinks))
            density = density / density.mean().clamp(min=1e-30)
        return density

    def mass(self, kind: int = 0) -> Tensor:
        """(layers,) share of the attention that reaches the video."""
        return self.maps[:, kind].sum((1, 2, 3))


class VLM:
    """A Qwen2.5-VL, Qwen3-VL or a model that is built like them, from a local folder.

    Tried: the TRIED families below. Another one is taken if it has what is needed: video tokens in one order (time,
    height, width), positions along these three axes by `get_rope_index`, and full attention in every layer.
    """

    TRIED = ("qwen2_5_vl", "qwen3_vl", "qwen2_vl", "qwen3_vl_moe")

    def __init__(self, folder, device: str = "cpu", dtype: torch.dtype = torch.float32):
        """Reads config, weights (safetensors), tokenizer and the picture settings. Raises UserError."""
        self.folder, self.device = Path(folder), torch.device(device)
        for name in ("config.json", "tokenizer_config.json"):
            if not (self.folder / name).is_file():
                raise VLMError(f"There is no {self.folder / name}: a Qwen2.5-VL or Qwen3-VL is expected, as "
                               "transformers saves it.")
        self.check_family()
        transformers = encode.library("transformers")
        model = encode.load(transformers.AutoModelForImageTextToText, self.folder, dtype=dtype,
                            attn_implementation="sdpa", ignore_mismatched_sizes=True)
        with encode.one_sentence(self.folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        self.wear(model, tokenizer)

    def check_family(self) -> None:
        """Raises VLMError, before any weights are read, for a model without what the maps need."""
        about = encode.read_json(self.folder / "config.json")
        vision = about.get("vision_config")
        needs = {"video tokens (video_token_id)": "video_token_id" in about,
                 "patches over time (temporal_patch_size)": isinstance(vision, dict) and "temporal_patch_size" in vision,
                 "positions along time, height and width (mrope_section)": "mrope_section" in json.dumps(about)}
        lacks = [what for what, there in needs.items() if not there]
        if lacks:
            raise VLMError(f"{self.folder} is of {about.get('model_type')!r}, which lacks {lacks[0]}: a Qwen-VL is "
                           f"needed; tried were {', '.join(self.TRIED)}.")

    def wear(self, model, tokenizer) -> None:
        """Take this model and tokenizer."""
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer
        self.core = model.base_model  # without logits of every token over 150,000 words
        self.config, vision = model.config, model.config.vision_config
        text = model.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or not hasattr(self.core, "get_rope_index"):
            raise VLMError(f"{self.folder} is of {model.config.model_type!r}, whose layers are {', '.join(sorted(kinds))}"
                           " or whose positions are not along time, height and width: its maps would be wrong.")
        register_attention()
        model.set_attn_implementation({"text_config": ATTENTION})
        self.stamped = model.config.model_type.startswith("qwen3_vl")  # "<1.5 seconds>" before each row of the video
        self.n_layers, self.n_heads = text.num_hidden_layers, text.num_attention_heads
        self.merged, self.patch, self.merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
        self.pad, self.special = model.config.video_token_id, set(tokenizer.all_special_ids)
        if tokenizer.convert_tokens_to_ids("<|video_pad|>") != self.pad:
            raise VLMError(f"Tokenizer and model disagree on the ids of <|video_pad|> "
                           f"({tokenizer.convert_tokens_to_ids('<|video_pad|>')} and {self.pad}). Load both from the "
                           "same checkpoint.")
        ends = model.generation_config.eos_token_id
        self.ends = {*([ends] if isinstance(ends, int) else ends or ()), tokenizer.eos_token_id} - {None}
        self.pictures = self.read_pictures()
        self.template = tokenizer.chat_template
        old = self.folder / "chat_template.json"  # where older checkpoints keep the one that knows of videos
        if old.exists() and "video_pad" not in (self.template or ""):
            self.template = encode.read_json(old).get("chat_template")
        if "video_pad" not in (self.template or ""):
            raise VLMError(f"{self.folder} has no chat template with a place for a video.")

    def read_pictures(self) -> dict:
        """{mean, std, least, most}: how pixels are normalised, and how many a frame may have."""
        found = {}
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            if (self.folder / name).exists():
                found |= encode.read_json(self.folder / name)
        size = found.get("size") or {}
        return {"mean": found.get("image_mean", [.48145466, .4578275, .40821073]),  # of CLIP
                "std": found.get("image_std", [.26862954, .26130258, .27577711]),
                "least": found.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
                "most": found.get("max_pixels") or size.get("longest_edge") or 14 * 14 * 4 * 1280}

    def settings(self, **given) -> Settings:
        """The defaults, then the folder's teacher.json, then what is given and not None. Raises UserError."""
        path, own = self.folder / "teacher.json", {}
        if path.exists():
            own = encode.read_json(path)
        kinds = {f.name: f.type for f in dataclasses.fields(Settings)}
        odd = [name for name, value in own.items() if type(value) is not kinds.get(name)]
        if odd:
            raise UserError(f"{path} has settings that are unknown or of another type: {data.listed(sorted(odd))}.")
        settings = Settings(**{**own, **{name: value for name, value in given.items() if value is not None}})
        if settings.rows not in KINDS:
            raise UserError(f"--rows must be one of {', '.join(KINDS)}, not {settings.rows!r}.")
        try:
            settings.ask("combustion"), settings.say("combustion")
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as e:
            raise UserError(f"--question has a place for {{name}} and {{cue}}, --answer for {{name}}, not {e}."
                            ) from None
        if not 0 < settings.sinks <= 1 or settings.words < 1:
            raise UserError("--sinks is a quantile above 0 and up to 1, and --words at least 1.")
        heads_of(settings.heads, layers_of(settings.layers, self.n_layers), self.n_heads)
        return settings

    # --- pixels and words
    def size_for(self, height: int, width: int, most: int = 0) -> tuple[int, int]:
        """Height and width to which frames are resized: multiples of a merged patch, aspect kept nearly, and as many
        pixels as the model was trained with (the rule of Qwen's processors, `smart_resize`)."""
        unit, most = self.patch * self.merge, min(most or math.inf, self.pictures["most"])
        h, w = (max(unit, round(v / unit) * unit) for v in (height, width))
        if h * w > most:
            shrink = math.sqrt(height * width / most)
            h, w = (max(unit, math.floor(v / shrink / unit) * unit) for v in (height, width))
        elif h * w < self.pictures["least"]:
            grow = math.sqrt(self.pictures["least"] / (height * width))
            h, w = (math.ceil(v * grow / unit) * unit for v in (height, width))
        return h, w

    def patches(self, videos) -> tuple[Tensor, tuple[int, int, int]]:
        """videos (B, F, H, W, 3) -> pixel values (B n, C m p p) as the model wants them, and the grid (t, H', W') of
        patches before merging. An odd last frame is repeated. Raises VLMError."""
        videos = np.stack([check_video(video, self.merged) for video in videos])
        B, frames, H, W = videos.shape[:4]
        x = torch.from_numpy(videos).to(self.device).permute(0, 1, 4, 2, 3)  # (B, F, 3, H, W)
        height, width = self.size_for(H, W)
        if (height, width) != (H, W):
            x = F.interpolate(x.flatten(0, 1).float(), (height, width), mode="bicubic", antialias=True)
            x = x.round().clamp(0, 255).unflatten(0, (B, frames))
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.pictures["mean"],
                                                                                self.pictures["std"]))
        x = (x.float() / 255 - mean) / std
        x = torch.cat([x, x[:, -1:].expand(-1, -frames % self.merged, -1, -1, -1)], dim=1)
        m, s, p = self.merged, self.merge, self.patch
        t, h, w = x.shape[1] // m, height // (p * s), width // (p * s)
        x = x.reshape(B, t, m, 3, h, s, p, w, s, p).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # B t h w, s s, C, m, p p
        return x.reshape(B * t * h * s * w * s, 3 * m * p * p), (t, h * s, w * s)

    def prompt(self, question: str, grid: tuple[int, int, int], fps: float) -> tuple[list[int], list[int]]:
        """Token ids up to the end of the video, and from the question on. grid: video tokens t h w; fps of the frames
        that are shown, which makes the times the model is told."""
        message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
        text = self.tokenizer.apply_chat_template(message, chat_template=self.template, tokenize=False,
                                                  add_generation_prompt=True)
        (t, h, w), place = grid, "<|vision_start|><|video_pad|><|vision_end|>"
        if text.count(place) != 1:
            raise VLMError(f"The chat template of {self.folder} makes no single place for a video.")
        before, after = text.split(place)
        run = "<|vision_start|>" + "<|video_pad|>" * (h * w * (1 if self.stamped else t)) + "<|vision_end|>"
        if self.stamped:
            stamp = [(self.merged * j + (self.merged - 1) / 2) / fps for j in range(t)]
            run = "".join(f"<{seconds:.1f} seconds>{run}" for seconds in stamp)
        prefix, suffix = (self.tokenizer(part, add_special_tokens=False).input_ids for part in (before + run, after))
        found = prefix.count(self.pad)
        if found != t * h * w:
            raise VLMError(f"The prompt holds {found} <|video_pad|> tokens (id {self.pad}) but the video has "
                           f"{t}x{h}x{w} = {t * h * w} tokens. Was the prompt truncated, or does it hold two videos?")
        return prefix, suffix

    def positions(self, ids: list[int], grid: tuple[int, int, int], fps: float) -> Tensor:
        """(3, 1, len(ids)) places along time, height and width, by the model's own rule. `mm_token_type_ids` tells it
        where the video is; without them it falls back to one axis and says nothing. Likewise without the seconds a
        token row spans: frames are then taken for 24 a second."""
        pads = torch.tensor([ids]) == self.pad
        kinds = 2 * (pads & (pads.cumsum(1) <= math.prod(grid)))  # an answer may hold one, which is a word there
        thw = torch.tensor([[grid[0], grid[1] * self.merge, grid[2] * self.merge]])
        try:
            places = self.core.get_rope_index(torch.tensor([ids]), mm_token_type_ids=kinds, video_grid_thw=thw,
                                              second_per_grid_ts=torch.tensor([self.merged / fps]))[0]
        except TypeError as e:
            raise library_changed(f"calls the arguments of get_rope_index otherwise ({e})") from None
        if places.shape != (3, 1, len(ids)):
            raise library_changed(f"gives positions of shape {tuple(places.shape)}, not one of each token along 3 axes")
        return places

    def run(self, ids: Tensor, places: Tensor, cache, mask: Tensor | None = None, **more) -> Tensor:
        """Hidden states (B, S, D) of tokens (B, S) at their positions (3, B, S), after what the cache holds, which grows
        by them. The first four arguments have changed their names before, never their order: they go by place."""
        return self.core(ids, mask, places, cache, use_cache=True, **more).last_hidden_state

    # --- the three passes
    @torch.no_grad()
    def prefill(self, videos, fps: float) -> Prefix:
        """videos (B, F, H, W, 3) of one shape, uint8 or float in [0, 1]; fps: frames a second of those shown."""
        pixels, (t, h, w) = self.patches(videos)
        grid = t, h // self.merge, w // self.merge
        ids, _ = self.prompt("?", grid, fps)
        B, positions = len(videos), self.positions(ids, grid, fps).to(self.device)
        tokens = torch.tensor([ids], device=self.device)
        cache = encode.library("transformers").DynamicCache(config=self.config.get_text_config())
        self.run(tokens.expand(B, -1), positions.expand(-1, B, -1), cache,
                 pixel_values_videos=pixels.to(self.model.dtype),
                 video_grid_thw=torch.tensor([[t, h, w]], device=self.device).expand(B, -1))
        if cache.get_seq_length() != len(ids):
            raise library_changed(f"left {cache.get_seq_length()} of {len(ids)} tokens in the cache it was given")
        return Prefix(cache, ids, grid, (tokens[0] == self.pad).nonzero()[:, 0], fps)

    def fork(self, prefix: Prefix, owners: list[int]):
        """A cache of its own for each of some questions; owners: the video of each."""
        cache = copy.deepcopy(prefix.cache)
        cache.batch_select_indices(torch.tensor(owners, device=self.device))
        return cache

    def padded(self, prefix: Prefix, tails: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (Q, R), padded behind, and their positions (3, Q, R), after the prefix."""
        R = max(map(len, tails))
        ids, places = torch.zeros(len(tails), R, dtype=torch.int64), torch.zeros(3, len(tails), R, dtype=torch.int64)
        for row, tail in enumerate(tails):
            ids[row, :len(tail)] = torch.tensor(tail)
            places[:, row, :len(tail)] = self.positions(prefix.ids + tail, prefix.grid, prefix.fps)[:, 0, -len(tail):]
        return ids.to(self.device), places.to(self.device)

    @torch.no_grad()
    def answer(self, prefix: Prefix, owners: list[int], suffixes: list[list[int]], words: int) -> list[list[int]]:
        """Token ids of the greedy answers, without the end token, all questions at once."""
        cache, (ids, places) = self.fork(prefix, owners), self.padded(prefix, suffixes)
        Q, R = ids.shape
        length = torch.tensor([len(suffix) for suffix in suffixes], device=self.device)
        # Words follow behind the padding, so it must be masked; its places in time are never read.
        mask = torch.cat([torch.ones(Q, len(prefix.ids), dtype=torch.int64, device=self.device),
                          (torch.arange(R, device=self.device) < length[:, None]).long()], dim=1)
        h = self.run(ids, places, cache, mask)
        last = h[torch.arange(Q, device=self.device), length - 1]  # (Q, D)
        place = torch.stack([self.positions(prefix.ids + suffix, prefix.grid, prefix.fps).max() + 1
                             for suffix in suffixes]).to(self.device)
        answers, running = [[] for _ in suffixes], set(range(Q))
        for _ in range(words):
            token = self.model.get_output_embeddings()(last).argmax(-1)
            running -= {row for row in running if token[row].item() in self.ends}
            for row in running:
                answers[row].append(token[row].item())
            if not running:
                break
            mask = F.pad(mask, (0, 1), value=1)
            last = self.run(token[:, None], place.expand(3, 1, Q).transpose(1, 2), cache, mask)[:, 0]
            place = place + 1
        return answers

    @torch.no_grad()
    def attend(self, prefix: Prefix, owners: list[int], suffixes: list[list[int]], answers: list[list[int]],
               kinds: tuple[str, ...], heads: dict[int, list[int]]) -> Tensor:
        """(Q, layers, kinds, t, h, w) float32: attention from rows of question and answer to the video, averaged over
        rows and heads. heads: {layer: its heads}."""
        tails = [suffix + answer for suffix, answer in zip(suffixes, answers)]
        ids, places = self.padded(prefix, tails)
        rows = [[self.rows_of(kind, suffix, answer) for kind in kinds] for suffix, answer in zip(suffixes, answers)]
        watcher = RowMaps(rows, prefix, heads)
        # No mask: behind the rows that are read there is only padding, which no earlier row sees.
        self.run(ids, places, self.fork(prefix, owners), watcher=watcher)
        if watcher.layer != self.n_layers:
            raise library_changed(f"called the registered attention function for {watcher.layer} of "
                                  f"{self.n_layers} layers")
        return torch.stack([watcher.maps[layer] for layer in heads], dim=1).unflatten(-1, prefix.grid)

    def rows_of(self, kind: str, suffix: list[int], answer: list[int]) -> list[int]:
        """The rows of one kind, counted from the end of the prefix. Special tokens and what predicts them are left
        out: they say nothing of the video."""
        if kind == "question":
            words = next((i for i, token in enumerate(suffix) if token in self.special), len(suffix))
            return list(range(words))
        first = len(suffix) - (kind == "predict")
        return [first + i for i, token in enumerate(answer) if token not in self.special]

    def look(self, videos, fps: float, questions: list[list[str]], settings: Settings = Settings(),
             kinds: tuple[str, ...] = (), layers: list[int] | None = None, batch: int = 0,
             answers: list[list[str]] | None = None) -> list[list[Look]]:
        """Ask each of some videos (B, F, H, W, 3) its own questions, and see where the answers look.

        fps: frames a second of those shown. kinds, layers: None of them given, those of the settings. batch: questions
        at once (0 = all); one by one gives the same to rounding. answers: these, a question each, instead of the
        VLM's own (without them settings.answer, as it stands). Raises VLMError; Stopped when memory is full.
        """
        kinds = kinds or (settings.rows,)
        layers = layers_of(settings.layers, self.n_layers) if layers is None else layers
        heads = heads_of(settings.heads, layers, self.n_heads)
        pairs = [(video, question) for video, asked in enumerate(questions) for question in asked]
        given = sum(answers, []) if answers else [settings.answer] * len(pairs)
        looks, batch = [[] for _ in questions], batch or max(1, len(pairs))
        with explained(self, len(videos), np.shape(videos[0]) if len(videos) else (), batch):
            prefix = self.prefill(videos, fps)
            for at in range(0, len(pairs), batch):
                owners, asked = zip(*pairs[at:at + batch])
                suffixes = [self.prompt(question, prefix.grid, fps)[1] for question in asked]
                if answers or settings.answer:
                    said = [self.tokenizer(text, add_special_tokens=False).input_ids for text in given[at:at + batch]]
                else:
                    said = self.answer(prefix, owners, suffixes, settings.words)
                maps = self.attend(prefix, owners, suffixes, said, kinds, heads).cpu()
                for owner, answer, one in zip(owners, said, maps):
                    empty = all(token in self.special for token in answer)
                    looks[owner].append(Look(self.tokenizer.decode(answer, skip_special_tokens=True), one, empty))
        return looks

    def look_for(self, videos, fps: float, names: list[list[str]], settings: Settings, **how) -> list[list[Look]]:
        """`look`, with the question for each of a video's phenomena and, last, that for the background."""
        questions = [[settings.ask(name) for name in asked] + [settings.background] for asked in names]
        answers = [[settings.say(name) for name in (*asked, "background")] for asked in names]
        return self.look(videos, fps, questions, settings, answers=answers if settings.answer else None, **how)


@contextlib.contextmanager
def explained(vlm: VLM, videos: int, shape: tuple, batch: int):
    """Running out of the device's memory says what is large, and what helps, most first. Raises Stopped."""
    try:
        yield
    except torch.OutOfMemoryError:
        text = vlm.config.text_config
        weights = sum(p.nbytes for p in vlm.model.parameters()) / 2**30
        raise Stopped(
            f"The device's memory is full: weights {weights:.1f} GiB, {videos} video(s) of {shape}, {batch} questions "
            f"at once over {text.num_hidden_layers} layers. What helps, most first: --batch 1 (each question keeps its "
            "own keys and values), fewer --pixels (smaller frames), fewer --frames_shown, --dtype bf16, --answer "
            "\"{name}\" (no decoding), a smaller VLM.") from None


# --------------------------------------------------------------------------------------------------------- maps on disk
@dataclass
class Shown:
    """A clip as the VLM sees it, and where it is from."""
    source: str  # name of its file
    frames: np.ndarray  # (F, H, W, 3) uint8
    fps: float  # of these frames
    times: list[float]  # of each row of tokens, in seconds of the file
    size: tuple[int, int]  # height and width of the upright file
    crop: tuple[float, float, float, float]  # left, top, right, bottom in its pixels
    names: list[str]  # phenomena to ask for


def shown(window: data.Window, source: str, names: list[str], fps: float, merged: int, uniform: int = 0) -> Shown:
    """What of a window the VLM is shown: the frames that latents stand for, or, with `uniform`, that many."""
    n = len(window.video)
    frames = uniform_frames(n, uniform) if uniform else aligned_frames(n)
    if not uniform and merged != 2:
        raise VLMError(f"Time axes do not fit: this VLM merges {merged} frames, aligned sampling makes pairs; give "
                       "--sample N.")
    rows = np.pad(frames, (0, -len(frames) % merged), mode="edge").reshape(-1, merged).mean(1)
    rate = uniform * fps / n if uniform else fps / 2  # pairs, four frames apart
    return Shown(source, window.video[frames], rate, (window.start + rows / fps).tolist(), window.size, window.crop,
                 names)


class Store(encode.Store):
    """A folder of maps, as one shard writes it."""
    manifest = "maps.json"

    def name(self, video: data.Video) -> str:
        if video.path.name:
            return super().name(video)
        return data.digest([self.key, video.name, video.categories])[:24]  # a clip of the world is no file

    def row(self, file: str, video: data.Video) -> tuple:
        try:
            times = data.read_about(self.clips / file)["times"]
        except ValueError:  # of another shard, which makes it again: who reads it until then is told
            times = [0.0]
        return file, video.name, times[0], times[-1]


@dataclass
class Tally:
    """What a summary says at the end."""
    made: int = 0
    denied: int = 0  # answers that say it is not there
    empty: int = 0
    little: int = 0  # maps with hardly any attention on the video
    alike: int = 0  # maps that are nearly the background's

    def __str__(self) -> str:
        said = {"denied": "answers deny the phenomenon, so that their maps are left out",
                "empty": "answers hold nothing but special tokens, likewise",
                "little": f"maps have under {LITTLE:.0%} of the attention on the video (a broken prompt?)",
                "alike": f"maps are nearly the background's (cosine above {ALIKE})"}
        return "".join(f"; {getattr(self, name)} {what}" for name, what in said.items() if getattr(self, name))


def write_map(store: Store, file: str, clip: Shown, asked: list[tuple[str, Look]], background: Look,
              settings: Settings, tally: Tally) -> None:
    """One clip's maps of the phenomena that were found, beside the background's. Raises VLMError where the background
    has no answer."""
    if background.empty:
        raise VLMError("the model answered the background question with nothing but special tokens")
    behind, kept = background.density(sinks=settings.sinks), []
    for name, look in asked:
        tally.empty, tally.denied = tally.empty + look.empty, tally.denied + bool(DENIAL.search(look.answer))
        if look.empty or DENIAL.search(look.answer):
            continue
        density = look.density(sinks=settings.sinks)
        tally.little += bool((look.mass() < LITTLE).all())
        tally.alike += F.cosine_similarity(density.flatten(), behind.flatten(), dim=0).item() > ALIKE
        kept.append((name, look.answer, density))
    tensors = {"maps": torch.stack([density for *_, density in kept] or [behind])[:len(kept)].half(),
               "background": behind.half()}
    about = {"key": store.key, "file": clip.source, "times": clip.times, "size": clip.size, "crop": clip.crop,
             "categories": [world.CATEGORIES.index(name) for name, *_ in kept],
             "answers": {name: answer for name, answer, _ in kept}, "background": background.answer}
    data.write_tensors(store.clips / file, tensors, about, store.tag)
    tally.made += 1


def annotate(vlm: VLM, settings: Settings, store: Store, groups, tally: Tally, batch: int, skipped: list[str],
             bar: tqdm) -> None:
    """Make the map files of groups of clips, (file, Shown) each, all of one shape in a group. A clip that the VLM
    cannot do is noted in `skipped`."""
    for group in groups:
        try:
            looks = vlm.look_for([clip.frames for _, clip in group], group[0][1].fps,
                                 [clip.names for _, clip in group], settings, batch=batch)
        except VLMError as e:
            skipped += [f"{clip.source} ({e})" for _, clip in group]
            looks = []
        for (file, clip), (*mine, background) in zip(group, looks):
            try:
                write_map(store, file, clip, list(zip(clip.names, mine)), background, settings, tally)
            except VLMError as e:
                skipped.append(f"{clip.source} ({e})")
        bar.update(len(group))


def map_settings(vlm: VLM, settings: Settings, **more) -> dict:
    """All that shapes the maps, but for the videos: what maps.json keeps."""
    cues = hashlib.sha256(json.dumps([CUES, vlm.template]).encode()).hexdigest()[:16]
    return {"format": 1, "vlm": encode.fingerprint(vlm.folder), "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "layers": layers_of(settings.layers, vlm.n_layers), "template": cues, **more,
            **{name: value for name, value in dataclasses.asdict(settings).items() if name != "layers"}}


def full_frame(path: Path, vlm: VLM, most: int) -> tuple[int, int]:
    """Height and width at which the VLM sees a video, uncropped but for a patch's rest."""
    with data.av.open(str(path)) as container:
        return vlm.size_for(*data.upright(next(container.decode(video=0))), most)


def windows(video: data.Video, vlm: VLM, cfg: Config, most: int) -> list[data.Window]:
    """The windows of a video at the VLM's size; of a short one the largest 1 + 4 m frames that it has. Raises
    ValueError with the reason when there are none, or what the decoder raises."""
    times, end = data.timeline(video.path)
    has = math.ceil((end - times[0] - data.TOLERANCE) * cfg.fps)
    frames = min(cfg.frames, 1 + 4 * ((has - 1) // 4))
    if frames < 5:
        raise ValueError(f"too short, {end - times[0]:.2g} s")
    height, width = full_frame(video.path, vlm, most)
    return data.windows_of(video.path, dataclasses.replace(cfg, frames=frames, height=height, width=width))


def annotate_videos(args, folder: data.Folder, vlm: VLM, settings: Settings) -> None:
    """--videos: maps of a folder's videos. Raises UserError and Stopped."""
    cfg, (first, shards) = folder.cfg, encode.shard_of(args.shard)
    asked = map_settings(vlm, settings, frames=args.frames, fps=args.fps, windows=args.windows, sample=args.sample,
                         pixels=args.pixels, all=args.all)
    store, tally = Store(Path(args.out), asked, f"{first + 1}of{shards}"), Tally()
    videos = list(folder.videos.values())
    names, there = [store.name(video) for video in videos], store.there()
    mine = dict(list(zip(names, videos))[first::shards])
    have = {file for name in mine for file in there.get(name, ()) if store.sound(store.clips / file)}
    todo = {name: video for name, video in mine.items()
            if not encode.complete([file for file in there.get(name, ()) if file in have])}

    def groups(bar):
        for name, video in todo.items():
            present = [world.CATEGORIES[c] for c in video.categories if c < len(world.CATEGORIES)]
            try:
                found = windows(video, vlm, cfg, args.pixels)
            except Exception as e:  # whatever decoders make of a damaged file concerns that file alone
                folder.skipped.append(f"{video.name} ({getattr(e, 'strerror', None) or e or type(e).__name__})")
                found = []
            for window in found:
                file = f"{name}-{window.number}of{window.taken}.safetensors"
                if file not in have:
                    asked = list(CUES) if args.all else present
                    yield [(file, shown(window, video.name, asked, cfg.fps, vlm.merged, args.sample))]
            bar.total += max(len(found) - 1, 0)

    try:
        with tqdm(total=len(todo), desc="looking", unit="clip") as bar:
            annotate(vlm, settings, store, groups(bar), tally, args.batch, folder.skipped, bar)
        index = store.write_index(videos, names)
    except OSError as e:
        raise Stopped(f"{e.filename or store.out} cannot be read or written any more: {e.strerror or e}.") from None
    skipped = f"; skipped {len(folder.skipped)}: {data.listed(folder.skipped)}" if folder.skipped else ""
    if not index["clips"]:
        raise UserError(f"No map could be made from {args.videos}{skipped or '; the annotations name no video'}.")
    print(f"{tally.made} maps made, {len(have)} were there; {store.out} holds {len(index['clips'])} of {index['done']} "
          f"of {index['videos']} videos{tally}{skipped}{folder.strangers()}")


# ----------------------------------------------------------------------------------------------------- the tiny teacher
SPECIAL = ("<|pad|>", "<|end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
MARKS = dict(image_token_id=2, video_token_id=3, vision_start_token_id=4, vision_end_token_id=5)
TINY = dict(question="is there {name}", background="what is the background", words=4, sinks=.93)
KEPT = 24  # video tokens that a question may see in training
GLIMPSES = 4  # draws of so many from each video
GROUP = 32  # clips of the world that are looked at together


def tiny_words() -> list[str]:
    """All words of the tiny VLM's questions and answers. A phenomenon's name is one word: "motion" alone would look for
    four of them."""
    return ["is", "there", "what", "the", "background", "yes", "no", "nothing", *world.PHENOMENA]


def lessons(clip: world.Clip, still: bool, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions and answers about a clip: words alone, never a mask. To ask again is a weight in the loss.

    still: it is a photograph, in which nothing happens. What only looks as if it happened is asked for as well (the
    caption tells, or it is a photograph), for otherwise a press or a hot plate, as sure a sign as what happens in it
    and often larger, would be looked for.
    """
    shown = [actor.phenomenon for actor in clip.actors]
    alike = [name for name in world.PHENOMENA if name not in shown
             and any(re.search(phrase.replace("{c}", r"\w+"), clip.caption)
                     for phrase in world.PHENOMENA[name].decoy_phrases)]
    present, alike = ([], shown + alike) if still else (shown, alike)
    absent = [name for name in world.PHENOMENA if name not in shown]
    asked = 3 * present + 2 * alike + [str(rng.choice(absent))]
    return [(TINY["background"], "nothing"),
            *((TINY["question"].format(name=name), "yes" if name in present else "no") for name in asked)]


def photograph(cfg: Config, rng: np.random.Generator) -> world.Clip:
    """A still of the world, in any colours: colour cues and motion are missing, everything else is there."""
    drawing = {**data.World(cfg).drawing, "decoys": 1.0, "colour_cues": False}
    clip = world.make_clip(cfg.world_seed, int(rng.integers(cfg.world_clips)), **drawing)
    still = np.broadcast_to(clip.video[rng.integers(cfg.frames)], clip.video.shape)
    return dataclasses.replace(clip, video=still)


def tiny_tokenizer():
    """Words to ids, with a chat template as Qwen-VL's, but for its many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {word: i for i, word in enumerate([*SPECIAL, *tiny_words()])}
    core = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_tokens([word for word in words if " " in word])  # found before the text is split at its spaces
    tokenizer = encode.library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[1], extra_special_tokens=list(SPECIAL[2:]))
    tokenizer.chat_template = ("{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'video' %}"
                               "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
                               "{% endfor %}{% endfor %}")
    return tokenizer


def write_tiny(folder: Path, seed: int) -> None:
    """An untrained tiny VLM: a Qwen2.5-VL of a tenth of a million parameters with its tokenizer, as a folder for VLM.

    What made it work: weights of std 0.08, about 1 / sqrt(width) (with transformers' 0.02 nothing is grounded); no
    attention in the vision tower and one layer behind it, so that a token is what is at its place, and nothing else;
    no rotation by place (all frequencies turn with time, whose ids are the same throughout the video), so that
    attention goes by content.
    """
    transformers, tokenizer = encode.library("transformers"), tiny_tokenizer()
    rope = dict(rope_type="default", rope_theta=3.0, mrope_section=[12, 0, 0])
    text = dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=4, initializer_range=0.08, rope_parameters=rope,
                bos_token_id=None, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    vision = dict(depth=0, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=4, temporal_patch_size=2,
                  spatial_merge_size=1, window_size=32, fullatt_block_indexes=[], out_hidden_size=96,
                  tokens_per_second=0, initializer_range=0.08)
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **MARKS))
    model.generation_config.eos_token_id = 1
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The world is dark: with the usual mean and spread all patches would look alike.
    config.write(folder / "preprocessor_config.json", json.dumps(dict(
        image_mean=[.12, .12, .16], image_std=[.2, .2, .2], min_pixels=1, max_pixels=2**20)))
    config.write(folder / "teacher.json", json.dumps(TINY))


def branches(vlm: VLM, asked: list[list[tuple[str, str]]], grid: tuple[int, int, int], fps: float
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence a row of questions: KEPT video tokens once, then a branch a question, which sees them and itself.

    -> ids, labels (B, S), places (3, B, S), mask (B, 1, S, S).
    """
    whole, _ = vlm.prompt(TINY["background"], grid, fps)
    places = vlm.positions(whole, grid, fps)  # (3, 1, n): which of the video's is no matter, none turns (`write_tiny`)
    dropped = set([i for i, token in enumerate(whole) if token == vlm.pad][KEPT:])
    left = [i for i in range(len(whole)) if i not in dropped]
    words = {text: vlm.tokenizer(text).input_ids for text in {text for row in asked for pair in row for text in pair}}
    end, first, P = vlm.tokenizer.eos_token_id, int(places.max()) + 1, len(left)
    S = P + max(sum(len(words[q] + words[a]) + 1 for q, a in row) for row in asked)
    ids, labels = torch.zeros(len(asked), S, dtype=torch.int64), torch.full((len(asked), S), -100)
    ids[:, :P], places = torch.tensor(whole)[left], F.pad(places[:, :, left], (0, S - P)).repeat(1, len(asked), 1)
    mask = torch.eye(S, dtype=torch.bool).repeat(len(asked), 1, 1)  # everyone sees itself, padding too
    mask[:, :P, :P] = torch.ones(P, P, dtype=torch.bool).tril()
    for b, row in enumerate(asked):
        at = P
        for question, answer in row:
            tail, length = words[question] + words[answer] + [end], len(words[question])
            here = slice(at, at + len(tail))
            ids[b, here], places[:, b, here] = torch.tensor(tail), first + torch.arange(len(tail))
            labels[b, at + length - 1:at + len(tail) - 1] = torch.tensor(tail[length:])
            mask[b, here, :P], mask[b, here, here] = True, torch.ones(len(tail), len(tail), dtype=torch.bool).tril()
            at += len(tail)
    return ids, labels, places, mask[:, None]


def glimpses(vlm: VLM, clips: list[world.Clip], random: torch.Generator) -> tuple[Tensor, tuple[int, int, int]]:
    """Pixel values (B GLIMPSES KEPT, C) of tokens drawn from each clip (all, where there are fewer), and the grid t h w
    of all its tokens.

    Token dropout: no single token will do, so attention must find all of an object. As the tiny VLM's tokens know
    nothing of each other (no attention in the tower, one layer behind it), those that a question may not see need not
    be there at all, which makes a step cheap.
    """
    pixels, grid = vlm.patches([clip.video for clip in clips])
    pixels = pixels.unflatten(0, (len(clips), -1))  # (B, N, C)
    drawn = torch.rand(len(clips), GLIMPSES, pixels.shape[1], generator=random).argsort(-1)[..., :KEPT]
    return pixels[torch.arange(len(clips))[:, None, None], drawn].flatten(0, 2), grid


def answer_loss(vlm: VLM, cfg: Config, n: int, rng: np.random.Generator, random: torch.Generator,
                watcher=None) -> Tensor:
    """Cross-entropy of the answers about n clips; every other one is a photograph. watcher: of `watched_attention`."""
    # A look-alike in every scene that has room: a glass or a candle alone must not give the answer.
    drawing = {**data.World(cfg).drawing, "decoys": 1.0}
    clips = [photograph(cfg, rng) if i % 2 else
             world.make_clip(cfg.world_seed, int(rng.integers(cfg.world_clips)), **drawing) for i in range(n)]
    pixels, grid = glimpses(vlm, clips, random)
    ids, labels, places, mask = branches(vlm, [lessons(clip, bool(i % 2), rng) for i, clip in enumerate(clips)], grid,
                                         cfg.frames)
    ids, labels, mask = (x.repeat_interleave(GLIMPSES, 0) for x in (ids, labels, mask))
    places, told = places.repeat_interleave(GLIMPSES, 1), labels >= 0
    thw = torch.tensor([[len(pixels) // len(ids), 1, 1]] * len(ids))  # as if each token were a frame of its own
    out = vlm.core(ids, mask, places, use_cache=False, pixel_values_videos=pixels, video_grid_thw=thw,
                   watcher=watcher)
    return F.cross_entropy(vlm.model.get_output_embeddings()(out.last_hidden_state[told]), labels[told])


class DropHeads:
    """Leaves whole heads out at random as it watches attention, so that each learns to find everything.

    Without it some find nothing, rest on the background, and spoil the mean of heads.
    """

    def __init__(self, share: float, random: torch.Generator):
        self.share, self.random = share, random

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, output: Tensor) -> Tensor:
        kept = torch.rand(*output.shape[:3], 1, generator=self.random) >= self.share  # output (B, S, h, d)
        return output * kept / (1 - self.share)


def train_tiny(vlm: VLM, cfg: Config, seed: int, minutes: float, steps: int = 0, batch: int = 8,
               lr: float = 5e-3) -> None:
    """Train a tiny VLM on the world's answers for so long, or for so many steps, which a like machine repeats.

    Muon on the matrices: with AdamW alone names are hardly told apart in that time. Its weight decay is a hundred
    times the usual: it keeps attention soft, so that it finds all of an object and not its surest token.
    """
    model, rng, random = vlm.model.train(), np.random.default_rng([seed, 11]), torch.Generator().manual_seed(seed)
    words = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not words]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=1.0, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=lr, betas=(.9, .98), weight_decay=.01)]
    dropping = DropHeads(.3, random)
    start, step, mean, done = time.monotonic(), 0, 0.0, 0.0
    with tqdm(total=100, desc="tiny VLM", unit="%") as bar:
        while (done := step / steps if steps else (time.monotonic() - start) / (60 * minutes)) < 1:
            loss = answer_loss(vlm, cfg, batch, rng, random, dropping)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1, (step + 1) / 50, 2 * (1 - done))
                optimizer.step()
                optimizer.zero_grad()
            step, mean = step + 1, .98 * mean + .02 * loss.item()
            bar.update(int(100 * done) - bar.n)
            bar.set_postfix_str(f"step {step}, loss {mean / (1 - .98 ** step):.3f}")
    model.eval()


def make_tiny(folder: Path, cfg: Config, seed: int, minutes: float, steps: int = 0) -> None:
    """Train a tiny VLM and write it to a folder: whole or not at all."""
    if not folder.name or folder.exists():
        raise UserError(f"{folder} is there already: `--annotate tiny_vlm` makes its maps; to train another VLM give "
                        "another --vlm, or delete it.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_tiny(part, seed)
        vlm = VLM(part)
        vlm.model.requires_grad_(True)
        train_tiny(vlm, cfg, seed, minutes, steps)
        vlm.model.save_pretrained(part)
        part.rename(folder)
    except OSError as e:
        raise Stopped(f"The tiny VLM could not be written to {folder}: {e.strerror or e}.") from None
    print(f"wrote {folder}: {sum(p.numel() for p in vlm.model.parameters()) / 1e6:.2f} M parameters")


# ------------------------------------------------------------------------------------------------ the world's own clips
def saliency(video: np.ndarray, t: int) -> Tensor:
    """(t, H, W): how much each pixel changes from frame to frame. The rival that needs no model."""
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean(-1)
    change = np.concatenate([change[:1], change])  # the first frame has none before it
    return data.resample(torch.from_numpy(change), (t, *change.shape[1:]))


def of_world(pool: data.Pool, row: int, merged: int) -> Shown:
    """A clip of the pool, all of its frames."""
    name, _, size, crop = pool.sources[row]
    video, F_ = np.asarray(pool.video[row]), pool.video.shape[1]
    times = (np.pad(np.arange(F_), (0, -F_ % merged), mode="edge").reshape(-1, merged).mean(1) / F_).tolist()
    return Shown(name, video, F_, times, tuple(size), tuple(crop), [world.CATEGORIES[c] for c in pool.categories[row]])


def annotate_world(args, cfg: Config, vlm: VLM | None, settings: Settings | None) -> None:
    """--annotate NAME: maps of the pool's clips, for `train.py --teacher NAME`. Raises UserError and Stopped.

    Of a VLM; or, as rivals, saliency: frame differences; shuffled: each clip gets the VLM's maps of another clip with
    the same phenomena.
    """
    pool = data.open_pool(cfg)
    asked = map_settings(vlm, settings) if vlm else {"format": 1, "kind": args.kind}
    if args.kind == "shuffled":
        other = data.Maps(data.world_maps(cfg, pool, args.maps))
        asked["of"] = other.key
    (first, shards), tally = encode.shard_of(args.shard), Tally()
    store = Store(data.world_maps(cfg, pool, args.annotate), asked, f"{first + 1}of{shards}")
    rows = [data.Video(source[0], Path(), caption, categories)
            for source, caption, categories in zip(pool.sources, pool.captions, pool.categories)]
    names, there = [store.name(video) for video in rows], store.there()
    have = {name for name in names if name in there}
    todo = [row for row in range(first, len(rows), shards) if names[row] not in have]
    skipped = []
    try:
        with tqdm(total=len(todo), desc=f"maps by {args.kind}", unit="clip") as bar:
            groups = ([(f"{names[row]}-0of1.safetensors", of_world(pool, row, vlm.merged if vlm else 2))
                       for row in todo[at:at + GROUP]] for at in range(0, len(todo), GROUP))
            if args.kind == "vlm":
                annotate(vlm, settings, store, groups, tally, args.batch, skipped, bar)
            elif args.kind == "saliency":
                for group in groups:
                    for file, clip in group:
                        change = saliency(clip.frames, len(clip.times))
                        look, even = (Look("", m[None, None], False) for m in (change, torch.ones_like(change)))
                        write_map(store, file, clip, [(name, look) for name in clip.names], even, Settings(), tally)
                    bar.update(len(group))
            else:
                shuffle(pool, rows, names, todo, other, store, tally, bar)
        index = store.write_index(rows, names)
    except OSError as e:
        raise Stopped(f"{e.filename or store.out} cannot be read or written any more: {e.strerror or e}.") from None
    if not index["clips"]:
        raise UserError(f"No map could be made{': ' + data.listed(skipped) if skipped else ''}.")
    print(f"{tally.made} maps made, {len(have)} were there; {store.out} holds {index['done']} of {len(rows)}{tally}"
          + (f"; skipped {len(skipped)}: {data.listed(skipped)}" if skipped else ""))


def shuffle(pool: data.Pool, rows: list, names: list[str], todo: list[int], other: data.Maps, store: Store,
            tally: Tally, bar: tqdm) -> None:
    """Copy maps from clip to clip of the same phenomena: right of the kind, wrong of the clip."""
    alike = {}
    for row, video in enumerate(rows):
        alike.setdefault(tuple(video.categories), []).append(row)
    swap = {}
    for members in alike.values():
        order = np.random.default_rng([len(members), 17]).permutation(len(members))
        swap.update({members[a]: members[b] for a, b in zip(order, np.roll(order, 1))})
    for row in todo:
        found = other.of.get(rows[swap[row]].name)
        read = other.read(found[0][2]) if found else None
        if read:
            tensors, about = read
            about = {**about, "key": store.key, "file": rows[row].name}
            data.write_tensors(store.clips / f"{names[row]}-0of1.safetensors", tensors, about, store.tag)
            tally.made += 1
        bar.update()


# ------------------------------------------------------------------------------------------------------- quality report
@dataclass
class Truth:
    """One phenomenon of one clip, where it is known."""
    video: np.ndarray  # (F, H, W, 3) uint8
    fps: float
    name: str
    mask: np.ndarray  # (F, H, W) bool
    objects: np.ndarray  # (F, H, W) bool: this and everything else that stands out from the background


def of_clips(cfg: Config, n: int, first: int = data.HELD_OUT + 500_000) -> list[list[Truth]]:
    """The truths of n clips that nothing was trained on."""
    empty = (world.backdrop(cfg.height, cfg.width) * 255 + .5).astype(np.uint8)  # (3, H, W)
    found = []
    for index in range(first, first + n):
        clip = world.make_clip(cfg.world_seed, index, **data.World(cfg).drawing)
        stands = (np.abs(clip.video.astype(int) - np.moveaxis(empty, 0, -1)) > 24).any(-1)
        found.append([Truth(clip.video, cfg.frames, actor.phenomenon, actor.mask, stands | actor.mask)
                      for actor in clip.actors])
    return found


def of_json(path: Path, vlm: VLM, cfg: Config, most: int) -> list[list[Truth]]:
    """Truths from a file {video: {phenomenon: [[start, end, left, top, right, bottom], ...] or "mask.mp4"}}: boxes in
    seconds and shares of the frame, or a video or picture that is bright where it happens. Videos lie beside the file.
    Raises UserError."""
    found = []
    for name, phenomena in encode.read_json(path).items():
        try:
            window = windows(data.Video(name, path.parent / name, "", []), vlm, cfg, most)[0]
            if not phenomena:
                raise ValueError("it names no phenomenon")
            F_, H, W = window.video.shape[:3]
            when = window.start + np.arange(F_) / cfg.fps
            y, x = (np.arange(H) + .5) / H, (np.arange(W) + .5) / W
            clip = []
            for phenomenon, where in phenomena.items():
                if isinstance(where, str):
                    grey = data.windows_of(path.parent / where, dataclasses.replace(cfg, frames=F_, height=H, width=W))
                    mask = grey[0].video.mean(-1) > 127
                else:
                    mask = np.zeros((F_, H, W), bool)
                    for start, end, left, top, right, bottom in where:
                        mask |= (((start <= when) & (when < end))[:, None, None]
                                 & ((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right)))
                if phenomenon not in CUES:
                    raise ValueError(f"{phenomenon!r} is none of {', '.join(CUES)}")
                clip.append(Truth(window.video, cfg.fps, phenomenon, mask, mask))
            every = np.any([truth.mask for truth in clip], axis=0)
            found.append([dataclasses.replace(truth, objects=every) for truth in clip])
        except Exception as e:  # of a decoder, or of the file's shape
            raise UserError(f"{path}: {name} cannot be used ({e or type(e).__name__}).") from None
    if not found:
        raise UserError(f"{path} names no video.")
    return found


def measures(score: np.ndarray, positive: np.ndarray, objects: np.ndarray) -> dict[str, float]:
    """AUC of a map (N,) against all tokens and against those of other objects; pointing game: is its peak on the
    object; IoU of the tokens above half of its peak. NaN where there is nothing to compare with."""
    rivals = positive | objects
    over = score >= .5 * score.max() if score.max() > 0 else np.zeros_like(positive)
    return {"AUC": align.auc(score, positive),
            "AUC objects": align.auc(score[rivals], positive[rivals]) if (objects & ~positive).any() else math.nan,
            "pointing": float(positive[score.argmax()]), "IoU": (over & positive).sum() / (over | positive).sum()}


def bands(n: int) -> dict[str, list[int]]:
    """Layers to average: each quarter of n, the default, all."""
    edges = np.linspace(0, n, min(4, n) + 1).round().astype(int)
    found = {f"{a}-{b - 1}" if b - a > 1 else f"{a}": list(range(a, b)) for a, b in zip(edges, edges[1:])}
    found["default"] = layers_of("", n)
    found["all"] = list(range(n))
    return found


def covered(mask: np.ndarray, grid: tuple[int, int, int], share: float = data.POSITIVE) -> np.ndarray:
    """(N,) tokens of which the mask covers a share."""
    return (data.resample(torch.from_numpy(mask).float(), grid).flatten() >= share - 1e-6).numpy()


def report(vlm: VLM, settings: Settings, clips: list[list[Truth]], untrained: VLM | None, batch: int, shape) -> dict:
    """{row: {measure: mean}}: every kind of rows, layer band and background, then the rivals that need no VLM, or an
    untrained one; and means of what else is worth a look, such as how often the VLM's own answers affirm a phenomenon
    that only other clips are known to hold (one a clip is asked for). Masks are averaged over equal parts of the clip:
    with aligned frames of a real video that is up to a frame and a half off. shape: a Truth -> what the VLM sees of it.
    """
    rows, order = {}, bands(vlm.n_layers)
    log = {"answers that affirm what is there": [], "what is not": [], "mass on the video": [], "overlap": []}
    prior, affirms = {}, lambda look: float(not look.empty and not DENIAL.search(look.answer))
    known = sorted({truth.name for clip in clips for truth in clip})
    for number, clip in enumerate(tqdm(clips, desc="report", unit="clip", leave=False)):
        seen, names = shape(clip[0]), [truth.name for truth in clip]
        absent = [name for name in known if name not in names]
        absent = [absent[number % len(absent)]] if absent else []
        every = dict(kinds=KINDS, layers=list(range(vlm.n_layers)), batch=batch)
        *mine, behind = vlm.look_for([seen.frames], seen.fps, [names + absent], settings, **every)[0]
        if not settings.answer:  # which would be its answer to everything
            log["answers that affirm what is there"] += map(affirms, mine[:len(names)])
            log["what is not"] += map(affirms, mine[len(names):])
        if untrained:
            questions, said = [[settings.ask(name) for name in names]], [[look.answer for look in mine[:len(names)]]]
            every["layers"] = list(range(untrained.n_layers))
            none = untrained.look([seen.frames], seen.fps, questions, settings, answers=said, **every)[0]
        grid = tuple(behind.maps.shape[2:])
        for i, (truth, look) in enumerate(zip(clip, mine)):
            positive, objects = covered(truth.mask, grid), covered(truth.objects, grid)
            if positive.all() or not positive.any():
                continue
            maps = {"frame differences": data.resample(saliency(truth.video, len(truth.video)), grid)}
            for k, kind in enumerate(KINDS):
                for band, layers in order.items():
                    one, bg = look.density(layers, k, settings.sinks), behind.density(layers, k, settings.sinks)
                    maps |= {f"{kind}, layers {band}, {how}": align.relative(one, bg, how)
                             for how in ("none", "subtract", "divide")}
            if untrained:
                maps["untrained, predict, layers all, none"] = none[i].density(slice(None), 1)
            for row, values in maps.items():
                for measure, value in measures(values.flatten().numpy(), positive, objects).items():
                    rows.setdefault(row, {}).setdefault(measure, []).append(value)
            prior.setdefault(truth.name, []).append((positive, objects))
            log["mass on the video"].append(look.mass(1).mean().item())
            log["overlap"].append(F.cosine_similarity(*(one.density(order["default"], 1).flatten()
                                                        for one in (look, behind)), dim=0).item())
    for seen in prior.values():  # each clip against the mean mask of the others with this phenomenon
        total = sum(positive.astype(float) for positive, _ in seen)
        for positive, objects in seen if len(seen) > 1 else ():
            for measure, value in measures(total - positive, positive, objects).items():
                rows.setdefault("location prior", {}).setdefault(measure, []).append(value)
    return {"rows": {row: {m: float(np.nanmean(v)) for m, v in table.items()} for row, table in rows.items()},
            **{name: float(np.nanmean(values)) for name, values in log.items() if values}}


# ------------------------------------------------------------------------------------------------------------ benchmark
SEVEN_B = dict(  # the shapes of Qwen2.5-VL-7B
    text_config=dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                     num_key_value_heads=4, vocab_size=152064, bos_token_id=None, eos_token_id=1, pad_token_id=0,
                     rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
    vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112,
                       spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[7, 15, 23, 31],
                       out_hidden_size=3584, tokens_per_second=2))


def benchmark(device: str, dtype: torch.dtype, shapes: dict = SEVEN_B, size=(26, 476, 728), words: int = 48) -> None:
    """Print seconds a clip and peak memory of three questions and the background's, random weights of real shapes, all
    at once and one by one, and what that makes for 20,000 clips."""
    transformers = encode.library("transformers")
    torch.manual_seed(0)
    with torch.device(device), tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(dtype)
        try:
            model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**shapes, **MARKS))
        finally:
            torch.set_default_dtype(torch.float32)
        vlm = object.__new__(VLM)
        vlm.folder, vlm.device = Path(folder), torch.device(device)
    vlm.wear(model.requires_grad_(False), tiny_tokenizer())
    vlm.ends = set()  # every answer has its full length
    video = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    settings = Settings(question="is there {name}", background=TINY["background"], words=words)
    cuda = device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{where}, torch {torch.__version__}, {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, "
          f"{size[0]} frames of {size[1]} x {size[2]}, 4 questions, answers of {words} tokens\n")
    print("| questions | seconds a clip | peak memory, GiB | 20,000 clips, hours |\n|---|---|---|---|")
    for name, batch in (("all at once", 0), ("one by one", 1)):
        taken = []
        for _ in range(4):  # the first one warms up
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            vlm.look_for(video, 4.0, [["melting", "combustion", "collision"]], settings, batch=batch)
            taken.append(time.perf_counter() - start)  # maps are on the CPU by now
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if cuda else "-"
        seconds = min(taken[1:])
        print(f"| {name} | {seconds:.2f} | {peak} | {20_000 * seconds / 3600:.1f} |")


# ------------------------------------------------------------------------------------------------------------- pictures
def heat(frames: np.ndarray, values: Tensor, colour=(255, 120, 40)) -> np.ndarray:
    """Lay a map (t, h, w) >= 0 over frames (F, H, W, 3), its peak strongest."""
    size = [torch.from_numpy(data.axis_weights(np.linspace(0, 1, n + 1), np.linspace(0, 1, m + 1))).float()
            for n, m in zip(values.shape[1:], frames.shape[1:3])]
    when = torch.from_numpy(data.time_weights(np.arange(len(values)) + .5, (np.arange(len(frames)) + .5)
                                              * len(values) / len(frames)).astype(np.float32))
    over = torch.einsum("thw,Ft,Hh,Ww->FHW", values, when, *size).clamp(min=0)
    return world.tint(frames, (over / over.max().clamp(min=1e-9)).numpy(), colour, .85)


def tile(frames: np.ndarray, panels: list[tuple[str, np.ndarray]], text: str, scale: int) -> np.ndarray:
    """One row of a preview: named panels (F, H, W, 3) side by side, the text below."""
    shown_ = [world.annotate(np.pad(world.enlarge(panel, scale), ((0, 0), (4, 0), (4, 0), (0, 0))), name)
              for name, panel in [("clip", frames), *panels]]
    return world.annotate(np.concatenate(shown_, 2), text, lines=2)


def preview(path: Path, vlm: VLM, settings: Settings, clips: list[list[Truth]], batch: int, shape) -> None:
    """A GIF: question, answer, map, background map, difference, exact mask of each clip's first phenomenon."""
    rows = []
    for clip in clips:
        truth, seen = clip[0], shape(clip[0])
        look, behind = vlm.look_for([seen.frames], seen.fps, [[truth.name]], settings, batch=batch)[0]
        one, bg = look.density(sinks=settings.sinks), behind.density(sinks=settings.sinks)
        scale = max(1, 112 // truth.video.shape[1])
        panels = [("map", heat(truth.video, one)), ("background map", heat(truth.video, bg)),
                  ("difference", heat(truth.video, align.relative(one, bg).clamp(min=0))),
                  ("exact mask", world.tint(truth.video, truth.mask, (255, 120, 40), .7))]
        rows.append(tile(truth.video, panels, f"{settings.ask(truth.name)}: {look.answer}", scale))
    longest, widest = (max(row.shape[axis] for row in rows) for axis in (0, 2))
    rows = [np.pad(np.pad(row, ((0, longest - len(row)), (0, 0), (0, 0), (0, 0)), mode="edge"),
                   ((0, 0), (0, 0), (0, widest - row.shape[2]), (0, 0))) for row in rows]
    world.save_gif(path, np.concatenate(rows, 1), max(1, clips[0][0].fps / 2))
    print(f"wrote {path}")


# -------------------------------------------------------------------------------------------------------- command line
def parse(argv: list[str]):
    """-> the flags of this file, and the Config that the rest describes (the world, threads, pool_dir)."""
    parser = config.Parser("Where a vision-language model looks, as maps that teach the refinement router.")
    parser.epilog = ("The world, --device, --threads, --seed and --pool_dir are set as for train.py; its --help lists "
                     "them.")
    add, own = parser.add_argument, Settings()
    add("--videos", help="folder of videos: make their maps")
    add("--annotations", default="", help="captions.json or a WISA list; empty = the folder's captions.json")
    add("--vlm", default="data/tiny_vlm", help="folder of a Qwen2.5-VL or Qwen3-VL")
    add("--out", help="folder of the maps; started again, it goes on where it was stopped")
    add("--shard", default="1/1", help="i/n: every n-th video (or clip) from the i-th on; one process a shard")
    add("--train_tiny", action="store_true", help="train a tiny VLM on the world, into --vlm, and make maps with it")
    add("--minutes", type=float, default=4.5, help="of training the tiny VLM")
    add("--steps", type=int, default=0, help="of training it, instead: the same weights on every like machine")
    add("--annotate", help="name under which the world's clips get maps, for train.py --teacher NAME")
    add("--kind", default="vlm", choices=("vlm", "saliency", "shuffled"), help="whose maps --annotate makes")
    add("--maps", default="tiny_vlm", help="name of the maps that --kind shuffled shuffles")
    add("--report", action="store_true", help="how well maps find what they are asked for, where truth is known")
    add("--untrained", action="store_true", help="--report: beside an untrained tiny VLM")
    add("--truth", help="JSON of boxes or masks of videos beside it, for --report and --preview; None = the world's")
    add("--preview", help="GIF of question, answer, map, background map, difference and mask to write")
    add("--benchmark", action="store_true", help="time a VLM of Qwen2.5-VL-7B's shapes with random weights, on a GPU")
    add("--clips", type=int, default=150, help="of the world for --report")
    add("--frames_shown", dest="frames", type=int, default=49, help="frames a window of a video, 1 + 4 m")
    add("--rate", dest="fps", type=float, default=8.0, help="of these frames a second")
    add("--sample", type=int, default=0, help="frames of a window to show, evenly; 0 = what latents stand for")
    add("--windows_taken", dest="windows", type=int, default=4, help="windows of one long video at most")
    add("--pixels", type=int, default=350_000, help="of a frame at most: 480 x 720 becomes 476 x 728")
    add("--all", action="store_true", help="ask for all phenomena, not only those of the annotations")
    add("--batch", type=int, default=0, help="questions at once; 0 = all of a group")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"), help="auto = bf16 on cuda, else fp32")
    for f in dataclasses.fields(Settings):
        add(f"--{f.name}", type=f.type, default=None, help=f"[{getattr(own, f.name)}]".replace("%", "%%"))
    args, rest = parser.parse_known_args(argv)
    check(args, rest)
    cfg = config.parse(rest, "The world's settings.")
    if cfg.data_dir and (args.annotate or args.train_tiny):
        raise UserError("--annotate and --train_tiny are for the world; --videos makes maps of a folder.")
    return args, cfg


def check(args, rest: list[str]) -> None:
    """The first broken rule of the flags as one sentence; rest: those for the Config. Raises UserError."""
    for name, flag in (("minutes",) * 2, ("clips",) * 2, ("pixels",) * 2, ("frames", "frames_shown"), ("fps", "rate"),
                       ("windows", "windows_taken")):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{flag} must be more than zero, not {getattr(args, name)}.")
    encode.shard_of(args.shard)
    if min(args.sample, args.batch, args.steps) < 0:
        raise UserError("--sample, --batch and --steps must be zero or more.")
    if not args.sample and args.frames % 4 != 1:
        aligned_frames(args.frames)
    if args.annotate is not None and not re.fullmatch(r"\w+", args.annotate):
        raise UserError(f"--annotate takes a plain name, not {args.annotate!r}.")
    if args.videos and not args.out:
        raise UserError("--videos needs --out, the folder for the maps.")
    if not (args.videos or args.train_tiny or args.annotate or args.report or args.preview or args.benchmark):
        raise UserError("Say what to do: --videos, --train_tiny, --annotate, --report, --preview or --benchmark; "
                        "--help lists every flag.")
    if args.preview and not (args.preview.lower().endswith(".gif") and Path(args.preview).parent.is_dir()):
        raise UserError(f"--preview takes a .gif in a folder that is there, not {args.preview!r}.")
    if args.truth and not Path(args.truth).is_file():
        raise UserError(f"There is no {args.truth}.")
    odd = {word.split("=")[0] for word in rest} & {"--frames", "--fps", "--windows", "--height", "--width"}
    if odd and (args.videos or args.truth):
        raise UserError(f"{', '.join(sorted(odd))} shapes the world's clips; for videos there are --frames_shown, "
                        "--rate, --windows_taken and --pixels.")


def main(argv: list[str]) -> None:
    """Check everything, load the VLM once, do what was asked for. Raises UserError and Stopped."""
    args, cfg = parse(argv)
    torch.set_num_threads(data.cores(cfg))
    device = encode.pick_device(cfg.device)
    if args.benchmark:
        if device == "cpu":
            raise UserError("--benchmark times a VLM of seven billion parameters: it needs a GPU.")
        return benchmark(device, torch.bfloat16)
    if args.train_tiny:
        args.annotate = args.annotate or "tiny_vlm"
        old = data.world_maps(cfg, data.open_pool(cfg), args.annotate)
        if old.exists():
            raise UserError(f"{old} holds maps of another VLM: delete it, or give --annotate another name.")
        make_tiny(Path(args.vlm), cfg, cfg.seed, args.minutes, args.steps)
    if args.annotate and args.kind != "vlm":
        return annotate_world(args, cfg, None, None)
    dtype = torch.bfloat16 if args.dtype == "bf16" or args.dtype == "auto" and device == "cuda" else torch.float32
    if not Path(args.vlm).is_dir():
        raise UserError(f"There is no VLM in {args.vlm}: give --vlm DIR, or make a tiny one with --train_tiny.")
    if args.videos:  # read before a VLM is, which may take minutes
        folder = data.Folder(config.preset("small", data_dir=args.videos, annotations=args.annotations,
                                           frames=args.frames, fps=args.fps, windows=args.windows))
    vlm = VLM(args.vlm, device, dtype)
    settings = vlm.settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    if args.videos:
        annotate_videos(args, folder, vlm, settings)
    if args.annotate:
        annotate_world(args, cfg, vlm, settings)
    if not (args.report or args.preview):
        return
    if args.truth:
        film = dataclasses.replace(cfg, frames=args.frames, fps=args.fps, windows=1)
        clips = of_json(Path(args.truth), vlm, film, args.pixels)
        shape = lambda truth: shown(data.Window(truth.video, 0, 1, 0.0, truth.video.shape[1:3], ()), "", [], truth.fps,
                                    vlm.merged, args.sample)
    else:
        clips = of_clips(cfg, args.clips)
        shape = lambda truth: Shown("", truth.video, truth.fps, [], (), (), [])
    if args.report:
        print_report(vlm, settings, clips, args, shape)
    if args.preview:
        preview(Path(args.preview), vlm, settings, clips[:3], args.batch, shape)


def print_report(vlm: VLM, settings: Settings, clips: list[list[Truth]], args, shape) -> None:
    """The table of `report`, best AUC first."""
    untrained = None
    if args.untrained:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(Path(folder), 0)
            untrained = VLM(folder)
    found = report(vlm, settings, clips, untrained, args.batch, shape)
    rows = found.pop("rows")
    columns = list(next(iter(rows.values()), {}))
    if not rows:
        raise UserError("No phenomenon of these clips covers some, and not all, of the VLM's tokens.")
    print(f"\n{sum(map(len, clips))} phenomena of {len(clips)} clips; " +
          ", ".join(f"{name} {value:.2f}" for name, value in found.items()) + "\n")
    print("| rows, layers, background | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, values in sorted(rows.items(), key=lambda row: -row[1]["AUC"]):
        print(f"| {name} | " + " | ".join(f"{values[column]:.3f}" for column in columns) + " |")


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

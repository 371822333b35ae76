"""The Qwen-VL wrapper: question in, answer and attention out."""
import contextlib
import copy
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import join_some, read_json
from common.libraries import library, library_error_as_sentence
from config import Stopped, UserError
from official.folder import load


KINDS = ("question", "predict", "answer")  # rows: of the question's words; that predict the answer's tokens; of these


class VLMError(UserError):
    """The VLM, the video or the question will not do: one sentence."""

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

ATTENTION = "watched_sdpa"  # the name under which transformers knows `watched_attention`


def watched_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, watcher=None, **how):
    """The library's sdpa attention, with somebody who watches.

    query (B, heads, S, d) and key, value (B, groups, P + S, d) come rotated, and joined with the cache: nothing of the
    model's projections, norms and positions has to be known here. watcher: what the model's forward was given under
    this name; watcher(query, key, mask, scaling, output) -> the output (B, S, heads, d) to go on with.
    """
    sdpa = library("transformers").AttentionInterface()["sdpa"]
    output, weights = sdpa(module, query, key, value, attention_mask, **how)
    if watcher is not None:
        output = watcher(query, key, attention_mask, how["scaling"], output)
    return output, weights


def register_attention() -> None:
    """Tell transformers of `watched_attention`, and that it takes the masks that sdpa takes: without the second line
    the mask would be dropped without a word (`RowMaps` notices)."""
    transformers = library("transformers")
    transformers.AttentionInterface.register(ATTENTION, watched_attention)
    transformers.AttentionMaskInterface.register(ATTENTION, transformers.AttentionMaskInterface()["sdpa"])


def library_changed(what: str) -> UserError:
    """The error when transformers does not do what `VLM` relies on. It concerns every clip, so it is no VLMError, for
    which a clip would be skipped."""
    version = library("transformers").__version__
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
        transformers = library("transformers")
        model = load(transformers.AutoModelForImageTextToText, self.folder, dtype=dtype,
                            attn_implementation="sdpa", ignore_mismatched_sizes=True)
        with library_error_as_sentence(self.folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        self.wear(model, tokenizer)

    def check_family(self) -> None:
        """Raises VLMError, before any weights are read, for a model without what the maps need."""
        about = read_json(self.folder / "config.json")
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
            self.template = read_json(old).get("chat_template")
        if "video_pad" not in (self.template or ""):
            raise VLMError(f"{self.folder} has no chat template with a place for a video.")

    def read_pictures(self) -> dict:
        """{mean, std, least, most}: how pixels are normalised, and how many a frame may have."""
        found = {}
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            if (self.folder / name).exists():
                found |= read_json(self.folder / name)
        size = found.get("size") or {}
        return {"mean": found.get("image_mean", [.48145466, .4578275, .40821073]),  # of CLIP
                "std": found.get("image_std", [.26862954, .26130258, .27577711]),
                "least": found.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
                "most": found.get("max_pixels") or size.get("longest_edge") or 14 * 14 * 4 * 1280}

    def settings(self, **given) -> Settings:
        """The defaults, then the folder's teacher.json, then what is given and not None. Raises UserError."""
        path, own = self.folder / "teacher.json", {}
        if path.exists():
            own = read_json(path)
        kinds = {f.name: f.type for f in dataclasses.fields(Settings)}
        odd = [name for name, value in own.items() if type(value) is not kinds.get(name)]
        if odd:
            raise UserError(f"{path} has settings that are unknown or of another type: {join_some(sorted(odd))}.")
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
        cache = library("transformers").DynamicCache(config=self.config.get_text_config())
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

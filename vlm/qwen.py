"""A Qwen-VL that is asked about videos, and shows where in them its answers look.

    videos, questions --VLM.ask--> answers, and the attention of each to the tokens of its video

Three passes:

1. `prefill`: the video comes first in the prompt, so all questions share its keys and values.
2. `answer`: the VLM's own answers, greedily, to all questions at once.
3. `attend`: one more pass over question and answer, whose attention is watched (attention.py).

What is asked and read stands in settings.py, what is done to the frames in pixels.py.

Letters: B videos, Q questions, t h w the video's tokens (N in all), P tokens of the prefix, R those
of question and answer, D width.
"""
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.files import read_json
from common.libraries import fingerprint, library, load, load_tokenizer
from config import Stopped
from vlm.attention import ATTENTION, RowMaps, library_changed, register_attention
from vlm.pixels import Pictures
from vlm.settings import CUES, Settings, VLMError, layers_of, read_settings

TRIED = ("qwen2_5_vl", "qwen3_vl", "qwen2_vl", "qwen3_vl_moe")  # families that the tests compare
FULL = "full_attention"


@dataclass
class PrefilledVideos:
    """Some videos of one shape, after the first pass."""
    cache: object  # keys and values of their prompts up to the question, a row a video
    ids: list[int]  # tokens of these prompts, the same for all
    grid: tuple[int, int, int]  # t h w of the video's tokens, after merging
    video_at: Tensor  # (N,) their places among `ids`: Qwen3-VL has time stamps between frames
    positions: Tensor  # (3, 1, P) of these tokens, along time, height and width


@dataclass
class AnswerAttention:
    """One answer, and where its rows look."""
    answer: str
    maps: Tensor  # (layers, kinds, t, h, w) float32: mean over rows and heads, unnormalised
    empty: bool  # nothing but special tokens

    def density(self, layers: slice | list = slice(None), kind: int = 0, sinks: float = 1.0
                ) -> Tensor:
        """(t, h, w) float32, mean 1: the layers averaged, then `density_of`."""
        return density_of(self.maps[layers, kind].mean(0), sinks)

    def mass(self, kind: int = 0) -> Tensor:
        """(layers,) the share of the attention that reaches the video."""
        return self.maps[:, kind].sum((1, 2, 3))


def density_of(values: Tensor, sinks: float = 1.0) -> Tensor:
    """Values >= 0 (t, h, w), scaled to mean 1 and cut at their quantile `sinks`.

    In a mean over heads that is scaled afterwards, heads that ignore the video carry no weight.
    """
    density = values * values.numel() / values.sum().clamp(min=1e-30)
    if sinks < 1:
        density = density.clamp(max=density.flatten().quantile(sinks))
        density = density / density.mean().clamp(min=1e-30)
    return density


class VLM:
    """A Qwen2.5-VL, Qwen3-VL or a model that is built like them.

    It needs video tokens in one order (time, height, width), positions along these three axes by
    `get_rope_index`, and full attention in every layer. Of those that have it, TRIED were compared.
    """

    def __init__(self, model, tokenizer, folder: Path | None = None):
        """model: of transformers, in eval mode. folder: where both are from, for the settings
        beside them. Raises UserError where they are not what the maps need."""
        self.folder = folder
        self.model = model
        self.core = model.base_model  # without the logits of every token over 150,000 words
        self.tokenizer = tokenizer
        self.device = model.device
        self.config = config = model.config
        text = config.get_text_config()
        self.n_layers = text.num_hidden_layers
        kinds = set(getattr(text, "layer_types", None) or [FULL])
        if kinds != {FULL} or not hasattr(self.core, "get_rope_index"):
            raise VLMError(f"{folder} is of {config.model_type!r}, whose layers are "
                           f"{', '.join(sorted(kinds))} or whose positions are not along time, "
                           "height and width: its maps would be wrong.")
        register_attention()
        model.set_attn_implementation({"text_config": ATTENTION})

        # Tokens with a meaning of their own.
        self.video_id = config.video_token_id  # stands for one token of the video
        theirs = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        if theirs != self.video_id:
            raise VLMError("Tokenizer and model disagree on the ids of <|video_pad|> "
                           f"({theirs} and {self.video_id}). Load both from the same checkpoint.")
        self.special_ids = set(tokenizer.all_special_ids)
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        self.end_ids = {*ends, tokenizer.eos_token_id} - {None}  # any of them ends an answer

        # How videos and questions become a prompt.
        self.pictures = Pictures.read(config.vision_config, folder)
        self.template = chat_template(tokenizer, folder)
        self.time_stamps = config.model_type.startswith("qwen3_vl")

    @classmethod
    def from_folder(cls, folder, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "VLM":
        """Reads config, weights (safetensors), tokenizer and settings. Raises UserError."""
        folder = Path(folder)
        check_family(folder)
        transformers = library("transformers")
        model = load(transformers.AutoModelForImageTextToText, folder, dtype=dtype,
                     attn_implementation="sdpa", ignore_mismatched_sizes=True)
        return cls(model.to(device), load_tokenizer(folder, model), folder)

    def settings(self, **given) -> Settings:
        """The defaults, then the folder's teacher.json, then what is given and not None. Raises
        UserError."""
        return read_settings(self.folder, self.n_layers, given)

    def identity(self, settings: Settings, **more) -> dict:
        """All that shapes a map but the video, for maps.json. more: settings of the caller."""
        asked = dataclasses.asdict(settings)
        layers = layers_of(asked.pop("layers"), self.n_layers)
        words = json.dumps([CUES, self.template])
        return {"format": 1,
                "vlm": fingerprint(self.folder),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "layers": layers,
                "template": hashlib.sha256(words.encode()).hexdigest()[:16],
                **more,
                **asked,
                "heads": ""}  # all of them; older versions could choose

    # --- words and their positions
    def prompt(self, question: str, grid: tuple[int, int, int], fps: float
               ) -> tuple[list[int], list[int]]:
        """Token ids up to the end of the video, and from the question on. Raises VLMError.

        grid: t h w of the video's tokens. fps: of the frames, which makes the times that the model
        is told.
        """
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.template, tokenize=False,
            add_generation_prompt=True)
        place = "<|vision_start|><|video_pad|><|vision_end|>"
        if text.count(place) != 1:
            raise VLMError(f"The chat template of {self.folder} makes no single place for a video.")
        before, after = text.split(place)

        # The video: one run of tokens, or one run a row, each behind a stamp "<1.5 seconds>".
        t, h, w = grid
        rows = 1 if self.time_stamps else t
        video = f"<|vision_start|>{'<|video_pad|>' * (h * w * rows)}<|vision_end|>"
        if self.time_stamps:
            m = self.pictures.temporal_patch
            middles = [(m * row + (m - 1) / 2) / fps for row in range(t)]
            video = "".join(f"<{seconds:.1f} seconds>{video}" for seconds in middles)

        prefix, suffix = (self.tokenizer(part, add_special_tokens=False).input_ids
                          for part in (before + video, after))
        found = prefix.count(self.video_id)
        if found != t * h * w:
            raise VLMError(f"The prompt holds {found} <|video_pad|> tokens (id {self.video_id}) "
                           f"but the video has {t}x{h}x{w} = {t * h * w} tokens. Was the prompt "
                           "truncated, or does it hold two videos?")
        return prefix, suffix

    def positions(self, ids: list[int], grid: tuple[int, int, int], fps: float) -> Tensor:
        """(3, 1, len(ids)) positions along time, height and width, by the model's own rule.

        The rule needs two things, and says nothing where they are missing: `mm_token_type_ids`, or
        it falls back to one axis, and the seconds that a row of tokens spans, or it takes the
        frames for 24 a second.
        """
        is_video = torch.tensor([ids]) == self.video_id
        s = self.pictures.merge
        patches = torch.tensor([[grid[0], grid[1] * s, grid[2] * s]])
        seconds = torch.tensor([self.pictures.temporal_patch / fps])
        try:
            positions = self.core.get_rope_index(
                torch.tensor([ids]), mm_token_type_ids=2 * is_video, video_grid_thw=patches,
                second_per_grid_ts=seconds)[0]
        except TypeError as e:
            raise library_changed("calls the arguments of get_rope_index otherwise "
                                  f"({e})") from None
        if positions.shape != (3, 1, len(ids)):
            raise library_changed(f"gives positions of shape {tuple(positions.shape)}, not one of "
                                  "each token along 3 axes")
        return positions

    def run(self, ids: Tensor, positions: Tensor, cache, mask: Tensor | None = None, **more
            ) -> Tensor:
        """Hidden states (B, S, D) of tokens (B, S) at their positions (3, B, S), which follow those
        in the cache and are added to it."""
        # The first four arguments have changed their names before, never their order.
        return self.core(ids, mask, positions, cache, use_cache=True, **more).last_hidden_state

    # --- the three passes
    @torch.no_grad()
    def prefill(self, videos, fps: float) -> PrefilledVideos:
        """videos (B, F, H, W, 3) uint8 of one shape; fps: of these frames. Raises VLMError."""
        pixels, (t, h, w) = self.pictures.patches(videos, self.device)
        grid = (t, h // self.pictures.merge, w // self.pictures.merge)
        ids, _ = self.prompt("?", grid, fps)
        positions = self.positions(ids, grid, fps).to(self.device)
        B = len(videos)
        tokens = torch.tensor([ids] * B, device=self.device)
        cache = library("transformers").DynamicCache(config=self.config.get_text_config())
        self.run(tokens, positions.expand(-1, B, -1), cache,
                 pixel_values_videos=pixels.to(self.model.dtype),
                 video_grid_thw=torch.tensor([[t, h, w]] * B, device=self.device))
        if cache.get_seq_length() != len(ids):
            raise library_changed(f"left {cache.get_seq_length()} of {len(ids)} tokens in the "
                                  "cache it was given")
        video_at = (tokens[0] == self.video_id).nonzero()[:, 0]
        return PrefilledVideos(cache, ids, grid, video_at, positions)

    def fork(self, videos: PrefilledVideos, owners: list[int]):
        """A cache of its own for each of some questions; owners: the video of each."""
        cache = copy.deepcopy(videos.cache)
        cache.batch_select_indices(torch.tensor(owners, device=self.device))
        return cache

    def padded(self, videos: PrefilledVideos, tails: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (Q, R) that follow the prefix, padded behind, and their positions (3, Q, R),
        which count on from the prefix's last one along all axes."""
        ids = pad_sequence([torch.tensor(tail) for tail in tails], batch_first=True)
        steps = torch.arange(1, ids.shape[1] + 1, device=self.device)
        positions = (videos.positions[..., -1:] + steps).expand(3, *ids.shape)
        return ids.to(self.device), positions

    @torch.no_grad()
    def answer(self, videos: PrefilledVideos, owners: list[int], suffixes: list[list[int]],
               words: int) -> list[list[int]]:
        """Token ids of the greedy answers, without the end token, all questions at once."""
        cache = self.fork(videos, owners)
        ids, positions = self.padded(videos, suffixes)
        Q, R = ids.shape
        rows = torch.arange(Q, device=self.device)
        end = torch.tensor([len(suffix) - 1 for suffix in suffixes], device=self.device)

        # The answer follows behind the padding, so the padding must be masked. The positions of the
        # padding are never read.
        in_question = torch.arange(R, device=self.device) <= end[:, None]
        mask = F.pad(in_question.long(), (len(videos.ids), 0), value=1)
        hidden = self.run(ids, positions, cache, mask)
        last = hidden[rows, end]  # (Q, D)
        # As in `generate`, an answer counts on from the largest position, which may be one of the
        # video's in time.
        at = positions[:, rows, end, None].clamp(min=int(videos.positions.max()))  # (3, Q, 1)

        # Word by word, until all have ended. An answer that has ended goes on unread.
        said = []  # of each step, a token a question
        for _ in range(words):
            token = self.model.get_output_embeddings()(last).argmax(-1)
            said.append(token.tolist())
            if all(self.end_ids.intersection(answer) for answer in zip(*said)):
                break
            mask = F.pad(mask, (0, 1), value=1)
            at = at + 1
            last = self.run(token[:, None], at, cache, mask)[:, 0]
        goes_on = lambda token: token not in self.end_ids
        return [list(itertools.takewhile(goes_on, answer)) for answer in zip(*said)]

    @torch.no_grad()
    def attend(self, videos: PrefilledVideos, owners: list[int], suffixes: list[list[int]],
               answers: list[list[int]], kinds: tuple[str, ...], layers: list[int]) -> Tensor:
        """(Q, layers, kinds, t, h, w) float32: attention to the video from rows of question and
        answer, averaged over these rows and over heads. layers: rising. Raises VLMError."""
        tails = [suffix + answer for suffix, answer in zip(suffixes, answers)]
        ids, positions = self.padded(videos, tails)
        rows = [[self.rows_of(kind, suffix, answer) for kind in kinds]
                for suffix, answer in zip(suffixes, answers)]
        watcher = RowMaps(rows, videos.video_at, len(videos.ids), layers)
        # No mask is needed: attention is causal, and only padding stands behind what is read.
        self.run(ids, positions, self.fork(videos, owners), watcher=watcher)
        if watcher.layer != self.n_layers:
            raise library_changed("called the registered attention function for "
                                  f"{watcher.layer} of {self.n_layers} layers")
        return torch.stack(watcher.maps, dim=1).unflatten(-1, videos.grid)

    def rows_of(self, kind: str, suffix: list[int], answer: list[int]) -> list[int]:
        """The rows of one kind, counted from the end of the prefix.

        Special tokens, and the rows that predict them, are left out: they say nothing of the video.
        """
        if kind == "question":
            special = (i for i, token in enumerate(suffix) if token in self.special_ids)
            return list(range(next(special, len(suffix))))
        first = len(suffix) - (kind == "predict")
        return [first + i for i, token in enumerate(answer) if token not in self.special_ids]

    # --- all of it
    def ask(self, videos, fps: float, questions: list[list[str]], settings: Settings = Settings(),
            kinds: tuple[str, ...] = (), layers: list[int] | None = None, batch: int = 0,
            answers: list[list[str]] | None = None) -> list[list[AnswerAttention]]:
        """Ask each of some videos (B, F, H, W, 3) its own questions, and see where answers look.

        fps: of these frames. kinds, layers: which to read; those of the settings if not given.
        batch: questions at once (0 = all); one by one gives the same to rounding. answers: one a
        question, instead of the VLM's own (without them settings.answer, as it stands). Raises
        VLMError; Stopped when the memory is full.
        """
        kinds = kinds or (settings.rows,)
        layers = layers or layers_of(settings.layers, self.n_layers)
        given = answers or [[settings.answer] * len(asked) for asked in questions]
        rows = [(video, *pair) for video in range(len(videos))
                for pair in zip(questions[video], given[video])]
        found = [[] for _ in questions]
        batch = batch or len(rows)
        with full_memory_as_sentence(self, videos, batch):
            prefilled = self.prefill(videos, fps)
            for at in range(0, len(rows), batch):
                owners, asked, texts = zip(*rows[at:at + batch])
                suffixes = [self.prompt(question, prefilled.grid, fps)[1] for question in asked]

                # The answers: given, or the VLM's own.
                if all(texts):
                    said = [self.tokenizer(text, add_special_tokens=False).input_ids
                            for text in texts]
                else:
                    said = self.answer(prefilled, owners, suffixes, settings.words)

                # Where they look.
                maps = self.attend(prefilled, owners, suffixes, said, kinds, layers).cpu()
                for owner, answer, own_maps in zip(owners, said, maps):
                    text = self.tokenizer.decode(answer, skip_special_tokens=True)
                    empty = all(token in self.special_ids for token in answer)
                    found[owner].append(AnswerAttention(text, own_maps, empty))
        return found

    def ask_about(self, videos, fps: float, names: list[list[str]], settings: Settings, **how
                  ) -> list[list[AnswerAttention]]:
        """`ask`, with the question for each of a video's phenomena and, last, that for the
        background."""
        questions = [[*map(settings.question_for, asked), settings.background] for asked in names]
        answers = None
        if settings.answer:
            answers = [[*map(settings.answer_for, asked), settings.answer_for("background")]
                       for asked in names]
        return self.ask(videos, fps, questions, settings, answers=answers, **how)


def check_family(folder: Path) -> None:
    """Raises VLMError, before any weights are read, for a model without what the maps need."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise VLMError(f"There is no {folder / name}: a Qwen2.5-VL or Qwen3-VL is expected, as "
                           "transformers saves it.")
    about = read_json(folder / "config.json")
    vision = about.get("vision_config")
    has_time = isinstance(vision, dict) and "temporal_patch_size" in vision
    has_axes = "mrope_section" in json.dumps(about)  # which part of a config holds it has changed
    needs = {"video tokens (video_token_id)": "video_token_id" in about,
             "patches over time (temporal_patch_size)": has_time,
             "positions along time, height and width (mrope_section)": has_axes}
    for what, there in needs.items():
        if not there:
            raise VLMError(f"{folder} is of {about.get('model_type')!r}, which lacks {what}: a "
                           f"Qwen-VL is needed; tried were {', '.join(TRIED)}.")


def chat_template(tokenizer, folder: Path | None) -> str:
    """The template that knows of videos. Raises VLMError where there is none."""
    template = tokenizer.chat_template or ""
    old = folder and folder / "chat_template.json"  # where older checkpoints keep it
    if old and old.exists() and "video_pad" not in template:
        template = read_json(old).get("chat_template") or ""
    if "video_pad" not in template:
        raise VLMError(f"{folder} has no chat template with a place for a video.")
    return template


@contextlib.contextmanager
def full_memory_as_sentence(vlm: VLM, videos, batch: int):
    """When the device's memory is full, say what is large and what helps. Raises Stopped."""
    try:
        yield
    except torch.OutOfMemoryError:
        weights = sum(p.nbytes for p in vlm.model.parameters()) / 2**30
        raise Stopped(
            f"The device's memory is full: weights {weights:.1f} GiB, {len(videos)} video(s) of "
            f"{np.shape(videos[0])}, {batch} questions at once over {vlm.n_layers} layers. What "
            "helps, most first: --batch 1 (each question keeps its own keys and values), fewer "
            "--pixels (smaller frames), fewer --frames_shown, --dtype bf16, --answer \"{name}\" "
            "(no decoding), a smaller VLM.") from None



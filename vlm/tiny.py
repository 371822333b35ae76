"""A VLM of a tenth of a million parameters, and its training on the synthetic clips."""
import dataclasses
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import world
from common.files import write_text
from common.libraries import library
from config import Config, Stopped, UserError, stream
from physics import PHENOMENA
from vlm.qwen import VLM


SPECIAL = ("<|pad|>", "<|end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
MARKS = dict(image_token_id=2, video_token_id=3, vision_start_token_id=4, vision_end_token_id=5)
TINY = dict(question="is there {name}", background="what is the background", words=4, sinks=.93)
KEPT = 24  # video tokens that a question may see in training
GLIMPSES = 4  # draws of so many from each video


def tiny_words() -> list[str]:
    """All words of the tiny VLM's questions and answers. A phenomenon's name is one word: "motion" alone would look for
    four of them."""
    return ["is", "there", "what", "the", "background", "yes", "no", "nothing", *PHENOMENA]


def lessons(clip: world.Clip, still: bool, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions and answers about a clip: words alone, never a mask. To ask again is a weight in the loss.

    still: it is a photograph, in which nothing happens. What only looks as if it happened is asked for as well (the
    caption tells, or it is a photograph), for otherwise a press or a hot plate, as sure a sign as what happens in it
    and often larger, would be looked for.
    """
    shown = [actor.phenomenon for actor in clip.actors]
    alike = [name for name in PHENOMENA if name not in shown
             and any(re.search(phrase.replace("{c}", r"\w+"), clip.caption)
                     for phrase in PHENOMENA[name].decoy_phrases)]
    present, alike = ([], shown + alike) if still else (shown, alike)
    absent = [name for name in PHENOMENA if name not in shown]
    asked = 3 * present + 2 * alike + [str(rng.choice(absent))]
    return [(TINY["background"], "nothing"),
            *((TINY["question"].format(name=name), "yes" if name in present else "no") for name in asked)]


def photograph(cfg: Config, rng: np.random.Generator) -> world.Clip:
    """A still of the world, in any colours: colour cues and motion are missing, everything else is there."""
    drawing = {**data.world_settings(cfg), "decoys": 1.0, "colour_cues": False}
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
    tokenizer = library("transformers").PreTrainedTokenizerFast(
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
    transformers, tokenizer = library("transformers"), tiny_tokenizer()
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
    write_text(folder / "preprocessor_config.json", json.dumps(dict(
        image_mean=[.12, .12, .16], image_std=[.2, .2, .2], min_pixels=1, max_pixels=2**20)))
    write_text(folder / "teacher.json", json.dumps(TINY))


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
    drawing = {**data.world_settings(cfg), "decoys": 1.0}
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
    model, rng, random = vlm.model.train(), stream(seed, "lessons"), torch.Generator().manual_seed(seed)
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

"""A VLM of a tenth of a million parameters, and its training on synthetic clips.

It has the architecture of Qwen2.5-VL, so a laptop runs the same code as a GPU with a real one. It
learns from words alone ("is there melting" - "yes"), never from a mask.

Letters: B rows of a batch, N tokens of a clip, t h w their grid, P tokens of a prompt, S of a row.
"""
import dataclasses
import functools
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import world
from common.files import whole_folder, write_text
from common.libraries import library
from common.optim import Muon
from config import Config, Stopped, UserError, stream
from physics import PHENOMENA
from vlm.qwen import VLM

SPECIAL = ("<|pad|>", "<|end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
           "<|vision_end|>")
TOKEN_IDS = {  # where they stand in SPECIAL
    "image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5}
TINY_SETTINGS = {  # its teacher.json
    "question": "is there {name}", "background": "what is the background", "words": 4, "sinks": .93}
KEPT = 24  # video tokens that a question may see in training
GLIMPSES = 4  # draws of so many from each clip
DROPPED = .3  # share of the heads of attention that training leaves out
BATCH = 8  # clips a step of training
LR = 5e-3  # its highest learning rate


# --- the model ----------------------------------------------------------------------------------
def tiny_tokenizer():
    """Words to ids, with a chat template like Qwen-VL's, but for the many words around it.

    The name of a phenomenon is one word: "motion" alone would stand for four of them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["is", "there", "what", "the", "background", "yes", "no", "nothing", *PHENOMENA]
    ids = {word: i for i, word in enumerate([*SPECIAL, *words])}
    core = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_tokens([word for word in ids if " " in word])  # found before the split at spaces
    tokenizer = library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[1],
        extra_special_tokens=list(SPECIAL[2:]))
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}")
    return tokenizer


def write_tiny(folder: Path, seed: int) -> None:
    """Write an untrained tiny VLM and its tokenizer, as a folder for `VLM.from_folder`.

    Three things made it learn:

    * Weights of std 0.08, about 1 / sqrt(width). With transformers' 0.02 it finds nothing.
    * No attention in the vision tower, and one layer behind it. So a token knows what is at its own
      place, and nothing else.
    * No rotation by height and width: all frequencies turn with the position in time, which is the
      same for all tokens of a video. So attention goes by content.
    """
    transformers = library("transformers")
    tokenizer = tiny_tokenizer()
    rope = dict(rope_type="default", rope_theta=3.0, mrope_section=[12, 0, 0])
    text = dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192,
                num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
                initializer_range=0.08, rope_parameters=rope, bos_token_id=None, pad_token_id=0,
                eos_token_id=1, tie_word_embeddings=True)
    vision = dict(depth=0, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=4,
                  temporal_patch_size=2, spatial_merge_size=1, window_size=32,
                  fullatt_block_indexes=[], out_hidden_size=96, tokens_per_second=0,
                  initializer_range=0.08)
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **TOKEN_IDS))
    model.generation_config.eos_token_id = 1

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Synthetic clips are dark: with the usual mean and spread all patches would look alike.
    pictures = dict(image_mean=[.12, .12, .16], image_std=[.2, .2, .2], min_pixels=1,
                    max_pixels=2**20)
    write_text(folder / "preprocessor_config.json", json.dumps(pictures))
    write_text(folder / "teacher.json", json.dumps(TINY_SETTINGS))


# --- what it is taught --------------------------------------------------------------------------
def lessons(clip: world.Clip, still: bool, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about a clip, and their answers. What is asked twice weighs twice in the loss.

    still: the clip is a photograph, in which nothing happens, so that all answers are "no".

    Look-alikes are asked for too: what only seems to happen, as the caption or the photograph
    tells. Otherwise the VLM would look for a press or a hot plate. They are as sure a sign as the
    phenomenon, and often larger.
    """
    shown = [actor.phenomenon for actor in clip.actors]
    absent = [name for name in PHENOMENA if name not in shown]
    alike = [name for name in absent
             if any(re.search(phrase.replace("{c}", r"\w+"), clip.caption)
                    for phrase in PHENOMENA[name].decoy_phrases)]
    present = shown
    if still:
        present = []
        alike = shown + alike
    asked = 3 * present + 2 * alike + [str(rng.choice(absent))]
    return [(TINY_SETTINGS["background"], "nothing"),
            *((TINY_SETTINGS["question"].format(name=name), "yes" if name in present else "no")
              for name in asked)]


def draw_clip(cfg: Config, rng: np.random.Generator, **drawing) -> world.Clip:
    """A clip of the training split, with a look-alike in every scene that has room for one: a glass
    or a candle alone must not give the answer away."""
    drawing = {**world.drawing(cfg), "decoys": 1.0, **drawing}
    return world.make_clip(cfg.world_seed, int(rng.integers(cfg.world_clips)), **drawing)


def photograph(cfg: Config, rng: np.random.Generator) -> world.Clip:
    """One frame of a clip, standing still, in any colours: colour cues and motion are missing,
    everything else is there."""
    clip = draw_clip(cfg, rng, colour_cues=False)
    still = np.broadcast_to(clip.video[rng.integers(cfg.frames)], clip.video.shape)
    return dataclasses.replace(clip, video=still)


def glimpses(vlm: VLM, clips: list[world.Clip], random: torch.Generator
             ) -> tuple[Tensor, tuple[int, int, int]]:
    """Pixel values (B GLIMPSES KEPT, C) of tokens drawn from each clip (all tokens, where there are
    fewer than KEPT), and the grid (t, h, w) of all its tokens.

    This is token dropout: a question sees a few tokens, never a certain one, so attention must find
    all of an object. The tokens of the tiny VLM know nothing of each other, so those that a
    question may not see need not be there at all, which makes a step cheap.
    """
    pixels, grid = vlm.pictures.patches([clip.video for clip in clips])
    pixels = pixels.unflatten(0, (len(clips), -1))  # (B, N, C)
    drawn = torch.rand(len(clips), GLIMPSES, pixels.shape[1], generator=random).argsort(-1)
    drawn = drawn[..., :KEPT]  # (B, GLIMPSES, KEPT): numbers of tokens
    return pixels[torch.arange(len(clips))[:, None, None], drawn].flatten(0, 2), grid


def pack_questions(vlm: VLM, asked: list[list[tuple[str, str]]], grid: tuple[int, int, int],
                   fps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All questions about a clip, and their answers, as one sequence behind the clip's tokens.

    -> ids and labels (B, S; label 0 = none), positions (3, B, S), mask (B, 1, S, S) of what each
    token sees.

    An example: the questions "is there melting" and "is there collision" about a clip of 8 x 8
    tokens a frame. v is a video token, < and > mark where the video starts and ends, . is the token
    that ends an answer:

        token     <  v  v  v  >   is  there  melting  yes  .    is  there  collision  no  .   pad
        label                                   yes    .                       no      .
        position  0  1  1  1  9   10    11      12    13  14    10    11       12     13  14
        sees      < v v v >       < v v v > is there ... yes .  < v v v > is there ... no .   pad

    (The position is the one in time. Of what a token sees, it sees nothing behind itself.)

    A label stands at the token before the word that it names, since that token predicts the word.
    So a name predicts the answer, the answer predicts the end, and nothing else is learned. No
    question sees another one, and each has the positions that it would have alone behind the whole
    video: as when the VLM is asked.
    """
    # The prompt, with KEPT of the video's tokens. It does not matter which: their ids are the same,
    # and so are their positions in time, the only ones that the tiny VLM looks at.
    whole, _ = vlm.prompt(TINY_SETTINGS["background"], grid, fps)
    whole_positions = vlm.positions(whole, grid, fps)  # (3, 1, n)
    is_video = torch.tensor(whole) == vlm.video_id
    kept = ~is_video | (is_video.cumsum(0) <= KEPT)  # (n,)
    prompt = torch.tensor(whole)[kept]  # (P,)
    first = int(whole_positions.max()) + 1  # position of a question's first word

    # Of each token its id, its label, its position and its part of the row: 1 is the prompt, which
    # stands first, 2 the first question, and so on. Padding is part 0.
    ids_of = functools.cache(lambda text: vlm.tokenizer(text).input_ids)  # each text once
    end = [vlm.tokenizer.eos_token_id]
    rows = []
    for row in asked:
        tokens = [(token, 0, 0, 1) for token in prompt.tolist()]
        for part, (question, answer) in enumerate(row, start=2):
            before = ids_of(question)
            behind = ids_of(answer) + end
            labels = [0] * (len(before) - 1) + behind + [0]
            parts = [part] * len(labels)
            tokens += zip(before + behind, labels, range(first, first + len(labels)), parts)
        rows.append(torch.tensor(tokens))
    ids, labels, text_positions, parts = pad_sequence(rows, batch_first=True).unbind(-1)  # (B, S)
    positions = text_positions.repeat(3, 1, 1)
    positions[:, :, :len(prompt)] = whole_positions[:, :, kept]

    # A token sees its own part, a question sees the prompt too, and nothing looks ahead. Padding
    # sees padding, since a softmax needs something.
    own = parts[:, :, None] == parts[:, None]
    sees_prompt = (parts[:, :, None] > 1) & (parts[:, None] == 1)
    return ids, labels, positions, (own | sees_prompt).tril()[:, None]


# --- training -----------------------------------------------------------------------------------
def answer_loss(vlm: VLM, cfg: Config, n: int, rng: np.random.Generator, random: torch.Generator,
                watcher=None) -> Tensor:
    """Cross-entropy of the answers about n clips, every other one a photograph.

    rng draws clips and questions, random the glimpses. watcher: of `watched_attention`.
    """
    still = [i % 2 == 1 for i in range(n)]
    clips = [photograph(cfg, rng) if photo else draw_clip(cfg, rng) for photo in still]
    pixels, grid = glimpses(vlm, clips, random)
    asked = [lessons(clip, photo, rng) for clip, photo in zip(clips, still)]
    ids, labels, positions, mask = pack_questions(vlm, asked, grid, cfg.frames)

    # Each row once a glimpse of its clip.
    ids, labels, mask = (x.repeat_interleave(GLIMPSES, 0) for x in (ids, labels, mask))
    positions = positions.repeat_interleave(GLIMPSES, 1)
    kept = len(pixels) // len(ids)
    as_frames = torch.tensor([[kept, 1, 1]] * len(ids))  # as if each token were a frame of its own
    out = vlm.core(ids, mask, positions, use_cache=False, pixel_values_videos=pixels,
                   video_grid_thw=as_frames, watcher=watcher)
    labelled = labels > 0
    logits = vlm.model.get_output_embeddings()(out.last_hidden_state[labelled])
    return F.cross_entropy(logits, labels[labelled])


def drop_heads(random: torch.Generator, query, key, mask, scaling, output: Tensor) -> Tensor:
    """A watcher of attention that leaves whole heads out at random, so each learns to find
    everything.

    Without it some heads find nothing, rest on the background, and spoil the mean over heads.
    """
    B, S, heads, _ = output.shape
    kept = torch.rand(B, S, heads, 1, generator=random) >= DROPPED
    return output * kept / (1 - DROPPED)


def train_tiny(vlm: VLM, cfg: Config, minutes: float, steps: int = 0) -> None:
    """Train a tiny VLM for so many minutes, or so many steps, which a like machine repeats to the
    bit.

    Muon trains the matrices: with AdamW alone the VLM hardly tells names apart in that time. Its
    weight decay is a hundred times the usual one, which keeps attention soft: it finds all of an
    object and not only its surest token.
    """
    model = vlm.model.train()
    rng = stream(cfg.seed, "lessons")
    random = torch.Generator().manual_seed(cfg.seed)
    words = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not words]
    others = [p for p in model.parameters() if p.ndim != 2 or p is words]
    optimizers = [
        Muon(matrices, LR, weight_decay=1.0),
        torch.optim.AdamW(others, betas=(.9, .98), weight_decay=.01)]

    step = 0
    done = 0.0  # share of the training
    mean = 0.0  # of the loss, for the progress bar
    start = time.monotonic()
    with tqdm(total=100, desc="tiny VLM", unit="%") as bar:
        while done < 1:
            loss = answer_loss(vlm, cfg, BATCH, rng, random, functools.partial(drop_heads, random))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = LR * min(1, (step + 1) / 50, 2 * (1 - done))
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            mean = .98 * mean + .02 * loss.item()
            done = step / steps if steps else (time.monotonic() - start) / (60 * minutes)
            bar.update(int(100 * done) - bar.n)
            bar.set_postfix_str(f"step {step}, loss {mean / (1 - .98 ** step):.3f}")
    model.eval()


def make_tiny(folder: Path, cfg: Config, minutes: float, steps: int = 0) -> None:
    """Train a tiny VLM and write it to a folder, whole or not at all. Raises UserError, Stopped."""
    if not folder.name or folder.exists():
        raise UserError(f"{folder} is there already: `--annotate tiny_vlm` makes its maps; to "
                        "train another VLM give another --vlm, or delete it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as part:
            write_tiny(part, cfg.seed)
            vlm = VLM.from_folder(part)
            vlm.model.requires_grad_(True)
            train_tiny(vlm, cfg, minutes, steps)
            vlm.model.save_pretrained(part)
    except OSError as e:
        reason = e.strerror or e
        raise Stopped(f"The tiny VLM could not be written to {folder}: {reason}.") from None
    parameters = sum(p.numel() for p in vlm.model.parameters()) / 1e6
    print(f"wrote {folder}: {parameters:.2f} M parameters")

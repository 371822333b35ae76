"""Tiny Qwen-VLs with random weights, what `output_attentions` of the eager model says of them,
and teacher.py's maps.

The VLMs are wide enough that no two tokens look alike: grouped keys, windows in the vision tower,
a tokenizer of single letters. Needs transformers: whoever imports this skips without it first.
"""
import json

import numpy as np
import torch
import transformers

import common.store
from vlm import settings as vlm_settings
import seams
import teacher
from helpers import words_of

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
MARKS = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
         "<|vision_end|>")
LETTERS = [chr(i) for i in range(32, 127)] + ["\n"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PICTURES = dict(image_mean=[.4, .5, .6], image_std=[.3, .2, .25], min_pixels=64, max_pixels=4096)


# -------------------------------------------------------------------------------------------------- tiny VLMs
def make_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate((*MARKS, *LETTERS))},
                                      unk_token=" "))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=MARKS[0],
                                                     eos_token=MARKS[0],
                                                     extra_special_tokens=list(MARKS[1:]))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def configured(family, layers, merge, **text):
    """A model of the family. text: its sizes."""
    text = dict(vocab_size=len(MARKS) + len(LETTERS), hidden_size=32, intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=.25,
                bos_token_id=None,
                pad_token_id=0, eos_token_id=0,
                rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[2, 1, 1])) | text
    vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4,
                  temporal_patch_size=2,
                  spatial_merge_size=merge, out_hidden_size=text["hidden_size"], initializer_range=.25)
    if family.startswith("qwen3"):
        vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
        kinds = transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig
    if family == "qwen3_vl_moe":
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1)
        kinds = transformers.Qwen3VLMoeForConditionalGeneration, transformers.Qwen3VLMoeConfig
    if family.startswith("qwen2"):
        del text["head_dim"]
    if family == "qwen2_5_vl":
        vision |= dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)
        kinds = transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig
    if family == "qwen2_vl":
        vision |= dict(embed_dim=32, hidden_size=vision.pop("out_hidden_size"), mlp_ratio=2)
        kinds = transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLConfig
    ids = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
               vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    ids = {name: MARKS.index(mark) for name, mark in ids.items()}
    network, its_config = kinds
    return network(its_config(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids))


def make_vlm(folder, family, seed=0, layers=5, merge=2, **text):
    """A folder with a model of random weights whose attention is anything but even."""
    torch.manual_seed(seed)
    net = configured(family, layers, merge, **text)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name and name.endswith("weight"):  # a norm that is left out would show
                parameter.add_(.3 * torch.randn_like(parameter))
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = 0, 0
    net.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    return folder


# ----------------------------------------------------------------------- the reference: nothing of teacher.py
def official_pixels(video):
    """(n, C m p p), grid: transformers' own processor, which knows pictures only, on every frame;
    then the frames of a pair side by side, as the model's documentation has them: C, m, p, p."""
    size = dict(shortest_edge=PICTURES["min_pixels"], longest_edge=PICTURES["max_pixels"])
    processor = transformers.Qwen2VLImageProcessorPil(size=size, patch_size=4, temporal_patch_size=1,
                                                      merge_size=2,
                                         image_mean=PICTURES["image_mean"], image_std=PICTURES["image_std"])
    video = np.concatenate([video, video[-1:]]) if len(video) % 2 else video
    out = processor([frame for frame in video], return_tensors="pt")
    (_, h, w) = out.image_grid_thw[0].tolist()
    frames = out.pixel_values.view(len(video) // 2, 2, -1, 3, 1, 4, 4)
    return frames.permute(0, 2, 3, 1, 4, 5, 6).reshape(-1, 3 * 2 * 4 * 4), [len(video) // 2, h, w]


def whole_prompt(family, grid, fps, question, answer=""):
    """The text of prompt and answer at once."""
    t, pads = grid[0], "<|video_pad|>" * (grid[1] * grid[2] // 4)
    if family.startswith("qwen3"):
        # the mean of when its two frames are shown
        stamps = [(2 * j / fps + (2 * j + 1) / fps) / 2 for j in range(t)]
        video = "".join(f"<{stamp:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for stamp in stamps)
    else:
        video = f"<|vision_start|>{pads * t}<|vision_end|>"
    before, after = f"<|im_start|>user\n{video}", f"{question}<|im_end|>\n<|im_start|>assistant\n"
    return before, after, before + after + answer


def inputs_of(family, tokenizer, video, fps, question, answer=""):
    pixels, grid = official_pixels(video)
    ids = tokenizer(whole_prompt(family, grid, fps, question, answer)[2], return_tensors="pt").input_ids
    inputs = dict(input_ids=ids, pixel_values_videos=pixels, video_grid_thw=torch.tensor([grid]),
                  mm_token_type_ids=2 * (ids == MARKS.index("<|video_pad|>")).long())
    return inputs | (dict(second_per_grid_ts=torch.tensor([2 / fps])) if family == "qwen2_5_vl" else {})


@torch.no_grad()
def expected(eager, family, tokenizer, video, fps, question, answer):
    """(layers, heads, kinds, N) attention to the video,
    by one plain pass over everything, and the position ids."""
    inputs = inputs_of(family, tokenizer, video, fps, question, answer)
    places, outputs = seams.positions_of(eager, inputs)
    attentions = torch.stack(outputs.attentions)[:, 0]
    ids, special = inputs["input_ids"][0].tolist(), set(range(len(MARKS)))
    before, after, _ = whole_prompt(family, inputs["video_grid_thw"][0].tolist(), fps, question)
    begins, said = len(tokenizer(before).input_ids), len(tokenizer(before + after).input_ids)
    rows = {"question": list(range(begins, begins + len(question))),
            "answer": [i for i in range(said, len(ids)) if ids[i] not in special]}
    rows["predict"] = [i - 1 for i in rows["answer"]]
    video_at = [i for i, token in enumerate(ids) if token == MARKS.index("<|video_pad|>")]
    maps = torch.stack([attentions[:, :, rows[kind]][..., video_at].mean(2) for kind in vlm_settings.KINDS],
                       dim=2)
    return maps, places


# ------------------------------------------------------------------------------------------ teacher.py's maps
FILM_RECORDS = [  # the fifth is no video, the sixth is not there
    {"file": "a.mp4", "caption": "ice melts over a fire", "q0": "melting, combustion", "q4": "no change"},
    {"file": "b.mp4", "caption": "two balls hit", "q1": "collision"},
    {"file": "long.mp4", "caption": "a ball falls", "q1": "rigid body motion, levitation"},
    {"file": "quiet.mp4", "caption": "nothing happens"},
    {"file": "text.mp4", "caption": "words"},
    {"file": "absent.mp4", "caption": "gone"},
]
WATCHING = dict(frames_shown=9, rate=8, words=3, question="{name}?", background="behind?", pixels=32 * 48,
                batch=2)
FILM = dict(height=36, width=52)  # of every video


def teacher_flags(videos, vlm, out, **fields):
    """The command line of teacher.py."""
    flags = dict(videos=videos, vlm=vlm, out=out, device="cpu", threads=1) | WATCHING | fields
    return words_of(flags)


def make_maps(videos, vlm, out, *more, **fields):
    """`python teacher.py --videos ...`, in this process."""
    teacher.main([*teacher_flags(videos, vlm, out, **fields), *more])
    return out


def maps_of(maps, name):
    """[(tensors, about)] of a video, in order."""
    index = json.loads((maps / "index.json").read_text())
    return [common.store.read_tensors(maps / "clips" / row[0]) for row in index["clips"] if row[1] == name]

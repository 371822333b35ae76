"""How fast a VLM of seven billion parameters makes maps: its shapes, random weights."""
import timeit

import numpy as np
import torch

from common.libraries import library
from common.score import table_head, table_line
from config import UserError
from vlm.qwen import VLM
from vlm.settings import Settings
from vlm.tiny import TINY_SETTINGS, TOKEN_IDS, tiny_tokenizer

CLIPS = 20_000  # of a training set of the paper's size
NAMES = ["melting", "combustion", "collision"]
SEVEN_B = {  # Qwen2.5-VL-7B; its vision tower's other sizes are the defaults of transformers
    "text_config": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
    "vision_config": dict(hidden_size=1280, tokens_per_second=2)}


def random_vlm(device: str, shapes: dict) -> VLM:
    """A Qwen2.5-VL of these shapes, with random weights in bf16 and the tiny VLM's words."""
    transformers = library("transformers")
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(
            transformers.Qwen2_5_VLConfig(**shapes, **TOKEN_IDS), dtype=torch.bfloat16)
    vlm = VLM(model.eval().requires_grad_(False), tiny_tokenizer())
    vlm.end_ids = set()  # so every answer has its full length
    return vlm


def benchmark(device: str) -> None:
    """Time the large VLM on clips of 26 frames. Raises UserError without a GPU."""
    if device == "cpu":
        raise UserError("--benchmark times a VLM of seven billion parameters: it needs a GPU.")
    print_times(random_vlm(device, SEVEN_B), (26, 476, 728), words=48)


def print_times(vlm: VLM, size: tuple[int, int, int], words: int) -> None:
    """Print seconds a clip and peak memory, and what that makes for CLIPS clips.

    size: frames, height and width of a clip. It is asked three questions and the background's, all
    at once and one by one; answers have so many words.
    """
    settings = Settings(**TINY_SETTINGS | {"words": words})
    video = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    on_gpu = vlm.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    parameters = sum(p.numel() for p in vlm.model.parameters()) / 1e9
    print(f"{where}, torch {torch.__version__}, {parameters:.2f} B parameters, {size[0]} frames of "
          f"{size[1]} x {size[2]}, {len(NAMES) + 1} questions, answers of {words} tokens\n")
    print(table_head(["questions", "seconds a clip", "peak memory, GiB",
                      f"{CLIPS:,} clips, hours"]))
    for name, batch in (("all at once", 0), ("one by one", 1)):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        ask = lambda: vlm.ask_about(video, 4.0, [NAMES], settings, batch=batch)
        taken = timeit.repeat(ask, number=1, repeat=4)  # maps come to the CPU, so nothing runs on
        seconds = min(taken[1:])  # the first one warms up
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if on_gpu else "-"
        print(table_line([name, f"{seconds:.2f}", peak, f"{CLIPS * seconds / 3600:.1f}"]))

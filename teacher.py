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
import dataclasses
import hashlib
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
from common.files import cores, join_some, shard_of
from common.libraries import library
from common.run import pick_device
from common.store import Store, clip_file
from common.video import Folder, reason_of
from config import Config, Stopped, UserError, stream
from official.folder import fingerprint
from physics import CATEGORIES
from vlm.maps import (
    MAPS,
    Maps,
    Tally,
    VLMClip,
    aligned_frames,
    clip_for_vlm,
    frames_for_vlm,
    map_answers,
    map_row,
    row_middles,
    windows_for_vlm,
    world_maps,
    write_map,
)
from vlm.qwen import CUES, VLM, Look, Settings, VLMError, layers_of
from vlm.report import of_clips, of_json, preview, print_report, saliency
from vlm.tiny import MARKS, TINY, make_tiny, tiny_tokenizer


# --------------------------------------------------------------------------------------------------------- maps on disk
def annotate(vlm: VLM, settings: Settings, store: Store, groups, tally: Tally, batch: int, skipped: list[str],
             bar: tqdm) -> None:
    """Make the map files of groups of clips, (file, VLMClip) each, all of one shape in a group. A clip that the VLM
    cannot do is noted in `skipped`."""
    for group in groups:
        try:
            looks = vlm.look_for([clip.frames for _, clip in group], group[0][1].fps,
                                 [clip.names for _, clip in group], settings, batch=batch)
        except VLMError as e:
            skipped += [f"{clip.source} ({e})" for _, clip in group]
            looks = []
        for (file, clip), answers in zip(group, looks):
            try:
                write_map(store, file, clip, map_answers(clip, answers, settings, tally))
                tally.made += 1
            except VLMError as e:
                skipped.append(f"{clip.source} ({e})")
        bar.update(len(group))


def map_settings(vlm: VLM, settings: Settings, **more) -> dict:
    """All that shapes the maps, but for the videos: what maps.json keeps."""
    cues = hashlib.sha256(json.dumps([CUES, vlm.template]).encode()).hexdigest()[:16]
    return {"format": 1, "vlm": fingerprint(vlm.folder), "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "layers": layers_of(settings.layers, vlm.n_layers), "template": cues, **more,
            **{name: value for name, value in dataclasses.asdict(settings).items() if name != "layers"}}


def annotate_videos(args, folder: Folder, vlm: VLM, settings: Settings) -> None:
    """--videos: maps of a folder's videos. Raises UserError and Stopped."""
    asked = map_settings(vlm, settings, frames=args.frames, fps=args.fps, windows=args.windows,
                         sample=args.sample, pixels=args.pixels, all=args.all)
    shard, tally = shard_of(args.shard), Tally()
    store = Store.create(args.out, MAPS, asked, shard)
    videos = {store.name(video.identity()): video for video in folder.videos.values()}
    missing, have = store.missing(list(videos)[shard[0]::shard[1]])

    def groups(bar):
        for name in missing:
            video = videos[name]
            present = [CATEGORIES[c] for c in video.categories if c < len(CATEGORIES)]
            try:
                found = windows_for_vlm(video.path, vlm, args.frames, args.fps, args.windows, args.pixels)
            except Exception as e:  # whatever decoders make of a damaged file concerns that file alone
                folder.skipped.append(f"{video.name} ({reason_of(e)})")
                found = []
            for window in found:
                file = clip_file(name, window.number, window.taken)
                if file not in have:
                    names = list(CUES) if args.all else present
                    yield [(file, clip_for_vlm(window, video.name, names, args.fps, vlm.merged, args.sample))]
            bar.total += max(len(found) - 1, 0)

    try:
        with tqdm(total=len(missing), desc="looking", unit="clip") as bar:
            annotate(vlm, settings, store, groups(bar), tally, args.batch, folder.skipped, bar)
        index = store.write_index(videos, lambda file, video: map_row(store, file, video.name))
    except OSError as e:
        raise Stopped(f"{e.filename or store.folder} cannot be read or written any more: {e.strerror or e}.") from None
    skipped = folder.skipped_sentence()
    if not index["clips"]:
        raise UserError(f"No map could be made from {args.videos}{skipped or '; the annotations name no video'}.")
    print(f"{tally.made} maps made, {len(have)} were there; {store.folder} holds {len(index['clips'])} of {index['done']} "
          f"of {index['videos']} videos{tally}{skipped}{folder.unknown_labels()}")


# ----------------------------------------------------------------------------------------------------- the tiny teacher
GROUP = 32  # clips of the world that are looked at together


# ------------------------------------------------------------------------------------------------ the world's own clips
def of_world(pool: data.Pool, row: int, merged: int) -> VLMClip:
    """A clip of the pool, all of its frames."""
    name, _, size, crop = pool.sources[row]
    video, F_ = np.asarray(pool.video[row]), pool.video.shape[1]
    times = (row_middles(np.arange(F_), merged) / F_).tolist()
    return VLMClip(name, video, F_, times, tuple(size), tuple(crop), [CATEGORIES[c] for c in pool.categories[row]])


def annotate_world(args, cfg: Config, vlm: VLM | None, settings: Settings | None) -> None:
    """--annotate NAME: maps of the pool's clips, for `train.py --teacher NAME`. Raises UserError and Stopped.

    Of a VLM; or, as rivals, saliency: frame differences; shuffled: each clip gets the VLM's maps of another clip with
    the same phenomena.
    """
    pool = data.open_pool(cfg)
    asked = map_settings(vlm, settings) if vlm else {"format": 1, "kind": args.kind}
    if args.kind == "shuffled":
        other = Maps(world_maps(cfg, pool, args.maps))
        asked["of"] = other.key
    shard, tally = shard_of(args.shard), Tally()
    store = Store.create(world_maps(cfg, pool, args.annotate), MAPS, asked, shard)
    rows = {store.name([name, categories]): row for row, (name, categories) in enumerate(zip(pool.names, pool.categories))}
    missing, have = store.missing(list(rows)[shard[0]::shard[1]])
    todo = {rows[name]: clip_file(name, 0, 1) for name in missing}
    skipped = []
    try:
        with tqdm(total=len(todo), desc=f"maps by {args.kind}", unit="clip") as bar:
            groups = ([(todo[row], of_world(pool, row, vlm.merged if vlm else 2)) for row in list(todo)[at:at + GROUP]]
                      for at in range(0, len(todo), GROUP))
            if args.kind == "vlm":
                annotate(vlm, settings, store, groups, tally, args.batch, skipped, bar)
            elif args.kind == "saliency":
                for group in groups:
                    for file, clip in group:
                        change = saliency(clip.frames, len(clip.times))
                        look, even = (Look("", m[None, None], False) for m in (change, torch.ones_like(change)))
                        looks = [look] * len(clip.names) + [even]
                        write_map(store, file, clip, map_answers(clip, looks, Settings(), tally))
                        tally.made += 1
                    bar.update(len(group))
            else:
                shuffle(pool, todo, other, store, tally, bar)
        index = store.write_index(rows, lambda file, row: map_row(store, file, pool.names[row]))
    except OSError as e:
        raise Stopped(f"{e.filename or store.folder} cannot be read or written any more: {e.strerror or e}.") from None
    if not index["clips"]:
        raise UserError(f"No map could be made{': ' + join_some(skipped) if skipped else ''}.")
    print(f"{tally.made} maps made, {len(have)} were there; {store.folder} holds {index['done']} of {len(rows)}{tally}"
          + (f"; skipped {len(skipped)}: {join_some(skipped)}" if skipped else ""))


def shuffle(pool: data.Pool, todo: dict[int, str], other: Maps, store: Store, tally: Tally, bar: tqdm) -> None:
    """Copy maps from clip to clip of the same phenomena: right of the kind, wrong of the clip. todo: {row: its file}."""
    alike = {}
    for row, categories in enumerate(pool.categories):
        alike.setdefault(tuple(categories), []).append(row)
    swap = {}
    for members in alike.values():
        order = stream(len(members), "shuffle").permutation(len(members))
        swap.update({members[a]: members[b] for a, b in zip(order, np.roll(order, 1))})
    for row, file in todo.items():
        found = other.of.get(pool.names[swap[row]])
        read = other.store.read(found[0][2]) if found else None
        if read:
            tensors, about = read
            store.write(store.clips / file, tensors, {**about, "file": pool.names[row]})
            tally.made += 1
        bar.update()


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
    transformers = library("transformers")
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
    shard_of(args.shard)
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
    torch.set_num_threads(cores(cfg.threads))
    device = pick_device(cfg.device)
    if args.benchmark:
        if device == "cpu":
            raise UserError("--benchmark times a VLM of seven billion parameters: it needs a GPU.")
        return benchmark(device, torch.bfloat16)
    if args.train_tiny:
        args.annotate = args.annotate or "tiny_vlm"
        old = world_maps(cfg, data.open_pool(cfg), args.annotate)
        if old.exists():
            raise UserError(f"{old} holds maps of another VLM: delete it, or give --annotate another name.")
        make_tiny(Path(args.vlm), cfg, cfg.seed, args.minutes, args.steps)
    if args.annotate and args.kind != "vlm":
        return annotate_world(args, cfg, None, None)
    dtype = torch.bfloat16 if args.dtype == "bf16" or args.dtype == "auto" and device == "cuda" else torch.float32
    if not Path(args.vlm).is_dir():
        raise UserError(f"There is no VLM in {args.vlm}: give --vlm DIR, or make a tiny one with --train_tiny.")
    if args.videos:  # read before a VLM is, which may take minutes
        folder = Folder(args.videos, args.annotations)
    vlm = VLM(args.vlm, device, dtype)
    settings = vlm.settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    if args.videos:
        annotate_videos(args, folder, vlm, settings)
    if args.annotate:
        annotate_world(args, cfg, vlm, settings)
    if not (args.report or args.preview):
        return
    if args.truth:
        clips = of_json(Path(args.truth), vlm, args.frames, args.fps, args.pixels)

        def shape(truth):
            frames, fps = frames_for_vlm(len(truth.video), truth.fps, vlm.merged, args.sample)
            return truth.video[frames], fps
    else:
        clips = of_clips(cfg, args.clips)

        def shape(truth):
            return truth.video, truth.fps
    if args.report:
        print_report(vlm, settings, clips, args, shape)
    if args.preview:
        preview(Path(args.preview), vlm, settings, clips[:3], args.batch, shape)


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

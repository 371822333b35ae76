"""The teacher: where a vision-language model (VLM) looks as it describes a phenomenon, as attention
maps that teach the router.

    video, phenomenon --question--> VLM --attention of the rows that predict its answer--> a map
    video --background question---> VLM --------------------------------------> another, subtracted

    python teacher.py --videos DIR --annotations FILE --vlm DIR --out MAPS [--shard 1/8]
                                                   maps of your videos, for train.py --teacher MAPS
    python teacher.py --train_tiny --colour_cues   a VLM of a tenth of a million parameters, and its
                                                   maps of the synthetic clips
    python teacher.py --report --colour_cues       how well maps find what they are asked for
    python teacher.py --preview overlay.gif        question, answer, maps and exact mask

Training does not import this file: it reads the maps that are left on disk. The steps:

1. The VLM is asked, and its attention watched (vlm/qwen.py, vlm/attention.py).
2. The attention becomes a density: the mean over rows, heads and layers, scaled so that uniform
   attention is 1.
3. The density is stored on the VLM's own grid, with the times and the rectangle that it covers, so
   that any clip finds its tokens in it (vlm/maps.py).

Left out on purpose: attention rollout (it needs all matrices), several GPUs for one VLM, several
videos in a prompt.
"""
import dataclasses
import itertools
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
from common.annotations import Folder, Video
from common.files import cores, join_some, shard_of
from common.run import pick_device, pick_precision
from common.store import Store, clip_file
from common.video import lost_windows, reason_of
from config import Config, UserError, flag, stream
from physics import CATEGORIES
from vlm import maps, qwen, report, speed, tiny

GROUP = 32  # synthetic clips that are looked at together


# --- flags --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flags:
    """The command line, but for the flags of Config."""
    # --- what to do
    videos: str = ""  # folder of videos: make their maps
    train_tiny: bool = False  # train a tiny VLM on synthetic clips, into --vlm, and make its maps
    annotate: str = ""  # name under which the synthetic clips get maps, for train.py --teacher NAME
    report: bool = False  # how well maps find what they are asked for, where the truth is known
    preview: str = ""  # GIF of question, answer, map, background map, difference and mask to write
    benchmark: bool = False  # time a VLM of Qwen2.5-VL-7B's shapes with random weights, on a GPU

    # --- with which VLM
    vlm: str = "data/tiny_vlm"  # folder of a Qwen2.5-VL or Qwen3-VL
    dtype: str = flag("auto", choices=("auto", "bf16", "fp32"))  # auto = bf16 on cuda, else fp32
    batch: int = 0  # questions at once; 0 = all of a group
    minutes: float = 4.5  # of training the tiny VLM
    steps: int = 0  # of training it, instead: the same weights on every like machine

    # --- which clips
    annotations: str = ""  # captions or a WISA list: .json, .jsonl, .csv; empty = the folder's
    out: str = ""  # folder of the videos' maps; started again, it goes on where it was stopped
    shard: str = ""  # i/n: every n-th video (or clip) from the i-th on; empty = torchrun's
    frames_shown: int = 49  # frames a window of a video, 1 + 4 m
    rate: float = 8.0  # of these frames a second
    sample: int = 0  # frames of a window to show, evenly; 0 = what latents stand for
    windows_taken: int = 4  # windows of one long video at most
    pixels: int = flag(350_000, marks=(10**8,))  # of a frame at most: 480 x 720 becomes 476 x 728
    all: bool = False  # ask for all phenomena, not only those of the annotations
    kind: str = flag("vlm", choices=("vlm", "saliency", "shuffled"))  # whose maps --annotate makes
    maps: str = "tiny_vlm"  # name of the maps that --kind shuffled shuffles
    clips: int = 150  # synthetic ones for --report

    # --- how to ask and read; None = the folder's teacher.json, else what vlm/settings.py says
    question: str | None = None  # with a place for {name} and {cue}
    background: str | None = None  # the background question
    answer: str | None = None  # such as "{name}": instead of the VLM's own, 5 to 70 times cheaper
    words: int | None = None  # tokens of an answer, at most
    rows: str | None = None  # of attention: question | predict | answer
    layers: str | None = None  # first-last, counted from 0
    sinks: float | None = None  # a map is cut at this quantile of itself

    IDLE = (  # as in rules.py
        ("annotations frames_shown rate sample windows_taken pixels all", "with --videos"),
        ("minutes steps", "with --train_tiny"), ("minutes", "without --steps"),
        ("shard", "with --videos or with --annotate or with --train_tiny"),
        ("kind", "with --annotate"), ("maps", "with --kind shuffled"),
        ("clips", "with --report or with --preview"),
        ("dtype batch question background answer words rows layers sinks", "with --kind vlm"))
    READS = (  # fields of Config
        "config device threads seed pool_dir data_dir world_clips world_seed val_clips decoys two "
        "colour_cues ood frames height width fps windows patch patch_t")

    def check(self) -> None:
        """Raises UserError with the first broken rule."""
        for name in ("minutes", "clips", "pixels", "frames_shown", "rate", "windows_taken"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be more than zero, not {getattr(self, name)}.")
        shard_of(self.shard)
        if min(self.sample, self.batch, self.steps) < 0:
            raise UserError("--sample, --batch and --steps must be zero or more.")
        if not self.sample and self.frames_shown % 4 != 1:
            raise UserError("Without --sample, --frames_shown takes 1 + 4 m frames, such as 49 or 81, "
                            f"not {self.frames_shown}.")
        if self.annotate and not re.fullmatch(r"\w+", self.annotate):
            raise UserError(f"--annotate takes a plain name, not {self.annotate!r}.")
        if self.videos and not self.out:
            raise UserError("--videos needs --out, the folder for the maps.")
        if not (self.videos or self.train_tiny or self.annotate or self.report or self.preview
                or self.benchmark):
            raise UserError("Say what to do: --videos, --train_tiny, --annotate, --report, "
                            "--preview or --benchmark; --help lists every flag.")
        gif = Path(self.preview)
        if self.preview and not (gif.suffix.lower() == ".gif" and gif.parent.is_dir()):
            raise UserError("--preview takes a .gif in a folder that is there, not "
                            f"{self.preview!r}.")


def parse(argv: list[str]) -> tuple[Flags, Config]:
    """The flags of this file, and the Config that the others describe: the world, device, threads,
    seed and pool_dir. Raises UserError."""
    flags, cfg = config.parse_with(Flags, argv, "Where a vision-language model looks, as maps that "
                                                "teach the refinement router.")
    of_world = {"--frames", "--fps", "--windows", "--height", "--width"}
    given = sorted(of_world & {word.split("=")[0] for word in argv})
    if flags.videos and given:
        raise UserError(f"{', '.join(given)} shapes the world's clips; for videos there are "
                        "--frames_shown, --rate, --windows_taken and --pixels.")
    if cfg.data_dir and (flags.annotate or flags.train_tiny):
        raise UserError("--annotate and --train_tiny are for the world; --videos makes maps of a "
                        "folder.")
    return flags, cfg


# --- making map files ---------------------------------------------------------------------------
@dataclass
class Work:
    """Map files that are being made, and what a summary will say of them."""
    store: Store
    have: set[str]  # files that were there
    skipped: list[str]  # "name (reason)"
    bar: tqdm
    made: int = 0
    tally: Counter = field(default_factory=Counter)  # of vlm/maps.py
    index: dict = field(default_factory=dict)  # index.json, at the end

    def write(self, file: str, tensors: dict[str, torch.Tensor], about: dict) -> None:
        """One map file. Raises OSError."""
        self.store.write(self.store.clips / file, tensors, about)
        self.made += 1


def make_maps(folder, asked: dict, shard: str, items: list[tuple[list, str, object]],
              skipped: list[str], desc: str, make: Callable) -> Work:
    """Make the map files that a folder lacks, and list all of them.

    asked: the settings. items: of each video what tells it from all others, its name, and what
    `make` needs of it. make(work, {NAME in the store: item}) makes the files of these videos.
    Raises UserError and Stopped.
    """
    first, shards = shard_of(shard)
    with Store.create(folder, maps.MAPS, asked, (first, shards)) as store:
        named = {store.name(identity): (video, item) for identity, video, item in items}
        missing, have = store.missing(list(named)[first::shards])
        with tqdm(total=len(missing), desc=desc, unit="clip") as bar:
            work = Work(store, have, skipped, bar)
            make(work, {name: named[name][1] for name in missing})
        work.index = store.write_index(
            named, lambda file, item: maps.map_row(store, file, item[0]))
    return work


def annotate(work: Work, vlm: qwen.VLM, settings: qwen.Settings, groups, batch: int) -> None:
    """Make the map files of groups of clips [VLMClip], all of one shape in a group. A clip that the
    VLM cannot do is skipped."""
    for clips in groups:
        try:
            found = vlm.ask_about([clip.frames for clip in clips], clips[0].fps,
                                  [clip.names for clip in clips], settings, batch=batch)
        except qwen.VLMError as e:
            work.skipped += [f"{clip.source} ({e})" for clip in clips]
            found = []
        for clip, looks in zip(clips, found):
            try:
                answers = maps.map_answers(clip, looks, settings, work.tally)
                work.write(clip.file, *maps.map_file(clip, answers))
            except qwen.VLMError as e:
                work.skipped.append(f"{clip.source} ({e})")
        work.bar.update(len(clips))


# --- videos -------------------------------------------------------------------------------------
def annotate_videos(flags: Flags, folder: Folder, vlm: qwen.VLM, settings: qwen.Settings) -> None:
    """--videos: maps of a folder's videos. Raises UserError and Stopped."""
    asked = vlm.identity(settings, frames=flags.frames_shown, fps=flags.rate,
                         windows=flags.windows_taken, sample=flags.sample, pixels=flags.pixels,
                         all=flags.all)
    videos = [(video.identity(), video.name, video) for video in folder.videos.values()]
    work = make_maps(
        flags.out, asked, flags.shard, videos, folder.skipped, "looking", lambda work, todo:
        annotate(work, vlm, settings, windows_of_videos(flags, work, todo, vlm), flags.batch))
    skipped = folder.skipped_sentence()
    index = work.index
    if not index["clips"]:
        reason = skipped or "; the annotations name no video"
        raise UserError(f"No map could be made from {flags.videos}{reason}.")
    print(f"{work.made} maps made, {len(work.have)} were there; {work.store.folder} holds "
          f"{len(index['clips'])} of {index['done']} of {index['videos']} videos"
          f"{maps.counted(work.tally)}{skipped}{folder.unknown_labels()}")


def windows_of_videos(flags: Flags, work: Work, todo: dict[str, Video], vlm: qwen.VLM
                      ) -> Iterator[list[maps.VLMClip]]:
    """Each window without a map as a group of its own. todo: {NAME in the store: video}."""
    for name, video in todo.items():
        names = [CATEGORIES[c] for c in video.categories if c < len(CATEGORIES)]
        if flags.all:
            names = list(qwen.CUES)
        try:
            windows = maps.windows_for_vlm(video.path, vlm, flags.frames_shown, flags.rate,
                                           flags.windows_taken, flags.pixels)
        except Exception as e:  # whatever decoders make of a damaged file concerns that file alone
            work.skipped.append(f"{video.name} ({reason_of(e)})")
            continue
        lost = lost_windows(windows)
        if lost:
            work.skipped.append(f"{video.name} ({lost})")
        work.bar.total += len(windows) - 1
        content = video.content
        for window in windows:
            file = clip_file(name, window.number, window.taken)
            if file not in work.have:
                yield [maps.clip_for_vlm(window, video.name, names, flags.rate,
                                         vlm.pictures.temporal_patch, flags.sample, file, content)]


# --- synthetic clips ----------------------------------------------------------------------------
def annotate_world(flags: Flags, cfg: Config, vlm: qwen.VLM | None = None,
                   settings: qwen.Settings | None = None) -> None:
    """--annotate NAME: maps of the pool's clips, for `train.py --teacher NAME`.

    They are a VLM's; or, as rivals that need none, frame differences (saliency), or each clip gets
    the maps of another clip with the same phenomena (shuffled). Raises UserError and Stopped.
    """
    pool = data.open_pool(cfg)
    asked = vlm.identity(settings) if vlm else {"format": 1, "kind": flags.kind}
    if flags.kind == "shuffled":
        other = maps.Maps(maps.world_maps(cfg, pool, flags.maps))
        asked["of"] = other.key

    def make(work: Work, todo: dict[str, int]) -> None:
        if flags.kind == "vlm":
            groups = groups_of_clips(pool, todo, vlm.pictures.temporal_patch)
            annotate(work, vlm, settings, groups, flags.batch)
        elif flags.kind == "saliency":
            annotate_by_saliency(work, groups_of_clips(pool, todo, 2))
        else:
            annotate_by_shuffling(work, pool, todo, other)

    rows = [([name, categories], name, row)
            for row, (name, categories) in enumerate(zip(pool.names, pool.categories))]
    work = make_maps(maps.world_maps(cfg, pool, flags.annotate), asked, flags.shard, rows, [],
                     f"maps by {flags.kind}", make)
    skipped = join_some(work.skipped)
    if not work.index["clips"]:
        raise UserError(f"No map could be made{': ' + skipped if skipped else ''}.")
    skipped = f"; skipped {len(work.skipped)}: {skipped}" if skipped else ""
    print(f"{work.made} maps made, {len(work.have)} were there; {work.store.folder} holds "
          f"{work.index['done']} of {len(rows)}{maps.counted(work.tally)}{skipped}")


def groups_of_clips(pool: data.Pool, todo: dict[str, int], merged: int
                    ) -> Iterator[list[maps.VLMClip]]:
    """Whole clips of the pool, GROUP at a time. todo: {NAME in the store: row}; merged: frames a
    token."""
    n = pool.video.shape[1]
    times = (maps.row_middles(np.arange(n), merged) / n).tolist()  # a clip lasts one second
    group = []
    for name, row in todo.items():
        source, _, size, crop = pool.sources[row]
        names = [CATEGORIES[c] for c in pool.categories[row]]
        video, = pool.clips([row])
        file = clip_file(name, 0, 1)
        group.append(maps.VLMClip(source, video, n, times, size, crop, names, file))
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


def annotate_by_saliency(work: Work, groups) -> None:
    """Frame differences stand in for attention, before an even background."""
    for clip in itertools.chain.from_iterable(groups):
        grid = (len(clip.times), *clip.frames.shape[1:3])
        density = qwen.density_of(report.saliency(clip.frames, grid).contiguous())
        answers = [maps.Answer(name, "", density) for name in clip.names]
        background = maps.Answer("background", "", torch.ones_like(density))
        work.write(clip.file, *maps.map_file(clip, [*answers, background]))
        work.bar.update()


def annotate_by_shuffling(work: Work, pool: data.Pool, todo: dict[str, int], other: maps.Maps
                          ) -> None:
    """Copy maps from clip to clip of the same phenomena: right for the kind, wrong for the clip."""
    alike = defaultdict(list)  # {categories: rows}
    for row, categories in enumerate(pool.categories):
        alike[tuple(categories)].append(row)
    swap = {}  # {row: whose maps it gets}
    for rows in alike.values():
        order = stream(len(rows), "shuffle").permutation(rows)
        swap |= zip(order, np.roll(order, 1))
    for name, row in todo.items():
        found = other.of.get(pool.names[swap[row]])
        read = other.store.read(found[0][2]) if found else None
        if read:
            tensors, about = read
            work.write(clip_file(name, 0, 1), tensors, {**about, "file": pool.names[row]})
        work.bar.update()


# --- the command --------------------------------------------------------------------------------
def train_tiny(flags: Flags, cfg: Config) -> Flags:
    """--train_tiny: write the VLM. -> the flags with which it makes its maps. Raises UserError."""
    name = flags.annotate or "tiny_vlm"
    old = maps.world_maps(cfg, data.open_pool(cfg), name)
    if old.exists():
        raise UserError(f"{old} holds maps of another VLM: delete it, or give --annotate another "
                        "name.")
    tiny.make_tiny(Path(flags.vlm), cfg, flags.minutes, flags.steps)
    return dataclasses.replace(flags, annotate=name)


def main(argv: list[str]) -> None:
    """Check everything, load the VLM once, do what was asked for. Raises UserError and Stopped."""
    flags, cfg = parse(argv)
    if flags.train_tiny or not (flags.videos or flags.annotate):
        config.only_one_process()
    torch.set_num_threads(cores(cfg.threads))
    device = pick_device(cfg.device)

    # What needs no VLM.
    if flags.benchmark:
        return speed.benchmark(device)
    if flags.train_tiny:
        flags = train_tiny(flags, cfg)
    if flags.annotate and flags.kind != "vlm":
        return annotate_world(flags, cfg)

    # The VLM. It may take minutes to read, so the annotations are checked before.
    if not Path(flags.vlm).is_dir():
        raise UserError(f"There is no VLM in {flags.vlm}: give --vlm DIR, or make a tiny one with "
                        "--train_tiny.")
    folder = Folder(flags.videos, flags.annotations) if flags.videos else None
    dtype = torch.bfloat16 if pick_precision(flags.dtype, device) == "bf16" else torch.float32
    vlm = qwen.VLM.from_folder(flags.vlm, device, dtype)
    settings = vlm.settings(**vars(flags))

    # What needs one.
    if flags.videos:
        annotate_videos(flags, folder, vlm, settings)
    if flags.annotate:
        annotate_world(flags, cfg, vlm, settings)
    clips = report.held_out_clips(cfg, flags.clips) if flags.report or flags.preview else []
    if flags.report:
        report.print_report(vlm, settings, clips, flags.batch)
    if flags.preview:
        report.preview(Path(flags.preview), vlm, settings, clips[:3], flags.batch)


if __name__ == "__main__":
    config.entry(main, sys.argv[1:], ranks=True)

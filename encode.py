"""What a large video model is trained on, made once: latents and text embeddings of videos.

    python encode.py --videos DIR --annotations FILE --weights DIR --out CACHE [--shard 1/8]
    python encode.py --export RUN --out DIR

--export writes a run that trained an official backbone along in the layout of diffusers.

    videos   --VAE-->          latents     \\
    captions --TextEncoder-->  embeddings  --> CACHE

`train.py --weights DIR --cache CACHE` reads the cache.

Nothing of the method is here. The weights are a local folder in diffusers' layout (tokenizer/,
text_encoder/, vae/; a transformer/ only tells the lineage), read from safetensors alone.
official/encoders.py says in what the two lineages differ, official/cache.py what a cache holds.

A clip's file is named by a hash of the settings, the weights, the caption, the categories, and the
video's name, size and time of change. It is no hash of the video's bytes: to go on would mean to
read terabytes to learn that nothing has changed. The price is that a copy made without its times is
encoded again; it is never taken for something else. A run that was killed is started again, and
makes what is missing.
"""
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import config
from common.annotations import Folder
from common.files import shard_of
from common.run import pick_device, pick_precision
from common.store import Store
from common.video import Cut
from config import UserError, flag
from official.cache import CACHE, EMPTY, CacheRow, Encoder, settings_of
from official.export import export_run
from official.folder import Lineage, lineage_of


SIZES = ("frames", "fps", "height", "width")  # the lineage's own where they are not given


@dataclass(frozen=True)
class Flags:
    """The command line."""
    videos: str = ""  # folder of videos
    annotations: str = ""  # captions or a WISA list: .json, .jsonl, .csv; empty = the folder's
    weights: str = ""  # folder in diffusers' layout: tokenizer, text_encoder, vae
    out: str = ""  # folder of the cache; started again, it goes on where it was stopped
    export: str = ""  # run folder whose trained official backbone is written to --out, in diffusers' layout
    shard: str = ""  # i/n: every n-th video from the i-th on, a process each; empty = torchrun's
    frames: int | None = None  # frames a clip, 1 + 4 m; None = the lineage's
    fps: float | None = None  # frames a second; None = the lineage's
    height: int | None = None  # pixels, a multiple of 16; None = the lineage's
    width: int | None = None  # pixels, a multiple of 16; None = the lineage's
    windows: int = 4  # clips cut from one long video at most
    captions: str = flag("long", ("long", "short"))  # which one of a WISA record
    phys_law: bool = False  # captions are followed by the record's phys_law
    dtype: str = flag(  # of text encoder, CogVideoX's VAE and what is stored
        "auto", ("auto", "bf16", "fp32"))
    device: str = flag("auto", ("auto", "cuda", "mps", "cpu"))  # auto = cuda, else mps, else cpu
    tiled: bool = False  # VAE in tiles: less memory, slightly other latents
    text_batch: int = 8  # captions encoded at once

    def check(self) -> None:
        """Raises UserError with the first broken rule."""
        needed = ("out",) if self.export else ("videos", "weights", "out")
        for name in needed:
            if not getattr(self, name):
                raise UserError(f"The flag --{name} is required; --help lists every flag.")
        if self.export and self != Flags(export=self.export, out=self.out):
            raise UserError("--export takes --out alone: the other flags are for --videos.")
        shard_of(self.shard)
        for name in SIZES:
            if getattr(self, name) == 0:
                raise UserError(f"--{name} must be more than zero, not 0.")
        if self.frames and self.frames % 4 != 1:
            raise UserError(f"--frames must be 1 + 4 m (5, 9, ... 49, 81), not {self.frames}: the "
                            "VAE takes the first one alone and four at a time after it.")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side and side % 16:
                raise UserError(f"--{name} must be a multiple of 16, not {side}: 8 pixels are a "
                                "latent one, and 2 of those a token.")


def main(argv: list[str]) -> None:
    """Check everything, then encode or export. Raises UserError and Stopped."""
    flags = config.parse_flags(Flags, argv, "Turn a folder of videos into latents and text "
                                            "embeddings, for training.")
    if flags.export:
        config.only_one_process()
        export_run(Path(flags.export), Path(flags.out))
        print(f"wrote {flags.out}")
        return
    lineage = lineage_of(Path(flags.weights))
    sizes = {name: getattr(flags, name) or getattr(lineage.preset, name) for name in SIZES}
    flags = dataclasses.replace(flags, **sizes)
    if lineage.name == "cogvideox" and flags.frames % 8 != 1:
        print(f"CogVideoX's VAE gives {flags.frames + 3} frames back for {flags.frames}; of "
              "1 + 8 m it gives as many.", file=sys.stderr)
    encode_folder(flags, lineage)


def encode_folder(flags: Flags, lineage: Lineage) -> None:
    """See what is there, encode what is not, list it. Raises UserError and Stopped."""
    # The videos, how they are cut, and where the cache stands.
    weights = Path(flags.weights)
    device = pick_device(flags.device)
    dtype = torch.bfloat16 if pick_precision(flags.dtype, device) == "bf16" else torch.float32
    folder = Folder(flags.videos, flags.annotations, flags.captions, flags.phys_law)
    cut = Cut(flags.frames, flags.fps, flags.windows, flags.height, flags.width)
    first, shards = shard_of(flags.shard)
    settings = settings_of(flags, lineage, weights, dtype)
    encoder = None
    if not (Path(flags.out) / CACHE.manifest).exists():  # bad weights must leave no folder behind
        encoder = Encoder(weights, device, dtype, flags.tiled, flags.text_batch)
    made = cut_captions = 0
    with Store.create(flags.out, CACHE, settings, (first, shards)) as store:
        # What is there.
        videos = {store.name(video.identity()): video for video in folder.videos.values()}
        mine = list(videos)[first::shards]
        missing, have = store.missing(mine)
        has_empty = store.is_sound(store.folder / EMPTY)

        # What is not: the weights are read only if something is missing.
        if missing or not has_empty:
            encoder = encoder or Encoder(weights, device, dtype, flags.tiled, flags.text_batch)
            encoder.store = store
            if not has_empty:
                encoder.write_empty()
            todo = {name: videos[name] for name in missing}
            with tqdm(total=len(mine), initial=len(mine) - len(missing),
                      desc="encoding", unit="video") as bar:
                encoder.write_videos(folder, todo, have, cut, bar)
            made, cut_captions = encoder.made, encoder.cut_captions
        # What was listed before need not be read again: a file's name tells the video's state.
        known = {file: row.content for file, row in store.listed().items()}
        index = store.write_index(videos, lambda file, video: CacheRow(
            file, video.name, video.caption, video.categories, known.get(file) or video.content))

    # What came of it.
    skipped = folder.skipped_sentence()
    if not index["clips"]:
        raise UserError(f"No clip could be made from {flags.videos}"
                        f"{skipped or '; the annotations name no video'}.")
    too_long = ""
    if cut_captions:
        too_long = f"; {cut_captions} captions have more than {lineage.preset.text_len} tokens and are cut"
    print(f"{made} clips made, {len(have)} were there; {store.folder} holds "
          f"{len(index['clips'])} from {index['done']} of {index['videos']} videos"
          f"{too_long}{skipped}{folder.unknown_labels()}")


if __name__ == "__main__":
    config.entry(main, sys.argv[1:], ranks=True)

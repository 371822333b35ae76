"""What stands around a large video model: text encoder and VAE, from libraries, and a cache of what they say.

    prompt  --TextEncoder-->  (L, D_text)        pixels  --VAE.encode-->  latent  --VAE.decode-->  pixels

    python encode.py --videos DIR --annotations FILE --weights DIR --out CACHE [--shard 1/8]

Nothing of the method is here. The weights are a local folder in diffusers' layout (tokenizer/, text_encoder/, vae/; a
transformer/ only tells the lineage), read from safetensors alone. transformers and diffusers are imported when needed.

The two lineages differ in ways that no error message tells of:
*CogVideoX.* T5 reads 226 tokens **without** a mask: pads are read like words, and their rows are kept, because the
official model was trained so. Its VAE works through time in chunks of 8 frames (the first one longer), and GroupNorm
takes its statistics over a chunk: the chunk size is part of the model. Its latent is drawn: mean and std are kept.
*Wan.* umT5 reads 512 tokens **with** a mask; rows past the caption's end are zero. Text is cleaned first. The VAE norms
each position by itself, so its chunks are exact. The latent is the mean, normed a channel; the VAE runs in float32.

The cache is a folder: cache.json (settings, and a hash of them), empty.safetensors (the text embedding of "", for
captions that are dropped), clips/KEY-NofM.safetensors (window N of M of a video), index.json (what a reader lists, so
that it opens no clip). KEY is a hash of the settings, the weights, the caption, the categories, and the video's name,
size and time of change. Not of its bytes: a resume would read terabytes to learn that nothing has changed. The price: a
copy made without its times is encoded again; it is never taken for something else.
A file is written under another name and renamed, so that it is whole or absent: a killed run is just started again.

Letters: B clips, F H W frames and pixels, f h w the latent grid, C its channels, L text tokens.
"""
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import config
from common.files import cores, shard_of
from common.run import pick_device
from common.store import Store
from common.video import Cut, Folder
from config import Stopped, UserError
from official.cache import CACHE, EMPTY, CacheRow, Encoder, settings_of
from official.encoders import VAE, TextEncoder
from official.folder import lineage_of


# ---------------------------------------------------------------------------------------------------------------- cache
def parse(argv: list[str]):
    parser = config.Parser("Turn a folder of videos into latents and text embeddings, once, for training.")
    add = parser.add_argument
    add("--videos", required=True, help="folder of videos")
    add("--annotations", default="", help="captions.json or a WISA list; empty = the folder's captions.json")
    add("--weights", required=True, help="folder in diffusers' layout: tokenizer, text_encoder, vae")
    add("--out", required=True, help="folder of the cache; started again, it goes on where it was stopped")
    add("--shard", default="1/1", help="i/n: encode every n-th video from the i-th on; one process a shard")
    add("--frames", type=int, help="frames a clip, 1 + 4 m; None = the lineage's")
    add("--fps", type=float, help="frames a second; None = the lineage's")
    add("--height", type=int, help="pixels, a multiple of 16; None = the lineage's")
    add("--width", type=int, help="pixels, a multiple of 16; None = the lineage's")
    add("--windows", type=int, default=4, help="clips cut from one long video at most")
    add("--captions", default="long", choices=("long", "short"), help="which one of a WISA record")
    add("--phys_law", action="store_true", help="captions are followed by the record's phys_law")
    add("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the text encoder, CogVideoX's VAE, and what is stored; auto = bf16 on cuda, else fp32")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto = cuda, else mps, else cpu")
    add("--tiled", action="store_true", help="VAE in tiles: less memory, slightly other latents")
    add("--text_batch", type=int, default=8, help="captions encoded at once")
    return parser.parse_args(argv)


def check(args) -> tuple[int, int]:
    """Raises UserError with the first broken rule; returns the shard as (i from 0, n)."""
    for name in ("frames", "fps", "height", "width", "windows", "text_batch"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be more than zero, not {getattr(args, name)}.")
    if args.frames % 4 != 1:
        raise UserError(f"--frames must be 1 + 4 m (5, 9, ... 49, 81), not {args.frames}: the VAE takes the first one "
                        "alone and four at a time after it.")
    for name in ("height", "width"):
        if getattr(args, name) % 16:
            raise UserError(f"--{name} must be a multiple of 16, not {getattr(args, name)}: 8 pixels are a latent one, "
                            "and 2 of those a token.")
    return shard_of(args.shard)


def main(argv: list[str]) -> None:
    """Check everything, see what is there, encode what is not, list it. Raises UserError and Stopped."""
    args = parse(argv)
    weights = Path(args.weights)
    lineage = lineage_of(weights)
    for name in ("frames", "fps", "height", "width"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(lineage, name))
    shard, device = check(args), pick_device(args.device)
    if lineage.name == "cogvideox" and args.frames % 8 != 1:
        print(f"CogVideoX's VAE gives {args.frames + 3} frames back for {args.frames}; of 1 + 8 m it gives as many.",
              file=sys.stderr)
    bf16 = args.dtype == "bf16" or args.dtype == "auto" and device == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    folder = Folder(args.videos, args.annotations, args.captions, args.phys_law)
    cut = Cut(args.frames, args.fps, args.windows, args.height, args.width)
    threads = min(4, cores(0))  # each reads ahead a video's clips, a hundred megabytes apiece
    store = Store.create(args.out, CACHE, settings_of(args, lineage, weights, dtype), shard)
    made, cut_captions = 0, 0
    try:
        # --- what is there
        videos = {store.name(video.identity()): video for video in folder.videos.values()}
        mine = list(videos)[shard[0]::shard[1]]
        missing, have = store.missing(mine)
        has_empty = store.is_sound(store.folder / EMPTY)

        # --- what is not
        if missing or not has_empty:
            text, vae = TextEncoder(weights, device, dtype), VAE(weights, device, dtype, args.tiled)
            encoder = Encoder(store, text, vae, dtype, args.text_batch)
            if not has_empty:
                encoder.write_empty()
            todo = {name: videos[name] for name in missing}
            with tqdm(total=len(mine), initial=len(mine) - len(todo), desc="encoding",
                      unit="video") as bar:
                encoder.write_videos(folder, todo, have, cut, threads, bar)
            made, cut_captions = encoder.made, encoder.cut_captions
        index = store.write_index(videos, lambda file, video: CacheRow(
            file, video.name, video.caption, video.categories))
    except OSError as e:
        raise Stopped(f"{e.filename or store.folder} cannot be read or written any more: "
                      f"{e.strerror or e}.") from None

    # --- what came of it
    skipped = folder.skipped_sentence()
    if not index["clips"]:
        reason = skipped or "; the annotations name no video"
        raise UserError(f"No clip could be made from {args.videos}{reason}.")
    too_long = ""
    if cut_captions:
        too_long = f"; {cut_captions} captions have more than {lineage.text_len} tokens and are cut"
    print(f"{made} clips made, {len(have)} were there; {store.folder} holds {len(index['clips'])} from "
          f"{index['done']} of {index['videos']} videos{too_long}{skipped}{folder.unknown_labels()}")


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])

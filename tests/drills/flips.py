"""Harm every kind of file that a run reads back, and see whether anything is read as something else.

    python tests/drills/flips.py                    200 flipped bits and 50 cuts of each kind (two minutes)
    python tests/drills/flips.py --flips 20 --cuts 5 --kind checkpoint

A bit is flipped, or the file is cut, at a random place; then the file is read as the programs read it.

noticed     it was refused by a sentence, passed over or built anew: never used
harmless    what was read is what was written, to the bit: the bit says nothing
other       something else was read, without a word
traceback   the reader ended by an error that is no sentence

One line a kind. Exit code 1 when anything was read as something else, or ended in a traceback.
"""
import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common.checkpoints  # noqa: E402
import common.run  # noqa: E402
import config  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import official.branch  # noqa: E402
import runs  # noqa: E402
import sample  # noqa: E402
from common.files import sealed, write_text  # noqa: E402
from common.pool import Pool  # noqa: E402
from common.store import Store  # noqa: E402
from config import Stopped, UserError  # noqa: E402
from helpers import tiny_official, trained_branch  # noqa: E402
from official.cache import CACHE, EMPTY, CacheRow  # noqa: E402
from vlm.maps import MAPS, MapRow  # noqa: E402

SEAL = re.compile("[0-9a-f]{16}")
OUTCOMES = ("noticed", "harmless", "other", "traceback")


# --- what is harmed, and how it is read -------------------------------------------------------------------
def of_runs(folder: Path) -> dict:
    """{kind: (file, read)} of a run folder and its pool. `read` raises a sentence, returns None where the
    file is passed over, or what it says."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = runs.launch(folder / "run", folder / "pools", save_every=3, preview_every=0)
    checkpoints = run / "checkpoints"
    newest = sorted(checkpoints.glob("step*.pt"))[-1]
    cfg = runs.settings(folder / "other", folder / "pools", init_from=str(run))
    pool = data.open_pool(cfg, progress=False).path
    size = cfg.frames, cfg.height, cfg.width

    def newest_checkpoint():
        stored = common.checkpoints.load_newest(checkpoints, torch.device("cpu"))
        return stored if f"step{stored['step']:06d}.pt" == newest.name else None

    def clips():
        opened = Pool.open(pool, size)
        rows = list(range(len(opened.captions))) if opened else []
        return opened and (opened.clips(rows), np.array(opened.masks), vars(opened) | {"unread": 0})

    def settings():
        return config.load(run / "config.json"), unsealed(common.run.description(run))

    def log():
        common.run.Log(run / "log.jsonl", 10**6)
        kept = [unsealed(json.loads(line)) for line in (run / "log.jsonl").read_text().splitlines()]
        return kept if len(kept) >= lines or not all(entry in entries for entry in kept) else None

    entries = [unsealed(json.loads(line)) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = len(entries)
    write_text(run / "evaluation.json", json.dumps(sealed({"laws": {"rows": {"noise": {"se": .25}}}})))
    return {
        "checkpoint": (newest, newest_checkpoint),
        "best.pt": (checkpoints / "best.pt", lambda: state_of(sample.load_run(run))),
        "base.pt": (checkpoints / "base.pt", lambda: common.checkpoints.averaged_base(cfg, torch.device("cpu"))),
        "pool, pixels": (pool / "video.u8", clips),
        "pool, masks": (pool / "masks.u8", clips),
        "pool, meta.json": (pool / "meta.json", clips),
        "tokenizer.json": (run / "tokenizer.json", lambda: data.Tokenizer.load(run / "tokenizer.json").words),
        "config.json": (run / "config.json", settings),
        "log.jsonl": (run / "log.jsonl", log),
        "evaluation.json": (run / "evaluation.json",
                            lambda: evaluate.read_stored(run / "evaluation.json") or None),
    }


def unsealed(said: dict) -> dict:
    """What a file says, but for the digest: where a bit of the word "digest" was flipped, that is an entry
    of another name, which nobody asks for."""
    return {name: value for name, value in said.items() if len(name) != 6 or not SEAL.fullmatch(str(value))}


def state_of(loaded) -> tuple:
    cfg, model, _, tokenizer, info = loaded
    return cfg, model.state_dict(), tokenizer.words, info


def of_stores(folder: Path) -> dict:
    """The same of a cache of latents, and of maps."""
    found = {}
    rng = torch.Generator().manual_seed(0)
    row = {"cache": CacheRow("", "a.mp4", "a red ball falls", [3]), "maps": MapRow("", "a.mp4", 0.0, 1.5)}
    for name, kind in (("cache", CACHE), ("maps", MAPS)):
        with Store.create(folder / name, kind, {"fps": 8, "height": 32}) as store:
            file = f"{store.name(['a.mp4'])}-0of1.safetensors"
            tensors = {"mean": torch.randn(4, 3, 2, 2, generator=rng),
                       "text": torch.randn(3, 8, generator=rng)}
            about = {"caption": "a red ball falls", "times": [0.0, 1.5], "crop": [0, 0, 8, 8],
                     "text_length": 3}
            store.write(store.clips / file, tensors, about)
            store.write(store.folder / EMPTY, {"text": torch.randn(2, 8, generator=rng)}, {"text_length": 0})
            store.write_index({store.name(["a.mp4"]): None}, lambda file, _: row[name]._replace(file=file))

        def open_store(folder=folder / name, kind=kind):
            store = Store.open(folder, kind)
            return store.settings, store.key, store.rows, store.total, store.done

        def open_clip(file=file, folder=folder / name, kind=kind):
            found = Store.open(folder, kind).read(file)
            return found and (found[0], unsealed(found[1]))

        found[f"{name}, a clip"] = store.clips / file, open_clip
        found[f"{name}, {kind.manifest}"] = store.folder / kind.manifest, open_store
        found[f"{name}, index.json"] = store.folder / "index.json", open_store

    def empty():
        try:
            tensors, about = Store.open(folder / "cache", CACHE).load(folder / "cache" / EMPTY)
            return tensors, unsealed(about)
        except (OSError, ValueError):  # of which official/cache.py makes its sentence
            return None

    return {**found, "cache, empty caption": (folder / "cache" / EMPTY, empty)}


def of_branches(folder: Path) -> dict:
    """The same of a published branch."""
    from tiny_weights import make_weights  # which needs diffusers
    weights = make_weights(folder / "weights", "wan")
    trained_branch(tiny_official("wan", weights=str(weights), cache="none", out_dir=str(folder / "branch")))
    path = folder / "branch" / "branch.safetensors"
    return {"branch.safetensors": (path, lambda: official.branch.read_branch(path, weights))}


def kinds_in(folder: Path) -> dict:
    return {**of_runs(folder), **of_stores(folder), **of_branches(folder)}


# --- the harm ---------------------------------------------------------------------------------------------
def harmed(raw: bytes, moments: random.Random, cut: bool) -> bytes:
    """The file with one bit flipped, or cut short."""
    at = moments.randrange(len(raw))
    return raw[:at] if cut else raw[:at] + bytes([raw[at] ^ 1 << moments.randrange(8)]) + raw[at + 1:]


def same(a, b) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return not runs.differences(a, b)


def outcome(read, written) -> str:
    """What comes of reading, where `written` was read before."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            found = read()
    except (UserError, Stopped) as e:
        return "noticed" if "\n" not in str(e) else "traceback"
    except Exception:
        return "traceback"
    return "noticed" if found is None else "harmless" if same(found, written) else "other"


def drill(path: Path, read, flips: int, cuts: int, moments: random.Random) -> Counter:
    """How often what came of harming a file. It is whole again afterwards, as are those beside it."""
    beside = {each: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
    written = read()
    tally = Counter()
    for number in range(flips + cuts):
        for each, raw in beside.items():
            if not each.exists() or each.read_bytes() != raw:
                each.write_bytes(raw)
        path.write_bytes(harmed(beside[path], moments, cut=number >= flips))
        tally[outcome(read, written)] += 1
    path.write_bytes(beside[path])
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--kind", default="", help="those that begin so")
    parser.add_argument("--seed", type=int, default=None, help="without it the places are others each time")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="flips-"))
    torch.set_num_threads(1)
    runs.without_previews(type("Patch", (), {"setattr": staticmethod(setattr)}))

    print(f"places from seed {seed}", flush=True)
    total = Counter()
    for kind, (path, read) in kinds_in(folder).items():
        if kind.startswith(args.kind):
            size = os.path.getsize(path)
            tally = drill(path, read, args.flips, args.cuts, random.Random(f"{seed} {kind}"))
            total += tally
            print(f"{kind:22} {size:9,} bytes: " + line(tally), flush=True)
    shutil.rmtree(folder)
    print(f"{'all':38}: " + line(total))
    return int(bool(total["other"] or total["traceback"]))


def line(tally: Counter) -> str:
    return ", ".join(f"{tally[name]:3} {name}" for name in OUTCOMES)


if __name__ == "__main__":
    sys.exit(main())

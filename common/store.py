"""A folder of safetensors files that one command writes, a file a clip, and another one reads.

    MANIFEST.json                    all settings that shape the files, and a hash of them, the key
    clips/NAME-NofM.safetensors      clip N of the M clips that one item gave
    index.json                       what a reader lists, so that it opens no clip

An item is what clips are made of: a video, or a clip of the physics world. NAME is a hash of the
key and of all that identifies the item. So a file that is there is the right one: a run that was
killed is started again and makes what is missing, and several processes can share the work.

Every file is written whole or not at all, and holds the key and checksums. A reader leaves a
damaged file out, which is said once, and refuses a *stale* one, whose key is another.

Whoever writes holds a lock on the folder. Several shards hold it together, if their settings agree.
"""
import collections
import contextlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from common.files import (
    digest, handle_of, is_intact, lock, read_json, sealed, take, whole_file, write_text)
from config import Stopped, UserError

CLIP_FILE = re.compile(r"([0-9a-f]{24})-(\d+)of(\d+)\.safetensors")  # NAME, N and M


# --- one file -----------------------------------------------------------------------------------
def checksum(tensors: dict[str, Tensor]) -> int:
    """Of the tensors' bytes. safetensors itself notices a file that is cut short, but not a block
    that a bad disk gives back as zeros."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), total)
    return total


def shapes_of(tensors: dict[str, Tensor]) -> dict:
    """Their names and shapes, as a digest includes them."""
    return {"shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}}


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict, tag: str) -> None:
    """A safetensors file with `about` in its header: whole or absent, and the same bytes for the
    same contents. Until it is whole its name ends in TAG.part. Raises OSError."""
    about = {**about, "checksum": checksum(tensors)}
    digest = sealed(about | shapes_of(tensors))["digest"]  # of what the header says elsewhere, too
    header = json.dumps(about | {"digest": digest}, sort_keys=True)
    with whole_file(path, tag) as part:
        part.write_bytes(safetensors.torch.save(tensors, {"about": header}))


def read_about(path: Path) -> dict:
    """What the header says. Raises ValueError with the reason where the file is missing or damaged,
    OSError where the disk cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            intact = is_intact(about | {"shapes": shapes})
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as e:
        reason = "cut short" if "ncomplete" in str(e) else "no safetensors file of encode.py"
        raise ValueError(reason) from None
    if not intact:
        raise ValueError("the checksum of its header is another")
    return about


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What write_tensors wrote: the tensors, checked, and `about`. Raises as read_about."""
    about = read_about(path)
    tensors = safetensors.torch.load_file(path)
    if checksum(tensors) != about.get("checksum"):
        raise ValueError("its checksum is another")
    return tensors, about


# --- a folder of them ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """What tells one kind of store from another."""
    manifest: str  # name of the file with the settings
    command: str  # who writes it
    row: type  # NamedTuple of what index.json says of a file, which is its first field


class Store:
    """One folder, opened by `create` to write to it or by `open` to read from it."""

    def __init__(self, folder: Path, kind: Kind, settings: dict, tag: str = ""):
        self.folder = folder
        self.clips = folder / "clips"
        self.kind = kind
        self.settings = settings
        self.key = digest(settings)
        self.tag = tag  # ends the names of this shard's unfinished files
        self.rows: list = []  # of index.json, once it is read: a `kind.row` a file
        self.total = self.done = 0  # items, and how many of them have a file
        self.damaged: set[Path] = set()  # files that were left out

    # --- writing
    @classmethod
    @contextlib.contextmanager
    def create(cls, folder, kind: Kind, settings: dict, shard: tuple[int, int] = (0, 1)
               ) -> Iterator["Store"]:
        """Makes the folder, or goes on with it, and holds its lock while the block lasts.

        Raises UserError where it is of other settings, or another process makes the same shard;
        Stopped where the block can no longer read or write.
        """
        first, shards = shard
        store = cls(Path(folder), kind, settings, f"{first + 1}of{shards}")
        with contextlib.ExitStack() as locks:
            try:
                store.hold(locks)
            except OSError as e:
                raise UserError(f"--out {folder} cannot hold a cache: {e.strerror or e}.") from None
            try:
                yield store
            except OSError as e:
                raise Stopped(f"{e.filename or store.folder} cannot be read or written any more: "
                              f"{e.strerror or e}.") from None

    def hold(self, locks: contextlib.ExitStack) -> None:
        """The locks on shard and folder, then the manifest. Raises UserError and OSError."""
        self.clips.mkdir(parents=True, exist_ok=True)
        # The shard's file is gone afterwards; that of a killed process is taken over.
        own = self.folder / f"{self.tag}.lock"
        own.touch()
        shard = self.tag.replace("of", "/")
        locks.enter_context(lock(own, f"Another process makes shard {shard} of {self.folder}: wait "
                                      "until it ends, or give another --out."))
        locks.callback(own.unlink, missing_ok=True)
        for leftover in self.folder.rglob(f"*.{self.tag}.part"):  # of this shard's killed run
            leftover.unlink()

        # Who is alone may begin with other settings, as long as there is no clip.
        handle = locks.enter_context(handle_of(self.folder))
        alone = take(handle) is not False
        manifest = self.folder / self.kind.manifest
        if alone and not (manifest.exists() and any(self.clips.iterdir())):
            self.write_json(manifest.name, {"key": self.key, "settings": self.settings})
        # Between the two locks another process may have been alone, so the manifest is read in any
        # case. It stays as it is while anybody holds the folder.
        take(handle, shared=True, wait=True)
        old = read_json(manifest).get("settings") or {}
        changed = [f"{field} {old.get(field)!r}, now {value!r}"
                   for field, value in self.settings.items() if old.get(field) != value]
        if changed:
            raise UserError(f"{self.folder} holds clips of other settings ({'; '.join(changed)}): "
                            "give another --out.")

    def listed(self) -> dict:
        """{file: its row} of the index.json that is there; none where it is missing or damaged."""
        try:
            index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
            rows = [self.kind.row(*row) for row in index["clips"]] if is_intact(index) else []
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            rows = []
        return {row.file: row for row in rows}

    def write_json(self, name: str, value) -> None:
        write_text(self.folder / name, json.dumps(value), self.tag)

    def write(self, path: Path, tensors: dict[str, Tensor], about: dict) -> None:
        """One file of this store; the key joins what its header says. Raises OSError."""
        write_tensors(path, tensors, {**about, "key": self.key}, self.tag)

    def name(self, identity: list) -> str:
        """NAME of an item: what its files begin with. identity: what tells it from all others."""
        return digest([self.key, *identity])[:24]

    def files_there(self) -> dict[str, list[str]]:
        """{NAME: its files, in order}, from the names of the files alone."""
        matches = (CLIP_FILE.fullmatch(file) for file in os.listdir(self.clips))
        found = collections.defaultdict(list)
        for match in sorted(filter(None, matches), key=lambda match: (int(match[2]), match[0])):
            found[match[1]].append(match[0])
        return found

    def is_sound(self, path: Path) -> bool:
        """Is there a whole file of these settings? Its tensors are not read."""
        try:
            return read_about(path)["key"] == self.key
        except (OSError, ValueError, KeyError):
            return False

    def missing(self, names: list[str]) -> tuple[list[str], set[str]]:
        """Which of these NAMEs lack a file, and which of their files are there and sound."""
        there = self.files_there()
        lacking = []
        sound = set()
        for name in names:
            files = [file for file in there[name] if self.is_sound(self.clips / file)]
            sound.update(files)
            if not files or len(files) != int(CLIP_FILE.fullmatch(files[0])[3]):
                lacking.append(name)
        return lacking, sound

    def write_index(self, items: dict[str, object], row: Callable) -> dict:
        """Write index.json over the clips of all shards that are there, and return it.

        items: {NAME: item} of all shards. row(file, item): what is listed of a file.
        """
        index = None
        while True:
            before = index
            there = self.files_there()
            rows = [row(file, item) for name, item in items.items() for file in there.get(name, ())]
            done = sum(name in there for name in items)
            index = {"key": self.key, "videos": len(items), "done": done, "clips": rows}
            # Several shards may end together. The one that writes last looks again afterwards, so
            # what stays lacks nothing that was there by then.
            if index == before:
                return index
            self.write_json("index.json", sealed(index))

    # --- reading
    @classmethod
    def open(cls, folder, kind: Kind) -> "Store":
        """A store that its command has gone through, with its rows. Opens no clip.

        Raises UserError where files are missing, damaged, or of other settings.
        """
        folder = Path(folder)
        try:
            stored, index = (json.loads((folder / name).read_text(encoding="utf-8"))
                             for name in (kind.manifest, "index.json"))
            store = cls(folder, kind, stored["settings"])
            store.rows = [kind.row(*row) for row in index["clips"]]
            store.total = index.get("videos", 0)
            store.done = index.get("done", 0)
            stale = index["key"] != store.key
            if stored["key"] != store.key or not is_intact(index) or not all(map(fits, store.rows)):
                raise ValueError
        except FileNotFoundError as e:
            raise UserError(f"There is no {e.filename}: {kind.command} makes it, once it has gone "
                            "through.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{folder} is not what {kind.command} left there: its {kind.manifest} "
                            "or index.json is damaged.") from None
        if stale:
            raise UserError(f"{folder} is stale: its index.json is of other settings than its "
                            f"{kind.manifest}; run {kind.command} again.")
        return store

    def load(self, path: Path) -> tuple[dict[str, Tensor], dict]:
        """The tensors of a file and what its header says.

        Raises ValueError or OSError where it is damaged, UserError where it is stale.
        """
        tensors, about = read_tensors(path)
        if about["key"] != self.key:
            raise UserError(f"{path} is stale, made with other settings than {self.kind.manifest} "
                            f"beside it says: delete it and run {self.kind.command} again.")
        return tensors, about

    def read(self, file: str) -> tuple[dict[str, Tensor], dict] | None:
        """As `load`, of a clip's file; None where it is damaged, which is said once."""
        path = self.clips / file
        if path in self.damaged:
            return None
        try:
            return self.load(path)
        except (OSError, ValueError) as e:
            self.damaged.add(path)
            reason = getattr(e, "strerror", None) or e
            tqdm.write(f"{path} is left out ({reason}); delete it and run {self.kind.command} "
                       "again to mend it.", file=sys.stderr)
            return None


def clip_file(name: str, number: int, taken: int) -> str:
    """The name of the file of an item's clip `number` of `taken`."""
    return f"{name}-{number}of{taken}.safetensors"


def fits(row) -> bool:
    """Has every field of a NamedTuple the type that its class promises?"""
    kinds = type(row).__annotations__.values()
    return all(isinstance(value, kind) for value, kind in zip(row, kinds))

"""Files on disk: written whole or not at all, checked when read, one writer at a time."""
import contextlib
import importlib
import json
import os
import re
import zlib
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from common.files import digest, read_json, whole_file, write_text
from config import UserError


def checksum(tensors: dict[str, Tensor]) -> int:
    """Of the tensors' bytes: safetensors notices a file cut short, but not a block that came back as zeros."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), total)
    return total


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict, tag: str) -> None:
    """A safetensors file with `about` in its header: whole or absent, and the same bytes for the same contents. Until
    it is whole its name ends in tag.part."""
    header = json.dumps({**about, "checksum": checksum(tensors)}, sort_keys=True)
    with whole_file(path, tag) as part:
        part.write_bytes(safetensors.torch.save(tensors, {"about": header}))


def read_about(path: Path) -> dict:
    """What the header says. Raises ValueError with the reason for a damaged or missing file, OSError without a disk."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["about"])
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (safetensors.SafetensorError, KeyError, ValueError) as e:
        raise ValueError("cut short" if "ncomplete" in str(e) else "no safetensors file of encode.py") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What write_tensors wrote, checked. Raises as read_about."""
    about = read_about(path)
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if checksum(tensors) != about.get("checksum"):
        raise ValueError("its checksum is another")
    return tensors, about


def library(name: str):
    """The module of an extra package, or UserError with what to install."""
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"Official weights need {name}, which cannot be imported ({e}): pip install -r "
                        "requirements-extra.txt.") from None
    if name in ("transformers", "diffusers"):  # their remarks and bars are not ours; their errors stay
        logging = importlib.import_module(f"{name}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return module


@contextlib.contextmanager
def one_sentence(folder: Path):
    """Whatever a library raises over the files in a folder, as a UserError."""
    try:
        yield
    except Exception as e:
        said = " ".join((str(e) or type(e).__name__).split())
        raise UserError(f"{folder} cannot be loaded: {said[:300].rstrip('.!')}.") from None


class Store:
    """The cache's folder, as one shard writes it."""
    manifest = "cache.json"

    def __init__(self, out: Path, settings: dict, tag: str):
        """Makes the folder; UserError where it is of other settings. tag: ends the names of the shard's unfinished
        files."""
        self.out, self.clips, self.key, self.tag = out, out / "clips", digest(settings), tag
        try:
            self.clips.mkdir(parents=True, exist_ok=True)
            for folder in (self.out, self.clips):
                for leftover in folder.glob(f"*.{tag}.part"):  # of this shard's run that was killed
                    leftover.unlink()
            if (out / self.manifest).exists() and any(self.clips.iterdir()):
                self.compare(read_json(out / self.manifest).get("settings") or {}, settings)
            else:
                self.write_json(self.manifest, {"key": self.key, "settings": settings})
        except OSError as e:
            raise UserError(f"--out {out} cannot hold a cache: {e.strerror or e}.") from None

    def compare(self, old: dict, new: dict) -> None:
        other = [f"{field} {old.get(field)!r}, now {new[field]!r}" for field in new if old.get(field) != new[field]]
        if other:
            raise UserError(f"{self.out} holds clips of other settings ({'; '.join(other)}): give another --out.")

    def write_json(self, name: str, value) -> None:
        write_text(self.out / name, json.dumps(value), self.tag)

    def name(self, video) -> str:
        """What the files of a video's clips begin with."""
        stat = os.stat(video.path)
        return digest([self.key, video.name, stat.st_size, stat.st_mtime_ns, video.caption, video.categories])[:24]

    def there(self) -> dict[str, list[str]]:
        """{name of a video: its clips' files, in order}, from the names alone."""
        found = {}
        for file in os.listdir(self.clips):
            if match := re.fullmatch(r"([0-9a-f]{24})-(\d+)of(\d+)\.safetensors", file):
                found.setdefault(match[1], []).append((int(match[2]), file))
        return {name: [file for _, file in sorted(files)] for name, files in found.items()}

    def sound(self, path: Path) -> bool:
        """Is there a whole file of these settings?"""
        try:
            return read_about(path)["key"] == self.key
        except (OSError, ValueError, KeyError):
            return False

    def row(self, file: str, video) -> tuple:
        """What index.json says of a clip's file."""
        return file, video.name, video.caption, video.categories

    def write_index(self, videos: list, names: list[str]) -> dict:
        """index.json over all shards' clips that are there. Shards that end together: the one that writes last looks
        again afterwards, so nothing that was there by then is missing from what stays."""
        def look():
            there = self.there()
            rows = [self.row(file, video) for video, name in zip(videos, names) for file in there.get(name, ())]
            done = sum(name in there for name in names)
            return {"key": self.key, "videos": len(videos), "done": done, "clips": rows}

        index = None
        while index != (index := look()):
            self.write_json("index.json", index)
        return index



"""Files on disk: written whole or not at all, checked when read, one writer at a time."""
import collections
import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm
from config import Config, UserError


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[bool]:
    """One process at a time builds in `folder`; a killed one's lock vanishes with it. False where locks are unknown."""
    handle, locked = None, False
    try:
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another run is building clips in {folder}; waiting for it.", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        locked = True
    except (ImportError, OSError):  # Windows, some network drives: builds have folders of their own, so work is doubled
        pass
    try:
        yield locked
    finally:
        if handle is not None:
            os.close(handle)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cores(cfg: Config) -> int:
    return cfg.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def bar(items: Iterable, what: str, total: int, unit: str, progress: bool) -> Iterable:
    return tqdm(items, what, total, unit=unit, disable=not progress, leave=False)


def ahead(executor: concurrent.futures.Executor, function, items: list, group: int, chunksize: int = 1) -> Iterator:
    """executor.map in order, but never more than two groups under way: undelivered clips would fill the memory."""
    waiting = collections.deque()
    for start in range(0, len(items), group):
        waiting.append(executor.map(function, items[start:start + group], chunksize=chunksize))
        if len(waiting) == 2:
            yield from waiting.popleft()
    for results in waiting:
        yield from results


def listed(items: Iterable[str], most: int = 8) -> str:
    items = [item.encode("utf-8", "replace").decode() for item in items]  # JSON may hold what no terminal prints
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


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
    part = path.with_name(f"{path.name}.{tag}.part")
    try:
        with open(part, "wb") as file:
            file.write(safetensors.torch.save(tensors, {"about": header}))
            file.flush()
            os.fsync(file.fileno())  # the name must not survive a power cut that the bytes do not
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: a folder in diffusers' layout is expected, with tokenizer, text_encoder "
                        "and vae in it.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({getattr(e, 'strerror', None) or 'it is not JSON'}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.")
    return value


@contextlib.contextmanager
def one_sentence(folder: Path):
    """Whatever a library raises over the files in a folder, as a UserError."""
    try:
        yield
    except Exception as e:
        said = " ".join((str(e) or type(e).__name__).split())
        raise UserError(f"{folder} cannot be loaded: {said[:300].rstrip('.!')}.") from None


def shard_of(text: str) -> tuple[int, int]:
    """"i/n" -> (i from 0, n). Raises UserError."""
    shard = re.fullmatch(r"(\d+)/(\d+)", text)
    if not shard or not 1 <= int(shard[1]) <= int(shard[2]):
        raise UserError(f"--shard is i/n with i from 1 to n, such as 1/8, not {text!r}.")
    return int(shard[1]) - 1, int(shard[2])


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
        part = self.out / f"{name}.{self.tag}.part"
        part.write_text(json.dumps(value), encoding="utf-8")
        os.replace(part, self.out / name)

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


def complete(files: list[str]) -> bool:
    """Do the names of a video's clips say that none is missing?"""
    return bool(files) and len(files) == int(re.search(r"of(\d+)\.", files[0])[1])

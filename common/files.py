"""Plain files: written whole or not at all, read with one sentence when they are broken, one writer at a time. No torch.

Whoever looks at a path finds the old file or the new one, never half of one, also after a power cut: `whole_file` is
the only place where this project gives a file its name.
"""
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from config import Config, UserError


@contextlib.contextmanager
def whole_file(path, tag: str = "") -> Iterator[Path]:
    """A path beside `path` to write to. It becomes `path` when the block ends without an error, and goes otherwise.

    tag: ends the temporary name, NAME.TAG.part (this process's number if empty), so that a writer knows its own
    leftovers after it was killed.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{tag or os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # the name must not survive a power cut that the bytes do not
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text: str, tag: str = "") -> None:
    """A text file in UTF-8, whole or as it was. Raises OSError."""
    with whole_file(path, tag) as part:
        part.write_text(text, encoding="utf-8")


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


def shard_of(text: str) -> tuple[int, int]:
    """"i/n" -> (i from 0, n). Raises UserError."""
    shard = re.fullmatch(r"(\d+)/(\d+)", text)
    if not shard or not 1 <= int(shard[1]) <= int(shard[2]):
        raise UserError(f"--shard is i/n with i from 1 to n, such as 1/8, not {text!r}.")
    return int(shard[1]) - 1, int(shard[2])


def complete(files: list[str]) -> bool:
    """Do the names of a video's clips say that none is missing?"""
    return bool(files) and len(files) == int(re.search(r"of(\d+)\.", files[0])[1])

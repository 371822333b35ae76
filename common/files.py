"""Plain files, and many items at once. Nothing here imports torch.

A file is written whole or not at all: whoever looks at a path finds the old file or the new one,
never half of one, also after a power cut. `whole_file` and `whole_folder` are the only places
where this project gives a file or a folder its final name. What cannot be read is one sentence.

Many items are worked on by threads or by other processes, in order and a few at a time.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from config import UserError, rank

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


# --- files and folders, whole or absent ---------------------------------------------------------
@contextlib.contextmanager
def whole_file(path, tag: str = "") -> Iterator[Path]:
    """A path beside `path` to write to. It becomes `path` if the block ends without an error.

    tag: ends the temporary name, NAME.TAG.part (this process's number if empty), so that a writer
    knows its own leftovers after it was killed.
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
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to fill. It replaces `path` if the block ends without an error.

    Its name is PATH.SOMETHING until then. Whoever fills it brings its files to the disk (fsync).
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir()
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --- one writer at a time -------------------------------------------------------------------------
@contextlib.contextmanager
def handle_of(path: Path) -> Iterator[int | None]:
    """A file or a folder to lock, open while the block lasts; None where that cannot be."""
    handle = None
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(OSError):
            if fcntl:
                handle = os.open(path, os.O_RDONLY)
                opened.callback(os.close, handle)  # which ends the lock
        yield handle


def take(handle: int | None, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock what is open, until it is closed or this process dies, in whatever way.

    False where another process holds it. None on a system or a network drive without locks.
    """
    if handle is None:
        return None
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_still(handle: int | None, path: Path) -> bool:
    """Is what is open what has this name now?"""
    try:
        now = os.stat(path)
    except OSError:
        return False
    return handle is None or os.path.samestat(os.fstat(handle), now)


@contextlib.contextmanager
def lock(path: Path, refusal: str = "") -> Iterator[bool]:
    """One process at a time writes to `path`, a file or a folder: a second one waits, which it says,
    or, with a refusal, raises UserError.

    Yields False without locks: there both write. Those who build in folders of their own only do
    the work twice.
    """
    with handle_of(path) as handle:
        locked = take(handle)
        if not is_still(handle, path):  # its owner ended, and removed it, since we opened it
            locked = False
        if locked is False and refusal:
            raise UserError(refusal)
        if locked is False:
            print(f"Another run is building clips in {path}; waiting for it.", flush=True)
            locked = take(handle, wait=True)
        yield bool(locked)


# --- what is in them ----------------------------------------------------------------------------
def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError with one sentence."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: a folder in diffusers' layout is expected, with "
                        "tokenizer, text_encoder and vae in it.") from None
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or "it is not JSON"
        raise UserError(f"{path} cannot be read ({reason}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.")
    return value


def digest(value) -> str:
    """A hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(value: dict) -> dict:
    """The same with a digest of it, so that `is_intact` notices a bit that the disk changed."""
    rest = {name: part for name, part in value.items() if name != "digest"}
    return {**rest, "digest": digest(rest)[:16]}


def is_intact(value: dict) -> bool:
    """Is this as `sealed` gave it? What an earlier version wrote has no digest, and counts as
    intact."""
    return value.get("digest") in (None, sealed(value)["digest"])


def join_some(items: Iterable[str], most: int = 8) -> str:
    """The first items in one line, and how many more there are."""
    # JSON may hold half a character, which no terminal prints.
    items = [item.encode("utf-8", "replace").decode() for item in items]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def shard_of(text: str) -> tuple[int, int]:
    """"i/n" -> (i from 0, n); "" -> what torchrun says, (0, 1) without it. Raises UserError."""
    if not text:
        return rank()
    shard = re.fullmatch(r"(\d+)/(\d+)", text)
    if not shard or not 1 <= int(shard[1]) <= int(shard[2]):
        raise UserError(f"--shard is i/n with i from 1 to n, such as 1/8, not {text!r}.")
    return int(shard[1]) - 1, int(shard[2])


# --- many items at once -------------------------------------------------------------------------
def cores(threads: int) -> int:
    """How many threads to use: as many as asked for, or with 0 every core this process may use."""
    if threads:
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bounded_map(executor: concurrent.futures.Executor, function: Callable, items: list, group: int,
                chunksize: int = 1) -> Iterator:
    """executor.map, in order, with at most two groups of items under way.

    executor.map alone would start on all items at once, and clips that wait to be taken would fill
    the memory.
    """
    groups = (executor.map(function, items[start:start + group], chunksize=chunksize)
              for start in range(0, len(items), group))
    results = next(groups, ())
    for following in groups:  # these are under way before the results of those before are taken
        yield from results
        results = following
    yield from results


def map_in_processes(function: Callable, items: list, workers: int, chunk: int) -> Iterator:
    """function of each item, in order, computed by other processes, `chunk` items a message.

    The processes are new ones ("spawn"), because a copy of a process with torch's threads may hang.
    They import the module of `function` and nothing else of ours. Raises BrokenExecutor when one
    dies.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, follow_parent) as executor:
        with without_main_script():
            for _ in range(workers):  # each call that finds no idle process starts one
                executor.submit(int)
        group = 4 * chunk * workers
        yield from bounded_map(executor, function, items, group, chunksize=chunk)


def follow_parent() -> None:
    """At the start of a worker: end when the parent ends, and leave Ctrl-C to the parent."""
    def wait_for_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait_for_parent, daemon=True).start()


@contextlib.contextmanager
def without_main_script() -> Iterator[None]:
    """Processes that are spawned inside do not import the script that this process runs.

    Python imports it in each of them in case a function is defined there. Ours are not, and
    train.py would import torch, which takes seconds.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script

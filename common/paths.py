"""Paths that a command line names: a text file to read, a file or a folder to write."""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from config import UserError


def read_text(flag: str, path: str) -> str:
    """A UTF-8 file, without a byte-order mark. Raises UserError, which names the flag, for one that
    cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} {path} cannot be read as UTF-8 text ({type(e).__name__}).") from None
    if "\0" in text:
        raise UserError(f"{flag} {path} is no text: it holds a zero byte.")
    return text


def read_lines(flag: str, path: str) -> list[str]:
    """The lines of such a file that are not empty, stripped. Raises UserError likewise."""
    # str.splitlines would also end a line at form feeds and Unicode's separators.
    return [line.strip() for line in read_text(flag, path).split("\n") if line.strip()]


def check_writable(out: Path) -> None:
    """Make the folder of a file to come and find it writable. Raises UserError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"The folder {out.parent} cannot be made ({e.strerror}).") from None
    probe = out.with_name(f"{out.name}.{os.getpid()}.part")  # as long a name as it will have first
    try:
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e.strerror}).") from None
    if out.is_dir():
        raise UserError(f"{out} cannot be written: it is a folder.")


@contextlib.contextmanager
def no_trace(new: list[Path]) -> Iterator[None]:
    """Those of these folders that are empty still when the block is refused are removed again, one
    after the other."""
    try:
        yield
    except UserError:
        with contextlib.suppress(OSError):  # one that is not empty
            for folder in new:
                folder.rmdir()
        raise

"""Extra packages: imported where they are needed, and what they raise as one sentence."""
import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from config import UserError


def library(name: str):
    """The module of an extra package. Raises UserError that says what to install."""
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"Official weights need {name}, which cannot be imported ({e}): pip "
                        "install -r requirements-extra.txt.") from None
    if name in ("transformers", "diffusers"):  # their remarks and bars go, their errors stay
        logging = importlib.import_module(f"{name}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return module


@contextlib.contextmanager
def library_error_as_sentence(folder: Path) -> Iterator[None]:
    """Whatever a library raises over the files in a folder becomes a UserError."""
    try:
        yield
    except Exception as e:
        said = " ".join((str(e) or type(e).__name__).split())
        raise UserError(f"{folder} cannot be loaded: {said[:300].rstrip('.!')}.") from None

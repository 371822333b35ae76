"""Models of other libraries: imported where they are needed, read from a folder of weights, and
whatever is wrong said in one sentence.
"""
import contextlib
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import safetensors
from torch import nn

from common.files import join_some, read_json
from config import UserError


def library(name: str, what: str = "Official weights need"):
    """The module of an extra package. Raises UserError that says what to install.

    what: the beginning of that sentence."""
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"{what} {name}, which cannot be imported ({e}): pip "
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


# --- a folder of weights ------------------------------------------------------------------------
DIFFUSERS = "diffusion_pytorch_model"  # what its weights are called; transformers says "model"
FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors' types
SUFFIXES = (".json", ".model", ".safetensors", ".txt")  # of the files that a model is
BLOCK = 2**16  # bytes of a sample that tells weights apart
BLOCKS = 256  # samples of a file


def weight_files(folder: Path, stem: str) -> list[Path]:
    """STEM.safetensors, or the files that STEM.safetensors.index.json names. Whatever lies beside
    them, such as averages, older weights or a variant in fp16, is not of the model."""
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise UserError(f"{index} cannot be read: it names no files.")
        names = {Path(str(name)).name for name in named.values()}  # of this folder alone
        files = [folder / name for name in sorted(names)]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(f"{folder} lacks {join_some(missing)}, which its {index.name} names.")
        if single.exists() and single not in files:  # libraries differ in which one they read
            raise UserError(f"{folder} has both {single.name} and {index.name}, which names other "
                            "files: remove the one that is not meant.")
        return files
    others = sorted(folder.glob("*.safetensors"))
    if single in others:
        return [single]
    if len(others) == 1:  # of one file alone there is no doubt
        return others
    if others:
        names = join_some((path.name for path in others), 3)
        raise UserError(f"{folder} has neither {single.name} nor {index.name}: which of {names} is "
                        "meant cannot be told.")
    raise UserError(f"{folder} holds no .safetensors file; pickled weights (.bin, .pt) are not "
                    "opened.")


def tensor_files(folder: Path, stem: str = DIFFUSERS) -> dict[str, Path]:
    """{tensor: its file} of the weights in a folder, whose files weight_files tells.

    Their headers are read. Raises UserError with one sentence for what is missing, damaged,
    pickled, or not of floats.
    """
    files = weight_files(folder, stem)
    found = {}
    for path in files:
        try:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():
                    dtype = file.get_slice(name).get_dtype()
                    if dtype not in FLOATS:
                        raise UserError(f"{name} in {path} is stored as {dtype}; floating point of "
                                        "16 bits or more is needed (F16, BF16, F32).")
                    if name in found:
                        raise UserError(f"{name} is in {found[name]} and in {path.name}: which one "
                                        "is meant cannot be told.")
                    found[name] = path
        except (safetensors.SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{path} is damaged or no safetensors file ({e}).") from None
    return found


def load(kind, folder: Path, **how) -> nn.Module:
    """A model of a library's class, in eval mode, on the CPU. Raises UserError with one sentence
    for weights that are missing, damaged, pickled, of another shape, or not finite."""
    read_json(folder / "config.json")
    ours = kind.__module__.startswith("diffusers")
    # What is wrong is said before anything large is read.
    tensor_files(folder, DIFFUSERS if ours else "model")
    with library_error_as_sentence(folder):
        model, info = kind.from_pretrained(str(folder), use_safetensors=True, local_files_only=True,
                                           output_loading_info=True, **how)
    for what, key in (("lacks", "missing_keys"), ("does not fit its config in", "mismatched_keys")):
        if info.get(key):  # the libraries would fill these with random numbers
            raise UserError(f"{folder} {what} {join_some(map(str, info[key]), 3)}.")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{name} in {folder} holds numbers that are not finite.")
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, model: nn.Module):
    """The tokenizer of transformers that belongs to a model. Raises UserError for one without its
    vocabulary, which transformers makes up of a few tokens, and for another model's."""
    read_json(folder / "tokenizer_config.json")
    with library_error_as_sentence(folder):
        tokenizer = library("transformers").AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True)
    names = tokenizer.vocab_files_names.values()
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder} holds no vocabulary: there is no {' or '.join(names)}.")
    ids = tokenizer.get_vocab().values()
    rows = model.get_input_embeddings().num_embeddings
    if max(ids) >= rows or len(ids) < rows / 2:  # embeddings are rounded up, never twice as many
        raise UserError(f"{folder} is of another model: it has {len(ids)} tokens with ids up to "
                        f"{max(ids)}, and the embedding has {rows} rows.")
    return tokenizer


def fingerprint(folder: Path) -> str:
    """A hash that tells weights apart: small files whole; of a large one its size and 256 blocks
    spread over it, since training moves every weight and twenty gigabytes need not be read for
    that."""
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES):
        size = path.stat().st_size
        sha.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for at in range(0, size, max(BLOCK, size // BLOCKS)):
                file.seek(at)
                sha.update(file.read(BLOCK))
    return sha.hexdigest()[:16]

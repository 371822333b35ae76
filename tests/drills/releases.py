"""Do the oldest and the newest releases that the requirements allow pass every test?

A fresh environment for each.

    python tests/drills/releases.py                       both ends, with the extras: nothing may skip
    python tests/drills/releases.py --end lowest --core   one end, without the extras
    python tests/drills/releases.py --end newest --renamed
                                                          a copy of transformers in which an argument has
                                                          another name: the tests must fail with a sentence
                                                          that names it

An environment takes some minutes and, with torch for CUDA, six gigabytes; --keep DIR keeps it there for
another run. What is installed is printed, and belongs into README's "Versions".
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LINE = re.compile(r"([A-Za-z_-]+)(\[\w+\])?>=([\d.]+),<([\d.]+)")


def requirements(core: bool) -> list[tuple[str, str, str]]:
    """(package, its extras in brackets, lowest release) of each line.
    Exits when a line is not bounded on both sides."""
    found = []
    for name in ("requirements.txt", *([] if core else ["requirements-extra.txt"])):
        for line in (ROOT / name).read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            parts = LINE.fullmatch(line)
            if not parts:
                sys.exit(f"{name}: {line!r} is not of the form package>=lowest,<outside")
            found.append((parts[1], parts[2] or "", parts[3]))
    return found


def install(folder: Path, end: str, core: bool) -> Path:
    """-> the python of an environment with the packages of one end."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    venv.create(folder, with_pip=True)
    if end == "lowest":
        wanted = [f"{package}{extras}=={release}" for package, extras, release in requirements(core)]
    else:
        files = ["requirements.txt"] if core else ["requirements.txt", "requirements-extra.txt"]
        wanted = [word for name in files for word in ("-r", str(ROOT / name))]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def versions(python: Path, core: bool) -> str:
    """What is installed of what the requirements name, and what transformers brings."""
    names = [package for package, *_ in requirements(core)] + ["tokenizers", "huggingface_hub"]
    code = ("from importlib.metadata import version\n"
            f"print(', '.join(f'{{n}} {{version(n)}}' for n in {names}))")
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def renamed_copy(python: Path, folder: Path) -> None:
    """transformers as it is installed,
    but `mm_token_type_ids` of Qwen2.5-VL's positions is called otherwise."""
    where = subprocess.run([python, "-c", "import transformers; print(transformers.__path__[0])"], check=True,
                           capture_output=True, text=True).stdout.strip()
    shutil.copytree(where, folder / "transformers")
    path = folder / "transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py"
    path.write_text(path.read_text().replace("mm_token_type_ids", "kinds_of_tokens"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end", choices=("lowest", "newest"), help="one end only")
    parser.add_argument("--core", action="store_true", help="without requirements-extra.txt")
    parser.add_argument("--keep", type=Path, help="folder for the environments, kept")
    parser.add_argument("--renamed", action="store_true",
                        help="with the copy of transformers in which a name changed")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for end in [args.end] if args.end else ["lowest", "newest"]:
            python = install((args.keep or Path(scratch)) / f"{end}{'-core' if args.core else ''}", end,
                             args.core)
            print(f"{end}: {versions(python, args.core)}", flush=True)
            tests, environment = [], dict(os.environ)
            if args.renamed:
                renamed_copy(python, Path(scratch) / end)
                tests = ["tests/test_seams.py"]
                environment = environment | {"PYTHONPATH": str(Path(scratch) / end)}
            done = subprocess.run([python, "-m", "pytest", "-q", "-rs", *tests], cwd=ROOT, env=environment,
                                  capture_output=args.renamed, text=True)
            if args.renamed:
                release = versions(python, args.core).split("transformers ")[1].split(",")[0]
                said = [line for line in done.stdout.splitlines()
                        if f"transformers {release} has changed: the arguments of Qwen2_5_VLModel" in line]
                print(said[0] if said else f"NOT NOTICED:\n{done.stdout[-2000:]}")
                failed += not (said and done.returncode == 1)
            else:
                failed += done.returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

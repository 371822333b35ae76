"""Give every program commands that cannot work, and see whether each is refused as it should be.

    python tests/drills/bad_commands.py              all of bad_commands.txt (some seven minutes)
    python tests/drills/bad_commands.py --only wan   those lines with this word
    python tests/drills/bad_commands.py --keep DIR   leave the folder with the files that they are given

A command that cannot work ends with exit code 2 and one sentence on stderr that has the expected piece, without
a traceback, writes no file, and takes at most 20 seconds. Progress bars, and folders that were made and hold
nothing yet, do not count. bad_commands.txt says how its lines are read.

A program needs seconds to import torch, so one process runs many commands, one after the other. It is
killed when a command takes too long, and another one goes on. One command in fifteen is run once more as a user
runs it, which also shows what a library prints when the program ends.

Exit code 1 when a command that is not marked [later] does not behave.
"""
import argparse
import contextlib
import dataclasses
import gc
import importlib
import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LIMIT = 20  # seconds for one command
MEMORY = 12 * 2**30  # bytes of addresses: a model of a petabyte is to fail here, not to swap
BEGUN = {"cache.json", "maps.json", "index.json", "empty.safetensors"}  # of a folder that the same command goes on with
EVERY = 15  # of the commands each so many-th is also run as a program


# --- the list ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bad:
    """One line of the list."""
    section: str
    command: str  # as a shell would read it, without `python`
    later: bool  # known not to be refused yet
    reason: str
    piece: str  # of the sentence

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.command)


def unfold(text: str, short: dict[str, str]) -> str:
    """The text with its abbreviations replaced."""
    return re.sub(r"\$(\w+)", lambda word: short[word[1]], text)


def read_list(path: Path = Path(__file__).with_suffix(".txt")) -> list[Bad]:
    """The lines of the list, its abbreviations replaced."""
    found, section, short = [], "", {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif match := re.match(r"\$(\w+) = (.*)", line):
            short[match[1]] = unfold(match[2], short)
        elif line.strip() and not line.startswith("#"):
            command, reason, piece = re.fullmatch(r"(.*?) +# (.*?): (.*)", line).groups()
            later = reason.startswith("[later] ")
            found.append(Bad(section, unfold(command, short), later, reason.removeprefix("[later] "), piece))
    return found


# --- one command -------------------------------------------------------------------------------------------------
def here(argv: list[str]) -> tuple[int, str]:
    """Run a program in this process and folder. -> exit code, what it wrote to stderr."""
    said, code, kept = io.StringIO(), 0, sys.argv
    sys.argv = argv
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        except SystemExit as e:
            code = e.code
        except BaseException as e:  # in a process of its own this would be a traceback
            code = 1
            print(f"Traceback: {type(e).__name__}: {e}", file=said)
        finally:
            sys.argv = kept
        gc.collect()  # destructors print too
    return code, said.getvalue()


def as_program(argv: list[str]) -> tuple[int, str]:
    """The same, as a user runs it."""
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / argv[0], *argv[1:]], env=quiet, capture_output=True, text=True,
                          errors="backslashreplace", stdin=subprocess.DEVNULL, timeout=10 * LIMIT)
    return done.returncode, done.stderr


def state_of(folder: Path) -> dict[str, tuple]:
    """{path: size and time of change} of every file in a folder."""
    stats = {path: path.lstat() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def changes(before: dict, after: dict) -> set[str]:
    """What is new, gone, or other than it was."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def sentences(said: str) -> list[str]:
    """The lines on stderr that are no progress bar."""
    return [line for line in re.split(r"[\r\n]", said) if line.strip() and not re.search(r"\[.*/s.*\]|\|.*\[", line)]


def faults(bad: Bad, code: int, said: str, changed: set[str]) -> list[str]:
    """What is wrong with the way in which a command was refused. changed: the files that it wrote."""
    found = []
    lines = sentences(said)
    if code != 2:
        found.append(f"exit code {code}")
    if "Traceback" in said:
        found.append("traceback")
    if len(lines) != 1 or not lines[0].endswith("."):
        found.append("not one sentence")
    if bad.piece not in said:
        found.append(f"not the sentence with {bad.piece!r}")
    written = sorted(name for name in changed if Path(name).name not in BEGUN)
    if written:
        found.append(f"wrote {', '.join(written[:4])}")
    return found


# --- the files that commands are given ---------------------------------------------------------------------------
def spoilt(folder: Path, new: str, files: dict) -> None:
    """A copy beside a folder in which some files have other bytes, fewer of them (a number), or are gone (None)."""
    copy = Path(shutil.copytree(folder, folder.with_name(new)))
    for name, content in files.items():
        path = next(copy.glob(name))
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)


def plain_files(at: Path) -> None:
    """Text files, folders and videos, good and bad."""
    from helpers import drifting
    for name in ("empty", "folder.txt", "folder.gif", "films", "films_gone", "films_bad", "films_bare"):
        (at / name).mkdir()
    captions = {"utf16": '{"a.mp4": "a ball"}'.encode("utf-16"), "latin1": '{"a.mp4": "a bäll"}'.encode("latin-1"),
                "numbers": b"[1, 2]", "half": b'{"a.mp4": "a b', "none": b"{}", "word": b'"a ball"', "zero": b"",
                "deep": b"[" * 100_000}
    for name, content in captions.items():
        (at / f"{name}.json").write_bytes(content)
    texts = {"file.txt": b"a red ball\n", "empty.txt": b"", "blank.txt": b"\n \n\n", "marks.txt": b"a ball\n?!\n",
             "utf16.txt": "a red ball".encode("utf-16"), "latin1.txt": "ein Bäll".encode("latin-1"),
             "noise.bin": bytes(range(256)) * 9, "empty.csv": b"", "names.csv": b"caption,longer\n",
             "hole.csv": b'caption,longer\na ball,a red ball\n" ",a cube\n', "wide.csv": b"caption\na ball, red\n",
             "open.csv": b'caption\n"a ball\na cube\n', "zero.csv": b"caption\na\0ball\n",
             "latin1.csv": "caption\nein Bäll".encode("latin-1"), "slash.csv": b"caption\nwet/dry\n",
             "long.csv": b"caption\n" + b"ball " * 60, "good.csv": b"caption,longer\na ball,a red ball\n"}
    for name, content in texts.items():
        (at / name).write_bytes(content)
    (at / "loop").symlink_to(at / "loop")
    for seed, name in enumerate("ab"):
        drifting(at / "films" / f"{name}.mp4", seed)
    drifting(at / "films_bare" / "a.mp4", 0)
    (at / "films_bad" / "a.mp4").write_bytes(b"this is no video")
    (at / "films_bad" / "b.mp4").write_bytes((at / "films" / "b.mp4").read_bytes()[:200])
    for name in ("films", "films_gone", "films_bad"):
        (at / name / "captions.json").write_text('{"a.mp4": "a red ball falls", "b.mp4": "ice melts"}')


def runs(at: Path) -> None:
    """A run of two steps, and what can be wrong with it."""
    import config
    import data
    import train
    words = ("--config debug --base_steps 2 --physics_steps 2 --world_clips 16 --val_clips 4 --batch_size 4 "
             "--preview_steps 1 --threads 1 --device cpu --out_dir run")
    train.main(config.parse(words.split(), ""))
    data.open_pool(config.preset("debug", world_clips=16, val_clips=4, data_dir="films"), progress=False)
    run = at / "run"
    whole = json.loads((run / "config.json").read_text())
    del whole["digest"]  # as who edits the file is told to

    def other(**fields) -> bytes:
        return json.dumps({**whole, **fields}).encode()

    for new, content in {
            "run_half": b'{"config": "deb', "run_list": b"[]", "run_type": other(dim="wide"),
            "run_wide": other(dim=64), "run_zero": other(heads=0), "run_range": other(top_k=99),
            "run_videos": other(data_dir="films"), "run_deep": b"[" * 100_000, "run_noconfig": None,
            }.items():
        spoilt(run, new, {"config.json": content})
    spoilt(run, "run_words", {"tokenizer.json": b'{"words": ["a", "a"]}'})
    spoilt(run, "run_nowords", {"tokenizer.json": None})
    spoilt(run, "run_fewwords", {"tokenizer.json": b'{"words": ["a", "ball"]}'})
    spoilt(run, "run_nothing", {"checkpoints": None})
    spoilt(run, "run_cut", {"checkpoints/best.pt": 1000, "checkpoints/base.pt": 1000,
                              "checkpoints/step000004.pt": 1000, "checkpoints/step000002.pt": 1000})
    spoilt(run, "run_text", {f"checkpoints/{name}.pt": b"import os\n"
                               for name in ("best", "base", "step000004", "step000002")})


def official_files(at: Path) -> None:
    """Tiny official weights of both lineages, a cache of each, a branch, and what can be wrong with them."""
    import config
    import tiny_weights
    from helpers import tiny_official, trained_branch
    for name in ("cogvideox", "wan"):
        weights = tiny_weights.make_weights(at / name, name)
        tiny_weights.fill_cache(at / "films", weights, at / f"{name}_cache")
        cfg = tiny_official(name, weights=name, cache=f"{name}_cache", out_dir=f"{name}_run")
        trained_branch(config.check(cfg))
        (at / f"{name}_run" / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    wan = at / "wan"
    for part in ("vae", "tokenizer", "text_encoder", "transformer"):
        spoilt(wan, f"wan_no_{part}", {part: None})
    spoilt(wan, "wan_half", {"vae/config.json": b'{"_class_name": '})
    spoilt(wan, "wan_image", {"vae/config.json": b'{"_class_name": "AutoencoderKL"}'})
    spoilt(wan, "wan_cut", {"transformer/*.safetensors": 1000})
    spoilt(wan, "wan_vaecut", {"vae/*.safetensors": 1000})
    spoilt(wan, "wan_textcut", {"text_encoder/*.safetensors": 1000})
    spoilt(wan, "wan_zero", {"transformer/*.safetensors": b""})
    spoilt(wan, "wan_none", {"transformer/*.safetensors": None})
    spoilt(wan, "wan_words", {"tokenizer/tokenizer.json": b"{"})
    spoilt(wan, "wan_nowords", {"tokenizer/tokenizer.json": None})
    spoilt(at / "cogvideox", "mixed", {"transformer/config.json": (wan / "transformer/config.json").read_bytes()})
    spoilt(at / "wan_cache", "cache_noindex", {"index.json": None})
    spoilt(at / "wan_cache", "cache_half", {"index.json": b"{"})
    spoilt(at / "wan_cache", "cache_other", {"cache.json": b'{"key": "0", "settings": {}}'})
    spoilt(at / "wan_run", "branch_cut", {"branch.safetensors": 1000})
    spoilt(at / "wan_run", "branch_text", {"branch.safetensors": b"words"})


def vlm_files(at: Path) -> None:
    """A tiny VLM, the maps that it made, and what can be wrong with them."""
    import tiny_vlm
    vlm = tiny_vlm.make_vlm(at / "vlm", "qwen2_5_vl", layers=3)
    tiny_vlm.make_maps(at / "films", vlm, at / "maps")
    spoilt(vlm, "vlm_noconfig", {"config.json": None})
    spoilt(vlm, "vlm_half", {"config.json": b"{"})
    spoilt(vlm, "vlm_other", {"config.json": b'{"model_type": "bert"}'})
    spoilt(vlm, "vlm_cut", {"*.safetensors": 1000})
    spoilt(at / "maps", "maps_noindex", {"index.json": None})
    spoilt(at / "maps", "maps_half", {"index.json": b"{"})


def build(at: Path) -> None:
    """All of them, in the current folder."""
    for make in (plain_files, runs, official_files, vlm_files):
        make(at)


# --- all commands ------------------------------------------------------------------------------------------------
def work(line, folder: Path) -> None:
    """What the process that runs many commands does: take one, run it, say how it ended."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for program in ("bench", "encode", "teacher"):  # imports are not a command's time
        importlib.import_module(program)
    gc.freeze()  # so that to look for destructors takes no time
    line.send("ready")
    while True:
        line.send(here(line.recv()))


class Worker:
    """That process, from here."""

    def __init__(self, folder: Path):
        spawn = multiprocessing.get_context("spawn")
        self.line, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(theirs, folder))
        self.process.start()
        theirs.close()
        self.alive = True
        self.line.recv()

    def run(self, argv: list[str]) -> tuple[int, str]:
        """As `here`; a process that takes too long, or that dies, is not used again."""
        self.line.send(argv)
        try:
            if self.line.poll(LIMIT):
                return self.line.recv()
            said = f"longer than {LIMIT} s"
        except EOFError:
            said = "the process died"
        self.process.kill()
        self.process.join()
        self.alive = False
        return -1, said


def tidy(folder: Path, folders: set[Path], files: dict) -> None:
    """Take away what a command has made beside these folders and files."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if path not in folders:  # processes that draw clips may write to it until they notice
                shutil.rmtree(path, ignore_errors=True)
        elif str(path.relative_to(folder)) not in files:
            path.unlink(missing_ok=True)


def drill(folder: Path, commands: list[Bad]) -> list[tuple[Bad, list[str], str]]:
    """Run them all. -> (command, its faults, what it said) of each, in order."""
    results, worker = [], None
    folders = {path for path in folder.rglob("*") if path.is_dir()}
    with contextlib.chdir(folder):
        for number, bad in enumerate(commands):
            worker = worker if worker and worker.alive else Worker(folder)
            for run in (worker.run, as_program)[:1 + (number % EVERY == 0 and not bad.later)]:
                before, start = state_of(folder), time.perf_counter()
                code, said = run(bad.argv)
                found = faults(bad, code, said, changes(before, state_of(folder)))
                results.append((bad, found, said))
                print(f"{'no' if found else 'ok'} {time.perf_counter() - start:5.1f} s  {bad.command}", flush=True)
                if found:
                    print(f"     {'; '.join(found)}: {said.strip()[:300]!r}", flush=True)
                tidy(folder, folders, before)
    worker.process.kill()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="lines with this word")
    parser.add_argument("--keep", type=Path, help="where the files are made, and left")
    args = parser.parse_args()
    commands = [bad for bad in read_list() if args.only in bad.command]
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        if not folder.exists() or not any(folder.iterdir()):
            folder.mkdir(exist_ok=True)
            with contextlib.chdir(folder):
                build(folder)
        results = drill(folder, commands)
    wrong = [bad for bad, found, _ in results if found and not bad.later]
    waiting = [bad for bad, found, _ in results if found and bad.later]
    print(f"{len(commands)} bad commands: {len(wrong)} runs not refused as they should be, "
          f"{len(waiting)} more that are known ([later])")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

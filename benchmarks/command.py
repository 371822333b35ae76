"""What evaluate.py does with the public benchmarks' files: its flags for them, and which of the
four things is asked for. What needs a network is imported when it is.
"""
import dataclasses
from dataclasses import dataclass

from benchmarks.vbench import show_quality
from benchmarks.videophy2 import compare
from config import CHOICES, UserError, flag, take_flags

COMMANDS = ("videophy2", "vbench", "dynamic", "judge")


@dataclass(frozen=True)
class Flags:
    """The command line of evaluate.py, as far as it is about benchmarks' files."""
    videophy2: list[str] = flag([], words=2)  # SA.csv PC.csv of VideoPhy-2's rater: joint and more
    other: list[str] = flag([], words=2)  # SA.csv PC.csv of another model on the same prompts
    hard: str = ""  # prompts (or paths) of the hard subset: a line each, or a .csv with caption
    vbench: list[str] = flag([], words="+")  # *_eval_results.json of VBench: its quality score
    dynamic: list[str] = flag([], words="+")  # folder, .mp4 files, or `world`: the share in motion
    flow_weights: str = ""  # weights of torchvision's raft_large, for --dynamic
    judge: str = ""  # folder of a Qwen-VL that rates clips; it is not VideoPhy-2's rater
    clips_dir: str = ""  # of --judge: a folder with clips.csv (caption, videopath), or such a file
    agree: list[str] = flag([], words=2)  # SA.csv PC.csv of people or the rater, for --judge
    device: str = flag("auto", CHOICES["device"])  # auto = cuda, else mps, else cpu

    IDLE = (  # as in rules.py
        ("other hard", "with --videophy2"),
        ("flow_weights", "with --dynamic"),
        ("clips_dir agree", "with --judge"))

    @property
    def asked(self) -> list[str]:
        """The commands that are given."""
        return [name for name in COMMANDS if getattr(self, name)]

    def check(self) -> None:
        """Raises UserError with the first broken rule."""
        for name in ("videophy2", "other", "agree"):
            if len(getattr(self, name)) > 2:
                raise UserError(f"--{name} takes two files, SA.csv and PC.csv, once.")
        if len(self.asked) > 1:
            raise UserError(f"--{self.asked[0]} and --{self.asked[1]} are two commands: give one.")
        if self.judge and not self.clips_dir:
            raise UserError("--judge needs --clips_dir, a folder of clips with their clips.csv.")
        if self.flow_weights and self.dynamic == ["world"]:
            raise UserError("--flow_weights changes nothing: the world's motion is known exactly.")


def run(given: dict) -> bool:
    """Do what a command line {flag: value} asks for here; False if that is nothing. Raises
    UserError, Stopped."""
    flags = take_flags(Flags, dict(given))
    if not flags.asked:
        return False
    foreign = sorted(given.keys() - {field.name for field in dataclasses.fields(Flags)})
    if foreign:
        raise UserError(f"--{foreign[0]} is for a run, and --{flags.asked[0]} reads none.")
    if "device" in given and not (flags.judge or flags.flow_weights):
        raise UserError("--device changes something only with a network: --judge, --flow_weights.")

    if flags.videophy2:
        compare(flags.videophy2, flags.other, flags.hard)
    elif flags.vbench:
        show_quality(flags.vbench)
    elif flags.dynamic:
        from benchmarks.dynamic import show_degree
        show_degree(flags.dynamic, flags.flow_weights, flags.device)
    else:
        from benchmarks.judge import rate
        rate(flags.judge, flags.clips_dir, flags.agree, flags.device)
    return True

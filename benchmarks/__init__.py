"""The public benchmarks' files: VideoPhy-2's scores, VBench's results, and a judge of our own.

Other files import from here.
"""
from benchmarks.command import Flags, run

__all__ = ["Flags", "run"]

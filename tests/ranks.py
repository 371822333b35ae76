"""Started by torchrun in tests/common/test_parallel.py: real runs of train.py, one after the other, in each process.

    torchrun --standalone --nproc_per_node 2 -- tests/ranks.py CASES.json

CASES.json is a list of fields of Config: all of them, with "config", or those that the debug preset lacks. With
"preview" a run draws its previews. Python and torch are loaded once for all of them, which is most of the time that
such a test takes.
"""
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402


def run(fields: dict) -> None:
    if not fields.pop("preview", False):
        sample.preview = lambda *_: None  # it costs more than ten steps
    train.main(config.Config(**fields) if "config" in fields else config.preset("debug", **fields))


if __name__ == "__main__":
    draw = sample.preview
    for number, case in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # each has its own keys in the store of the processes
        sample.preview = draw
        config.entry(run, case, ranks=True)

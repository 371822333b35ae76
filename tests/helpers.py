"""What more than one test file uses."""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def killed_when(ready, argv: list[str]) -> bool:
    """Start `python argv ...` and kill -9 it when `ready()`; False when it ended by itself before that.

    A process of its own, not a fork of this one: a fork that is killed may hold a lock that it shares with us (tqdm has
    one), and then this process waits for ever.
    """
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=quiet, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    while not ready() and child.poll() is None:
        time.sleep(0.001)
    child.kill()
    return child.wait() == -9

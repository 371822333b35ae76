"""For every test: the repository's own modules are importable, and torch keeps to one thread, so that results do not wander."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

"""All that concerns somebody else's weights: their folder, names, text encoders, VAEs, caches, branches.

Other files import from here; encode.py is this room's own command, and looks inside.
"""
from official import branch, cache, clips, cost, reference
from official.weights import open_backbone

__all__ = ["branch", "cache", "clips", "cost", "open_backbone", "reference"]

"""The teacher's room: a vision-language model, its attention maps on disk, and how good they are.

Other files import from here.
"""
from vlm import maps, qwen, report, speed, tiny
from vlm.maps import open_maps

__all__ = ["maps", "open_maps", "qwen", "report", "speed", "tiny"]

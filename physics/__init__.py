"""The laws of the world: drawn (phenomena.py, on canvas.py) and measured (laws.py).

Other files import from here."""
from physics import canvas, laws
from physics.phenomena import CATEGORIES, PHENOMENA


__all__ = ["CATEGORIES", "PHENOMENA", "canvas", "laws"]

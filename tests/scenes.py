"""Clips of the physics world with one phenomenon alone."""
import world

SEEDS = range(8)
MOVED = 40  # of 255: a change a person would notice; less is antialiasing
BALLISTIC = ("rigid body motion", "elastic motion")


def alone(name, index=0, **options):
    """A clip with one phenomenon and no decoy, and that phenomenon."""
    clip = world.make_clip(5, index, phenomenon=name, **{"decoys": 0} | options)
    return clip, clip.actors[0]

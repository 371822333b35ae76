"""Clips of the physics world with one phenomenon alone."""
import numpy as np

import world

SEEDS = range(8)
MOVED = 40  # of 255: a change a person would notice; less is antialiasing
BALLISTIC = ("rigid body motion", "elastic motion")


def alone(name, index=0, **options):
    """A clip with one phenomenon and no decoy, and that phenomenon."""
    clip = world.make_clip(5, index, phenomenon=name, **{"decoys": 0} | options)
    return clip, clip.actors[0]


def times(index, physics, frames=12, seed=5):
    """The moments (F,) a + b t that a clip of `alone` shows, and b, worked out by the description.

    Of the clip's second stream of random numbers the second one says how fast it runs, the first one where
    it lies in the room that is left.
    """
    t = np.arange(frames) / frames
    place, speed = np.random.default_rng([seed, index, 1]).uniform(size=2)
    b = {"true": 1., "weak": 2 * speed - 1, "still": 0.}[physics]
    earliest, latest = max(0., -b), 1 - max(0., b)  # the whole line stays in the second
    return earliest + place * (latest - earliest) + b * t, b

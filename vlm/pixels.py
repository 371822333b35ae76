"""Frames as a Qwen-VL takes them: resized, normalised, and cut into patches.

Letters: B videos, F frames, H W pixels, t h w the grid of patches in time, height and width.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import read_json
from vlm.settings import VLMError

CLIP_MEAN = [.48145466, .4578275, .40821073]  # what a folder that says nothing was trained with
CLIP_STD = [.26862954, .26130258, .27577711]


def check_videos(videos: np.ndarray, least_frames: int) -> None:
    """Raises VLMError unless these are videos (B, F, H, W, 3) uint8 of enough frames."""
    video = videos[0]
    if video.ndim != 4 or video.shape[-1] != 3:
        raise VLMError("A video must be 4-dimensional, (frames, height, width, 3); got shape "
                       f"{video.shape}.")
    if len(video) < least_frames:
        raise VLMError(f"This video has {len(video)} frame(s) but the model merges {least_frames} "
                       f"frames into one token: give at least {least_frames}.")
    if video.dtype != np.uint8:
        raise VLMError(f"Frames must be bytes (uint8), from 0 to 255; got {video.dtype}.")


@dataclass(frozen=True)
class Pictures:
    """How a Qwen-VL wants its frames. A token stands for `temporal_patch` frames and for `merge` by
    `merge` patches."""
    temporal_patch: int  # frames a patch
    patch: int  # pixels of a patch's side
    merge: int  # patches of a token's side
    mean: list[float]  # of red, green and blue in [0, 1]
    std: list[float]
    least: int  # pixels of a frame
    most: int

    @classmethod
    def read(cls, vision, folder: Path | None) -> "Pictures":
        """vision: the model's vision config. folder: where the settings of its picture processor
        may lie. Raises UserError for a file that is no JSON."""
        found = {}
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            if folder and (folder / name).exists():
                found |= read_json(folder / name)
        size = found.get("size") or {}
        return cls(vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size,
                   mean=found.get("image_mean", CLIP_MEAN),
                   std=found.get("image_std", CLIP_STD),
                   least=found.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
                   most=found.get("max_pixels") or size.get("longest_edge") or 14 * 14 * 4 * 1280)

    def size_for(self, height: int, width: int, most: int = 0) -> tuple[int, int]:
        """Height and width to which frames are resized: whole tokens, nearly the old aspect, and as
        many pixels as the model was trained with, `most` at most (0 = its own limit).

        It is the rule of Qwen's own processors, `smart_resize`.
        """
        unit = self.patch * self.merge
        most = min(most or math.inf, self.most)
        h, w = (max(unit, round(side / unit) * unit) for side in (height, width))
        if h * w > most:
            shrink = math.sqrt(height * width / most)
            h, w = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
        elif h * w < self.least:
            grow = math.sqrt(self.least / (height * width))
            h, w = (math.ceil(side * grow / unit) * unit for side in (height, width))
        return h, w

    def patches(self, videos, device="cpu") -> tuple[Tensor, tuple[int, int, int]]:
        """videos (B, F, H, W, 3) uint8 of one shape -> pixel values (B t h w, 3 m p p) in the order
        in which the model wants them, and the grid (t, h, w) of patches of one video.

        An odd last frame is repeated. Raises VLMError.
        """
        videos = np.stack(videos)
        check_videos(videos, self.temporal_patch)
        B, frames, H, W = videos.shape[:4]
        x = torch.from_numpy(videos).to(device).permute(0, 1, 4, 2, 3)  # (B, F, 3, H, W)

        # Resize with the processors' bicubic filter. They round to bytes afterwards, so we do too.
        height, width = self.size_for(H, W)
        if (height, width) != (H, W):
            x = x.flatten(0, 1).float()
            x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
            x = x.round().clamp(0, 255).unflatten(0, (B, frames))

        # Normalise, and fill up the last patch in time.
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.mean, self.std))
        x = (x.float() / 255 - mean) / std
        missing = -frames % self.temporal_patch
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)

        # Cut. The s x s patches of a token follow each other, and so do the tokens of a row.
        m, s, p = self.temporal_patch, self.merge, self.patch
        x = x.reshape(B, -1, m, 3, height // (p * s), s, p, width // (p * s), s, p)
        x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # (B, t, h, w, s, s, 3, m, p, p)
        _, t, h, w = x.shape[:4]  # of whole tokens
        return x.flatten(6).flatten(0, 5), (t, h * s, w * s)

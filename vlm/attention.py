"""How attention is watched without changing it.

transformers lets a program register an attention function of its own. Ours calls the library's
fused kernel, whose output goes on unchanged, and shows queries and keys to a *watcher*. `RowMaps`
is the watcher that makes maps: it computes the few rows of the attention matrix that are wanted, in
float32. The whole S x S matrix is never made: for a 7B model and 26 frames it takes 54 GB. The
model stays on its fused kernels, because in bf16 eager attention changes the answers.

Letters: Q questions, R tokens of question and answer, P of the prefix before them, N of the video,
d width of a head.
"""
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.libraries import library
from config import UserError
from vlm.settings import VLMError

ATTENTION = "watched_sdpa"  # the name under which transformers knows `watched_attention`


def watched_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask,
                      watcher=None, **how):
    """The library's sdpa attention, and a watcher beside it.

    query (B, heads, S, d) and key, value (B, groups, P + S, d) come rotated, and joined with the
    cache: nothing of the model's projections, norms and positions has to be known here.

    watcher: what the model's forward was given under this name, or None. It is called as
    watcher(query, key, mask, scaling, output), and returns the output (B, S, heads, d) to go on
    with.
    """
    sdpa = library("transformers").AttentionInterface()["sdpa"]
    output, weights = sdpa(module, query, key, value, attention_mask, **how)
    if watcher is not None:
        output = watcher(query, key, attention_mask, how["scaling"], output)
    return output, weights


def register_attention() -> None:
    """Tell transformers of `watched_attention`, and that it takes the masks that sdpa takes.

    Without the second line the mask would be dropped without a word (`RowMaps` notices).
    """
    transformers = library("transformers")
    transformers.AttentionInterface.register(ATTENTION, watched_attention)
    sdpa_mask = transformers.AttentionMaskInterface()["sdpa"]
    transformers.AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def library_changed(what: str) -> UserError:
    """The error for a transformers that does not do what this room relies on.

    It concerns every clip, so it is no VLMError: that would only skip the clip.
    """
    version = library("transformers").__version__
    return UserError(f"transformers {version} {what}: this release may have changed; README names "
                     "those that were tested.")


@dataclass
class RowMaps:
    """Watches one pass over question and answer, and keeps where some of its rows look."""
    rows: list[list[list[int]]]  # of each question, of each kind, counted from the prefix's end
    video_at: Tensor  # (N,) places of the video's tokens in the prefix
    prefix: int  # tokens of the prefix
    layers: list[int]  # to watch
    layer: int = 0  # that comes next: the library calls once a layer, the first layer first
    maps: list[Tensor] = field(default_factory=list)  # (Q, kinds, N) of each watched layer

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float,
                 output: Tensor) -> Tensor:
        if key.shape[2] != self.prefix + query.shape[2]:
            raise library_changed(f"passes {key.shape[2]} keys to attention, not those of the "
                                  "cache and the question")
        if mask is None and query.shape[2] > 1:
            raise library_changed("drops the attention mask of a registered attention function")
        if self.layer in self.layers:
            maps = [self.maps_of(*question, scaling) for question in zip(self.rows, query, key)]
            self.maps.append(torch.stack(maps))
        self.layer += 1
        return output

    def maps_of(self, rows: list[list[int]], query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """(kinds, N) float32: the mean attention to the video of one question's rows of each kind.

        query (heads, R, d), key (groups, P + R, d); the heads of a group share its keys.
        """
        wanted = sorted({row for kind in rows for row in kind})
        q = query[:, wanted].float().unflatten(0, (len(key), -1))  # (groups, heads of one, rows, d)
        score = torch.einsum("ghrd,gsd->ghrs", q, key.float()).flatten(0, 1)  # (heads, rows, P + R)
        score = score * scaling

        # Causal: row r of the question stands at place P + r.
        place = self.prefix + torch.tensor(wanted, device=key.device)
        future = torch.arange(key.shape[1], device=key.device) > place[:, None]
        attention = score.masked_fill(future, -math.inf).softmax(-1)

        # The mean over heads, then over the rows of each kind; a kind without rows saw nothing.
        to_video = attention[..., self.video_at.to(key.device)].mean(0)  # (rows, N)
        if not to_video.isfinite().all():
            raise VLMError(f"Attention of layer {self.layer} is not finite ({key.dtype}). Qwen-VL "
                           "overflows in float16: load it with dtype=torch.bfloat16.")
        nothing = to_video.new_zeros(to_video.shape[1])
        of_kinds = [[wanted.index(row) for row in kind] for kind in rows]
        return torch.stack([to_video[kind].mean(0) if kind else nothing for kind in of_kinds])

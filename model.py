"""The video diffusion transformer, CogVideoX lineage in small (Yang et al. 2024, arXiv 2408.06072).

    x (B, C, F, H, W) --patchify--> video tokens --+
                                                   +--> [text | video] --blocks--> video tokens --head--> prediction
    text ids (B, L) --TextEncoder--> text tokens --+

Every block attends over text and video together with one set of weights. What is "expert" about its adaLN is the
modulation alone: text and video get their own shift, scale and gate from the diffusion time. Names of sub-modules are
those of the diffusers checkpoint of CogVideoX.

The block contract, all that experts.py knows of a backbone:
    tokens, condition = backbone.embed(x, t, text, text_length)
    tokens = block(tokens, condition, middle=None)     attention, then middle(tokens) if given, then feed-forward
    prediction = backbone.head(tokens, condition)
`condition.n_text` says how many text tokens stand in front of the video tokens.

Left out on purpose: the second lineage (Wan) and official weights; they get a block and a model class of their own
beside these.

Letters: B batch, C channels, F H W video, N video tokens, L text tokens, S = L + N, D width, h heads, d = D / h.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Condition:
    """What blocks and head need beside the tokens."""

    time: Tensor  # (B, D_time) silu of the time embedding
    rope: tuple[Tensor, Tensor]  # cos, sin (S, d / 2)
    n_text: int  # text tokens in front of the video tokens
    grid: tuple[int, int, int]  # video tokens along time, height, width
    text: Tensor  # (B, L, D_text) the text embedding y, as the semantic router reads it
    text_length: Tensor  # (B,) real tokens of y; the rest is padding


# --- shared leaves ----------------------------------------------------------------------------------------------------
def patchify(x: Tensor, pt: int, p: int) -> Tensor:
    """(B, C, F, H, W) -> (B, N, C pt p p): tokens in order t, h, w; a token's numbers in order c, t, h, w."""
    B, C, frames, H, W = x.shape
    x = x.view(B, C, frames // pt, pt, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, C * pt * p * p)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], pt: int, p: int) -> Tensor:
    """(B, N, C pt p p) -> (B, C, F, H, W), the inverse of patchify."""
    B, (T, h, w) = len(tokens), grid
    x = tokens.view(B, T, h, w, -1, pt, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)  # (B, C, T, pt, h, p, w, p)
    return x.reshape(B, -1, T * pt, h * p, w * p)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """(B,) in the lineage's own unit (0..1000) -> (B, dim), cosines first as in the CogVideoX checkpoint."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def turns(n: int, channels: int, base: float = 10_000) -> Tensor:
    """(n, channels / 2): by how much RoPE turns each pair of channels at the positions 0 .. n - 1 of one axis."""
    frequencies = base ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    return torch.arange(n, dtype=torch.float64)[:, None] * frequencies


@lru_cache(maxsize=8)
def rope_1d(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin (n, d / 2) of the words of a caption. They are few: with the usual base half of the channels would
    hardly turn, and which word stands next to which is then learned too late."""
    angles = turns(n, d, base=10).float()
    return angles.cos().to(device), angles.sin().to(device)


@lru_cache(maxsize=8)
def rope_3d(grid: tuple[int, int, int], n_text: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin (n_text + N, d / 2): of d channels a quarter turns with time, 3/8 with height, 3/8 with width.

    Text rows have angle zero, an exact identity, so that no block needs to cut the sequence apart.
    """
    angles = []
    for axis, channels in enumerate((d // 4, 3 * d // 8, 3 * d // 8)):
        shape = [1, 1, 1, channels // 2]
        shape[axis] = grid[axis]
        angles.append(turns(grid[axis], channels).view(shape).expand(*grid, -1))
    angles = F.pad(torch.cat(angles, dim=-1).flatten(0, 2), (0, 0, n_text, 0)).float()  # (S, d / 2)
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channel pairs (0, 1), (2, 3) ... of x (B, h, S, d) by the angles of their position."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, h, S, d). On a CPU the formula itself beats the fused kernel, whose
    backward is slow."""
    if q.device.type == "cpu":
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Joint attention over [text | video], LayerNorm on every head's q and k (over d, weights shared by the heads)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.LayerNorm(dim // heads, eps=1e-6), nn.LayerNorm(dim // heads, eps=1e-6)
        self.to_out = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, S, D) -> (B, h, S, d)

    def queries_keys(self, x: Tensor, rope) -> tuple[Tensor, Tensor]:
        q, k = self.norm_q(self.split(self.to_q(x))), self.norm_k(self.split(self.to_k(x)))
        return rotate(q, rope), rotate(k, rope)

    def forward(self, x: Tensor, rope) -> Tensor:
        q, k = self.queries_keys(x, rope)
        v = self.split(self.to_v(x))
        return self.to_out(attend(q.type_as(v), k.type_as(v), v).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))


class TextBlock(nn.Module):
    """A plain pre-norm transformer block."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor, rope) -> Tensor:
        x = x + self.attn1(self.norm1(x), rope)
        return x + self.ff(self.norm2(x))


class TextEncoder(nn.Module):
    """Words in context: ids (B, L) -> y (B, L, D). Trained with the backbone, where the official models have a frozen T5.

    Without it "red" and "left" are the same tokens in every caption, and the video tokens must find out which belongs
    to which: colours and sides then take several times as many steps to come out right. As with T5 in CogVideoX,
    padding is not masked.
    """

    def __init__(self, vocabulary: int, dim: int, heads: int, depth: int):
        super().__init__()
        self.heads, self.embedding = heads, nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(TextBlock(dim, heads) for _ in range(depth))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        rope = rope_1d(text.shape[1], x.shape[-1] // self.heads, x.device)
        for block in self.blocks:
            x = block(x, rope)
        return x


# --- CogVideoX --------------------------------------------------------------------------------------------------------
class ExpertNorm(nn.Module):
    """Expert adaLN: one LayerNorm for all tokens, then each stream's own shift and scale; its gate comes along."""

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 6 * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> modulated (B, S, D), gate (B, S, D). Chunk order of the checkpoint: video first, although text
        leads the sequence."""
        n = condition.n_text
        six = self.linear(condition.time)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        v_shift, v_scale, v_gate, t_shift, t_scale, t_gate = six
        x = self.norm(x)
        text, video = x[:, :n], x[:, n:]
        x = torch.cat([text * (1 + t_scale) + t_shift, video * (1 + v_scale) + v_shift], dim=1)
        gate = torch.cat([t_gate.expand_as(text), v_gate.expand_as(video)], dim=1)
        return x, gate


class CogBlock(nn.Module):
    """Attention, then `middle` if given, then feed-forward, each with its residual."""

    def __init__(self, dim: int, heads: int, time_dim: int):
        super().__init__()
        self.norm1, self.attn1 = ExpertNorm(dim, time_dim), Attention(dim, heads)
        self.norm2, self.ff = ExpertNorm(dim, time_dim), FeedForward(dim)

    def forward(self, x: Tensor, condition: Condition, middle=None) -> Tensor:
        h, gate = self.norm1(x, condition)
        x = x + gate * self.attn1(h, condition.rope)
        if middle is not None:  # the Refinement Expert Block of the last physical block sits here
            x = middle(x)
        h, gate = self.norm2(x, condition)
        return x + gate * self.ff(h)

    @torch.no_grad()
    def attention_map(self, x: Tensor, condition: Condition) -> Tensor:
        """How much each video token looks at each text token, (B, h, N, L), rows of the full softmax. For
        evaluation."""
        n = condition.n_text
        q, k = self.attn1.queries_keys(self.norm1(x, condition)[0], condition.rope)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)[:, :, n:, :n]


class CogVideoX(nn.Module):
    """`prediction = backbone(x, t, text, text_length)`: x (B, C, F, H, W), t (B,) 0..1000, text ids (B, L) with 0 =
    padding."""

    def __init__(self, cfg, vocabulary: int, channels: int = 3):
        super().__init__()
        self.cfg, self.text_dim = cfg, cfg.dim
        patch_dim = channels * cfg.patch_t * cfg.patch**2
        self.patch_proj = nn.Linear(patch_dim, cfg.dim)
        self.text_encoder = TextEncoder(vocabulary, cfg.dim, cfg.heads, cfg.text_depth)
        self.position_gain = nn.Parameter(torch.full((cfg.dim,), 0.3))
        self.time_embedding = nn.Sequential(
            nn.Linear(cfg.dim, cfg.time_dim), nn.SiLU(), nn.Linear(cfg.time_dim, cfg.time_dim))
        self.blocks = nn.ModuleList(CogBlock(cfg.dim, cfg.heads, cfg.time_dim) for _ in range(cfg.depth))
        self.norm_final, self.norm_out = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)  # two in a row, as the original
        self.modulate_out = nn.Linear(cfg.time_dim, 2 * cfg.dim)
        self.proj_out = nn.Linear(cfg.dim, patch_dim)
        init_weights(self)

    def embed(self, x: Tensor, t: Tensor, text: Tensor, text_length: Tensor | None = None) -> tuple[Tensor, Condition]:
        """-> tokens (B, L + N, D) and the condition of this forward."""
        pt, p = self.cfg.patch_t, self.cfg.patch
        grid = (x.shape[2] // pt, x.shape[3] // p, x.shape[4] // p)
        video = self.patch_proj(patchify(x, pt, p))  # (B, N, D)
        y = self.text_encoder(text)  # (B, L, D)
        if text_length is None:
            text_length = (text > 0).sum(1)
        time = F.silu(self.time_embedding(sinusoid(t, self.cfg.dim)))  # (B, D_time)
        n = text.shape[1]
        rope = rope_3d(grid, n, self.cfg.dim // self.cfg.heads, x.device)
        # CogVideoX-2B adds sines and cosines of the position, 5B rotates q and k by it. Both together (ours) tell left
        # from right sooner.
        video = video + self.position_gain * torch.cat(rope_3d(grid, 0, self.cfg.dim, x.device), dim=-1)
        tokens = torch.cat([y, video], dim=1)
        return tokens, Condition(time, rope, n, grid, y, text_length)

    def head(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens (B, S, D) -> prediction (B, C, F, H, W)."""
        shift, scale = self.modulate_out(condition.time)[:, None].chunk(2, dim=-1)
        video = self.norm_out(self.norm_final(tokens[:, condition.n_text :]))
        patches = self.proj_out(video * (1 + scale) + shift)  # (B, N, C pt p p)
        return unpatchify(patches, condition.grid, self.cfg.patch_t, self.cfg.patch)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_length: Tensor | None = None) -> Tensor:
        tokens, condition = self.embed(x, t, text, text_length)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.head(tokens, condition)


def init_weights(model: CogVideoX) -> None:
    """All initialisation in one place, last: Xavier everywhere, then zero where a fresh block must be the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.text_encoder.embedding.weight, std=0.3)
    zero = [model.modulate_out, model.proj_out] + [m.linear for m in model.modules() if isinstance(m, ExpertNorm)]
    zero += [linear for block in model.text_encoder.blocks for linear in (block.attn1.to_out, block.ff[2])]
    for linear in zero:  # adaLN-zero: every gate starts shut; words start as what they are, or captions are learned late
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)

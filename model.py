"""The video diffusion transformers: CogVideoX (Yang et al. 2024, arXiv 2408.06072) and Wan2.1 (arXiv 2503.20314).

                                      CogVideoX                                  Wan
    sequence              [text | video], joint attention          video; text beside it, by cross-attention
    modulation by time    each block its own linear, text and      one for all blocks, each adds its own table
                          video apart ("expert adaLN")
    norm of q and k       LayerNorm of each head                   RMSNorm across all heads

    x (B, C, F, H, W) --patchify--> video tokens --+
                                                   +--> blocks --> video tokens --head--> prediction
    text (B, L[, D_text]) ----------text tokens ---+

The two block classes share their leaves and no line of control flow, so that each can be read against its paper. The
same classes are the small models trained here and, with official weights in them (`load_pretrained`), the big ones.
Small models learn their words (`TextEncoder`); big ones get the output of a frozen T5.

The block contract, all that experts.py knows of a backbone:
    tokens, condition = backbone.embed(x, t, text, text_length)
    tokens = block(tokens, condition, middle=None)     attention, then middle(tokens) if given, then feed-forward
    prediction = backbone.head(tokens, condition)
`condition.n_text` says how many text tokens stand in front of the video tokens (none for Wan).

Left out on purpose: image-to-video variants, whose extra inputs would double each `embed`.

Letters: B batch, C channels, F H W video, N video tokens, L text tokens, S = n_text + N, D width, h heads, d = D / h.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config


@dataclass
class Condition:
    """What blocks and head need beside the tokens."""

    time: Tensor  # CogVideoX: (B, D_time) silu of the time embedding; Wan: (B, 6, D) the modulation all blocks share
    rope: tuple[Tensor, Tensor]  # cos, sin (S, d / 2)
    n_text: int  # text tokens in front of the video tokens
    grid: tuple[int, int, int]  # video tokens along time, height, width
    text: Tensor  # (B, L, D_text) the text embedding y, as the semantic router reads it
    text_length: Tensor  # (B,) real tokens of y; the rest is padding
    context: Tensor | None = None  # Wan: (B, L, D) the text that cross-attention reads
    time_out: Tensor | None = None  # Wan: (B, 1, D) the time embedding itself, for the head


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
    """(B,) in the lineage's own unit (0..1000) -> (B, dim) float32, cosines first as both lineages have them."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channel pairs (0, 1), (2, 3) ... of x (B, h, S, d) by the angles of their position."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, h, S, d). On a CPU, where sequences are short, the formula itself beats the
    fused kernel, whose backward is slow; of long ones it could not hold the S x S scores."""
    if q.device.type == "cpu" and k.shape[-2] <= 1024:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class HeadNorm(nn.LayerNorm):
    """LayerNorm of each head's d channels, one set of weights for all heads: (B, S, D) -> (B, S, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, *self.normalized_shape))).flatten(-2)


class LayerNorm32(nn.LayerNorm):
    """LayerNorm computed, and returned, in float32 whatever the tokens and weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Attention of x over itself, or over a context: q and k normed as the lineage does it, then rotated."""

    def __init__(self, dim: int, heads: int, norm=HeadNorm):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = norm(dim, heads), norm(dim, heads)
        self.to_out = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, S, D) -> (B, h, S, d)

    def queries_keys(self, x: Tensor, rope=None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q = self.split(self.norm_q(self.to_q(x)))
        k = self.split(self.norm_k(self.to_k(x if context is None else context)))
        return (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))  # a context has no place in the video

    def forward(self, x: Tensor, rope=None, context: Tensor | None = None) -> Tensor:
        q, k = self.queries_keys(x, rope, context)
        v = self.split(self.to_v(x if context is None else context))
        return self.to_out(attend(q.type_as(v), k.type_as(v), v).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, inner: int):
        super().__init__(nn.Linear(dim, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, dim))


# --- positions --------------------------------------------------------------------------------------------------------
def turns(at: Tensor, channels: int, base: float = 10_000) -> Tensor:
    """By how much RoPE turns each pair of channels at the places `at` (n,) of one axis: (n, channels / 2)."""
    return at[:, None] * (1 / base ** (torch.arange(0, channels, 2, dtype=at.dtype) / channels))


def over_grid(axes: list[Tensor]) -> Tensor:
    """One table an axis, (n_i, c_i) -> their rows side by side, for tokens in order t, h, w: (N, c_t + c_h + c_w)."""
    sizes = [len(axis) for axis in axes]
    shaped = [axis.view([-1 if i == j else 1 for j in range(3)] + [axis.shape[1]]) for i, axis in enumerate(axes)]
    return torch.cat([axis.expand(*sizes, -1) for axis in shaped], dim=-1).flatten(0, 2)


def integers(grid: tuple[int, int, int], dtype=torch.float32) -> list[Tensor]:
    return [torch.arange(n, dtype=dtype) for n in grid]


def fitted(grid: tuple[int, int, int], fit: tuple[int, int]) -> list[Tensor]:
    """CogVideoX-5B: rows and columns are fitted, aspect kept, into the grid it was trained on (30 x 45 tokens), so that
    other sizes see angles it knows. On that grid, and nowhere else, they are the integers."""
    (T, h, w), (H, W) = grid, fit
    rows, columns = (H, round(H / h * w)) if h / w > H / W else (round(W / w * h), W)
    top, left = round((H - rows) / 2), round((W - columns) / 2)
    return [torch.arange(T).float(), torch.linspace(top, (top + rows) * (h - 1) / h, h),
            torch.linspace(left, (left + columns) * (w - 1) / w, w)]


def cog_channels(d: int) -> tuple[int, int, int]:
    """Of d channels a quarter turns with time, 3/8 with height, 3/8 with width."""
    return d // 4, 3 * d // 8, 3 * d // 8


def wan_channels(d: int) -> tuple[int, int, int]:
    """Of 128 channels 44 turn with time, 42 with height, 42 with width."""
    third = 2 * (d // 6)
    return d - 2 * third, third, third


def rotation(at: list[Tensor], channels: tuple[int, int, int]) -> Tensor:
    """Angles (N, d / 2) of the tokens at the places of three axes."""
    return over_grid([turns(places, part) for places, part in zip(at, channels)])


def sines(grid: tuple[int, int, int], dim: int) -> Tensor:
    """CogVideoX-2B's table (N, D): sines, then cosines of time (D / 4), WIDTH (3 D / 8) and then height. Rows and
    columns are 1.875 times closer together than the integers."""
    def wave(at, channels):
        angles = at.double()[:, None] / 10_000 ** (torch.arange(channels // 2).double() / (channels // 2))
        return torch.cat([angles.sin(), angles.cos()], dim=1)
    (t, h, w), (d_t, d_h, d_w) = integers(grid), cog_channels(dim)
    table = over_grid([wave(t, d_t), wave(h / 1.875, d_h), wave(w / 1.875, d_w)])
    time, height, width = table.split([d_t, d_h, d_w], dim=1)
    return torch.cat([time, width, height], dim=1).float()


@lru_cache(maxsize=8)
def positions(cfg: Config, grid: tuple[int, int, int], n_text: int, device: torch.device):
    """-> what is added to the video tokens, (N, D) or None, and the rotation of all tokens, cos and sin (S, d / 2).

    Text rows have angle zero, an exact identity, so that no block needs to cut the sequence apart. Angles are float32
    for CogVideoX and float64 for Wan, as in their references: at place 80 that is a difference of 1e-5.
    """
    with torch.device("cpu"):  # not on the meta device, where a model may be laid out just now
        added, angles = places(cfg, grid)
        angles = F.pad(angles, (0, 0, n_text, 0))
        cos, sin = angles.cos().float(), angles.sin().float()
    return None if added is None else added.to(device), (cos.to(device), sin.to(device))


def places(cfg: Config, grid: tuple[int, int, int]) -> tuple[Tensor | None, Tensor]:
    """What is added to the video tokens (N, D), and their angles (N, d / 2), by the rule that cfg.positions names."""
    d, added = cfg.dim // cfg.heads, None
    if cfg.positions == "fitted":
        angles = rotation(fitted(grid, (cfg.fit_height, cfg.fit_width)), cog_channels(d))
    elif cfg.lineage == "wan":
        angles = rotation(integers(grid, torch.float64), wan_channels(d))
    else:
        angles = rotation(integers(grid), cog_channels(d))
    if cfg.positions == "sincos":
        added, angles = sines(grid, cfg.dim), torch.zeros_like(angles)
    elif cfg.positions == "both":
        wide = rotation(integers(grid), cog_channels(cfg.dim))  # (N, D / 2)
        added = torch.cat([wide.cos(), wide.sin()], dim=-1)
    return added, angles


# --- words, for models trained here -----------------------------------------------------------------------------------
class TextBlock(nn.Module):
    """A plain pre-norm transformer block."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.ff = nn.LayerNorm(dim), FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor, rope) -> Tensor:
        x = x + self.attn1(self.norm1(x), rope)
        return x + self.ff(self.norm2(x))


@lru_cache(maxsize=8)
def rope_of_words(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin (n, d / 2) of the words of a caption. They are few: with the usual base half of the channels would
    hardly turn, and which word stands next to which is then learned too late."""
    angles = turns(torch.arange(n).double(), d, base=10).float()
    return angles.cos().to(device), angles.sin().to(device)


class TextEncoder(nn.Module):
    """Words in context: ids (B, L) -> y (B, L, D). Trained along, where the official models have a frozen T5.

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
        rope = rope_of_words(text.shape[1], x.shape[-1] // self.heads, x.device)
        for block in self.blocks:
            x = block(x, rope)
        return x


class Backbone(nn.Module):
    """What both lineages have in common: text in, position added, one block after the other."""

    def __init__(self, cfg: Config, vocabulary: int):
        super().__init__()
        self.cfg, self.text_dim = cfg, cfg.text_dim or cfg.dim
        self.patch_proj = nn.Linear(cfg.channels * cfg.patch_t * cfg.patch**2, cfg.dim)
        learned = cfg.text_dim == 0
        self.text_encoder = TextEncoder(vocabulary, cfg.dim, cfg.heads, cfg.text_depth) if learned else None
        # CogVideoX-2B adds sines and cosines of the position, all others rotate q and k by it. Both together (ours)
        # tell left from right sooner.
        self.position_gain = nn.Parameter(torch.full((cfg.dim,), 0.3)) if cfg.positions == "both" else 1

    def read(self, x: Tensor, text: Tensor, text_length: Tensor | None, n_text: int):
        """-> video tokens with their position (B, N, D), rope, grid, y (B, L, D_text), its lengths (B,)."""
        pt, p = self.cfg.patch_t, self.cfg.patch
        grid = (x.shape[2] // pt, x.shape[3] // p, x.shape[4] // p)
        added, rope = positions(self.cfg, grid, n_text, x.device)
        video = self.patch_proj(patchify(x, pt, p))
        if added is not None:
            video = video + (self.position_gain * added).type_as(video)
        if text_length is None:
            real = text > 0 if self.text_encoder else torch.ones(text.shape[:2], device=x.device)
            text_length = real.sum(1)
        return video, rope, grid, self.text_encoder(text) if self.text_encoder else text, text_length

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_length: Tensor | None = None) -> Tensor:
        """x (B, C, F, H, W), t (B,) in the lineage's unit, text ids (B, L) with 0 = padding or embeddings (B, L,
        D_text) -> prediction, shaped as x."""
        tokens, condition = self.embed(x, t, text, text_length)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.head(tokens, condition)


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
    """Attention, then `middle` if given, then feed-forward, each with its residual. All on x = [text | video]:

    1. L1(c): shift, scale, gate of the video, then of the text; c = silu(time embedding)
    2. h = LN1(x) (1 + scale) + shift: one LN for all tokens, each stream's own shift and scale
    3. q, k, v = Linear(h); q and k: LN of each head, then RoPE on the video; o = Linear(softmax(q k^T / sqrt(d)) v)
    4. x = x + gate o, each stream's own gate
    5. x = middle(x), ours
    6. h, gate: steps 1 and 2 again, with L2 and LN2
    7. x = x + gate W2 gelu(W1 h), the same weights for both streams
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.norm1, self.attn1 = ExpertNorm(cfg.dim, cfg.time_dim), Attention(cfg.dim, cfg.heads)
        self.norm2, self.ff = ExpertNorm(cfg.dim, cfg.time_dim), FeedForward(cfg.dim, cfg.ffn or 4 * cfg.dim)

    def forward(self, x: Tensor, condition: Condition, middle=None) -> Tensor:
        h, gate = self.norm1(x, condition)  # 1, 2 (ExpertNorm)
        x = x + gate * self.attn1(h, condition.rope)  # 3 (Attention), 4
        if middle is not None:  # 5: the Refinement Expert Block of the last physical block sits here
            x, found = middle(x)
        h, gate = self.norm2(x, condition)  # 6
        x = x + gate * self.ff(h)  # 7
        return x if middle is None else (x, found)

    @torch.no_grad()
    def attention_map(self, x: Tensor, condition: Condition) -> Tensor:
        """How much each video token looks at each text token, (B, h, N, L), rows of the full softmax. For
        evaluation."""
        n = condition.n_text
        q, k = self.attn1.queries_keys(self.norm1(x, condition)[0], condition.rope)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)[:, :, n:, :n]


class CogVideoX(Backbone):
    """t is 0..999 (the integer step of the official models), text is [226 tokens of T5, padding and all]."""

    def __init__(self, cfg: Config, vocabulary: int = 0):
        super().__init__(cfg, vocabulary)
        self.text_proj = nn.Linear(cfg.text_dim, cfg.dim) if cfg.text_dim else nn.Identity()
        self.time_embedding = nn.Sequential(
            nn.Linear(cfg.dim, cfg.time_dim), nn.SiLU(), nn.Linear(cfg.time_dim, cfg.time_dim))
        self.blocks = nn.ModuleList(CogBlock(cfg) for _ in range(cfg.depth))
        self.norm_final, self.norm_out = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)  # two in a row, as the original
        self.modulate_out = nn.Linear(cfg.time_dim, 2 * cfg.dim)
        self.proj_out = nn.Linear(cfg.dim, self.patch_proj.in_features)

    def embed(self, x: Tensor, t: Tensor, text: Tensor, text_length: Tensor | None = None) -> tuple[Tensor, Condition]:
        """-> tokens (B, L + N, D) and the condition of this forward."""
        n = text.shape[1]
        video, rope, grid, y, text_length = self.read(x, text, text_length, n)
        time = F.silu(self.time_embedding(sinusoid(t, self.cfg.dim).type_as(video)))  # (B, D_time)
        tokens = torch.cat([self.text_proj(y).type_as(video), video], dim=1)
        return tokens, Condition(time, rope, n, grid, y, text_length)

    def head(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens (B, S, D) -> prediction (B, C, F, H, W)."""
        shift, scale = self.modulate_out(condition.time)[:, None].chunk(2, dim=-1)
        video = self.norm_out(self.norm_final(tokens[:, condition.n_text :]))
        patches = self.proj_out(video * (1 + scale) + shift)  # (B, N, C pt p p)
        return unpatchify(patches, condition.grid, self.cfg.patch_t, self.cfg.patch)

    def start_as_identity(self) -> list[nn.Module]:
        """adaLN-zero: the layers that begin at zero, so that every gate of a fresh model is shut."""
        return [self.modulate_out, self.proj_out] + [m.linear for m in self.modules() if isinstance(m, ExpertNorm)]


# --- Wan --------------------------------------------------------------------------------------------------------------
class WanBlock(nn.Module):
    """Self-attention, cross-attention to the text, `middle` if given, feed-forward, each with its residual:

    1. s1, c1, g1, s2, c2, g2 = table + m: shift, scale, gate of attention, then of feed-forward; all blocks share m
    2. h = LN(x) (1 + c1) + s1
    3. q, k, v = Linear(h); q and k: RMSNorm across all heads, then RoPE; o = Linear(softmax(q k^T / sqrt(d)) v)
    4. x = x + g1 o
    5. x = x + the same of q from LN_affine(x), k and v from the text: no RoPE, no gate, no modulation
    6. x = middle(x), ours
    7. h = LN(x) (1 + c2) + s2
    8. x = x + g2 W2 gelu(W1 h)

    Modulation and the gated sums (1, 2, 4, 7, 8) are float32 whatever the weights are, as in the original.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        dim, norm = cfg.dim, lambda dim, heads: nn.RMSNorm(dim, eps=1e-6)  # across all heads
        self.table = nn.Parameter(torch.randn(1, 6, dim) * dim**-0.5)
        self.norm1, self.attn1 = LayerNorm32(dim, 1e-6, elementwise_affine=False), Attention(dim, cfg.heads, norm)
        self.norm2, self.attn2 = LayerNorm32(dim, 1e-6), Attention(dim, cfg.heads, norm)
        self.norm3, self.ff = LayerNorm32(dim, 1e-6, elementwise_affine=False), FeedForward(dim, cfg.ffn or 4 * dim)

    def modulation(self, condition: Condition) -> tuple[Tensor, ...]:
        """Shift, scale, gate of self-attention, then of feed-forward; (B, 1, D) float32 each."""
        return (self.table.float() + condition.time.float()).chunk(6, dim=1)

    def look(self, x: Tensor, condition: Condition) -> Tensor:
        """Self-attention with its residual."""
        shift, scale, gate, *_ = self.modulation(condition)  # 1: s1, c1, g1
        h = (self.norm1(x) * (1 + scale) + shift).type_as(x)  # 2
        return (x.float() + gate * self.attn1(h, condition.rope)).type_as(x)  # 3, 4

    def forward(self, x: Tensor, condition: Condition, middle=None) -> Tensor:
        *_, shift, scale, gate = self.modulation(condition)  # 1: s2, c2, g2
        x = self.look(x, condition)  # 1 to 4
        x = x + self.attn2(self.norm2(x).type_as(x), context=condition.context)  # 5
        if middle is not None:  # 6
            x, found = middle(x)
        h = (self.norm3(x) * (1 + scale) + shift).type_as(x)  # 7
        x = (x.float() + gate * self.ff(h)).type_as(x)  # 8
        return x if middle is None else (x, found)

    @torch.no_grad()
    def attention_map(self, x: Tensor, condition: Condition) -> Tensor:
        """How much each video token looks at each text token, (B, h, N, L). For evaluation."""
        h = self.norm2(self.look(x, condition)).type_as(x)
        q, k = self.attn2.queries_keys(h, context=condition.context)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class Wan(Backbone):
    """t is 1000 sigma, text is [512 tokens of umT5, zeros where there is padding, which are attended]."""

    def __init__(self, cfg: Config, vocabulary: int = 0):
        super().__init__(cfg, vocabulary)
        dim = cfg.dim
        self.text_proj = nn.Sequential(nn.Linear(self.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(WanBlock(cfg) for _ in range(cfg.depth))
        self.norm_out = LayerNorm32(dim, 1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(1, 2, dim) * dim**-0.5)
        self.proj_out = nn.Linear(dim, self.patch_proj.in_features)

    def embed(self, x: Tensor, t: Tensor, text: Tensor, text_length: Tensor | None = None) -> tuple[Tensor, Condition]:
        """-> tokens (B, N, D) and the condition of this forward."""
        video, rope, grid, y, text_length = self.read(x, text, text_length, 0)
        time = self.time_embedding(sinusoid(t, self.cfg.freq_dim).to(self.time_embedding[0].weight)).type_as(video)
        shared = self.time_proj(F.silu(time)).unflatten(1, (6, -1))  # once for all blocks
        context = self.text_proj(y.type_as(video))
        return video, Condition(shared, rope, 0, grid, y, text_length, context, time[:, None])

    def head(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens (B, N, D) -> prediction (B, C, F, H, W). Modulated by the time embedding itself: no SiLU, no
        projection."""
        shift, scale = (self.table + condition.time_out).chunk(2, dim=1)
        patches = self.proj_out((self.norm_out(tokens) * (1 + scale) + shift).type_as(tokens))
        return unpatchify(patches, condition.grid, self.cfg.patch_t, self.cfg.patch)

    def start_as_identity(self) -> list[nn.Module]:
        """With the tables at zero too, every gate of a fresh model is shut; cross-attention has none."""
        for table in (self.table, *(block.table for block in self.blocks)):
            nn.init.zeros_(table)
        return [self.time_proj, self.proj_out] + [block.attn2.to_out for block in self.blocks]

MODELS = {"cogvideox": CogVideoX, "wan": Wan}


def build_backbone(cfg: Config, vocabulary: int = 0) -> Backbone:
    """A fresh backbone of the config's lineage. All initialisation in one place: Xavier everywhere, then zero where a
    fresh block must be the identity."""
    model = MODELS[cfg.lineage](cfg, vocabulary)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    zero = model.start_as_identity()
    if model.text_encoder:
        nn.init.normal_(model.text_encoder.embedding.weight, std=0.3)
        # Words start as what they are; drowned in a random context, they would be learned late.
        zero += [linear for block in model.text_encoder.blocks for linear in (block.attn1.to_out, block.ff[2])]
    for linear in zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model

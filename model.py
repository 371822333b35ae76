"""The video diffusion transformers: CogVideoX (arXiv 2408.06072) and Wan2.1 (arXiv 2503.20314).

                            CogVideoX                          Wan
    sequence                [text | video], joint attention    video; text by cross-attention
    modulation by time      a linear layer in each block,      one for all blocks, to which each
                            text and video apart               adds its own table
    norm of q and k         LayerNorm of each head             RMSNorm across all heads

The two block classes share their leaves and no line of control flow, so that each can be read
beside its paper. The same classes are the small models trained here, which learn their words
(`TextEncoder`), and with official weights in them (official/weights.py) the big ones, whose words
come from a frozen T5. Image-to-video is left out: its inputs would double each `embed`.

The block contract, which a new backbone has to keep (experts.py uses nothing else):
    tokens, condition = backbone.embed(x, t, text, text_length)     patches, places, words
    tokens = block(tokens, condition)                   attention, then feed-forward
    tokens, found = block(tokens, condition, middle)    between them: tokens, found = middle(tokens)
    prediction = backbone.head(tokens, condition)       shaped as x
    text, text_length = backbone.encode_text(text, text_length)     as `condition` has them
`condition` has n_text (text tokens in front of the video tokens, none for Wan), grid, text and
text_length; the backbone has `blocks` and `text_dim`. common/optim.py tells matrices by `blocks.`.

Letters: B batch, C channels, F H W video, f h w grid of video tokens, N = f h w of them, L text
tokens, S = n_text + N, D width, d = D / heads. `t` is diffusion time, never a place in the clip.
"""
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config

Grid = tuple[int, int, int]  # video tokens along time, height, width
Rope = tuple[Tensor, Tensor]  # cos and sin of the angles by which q and k turn, (S, d / 2) each


@dataclass
class Condition:
    """What blocks and head need beside the tokens."""
    time: Tensor  # CogVideoX: (B, D_time) silu of the time embedding; Wan: (B, 6, D) modulation
    rope: Rope
    n_text: int  # text tokens in front of the video tokens
    grid: Grid
    text: Tensor  # (B, L, D_text) the text embedding y, as the semantic router reads it
    text_length: Tensor  # (B,) real tokens of y; the rest is padding
    context: Tensor | None = None  # Wan: (B, L, D) the text that cross-attention reads
    time_out: Tensor | None = None  # Wan: (B, 1, D) the time embedding itself, for the head


# --- shared leaves ----------------------------------------------------------------------------
def patchify(x: Tensor, pt: int, p: int) -> Tensor:
    """(B, C, F, H, W) -> (B, N, C pt p p), tokens by time, row, column. With pt = 2 and p = 8:
    (4, 3, 8, 32, 32) -> (4, 64, 384), which are 4 x 4 x 4 tokens of 3 x 2 x 8 x 8 numbers."""
    x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, pt))
    # (B, C, f, pt, h, p, w, p) -> (B, f, h, w, C, pt, p, p) -> (B, N, C pt p p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: Grid, pt: int, p: int) -> Tensor:
    """(B, N, C pt p p) -> (B, C, F, H, W), the inverse of patchify."""
    f, h, w = grid
    x = tokens.unflatten(1, grid).unflatten(-1, (-1, pt, p, p))  # (B, f, h, w, C, pt, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(x), -1, f * pt, h * p, w * p)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Time (B,) in the lineage's own unit (0..1000) -> (B, dim) float32, cosines first."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # float32, as the official weights were trained
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn the channel pairs (0, 1), (2, 3) ... of x (B, heads, S, d) by their places' angles."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, S, d / 2) each
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)): two of (B, heads, S, d) -> (B, heads, S, S)."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, heads, S, d)."""
    # On a CPU short sequences are quicker without the fused kernel (docs/results.md has the times).
    if q.device.type == "cpu" and k.shape[-2] <= (450 if q.dtype == torch.bfloat16 else 128):
        return attention_weights(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


def mlp(into: int, inner: int, out: int, activation: nn.Module | None = None) -> nn.Sequential:
    """Two linear layers with an activation between them."""
    between = activation or nn.GELU(approximate="tanh")
    return nn.Sequential(nn.Linear(into, inner), between, nn.Linear(inner, out))


class LayerNorm32(nn.LayerNorm):
    """LayerNorm computed, and returned, in float32 whatever tokens and weights are stored in."""
    def __init__(self, dim: int, affine: bool = False):
        super().__init__(dim, eps=1e-6, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class HeadNorm(nn.LayerNorm):
    """LayerNorm of each head by itself: (B, S, D) -> (B, S, D), where d channels are a head."""
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, *self.normalized_shape))).flatten(-2)


class Attention(nn.Module):
    """Attention of x to itself, or to a context. The norm of q and k sees each head, or all."""
    def __init__(self, dim: int, heads: int, across_heads: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        width, norm = (dim, nn.RMSNorm) if across_heads else (dim // heads, HeadNorm)
        self.norm_q, self.norm_k = (norm(width, eps=1e-6) for _ in range(2))
        self.to_out = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, S, D) -> (B, heads, S, d)

    def queries_keys(self, x: Tensor, rope=None, context=None) -> tuple[Tensor, Tensor]:
        q = self.split(self.norm_q(self.to_q(x)))
        k = self.split(self.norm_k(self.to_k(x if context is None else context)))
        return (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))

    def forward(self, x: Tensor, rope=None, context=None) -> Tensor:
        q, k = self.queries_keys(x, rope, context)
        v = self.split(self.to_v(x if context is None else context))
        out = attend(q.type_as(v), k.type_as(v), v)  # a norm may have made q and k float32
        return self.to_out(out.transpose(1, 2).flatten(2))


# --- positions --------------------------------------------------------------------------------
def rope_angles(places: Tensor, channels: int, base: float = 10_000) -> Tensor:
    """By how much RoPE turns each pair of channels at places (n,) of an axis: (n, channels / 2)."""
    exponents = torch.arange(0, channels, 2, dtype=places.dtype) / channels
    return places[:, None] * (1 / base**exponents)


def grid_angles(axes: list[Tensor], channels: Grid) -> Tensor:
    """Places along three axes, and how many channels each of them turns -> angles (N, d / 2). On a
    grid of 3 x 2 x 5, row 17 = (1 * 2 + 1) * 5 + 2 is of the token at time 1, row 1, column 2."""
    places = torch.cartesian_prod(*axes).T  # (3, N): time, row and column of every token
    return torch.cat([rope_angles(at, part) for at, part in zip(places, channels)], dim=1)


def integers(grid: Grid) -> list[Tensor]:
    """Places 0, 1, 2 ... along each axis."""
    return [torch.arange(n).float() for n in grid]


def fitted(grid: Grid, fit: tuple[int, int]) -> list[Tensor]:
    """CogVideoX-5B: rows and columns are fitted, aspect kept, into the grid it was trained on
    (30 x 45), so that other sizes see angles it knows. On that grid alone they are integers."""
    (f, h, w), (H, W) = grid, fit
    rows, columns = (H, round(H / h * w)) if h / w > H / W else (round(W / w * h), W)
    top, left = round((H - rows) / 2), round((W - columns) / 2)
    return [torch.arange(f).float(), torch.linspace(top, (top + rows) * (h - 1) / h, h),
            torch.linspace(left, (left + columns) * (w - 1) / w, w)]


def cog_channels(d: int) -> Grid:
    """Of d channels a quarter turns with time, 3/8 with height, 3/8 with width."""
    return d // 4, 3 * d // 8, 3 * d // 8


def wan_channels(d: int) -> Grid:
    """Of 128 channels 44 turn with time, 42 with height, 42 with width."""
    third = 2 * (d // 6)
    return d - 2 * third, third, third


def sincos_table(grid: Grid, dim: int) -> Tensor:
    """CogVideoX-2B's table (N, D): sines, then cosines of time (D / 4), WIDTH (3 D / 8), height."""
    time, height, width = torch.cartesian_prod(*integers(grid)).T  # (N,) each
    parts = []
    # Rows and columns are 1.875 times as close together as the tokens are.
    for places, part in zip((time, width / 1.875, height / 1.875), cog_channels(dim)):
        angles = rope_angles(places.double(), part)
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()


def position_tables(cfg: Config, grid: Grid) -> tuple[Tensor | None, Tensor]:
    """What is added to the video tokens (N, D), and their angles (N, d / 2), as cfg.positions says.
    CogVideoX-2B adds a table and all others turn q and k; "both" (ours) learns sides sooner."""
    d = cfg.dim // cfg.heads
    places, channels = integers(grid), cog_channels(d)
    if cfg.positions == "fitted":
        places = fitted(grid, (cfg.fit_height, cfg.fit_width))
    elif cfg.lineage == "wan":
        places, channels = [axis.double() for axis in places], wan_channels(d)  # as in the original
    angles = grid_angles(places, channels)
    if cfg.positions == "sincos":
        return sincos_table(grid, cfg.dim), torch.zeros_like(angles)
    if cfg.positions == "both":
        wide = grid_angles(integers(grid), cog_channels(cfg.dim))  # (N, D / 2)
        return torch.cat([wide.cos(), wide.sin()], dim=-1), angles
    return None, angles


@lru_cache(maxsize=8)
def positions(cfg: Config, grid: Grid, n_text: int, device: torch.device):
    """-> what is added to the video tokens, (N, D) or None, and the rope of all S tokens. Text
    tokens have angle zero, an exact identity, so that no block needs to cut the sequence apart."""
    with torch.device("cpu"):  # not on the meta device, where a model may be laid out just now
        added, angles = position_tables(cfg, grid)
        angles = F.pad(angles, (0, 0, n_text, 0))  # (S, d / 2)
        cos, sin = angles.cos().float(), angles.sin().float()
    return None if added is None else added.to(device), (cos.to(device), sin.to(device))


# --- words, for models trained here -----------------------------------------------------------
class TextBlock(nn.Module):
    """A plain pre-norm transformer block."""
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ff = mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.attn1(self.norm1(x), rope)
        return x + self.ff(self.norm2(x))


@lru_cache(maxsize=8)
def rope_of_words(n: int, d: int, device: torch.device) -> Rope:
    """cos, sin (n, d / 2) of the words of a caption. They are few: with the usual base half of the
    channels would hardly turn, and which word stands next to which is then learned too late."""
    angles = rope_angles(torch.arange(n).double(), d, base=10).float()
    return angles.cos().to(device), angles.sin().to(device)


class TextEncoder(nn.Module):
    """Words in context: ids (B, L) -> y (B, L, D). Without it the video tokens would have to find
    out which thing is "red" and which is "left", and that takes several times as many steps. As
    with T5 in CogVideoX, padding is not masked."""

    def __init__(self, vocabulary: int, cfg: Config):
        super().__init__()
        self.d = cfg.dim // cfg.heads
        self.embedding = nn.Embedding(vocabulary, cfg.dim)
        self.blocks = nn.ModuleList(TextBlock(cfg.dim, cfg.heads) for _ in range(cfg.text_depth))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)  # (B, L, D)
        rope = rope_of_words(text.shape[1], self.d, x.device)
        for block in self.blocks:
            x = block(x, rope)
        return x


class Backbone(nn.Module):
    """What both lineages have in common: text in, position added, one block after the other."""
    def __init__(self, cfg: Config, vocabulary: int):
        super().__init__()
        self.cfg = cfg
        self.text_dim = cfg.text_dim or cfg.dim
        self.patch_proj = nn.Linear(cfg.channels * cfg.patch_t * cfg.patch**2, cfg.dim)
        # Without a foreign encoder, whose width text_dim would be, words are learned here.
        self.text_encoder = None if cfg.text_dim else TextEncoder(vocabulary, cfg)
        both = cfg.positions == "both"
        self.position_gain = nn.Parameter(torch.full((cfg.dim,), 0.3)) if both else 1

    def video_tokens(self, x: Tensor, n_text: int) -> tuple[Tensor, Rope, Grid]:
        """Clips -> tokens with their position (B, N, D), the rope of all tokens, the grid."""
        pt, p = self.cfg.patch_t, self.cfg.patch
        grid = (x.shape[2] // pt, x.shape[3] // p, x.shape[4] // p)
        added, rope = positions(self.cfg, grid, n_text, x.device)
        video = self.patch_proj(patchify(x, pt, p))
        if added is not None:
            video = video + (self.position_gain * added).type_as(video)
        return video, rope, grid

    def encode_text(self, text: Tensor, text_length: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids or embeddings -> y (B, L, D_text), and how many of its rows are real (B,)."""
        if text_length is None:  # float32 for embeddings, so that their mean is not taken in bf16
            real = text > 0 if self.text_encoder else torch.ones(text.shape[:2], device=text.device)
            text_length = real.sum(1)
        return self.text_encoder(text) if self.text_encoder else text, text_length

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_length=None) -> Tensor:
        """x (B, C, F, H, W), t (B,) in the lineage's unit, text ids (B, L), where 0 is padding, or
        embeddings (B, L, D_text) -> prediction, shaped as x."""
        tokens, condition = self.embed(x, t, text, text_length)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.head(tokens, condition)


# --- CogVideoX --------------------------------------------------------------------------------
class ExpertNorm(nn.Module):
    """Expert adaLN: one LayerNorm for all tokens, then text and video have their own shift and
    scale."""
    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 6 * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> modulated (B, S, D), gate (B, S, D)."""
        chunks = self.linear(condition.time)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        v_shift, v_scale, v_gate, t_shift, t_scale, t_gate = chunks  # video first, in checkpoints
        x = self.norm(x)
        text, video = x[:, : condition.n_text], x[:, condition.n_text :]
        x = torch.cat([text * (1 + t_scale) + t_shift, video * (1 + v_scale) + v_shift], dim=1)
        return x, torch.cat([t_gate.expand_as(text), v_gate.expand_as(video)], dim=1)


class CogBlock(nn.Module):
    """Attention, `middle` if given, feed-forward, each with its residual, on x = [text | video].

    1. L1(c): shift, scale, gate of the video, then of the text; c = silu(time embedding)
    2. z = LN1(x) (1 + scale) + shift: one LN for all tokens, shift and scale of text or video
    3. o = Linear(softmax(q k^T / sqrt(d)) v) of z; q and k: LN of each head, RoPE on the video
    4. x = x + gate o, with the gate of text or video
    5. x, found = middle(x), ours
    6. z, gate: steps 1 and 2 again, with L2 and LN2
    7. x = x + gate W2 gelu(W1 z), the same weights for text and video
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.norm1 = ExpertNorm(cfg.dim, cfg.time_dim)
        self.attn1 = Attention(cfg.dim, cfg.heads)
        self.norm2 = ExpertNorm(cfg.dim, cfg.time_dim)
        self.ff = mlp(cfg.dim, cfg.ffn or 4 * cfg.dim, cfg.dim)

    def forward(self, x: Tensor, condition: Condition, middle=None):
        z, gate = self.norm1(x, condition)  # 1, 2 (ExpertNorm)
        x = x + gate * self.attn1(z, condition.rope)  # 3 (Attention), 4
        if middle is not None:  # 5: the Refinement Expert Block of the last physical block
            x, found = middle(x)
        z, gate = self.norm2(x, condition)  # 6
        x = x + gate * self.ff(z)  # 7
        return x if middle is None else (x, found)

    @torch.no_grad()
    def attention_map(self, x: Tensor, condition: Condition) -> Tensor:
        """How much each video token looks at each text token, (B, heads, N, L), for evaluation."""
        n = condition.n_text
        q, k = self.attn1.queries_keys(self.norm1(x, condition)[0], condition.rope)
        return attention_weights(q, k)[:, :, n:, :n]  # rows of the full softmax: they sum to < 1


class CogVideoX(Backbone):
    """t is 0..999 (the step of the official models), text is 226 tokens of T5, padding and all."""
    def __init__(self, cfg: Config, vocabulary: int = 0):
        super().__init__(cfg, vocabulary)
        dim = cfg.dim
        self.text_proj = nn.Linear(cfg.text_dim, dim) if cfg.text_dim else nn.Identity()
        self.time_embedding = mlp(dim, cfg.time_dim, cfg.time_dim, nn.SiLU())
        self.blocks = nn.ModuleList(CogBlock(cfg) for _ in range(cfg.depth))
        self.norm_final = nn.LayerNorm(dim)  # two norms in a row, as in the original
        self.norm_out = nn.LayerNorm(dim)
        self.modulate_out = nn.Linear(cfg.time_dim, 2 * dim)
        self.proj_out = nn.Linear(dim, self.patch_proj.in_features)

    def embed(self, x: Tensor, t: Tensor, text: Tensor, text_length=None):
        """-> tokens (B, L + N, D) and the Condition of this forward."""
        n_text = text.shape[1]
        video, rope, grid = self.video_tokens(x, n_text)
        y, text_length = self.encode_text(text, text_length)
        time = F.silu(self.time_embedding(sinusoid(t, self.cfg.dim).type_as(video)))  # (B, D_time)
        tokens = torch.cat([self.text_proj(y).type_as(video), video], dim=1)
        return tokens, Condition(time, rope, n_text, grid, y, text_length)

    def head(self, tokens: Tensor, condition: Condition) -> Tensor:
        """Tokens (B, S, D) -> prediction (B, C, F, H, W)."""
        shift, scale = self.modulate_out(condition.time)[:, None].chunk(2, dim=-1)
        video = self.norm_out(self.norm_final(tokens[:, condition.n_text :]))
        patches = self.proj_out(video * (1 + scale) + shift)  # (B, N, C pt p p)
        return unpatchify(patches, condition.grid, self.cfg.patch_t, self.cfg.patch)


# --- Wan --------------------------------------------------------------------------------------
class WanBlock(nn.Module):
    """Self-attention, cross-attention to the text, `middle` if given, feed-forward.

    1. shift, scale, gate of attention (1), then of feed-forward (2) = table + m; all blocks share m
    2. z = LN(x) (1 + scale_1) + shift_1
    3. o = Linear(softmax(q k^T / sqrt(d)) v) of z; q and k: RMSNorm across all heads, then RoPE
    4. x = x + gate_1 o
    5. x = x + the same of q from LN_affine(x), k and v from the text: no RoPE, gate or modulation
    6. x, found = middle(x), ours
    7. z = LN(x) (1 + scale_2) + shift_2
    8. x = x + gate_2 W2 gelu(W1 z)

    Modulation and gated sums (1, 2, 4, 7, 8) are float32 for any weights, as in the original.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        dim = cfg.dim
        self.table = nn.Parameter(torch.randn(1, 6, dim) * dim**-0.5)
        self.norm1 = LayerNorm32(dim)
        self.attn1 = Attention(dim, cfg.heads, across_heads=True)
        self.norm2 = LayerNorm32(dim, affine=True)
        self.attn2 = Attention(dim, cfg.heads, across_heads=True)
        self.norm3 = LayerNorm32(dim)
        self.ff = mlp(dim, cfg.ffn or 4 * dim, dim)

    def self_attention(self, x: Tensor, condition: Condition) -> tuple[Tensor, list[Tensor]]:
        """Steps 1 to 4 -> x; shift, scale, gate of the feed-forward, (B, 1, D) float32 each."""
        modulation = self.table.float() + condition.time.float()  # (B, 6, D)
        shift, scale, gate, *of_feed_forward = modulation.chunk(6, dim=1)  # 1
        z = (self.norm1(x) * (1 + scale) + shift).type_as(x)  # 2
        x = (x.float() + gate * self.attn1(z, condition.rope)).type_as(x)  # 3, 4
        return x, of_feed_forward

    def forward(self, x: Tensor, condition: Condition, middle=None):
        x, (shift, scale, gate) = self.self_attention(x, condition)  # 1 to 4
        x = x + self.attn2(self.norm2(x).type_as(x), context=condition.context)  # 5
        if middle is not None:  # 6: the Refinement Expert Block of the last physical block
            x, found = middle(x)
        z = (self.norm3(x) * (1 + scale) + shift).type_as(x)  # 7
        x = (x.float() + gate * self.ff(z)).type_as(x)  # 8
        return x if middle is None else (x, found)

    @torch.no_grad()
    def attention_map(self, x: Tensor, condition: Condition) -> Tensor:
        """How much each video token looks at each text token, (B, heads, N, L), for evaluation."""
        x, _ = self.self_attention(x, condition)
        z = self.norm2(x).type_as(x)
        return attention_weights(*self.attn2.queries_keys(z, context=condition.context))


class Wan(Backbone):
    """t is 1000 sigma, text is 512 tokens of umT5: zeros stand for padding, and are attended."""
    def __init__(self, cfg: Config, vocabulary: int = 0):
        super().__init__(cfg, vocabulary)
        dim = cfg.dim
        self.text_proj = mlp(self.text_dim, dim, dim)
        self.time_embedding = mlp(cfg.freq_dim, dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(WanBlock(cfg) for _ in range(cfg.depth))
        self.norm_out = LayerNorm32(dim)
        self.table = nn.Parameter(torch.randn(1, 2, dim) * dim**-0.5)
        self.proj_out = nn.Linear(dim, self.patch_proj.in_features)

    def embed(self, x: Tensor, t: Tensor, text: Tensor, text_length=None):
        """-> tokens (B, N, D) and the Condition of this forward."""
        video, rope, grid = self.video_tokens(x, n_text=0)
        y, text_length = self.encode_text(text, text_length)
        wave = sinusoid(t, self.cfg.freq_dim).to(self.time_embedding[0].weight)
        time = self.time_embedding(wave).type_as(video)  # (B, D)
        shared = self.time_proj(F.silu(time)).unflatten(1, (6, -1))  # (B, 6, D), for all blocks
        context = self.text_proj(y.type_as(video))  # (B, L, D)
        return video, Condition(shared, rope, 0, grid, y, text_length, context, time[:, None])

    def head(self, tokens: Tensor, condition: Condition) -> Tensor:
        """Tokens (B, N, D) -> prediction (B, C, F, H, W)."""
        shift, scale = (self.table + condition.time_out).chunk(2, dim=1)  # no SiLU, no projection
        patches = self.proj_out((self.norm_out(tokens) * (1 + scale) + shift).type_as(tokens))
        return unpatchify(patches, condition.grid, self.cfg.patch_t, self.cfg.patch)


# --- initialisation ---------------------------------------------------------------------------
MODELS = {"cogvideox": CogVideoX, "wan": Wan}
ZERO = "|".join((  # layers that start at zero, so that a fresh block is the identity
    r"norm[12]\.linear|modulate_out|proj_out",  # CogVideoX: every gate is shut (adaLN-zero)
    r"time_proj|attn2\.to_out",  # Wan: the same, and its cross-attention, which has no gate
    r"text_encoder\..*(to_out|ff\.2)",  # words: a random start would learn them much later
))


def build_backbone(cfg: Config, vocabulary: int = 0) -> Backbone:
    """A fresh backbone of the config's lineage: Xavier, then zero in the right places."""
    model = MODELS[cfg.lineage](cfg, vocabulary)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if re.search(ZERO, name):
                nn.init.zeros_(module.weight)
        elif hasattr(module, "table"):  # Wan's modulation
            nn.init.zeros_(module.table)
    if model.text_encoder:
        nn.init.normal_(model.text_encoder.embedding.weight, std=0.3)
    return model

"""model.py against loops, complex numbers, a second slow implementation from the formulas,
and diffusers' CogVideoX.

Letters as in model.py: B batch, N video tokens, L text tokens, S = L + N, D width, h heads, d = D / h.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import config
import model
import seams
from helpers import awake, close

pytestmark = pytest.mark.quick
# Odd in every direction: 3 x 3 x 5 tokens, three heads of 16, five text tokens.
CFG = config.preset("debug", frames=6, height=12, width=20, patch_t=2, patch=4, dim=48, heads=3, depth=2,
                    time_dim=10, text_len=5)
VOCABULARY, L, N, D = 11, 5, 45, 48


def inputs(B: int = 2, cfg=CFG, seed: int = 1):
    """x, t, text ids (two pads in the first row), text_length."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 3, cfg.frames, cfg.height, cfg.width, generator=g)
    text = torch.randint(1, VOCABULARY, (B, L), generator=g)
    text[0, -2:] = 0
    return x, torch.linspace(77, 900, B), text, (text > 0).sum(1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return awake(model.build_backbone(CFG, VOCABULARY))


# --- leaves
def test_patchify_order_and_round_trip():
    x = torch.randn(2, 3, 6, 12, 20)
    tokens = model.patchify(x, 2, 4)
    assert tokens.shape == (2, N, 3 * 2 * 4 * 4)
    n = 0
    for t in range(3):
        for i in range(3):
            for j in range(5):
                patch = x[:, :, 2 * t : 2 * t + 2, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                assert torch.equal(tokens[:, n], patch.flatten(1))
                n += 1
    assert torch.equal(model.unpatchify(tokens, (3, 3, 5), 2, 4), x)


def test_sinusoid():
    out = model.sinusoid(torch.tensor([0.0, 3.0, 999.0]), 6)
    for row, t in zip(out, (0.0, 3.0, 999.0)):
        angles = [t * 10_000 ** (-i / 3) for i in range(3)]
        close(row, torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]), 1e-4)


def rope_3d(grid, n_text, d):
    """cos, sin (n_text + N, d / 2) that a model of one head of d channels gets."""
    cfg = config.preset("debug", dim=d, heads=1, positions="integer")
    return model.positions(cfg, grid, n_text, torch.device("cpu"))[1]


def angles_of(t, i, j, d):
    """The d / 2 angles of the video token at (t, i, j), from the formula."""
    parts = ((t, d // 4), (i, 3 * d // 8), (j, 3 * d // 8))
    return [position * 10_000 ** (-2 * m / part) for position, part in parts for m in range(part // 2)]


def test_rope_angles():
    cos, sin = rope_3d((2, 3, 5), 4, 32)
    # text: an exact identity
    assert torch.equal(cos[:4], torch.ones(4, 16)) and torch.equal(sin[:4], torch.zeros(4, 16))
    reference = torch.tensor([angles_of(t, i, j, 32) for t in range(2) for i in range(3) for j in range(5)],
                             dtype=torch.float64)
    close(cos[4:], reference.cos().float(), 1e-6)
    close(sin[4:], reference.sin().float(), 1e-6)


def test_rope_of_words():
    cos, sin = model.rope_of_words(5, 8, torch.device("cpu"))
    reference = torch.tensor([[n * 10 ** (-m / 4) for m in range(4)] for n in range(5)], dtype=torch.float64)
    close(cos, reference.cos().float(), 1e-6)
    close(sin, reference.sin().float(), 1e-6)


def test_rotate_is_a_complex_product_of_neighbouring_channels():
    x, rope = torch.randn(2, 3, 4 + 30, 32), rope_3d((2, 3, 5), 4, 32)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(*rope)
    close(model.rotate(x, rope), torch.view_as_real(turned).flatten(-2), 1e-6)
    assert torch.equal(model.rotate(x, rope)[:, :, :4], x[:, :, :4])


def test_rope_scores_depend_on_the_difference_of_positions_alone():
    grid, d = (3, 4, 5), 32
    rope = rope_3d(grid, 0, d)
    q, k = (model.rotate(torch.randn(d).expand(1, 1, 60, d), rope)[0, 0] for _ in range(2))
    scores = q @ k.T
    where = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    seen = {}
    for m in range(60):
        for n in range(60):
            seen.setdefault(tuple((where[m] - where[n]).tolist()), []).append(scores[m, n].item())
    assert len(seen) == 5 * 7 * 9 and all(max(s) - min(s) < 1e-4 for s in seen.values())
    assert len({round(s[0], 3) for s in seen.values()}) > 200  # and they do depend on it


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_attend_is_scaled_dot_product_attention(dtype, tolerance):
    q, k, v = (torch.randn(2, 3, 13, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    ours, reference = model.attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
    close(ours, reference, tolerance)
    weight = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), (q, k, v)),
                    torch.autograd.grad((reference * weight).sum(), (q, k, v))):
        close(a, b, tolerance)


# --- the block
@pytest.mark.parametrize("chunk, stream, what", [
    (0, "video", "shift"), (1, "video", "scale"), (2, "video", "gate"), (3, "text", "shift"),
    (4, "text", "scale"), (5, "text", "gate"),
])
def test_each_chunk_of_the_expert_norm_modulates_its_stream_alone(net, chunk, stream, what):
    tokens, condition = net.embed(*inputs())
    norm = net.blocks[0].norm1
    plain = norm.norm(tokens).detach()
    with torch.no_grad():
        norm.linear.weight.zero_()
        norm.linear.bias.zero_()
        norm.linear.bias[chunk * D : (chunk + 1) * D] = 2
        h, gate = norm(tokens, condition)
    rows = slice(0, L) if stream == "text" else slice(L, None)
    expected, expected_gate = plain.clone(), torch.zeros_like(plain)
    if what == "shift":
        expected[:, rows] += 2
    elif what == "scale":
        expected[:, rows] *= 1 + 2
    else:
        expected_gate[:, rows] = 2
    assert torch.equal(h, expected) and torch.equal(gate, expected_gate)


def test_middle_is_applied_between_attention_and_feed_forward(net):
    tokens, condition = net.embed(*inputs())
    block = net.blocks[1]
    middle = lambda x: 3 * x.flip(1) - 1
    with_middle = lambda middle: block(tokens, condition, lambda x: (middle(x), "found"))
    h, gate = block.norm1(tokens, condition)
    after_attention = tokens + gate * block.attn1(h, condition.rope)
    x = middle(after_attention)
    h, gate = block.norm2(x, condition)
    out, found = with_middle(middle)
    assert torch.equal(out, x + gate * block.ff(h)) and found == "found"
    assert torch.equal(block(tokens, condition), with_middle(lambda x: x)[0])
    # the place matters
    assert (out - middle(block(tokens, condition))).abs().max() > 0.1


def test_a_fresh_model_predicts_zero_and_a_fresh_block_is_the_identity():
    fresh = model.build_backbone(CFG, VOCABULARY)
    x, t, text, length = inputs()
    assert torch.equal(fresh(x, t, text, length), torch.zeros_like(x))
    tokens, condition = fresh.embed(x, t, text, length)
    # captions are learned late otherwise
    assert torch.equal(condition.text, fresh.text_encoder.embedding(text))
    assert tokens.std() > 0.1 and all(torch.equal(block(tokens, condition), tokens) for block in fresh.blocks)


def test_a_gradient_reaches_every_parameter(net):
    x, t, text, length = inputs()
    (net(x, t, text, length) - torch.randn_like(x)).square().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
    used = torch.isin(torch.arange(VOCABULARY), text)
    assert torch.equal(net.text_encoder.embedding.weight.grad.abs().sum(1) > 0, used)


def test_attention_map_is_what_attention_used(net, monkeypatch):
    tokens, condition = net.embed(*inputs())
    used, attend = [], model.attend

    def spy(q, k, v):
        rows = (q.double() @ k.double().transpose(-2, -1) / 4).softmax(-1)  # d = 16
        close(attend(q, k, v), (rows @ v.double()).float())
        used.append(rows)
        return attend(q, k, v)

    monkeypatch.setattr(model, "attend", spy)
    net.blocks[0](tokens, condition)
    seen = net.blocks[0].attention_map(tokens, condition)
    assert seen.shape == (2, 3, N, L) and not seen.requires_grad
    close(seen, used[0][:, :, L:, :L].float())  # queries are video tokens, keys are text tokens
    close(seen.sum(-1) + used[0][:, :, L:, L:].float().sum(-1), torch.ones(2, 3, N))


# --- the whole
def test_text_encoder_tells_word_order_and_context(net):
    """A word's vector depends on its place and on the words around it: "red ball" is not "ball red"."""
    y, swapped, other = (net.text_encoder(torch.tensor([words]))
                         for words in ([3, 4, 5, 0], [4, 3, 5, 0], [3, 4, 6, 0]))
    assert y.shape == (1, 4, D)
    assert not torch.allclose(y[0, 0], swapped[0, 1], atol=1e-2)
    assert not torch.allclose(y[0, 2], swapped[0, 2], atol=1e-2)
    assert not torch.allclose(y[0, 0], other[0, 0], atol=1e-2)


def test_padding_is_id_0_and_the_condition_carries_the_text(net):
    x, t, text, length = inputs()
    assert length.tolist() == [3, 5]
    tokens, condition = net.embed(x, t, text)
    assert torch.equal(condition.text_length, length)
    assert torch.equal(net(x, t, text), net(x, t, text, length))
    close(condition.text, net.text_encoder(text))  # what the semantic router reads
    close(tokens[:, :L], condition.text)
    assert condition.n_text == L and condition.grid == (3, 3, 5)
    assert torch.equal(net.embed(x, t, text, torch.tensor([1, 2]))[1].text_length, torch.tensor([1, 2]))


def test_other_sizes_and_shorter_texts_go_through(net):
    """The same weights on another grid, with fewer words:
    the prediction of a clip still has the clip's shape and its own positions."""
    x, text = torch.randn(1, 3, 2, 8, 16), torch.tensor([[3, 4]])
    close(net(x, torch.tensor([5.0]), text), slow_forward(net, x, torch.tensor([5.0]), text), 1e-4)


def slow_forward(net, x, t, text):
    """The network once more, from the formulas:
    a loop over clips, heads and streams, float64, not a line shared with model.py."""
    w = {name: p.detach().double() for name, p in net.state_dict().items()}
    linear = lambda name, v: v @ w[name + ".weight"].T + w[name + ".bias"]
    silu = lambda v: v / (1 + torch.exp(-v))
    gelu = lambda v: 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def layer_norm(name, v, eps):
        centred = v - v.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed * w[name + ".weight"] + w[name + ".bias"]

    def attention(name, y, angles):
        heads = []
        for head in range(CFG.heads):
            own = slice(head * d, (head + 1) * d)
            q = layer_norm(name + "attn1.norm_q", linear(name + "attn1.to_q", y)[:, own], 1e-6)
            k = layer_norm(name + "attn1.norm_k", linear(name + "attn1.to_k", y)[:, own], 1e-6)
            q, k = (torch.stack([z[:, 0::2] * angles.cos() - z[:, 1::2] * angles.sin(),
                                 z[:, 0::2] * angles.sin() + z[:, 1::2] * angles.cos()], -1).flatten(1)
                    for z in (q, k))
            scores = torch.exp(q @ k.T / math.sqrt(d))
            heads.append(scores / scores.sum(-1, keepdim=True) @ linear(name + "attn1.to_v", y)[:, own])
        return linear(name + "attn1.to_out", torch.cat(heads, -1))

    T, h, v = x.shape[2] // CFG.patch_t, x.shape[3] // CFG.patch, x.shape[4] // CFG.patch
    d, out = D // CFG.heads, torch.zeros_like(x)
    cells = [(a, i, j) for a in range(T) for i in range(h) for j in range(v)]
    angles = torch.tensor([[0.0] * (d // 2)] * text.shape[1] + [angles_of(*cell, d) for cell in cells],
                          dtype=torch.float64)
    for b in range(len(x)):
        def part(a, i, j):
            return (b, slice(None), slice(a * CFG.patch_t, (a + 1) * CFG.patch_t),
                    slice(i * CFG.patch, (i + 1) * CFG.patch), slice(j * CFG.patch, (j + 1) * CFG.patch))

        wave = [t[b].item() * 10_000 ** (-i / (D // 2)) for i in range(D // 2)]
        time = torch.tensor([math.cos(a) for a in wave] + [math.sin(a) for a in wave], dtype=torch.float64)
        time = silu(linear("time_embedding.2", silu(linear("time_embedding.0", time))))
        words = w["text_encoder.embedding.weight"][text[b]]
        order = torch.tensor([[n * 10 ** (-2 * m / d) for m in range(d // 2)] for n in range(len(words))],
                             dtype=torch.float64)
        for block in range(CFG.text_depth):
            name = f"text_encoder.blocks.{block}."
            words = words + attention(name, layer_norm(name + "norm1", words, 1e-5), order)
            hidden = gelu(linear(name + "ff.0", layer_norm(name + "norm2", words, 1e-5)))
            words = words + linear(name + "ff.2", hidden)
        patches = torch.stack([linear("patch_proj", x[part(*cell)].double().flatten()) for cell in cells])
        at = torch.tensor([angles_of(*cell, D) for cell in cells], dtype=torch.float64)
        added = w["position_gain"] * torch.cat([at.cos(), at.sin()], dim=1)  # (N, D), one row a video token
        tokens = {"text": words, "video": patches + added}

        for block in range(CFG.depth):
            name = f"blocks.{block}."
            for half, layer in (("norm1", "attn1"), ("norm2", "ff")):
                table = linear(name + half + ".linear", time).view(6, D)
                modulation = {"video": table[:3], "text": table[3:]}
                normed = {s: layer_norm(f"{name}{half}.norm", tokens[s],
                                        1e-5) * (1 + modulation[s][1]) + modulation[s][0] for s in tokens}
                y = torch.cat([normed["text"], normed["video"]])
                if layer == "ff":
                    y = linear(name + "ff.2", gelu(linear(name + "ff.0", y)))
                else:
                    y = attention(name, y, angles)
                n = len(tokens["text"])
                tokens = {"text": tokens["text"] + modulation["text"][2] * y[:n],
                          "video": tokens["video"] + modulation["video"][2] * y[n:]}

        shift, scale = linear("modulate_out", time).view(2, D)
        video = layer_norm("norm_out", layer_norm("norm_final", tokens["video"], 1e-5),
                           1e-5) * (1 + scale) + shift
        for token, cell in zip(linear("proj_out", video), cells):
            out[part(*cell)] = token.view(3, CFG.patch_t, CFG.patch, CFG.patch).float()
    return out


def test_forward_is_that_of_a_slow_second_implementation(net):
    x, t, text, length = inputs()
    prediction = net(x, t, text, length)
    assert prediction.std() > 0.5
    close(prediction, slow_forward(net, x, t, text), 1e-4)


# --- diffusers' CogVideoX, the lineage itself
RENAMED = {"attn1.to_out.0.": "attn1.to_out.", "ff.net.0.proj.": "ff.0.", "ff.net.2.": "ff.2.",
           "time_embedding.linear_1.": "time_embedding.0.",
           "time_embedding.linear_2.": "time_embedding.2.", "transformer_blocks.": "blocks.",
           "norm_out.linear.": "modulate_out.", "norm_out.norm.": "norm_out.",
           "patch_embed.proj.": "patch_proj."}


def in_our_names(state: dict) -> dict:
    """The reference's state dict under our names; its patch convolution becomes our linear layer."""
    ours = {}
    for name, value in state.items():
        for theirs, mine in RENAMED.items():
            name = name.replace(theirs, mine)
        ours[name] = value.flatten(1) if name == "patch_proj.weight" else value
    return ours


@pytest.mark.parity
def test_block_equals_diffusers_cogvideox_block():
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")

    grid, n_text, dim, heads = (3, 5, 7), 9, 96, 3
    reference = awake(seams.cog_block()(dim, heads, dim // heads, time_embed_dim=20,
                                        attention_bias=True)).eval()
    cfg = config.preset("debug", dim=dim, heads=heads, time_dim=20, positions="integer")
    block = model.CogBlock(cfg)
    block.load_state_dict(in_our_names(reference.state_dict()))
    rope = seams.cog_rotary(dim // heads, grid[1:], grid[0], grid[1:])
    text, video, time = torch.randn(2, n_text, dim), torch.randn(2, 105, dim), torch.randn(2, 20)
    condition = model.Condition(F.silu(time), rope_3d(grid, n_text, dim // heads), n_text, grid, text,
                                torch.tensor([9, 9]))
    video_out, text_out = reference(video, text, time, rope)
    ours = block(torch.cat([text, video], 1), condition)
    size = video_out.abs().max()
    assert size > 1 and (ours - torch.cat([text_out, video_out], 1)).abs().max() < 1e-5 * max(1, size)


@pytest.mark.parity
def test_model_equals_diffusers_cogvideox_transformer():
    """Patches, time embedding, all blocks and head:
    the reference gets our text embedding through an identity projection."""
    diffusers = pytest.importorskip("diffusers",
                                    reason="needs diffusers: pip install -r requirements-extra.txt")

    cfg = config.preset("debug", frames=3, height=10, width=14, patch_t=1, patch=2, dim=D, heads=3, depth=2,
                        time_dim=12, text_len=L, channels=4)
    reference = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=12,
        text_embed_dim=D, num_layers=2,
        sample_width=14, sample_height=10, sample_frames=9, patch_size=2, max_text_seq_length=L,
        use_rotary_positional_embeddings=True)
    awake(reference).eval()
    with torch.no_grad():
        reference.patch_embed.text_proj.weight.copy_(torch.eye(D))
        reference.patch_embed.text_proj.bias.zero_()
    ours = awake(model.build_backbone(cfg, VOCABULARY))
    state = {name: value
             for name, value in in_our_names(reference.state_dict()).items() if "text_proj" not in name}
    missing = ours.load_state_dict(state, strict=False)
    ours_alone = {name for name in missing.missing_keys if not name.startswith("text_encoder.")}
    assert ours_alone == {"position_gain"} and missing.unexpected_keys == []
    torch.nn.init.zeros_(ours.position_gain)  # ours alone: the 5B lineage rotates only
    x, t = torch.randn(2, 4, 3, 10, 14), torch.tensor([19, 999])
    text = torch.randint(1, VOCABULARY, (2, L))
    with torch.no_grad():
        theirs = reference(x.transpose(1, 2), ours.text_encoder(text), t,
                           image_rotary_emb=seams.cog_rotary(16, (5, 7), 3, (5, 7)))
        close(ours(x, t, text), theirs.sample.transpose(1, 2), 2e-5)

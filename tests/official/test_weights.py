"""Official weights: our models against diffusers' modules, to rounding; every trap, planted, is seen."""
import copy
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel  # noqa: E402

import official.weights  # noqa: E402
import config  # noqa: E402
import model  # noqa: E402
import seams  # noqa: E402
from config import UserError  # noqa: E402

pytestmark = pytest.mark.parity
COG = dict(num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=20,
           text_embed_dim=24, num_layers=2,
           sample_width=18, sample_height=12, sample_frames=9, patch_size=2, max_text_seq_length=7)
KINDS = {
    "2b": dict(COG),
    "5b": dict(COG, use_rotary_positional_embeddings=True),
    "1.5": dict(COG, use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
    "wan": dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4,
                out_channels=4, text_dim=20, freq_dim=32,
                ffn_dim=100, num_layers=2, rope_max_seq_len=64),
    "wan128": dict(patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=128, in_channels=4,
                   out_channels=4, text_dim=20, freq_dim=256,
                   ffn_dim=100, num_layers=1, rope_max_seq_len=1024),
}
# latent frames, rows, columns: the trained size of "5b", then odd ones
SIZES = [(3, 12, 18), (2, 10, 22), (4, 22, 10), (1, 8, 8), (5, 6, 34)]


def reference(kind: str, seed: int = 0):
    """diffusers' module with weights of scale 1 / sqrt(fan in) and norm weights 1 + 0.3 randn,
    so that a norm left out cannot hide."""
    torch.manual_seed(seed)
    net = (WanTransformer3DModel if kind.startswith("wan")
           else CogVideoXTransformer3DModel)(**KINDS[kind]).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name and p.ndim == 1 and ".linear." not in name:
                p.copy_((1 if name.endswith("weight") else 0) + 0.3 * torch.randn_like(p))
            elif p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / (p[0].numel() ** 0.5 if "table" not in name else 2))
    return net


def theirs(net, x, t, text):
    """The reference's prediction, x (B, C, F, H, W) -> the same shape."""
    if isinstance(net, WanTransformer3DModel):
        return net(x, t, text, return_dict=False)[0]
    c, rope = net.config, None
    if c.use_rotary_positional_embeddings:
        h, w, base = x.shape[3] // 2, x.shape[4] // 2, (c.sample_height // 2, c.sample_width // 2)
        if c.patch_size_t:
            rope = seams.cog_rotary_slice(c.attention_head_dim, (h, w), x.shape[2] // 2,
                                          (max(h, base[0]), max(w, base[1])))
        else:
            rope = seams.cog_rotary(c.attention_head_dim, (h, w), x.shape[2], base)
    return net(x.transpose(1, 2), text, t, image_rotary_emb=rope, return_dict=False)[0].transpose(1, 2)


def inputs(kind: str, size, batch: int = 2, seed: int = 1):
    torch.manual_seed(seed)
    frames = 2 * size[0] if kind == "1.5" else size[0]
    words, width = (7, 24) if not kind.startswith("wan") else (9, 20)
    t = torch.tensor([999, 37][:batch])
    return torch.randn(batch, 4, frames, *size[1:]), t, torch.randn(batch, words, width)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind -> (reference, our model from the folder that the reference saved, folder)."""
    made = {}

    def get(kind):
        if kind not in made:
            folder, net = tmp_path_factory.mktemp(kind.replace(".", "_")), reference(kind)
            net.save_pretrained(folder)
            made[kind] = net, official.weights.load_pretrained(folder), folder
        return made[kind]
    return get


def error(kind: str, nets, size) -> float:
    """Largest difference, in units of the reference's standard deviation when that is above 1."""
    x, t, text = inputs(kind, size)
    with torch.no_grad():
        a, b = theirs(nets[0], x, t, text), nets[1](x, t, text)
    assert a.shape == b.shape == x.shape and a.std() > 0.2
    return ((a - b).abs().max() / max(1, a.std())).item()


# --- parity
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_diffusers(pair, kind, size):
    assert error(kind, pair(kind), size) < 1e-5


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5", "wan"])
def test_gradients_equal_diffusers(pair, kind):
    net, ours, _ = pair(kind)
    x, t, text = inputs(kind, (2, 10, 14))
    target, names = torch.randn_like(x), official.weights.WAN_NAMES if kind == "wan" else official.weights.COG_NAMES
    for p in [*net.parameters(), *ours.parameters()]:
        p.grad = None
    (theirs(net, x, t, text) - target).square().mean().backward()
    (ours(x, t, text) - target).square().mean().backward()
    reference_grads = {name: p.grad for name, p in net.named_parameters()}
    # a bias of k cancels in the softmax: its gradient is rounding alone
    rounding = 1e-6 * max(g.norm() for g in reference_grads.values())
    for name, p in ours.named_parameters():
        g = official.weights.from_stored(name, reference_grads[official.weights.renamed(name, names)], ours.cfg)
        assert (p.grad - g).norm() < 1e-4 * g.norm() + rounding, name


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5", "wan"])
def test_bfloat16_is_close_to_diffusers_bfloat16(pair, kind):
    _, _, folder = pair(kind)
    cls = WanTransformer3DModel if kind == "wan" else CogVideoXTransformer3DModel
    net = cls.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    ours = official.weights.load_pretrained(folder, dtype=torch.bfloat16)
    x, t, text = inputs(kind, (2, 10, 14))
    with torch.no_grad():
        a = theirs(net, x.bfloat16(), t, text.bfloat16()).float()
        b = ours(x.bfloat16(), t, text.bfloat16())
        assert b.dtype == torch.bfloat16
        exact = pair(kind)[1](x, t, text)
    assert (a - b.float()).norm() < 2e-2 * a.norm()
    assert (b.float() - exact).norm() < 2e-2 * exact.norm()


def test_tables_are_exact_at_long_positions(pair):
    """The native grid of CogVideoX 1.5 has 85 columns:
    rotation tables to 1e-6 of the reference's there, and Wan's at 1023."""
    cfg = replace(pair("1.5")[1].cfg, dim=64, heads=1)
    cos, sin = model.positions(cfg, (11, 48, 85), 3, torch.device("cpu"))[1]
    reference = seams.cog_rotary_slice(64, (48, 85), 11, (150, 150))
    assert (cos[3:] - reference[0][:, ::2]).abs().max() < 1e-6
    assert (sin[3:] - reference[1][:, ::2]).abs().max() < 1e-6
    cfg = replace(pair("5b")[1].cfg, dim=64, heads=1, fit_height=30, fit_width=45)
    for h, w in ((30, 45), (48, 85), (45, 30), (7, 90)):
        cos, sin = model.positions(cfg, (13, h, w), 0, torch.device("cpu"))[1]
        reference = seams.cog_rotary(64, (h, w), 13, (30, 45))
        assert (cos - reference[0][:, ::2]).abs().max() < 1e-6
        assert (sin - reference[1][:, ::2]).abs().max() < 1e-6
    cfg, rope = replace(pair("wan128")[1].cfg), pair("wan128")[0].rope
    cos, sin = model.positions(cfg, (1, 1, 1023), 0, torch.device("cpu"))[1]
    reference = rope(torch.zeros(1, 4, 1, 2, 2046))
    assert (cos - reference[0][0, :, 0, ::2]).abs().max() < 1e-7
    assert (sin - reference[1][0, :, 0, ::2]).abs().max() < 1e-7


@pytest.mark.parametrize("kind", ["5b", "wan"])
def test_norms_of_queries_and_keys_have_the_right_epsilon(pair, kind):
    """With tiny q and k the epsilon decides; on random weights it cannot be seen."""
    net, ours, _ = pair(kind)
    tiny = ([m for m in ours.modules() if isinstance(m, model.Attention)],
            [m for name, m in net.named_modules() if name.split(".")[-1] in ("attn1", "attn2")])
    kept = [p.detach().clone() for side in tiny for m in side
            for p in (*m.to_q.parameters(), *m.to_k.parameters())]
    with torch.no_grad():
        for side in tiny:
            for m in side:
                for p in (*m.to_q.parameters(), *m.to_k.parameters()):
                    p.mul_(1e-3)
    try:
        assert error(kind, (net, ours), (2, 10, 14)) < 1e-5
        for m in tiny[0]:
            m.norm_q.eps = m.norm_k.eps = 1e-5
        assert error(kind, (net, ours), (2, 10, 14)) > 1e-4
    finally:
        with torch.no_grad():
            for p, value in zip((p for side in tiny for m in side
                                 for p in (*m.to_q.parameters(), *m.to_k.parameters())), kept):
                p.copy_(value)
        for m in tiny[0]:
            m.norm_q.eps = m.norm_k.eps = 1e-6


# --- every trap, planted, must be seen
def swapped_chunks(net, order):
    """Each expert norm's six chunks in another order."""
    for m in net.modules():
        if isinstance(m, model.ExpertNorm):
            for p in m.linear.parameters():
                p.copy_(torch.cat([p.chunk(6)[i] for i in order]))


def swapped_experts(patch, net):
    swapped_chunks(net, (3, 4, 5, 0, 1, 2))


def swapped_shift_and_scale(patch, net):
    swapped_chunks(net, (1, 0, 2, 4, 3, 5))


def sines_first(patch, net):
    patch(model, "sinusoid",
          lambda t, dim, right=model.sinusoid: torch.cat(right(t, dim).chunk(2, -1)[::-1], -1))


def rotate_half(patch, net):
    def wrong(x, rope):
        a, b = x.chunk(2, -1)
        cos, sin = rope
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    patch(model, "rotate", wrong)


def erf_gelu(patch, net):
    for m in net.modules():
        if isinstance(m, torch.nn.GELU):
            m.approximate = "none"


def height_before_width(patch, net):
    def wrong(grid, dim, right=model.sincos_table):
        t, w, h = right(grid, dim).split([dim // 4, 3 * dim // 8, 3 * dim // 8], 1)
        return torch.cat([t, h, w], 1)
    patch(model, "sincos_table", wrong)


def one_final_norm(patch, net):
    def wrong(self, tokens, condition, right=model.CogVideoX.head):
        old, self.norm_final = self.norm_final, torch.nn.Identity()
        try:
            return right(self, tokens, condition)
        finally:
            self.norm_final = old
    patch(model.CogVideoX, "head", wrong)


def integer_grid(patch, net):
    patch(model, "fitted", lambda grid, fit: model.integers(grid))


def cog_split(patch, net):
    patch(model, "wan_channels",
          lambda d: (d - 2 * (3 * d // 8 // 2 * 2), 3 * d // 8 // 2 * 2, 3 * d // 8 // 2 * 2))


def channels_first(patch, net):
    def wrong(tokens, grid, pt, p, right=model.unpatchify):
        return right(tokens.unflatten(-1, (pt, p, p, -1)).movedim(-1, 2).flatten(2), grid, pt, p)
    patch(model, "unpatchify", wrong)


def masked_padding(patch, net):
    def wrong(self, x, t, text, text_length=None, right=model.Wan.embed):
        tokens, condition = right(self, x, t, text, text_length)
        condition.context = condition.context[:, :-2]
        return tokens, condition
    patch(model.Wan, "embed", wrong)


def norm_of_each_head(patch, net):
    def wrong(self, x, rope=None, context=None):
        q, k = self.split(self.to_q(x)), self.split(self.to_k(x if context is None else context))

        def normed(z, norm):
            of_head = z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            return of_head * self.split(norm.weight.expand(1, z.shape[2], -1))
        q, k = normed(q, self.norm_q), normed(k, self.norm_k)
        return (q, k) if rope is None else (model.rotate(q, rope), model.rotate(k, rope))
    patch(model.Attention, "queries_keys", wrong)


@pytest.mark.parametrize("kind, trap", [
    ("5b", swapped_experts), ("5b", sines_first), ("5b", swapped_shift_and_scale), ("5b", one_final_norm),
    ("2b", height_before_width), ("5b", rotate_half),
    ("wan", rotate_half), ("5b", integer_grid), ("5b", erf_gelu), ("wan", channels_first),
    ("wan", masked_padding), ("wan128", cog_split), ("wan", norm_of_each_head), ("wan", sines_first),
    ("wan", erf_gelu),
], ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_planted_mistake_is_seen(pair, kind, trap, monkeypatch):
    """The parity test above, on a size off the trained one,
    with one mistake of the list in it: it must fail."""
    theirs_net, ours = pair(kind)[0], copy.deepcopy(pair(kind)[1])
    size = (2, 10, 22)
    assert error(kind, (theirs_net, ours), size) < 1e-5
    model.positions.cache_clear()
    try:
        with torch.no_grad():
            trap(monkeypatch.setattr, ours)
        assert error(kind, (theirs_net, ours), size) > 1e-5
    finally:
        model.positions.cache_clear()


def test_sinusoid_is_theirs_to_the_bit():
    """Its angles are float32 on purpose:
    float64, the better number, is not what the weights were trained with."""
    t = torch.arange(1000)
    for dim in (256, 1920, 3072):
        reference = seams.timestep_embedding(t, dim)
        assert torch.equal(model.sinusoid(t, dim), reference)
        rates = torch.exp(-math.log(10_000) * torch.arange(dim // 2).double() / (dim // 2))
        angles = t.double()[:, None] * rates
        assert (torch.cat([angles.cos(), angles.sin()], -1) - reference).abs().max() > 1e-5


# --- round trip
@pytest.mark.parametrize("kind", KINDS)
def test_export_is_read_by_diffusers_and_by_us(pair, kind, tmp_path):
    net, ours, folder = pair(kind)
    official.weights.save_pretrained(ours, tmp_path / "out", shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").exists()
    again = type(net).from_pretrained(tmp_path / "out").eval()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))
    x, t, text = inputs(kind, (2, 10, 14))
    with torch.no_grad():
        assert torch.equal(theirs(again, x, t, text), theirs(net, x, t, text))
        assert torch.equal(official.weights.load_pretrained(tmp_path / "out")(x, t, text), ours(x, t, text))


def test_wan_in_its_original_layout(pair, tmp_path):
    """The same weights under the names of the original repository give the same model."""
    net, ours, folder = pair("wan")
    names = {official.weights.renamed(name, official.weights.WAN_NAMES): official.weights.renamed(name, official.weights.WAN_ORIGINAL_NAMES)
             for name in ours.state_dict()}
    assert names["blocks.1.attn1.to_out.0.weight"] == "blocks.1.self_attn.o.weight"
    assert names["blocks.0.norm2.weight"] == "blocks.0.norm3.weight"
    assert names["condition_embedder.time_proj.bias"] == "time_projection.1.bias"
    assert names["scale_shift_table"] == "head.modulation"
    assert names["blocks.0.scale_shift_table"] == "blocks.0.modulation"
    assert names["proj_out.weight"] == "head.head.weight"
    save_file({names[name]: tensor
               for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items()},
              tmp_path / "model.safetensors")
    c = KINDS["wan"]
    its_config = dict(_class_name="WanModel", model_type="t2v", dim=48, ffn_dim=100, num_heads=2,
                      num_layers=2,
                      freq_dim=32, text_len=512, in_dim=4, out_dim=4, eps=1e-6, text_dim=c["text_dim"])
    (tmp_path / "config.json").write_text(json.dumps(its_config))
    x, t, text = inputs("wan", (2, 10, 14))
    with torch.no_grad():
        assert torch.equal(official.weights.load_pretrained(tmp_path)(x, t, text), ours(x, t, text))


FULL = {  # diffusers' arguments at full size, and the number of parameters
    "cogvideox-2b": (dict(num_attention_heads=30, num_layers=30), 1_693_783_872),
    "cogvideox-5b": (dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
                     5_570_283_072),
    "cogvideox1.5-5b": (dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True,
                             patch_size_t=2, patch_bias=False,
                             sample_height=300, sample_width=300, sample_frames=81), 5_570_676_352),
    "wan-1.3b": (dict(num_attention_heads=12, ffn_dim=8960, num_layers=30), 1_418_996_800),
    "wan-14b": (dict(num_attention_heads=40, ffn_dim=13824, num_layers=40), 14_288_491_584),
}


@pytest.mark.parametrize("preset", FULL)
def test_full_size_keys_and_shapes(preset):
    """On the meta device:
    diffusers' names and shapes at full size are those that the preset's model wants."""
    arguments, parameters = FULL[preset]
    cfg = config.preset(preset)
    with torch.device("meta"):
        net = (WanTransformer3DModel if preset.startswith("wan")
               else CogVideoXTransformer3DModel)(**arguments)
        ours = model.MODELS[cfg.lineage](cfg)
    names = official.weights.WAN_NAMES if preset.startswith("wan") else official.weights.COG_NAMES
    wanted = {official.weights.renamed(name, names): official.weights.stored_shape(name, p.shape, cfg)
              for name, p in ours.state_dict().items()}
    assert wanted == {name: list(p.shape) for name, p in net.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters


def test_a_model_with_its_own_words_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="diffusers"):
        official.weights.save_pretrained(model.build_backbone(config.preset("debug"), 9), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_loading_holds_the_weights_once(tmp_path):
    """Peak memory of loading 80 MB in a fresh process: below the weights plus one shard."""
    cfg = replace(config.preset("small"), lineage="wan", dim=512, heads=4, depth=5, ffn=2048, text_dim=64,
                  channels=4, patch=2, patch_t=1, positions="integer", latent=True)
    torch.manual_seed(0)
    net = model.build_backbone(cfg)
    size = sum(p.nbytes for p in net.parameters()) / 2**20
    official.weights.save_pretrained(net, tmp_path, shard_bytes=16 * 2**20)
    script = ("import resource; import official.weights;import os, sys, torch, model\n"
              "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
              "torch.randn(64, 64) @ torch.randn(64, 64)\n"
              "before = peak()\n"
              "net = official.weights.load_pretrained(sys.argv[1])\n"
              "print(peak() - before)")
    grown = float(subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True,
                                 text=True, check=True).stdout)
    assert size > 75 and grown < size + 40, (grown, size)

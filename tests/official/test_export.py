"""encode.py --export: a run that trained an official backbone along becomes a folder that others read."""
import dataclasses

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")

import official.clips  # noqa: E402
import official.export  # noqa: E402
import config  # noqa: E402
import encode  # noqa: E402
import train  # noqa: E402
from config import UserError  # noqa: E402
from helpers import tiny_official  # noqa: E402
from tiny_weights import LINEAGES, SIZE  # noqa: E402

SHORT = dict(physics_steps=4, warmup=1, physics_lr=1e-2, log_every=1, eval_every=2, save_every=100, val_clips=2)


def trained(name, weights, caches, out, **fields):
    places = dict(weights=str(weights[name]), cache=str(caches[name]), out_dir=str(out))
    cfg = config.check(tiny_official(name, **{**SIZE, **SHORT, **places, **fields}))
    train.main(cfg)
    return cfg


@pytest.mark.parametrize("name", LINEAGES)
def test_an_exported_run_predicts_as_it_did(weights, caches, tmp_path, name):
    """Backbone, LoRA and branch, through diffusers' layout and back: LoRA is merged, so to rounding."""
    cfg = trained(name, weights, caches, tmp_path / "run", freeze_backbone=False, lora_rank=2)
    encode.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    before, _ = official.export.trained_model(cfg, tmp_path / "run" / "checkpoints" / "best.pt")
    after = official.clips.OfficialModel(
        tmp_path / "out", branch=str(tmp_path / "out" / "branch.safetensors"), frames=9, height=16, width=32).net
    torch.manual_seed(0)
    x = torch.randn(1, cfg.channels, 3, 2, 4)
    text = torch.randn(1, cfg.text_len, cfg.text_dim)
    given = x, torch.tensor([500]), text, torch.tensor([5])
    with torch.no_grad():
        one, two = before.eval()(*given)[0], after(*given)[0]
    assert (one - two).abs().max() < 1e-5 * one.abs().max()
    official_one = official.clips.OfficialModel(weights[name], frames=9, height=16, width=32).net
    assert (official_one(*given) - two).abs().max() > 1e-3 * one.abs().max(), "nothing was trained"


def test_diffusers_reads_an_exported_folder(weights, caches, tmp_path):
    trained("wan", weights, caches, tmp_path / "run", freeze_backbone=False)
    encode.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    ours = official.weights.load_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    for part in ("vae", "text_encoder", "tokenizer"):
        names = {path.name for path in (weights["wan"] / part).iterdir()}
        assert names == {path.name for path in (tmp_path / "out" / part).iterdir()}


def test_what_cannot_be_exported_is_one_sentence(weights, caches, tmp_path):
    cfg = trained("wan", weights, caches, tmp_path / "run")
    with pytest.raises(UserError, match="--freeze_backbone false"):
        encode.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    cfg = dataclasses.replace(cfg, freeze_backbone=False, out_dir=str(tmp_path / "other"))
    train.main(cfg)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        encode.main(["--export", str(tmp_path / "other"), "--out", str(tmp_path / "there")])
    (tmp_path / "other" / "checkpoints" / "best.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        encode.main(["--export", str(tmp_path / "other"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

"""Folders of official weights in small, with random numbers, and what encode.py makes with them.

Needs diffusers: whoever imports this skips without it first.
"""
import diffusers
import torch
import transformers

import official.cache
import config
import encode
from helpers import shaken, words_of

LINEAGES = ("cogvideox", "wan")
FOLDERS = (*LINEAGES, "1.5")  # the third is a CogVideoX 1.5
PROMPT = "a red ball falls on the floor"
SIZE = dict(frames=9, fps=8, height=16, width=32)
RECORDS = [  # the sixth is no video, the seventh is not there
    {"file": "a.mp4", "en_caption": "a red ball falls on the floor", "en_caption_1": "a ball",
     "phys_law": "gravity acts", "q0": "collision"},
    {"file": "b.mp4", "en_caption": "ice  melts &amp; drips\n", "en_caption_1": "ice",
     "q1": "melting, levitation", "q4": "no change"},
    {"file": "c.mp4", "en_caption": "the floor is lÃ©ft", "en_caption_1": "floor", "q3": "yes"},
    {"file": "long.mp4", "en_caption": "ball " * 600, "en_caption_1": "balls"},
    {"file": "e.mp4", "en_caption": "smoke rises", "en_caption_1": "smoke", "q0": "gas motion"},
    {"file": "broken.mp4", "en_caption": "nothing", "en_caption_1": "no"},
    {"file": "absent.mp4", "en_caption": "nothing", "en_caption_1": "no"},
]


# --------------------------------------------------------------------------------------------- a whole folder
def make_weights(folder, name, seed=0):
    """A folder in diffusers' layout: tokenizer, text encoder, VAE, transformer, scheduler."""
    write_encoders(folder, "wan" if name == "wan" else "cogvideox", seed)
    write_transformer(folder, name)
    return folder


def write_encoders(folder, lineage, seed):
    """Random weights whose norms are not one, so that a skipped norm would show."""
    torch.manual_seed(seed)
    small = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                 feed_forward_proj="gated-gelu")
    if lineage == "wan":
        text = transformers.UMT5EncoderModel(transformers.UMT5Config(**small))
        vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1,
                                         latents_mean=[.1, -.2, .3, 0.], latents_std=[1.5, 2., .5, 1.])
    else:
        text = transformers.T5EncoderModel(transformers.T5Config(**small))
        vae = diffusers.AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 8), latent_channels=4,
                                               layers_per_block=1,
                                               norm_num_groups=2, scaling_factor=0.7)
    with torch.no_grad():
        for name, parameter in [*text.named_parameters(), *vae.named_parameters()]:
            if "norm" in name and name.endswith(("weight", "gamma")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    words = "a red ball falls on the floor and bounces ice melts is smoke".split()
    vocabulary = [("<pad>", 0.), ("</s>", 0.), ("<unk>", -9.), ("▁", -2.),
                  *(("▁" + word, -3.) for word in words),
                  *((letter, -6.) for letter in "abcdefghijklmnopqrstuvwxyz&;é")]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "tokenizer")
    text.save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")


def write_transformer(folder, name):
    torch.manual_seed(1)
    both = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3)
    if name == "wan":
        net = diffusers.WanTransformer3DModel(text_dim=16, freq_dim=32, ffn_dim=48, **both)
        scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                      flow_shift=3.0)
    else:
        net = diffusers.CogVideoXTransformer3DModel(
            time_embed_dim=16, text_embed_dim=16, sample_width=8, sample_height=4, sample_frames=9,
            use_rotary_positional_embeddings=True, patch_size_t=2 if name == "1.5" else None, **both)
        scheduler = diffusers.CogVideoXDDIMScheduler(
            snr_shift_scale=2.0, prediction_type="v_prediction", rescale_betas_zero_snr=True,
            timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            set_alpha_to_one=True)
    shaken(net).save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")


def pipeline(name, folder, scheduler=None):
    """diffusers' own pipeline from the folder, with its own scheduler or one of another class."""
    wan = name == "wan"
    kinds = dict(
        transformer=diffusers.WanTransformer3DModel if wan else diffusers.CogVideoXTransformer3DModel,
        vae=diffusers.AutoencoderKLWan if wan else diffusers.AutoencoderKLCogVideoX,
        text_encoder=transformers.UMT5EncoderModel if wan else transformers.T5EncoderModel,
        tokenizer=transformers.AutoTokenizer,
        scheduler=scheduler
        or (diffusers.UniPCMultistepScheduler if wan else diffusers.CogVideoXDDIMScheduler))
    parts = {part: kind.from_pretrained(folder / part) for part, kind in kinds.items()}
    pipe = (diffusers.WanPipeline if wan else diffusers.CogVideoXPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_embeddings(pipe, prompts, length):
    """(B, L, D_text) of the pipeline's own text encoder."""
    return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length,
                              device="cpu")[0]


# ------------------------------------------------------------------------------------------ encode.py's cache
def encode_flags(videos, weights, out, **fields):
    """The command line of encode.py."""
    flags = dict(videos=videos, weights=weights, out=out) | SIZE | dict(text_batch=2, device="cpu") | fields
    return words_of(flags)


def fill_cache(videos, weights, out, *more, **fields):
    """`python encode.py ...`, in this process."""
    encode.main([*encode_flags(videos, weights, out, **fields), *more])
    return out


def cache_cfg(lineage, **overrides):
    """The config that reads such a cache."""
    sizes = dict(lineage=lineage, latent=True, channels=4, text_dim=16,
                 text_len=226 if lineage == "cogvideox" else 512,
                 patch=2, patch_t=1, val_clips=2, **SIZE)
    return config.preset("small", **{**sizes, **overrides})


def latents_of(lineage, cache, **overrides):
    cfg = cache_cfg(lineage, **overrides)
    return official.cache.Latents(cfg, official.cache.open_cache(cfg, cache))


def latent_scale(vae):
    """Mean and standard deviation (1, C, 1, 1, 1) of the latents of Wan's VAE."""
    return (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))

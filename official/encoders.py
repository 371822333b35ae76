"""Text encoders and VAEs of official models, as the official pipelines use them.

    captions --TextEncoder--> embeddings (B, L, D_text) and lengths (B,)
    video    --VAE.encode-->  latents in the network's own scale    --VAE.decode--> video

The two lineages differ in small things that raise no error when they are mixed up, only worse
clips: whether padding is masked, whether text is cleaned, how latents are scaled. Each is written
where it happens, and a test holds it against the pipeline of diffusers.
"""
import contextlib
import html
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import read_json
from common.libraries import library, load, load_tokenizer
from config import Stopped, UserError
from official.folder import lineage_of


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device):
    """The model is on the device inside, and on the CPU again afterwards."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
        torch.cuda.empty_cache()  # does nothing where CUDA was never used


@contextlib.contextmanager
def memory_as_sentence(hint: str):
    """Running out of the device's memory becomes Stopped, with what helps."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise Stopped(f"The device's memory is full: {hint}.") from None


# --- text ---------------------------------------------------------------------------------------
def clean(text: str) -> str:
    """Wan's cleaning: broken encodings mended, HTML entities resolved twice, white space
    collapsed."""
    text = html.unescape(html.unescape(library("ftfy").fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class TextEncoder:
    """T5-v1.1 (CogVideoX) or umT5 (Wan) with its tokenizer. It stays on the CPU but for the time of
    a call."""

    def __init__(self, weights: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        """weights: the folder with tokenizer/ and text_encoder/. Raises UserError."""
        transformers = library("transformers")
        self.lineage = lineage_of(weights)
        self.device = torch.device(device)
        kind = read_json(weights / "text_encoder" / "config.json").get("model_type")
        if kind != self.lineage.reader:
            raise UserError(f"{weights / 'text_encoder'} is of {kind!r}; {self.lineage.name} has a "
                            f"{self.lineage.reader!r}.")
        # load() names a tensor of another shape; transformers alone would not say which one it is.
        self.model = load(getattr(transformers, self.lineage.text), weights / "text_encoder",
                          dtype=dtype, ignore_mismatched_sizes=True)

        folder = weights / "tokenizer"
        if (folder / "spiece.model").exists() and not (folder / "tokenizer.json").exists():
            # CogVideoX has spiece.model alone, which these two read.
            library("sentencepiece")
            library("google.protobuf")
        self.tokenizer = load_tokenizer(folder, self.model)
        for name in ("pad_token_id", "eos_token_id"):
            found, needed = (getattr(one, name) for one in (self.tokenizer, self.model.config))
            if found != needed:
                raise UserError(f"{folder} is of another model: its {name} is {found}, and the "
                                f"text encoder has {needed}.")

    def prepare(self, prompt: str) -> str:
        """The text as the tokenizer gets it."""
        prompt = prompt.encode("utf-8", "replace").decode()  # JSON may hold halves of a letter
        return clean(prompt) if self.lineage.name == "wan" else prompt

    def too_long(self, prompts: list[str]) -> int:
        """How many have more tokens than the model reads, so that their ends are cut."""
        rows = self.tokenizer([self.prepare(prompt) for prompt in prompts]).input_ids
        return sum(len(row) > self.lineage.preset.text_len for row in rows)

    @torch.no_grad()
    def __call__(self, prompts: list[str], batch: int = 8) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D_text) in the model's dtype and lengths (B,) int64, on the CPU, as
        `encode_prompt` of the pipelines in diffusers makes them.

        A length counts the tokens that are not padding. It is 0 for an empty prompt, as everywhere
        in data.py, though its end-of-text token is embedded.
        """
        embeddings = []
        lengths = []
        hint = "a smaller --text_batch needs less"
        with memory_as_sentence(hint), on_device(self.model, self.device):
            for first in range(0, len(prompts), batch):
                texts = [self.prepare(prompt) for prompt in prompts[first:first + batch]]
                tokens = self.tokenizer(
                    texts, padding="max_length", max_length=self.lineage.preset.text_len,
                    truncation=True, return_tensors="pt")
                embedding = self.embed(**tokens.to(self.device))
                embeddings.append(embedding.to("cpu", self.model.dtype))
                empty = torch.tensor([not text.strip() for text in texts])
                lengths.append(tokens.attention_mask.sum(1).cpu().masked_fill(empty, 0))
        return torch.cat(embeddings), torch.cat(lengths)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens (B, L), and a mask (B, L) of those that are not padding -> (B, L, D_text)."""
        if self.lineage.name == "cogvideox":  # it was trained on embeddings of unmasked padding
            return self.model(input_ids).last_hidden_state
        embedding = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return embedding.masked_fill(attention_mask[..., None] == 0, 0)


# --- VAE ----------------------------------------------------------------------------------------
class VAE:
    """AutoencoderKLCogVideoX or AutoencoderKLWan of diffusers, with its chunks over time as
    diffusers has them.

    The first frame alone, then every four, are a latent frame:
    (B, 3, 1 + 4 m, 8 h, 8 w) <-> (B, C, 1 + m, h, w).

    CogVideoX decodes an even number of latent frames f to 4 f frames, not 4 f - 3: its clips have
    1 + 8 m frames.
    """

    def __init__(self, weights: Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
                 tiled: bool = False):
        """weights: the folder with vae/. tiled: in overlapping tiles that are blended, as diffusers
        does: less memory, slightly other numbers. Raises UserError."""
        diffusers = library("diffusers")
        self.lineage = lineage_of(weights)
        self.device = torch.device(device)
        wan = self.lineage.name == "wan"
        if wan:  # as it was trained and is run
            dtype = torch.float32
        kind = getattr(diffusers, self.lineage.vae)
        self.model = load(kind, Path(weights) / "vae", torch_dtype=dtype).to(self.device)
        if wan:
            mean = self.model.config.latents_mean
            std = self.model.config.latents_std
        else:  # `invert_scale_latents` and the like concern image conditions only
            mean = [0.0]
            std = [1 / self.model.config.scaling_factor]
        both = torch.tensor([mean, std], device=self.device)  # (2, C), or (2, 1)
        self.mean, self.std = both.view(2, 1, -1, 1, 1, 1)
        if tiled:
            self.model.enable_tiling()

    @torch.no_grad()
    def encode(self, video: Tensor) -> dict[str, Tensor]:
        """video (B, 3, F, H, W) in [-1, 1] -> {"mean", and for CogVideoX "std"}.

        Each is (B, C, f, h, w) float32 on the VAE's device, in the network's scale. CogVideoX
        trains on mean + std * noise, Wan on the mean.
        """
        with memory_as_sentence("--tiled needs less"):
            found = self.model.encode(video.to(self.device, self.model.dtype)).latent_dist
        latent = {"mean": (found.mean.float() - self.mean) / self.std}
        if self.lineage.name == "cogvideox":
            latent["std"] = found.std.float() / self.std
        return latent

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, C, f, h, w) in the network's scale -> video (B, 3, F, H, W), float32 in
        [-1, 1], on the VAE's device."""
        latent = latent.to(self.device, torch.float32) * self.std + self.mean
        with memory_as_sentence("--tiled needs less"):
            video = self.model.decode(latent.to(self.model.dtype)).sample
        return video.float().clamp(-1, 1)

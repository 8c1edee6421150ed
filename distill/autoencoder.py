"""The autoencoder: diffusers' `AutoencoderKL` in SD3's form (16 latent channels, factor 8, no quant convolutions).

Loss: mean absolute plus mean squared error of the pixels, those of things counting `vae_thing_weight` times, and the KL
divergence of the latents from N(0, 1) at a small weight (Kingma & Welling 2013, eq. 7). The first steps see crops of 64 px
around things (four times the pictures a second), the last ones whole pictures, so that the mid-block attention meets the
size it will serve. Scaling and shift factors are measured on its own latents of training scenes.
"""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from scipy.ndimage import gaussian_filter
from torch import Tensor

from distill.captions import training_scenes
from distill.loop import Run, cosine, set_rate, step_all, train
from distill.muon import Muon, split_parameters
from distill.scenes import SIZE, Scene, render, shape_mask
from distill.settings import Settings


def build(settings: Settings) -> AutoencoderKL:
    """A fresh autoencoder: images [batch, 3, 128, 128] in [-1, 1] to latents [batch, 16, 16, 16]."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=settings.vae_channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
        force_upcast=True,
    )
    # Every residual branch starts at zero, which trains several times faster.
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
    # Latents start nearly without noise: at the usual start (standard deviation 1) the decoder learns to ignore them.
    torch.nn.init.constant_(vae.encoder.conv_out.bias[16:], -6.0)
    return vae


def draw(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Pictures of random training scenes: uint8 [128, 128, 3] each."""
    return [render(scene) for scene in islice(training_scenes(rng), count)]


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures [height, width, 3] as float32 [batch, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(run: Run, settings: Settings) -> AutoencoderKL:
    """Trains the autoencoder (or goes on where it stopped) and measures its scaling and shift factors."""
    if run.start is not None:
        finished = AutoencoderKL.from_pretrained(run.start / "vae", torch_dtype=torch.float32)
        return finished.to(run.accelerator.device).eval().requires_grad_(False)
    torch.manual_seed(run.seed)
    device = run.accelerator.device
    vae = build(settings).to(device, memory_format=torch.channels_last)
    matrices, rest = split_parameters(vae, adam=("conv_in", "conv_out"))
    optimizers = {
        "muon": Muon(matrices, settings.vae_rate),
        "adam": torch.optim.AdamW(rest, settings.vae_rate, betas=(0.9, 0.95)),
    }
    forward = run.accelerator.prepare(_Autoencoder(vae))
    crop_steps = settings.vae_steps - settings.vae_whole_steps

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizers, cosine(step, settings.vae_steps, settings.vae_rate))
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        cropped = step < crop_steps
        scenes = list(islice(training_scenes(rng), settings.vae_batch // 2 if cropped else settings.vae_batch))
        views = [view for scene in scenes for view in (_crops(scene, rng, 4) if cropped else [_whole(scene)])]
        images = to_tensor([picture for picture, _ in views]).to(device, memory_format=torch.channels_last)
        things = torch.from_numpy(np.stack([mask for _, mask in views]))[:, None].to(device)
        weights = 1 + (settings.vae_thing_weight - 1) * things
        side = images.shape[-1] // 8
        noise = torch.randn((len(views), 16, side, side), generator=generator).to(device)
        with run.accelerator.autocast():
            decoded, kl = forward(images, noise)
        error = decoded.float() - images
        loss = (weights * (error.abs() + error.pow(2))).mean() / weights.mean() + settings.vae_kl * kl
        run.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        step_all(optimizers)
        return {"psnr": 10 * np.log10(4 / error.pow(2).mean().item()), "kl": kl.item()}

    train(run, "autoencoder", {"vae": vae}, optimizers, step_fn, settings.vae_steps)
    vae.eval().requires_grad_(False)
    measure = run.folder / "latents.json"
    if not measure.exists():
        measure.write_text(json.dumps(_measure(vae, settings, run.seed)))
    factors = json.loads(measure.read_text())
    vae.register_to_config(scaling_factor=factors["scaling_factor"], shift_factor=factors["shift_factor"])
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: list[np.ndarray]) -> Tensor:
    """Normalised latents of uint8 pictures: float32 [batch, 16, 16, 16]."""
    device = next(vae.parameters()).device
    images = to_tensor(pictures).to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mean = vae.encode(images).latent_dist.mean
    return (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Pictures of normalised latents: uint8 [batch, 128, 128, 3]."""
    images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def reconstruction_psnr(vae: AutoencoderKL, pictures: list[np.ndarray]) -> float:
    """Mean over the pictures of 10 log10(255^2 / mean squared error), in dB."""
    values = []
    for start in range(0, len(pictures), 32):
        batch = pictures[start : start + 32]
        for seen, true in zip(decode(vae, encode(vae, batch)), batch, strict=True):
            error = np.mean((seen.astype(np.float64) - true.astype(np.float64)) ** 2)
            values.append(10 * np.log10(255.0**2 / max(error, 1e-9)))
    return float(np.mean(values))


class _Autoencoder(torch.nn.Module):
    """Encoder, sample and decoder as one forward: images and noise to pictures and the mean KL divergence of a latent value."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        return decoded, 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).mean()


def _whole(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The picture and, as float32 [128, 128], where its things and their rims are."""
    masks = [shape_mask(t.shape, t.outlined, t.x, t.y, t.radius) for t in scene.things]
    return render(scene), (gaussian_filter(np.maximum.reduce(masks), 1.5) > 0.03).astype(np.float32)


def _crops(scene: Scene, rng: np.random.Generator, count: int, side: int = 64) -> list[tuple[np.ndarray, np.ndarray]]:
    """Squares of the picture and mask, each holding the centre of one of the things."""
    picture, mask = _whole(scene)
    crops = []
    for _ in range(count):
        thing = scene.things[int(rng.integers(len(scene.things)))]
        y, x = (int(np.clip(at - rng.uniform(0, side), 0, SIZE - side)) for at in (thing.y, thing.x))
        crops.append((picture[y : y + side, x : x + side], mask[y : y + side, x : x + side]))
    return crops


def _measure(vae: AutoencoderKL, settings: Settings, seed: int) -> dict[str, float]:
    """SD3's convention: (latent - shift) * scale has mean 0 and standard deviation 1 over training scenes."""
    rng = np.random.default_rng(seed)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = torch.cat([encode(vae, draw(rng, 32)) for _ in range(settings.measure_batches)])
    return {"shift_factor": latents.mean().item(), "scaling_factor": 1 / latents.std().item()}

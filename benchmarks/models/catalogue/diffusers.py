"""Denoisers and autoencoders of Hugging Face's diffusers, by the mean squared error of what they restore."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.model import Catalogue, Problem, by_parameters

MODELS = Catalogue("diffusers", ("diffusers",))

_SIZE = 8
_SMALL_UNET = {
    "sample_size": _SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
}


def _images(channels: int = 1, last: bool = False) -> Tensor:
    images = torch.randn(2, channels, _SIZE, _SIZE)
    return images.contiguous(memory_format=torch.channels_last) if last else images


def _denoised(model: nn.Module, last: bool = False, channels: int = 1, **conditions: Tensor) -> Problem:
    if last:
        model.to(memory_format=torch.channels_last)
    noisy, noise = _images(channels, last), _images(channels, last)
    times = torch.tensor([3, 50])

    def loss() -> Tensor:
        return F.mse_loss(model(noisy, times, **conditions).sample, noise)

    return by_parameters(model, loss)


def _unet() -> nn.Module:
    return diffusers.UNet2DModel(
        **_SMALL_UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


@MODELS.row("denoising U-Net")
def unet() -> Problem:
    return _denoised(_unet())


@MODELS.row("denoising U-Net in channels_last")
def unet_channels_last() -> Problem:
    return _denoised(_unet(), last=True)


def _conditioned() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **_SMALL_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
    )


@MODELS.row("denoising U-Net that sees a text")
def unet_condition() -> Problem:
    return _denoised(_conditioned(), encoder_hidden_states=torch.randn(2, 3, 6))


@MODELS.row("denoising U-Net that sees a text, in channels_last")
def unet_condition_channels_last() -> Problem:
    return _denoised(_conditioned(), last=True, encoder_hidden_states=torch.randn(2, 3, 6))


@MODELS.row("diffusion transformer with classes")
def dit() -> Problem:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        sample_size=_SIZE,
        patch_size=2,
        num_embeds_ada_norm=4,
        norm_num_groups=2,
    )
    return _denoised(model, channels=2, class_labels=torch.tensor([0, 2]))


@MODELS.row("variational autoencoder, with its divergence")
def autoencoder_kl() -> Problem:
    model = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=2,
        norm_num_groups=2,
        sample_size=_SIZE,
    )
    images = _images()
    noise = torch.randn(2, 2, _SIZE // 2, _SIZE // 2)

    def loss() -> Tensor:
        found = model.encode(images).latent_dist
        restored = model.decode(found.mean + found.std * noise).sample
        return F.mse_loss(restored, images) + 1e-3 * found.kl().mean()

    return by_parameters(model, loss)


@MODELS.row("autoencoder with a codebook, by straight-through gradients")
def vq() -> Problem:
    model = diffusers.VQModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        latent_channels=2,
        num_vq_embeddings=8,
        norm_num_groups=2,
        sample_size=_SIZE,
        mid_block_add_attention=False,
    )
    images = _images()

    def loss() -> Tensor:
        found = model(images)
        return F.mse_loss(found.sample, images) + found.commit_loss.mean()

    return by_parameters(model, loss)

"""Classifiers of small images from timm, by cross entropy: its classes, with fewer channels and blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.models import (
    cait,
    convmixer,
    convnext,
    densenet,
    efficientnet,
    eva,
    focalnet,
    maxxvit,
    metaformer,
    mlp_mixer,
    mobilenetv3,
    nfnet,
    regnet,
    resnet,
    swin_transformer,
    vision_transformer,
    xcit,
)
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.model import Catalogue, Problem, by_parameters

MODELS = Catalogue("timm", ("timm", "torchvision"))

_CLASSES = 3
_SMALL = {"in_chans": 1, "num_classes": _CLASSES}
_PATCHES = {"img_size": 8, "patch_size": 4, **_SMALL}
_NARROW = partial(round_channels, divisor=2)  # channels are made multiples of 8 otherwise


def _loss(make: Callable[[], nn.Module], size: int, train: bool, last: bool) -> Problem:
    model = make()
    images, kinds = torch.randn(4, 1, size, size), torch.arange(4) % _CLASSES
    if last:
        model.to(memory_format=torch.channels_last)
        images = torch.randn(4, size, size, 1).permute(0, 3, 1, 2)

    def loss() -> Tensor:
        torch.manual_seed(0)  # the same units are dropped at every call
        return F.cross_entropy(model(images), kinds)

    return by_parameters(model, loss, train)


def _row(
    name: str,
    what: str,
    make: Callable[[], nn.Module],
    size: int = 8,
    train: bool = False,
    last: bool = False,
) -> None:
    MODELS.put(name, what, partial(_loss, make, size, train, last))


# ---- convolutions

_RESNET = partial(
    resnet.ResNet, resnet.BasicBlock, (1, 1, 1, 1), channels=(4, 4, 6, 6), stem_width=4, **_SMALL
)
_row("resnet", "residual network of basic blocks", _RESNET, 16)
_row("resnet-train", "residual network of basic blocks, in training", _RESNET, 16, train=True)
_row(
    "resnext",
    "residual network of bottlenecks, with grouped convolutions and a deep stem",
    partial(
        resnet.ResNet,
        resnet.Bottleneck,
        (1, 1, 1, 1),
        channels=(4, 4, 6, 6),
        cardinality=2,
        base_width=32,
        stem_width=4,
        stem_type="deep",
        avg_down=True,
        **_SMALL,
    ),
    16,
)
_row(
    "se-resnet",
    "residual network with squeeze and excitation",
    partial(
        resnet.ResNet,
        resnet.BasicBlock,
        (1, 1, 1, 1),
        channels=(4, 4, 8, 8),
        stem_width=4,
        block_args={"attn_layer": "se"},
        **_SMALL,
    ),
    16,
)
_row(
    "convnext",
    "ConvNeXt, its scales not tiny",
    partial(
        convnext.ConvNeXt,
        depths=(1, 1, 1, 1),
        dims=(4, 4, 6, 6),
        kernel_sizes=3,
        ls_init_value=0.5,
        **_SMALL,
    ),
    32,
)
_row(
    "convnext-v2",
    "ConvNeXt V2, with global response norm, in channels_last",
    partial(
        convnext.ConvNeXt,
        depths=(1, 1, 1, 1),
        dims=(4, 4, 6, 6),
        kernel_sizes=3,
        ls_init_value=None,
        use_grn=True,
        conv_mlp=True,
        **_SMALL,
    ),
    32,
    last=True,
)


def _efficient() -> nn.Module:
    return efficientnet.EfficientNet(
        decode_arch_def([["ds_r1_k3_s1_e1_c4_se0.25"], ["ir_r2_k3_s2_e3_c6_se0.25"]]),
        stem_size=4,
        num_features=10,
        round_chs_fn=_NARROW,
        act_layer=nn.SiLU,
        **_SMALL,
    )


def _mobile() -> nn.Module:
    return mobilenetv3.MobileNetV3(
        decode_arch_def([["ds_r1_k3_s1_e1_c4_se0.25_nre"], ["ir_r1_k3_s2_e3_c6_se0.25"], ["cn_r1_k1_s1_c8"]]),
        stem_size=4,
        num_features=10,
        round_chs_fn=_NARROW,
        act_layer=nn.Hardswish,
        **_SMALL,
    )


_row("efficientnet", "EfficientNet", _efficient)
_row("efficientnet-train", "EfficientNet, in training", _efficient, train=True)
_row("mobilenet-v3", "MobileNetV3, by hard swish", _mobile)
_row(
    "regnet",
    "RegNetY",
    lambda: regnet.RegNet(
        regnet.RegNetCfg(depth=4, w0=8, wa=8.0, wm=1.4, group_size=4, se_ratio=0.25, stem_width=4), **_SMALL
    ),
)
_row(
    "densenet",
    "DenseNet",
    partial(densenet.DenseNet, growth_rate=4, block_config=(2, 2), bn_size=2, stem_type="deep", **_SMALL),
    16,
)
_row(
    "nf-resnet",
    "residual network without norms, by convolutions with standardised weights",
    lambda: nfnet.NormFreeNet(
        nfnet.NfCfg((1, 1, 1, 1), (4, 4, 6, 6), stem_type="3x3", stem_chs=4, group_size=2, ch_div=2), **_SMALL
    ),
    16,
)
_row(
    "convmixer",
    "ConvMixer",
    partial(convmixer.ConvMixer, dim=8, depth=2, kernel_size=3, patch_size=2, **_SMALL),
)

# ---- patches

_row(
    "vit",
    "vision transformer",
    partial(vision_transformer.VisionTransformer, embed_dim=12, depth=2, num_heads=2, **_PATCHES),
)
_row(
    "vit-registers",
    "vision transformer with registers, norms of queries and keys, layer scale and attention pooling",
    partial(
        vision_transformer.VisionTransformer,
        embed_dim=12,
        depth=2,
        num_heads=2,
        reg_tokens=2,
        qk_norm=True,
        init_values=0.5,
        global_pool="map",
        **_PATCHES,
    ),
)
_row(
    "vit-dropout",
    "vision transformer in training, with dropout and dropped paths",
    partial(
        vision_transformer.VisionTransformer,
        embed_dim=12,
        depth=2,
        num_heads=2,
        proj_drop_rate=0.1,
        drop_path_rate=0.2,
        **_PATCHES,
    ),
    train=True,
)
_row(
    "eva",
    "EVA-02, with rotary positions and SwiGLU",
    partial(
        eva.Eva,
        embed_dim=16,
        depth=2,
        num_heads=2,
        swiglu_mlp=True,
        use_rot_pos_emb=True,
        mlp_ratio=2.0,
        head_init_scale=1.0,
        **_PATCHES,
    ),
)
_row(
    "cait",
    "CaiT, with talking heads and class attention",
    partial(
        cait.Cait,
        embed_dim=12,
        depth=1,
        num_heads=2,
        depth_token_only=1,
        mlp_ratio=2.0,
        init_values=0.5,
        **_PATCHES,
    ),
)
_row(
    "xcit",
    "XCiT, attention between channels",
    partial(
        xcit.Xcit,
        embed_dim=8,
        depth=1,
        num_heads=2,
        cls_attn_layers=1,
        eta=0.5,
        **_PATCHES | {"img_size": 32, "patch_size": 8},
    ),
    32,
)
_row(
    "swin",
    "Swin transformer, with shifted windows",
    partial(
        swin_transformer.SwinTransformer,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
        window_size=2,
        mlp_ratio=2.0,
        **_PATCHES | {"patch_size": 2},
    ),
)
_row(
    "mlp-mixer",
    "MLP-Mixer",
    partial(mlp_mixer.MlpMixer, num_blocks=2, embed_dim=12, mlp_ratio=(1.0, 2.0), **_PATCHES),
)
_row(
    "poolformer",
    "PoolFormer",
    partial(
        metaformer.MetaFormer,
        depths=(1, 1),
        dims=(4, 6),
        token_mixers=metaformer.Pooling,
        layer_scale_init_values=0.5,
        res_scale_init_values=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        use_mlp_head=False,
        **_SMALL,
    ),
    16,
)
_row(
    "focalnet",
    "FocalNet, with focal modulation",
    partial(
        focalnet.FocalNet, embed_dim=6, depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3), **_SMALL
    ),
    16,
)
_row(
    "maxvit",
    "MaxViT, with attention in windows and grids",
    lambda: maxxvit.MaxxVit(
        maxxvit.MaxxVitCfg(
            embed_dim=(8,),
            depths=(1,),
            block_type=("M",),
            stem_width=4,
            conv_cfg=maxxvit.MaxxVitConvCfg(expand_ratio=2.0),
            transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=4, expand_ratio=2.0, window_size=(2, 2)),
        ),
        img_size=16,
        **_SMALL,
    ),
    16,
)

"""The models that `remove_zoo.py` runs over, with an input small enough for one core, and weights fit for a proof."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SUITES = ("torchvision", "segmentation", "video", "timm")

# Input sizes (per sample, channels first) of models that don't take SMALL.
SMALL = (3, 64, 64)
_SIZES = {
    "inception_v3": (3, 96, 96), "maxvit_t": (3, 224, 224),
    "vit_b_16": (3, 224, 224), "vit_b_32": (3, 224, 224), "vit_h_14": (3, 224, 224), "vit_l_16": (3, 224, 224),
    "vit_l_32": (3, 224, 224),
    "r3d_18": (3, 8, 56, 56), "mc3_18": (3, 8, 56, 56), "r2plus1d_18": (3, 8, 56, 56), "s3d": (3, 16, 224, 224),
    "mvit_v1_b": (3, 16, 224, 224), "mvit_v2_s": (3, 16, 224, 224), "swin3d_t": (3, 4, 64, 64),
    "swin3d_s": (3, 4, 64, 64), "swin3d_b": (3, 4, 64, 64),
}

# One or a few small members of each family of timm. Models that fix their input size run at it, others at 96 x 96.
TIMM_SIZE = 96
_TIMM = """
resnet18 resnet26t seresnet18 ecaresnet26t resnext26ts gcresnext26ts resnest14d skresnet18 res2net50_26w_4s
resnetv2_50 resnetaa34d botnet26t_256 halonet26t lambda_resnet26t densenet121 vgg11_bn inception_v3 inception_v4
inception_resnet_v2 xception41 legacy_xception legacy_seresnext26_32x4d mobilenetv2_050 mobilenetv3_small_050
mobilenetv4_conv_small mobilenetv4_hybrid_medium mnasnet_small efficientnet_b0 efficientnetv2_rw_t mixnet_s spnasnet_100
fbnetc_100 hardcorenas_a lcnet_050 tinynet_e ghostnet_050 ghostnetv2_100 rexnet_100 regnetx_002 regnety_002 regnetv_040
nfnet_f0 nf_resnet26 eca_nfnet_l0 tresnet_m selecsls42 ese_vovnet19b_dw cspresnet50 cspdarknet53 darknet53 cs3darknet_s
dla34 dpn48b hrnet_w18_small hgnet_tiny hgnetv2_b0 repvgg_a0 mobileone_s0 convnext_atto convnextv2_atto
inception_next_atto starnet_s1 fastvit_t8 repvit_m0_9 rdnet_tiny edgenext_xx_small convmixer_768_32 poolformer_s12
poolformerv2_s12 caformer_s18 convformer_s18 vit_tiny_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224
cait_xxs24_224 beit_base_patch16_224 eva02_tiny_patch14_224 xcit_nano_12_p16_224 volo_d1_224 tnt_s_patch16_224
visformer_tiny pit_ti_224 crossvit_tiny_240 twins_pcpvt_small twins_svt_small pvt_v2_b0 nest_tiny coat_tiny convit_tiny
levit_128s efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 mobilevit_xxs mobilevitv2_050
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 gcvit_xxtiny davit_tiny
focalnet_tiny_srf sequencer2d_s hiera_tiny_224 mvitv2_tiny tiny_vit_5m_224 nextvit_small swiftformer_xs fasternet_t0
mambaout_femto mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224
"""

# Those whose windows or positions are laid out for one size, though timm doesn't mark them.
_TIMM_SIZES = {
    "botnet26t_256": 256, "halonet26t": 256, "maxvit_rmlp_pico_rw_256": 256, "coatnet_pico_rw_224": 224,
    "gcvit_xxtiny": 224, "sequencer2d_s": 224, "crossvit_tiny_240": 240, "davit_tiny": 224, "nest_tiny": 224,
    "twins_pcpvt_small": 224, "twins_svt_small": 224, "mobilevit_xxs": 128, "mobilevitv2_050": 128,
    "efficientformer_l1": 224, "efficientformerv2_s0": 224, "levit_128s": 224, "tiny_vit_5m_224": 224,
    "visformer_tiny": 224, "coat_tiny": 224, "volo_d1_224": 224, "tnt_s_patch16_224": 224, "hiera_tiny_224": 224,
    "mvitv2_tiny": 224, "swiftformer_xs": 224, "efficientvit_m0": 224, "nextvit_small": 128,
    "xcit_nano_12_p16_224": 96, "legacy_xception": 128, "inception_v4": 128, "inception_resnet_v2": 128,
    "inception_v3": 128, "lambda_resnet26t": 128,
}


@dataclass(frozen=True)
class Entry:
    """One model of a suite."""

    suite: str
    name: str
    full: bool = False  # at the input size the model is meant for, and not at a small one

    @property
    def key(self) -> str:
        """How the CSV and `--only` call it: torchvision's and timm's names overlap."""
        return self.name if self.suite == "torchvision" else f"{self.suite}/{self.name}"

    def build(self) -> nn.Module:
        """The model with untrained weights drawn with seed 0, in evaluation mode; see `enliven`."""
        torch.manual_seed(0)
        if self.suite == "timm":
            import timm

            model = timm.create_model(self.name, pretrained=False, num_classes=1000)
        else:
            from torchvision import models

            options = {"weights": None} | ({"weights_backbone": None} if self.suite == "segmentation" else {})
            model = models.get_model(self.name, **options)
        enliven(model)
        return model.eval()

    def inputs(self, model: nn.Module) -> Tensor:
        """Normally distributed inputs: two samples, or one if they are large."""
        size = self.size(model)
        batch = 2 if len(size) == 3 and size[-1] < 200 else 1
        return torch.randn(batch, *size, generator=torch.Generator().manual_seed(1))

    def size(self, model: nn.Module) -> tuple[int, ...]:
        """The size of one input, channels first."""
        if self.suite != "timm":
            return _SIZES.get(self.name, (3, 224, 224) if self.full else SMALL)
        config = model.default_cfg
        fixed = config.get("fixed_input_size", False) or self.full
        side = config["input_size"][-1] if fixed else _TIMM_SIZES.get(self.name, TIMM_SIZE)
        return (3, side, side)


def enliven(model: nn.Module) -> None:
    """Give what an untrained model holds constant (zeroed last norms, layer scales of 1e-6, running statistics, zeroed
    biases) random values: otherwise whole branches are zero, and a proof of them says nothing."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            last = name.rpartition(".")[2]
            if last == "running_mean":
                tensor.normal_(0, 0.1)
            elif last == "running_var":
                tensor.uniform_(0.5, 1.5)
            elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and _constant(tensor):
                if last == "bias":
                    tensor.normal_(0, 0.1)
                else:
                    tensor.uniform_(0.5, 1.0)


def _constant(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool((tensor == tensor.reshape(-1)[0]).all())


def entries(suite: str) -> Iterator[Entry]:
    """The models of a suite ("all" for every one)."""
    from torchvision import models

    modules = {"torchvision": models, "segmentation": models.segmentation, "video": models.video}
    for one in SUITES if suite == "all" else (suite,):
        names = _TIMM.split() if one == "timm" else sorted(models.list_models(module=modules[one]))
        for name in names:
            yield Entry(one, name)

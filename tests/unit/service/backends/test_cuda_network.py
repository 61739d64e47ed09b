"""The network of a CUDA device, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.config import ModelConfig
from diffusion.unet import UNet
from service.backends.cuda_network import CudaUNet, group_norm

BASE = {"image_size": 16, "image_channels": 3, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
ADM = {
    "attention_resolutions": (8, 16),
    "num_head_channels": 16,
    "attention_order": "new",
    "resblock_updown": True,
    "num_classes": 5,
    "null_class": True,
}


def network(**fields: object) -> UNet:
    torch.manual_seed(0)
    unet = UNet(ModelConfig.model_validate(BASE | fields)).eval().requires_grad_(requires_grad=False)
    for parameter in unet.parameters():  # no zeros: every layer counts
        parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def inputs(unet: UNet, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    y = None if unet.config.num_classes is None else torch.arange(rows) % unet.config.num_labels
    return torch.randn(rows, 3, 16, 16), unet.embed_timesteps(torch.linspace(0, 999, rows)), y


@pytest.mark.parametrize(
    "fields",
    [
        ADM,
        {"attention_resolutions": (8,), "num_heads": 2},
        {"use_scale_shift_norm": False, "conv_resample": False, "norm_groups": 8, "model_channels": 64},
    ],
)
def test_computes_what_the_network_computes(fields: dict[str, object]) -> None:
    unet = network(**fields)
    given = inputs(unet, 3)
    expected = unet.forward_emb(*given)
    out = CudaUNet(unet, torch.float32, group_norm, most_rows=4)(*given)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_and_its_result_is_float32() -> None:
    unet = network(**ADM)
    given = inputs(unet, 3)
    expected = unet.forward_emb(*given)
    out = CudaUNet(unet, torch.bfloat16, group_norm, most_rows=4)(*given)
    assert out.dtype == torch.float32
    assert float((out - expected).norm() / expected.norm()) < 0.03


def test_heads_have_unit_stride_along_their_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash, memory-efficient and cuDNN attention require it; otherwise PyTorch computes the L x L matrix."""
    attend, strides = F.scaled_dot_product_attention, list[int]()

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        strides.extend(part.stride(-1) for part in (q, k, v))
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    unet = network(**ADM)
    given = inputs(unet, 2)
    CudaUNet(unet, torch.float32, group_norm, most_rows=2)(*given)
    assert len(strides) == 3 * 7
    assert set(strides) == {1}

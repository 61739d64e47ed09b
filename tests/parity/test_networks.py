"""The networks compared with OpenAI's: weight names and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion.unet import UNet
from tests import golden

UNETS = (
    "imp_cond_ls",
    "imp_uncond",
    "imp_multiattn",
    "imp_superres",
    "adm_new",
    "adm_legacy",
    "adm_avgpool",
    "adm_superres",
)
CLASSIFIERS = ("clf_adaptive", "clf_attention", "clf_spatial")

TOLERANCE = golden.NETWORK_TOLERANCE


def _max_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max())


def _run(name: str, t: str) -> Tensor:
    data = golden.load(name)
    return golden.network(name)(data.tensor("x"), data.tensor(t), data.optional("y"), golden.cond(data, name))


@pytest.mark.parametrize("name", UNETS)
def test_unet_predicts_what_the_reference_predicts(name: str) -> None:
    assert _max_error(_run(name, "t"), golden.load(name).tensor("out")) < TOLERANCE


@pytest.mark.parametrize("name", UNETS)
def test_unet_accepts_fractional_timesteps(name: str) -> None:
    assert _max_error(_run(name, "t_frac"), golden.load(name).tensor("out_t_frac")) < TOLERANCE


@pytest.mark.parametrize("name", UNETS)
def test_unet_has_the_reference_s_number_of_parameters(name: str) -> None:
    assert sum(p.numel() for p in golden.network(name).parameters()) == golden.load(name).config["num_parameters"]


@pytest.mark.parametrize("name", [name for name in UNETS if "feat_middle" in golden.load(name)])
def test_unet_has_the_reference_s_features_inside(name: str) -> None:
    data, network = golden.load(name), golden.network(name)
    emb = network.embed_timesteps(data.tensor("t"))
    if (y := data.optional("y")) is not None:
        emb = emb + network.label_emb(y)
    *skips, middle = network.encode(data.tensor("x"), emb)
    first_up = network.output_blocks[0](torch.cat([middle, skips[-1]], dim=1), emb)

    assert _max_error(skips[-1], data.tensor("feat_down_last")) < TOLERANCE
    assert _max_error(middle, data.tensor("feat_middle")) < TOLERANCE
    assert _max_error(first_up, data.tensor("feat_up_first")) < TOLERANCE


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_predicts_what_the_reference_predicts(name: str) -> None:
    data, network = golden.load(name), golden.classifier(name)
    logits = network(data.tensor("x"), data.tensor("t"))

    assert _max_error(logits, data.tensor("out")) < TOLERANCE
    assert _max_error(network(data.tensor("x"), data.tensor("t_frac")), data.tensor("out_t_frac")) < TOLERANCE
    assert torch.equal(network.forward_emb(data.tensor("x"), network.embed_timesteps(data.tensor("t"))), logits)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_has_the_reference_s_log_probability_and_gradient(name: str) -> None:
    data = golden.load(name)
    x_t = data.tensor("x").requires_grad_()
    log_probs = torch.log_softmax(golden.classifier(name)(x_t, data.tensor("t")), dim=-1)
    chosen = log_probs.gather(1, data.tensor("y")[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(chosen.sum(), x_t)

    assert _max_error(chosen, data.tensor("log_prob")) < TOLERANCE
    torch.testing.assert_close(gradient, data.tensor("grad_logp_x"), rtol=golden.GRADIENT_TOLERANCE, atol=1e-6)


def test_a_wrong_attention_layout_changes_these_numbers() -> None:
    name = "adm_new"
    config = golden.model_config(name)
    legacy = UNet(config.replace(attention_order="legacy")).eval().requires_grad_(False)
    legacy.load_state_dict(golden.network(name).state_dict())
    data = golden.load(name)

    out = legacy(data.tensor("x"), data.tensor("t"), data.tensor("y"))

    assert _max_error(out, data.tensor("out")) > 100 * TOLERANCE

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.classifier import classifier_gradient
from diffusion.guidance import classifier_free


def _outputs(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    uncond, cond = torch.randn(2, 4, channels, 5, 5, generator=generator)
    return uncond, cond


def test_scale_one_is_bit_identical_to_no_guidance() -> None:
    uncond, cond = _outputs(6)
    assert torch.equal(classifier_free(uncond, cond, 1.0, 3), cond)


def test_scale_zero_ignores_the_class_but_keeps_its_variance() -> None:
    uncond, cond = _outputs(6)
    guided = classifier_free(uncond, cond, 0.0, 3)

    assert torch.equal(guided[:, :3], uncond[:, :3])
    assert torch.equal(guided[:, 3:], cond[:, 3:])


def test_the_prediction_is_extrapolated_and_var_values_are_not() -> None:
    uncond, cond = _outputs(6)
    guided = classifier_free(uncond, cond, 3.0, 3)

    torch.testing.assert_close(guided[:, :3], 3 * cond[:, :3] - 2 * uncond[:, :3])
    assert torch.equal(guided[:, 3:], cond[:, 3:])


def test_all_channels_are_guided_without_var_values() -> None:
    uncond, cond = _outputs(3)
    torch.testing.assert_close(classifier_free(uncond, cond, 2.0, 3), 2 * cond - uncond)


def test_every_row_may_have_its_own_scale() -> None:
    uncond, cond = _outputs(6)
    scales = [0.0, 1.0, 1.5, 7.0]
    together = classifier_free(uncond, cond, torch.tensor(scales), 3)

    for row, scale in enumerate(scales):
        alone = classifier_free(uncond[row : row + 1], cond[row : row + 1], scale, 3)
        assert torch.equal(together[row], alone[0])


def test_numpy_arrays_are_guided_like_tensors() -> None:
    uncond, cond = _outputs(6)
    scales = torch.tensor([0.0, 1.0, 1.5, 7.0])
    guided = classifier_free(uncond.numpy(), cond.numpy(), scales.numpy(), 3)

    assert isinstance(guided, np.ndarray)
    np.testing.assert_array_equal(guided, classifier_free(uncond, cond, scales, 3).numpy())


def test_the_gradient_of_a_linear_classifier_is_known() -> None:
    # logits = W x: the gradient of log softmax_y is W_y - sum_k p_k W_k
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator)
    x = torch.randn(3, 3, 2, 2, generator=generator)
    y = torch.tensor([4, 0, 2])

    def classifier(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.flatten(1) @ weight.T * t[:, None]

    t = torch.tensor([1.0, 2.0, 0.5])
    gradient = classifier_gradient(classifier, x, t, y, torch.tensor([1.0, 0.0, 10.0]))

    probabilities = torch.softmax(classifier(x, t), dim=1)
    expected = (weight[y] - probabilities @ weight) * t[:, None] * torch.tensor([[1.0], [0.0], [10.0]])
    torch.testing.assert_close(gradient.flatten(1), expected)


def test_the_gradient_is_computed_with_gradients_off_and_leaves_no_trace() -> None:
    x = torch.zeros(2, 1, 2, 2)
    with torch.no_grad():
        gradient = classifier_gradient(lambda x_t, _: x_t.flatten(1), x, torch.zeros(2), torch.tensor([0, 3]), 4.0)

    torch.testing.assert_close(gradient[1].flatten(), torch.tensor([-1.0, -1.0, -1.0, 3.0]))
    assert not gradient.requires_grad
    assert not x.requires_grad


def test_a_label_unknown_to_the_classifier_is_refused() -> None:
    with pytest.raises(IndexError):
        classifier_gradient(
            lambda x_t, _: x_t.flatten(1), torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.tensor([4]), 1.0
        )

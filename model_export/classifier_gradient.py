"""The noisy classifier's gradient as a graph without autograd, so that runtimes without PyTorch can compute guidance.

The gradient is traced once with `make_fx`, which returns a plain graph of forward and backward operations.
Two backward operations have no translation to ONNX; they are replaced here by an equivalent convolution and an
upsampling. docs/decisions/0007-classifier-gradient.md lists the alternatives that were tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from diffusion.classifier import Classifier

aten = torch.ops.aten


def gradient_graph(classifier: Classifier, x_t: Tensor, emb_t: Tensor, y: Tensor) -> fx.GraphModule:
    """Trace (x_t, emb_t, y) -> the gradient of log p(y | x_t) with respect to x_t.

    Args:
        classifier: float32, without fused attention (`model_export.inference_graph.rewrite`).
        x_t: an example, [B, C, H, W]; B may differ when the graph is run.
        emb_t: an example, float32 [B, emb_channels].
        y: an example, int64 [B].

    Returns:
        A module that returns the gradient, shaped like x_t.
    """

    def gradient(x_t: Tensor, emb_t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            log_p = F.log_softmax(classifier.forward_emb(x, emb_t), dim=-1)
            return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]

    trace = make_fx(
        gradient, decomposition_table=_decompositions(), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )
    return trace(x_t, emb_t, y)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    backward = [
        aten._softmax_backward_data,  # noqa: SLF001  # the names of PyTorch's own table
        aten._log_softmax_backward_data,  # noqa: SLF001
        aten.tanh_backward,
        aten.sigmoid_backward,
        aten.silu_backward,
        aten.threshold_backward,
        aten.native_group_norm,
        aten.native_group_norm_backward,
        aten.linalg_vector_norm,
        aten.select_backward,
        aten.slice_backward,
    ]
    return {
        **get_decompositions(backward),
        aten.convolution_backward.default: _convolution_backward,
        aten.avg_pool2d_backward.default: _avg_pool2d_backward,
    }


def _convolution_backward(  # the operation's own arguments
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _output_padding: list[int],
    groups: int,
    _mask: list[bool],
) -> tuple[Tensor, None, None]:
    """Return the gradient with respect to the input only.

    It is a transposed convolution whose output has the input's size. With stride 1 it is written as the equivalent
    convolution with mirrored weights: OpenVINO 2026.4 computed wrong numbers for the transposed form in this graph.
    """
    if transposed or groups != 1:
        raise NotImplementedError("the classifier has plain convolutions only")
    if all(s == 1 for s in stride):
        mirrored = weight.transpose(0, 1).flip(2, 3)
        margin = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        return aten.convolution.default(grad, mirrored, None, [1, 1], margin, dilation, False, [0, 0], 1), None, None
    sizes = zip(x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    missing = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
    by_input = aten.convolution.default(grad, weight, None, stride, padding, dilation, True, missing, groups)
    return by_input, None, None


def _avg_pool2d_backward(grad: Tensor, x: Tensor, kernel: list[int], *_: object) -> Tensor:
    """Distribute each pooled value over its pixels: the entire map, or 2 x 2, as the networks pool."""
    if list(kernel) == list(x.shape[2:]):
        return (grad / (kernel[0] * kernel[1])).expand(x.shape)
    if list(kernel) == [2, 2]:
        return F.interpolate(grad, scale_factor=2.0, mode="nearest") / 4
    raise NotImplementedError("the classifier pools 2 x 2, or entire maps")

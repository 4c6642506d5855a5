"""``select_sdpa_kernel``: training on a CPU uses the unfused kernel, with equal gradients."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from hyperlora.cpu import select_sdpa_kernel


def compute_gradient(x: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, str]:
    x = x.clone().requires_grad_()
    with select_sdpa_kernel(x, seq_len):
        y = scaled_dot_product_attention(x, x.flip(-1), x)
    y.square().sum().backward()
    assert x.grad is not None and y.grad_fn is not None
    return x.grad, type(y.grad_fn).__name__


def test_select_sdpa_kernel_keeps_gradients() -> None:
    x = torch.randn(2, 4, 32, 8, generator=torch.Generator().manual_seed(0))
    math_gradient, math_name = compute_gradient(x, 32)
    fused_gradient, fused_name = compute_gradient(x, 4096)
    torch.testing.assert_close(math_gradient, fused_gradient, atol=1e-5, rtol=1e-4)
    assert "Flash" in fused_name and "Flash" not in math_name


def test_select_sdpa_kernel_does_nothing_without_gradients() -> None:
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad(), select_sdpa_kernel(x, 8):
        assert torch.backends.cuda.flash_sdp_enabled()

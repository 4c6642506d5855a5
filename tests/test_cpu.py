"""Learning on a CPU takes the plain product, which is the same sum."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from hyperlora.cpu import select_sdpa_kernel


def gradient(x: torch.Tensor, positions: int) -> tuple[torch.Tensor, str]:
    x = x.clone().requires_grad_()
    with select_sdpa_kernel(x, positions):
        y = scaled_dot_product_attention(x, x.flip(-1), x)
    y.square().sum().backward()
    assert x.grad is not None and y.grad_fn is not None
    return x.grad, type(y.grad_fn).__name__


def test_gradients_are_the_fused_kernels() -> None:
    x = torch.randn(2, 4, 32, 8, generator=torch.Generator().manual_seed(0))
    (plain, how), (fused, other) = gradient(x, 32), gradient(x, 4096)
    torch.testing.assert_close(plain, fused, atol=1e-5, rtol=1e-4)
    assert "Flash" in other and "Flash" not in how


def test_where_nothing_is_learned_the_fused_kernel_stays() -> None:
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad(), select_sdpa_kernel(x, 8):
        assert torch.backends.cuda.flash_sdp_enabled()

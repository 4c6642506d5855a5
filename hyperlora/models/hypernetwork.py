"""``Hypernetwork``: image features to LoRA weights, by a transformer decoder.

    θ_0 = init_codes,   θ_k = θ_{k-1} + T(features, θ_{k-1}),   k = 1..s      (2307.06949, §4.2)
    LoRA = head(θ_s)

The decoder T has one token per LoRA factor: ``down`` and ``up`` of every target module. A code in
θ is a short vector per factor, which a head of ``hyperlora.lora.heads`` expands to the factor.

With the head ``lidb`` and s > 1 this is HyperDreamBooth. With a learned basis and s = 1 it is the
end-to-end variant that this project trains.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn

from hyperlora.cpu import select_sdpa_kernel
from hyperlora.features import ImageFeatures
from hyperlora.lora.heads import make_head
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights


class HypernetworkConfig(TypedDict):
    """Arguments of a ``Hypernetwork`` besides its layout, as in ``config.json``."""

    feature_width: int
    width: int
    depth: int
    num_heads: int
    iterations: int
    head: str
    head_options: dict[str, int | bool]


class Hypernetwork(nn.Module):
    """Transformer decoder from the tokens of all photos (memory) to the codes of all LoRA factors.

    At initialization ΔW = 0 for every photo: the ``up`` codes are zero. Gradients flow, because
    the ``down`` codes are not.

    Args:
        layout: Target modules and rank of the predicted LoRAs.
        feature_width: Width of the image tokens.
        width: Of the decoder.
        depth: Number of decoder layers.
        num_heads: Attention heads per layer.
        iterations: s, how often the decoder refines the codes.
        head: Name of the head that expands codes: ``lidb``, ``basis``, ``softmax`` or ``direct``.
        head_options: Keyword arguments of the head.

    Raises:
        InvalidArgumentError: If the head is unknown.
    """

    def __init__(
        self,
        layout: LoraLayout,
        feature_width: int,
        width: int = 192,
        depth: int = 2,
        num_heads: int = 4,
        iterations: int = 1,
        head: str = "basis",
        head_options: dict[str, int | bool] | None = None,
    ) -> None:
        super().__init__()
        self.config: HypernetworkConfig = {
            "feature_width": feature_width,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "iterations": iterations,
            "head": head,
            "head_options": head_options or {},
        }
        self.layout, self.iterations = layout, iterations
        self.head = make_head(head, layout, **(head_options or {}))
        num_factors, code_size = 2 * len(layout.targets), self.head.code_size
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(feature_width), nn.Linear(feature_width, width)
        )
        self.queries = nn.Parameter(torch.randn(num_factors, width) * 0.02)
        layer = nn.TransformerDecoderLayer(
            width,
            num_heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.decoder = nn.TransformerDecoder(layer, depth, nn.LayerNorm(width))
        # one output projection per factor and, with iterations, one embedding of its last code
        self.code_proj = nn.Parameter(torch.zeros(num_factors, code_size, width))
        self.init_codes = nn.Parameter(self.head.init_codes())  # [num_factors, code_size]
        if iterations > 1:
            self.code_embed = nn.Parameter(
                torch.randn(num_factors, width, code_size) * code_size**-0.5 * 0.1
            )

    def predict_codes(self, features: ImageFeatures) -> Tensor:
        """Predict θ_s, the codes of all factors.

        Args:
            features: Of the photos of each subject, tokens [batch, views, tokens, feature_width].

        Returns:
            Codes of all ``down`` factors, then of all ``up`` factors: [batch, 2 * num_targets,
            code_size].
        """
        memory = self.memory_proj(features.flatten_views())  # [batch, views * tokens, width]
        batch_size = len(memory)
        codes = self.init_codes.expand(batch_size, -1, -1)  # θ_0 [batch, num_factors, code_size]
        for _ in range(self.iterations):
            queries = self.queries.expand(batch_size, -1, -1)  # [batch, num_factors, width]
            if self.iterations > 1:
                # each factor's token also sees its code: + E_f θ_{k-1, f}
                queries = queries + torch.einsum("fwc,bfc->bfw", self.code_embed, codes)
            with select_sdpa_kernel(memory, max(len(self.queries), memory.shape[1])):
                hidden_states = self.decoder(queries, memory)  # [batch, num_factors, width]
            # θ_k = θ_{k-1} + P_f h_f, a projection of its own for every factor
            codes = codes + torch.einsum("fcw,bfw->bfc", self.code_proj, hidden_states)
        return codes

    def forward(self, features: ImageFeatures) -> LoraWeights:
        """Predict one LoRA per subject.

        Args:
            features: Of the photos of each subject, tokens [batch, views, tokens, feature_width].

        Returns:
            LoRAs with a batch axis [batch].
        """
        return self.decode_codes(self.predict_codes(features))

    def decode_codes(self, codes: Tensor) -> LoraWeights:
        """Expand codes to LoRA weights.

        Args:
            codes: As ``predict_codes`` returns them, [batch, 2 * num_targets, code_size].

        Returns:
            LoRAs with a batch axis [batch].
        """
        down, up = codes.chunk(2, -2)  # each [batch, num_targets, code_size]
        return self.head(down, up)

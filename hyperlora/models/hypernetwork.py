"""``Hypernetwork``: image features to LoRA weights by a transformer decoder over one token per factor and site.

    θ_0 = start,   θ_k = θ_{k-1} + T(features, θ_{k-1}),   k = 1..s        (2307.06949, §4.2)

With ``make_head`` lidb and s > 1 this is HyperDreamBooth; with a learned basis and s = 1 the end-to-end variant.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.cpu import select_sdpa_kernel
from hyperlora.features import ImageFeatures
from hyperlora.lora.heads import make_head
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights


class Hypernetwork(nn.Module):
    """Transformer decoder whose queries are the LoRA's factors and whose memory is all photos' tokens.

    ``iterations`` is s; ``generate_invalid_header`` names the parametrisation, ``head_options`` its options. At initialisation ΔW = 0
    for every photo, and gradients flow (only the ``up`` codes are zero).
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
        head_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = {
            "feature_width": feature_width,
            "width": width,
            "depth": depth,
            "heads": num_heads,
            "iterations": iterations,
            "head": head,
            "head_options": head_options or {},
        }
        self.layout, self.iterations = layout, iterations
        self.head = make_head(head, layout, **(head_options or {}))
        num_targets, code_size = len(layout.targets), self.head.code_size
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(feature_width), nn.Linear(feature_width, width)
        )
        self.queries = nn.Parameter(torch.randn(2 * num_targets, width) * 0.02)
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
        # one head (and, if it iterates, one embedding of the last guess) per factor and site
        self.code_proj = nn.Parameter(torch.zeros(2 * num_targets, code_size, width))
        self.init_codes = nn.Parameter(self.head.init_codes())
        if iterations > 1:
            self.code_embed = nn.Parameter(
                torch.randn(2 * num_targets, width, code_size) * code_size**-0.5 * 0.1
            )

    def predict_codes(self, features: ImageFeatures) -> Tensor:
        """θ_s [batch, 2 * sites, code_size]: the codes of all ``down`` factors, then of all ``up`` factors."""
        memory = self.memory_proj(features.flatten_views())
        codes = self.init_codes.expand(len(memory), -1, -1)
        for _ in range(self.iterations):
            queries = self.queries.expand(len(memory), -1, -1)
            if self.iterations > 1:
                queries = queries + torch.einsum("twc,btc->btw", self.code_embed, codes)
            with select_sdpa_kernel(memory, max(len(self.queries), memory.shape[1])):
                decoder_output = self.decoder(queries, memory)
            codes = codes + torch.einsum("tcw,btw->btc", self.code_proj, decoder_output)
        return codes

    def forward(self, features: ImageFeatures) -> LoraWeights:
        """One LoRA per subject of the batch."""
        return self.decode_codes(self.predict_codes(features))

    def decode_codes(self, codes: Tensor) -> LoraWeights:
        """Codes as ``predict_codes`` returns them to weights."""
        down, up = codes.chunk(2, -2)
        return self.head(down, up)

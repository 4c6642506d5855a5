"""``Hypernetwork``: image features to LoRA weights, by a transformer decoder.

    θ_0 = init_codes,   θ_k = θ_{k-1} + T(features, θ_{k-1}),   k = 1..s      (2307.06949, §4.2)
    LoRA = head(θ_s)

The decoder T has one token per LoRA factor: ``down`` and ``up`` of every target module. A code in
θ is a short vector per factor, which a head of ``hyperlora.lora.heads`` expands to the factor.

With the head ``lidb`` and s > 1 it has the form of HyperDreamBooth. The shipped networks have a
learned basis and s = 1, and were trained end to end through the base.
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

    Letters of shapes: B subjects (batch), V views (photos of one subject), N tokens per view, F
    ``feature_width``, d ``width``, M LoRA factors (``down`` of all targets, then ``up`` of all
    targets), K numbers per code, r rank.

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
        num_factors, code_size = 2 * len(layout.targets), self.head.code_size  # M, K
        # LayerNorm first: image encoders differ in the scale of their tokens
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(feature_width), nn.Linear(feature_width, width)
        )
        # standard deviation 0.02 as for the position embeddings of a ViT
        self.queries = nn.Parameter(torch.randn(num_factors, width) * 0.02)  # [M, d]
        layer = nn.TransformerDecoderLayer(
            width,
            num_heads,
            4 * width,  # of the MLP (1706.03762, §3.3)
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,  # pre-LN: well-behaved gradients at first (2002.04745)
        )
        self.decoder = nn.TransformerDecoder(layer, depth, nn.LayerNorm(width))
        # P_m, one output projection per factor; 0, so every photo gets init_codes at first
        self.code_proj = nn.Parameter(torch.zeros(num_factors, code_size, width))  # [M, K, d]
        self.init_codes = nn.Parameter(self.head.init_codes())  # θ_0 [M, K]
        if iterations > 1:
            # E_m [M, d, K]; with 0.1 / √K, codes of variance 1 embed to a standard deviation of 0.1
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
        # no position embedding: the views of a subject are a set, and attention ignores its order
        memory = self.memory_proj(features.flatten_views())  # [B, V·N, d]
        batch_size = len(memory)
        codes = self.init_codes.expand(batch_size, -1, -1)  # θ_0 [B, M, K]
        for _ in range(self.iterations):
            queries = self.queries.expand(batch_size, -1, -1)  # [B, M, d]
            if self.iterations > 1:
                # each factor's token also sees its own code: q_m + E_m θ_{k-1, m}  [B, M, d]
                queries = queries + torch.einsum("mdk,bmk->bmd", self.code_embed, codes)
            # self-attention spans the M queries, cross-attention the V·N memory tokens
            with select_sdpa_kernel(memory, max(len(self.queries), memory.shape[1])):
                hidden_states = self.decoder(queries, memory)  # h [B, M, d]
            # θ_{k, m} = θ_{k-1, m} + P_m h_m  [B, M, K]
            codes = codes + torch.einsum("mkd,bmd->bmk", self.code_proj, hidden_states)
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
        down, up = codes.chunk(2, -2)  # codes, each [B, M / 2, K]
        return self.head(down, up)  # factors, per target [B, r, in] and [B, out, r]

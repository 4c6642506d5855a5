"""Heads: from short codes, which a network predicts or an optimizer fits, to ``LoraWeights``.

Every target has two codes of ``code_size`` numbers, c for ``down`` and c' for ``up``.

    head       down                    up                       source
    lidb       B_train(c) B_aux        A_aux A_train(c')        2307.06949, eq. 2
    basis      D_0 + Σ_i c_i D_i       Σ_i c'_i U_i             2503.16944, eq. 3
    softmax    Σ_i softmax(c)_i D_i    Σ_i softmax(c')_i U_i    LoRWeB, 2602.15727
    direct     c                       c'                       one linear layer each, 2411.19156

A_aux and B_aux are fixed, random and orthogonal, rebuilt from a seed. D_i and U_i are learned
together with the network. A zero code for ``up`` gives ΔW = 0 (softmax: at initialization only).

Codes and learned numbers of the targets together, for n targets, m of them different in shape:

    head                        numbers of one code           learned numbers
    lidb                        r max(a, b)                   none
    basis, softmax              s (basis per rank: s r)       n s r (in + out)
    basis, ``share_by_shape``   s                             m s r (in + out), and n r in for D_0
    direct                      r max(in, out)                none

A hypernetwork of width d adds 2 n d weights for each number of a code.

Shapes in comments: *B is any number of batch axes, r the rank, s ``size``, in and out the features.
"""

from collections.abc import Callable, Hashable
from typing import Any, Final

import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.seeds import compute_seed, validate_seed


class LiDB(nn.Module):
    """Lightweight DreamBooth (2307.06949): ΔW = (A_aux A_train)(B_train B_aux).

    Every target has r·a numbers for ``up`` and r·b for ``down``; the paper uses r = 1, a = 100 and
    b = 50. The auxiliary matrices are rebuilt from ``seed`` and never stored.

    Args:
        layout: The targets and the rank.
        a: Columns of A_aux; smaller where a target has fewer output features.
        b: Rows of B_aux; smaller where a target has fewer input features.
        seed: Seed of the auxiliary matrices.

    Attributes:
        code_size: Length of one code, rank · max(a, b); codes of smaller matrices are padded.
    """

    def __init__(self, layout: LoraLayout, a: int = 100, b: int = 50, seed: int = 0) -> None:
        super().__init__()
        self.layout, self.a, self.b, self.seed = layout, a, b, seed
        self.code_size = layout.rank * max(a, b)
        generator = torch.Generator().manual_seed(validate_seed(seed))
        for i, target in enumerate(layout.targets):
            a_aux = _make_orthogonal_matrix(target.out_features, a, generator)  # [out, a]
            b_aux = _make_orthogonal_matrix(target.in_features, b, generator).mT  # [b, in]
            # not in checkpoints, which would grow by out · a + b · in numbers per target
            self.register_buffer(f"a{i}", a_aux, persistent=False)
            self.register_buffer(f"b{i}", b_aux, persistent=False)

    def init_codes(self) -> Tensor:
        """Make codes of ΔW = 0 with nonzero gradients, always the same ones.

        Returns:
            [2 * targets, code_size]: random codes for ``down``, then zeros for ``up``.
        """
        # + 1: another stream than that of the auxiliary matrices
        generator = torch.Generator().manual_seed(compute_seed(self.seed, 1))
        num_targets = len(self.layout.targets)
        # std b^-1/2: rows of B_train, and so those of down = B_train B_aux, have norms about 1
        down = torch.randn(num_targets, self.code_size, generator=generator) * self.b**-0.5
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """Expand codes.

        Args:
            down: [*batch, targets, code_size].
            up: [*batch, targets, code_size].

        Returns:
            LoRAs of batch shape [*batch].
        """
        rank, downs, ups = self.layout.rank, [], []
        for i in range(len(self.layout.targets)):
            a_aux, b_aux = self.get_buffer(f"a{i}"), self.get_buffer(f"b{i}")  # [out, a], [b, in]
            a, b = a_aux.shape[1], b_aux.shape[0]  # of this target: at most its out and in
            # the code of a smaller matrix ends in padding, which is cut off
            b_train = down[..., i, : rank * b].unflatten(-1, (rank, b))  # [*B, r, b]
            a_train = up[..., i, : rank * a].unflatten(-1, (a, rank))  # [*B, a, r]
            downs.append(b_train @ b_aux)  # [*B, r, in]
            ups.append(a_aux @ a_train)  # [*B, out, r]
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


class LowRankBasisHead(nn.Module):
    """Linear combinations of ``size`` learned directions per factor and target (2503.16944, eq. 3).

    ``down`` has a constant term of the usual LoRA initialization: a zero code is an untrained LoRA.

    Args:
        layout: The targets and the rank.
        size: Number of directions per factor and target.
        coefficients_per_rank: Whether each of the ``rank`` vectors of a direction has its own
            coefficient. The factors then span ``rank`` times as many dimensions with the same
            number of learned directions.
        share_by_shape: Whether targets of equal shape share their directions, each with
            coefficients and D_0 of its own. A transformer repeats few shapes in many blocks, so a
            large ``size`` then costs little.

    Attributes:
        code_size: Length of one code: ``size``, times the rank with ``coefficients_per_rank``.
        down_bias: D_0 per target, [rank, in_features].
        down_basis: D_i per group of targets, [size, rank * in_features]. A group is one target, or
            with ``share_by_shape`` all that have equal inputs.
        up_basis: U_i per group of targets, [size, out_features * rank]. A group is one target, or
            with ``share_by_shape`` all that have equal ``out_features``.
    """

    def __init__(
        self,
        layout: LoraLayout,
        size: int = 48,
        coefficients_per_rank: bool = False,
        share_by_shape: bool = False,
    ) -> None:
        super().__init__()
        rank = layout.rank
        self.layout, self.size, self.coefficients_per_rank = layout, size, coefficients_per_rank
        self.share_by_shape = share_by_shape
        self.code_size = size * rank if coefficients_per_rank else size
        # the group of each target, and one target of each group
        self.down_groups, down_targets = _group_targets(
            layout, lambda target: (target.in_features, target.kernel_size), share_by_shape
        )
        self.up_groups, up_targets = _group_targets(
            layout, lambda target: target.out_features, share_by_shape
        )
        # std in^-1/2 keeps the variance of x in D_0 x; std (s r)^-1/2 of U_i keeps it in ΔW x, as a
        # sum over s directions and r ranks, where coefficients have variance 1
        self.down_bias = nn.ParameterList(  # [r, in] each
            torch.randn(rank, target.in_features) * target.in_features**-0.5
            for target in layout.targets
        )
        self.down_basis = nn.ParameterList(  # [s, r * in] each
            torch.randn(size, rank * target.in_features) * target.in_features**-0.5
            for target in down_targets
        )
        self.up_basis = nn.ParameterList(  # [s, out * r] each
            torch.randn(size, target.out_features * rank) * (size * rank) ** -0.5
            for target in up_targets
        )

    def init_codes(self) -> Tensor:
        """Make codes of ΔW = 0 with nonzero gradients.

        Returns:
            [2 * targets, code_size]: small random coefficients for ``down``, then zeros for ``up``.
        """
        # Σ_i c_i D_i over s directions then has a tenth of the standard deviation of D_0
        down = torch.randn(len(self.layout.targets), self.code_size) * 0.1 * self.size**-0.5
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """Combine the directions: down = D_0 + Σ_i c_i D_i, up = Σ_i c'_i U_i.

        Args:
            down: Coefficients c, [*batch, targets, code_size].
            up: Coefficients c', [*batch, targets, code_size].

        Returns:
            LoRAs of batch shape [*batch].
        """
        rank, downs, ups = self.layout.rank, [], []
        for i, target in enumerate(self.layout.targets):
            down_basis = self.down_basis[self.down_groups[i]]  # [s, r * in]
            up_basis = self.up_basis[self.up_groups[i]]  # [s, out * r]
            down_basis = down_basis.unflatten(-1, (rank, target.in_features))  # [s, r, in]
            up_basis = up_basis.unflatten(-1, (target.out_features, rank))  # [s, out, r]
            # the last axis is r, or 1 if a direction has one coefficient; einsum broadcasts the 1
            c_down = down[..., i, :].unflatten(-1, (self.size, -1))  # [*B, s, r or 1]
            c_up = up[..., i, :].unflatten(-1, (self.size, -1))  # [*B, s, r or 1]
            mixed_down = torch.einsum("...sr,sri->...ri", c_down, down_basis)  # [*B, r, in]
            mixed_up = torch.einsum("...sr,sor->...or", c_up, up_basis)  # [*B, out, r]
            downs.append(mixed_down + self.down_bias[i])
            ups.append(mixed_up)  # without a constant term: zero codes give ΔW = 0
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


class SoftmaxBasisHead(LowRankBasisHead):
    """Convex combinations of ``size`` learned LoRAs (LoRWeB, 2602.15727).

    Args:
        layout: The targets and the rank.
        size: Number of learned LoRAs.
    """

    def __init__(self, layout: LoraLayout, size: int = 32) -> None:
        super().__init__(layout, size)
        # softmax weights are never 0, so zero U_i are what makes ΔW = 0 at first
        for up_basis in self.up_basis:
            nn.init.zeros_(up_basis)

    def init_codes(self) -> Tensor:
        """Make codes of equal weights.

        Returns:
            Zeros [2 * targets, size].
        """
        return torch.zeros(2 * len(self.layout.targets), self.code_size)

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """Combine the LoRAs by weights that are positive and add up to 1.

        Args:
            down: Logits of the weights, [*batch, targets, size].
            up: Logits of the weights, [*batch, targets, size].

        Returns:
            LoRAs of batch shape [*batch].
        """
        return super().forward(down.softmax(-1), up.softmax(-1))


class DirectHead(nn.Module):
    """Codes that are the factors themselves; targets share no parameters (2411.19156).

    Args:
        layout: The targets and the rank.

    Attributes:
        code_size: Length of one code, that of the largest factor; other codes are padded.
    """

    def __init__(self, layout: LoraLayout) -> None:
        super().__init__()
        self.layout = layout
        self.code_size = layout.rank * max(
            max(target.in_features, target.out_features) for target in layout.targets
        )

    def init_codes(self) -> Tensor:
        """Make codes of the usual LoRA initialization.

        Returns:
            [2 * targets, code_size]: random codes for ``down``, then zeros for ``up``.
        """
        stds = [target.in_features**-0.5 for target in self.layout.targets]
        down = torch.stack([torch.randn(self.code_size) * std for std in stds])  # [targets, code]
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """Reshape codes to factors.

        Args:
            down: [*batch, targets, code_size].
            up: [*batch, targets, code_size].

        Returns:
            LoRAs of batch shape [*batch].
        """
        rank, downs, ups = self.layout.rank, [], []
        for i, target in enumerate(self.layout.targets):
            in_features, out_features = target.in_features, target.out_features
            flat_down = down[..., i, : rank * in_features]  # [*B, r * in]
            flat_up = up[..., i, : out_features * rank]  # [*B, out * r]
            downs.append(flat_down.unflatten(-1, (rank, in_features)))  # [*B, r, in]
            ups.append(flat_up.unflatten(-1, (out_features, rank)))  # [*B, out, r]
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


Head = LiDB | LowRankBasisHead | DirectHead
_HEADS: Final[dict[str, type[Head]]] = {
    "lidb": LiDB,
    "basis": LowRankBasisHead,
    "softmax": SoftmaxBasisHead,
    "direct": DirectHead,
}


def make_head(head_type: str, layout: LoraLayout, **options: Any) -> Head:
    """Make a head by its name, as configs do.

    Args:
        head_type: ``lidb``, ``basis``, ``softmax`` or ``direct``.
        layout: The targets and the rank.
        **options: Further arguments of the head's class, e.g. ``size=48``.

    Returns:
        The head.

    Raises:
        InvalidArgumentError: The name is unknown.
    """
    if head_type not in _HEADS:
        raise InvalidArgumentError(f"unknown head {head_type!r}; known: {', '.join(_HEADS)}")
    return _HEADS[head_type](layout, **options)


def _group_targets(
    layout: LoraLayout, key_fn: Callable[[TargetModule], Hashable], share: bool
) -> tuple[list[int], list[TargetModule]]:
    """Number the groups of targets with equal keys, or one group per target without sharing.

    Returns:
        The group of each target, and the first target of each group.
    """
    keys = [key_fn(target) if share else i for i, target in enumerate(layout.targets)]
    first_indices = {key: i for i, key in reversed(list(enumerate(keys)))}
    group_keys = list(dict.fromkeys(keys))
    groups = [group_keys.index(key) for key in keys]
    return groups, [layout.targets[first_indices[key]] for key in group_keys]


def _make_orthogonal_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, min(rows, columns)] with orthonormal columns."""
    # Q of a QR decomposition: multiplying by it keeps lengths, so A_aux and B_aux scale nothing
    return torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))[0]

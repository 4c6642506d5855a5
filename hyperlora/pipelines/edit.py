"""Before/after pairs to a finished edit LoRA, by an ``EditConfig``."""

from collections.abc import Sequence
from pathlib import Path

from hyperlora import pretrained
from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase, get_base_id, load_diffusion_base
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.lora import Lora
from hyperlora.pipelines.config import EditConfig
from hyperlora.pipelines.instruction_search import NO_INSTRUCTION_HEAD, InstructionSearch
from hyperlora.pipelines.pair_to_lora import ImageSourcePair, PairToLora


def generate_edit_lora(
    model: PairToLora,
    pairs: Sequence[ImageSourcePair],
    config: EditConfig,
    base: DiffusionBase | str | Path | None = None,
    compute: ComputeConfig | None = None,
) -> Lora:
    """Generate the LoRA of an edit, with or without a search for an instruction.

    Args:
        model: The model of edits.
        pairs: One or several pairs that show the same edit.
        config: Direction, strength and search.
        base: The base that the search runs: loaded already, or the folder or hub id to load if
            there is anything to search. None for the bundled base of edits.
        compute: Device, precision and memory of a base that is loaded.

    Returns:
        The LoRA.

    Raises:
        InvalidImageError: An image cannot be read.
        InvalidArgumentError: The search needs another base, or an instruction head that the model
            does not have.
        LayoutMismatchError: The model is for another base.
    """
    candidate_prompts = [*model.zero_shot_prompts, *config.candidate_prompts]
    search = None
    if config.search and candidate_prompts:
        search_base = _resolve_search_base(model, base, compute)
        search = InstructionSearch(search_base, candidate_prompts)
    directed_pairs = [pair[::-1] for pair in pairs] if config.reverse else pairs
    return model(directed_pairs, config.strength, search)


def _resolve_search_base(
    model: PairToLora, base: DiffusionBase | str | Path | None, compute: ComputeConfig | None
) -> DiffusionBase:
    """Load the base of the search if it is not loaded yet."""
    if isinstance(base, DiffusionBase):
        return base
    if model.network.instruction_head is None:
        raise InvalidArgumentError(NO_INSTRUCTION_HEAD)
    if base is None and model.layout.base != get_base_id(pretrained.EDIT_BASE_DIR):
        raise InvalidArgumentError(
            f"the search runs the base of the LoRA, {model.layout.base!r}: "
            "give --base or --no-search"
        )
    loaded_base = load_diffusion_base(base or pretrained.EDIT_BASE_DIR, compute)
    model.layout.check_base(loaded_base.id)
    return loaded_base

"""Tiny pipelines of the real diffusers classes, one for each supported family."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import pytest

from tests.tiny_pipelines import flux2, more_transformers, qwen_image, transformers, unets
from tests.tiny_pipelines.base import TinyPipeline

FACTORIES: Final[Mapping[str, Callable[[], TinyPipeline]]] = {
    "stable_diffusion": unets.make_stable_diffusion,
    "stable_diffusion_xl": unets.make_stable_diffusion_xl,
    "instruct_pix2pix": unets.make_instruct_pix2pix,
    "instruct_pix2pix_xl": unets.make_instruct_pix2pix_xl,
    "stable_diffusion_3": transformers.make_stable_diffusion_3,
    "flux": transformers.make_flux,
    "flux_schnell": transformers.make_flux_schnell,
    "flux_kontext": transformers.make_flux_kontext,
    "z_image": transformers.make_z_image,
    "chroma": more_transformers.make_chroma,
    "lumina_2": more_transformers.make_lumina_2,
    "hidream": more_transformers.make_hidream,
    "krea_2": more_transformers.make_krea_2,
    "krea_2_turbo": more_transformers.make_krea_2_turbo,
    "qwen_image_21": more_transformers.make_qwen_image_21,
    "flux2": flux2.make_flux2,
    "flux2_edit": flux2.make_flux2_edit,
    "flux2_klein": flux2.make_flux2_klein,
    "flux2_klein_edit": flux2.make_flux2_klein_edit,
    "flux2_klein_distilled": flux2.make_flux2_klein_distilled,
    "qwen_image": qwen_image.make_qwen_image,
    "qwen_image_edit": qwen_image.make_qwen_image_edit,
    "qwen_image_edit_plus": qwen_image.make_qwen_image_edit_plus,
}


FAST: Final = ("stable_diffusion", "instruct_pix2pix", "flux2_klein", "z_image", "qwen_image")
"""One family of each kind, for tests that take seconds on each."""


def mark_heavy(names: Iterable[str], fast: Sequence[str] = FAST) -> list[Any]:
    """Make parameters of a test that runs by default on the fast families alone."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.heavy) for name in names]


@cache
def get_tiny_pipeline(name: str) -> TinyPipeline:
    """Return the pipeline of one family; shared by tests, which leave it as it is."""
    tiny = FACTORIES[name]()
    tiny.pipe.set_progress_bar_config(disable=True)
    for module in tiny.pipe.components.values():
        if hasattr(module, "requires_grad_"):
            module.eval().requires_grad_(False)
    return tiny

"""Samplers by diffusers' names, and how one takes the place of a pipeline's own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.errors import InvalidArgumentError

_SUFFIX: Final = "Scheduler"
_VARIANTS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "DPMSolverMultistepKarras": ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    "DPMSolverMultistepSDE": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    "DPMSolverMultistepSDEKarras": (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "EulerDiscreteTrailing": ("EulerDiscrete", {"timestep_spacing": "trailing"}),
    "DDIMTrailing": ("DDIM", {"timestep_spacing": "trailing"}),
}
"""Settings of a class with a name of their own: DPM++ 2M Karras, DPM++ 2M SDE (Karras), and the
spacing that Lightning and Hyper LoRAs are trained with."""


@contextmanager
def use_scheduler(family: PipelineFamily, name: str | None) -> Iterator[None]:
    """Sample with another scheduler within a ``with`` block.

    Args:
        family: Adapter of the pipeline.
        name: One of ``family.schedulers``, also with ``Scheduler`` behind; None for the
            pipeline's own.

    Yields:
        Nothing.

    Raises:
        InvalidArgumentError: The name is unknown, or the scheduler is not for this family.
    """
    if name is None:
        yield
        return
    pipeline = family.pipeline
    original, pipeline.scheduler = pipeline.scheduler, make_scheduler(family, name)
    try:
        yield
    finally:
        pipeline.scheduler = original


def make_scheduler(family: PipelineFamily, name: str) -> Any:  # noqa: ANN401 - any scheduler
    """Make a scheduler from the configuration of a pipeline's own.

    Args:
        family: Adapter of the pipeline.
        name: One of ``family.schedulers``, also with ``Scheduler`` behind.

    Returns:
        The scheduler.

    Raises:
        InvalidArgumentError: The name is unknown, or the scheduler is not for this family.
    """
    import diffusers

    short_name = name.removesuffix(_SUFFIX)
    if short_name not in family.schedulers:
        raise InvalidArgumentError(
            f"scheduler {name!r} is not for a {type(family.pipeline).__name__}; "
            f"known: {', '.join(family.schedulers)}"
        )
    class_name, options = _VARIANTS.get(short_name, (short_name, {}))
    config = dict(family.pipeline.scheduler.config)
    if "beta_schedule" not in config and not class_name.startswith("FlowMatch"):
        # a solver of diffusion models that integrates flows instead
        shift = config.pop("shift", 1.0)
        flow_options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        options = {**options, **flow_options, "flow_shift": shift}
    return getattr(diffusers, f"{class_name}{_SUFFIX}").from_config(config, **options)

"""Place a pipeline: its device, what waits elsewhere, tiles of the VAE, compiled blocks."""

from typing import TYPE_CHECKING

import torch

from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def place_pipeline(family: PipelineFamily, compute: ComputeConfig) -> None:
    """Move a pipeline to its device, offload, tile and compile it as a ``ComputeConfig`` says.

    Args:
        family: Adapter of the pipeline, whose components are on the CPU.
        compute: Device and memory.

    Raises:
        InvalidArgumentError: The VAE cannot work on tiles.
    """
    pipeline, device = family.pipeline, compute.torch_device
    if compute.vae_tiling:
        _enable_vae_tiling(pipeline)
    match compute.offload:
        case "none":
            pipeline.to(device)
        case "model":
            pipeline.enable_model_cpu_offload(device=device)
        case "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        case "group":
            pipeline.enable_group_offload(
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=device.type == "cuda",  # the next block is fetched meanwhile
            )
    if compute.compile:
        compile_denoiser(family)


def compile_denoiser(family: PipelineFamily, backend: str = "inductor") -> None:
    """Compile the repeated blocks of a denoiser, which takes a fraction of the time of the whole.

    Args:
        family: Adapter of the pipeline.
        backend: Of ``torch.compile``.
    """
    # by default compiled code does not notice hooks of later LoRAs, and would leave them out
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    family.denoiser.compile_repeated_blocks(backend=backend, dynamic=True)


def _enable_vae_tiling(pipeline: "DiffusionPipeline") -> None:
    vae = pipeline.vae
    try:
        vae.enable_tiling()
    except NotImplementedError as error:
        raise InvalidArgumentError(
            f"{type(vae).__name__} cannot work on tiles: leave out --vae-tiling"
        ) from error

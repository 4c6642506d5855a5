"""``IpAdapterKeeper``: keeps an identity by an IP-Adapter of diffusers (2308.06721)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from data_builder.people.identity_keeper import SamplingConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.sampling_inputs import (
    check_num_steps,
    check_sampling_inputs,
    make_generators,
)
from hyperlora.errors import InvalidArgumentError, ModelLoadError, format_reason
from hyperlora.hub_connection import format_offline_error, is_repo_id, require_cache_if_offline

ADAPTER_SCALE: Final = 0.7
"""Weight of the reference; at 1 it decides the scene, too."""
_DEFAULT_FILES: Final = {
    "StableDiffusionPipeline": "models/ip-adapter-plus-face_sd15.safetensors",
    "StableDiffusionXLPipeline": "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
}
"""The adapters for faces in the authors' repository, by pipeline class."""
_VIT_H_ENCODER: Final = "models/image_encoder"
"""Where that repository has the encoder of SDXL's adapters with ``vit-h`` in their names."""


class IpAdapterKeeper:
    """Draws with the reference as ``ip_adapter_image``.

    Args:
        base: Stable Diffusion or SDXL; its pipeline gets the adapter.
        name: Folder or hub id, perhaps with ``:FILE``; the file is ``.safetensors``.
        sampling: Steps and guidance.

    Raises:
        InvalidArgumentError: The base takes no IP-Adapter, is offloaded, or the file is none that
            works.
        ModelLoadError: The adapter is missing, damaged or for another base.
    """

    def __init__(self, base: DiffusionBase, name: str, sampling: SamplingConfig) -> None:
        base.check_generates_images()
        class_name = type(base.pipeline).__name__
        if class_name not in _DEFAULT_FILES:
            raise InvalidArgumentError(
                f"--ip-adapter is for {' and '.join(_DEFAULT_FILES)}, and base {base.id!r} is a "
                f"{class_name}: use --model"
            )
        if base.offload != "none":
            raise InvalidArgumentError(
                f"--ip-adapter works on a base that stays on its device, not with --offload "
                f"{base.offload}: leave --offload out, or use --model"
            )
        self.base, self.sampling = base, sampling
        check_num_steps(base, sampling.num_inference_steps)
        _load_adapter(base, name)

    @property
    def scenes(self) -> Sequence[str]:
        """None of its own."""
        return ()

    def make_prompt(self, noun: str, scene: str) -> str:
        """Make a prompt that describes the person, too.

        Args:
            noun: The words for the person.
            scene: What else the image shows.

        Returns:
            The prompt.
        """
        return f"a portrait of {noun}, {scene}"

    def draw_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        reference: Image.Image | None = None,
    ) -> list[Image.Image]:
        """Draw one image per prompt, one after the other: an adapter has one image per call.

        Args:
            prompts: n prompts.
            seeds: n seeds.
            reference: The image of the person; None for no effect of the adapter.

        Returns:
            n RGB images.

        Raises:
            InvalidArgumentError: Seeds, steps or guidance are out of range.
        """
        pipe, family, side = self.base.pipeline, self.base.family, self.base.resolution
        scale = self.sampling.guidance_scale
        scale = family.default_guidance_scale if scale is None else scale
        check_sampling_inputs(self.base, len(prompts), None, seeds, [scale])
        pipe.set_ip_adapter_scale(0.0 if reference is None else ADAPTER_SCALE)
        # a pipeline with an adapter demands an image, also where its weight is 0
        adapter_image = reference or Image.new("RGB", (side, side), "gray")
        images: list[Image.Image] = []
        for prompt, generator in zip(prompts, make_generators(seeds), strict=True):
            output = pipe(
                prompt=[prompt],
                num_inference_steps=self.sampling.num_inference_steps
                or family.default_num_inference_steps,
                generator=generator,
                ip_adapter_image=adapter_image,
                **family.make_size_arguments(side, side),
                **family.make_guidance_arguments(scale, [""]),
            )
            images += [image.convert("RGB") for image in output.images]
        return images


def _load_adapter(base: DiffusionBase, name: str) -> None:
    """Load an adapter and its image encoder into the pipeline of a base."""
    source, file_name = _split_file_name(name)
    folder = Path(source)
    if not folder.is_dir() and not is_repo_id(source):
        raise ModelLoadError(f"there is no IP-Adapter {source!r}: give a folder or a hub id")
    file_name = file_name or _find_file(folder, type(base.pipeline).__name__)
    if not file_name.endswith(".safetensors"):
        raise InvalidArgumentError(
            f"the IP-Adapter {file_name!r} is no .safetensors file, and others are not read: "
            "convert it, or name another file"
        )
    if "faceid" in file_name.lower():
        raise InvalidArgumentError(
            f"{file_name!r} is an IP-Adapter of face embeddings (FaceID), one of images was "
            "expected: use ip-adapter-plus-face, or --model"
        )
    path = Path(file_name)
    is_vit_h = "vit-h" in path.name and path.parent.name == "sdxl_models"
    is_offline = not folder.is_dir() and require_cache_if_offline()
    try:
        base.pipeline.load_ip_adapter(
            source,
            subfolder="" if path.parent == Path() else path.parent.as_posix(),
            weight_name=path.name,
            image_encoder_folder=_VIT_H_ENCODER if is_vit_h else "image_encoder",
        )
    # of diffusers for what is missing, and of torch and safetensors for what does not fit
    except Exception as error:
        if is_offline:
            raise ModelLoadError(format_offline_error(f"IP-Adapter {source!r}")) from error
        raise ModelLoadError(
            f"the IP-Adapter {file_name!r} of {source!r} cannot be loaded into base {base.id!r} "
            f"({format_reason(error)}): use one for this base, with its folder image_encoder"
        ) from error
    if getattr(base.pipeline, "image_encoder", None) is not None:
        base.pipeline.image_encoder.eval().requires_grad_(False)


def _split_file_name(name: str) -> tuple[str, str]:
    """Split ``REPO_OR_FOLDER:FILE``; the file is empty where there is none."""
    source, separator, file_name = name.rpartition(":")
    if not separator or Path(name).exists() or not file_name.endswith((".safetensors", ".bin")):
        return name, ""
    return source, file_name


def _find_file(folder: Path, class_name: str) -> str:
    """The adapter for faces, or the only ``.safetensors`` file that lies in the folder."""
    default = _DEFAULT_FILES[class_name]
    if not folder.is_dir() or (folder / default).is_file():
        return default
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) != 1:
        raise InvalidArgumentError(
            f"{str(folder)!r} holds {len(files)} .safetensors files, one IP-Adapter expected: "
            f"name it, --ip-adapter {folder}:FILE"
        )
    return files[0]

"""The command that invents people."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_builder.cli.options import OutputDir
from hyperlora.cli.compute_options import ComputeOptions, add_compute_options
from hyperlora.errors import InvalidArgumentError
from hyperlora.seeds import MAX_SEED

if TYPE_CHECKING:
    from data_builder.people.config import PeopleConfig
    from data_builder.people.face_matcher import FaceMatcher
    from data_builder.people.identity_keeper import IdentityKeeper
    from hyperlora.compute import ComputeConfig

_BUILD_DIR = "build"


@add_compute_options("a smaller base")
def people(
    *,
    compute_options: ComputeOptions,
    output: OutputDir,
    count: Annotated[int, typer.Option(min=1, help="Number of people to invent.")],
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    images_per_person: Annotated[
        int, typer.Option(min=1, help="Images drawn of each person, besides its reference.")
    ] = 8,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model from photos that keeps the identity: folder or hub id.",
            show_default="the bundled image-to-lora",
        ),
    ] = None,
    ip_adapter: Annotated[
        str | None,
        typer.Option(
            help="IP-Adapter that keeps it instead: folder or hub id, perhaps with :FILE."
        ),
    ] = None,
    face_pack: Annotated[
        str | None,
        typer.Option(
            help="insightface pack that compares faces: folder or name.",
            show_default="that of the avatars, for their base",
        ),
    ] = None,
    min_similarity: Annotated[
        float,
        typer.Option(min=-1, max=1, help="Cosine to the reference below which an image goes."),
    ] = 0.4,
    min_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images that must agree, or the person goes.",
            show_default="half of the images",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file: a prompt of a person in each line.")
    ] = None,
    scenes: Annotated[
        Path | None, typer.Option(help="Text file: a scene of the images in each line.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; the base's default if not given.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Classifier-free guidance; the base's default if not given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of all people.")] = 0,
    fit: Annotated[
        bool, typer.Option("--fit", help="Then plan and run a build in FOLDER/build.")
    ] = False,
) -> None:
    """Invent people: draw several images of each, and keep those whose faces agree.

    A killed run continues when it is started again.
    """
    from rich.console import Console

    from data_builder.people.config import PeopleConfig
    from data_builder.people.draw_people import draw_people, make_table
    from data_builder.people.person_prompt import read_lines
    from hyperlora import pretrained
    from hyperlora.cli.options import check_output_dir
    from hyperlora.cpu import disable_malloc_trim

    check_output_dir(output)
    disable_malloc_trim()
    compute = compute_options.make_config()
    config = PeopleConfig(
        base=base or str(pretrained.BASE_DIR),
        images_per_person=images_per_person,
        model=model,
        ip_adapter=ip_adapter,
        face_pack=face_pack,
        min_similarity=min_similarity,
        min_images=min_images,
        prompts=read_lines(prompts, "--prompts") if prompts else (),
        scenes=read_lines(scenes, "--scenes") if scenes else (),
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        dtype=str(compute.torch_dtype).removeprefix("torch."),
    )
    summary = draw_people(output, count, config, lambda: _load_tools(config, compute))
    Console().print(make_table(summary, str(output)))
    if not summary.num_kept:
        reasons = ", ".join(f"{number} with {reason}" for reason, number in summary.reasons.items())
        raise InvalidArgumentError(
            f"none of {summary.num_people} people was kept ({reasons}): see people.jsonl, and try "
            "another --face-pack, --prompts, a lower --min-similarity or --min-images, in another "
            "folder"
        )
    if fit:
        _fit(output, config.base, compute_options.device)


def _load_tools(
    config: "PeopleConfig", compute: "ComputeConfig"
) -> "tuple[IdentityKeeper, FaceMatcher]":
    """Load what draws and what compares faces, the quickest to fail first."""
    from data_builder.people.face_matcher import load_face_matcher
    from data_builder.people.identity_keeper import SamplingConfig
    from hyperlora.diffusion.diffusion_base import load_diffusion_base

    matcher = load_face_matcher(config.base, config.face_pack)
    diffusion_base = load_diffusion_base(config.base, compute)
    sampling = SamplingConfig(config.steps, config.guidance_scale)
    if config.ip_adapter is not None:
        from data_builder.people.ip_adapter_keeper import IpAdapterKeeper

        return IpAdapterKeeper(diffusion_base, config.ip_adapter, sampling), matcher
    from data_builder.people.lora_keeper import LoraKeeper
    from hyperlora.pipelines.auto import load_photo_model

    diffusion_base.check_generates_images()
    photo_model = load_photo_model(config.model, base=diffusion_base, compute=compute)
    return LoraKeeper(diffusion_base, photo_model, sampling), matcher


def _fit(folder: Path, base: str, device: str) -> None:
    """Run ``plan`` and ``run`` with their defaults on the people of a folder."""
    from data_builder.build.make_plan import check_recipe_base, make_plan, summarize_plan
    from data_builder.build.plan import Recipe, write_plan
    from data_builder.build.run import run_build
    from data_builder.sources.sources import FolderSource

    recipe = Recipe(base)
    check_recipe_base(recipe)
    build_plan = make_plan(FolderSource(str(folder)), recipe, metadata={"crop": "center"})
    write_plan(build_plan, folder / _BUILD_DIR)
    for line in (*build_plan.skipped, *summarize_plan(build_plan)):
        typer.echo(line)
    num_loras = run_build(folder / _BUILD_DIR, device)
    typer.echo(f"{num_loras} LoRAs fitted; {folder / _BUILD_DIR} is complete")

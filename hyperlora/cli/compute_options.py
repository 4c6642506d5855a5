"""Options of device, precision and memory, and the sentence where memory runs out."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from PIL import Image

    from hyperlora.compute import ComputeConfig

_PANEL: Final = "Device and memory"
_GRADIENT_OPTIONS: Final = ("refine_steps", "finetune_steps")
"""Options of commands with which gradients flow through the base."""


@dataclass(frozen=True)
class ComputeOptions:
    """The options of ``ComputeConfig`` as a user gave them, before torch is imported."""

    device: Annotated[
        str,
        typer.Option(
            help="auto (the accelerator if there is one), cpu, cuda, cuda:N, mps or xpu.",
            rich_help_panel=_PANEL,
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision of the base: auto (half on an accelerator), float32, bfloat16 or "
            "float16.",
            rich_help_panel=_PANEL,
        ),
    ] = "auto"
    offload: Annotated[
        str,
        typer.Option(
            help="What waits in the memory of the CPU: none, model (components), group (blocks) "
            "or sequential (layers, slow).",
            rich_help_panel=_PANEL,
        ),
    ] = "none"
    vae_tiling: Annotated[
        bool,
        typer.Option(
            "--vae-tiling",
            help="Decode large images in tiles, for less memory.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the denoiser, which pays off over many images.",
            rich_help_panel=_PANEL,
        ),
    ] = False

    def make_config(self) -> "ComputeConfig":
        """Check the options against this machine, and print the choice on stderr.

        Raises:
            InvalidArgumentError: A name is unknown, or this machine lacks the device.
        """
        compute = self.make_quiet_config()
        typer.echo(f"running on {compute.describe()}", err=True)
        return compute

    def make_quiet_config(self) -> "ComputeConfig":
        """Check the options against this machine.

        Raises:
            InvalidArgumentError: A name is unknown, or this machine lacks the device.
        """
        from hyperlora.compute import ComputeConfig

        return ComputeConfig(**asdict(self))


OPTION_NAMES: Final = tuple(field.name for field in fields(ComputeOptions))


def add_compute_options(
    last_resort: str, option_names: Sequence[str] = OPTION_NAMES
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options of device and memory to a command, which receives them as ``compute_options``.

    Where memory runs out, the command ends with one sentence that names the option to try next.

    Args:
        last_resort: What helps when the options are used up, e.g. ``a smaller --width``.
        option_names: Those that the command has; others keep their defaults.

    Returns:
        A decorator.
    """
    options = {name: ComputeOptions.__annotations__[name] for name in option_names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        """Return the command with further parameters."""

        @functools.wraps(command)
        def run_command(**arguments: Any) -> None:
            """Run the command, and turn a lack of memory into a sentence."""
            chosen = {name: arguments.pop(name) for name in options}
            compute_options = ComputeOptions(**chosen)
            try:
                command(**arguments, compute_options=compute_options)
            except (RuntimeError, MemoryError) as error:
                from hyperlora.compute import ComputeConfig, is_out_of_memory
                from hyperlora.errors import OutOfMemoryError

                if not is_out_of_memory(error):
                    raise
                compute = ComputeConfig(**asdict(compute_options))
                # gradients do not flow through a base whose weights move
                needs_gradients = any(arguments.get(name) for name in _GRADIENT_OPTIONS)
                changeable = {*options} - ({"offload"} if needs_gradients else set())
                advice = compute.suggest_less_memory(changeable) or last_resort
                name = command.__name__.removeprefix("run_").replace("_", "-")
                raise OutOfMemoryError(
                    f"{name} ran out of memory on {compute.describe()}: try {advice}"
                ) from error

        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.name != "compute_options"]
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters += [
            inspect.Parameter(
                name, kind, default=getattr(ComputeOptions, name), annotation=annotation
            )
            for name, annotation in options.items()
        ]
        run_command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run_command.__annotations__ = {p.name: p.annotation for p in parameters}
        return run_command

    return decorate


def warn_of_black_images(images: "Sequence[Image.Image]", compute: "ComputeConfig") -> None:
    """Warn on stderr of black images, which is what NaN becomes where half precision overflows.

    Args:
        images: Generated images.
        compute: The precision that they were generated in.
    """
    import torch

    is_half = compute.torch_dtype != torch.float32
    if is_half and any(image.convert("L").getextrema() == (0, 0) for image in images):
        typer.echo(
            f"warning: an image is black, as where {compute.torch_dtype} overflows: "
            "try --dtype float32",
            err=True,
        )

"""``hyperlora serve``."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hyperlora.cli.compute_options import ComputeOptions, add_compute_options
from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from asyncio import Protocol
    from socket import socket

    from fastapi import FastAPI

    from hyperlora.service.engine.base import EngineFactory
    from hyperlora.service.engine.factory import ModelPaths
    from hyperlora.service.settings import ServiceSettings

_MODELS = "Models"
_RELEASED = "Networks that others released"
_LIMITS = "Access and limits"
_RAY = "Ray Serve (extra `scale`)"
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@add_compute_options("--device cpu")
def serve(
    *,
    compute_options: ComputeOptions,
    host: Annotated[
        str,
        typer.Option(help="Address to bind; 0.0.0.0 for other machines, which needs API keys."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind.")] = 8000,
    ui: Annotated[bool, typer.Option(help="Serve the web interface at / too (extra `ui`).")] = True,
    lora_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the LoRA files that <lora:NAME> in a prompt names."),
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Folder of jobs and stored files.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model from photos: folder or hub id, also of networks that others released, as "
            "MODEL or NAME=MODEL; repeat, the default one first.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    extra_model: Annotated[
        list[str] | None,
        typer.Option(help="The same as a further --model.", rich_help_panel=_MODELS),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="Image encoder of released networks: FOLDER or NAME=FOLDER; repeat.",
            rich_help_panel=_RELEASED,
        ),
    ] = None,
    revision: Annotated[
        list[str] | None,
        typer.Option(
            help="Branch, tag or commit on the hub: REVISION or NAME=REVISION; repeat.",
            rich_help_panel=_RELEASED,
        ),
    ] = None,
    face_pack: Annotated[
        str | None,
        typer.Option(
            help="Face pack of released networks: folder or name.", rich_help_panel=_RELEASED
        ),
    ] = None,
    trust_remote_code: Annotated[
        list[str] | None,
        typer.Option(
            help="Code of a template that may run: SHA256 or NAME=SHA256; repeat.",
            rich_help_panel=_RELEASED,
        ),
    ] = None,
    fetch: Annotated[
        bool,
        typer.Option(help="Fetch released networks at first use.", rich_help_panel=_RELEASED),
    ] = True,
    max_loaded_models: Annotated[
        int,
        typer.Option(
            min=1, help="Released networks that are loaded at a time.", rich_help_panel=_RELEASED
        ),
    ] = 2,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: folder or hub id.", rich_help_panel=_MODELS),
    ] = None,
    edits: Annotated[
        bool, typer.Option(help="Accept before/after pairs too.", rich_help_panel=_MODELS)
    ] = True,
    pair_model: Annotated[
        str | None,
        typer.Option(
            help="Model from before/after pairs: folder or hub id.", rich_help_panel=_MODELS
        ),
    ] = None,
    edit_base: Annotated[
        str | None,
        typer.Option(help="Base that edits images: folder or hub id.", rich_help_panel=_MODELS),
    ] = None,
    evaluator: Annotated[
        str | None,
        typer.Option(
            help="Folder of the attribute classifier that scores identity similarity.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, one per line; also read from HYPERLORA_API_KEYS.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    rate_limit: Annotated[
        str,
        typer.Option(help="Requests per API key, e.g. 60/minute.", rich_help_panel=_LIMITS),
    ] = "600/minute",
    max_queue_size: Annotated[
        int,
        typer.Option(min=1, help="Requests that may wait for the model.", rich_help_panel=_LIMITS),
    ] = 256,
    timeout_s: Annotated[
        float,
        typer.Option(
            min=1, help="Seconds that a synchronous request may take.", rich_help_panel=_LIMITS
        ),
    ] = 120.0,
    max_connections_per_address: Annotated[
        int,
        typer.Option(
            min=0,
            help="Connections of one address; 0 for no limit, behind a proxy.",
            rich_help_panel=_LIMITS,
        ),
    ] = 128,
    public_https: Annotated[
        bool,
        typer.Option(
            "--public-https",
            envvar="HYPERLORA_PUBLIC_HTTPS",
            help="A proxy speaks HTTPS: the page's cookie is for HTTPS alone.",
            rich_help_panel=_LIMITS,
        ),
    ] = False,
    max_pixel_steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pixels times denoising steps of one image; 2**24 are 16 steps of 1024x1024.",
            rich_help_panel=_LIMITS,
        ),
    ] = 1 << 24,
    max_pixels: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pixels of one step, which nothing interrupts, unless all steps of the base's "
            "default image have more.",
            rich_help_panel=_LIMITS,
        ),
    ] = 1 << 16,
    drain_timeout_s: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that accepted requests and jobs get when the server stops.",
            rich_help_panel=_LIMITS,
        ),
    ] = 8.0,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Run the models in replicas.", rich_help_panel=_RAY),
    ] = False,
    replicas: Annotated[
        int, typer.Option(min=1, help="Replicas, with --ray.", rich_help_panel=_RAY)
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Replicas under load, with --ray.", rich_help_panel=_RAY),
    ] = None,
) -> None:
    """Serve LoRA generation over HTTP, with its API documentation at /docs."""
    try:
        import uvicorn  # noqa: F401
        from limits import parse

        from hyperlora import pretrained
        from hyperlora.service.app import create_app
        from hyperlora.service.engine.factory import ModelPaths
        from hyperlora.service.file_store import lock_directory
        from hyperlora.service.settings import ServiceSettings, load_api_keys
    except ImportError as error:
        raise InvalidArgumentError(
            f"the server needs {error.name}, which is not installed: add the extra `serve`"
        ) from error
    from hyperlora.service.metrics import configure_logging

    api_keys = load_api_keys(api_key_file)
    if host not in _LOCAL_HOSTS and not api_keys:
        raise InvalidArgumentError(
            f"binding {host} without API keys would let everyone in: "
            "give --api-key-file, or HYPERLORA_API_KEYS"
        )
    if lora_dir is not None and not lora_dir.is_dir():
        raise InvalidArgumentError(f"{str(lora_dir)!r} is no folder of LoRA files")
    if not ray and (replicas > 1 or max_replicas is not None):
        raise InvalidArgumentError("replicas are Ray Serve's: add --ray")
    if max_replicas is not None and max_replicas < replicas:
        raise InvalidArgumentError(
            f"--max-replicas {max_replicas} is below --replicas {replicas}: "
            "at least as many expected"
        )
    try:
        parse(rate_limit)
    except ValueError as error:
        raise InvalidArgumentError(
            f"rate limit {rate_limit!r} is not understood: write e.g. 60/minute"
        ) from error
    settings = ServiceSettings(
        state_dir=state_dir or Path(typer.get_app_dir("hyperlora")),
        lora_dir=lora_dir,
        key_digests=api_keys,
        rate_limit=rate_limit,
        max_queue_size=max_queue_size,
        timeout_s=timeout_s,
        public_https=public_https,
        max_pixel_steps=max_pixel_steps,
        max_pixels=max_pixels,
        drain_timeout_s=drain_timeout_s,
    )
    models = [*(model or []), *(extra_model or [])]
    use_bundle = not models and base is None  # then all its models
    evaluator_path = evaluator or (pretrained.EVALUATOR_DIR if use_bundle else None)
    models = models or [str(pretrained.IMAGE_TO_LORA_DIR)]
    models += [str(pretrained.LORA_DIFFUSION_DIR)] if use_bundle else []
    model_paths = ModelPaths(
        model=models[0],
        base=str(base or pretrained.BASE_DIR),
        pair_model=str(pair_model or pretrained.PAIR_TO_LORA_DIR),
        edit_base=str(edit_base or pretrained.EDIT_BASE_DIR),
        enable_edits=edits,
        evaluator=str(evaluator_path) if evaluator_path else None,
        extra_models=tuple(models[1:]),
        revisions=tuple(revision or []),
        encoders=tuple(encoder or []),
        trusted_code=tuple(trust_remote_code or []),
        face_pack=face_pack,
        fetch=fetch,
        max_loaded_models=max_loaded_models,
    )
    replica_range = (replicas, max_replicas) if ray else None
    with (
        lock_directory(settings.state_dir),
        _open_engine_factory(
            model_paths, settings, replica_range, compute_options
        ) as engine_factory,
    ):
        app = create_app(engine_factory, settings)
        if ui:
            _add_ui(app, settings)
        configure_logging()
        typer.echo(f"http://{host}:{port}/ (the API: /docs)", err=True)
        _run_server(app, host, port, drain_timeout_s, max_connections_per_address)


@contextmanager
def _open_engine_factory(
    model_paths: "ModelPaths",
    settings: "ServiceSettings",
    replica_range: tuple[int, int | None] | None,
    compute_options: ComputeOptions,
) -> "Iterator[EngineFactory]":
    """Load the models in this process, or in Ray replicas for as long as the context is open."""
    if replica_range is None:
        from hyperlora.service.engine.factory import make_engine_factory

        yield make_engine_factory(model_paths, settings, compute_options.make_config())
        return
    try:
        from hyperlora.service.ray_deployment import ScaleConfig, start_ray_engine
    except ImportError as error:
        raise InvalidArgumentError(
            f"--ray needs {error.name}, which is not installed: add the extra `scale`"
        ) from error
    typer.echo(f"running in Ray replicas, device {compute_options.device}", err=True)
    scale, options = ScaleConfig(*replica_range), asdict(compute_options)
    with start_ray_engine(model_paths, settings, scale, options) as engine:
        yield lambda on_batch: engine


def _add_ui(app: "FastAPI", settings: "ServiceSettings") -> None:
    """Add the web interface where its libraries are installed; else say so on stderr."""
    try:
        from hyperlora.service.ui import add_ui
    except ImportError as error:
        typer.echo(
            f"no web interface at /: it needs {error.name}, which is not installed; "
            "add the extra `ui`",
            err=True,
        )
    else:
        add_ui(app, settings)


def _run_server(
    app: "FastAPI",
    host: str,
    port: int,
    drain_timeout_s: float,
    max_connections_per_address: int = 128,
) -> None:
    """Run uvicorn until it is stopped; accepted work then has ``drain_timeout_s`` seconds."""
    import uvicorn

    from hyperlora.service.connection_limits import (
        ConnectionLimits,
        LimitedProtocol,
        raise_open_file_limit,
    )

    class Server(uvicorn.Server):
        """A server that limits the time of accepted work; event streams would never end."""

        async def shutdown(self, sockets: "list[socket] | None" = None) -> None:
            """Start the time of accepted work, then shut down as uvicorn does."""
            app.state.service.shutdown.begin()
            await super().shutdown(sockets)

    limits = ConnectionLimits(max_connections_per_address)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        http=cast("type[Protocol]", partial(LimitedProtocol, limits=limits)),
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could claim any address
        timeout_graceful_shutdown=ceil(drain_timeout_s) + 1,
        h11_max_incomplete_event_size=64 << 10,
    )
    raise_open_file_limit()
    server = Server(config)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise typer.Exit(3)

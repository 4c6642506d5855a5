"""``main_callback serve``."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer


def serve(
    host: Annotated[
        str, typer.Option(help="Address to bind; other machines reach 0.0.0.0 (use keys then).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model from photos, of either method.")
    ] = None,
    extra_model: Annotated[
        list[str] | None,
        typer.Option(help="Model of another method, for requests that name it; may be repeated."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    pair_model: Annotated[
        str | None, typer.Option(help="PairToLora model, for before/after pairs.")
    ] = None,
    edit_base: Annotated[
        str | None, typer.Option(help="Base of edits (InstructPix2Pix) of that model.")
    ] = None,
    edits: Annotated[bool, typer.Option(help="Take before/after pairs too.")] = True,
    evaluator: Annotated[
        str | None, typer.Option(help="Folder of a reader, for the likeness of portraits.")
    ] = None,
    ui: Annotated[
        bool, typer.Option(help="Also a page for people at / (needs the extra `ui`).")
    ] = True,
    lora_dir: Annotated[
        Path | None, typer.Option(help="Folder of LoRA files that prompts may name.")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where jobs and kept files lie.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line; also HYPERLORA_API_KEYS.")
    ] = None,
    rate_limit: Annotated[
        str, typer.Option(help="Requests per key, e.g. 60/minute.")
    ] = "600/minute",
    max_queue_size: Annotated[
        int, typer.Option(min=1, help="Requests that may wait for the model.")
    ] = 256,
    timeout_s: Annotated[
        float, typer.Option(min=1, help="Seconds a synchronous request may take.")
    ] = 120.0,
    ray: Annotated[
        bool, typer.Option("--ray", help="The models in replicas of Ray Serve (extra `scale`).")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas, with --ray.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Up to so many as requests wait.")
    ] = None,
) -> None:
    """Serve LoRAs from images over HTTP; the API explains itself under /docs."""
    from hyperlora.errors import InvalidArgumentError

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
    from diffusers.utils import logging

    from hyperlora.service.metrics import configure_logging

    api_keys = load_api_keys(api_key_file)
    if host not in ("127.0.0.1", "localhost", "::1") and not api_keys:
        raise InvalidArgumentError(
            f"binding {host} without API keys would let everyone in: give --keys, or HYPERLORA_API_KEYS"
        )
    if lora_dir is not None and not lora_dir.is_dir():
        raise InvalidArgumentError(f"{str(lora_dir)!r} is no folder of LoRA files")
    if not ray and (replicas > 1 or max_replicas is not None):
        raise InvalidArgumentError("replicas are Ray Serve's: add --ray")
    if max_replicas is not None and max_replicas < replicas:
        raise InvalidArgumentError(
            f"--max-replicas {max_replicas} is below --replicas {replicas}: at least as many expected"
        )
    try:
        parse(rate_limit)
    except ValueError as error:
        raise InvalidArgumentError(
            f"rate {rate_limit!r} is not understood: write e.g. 60/minute"
        ) from error
    settings = ServiceSettings(
        state_dir=state_dir or Path(typer.get_app_dir("hyperlora")),
        lora_dir=lora_dir,
        key_digests=api_keys,
        rate_limit=rate_limit,
        max_queue_size=max_queue_size,
        timeout_s=timeout_s,
    )
    use_bundle = model is None and base is None  # the bundle, all of it
    evaluator_path = evaluator or (pretrained.EVALUATOR_DIR if use_bundle else None)
    extra_models = extra_model or ([str(pretrained.DIFFLORA_DIR)] if use_bundle else [])
    model_paths = ModelPaths(
        str(model or pretrained.IMAGE_TO_LORA_DIR),
        str(base or pretrained.BASE_DIR),
        str(pair_model or pretrained.PAIR_TO_LORA_DIR),
        str(edit_base or pretrained.EDIT_BASE_DIR),
        edits,
        str(evaluator_path) if evaluator_path else None,
        tuple(extra_models),
    )
    logging.set_verbosity_error()  # diffusers quotes prompts that are too long
    with (
        lock_directory(settings.state_dir),
        _open_engine_factory(
            model_paths, settings, (replicas, max_replicas) if ray else None
        ) as engine,
    ):
        app = create_app(engine, settings)
        if ui:
            _add_ui(app, settings)
        configure_logging()
        typer.echo(f"http://{host}:{port}/ (the API: /docs)", err=True)
        _run_server(app, host, port, timeout_s)


@contextmanager
def _open_engine_factory(
    model_paths: Any, settings: Any, replica_range: tuple[int, int | None] | None
) -> Iterator[Any]:
    """What ``create_app`` makes its engine with: one in this process, or Ray's replicas for as long as this is open."""
    if replica_range is None:
        from hyperlora.service.engine.factory import make_engine_factory

        yield make_engine_factory(model_paths, settings)
        return
    from hyperlora.errors import InvalidArgumentError

    try:
        from hyperlora.service.ray_deployment import ScaleConfig, start_ray_engine
    except ImportError as error:
        raise InvalidArgumentError(
            f"--ray needs {error.name}, which is not installed: add the extra `scale`"
        ) from error
    with start_ray_engine(model_paths, settings, ScaleConfig(*replica_range)) as engine:
        yield lambda observe: engine


def _add_ui(app: Any, settings: Any) -> None:
    try:
        from hyperlora.service.ui import add_ui
    except ImportError as error:
        typer.echo(
            f"no page at /: it needs {error.name}, which is not installed; add the extra `ui`",
            err=True,
        )
    else:
        add_ui(app, settings)


def _run_server(app: Any, host: str, port: int, timeout_s: float) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            await app.state.service.jobs.dismiss()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a caller could say it comes from anywhere
        limit_concurrency=1024,
        timeout_graceful_shutdown=int(timeout_s) + 5,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = Server(config)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise typer.Exit(3)

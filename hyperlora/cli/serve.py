"""``hyperlora serve``."""

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
    also: Annotated[
        list[str] | None, typer.Option(help="Model of another method, for requests that name it; may be repeated.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    pair_model: Annotated[str | None, typer.Option(help="PairToLora model, for before/after pairs.")] = None,
    edit_base: Annotated[str | None, typer.Option(help="Base of edits (InstructPix2Pix) of that model.")] = None,
    edits: Annotated[bool, typer.Option(help="Take before/after pairs too.")] = True,
    evaluator: Annotated[str | None, typer.Option(help="Folder of a reader, for the likeness of portraits.")] = None,
    page: Annotated[bool, typer.Option(help="Also a page for people at / (needs the extra `ui`).")] = True,
    loras: Annotated[Path | None, typer.Option(help="Folder of LoRA files that prompts may name.")] = None,
    state: Annotated[Path | None, typer.Option(help="Where jobs and kept files lie.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, one a line; also HYPERLORA_API_KEYS.")] = None,
    rate: Annotated[str, typer.Option(help="Requests per key, e.g. 60/minute.")] = "600/minute",
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for the model.")] = 256,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds a synchronous request may take.")] = 120.0,
    ray: Annotated[bool, typer.Option("--ray", help="The models in replicas of Ray Serve (extra `scale`).")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas, with --ray.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Up to so many as requests wait.")] = None,
) -> None:
    """Serve LoRAs from images over HTTP; the API explains itself under /docs."""
    from hyperlora.errors import BadRequest

    try:
        import uvicorn  # noqa: F401
        from limits import parse

        from hyperlora import pretrained
        from hyperlora.service.app import create_app
        from hyperlora.service.engine.factory import Models
        from hyperlora.service.file_store import owned
        from hyperlora.service.settings import ServiceSettings, keys_from
    except ImportError as error:
        raise BadRequest(f"the server needs {error.name}, which is not installed: add the extra `serve`") from error
    from diffusers.utils import logging

    from hyperlora.service.metrics import configure_logging

    known = keys_from(keys)
    if host not in ("127.0.0.1", "localhost", "::1") and not known:
        raise BadRequest(f"binding {host} without API keys would let everyone in: give --keys, or HYPERLORA_API_KEYS")
    if loras is not None and not loras.is_dir():
        raise BadRequest(f"{str(loras)!r} is no folder of LoRA files")
    if not ray and (replicas > 1 or max_replicas is not None):
        raise BadRequest("replicas are Ray Serve's: add --ray")
    if max_replicas is not None and max_replicas < replicas:
        raise BadRequest(f"--max-replicas {max_replicas} is below --replicas {replicas}: at least as many expected")
    try:
        parse(rate)
    except ValueError as error:
        raise BadRequest(f"rate {rate!r} is not understood: write e.g. 60/minute") from error
    settings = ServiceSettings(
        state=state or Path(typer.get_app_dir("hyperlora")), loras=loras, keys=known, rate=rate, queue=queue,
        deadline=deadline,
    )  # fmt: skip
    whole = model is None and base is None  # the bundle, all of it
    judge = evaluator or (pretrained.EVALUATOR if whole else None)
    others = also or ([str(pretrained.DIFFLORA)] if whole else [])
    models = Models(
        str(model or pretrained.MODEL), str(base or pretrained.BASE), str(pair_model or pretrained.PAIR_MODEL),
        str(edit_base or pretrained.EDIT_BASE), edits, str(judge) if judge else None, tuple(others),
    )  # fmt: skip
    logging.set_verbosity_error()  # diffusers quotes prompts that are too long
    with owned(settings.state), _engine(models, settings, (replicas, max_replicas) if ray else None) as engine:
        app = create_app(engine, settings)
        if page:
            _add_page(app, settings)
        configure_logging()
        typer.echo(f"http://{host}:{port}/ (the API: /docs)", err=True)
        _run(app, host, port, deadline)


@contextmanager
def _engine(models: Any, settings: Any, scale: tuple[int, int | None] | None) -> Iterator[Any]:
    """What ``create_app`` makes its engine with: one in this process, or Ray's replicas for as long as this is open."""
    if scale is None:
        from hyperlora.service.engine.factory import open_engine

        yield open_engine(models, settings)
        return
    from hyperlora.errors import BadRequest

    try:
        from hyperlora.service.ray_deployment import Scale, cluster
    except ImportError as error:
        raise BadRequest(f"--ray needs {error.name}, which is not installed: add the extra `scale`") from error
    with cluster(models, settings, Scale(*scale)) as engine:
        yield lambda observe: engine


def _add_page(app: Any, settings: Any) -> None:
    try:
        from hyperlora.service.ui import add_page
    except ImportError as error:
        typer.echo(f"no page at /: it needs {error.name}, which is not installed; add the extra `ui`", err=True)
    else:
        add_page(app, settings)


def _run(app: Any, host: str, port: int, deadline: float) -> None:
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
        timeout_graceful_shutdown=int(deadline) + 5,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = Server(config)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise typer.Exit(3)

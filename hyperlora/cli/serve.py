"""``hyperlora serve``."""

from pathlib import Path
from typing import Annotated, Any

import typer


def serve(
    host: Annotated[
        str, typer.Option(help="Address to bind; other machines reach 0.0.0.0 (use keys then).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of an ImageToLora model.")] = None,
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
) -> None:
    """Serve LoRAs from images over HTTP; the API explains itself under /docs."""
    from hyperlora.errors import BadRequest

    try:
        import uvicorn  # noqa: F401
        from limits import parse

        from hyperlora.service import LocalEngine, ServiceSettings, create_app
        from hyperlora.service.changes import Changes
        from hyperlora.service.settings import keys_from
        from hyperlora.service.storage import owned
    except ImportError as error:
        raise BadRequest(f"the server needs {error.name}, which is not installed: add the extra `serve`") from error
    from diffusers.utils import logging

    from hyperlora import bundle
    from hyperlora.heap import keep_heap
    from hyperlora.pipelines import ImageToLora, PairToLora, load_base
    from hyperlora.pipelines.likeness import Likeness
    from hyperlora.service.observing import configure_logging

    known = keys_from(keys)
    if host not in ("127.0.0.1", "localhost", "::1") and not known:
        raise BadRequest(f"binding {host} without API keys would let everyone in: give --keys, or HYPERLORA_API_KEYS")
    if loras is not None and not loras.is_dir():
        raise BadRequest(f"{str(loras)!r} is no folder of LoRA files")
    try:
        parse(rate)
    except ValueError as error:
        raise BadRequest(f"rate {rate!r} is not understood: write e.g. 60/minute") from error
    settings = ServiceSettings(
        state=state or Path(typer.get_app_dir("hyperlora")), loras=loras, keys=known, rate=rate, queue=queue,
        deadline=deadline,
    )  # fmt: skip
    keep_heap()
    frozen = load_base(base or bundle.BASE)
    network = ImageToLora.from_pretrained(model or bundle.MODEL, base=frozen)
    changes = None
    if edits:
        canvas = load_base(edit_base or bundle.EDIT_BASE)
        changes = Changes(PairToLora.from_pretrained(pair_model or bundle.PAIR_MODEL, base=canvas), canvas)

    judge = evaluator or (bundle.EVALUATOR if model is None and base is None else None)
    likeness = Likeness.from_pretrained(judge) if judge else None

    def engine(observe: object) -> LocalEngine:
        return LocalEngine(
            network, frozen, loras, queue=settings.queue, batch=settings.batch, pictures=settings.pictures,
            observe=observe, changes=changes, likeness=likeness,  # type: ignore[arg-type]
        )  # fmt: skip

    app = create_app(engine, settings)
    if page:
        _add_page(app, settings)
    configure_logging()
    logging.set_verbosity_error()  # diffusers quotes prompts that are too long
    with owned(settings.state):
        typer.echo(f"http://{host}:{port}/ (the API: /docs)", err=True)
        _run(app, host, port, deadline)


def _add_page(app: Any, settings: Any) -> None:
    try:
        from hyperlora.service.page import add_page
    except ImportError as error:
        typer.echo(f"no page at /: it needs {error.name}, which is not installed; add the extra `ui`", err=True)
    else:
        add_page(app, settings)


def _run(app: Any, host: str, port: int, deadline: float) -> None:
    import uvicorn

    uvicorn.run(
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

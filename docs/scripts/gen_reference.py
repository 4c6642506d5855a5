"""Write the generated reference pages while MkDocs builds: CLI, HTTP and training configs.

``mkdocs-gen-files`` runs this script; the pages exist in the built site only.
"""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from types import ModuleType
from typing import Any

import docstring_parser
import mkdocs_gen_files
import typer
from typer.main import get_command

TRAINING_PACKAGES = (
    "hyperlora.training.modules",
    "hyperlora.training.datamodules",
    "data_builder.datamodules",
)
NESTED_CLASSES = (
    "hyperlora.data.open_subject_source.SubjectSourceConfig",
    "hyperlora.training.augmentation.AugmentationConfig",
    "hyperlora.training.datamodules.face_filter.FaceFilterConfig",
    "hyperlora.training.datamodules.target_cache.TargetCacheConfig",
)
"""Classes of keys that hold further keys."""
CALLBACKS = (
    "hyperlora.training.weight_averaging.TrainedWeightAveraging",
    "hyperlora.training.weight_averaging.BestCheckpoint",
    "hyperlora.training.portraits.ValidationPortraits",
)
"""Callbacks that a config may name under ``trainer.callbacks``."""
HTTP_METHODS = ("get", "post", "delete", "put", "patch")
MEDIA_TYPE_NAMES = {"multipart/form-data": "form", "application/json": "JSON"}


def format_cli_page() -> str:
    """Format the options of every command of ``hyperlora`` and ``data-builder``."""
    from data_builder.cli import app as data_builder_app
    from hyperlora.cli import app as hyperlora_app

    lines = [
        "# Command line",
        "",
        "Generated from the programs themselves. `--help` prints the same text.",
    ]
    for program, app in (("hyperlora", hyperlora_app), ("data-builder", data_builder_app)):
        lines += ["", f"## {program}", "", *_format_commands(program, app)]
    return "\n".join(lines) + "\n"


def format_http_page() -> str:
    """Format the routes of the service from its OpenAPI document."""
    from hyperlora.service.app import create_app
    from hyperlora.service.settings import ServiceSettings

    def make_no_engine(*_: object) -> Any:
        raise RuntimeError("the reference needs no engine")

    app = create_app(make_no_engine, ServiceSettings(Path(gettempdir())))
    document = app.openapi()
    lines = [
        "# HTTP API",
        "",
        "Generated from the OpenAPI document of the service.",
        "A running server shows it at `/docs` and sends it as `/openapi.json`.",
    ]
    for path, operations in document["paths"].items():
        for method in (name for name in HTTP_METHODS if name in operations):
            lines += _format_operation(method, path, operations[method], document)
    return "\n".join(lines) + "\n"


def format_config_page() -> str:
    """Format the constructor arguments of every class that a training config may name."""
    lines = [
        "# Training configs",
        "",
        "Generated from the classes that `hyperlora train` builds.",
        "A key is an entry of `init_args`; the file sets `class_path` to the heading's class.",
        "",
        "Keys at the top of every file:",
        "",
        "| key | meaning |",
        "|---|---|",
        "| `run_name` | the run writes its checkpoints and metrics to `runs/<run_name>` |",
        "| `checkpoint.every_n_train_steps` | steps between checkpoints; 250 by default |",
        "| `trainer` | arguments of Lightning's `Trainer`, such as `max_steps` and `precision` |",
        "| `model`, `data` | `class_path` and `init_args` of one class of this page each |",
        "| `seed_everything` | seed of the run; 0 by default |",
    ]
    for package in TRAINING_PACKAGES:
        for cls in _iter_classes(package):
            lines += _format_class_section(cls)
    for paths in (NESTED_CLASSES, CALLBACKS):
        for path in paths:
            module_name, _, name = path.rpartition(".")
            lines += _format_class_section(getattr(import_module(module_name), name))
    return "\n".join(lines) + "\n"


def _format_commands(program: str, app: typer.Typer) -> Iterator[str]:
    group: Any = get_command(app)
    for name, command in group.commands.items():
        yield from ("", f"### {program} {name}", "", inspect.cleandoc(command.help or ""), "")
        yield from ("| option | type | default | meaning |", "|---|---|---|---|")
        for parameter in command.params:
            if not getattr(parameter, "hidden", False) and "--help" not in parameter.opts:
                yield _format_parameter(parameter)


def _format_parameter(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if is_argument else parameter.opts + parameter.secondary_opts
    default = parameter.default
    if parameter.required:
        default_text = "required"
    elif default in (None, "", []) or callable(default):
        default_text = ""
    else:
        default_text = f"`{default}`"
    shown_type = getattr(parameter, "metavar", None) or _format_cli_type(parameter)
    cells = [
        ", ".join(f"`{name}`" for name in names),
        shown_type,
        default_text,
        parameter.help or "",
    ]
    return _format_row(cells)


def _format_cli_type(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return "flag"
    annotation = parameter.type_descriptor.annotation
    return _format_annotation(annotation).replace("pathlib.", "")


def _format_operation(
    method: str, path: str, operation: dict[str, Any], document: dict[str, Any]
) -> Iterator[str]:
    description = operation.get("description") or operation.get("summary", "")
    yield from ("", f"## {method.upper()} {path}", "", description, "")
    fields = [
        (p["name"], p["in"], p.get("schema", {}), p.get("required", False), p.get("description"))
        for p in operation.get("parameters", [])
    ]
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolve(content.get("schema", {}), document)
        required = schema.get("required", [])
        fields += [
            (
                name,
                MEDIA_TYPE_NAMES.get(media_type, media_type),
                value,
                name in required,
                value.get("description"),
            )
            for name, value in schema.get("properties", {}).items()
        ]
    if fields:
        yield from ("| field | in | type | default | meaning |", "|---|---|---|---|---|")
    for name, place, schema, required, meaning in fields:
        default = "required" if required else _format_default(schema.get("default"))
        cells = [f"`{name}`", place, _format_schema(schema, document), default, meaning or ""]
        yield _format_row(cells)
    codes = [
        f"`{code}` {response.get('description', '')}"
        for code, response in operation.get("responses", {}).items()
    ]
    yield from ("", "Responses: " + "; ".join(codes) + ".")


def _resolve(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    if reference := schema.get("$ref"):
        return dict(document["components"]["schemas"][reference.rsplit("/", 1)[-1]])
    return schema


def _format_schema(schema: dict[str, Any], document: dict[str, Any]) -> str:
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_format_schema(option, document) for option in options)
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[-1])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_format_schema(schema.get('items', {}), document)}"
    if schema.get("format") == "binary" or "contentMediaType" in schema:
        return "file"
    return str(schema.get("type", "any"))


def _iter_classes(package_name: str) -> Iterator[type]:
    package = import_module(package_name)
    for info in pkgutil.iter_modules(package.__path__):
        module: ModuleType = import_module(f"{package_name}.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            is_own = cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
            if is_own and _has_own_steps(cls):
                yield cls


def _has_own_steps(cls: type) -> bool:
    """Whether a config may name the class: a module that trains, or a data module with data."""
    if hasattr(cls, "training_step"):
        return getattr(cls.training_step, "__module__", "").split(".")[0] != "lightning"
    return hasattr(cls, "train_dataloader") and cls.__name__ != "FolderDataModule"


def _format_class_section(cls: type) -> Iterator[str]:
    yield from ("", f"## {cls.__name__}", "", f"`{cls.__module__}.{cls.__qualname__}`", "")
    yield from _format_class(cls)


def _format_class(cls: type) -> Iterator[str]:
    documentation = docstring_parser.parse(inspect.getdoc(cls) or "")
    constructor = docstring_parser.parse(inspect.getdoc(cls.__init__) or "")
    meanings = {p.arg_name: p.description for p in [*documentation.params, *constructor.params]}
    yield from (documentation.short_description or "", "")
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind != p.VAR_KEYWORD]
    if not parameters:
        return
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for parameter in parameters:
        has_default = parameter.default is not parameter.empty
        cells = [
            f"`{parameter.name}`",
            _format_annotation(parameter.annotation),
            _format_default(parameter.default) if has_default else "required",
            " ".join((meanings.get(parameter.name) or "").split()),
        ]
        yield _format_row(cells)


def _format_annotation(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation.__name__
    text = str(annotation).replace("typing.", "").replace("collections.abc.", "")
    return text.replace("pathlib.", "").replace("hyperlora.", "")


def _format_default(value: Any) -> str:
    return "" if value is None or value == "" else f"`{value}`"


def _format_row(cells: list[str]) -> str:
    texts = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    # `<lora:me:0.8>` outside of code would be an HTML tag, and vanish
    return "| " + " | ".join(re.sub(r"(?<!`)(<[^<>]+>)", r"`\1`", text) for text in texts) + " |"


for page, format_page in (
    ("cli", format_cli_page),
    ("http", format_http_page),
    ("configs", format_config_page),
):
    with mkdocs_gen_files.open(f"reference/{page}.md", "w") as file:
        file.write(format_page())

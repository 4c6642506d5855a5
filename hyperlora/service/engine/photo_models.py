"""``PhotoModels``: the models from photos of one server, by short names; loaded at first use."""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from hyperlora.compute import ComputeConfig
from hyperlora.errors import InvalidArgumentError
from hyperlora.pipelines.photo_model import AnyPhotoModel
from hyperlora.pipelines.released.cards import ReleasedCard, find_card
from hyperlora.pipelines.released.hub_files import open_files
from hyperlora.pipelines.released.recognize import recognize
from hyperlora.pipelines.released.registry import MODEL_CLASSES, open_released_model
from hyperlora.pipelines.released.released_model import ReleasedModel, ReleasedOptions
from hyperlora.pipelines.released.template import make_template_card

DEFAULT_MAX_LOADED: Final = 2
"""Networks that others released and that are loaded at a time."""
_KIND_BY_METHOD: Final = {"hypernetwork": "image-to-lora"}
"""Kinds of models from photos in the API, where they differ from the method."""
_NAMED_MODEL: Final = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,63})=(?P<value>.+)", re.ASCII)


@dataclass(frozen=True)
class PhotoModelSource:
    """A model from photos of one server, loaded or not.

    Attributes:
        name: Its short name in requests.
        method: Its method; of a network that others released, its kind.
        load: Loads it; called again after another model has taken its place.
        facts: The card of a network that others released; None for a model of hyperlora, which
            stays loaded.
    """

    name: str
    method: str
    load: Callable[[], AnyPhotoModel]
    facts: ReleasedCard | None = None

    @property
    def kind(self) -> str:
        """Kind of the model in the API."""
        return _KIND_BY_METHOD.get(self.method, self.method)

    @classmethod
    def from_model(cls, model: AnyPhotoModel, name: str = "") -> "PhotoModelSource":
        """Describe a loaded model.

        Args:
            model: The model.
            name: Its short name; that of its kind if empty.

        Returns:
            The source, which never loads again.
        """
        facts = model.facts if isinstance(model, ReleasedModel) else None
        kind = _KIND_BY_METHOD.get(model.method, model.method)
        return cls(name or kind, model.method, lambda: model, facts)

    @classmethod
    def from_release(
        cls,
        name_or_path: str,
        name: str = "",
        options: ReleasedOptions | None = None,
        compute: ComputeConfig | None = None,
    ) -> "PhotoModelSource":
        """Recognize a network that others released; nothing but headers is read.

        Args:
            name_or_path: Folder or hub id, perhaps with ``:VARIANT``.
            name: Its short name; by default that of the repository and its variant.
            options: Where its parts come from.
            compute: Device and precision.

        Returns:
            The source.

        Raises:
            ModelLoadError: The network is unknown or incomplete.
            InvalidArgumentError: It makes LoRAs of pairs, not of photos.
        """
        options = options or ReleasedOptions()
        files = open_files(name_or_path, options.revision, options.offline)
        recognition = recognize(files)
        if recognition.kind not in MODEL_CLASSES:
            raise InvalidArgumentError(
                f"{name_or_path!r} makes LoRAs of edits, not of photos: leave it out"
            )
        if recognition.kind == "template":
            facts = make_template_card(files.name)
        else:
            facts = find_card(recognition.kind, recognition.variant)
        return cls(
            name or name_repository(files.name, recognition.variant),
            recognition.kind,
            lambda: open_released_model(name_or_path, options, compute),
            facts,
        )


class PhotoModels:
    """The models from photos of one server; released networks stay within a number.

    Args:
        sources: The models; the first serves requests that name none.
        max_loaded: Networks that others released and that are loaded at a time.

    Raises:
        InvalidArgumentError: Two models have one name.
    """

    def __init__(
        self, sources: Sequence[PhotoModelSource], max_loaded: int = DEFAULT_MAX_LOADED
    ) -> None:
        check_names_differ(sources)
        self.sources = {source.name: source for source in sources}
        self.max_loaded = max_loaded
        self._loaded: OrderedDict[str, AnyPhotoModel] = OrderedDict()  # the last used one last
        self._lock = threading.Lock()

    def find(self, name: str | None = None, method: str | None = None) -> PhotoModelSource:
        """Find a model by its name or its method.

        Args:
            name: The short name; None for the first model.
            method: The method instead; the first model of it is found.

        Returns:
            The model, loaded or not.

        Raises:
            InvalidArgumentError: There is none, or both arguments are given.
        """
        if name is not None and method is not None:
            raise InvalidArgumentError("give the model or the method, and not both")
        if name is not None and name not in self.sources:
            raise InvalidArgumentError(
                f"this server has no model {name!r}: it has {', '.join(self.sources)}"
            )
        if name is not None:
            return self.sources[name]
        for source in self.sources.values():
            if method in (None, source.method):
                return source
        methods = dict.fromkeys(source.method for source in self.sources.values())
        raise InvalidArgumentError(
            f"this server has no model of the method {method}: it has {', '.join(methods)}"
        )

    def find_in_memory(self, source: PhotoModelSource) -> AnyPhotoModel | None:
        """Return a model if it is loaded; a model of hyperlora always is."""
        return source.load() if source.facts is None else self._loaded.get(source.name)

    def load(self, source: PhotoModelSource) -> AnyPhotoModel:
        """Load a model, in place of the one that was not used for the longest time.

        Args:
            source: The model; what it fetches may take minutes at first.

        Returns:
            The loaded model.

        Raises:
            ModelLoadError: It cannot be fetched or loaded.
        """
        if source.facts is None:
            return source.load()
        with self._lock:
            if source.name not in self._loaded:
                while len(self._loaded) >= self.max_loaded:
                    self._loaded.popitem(last=False)
                self._loaded[source.name] = source.load()
            self._loaded.move_to_end(source.name)
            return self._loaded[source.name]


class NamedSource(Protocol):
    """A model of a server that requests call by a name."""

    @property
    def name(self) -> str:
        """The short name."""


def check_names_differ(sources: Sequence[NamedSource]) -> None:
    """Check that the models of a server have different names.

    Args:
        sources: The models.

    Raises:
        InvalidArgumentError: Two models have one name.
    """
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgumentError(
                f"two models of this server are called {name!r}: "
                "name one of them, --model NAME=FOLDER"
            )


def name_repository(repository: str, variant: str = "") -> str:
    """Make the short name of a network from those of its repository and its variant.

    Args:
        repository: Folder or hub id.
        variant: The variant; empty for none.

    Returns:
        Lowercase, e.g. ``hyperlora-edit``.
    """
    parts = (Path(repository.replace("\\", "/")).name, variant)
    return "-".join(dict.fromkeys(filter(None, parts))).lower()


def parse_named_value(text: str) -> tuple[str, str]:
    """Parse ``VALUE`` or ``NAME=VALUE``, where NAME is the short name of a model.

    Args:
        text: The argument; one that is a folder as a whole has no name.

    Returns:
        The name, empty for none, and the value.
    """
    match = _NAMED_MODEL.fullmatch(text)
    return ("", text) if match is None or Path(text).exists() else (match["name"], match["value"])


def find_named_value(texts: Sequence[str], name: str) -> str | None:
    """Find the value for a model among ``VALUE`` and ``NAME=VALUE``.

    Args:
        texts: The arguments.
        name: The short name of the model.

    Returns:
        The value of that name, else the one without a name; None for none.
    """
    values = dict(parse_named_value(text) for text in texts)
    return values.get(name, values.get("")) if name else values.get("")

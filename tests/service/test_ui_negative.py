"""The page with a model that makes a second LoRA, for the negative branch of guidance."""

import asyncio
import base64
import re
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi.testclient import TestClient

from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.service.app import create_app
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.ui.api_client import Api
from hyperlora.service.ui.compose_tab import build_compose_tab
from hyperlora.service.ui.lora_tray import add_item
from hyperlora.service.ui.photo_tab import build_photo_tab
from hyperlora.service.ui.sampling import GridRequest
from tests.conftest import Bundle
from tests.service.conftest import Models, make_photo, post_photos
from tests.service.test_ui import collect, get_handler, list_downloads, make_visitor, write_photo


class NegatingModel(ImageToLora):
    """A model whose negative branch has the LoRA at twice the strength, negated."""

    def generate_negative(self, features: ImageFeatures) -> LoraWeights:
        return self.generate_from_features(features) * -2.0


def list_images(page: str) -> list[str]:
    return re.findall(r'<img[^>]*src="([^"]+)"', page)


@pytest.mark.parametrize("name", ["me", "Anna-negative"])
def test_page_offers_both_files_draws_with_both_and_stores_none(
    bundle: Bundle, models: Models, tmp_path: Path, name: str
) -> None:
    model = NegatingModel.from_pretrained(bundle.model, base=models.base)
    settings = ServiceSettings(tmp_path / "state", rate_limit="100000/minute")
    app = create_app(lambda on_batch: LocalEngine(model, models.base, on_batch=on_batch), settings)
    with TestClient(app, base_url="http://localhost") as client:
        api, visitor = Api(app), make_visitor(client)
        photo = write_photo(tmp_path / "me.png")
        create_lora = get_handler(partial(build_photo_tab, api), "create_lora")
        arguments: tuple[Any, ...] = ([photo], "a b", 3.0, name, 4, "0", "", [], None, visitor)
        updates = asyncio.run(collect(create_lora(*arguments)))
        accept = {"Accept": "application/json"}
        fields = {"strength": 3.0, "title": name, "headers": accept}
        body = post_photos(client, make_photo(), **fields).json()  # type: ignore[arg-type]
        contents = [base64.b64decode(body[key]) for key in ("content", "negative_content")]
        files = list_downloads(updates)
        assert [path.name for path in files] == [
            f"{name}.safetensors", f"{name}-negative.safetensors"
        ]  # fmt: skip
        assert [path.read_bytes() for path in files] == contents
        stored = [p.suffix for p in (tmp_path / "state").rglob("*") if "ui" not in p.parts]
        assert not {".safetensors", ".png"} & set(stored), "the page stores nothing by itself"

        (tray,) = [v for update in updates for k, v in update.items() if isinstance(k, gr.State)]
        assert [(item.path, item.negative_path) for item in tray] == [tuple(map(str, files))]
        portraits = list_images(next(v for v in updates[-1].values() if "<img" in str(v)))
        generate_grid = get_handler(partial(build_compose_tab, api), "generate_grid")

        def compose(items: list[Any], strategy: str = "merge") -> list[str]:
            options = (strategy, "a b", 4, "0", "", *[1.0] * len(items))
            return list_images(asyncio.run(collect(generate_grid(visitor, items, *options)))[-1])

        assert compose(tray) == portraits[:4]
        assert compose(add_item([], name, str(files[0]))) != portraits[:4], "the second LoRA counts"
        assert len(compose(tray, "switch")) == len(compose([*tray, *tray])) == 4


def test_only_rows_of_one_merged_lora_have_a_negative_lora() -> None:
    request = GridRequest("a", [[b"x"], [], [b"x", b"y"]], 0, 4, negative_lora=b"z")
    assert request.get_row_options(0) == {"negative_lora": {"content": "eg=="}}
    assert request.get_row_options(1) == request.get_row_options(2) == {}
    assert GridRequest("a", [[b"x"]], 0, 4).get_row_options(0) == {}

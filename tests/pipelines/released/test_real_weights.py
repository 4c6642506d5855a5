"""HyperLoRA's real weights on a photograph: ``pytest -m hub -n 0`` fetches 13 GB, needs a GPU.

The portrait is of Eileen Collins, by NASA and in the public domain; scikit-image brings it along.
The judge is another recognizer than the one that the network sees.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hyperlora.cli import app
from hyperlora.data.contact_sheet import draw_contact_sheet
from hyperlora.lora.io.load import load_lora

pytestmark = pytest.mark.hub

PICTURE = Path(__file__).parents[3] / "docs/images/real-photo.png"
BASE = "SG161222/RealVisXL_V4.0"
JUDGE_PACK = "buffalo_l"
PROMPTS = (
    "a portrait photo of a woman, smiling, in a blue pullover, on a market",
    "a portrait photo of a woman as a chef in a kitchen",
    "a portrait photo of a woman in a forest, autumn, golden hour",
)


def run_cli(*arguments: str) -> str:
    """Run a command of hyperlora; return what it prints."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_portrait_becomes_a_lora_that_draws_the_person(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    insightface_app = pytest.importorskip("insightface.app")
    skimage_data = pytest.importorskip("skimage.data")
    if not torch.cuda.is_available():
        pytest.skip("SDXL needs a GPU")
    photo, lora = tmp_path / "photo.png", tmp_path / "lora.safetensors"
    Image.fromarray(skimage_data.astronaut()).save(photo)
    run_cli("generate", str(photo), "--model", "bytedance-research/HyperLoRA", "-o", str(lora))
    assert len(load_lora(lora).weights.layout.targets) == 560

    judge = insightface_app.FaceAnalysis(JUDGE_PACK)
    judge.prepare(0, det_size=(640, 640))

    def embed(path: Path) -> np.ndarray:
        """Embed the largest face of an image, [512] of unit length."""
        faces = judge.get(np.asarray(Image.open(path).convert("RGB"))[..., ::-1])
        assert faces, f"the judge finds no face in {path.name}"
        largest = max(faces, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
        return np.asarray(largest.normed_embedding)

    reference, rows, scores = embed(photo), [], []
    for index, prompt in enumerate(PROMPTS):
        options = ["--base", BASE, "--prompt", prompt, "--seed", str(index), "--steps", "20"]
        options += ["--guidance-scale", "5"]
        paths = [tmp_path / f"{kind}-{index}.png" for kind in ("without", "with")]
        run_cli("render", *options, "-o", str(paths[0]))
        run_cli("render", *options, "--lora", str(lora), "-o", str(paths[1]))
        scores.append([float(reference @ embed(path)) for path in paths])
        rows.append([Image.open(path).convert("RGB") for path in (photo, *paths)])
    without, with_lora = np.mean(scores, axis=0)
    titles = ("photo", "without LoRA", "with the LoRA of the photo")
    draw_contact_sheet(titles, rows, cell_size=320, row_labels=PROMPTS).save(PICTURE)
    with capsys.disabled():
        print(f"\nsimilarity without LoRA {without:.3f}, with LoRA {with_lora:.3f}; {PICTURE}")
    assert with_lora > 0.4 and with_lora > without + 0.25

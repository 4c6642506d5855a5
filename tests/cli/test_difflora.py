"""A diffusion over LoRAs behind the verbs: samples, the likest of them, the same table, and who is told otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hyperlora import pretrained as released
from hyperlora.encoders.ood_detector import OodDetector, pool_features
from hyperlora.encoders.sidecar import compute_encoder_fingerprint
from hyperlora.errors import ModelLoadError
from hyperlora.lora.io.load import load_lora
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.pipelines import generate
from hyperlora.pipelines.auto import load_image_to_lora
from hyperlora.pipelines.generate import GenerationConfig, SubjectPhotos
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.input_checks import check_photos
from hyperlora.pipelines.lora_diffusion import FACE_EMBED_DIM, LoraDiffusion, make_face_analyzer

Run = Callable[..., Any]


def norm(one: Path, other: Path) -> float:
    return float((load_lora(one).weights - load_lora(other).weights).compute_delta_norms().sum())


def test_a_photo_to_samples(run: Run, bundle: Any, difflora: Path, tmp_path: Path) -> None:
    out = tmp_path / "me.safetensors"
    ran = run(
        "generate", bundle.photo, "-o", out, "--model", difflora, "--method", "difflora", "--n", 3
    )
    assert ran.code == 0, ran
    files = [tmp_path / f"me-{i}.safetensors" for i in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == files
    assert all(str(file) in ran.out for file in files)
    assert norm(files[0], files[1]) > 1e-3
    again = tmp_path / "again.safetensors"
    assert (
        run("generate", bundle.photo, "-o", again, "--model", difflora, "--seed", 1).code == 0
    )  # no --method: told
    assert norm(again, files[1]) == 0
    for option in (["--sampling-steps", 1], ["--guidance", 3]):
        other = tmp_path / "other.safetensors"
        assert run("generate", bundle.photo, "-o", other, "--model", difflora, *option).code == 0
        assert norm(other, files[0]) > 1e-4


def test_the_best_of_several_is_one_of_them(
    run: Run, bundle: Any, difflora: Path, tmp_path: Path
) -> None:
    common = ["--model", difflora, "--base", bundle.base, "--evaluator", bundle.evaluator]
    assert (
        run("generate", bundle.photo, "-o", tmp_path / "s.safetensors", *common, "--n", 3).code == 0
    )
    ran = run(
        "generate",
        bundle.photo,
        "-o",
        tmp_path / "b.safetensors",
        *common,
        "--best-of",
        3,
        "--n",
        2,
        "--json",
    )
    assert ran.code == 0, ran
    assert [line["file"] for line in json.loads(ran.out)] == ["b-1.safetensors", "b-2.safetensors"]
    samples = [tmp_path / f"s-{i}.safetensors" for i in (1, 2, 3)]
    found = [
        [norm(tmp_path / f"b-{i}.safetensors", sample) for sample in samples].index(0)
        for i in (1, 2)
    ]
    assert len({*found}) == 2


def test_candidates_come_in_the_order_of_likeness(difflora: Path) -> None:
    model = load_image_to_lora(difflora)
    subjects = [SubjectPhotos(torch.rand(1, 3, 16, 16)) for _ in range(2)]
    features = generate.encode_subjects(model, subjects)
    made = [model.generate_from_features(features, LoraSampling(seed)) for seed in range(4)]
    chooser: Any = lambda loras, photos: loras.flatten().sum(-1)  # noqa: E731
    first, second = generate.generate_candidates(
        model, features, subjects, GenerationConfig(num_candidates=4), 2, chooser
    )
    for i in range(2):
        sums = torch.stack([lora.flatten()[i].sum() for lora in made]).sort(descending=True).values
        torch.testing.assert_close(
            torch.stack([lora.flatten()[i].sum() for lora in (first, second)]), sums[:2]
        )


def test_samples_depend_on_the_seed_and_not_on_the_batch(difflora: Path) -> None:
    model = load_image_to_lora(difflora)
    photos = torch.rand(3, 1, 3, 16, 16)
    together = model.forward(photos, LoraSampling(5))
    alone = model.forward(photos[1:2], LoraSampling(5))
    torch.testing.assert_close(together[1].flatten(), alone[0].flatten(), rtol=1e-4, atol=1e-5)


def test_a_folder_of_subjects(run: Run, bundle: Any, difflora: Path, tmp_path: Path) -> None:
    ran = run(
        "generate",
        "--batch",
        bundle.subjects,
        "-o",
        tmp_path,
        "--method",
        "difflora",
        "--model",
        difflora,
        "--base",
        bundle.base,
        "--evaluator",
        bundle.evaluator,
        "--best-of",
        2,
    )
    assert ran.code == 0, ran
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_the_same_table(run: Run, bundle: Any, difflora: Path) -> None:
    ran = run(
        "evaluate",
        bundle.benchmark,
        "--model",
        difflora,
        "--base",
        bundle.base,
        "--evaluator",
        bundle.evaluator,
        "--steps",
        2,
        "--people",
        2,
        "--best-of",
        2,
        "--json",
    )
    assert ran.code == 0, ran
    names = [row["name"] for row in json.loads(ran.out)["rows"]]
    for name in ("base, no LoRA", "one photo", "one photo, best of 2", "2 photos", "mean LoRA"):
        assert name in names
    assert any(name.startswith("shuffled") for name in names)


def test_photos_unlike_those_of_training_are_noticed(difflora: Path) -> None:
    model = load_image_to_lora(difflora)
    torch.manual_seed(0)
    usual = torch.rand(3, 16, 16)
    photos = (usual + 0.02 * torch.randn(40, 1, 3, 16, 16)).clamp(0, 1)
    known = model.get_image_features(model.encode_photos(photos))
    domain = OodDetector.fit(
        pool_features(known)[:, 0],
        pool_features(known)[:, 0],
        "faces",
        compute_encoder_fingerprint(model.encoder),
        num_components=8,
    )
    (notices,) = check_photos(
        domain, model.get_image_features(model.encode_photos(1 - usual[None, None]))
    )
    assert "not look like the faces" in notices[0]


@pytest.mark.parametrize("option", [["--n", 2], ["--best-of", 2], ["--seed", 1], ["--guidance", 2]])
def test_one_forward_pass_leaves_nothing_to_chance(
    run: Run, bundle: Any, tmp_path: Path, option: list[Any]
) -> None:
    ran = run(
        "generate",
        bundle.photo,
        "-o",
        tmp_path / "x.safetensors",
        "--model",
        bundle.model,
        "--base",
        bundle.base,
        "--evaluator",
        bundle.evaluator,
        *option,
    )
    assert ran.code == 2
    assert "leaves nothing to chance" in ran.err
    assert not list(tmp_path.iterdir())


def test_faces_are_heard_and_their_pack_travels_with_the_model(
    run: Run, bundle: Any, difflora: Path, tmp_path: Path
) -> None:
    pytest.importorskip("insightface")
    from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
    from data_builder.avatars.rendering import render_portrait

    plain = LoraDiffusion.from_pretrained(difflora)
    torch.manual_seed(9)
    mixture = MixedImageFeatures(
        FACE_EMBED_DIM, plain.encoder.width, width=16, num_tokens=2, num_heads=2, mode="face"
    )
    card = {"resolution": 128}
    face = make_face_analyzer(released.FACE_PACK_DIR, plain.encoder, card)
    LoraDiffusion(plain.encoder, mixture, plain.denoiser, plain.codec, face, card).save_pretrained(
        tmp_path / "made"
    )
    folder = shutil.move(tmp_path / "made", tmp_path / "moved")
    model = LoraDiffusion.from_pretrained(folder)
    assert (
        model.face_analyzer is not None
        and model.face_analyzer.pack_dir.parent == Path(folder).resolve()
    )
    assert model.photo_size == 128 and plain.photo_size == 16
    photos = []
    for seed in SPLITS["validation"][:2]:
        photos.append(tmp_path / f"{seed}.png")
        render_portrait(sample_identity(seed), sample_scene(seed, 0)).save(photos[-1])
    files = [tmp_path / f"{photo.stem}.safetensors" for photo in photos]
    for photo, file in zip(photos, files, strict=True):
        assert run("generate", photo, "-o", file, "--model", folder).code == 0
    assert norm(*files) > 1e-4, "faces alone tell people apart"
    header = load_lora(files[0]).metadata
    assert header.encoder.endswith(", face-pack") and header.encoder_license.endswith(
        "faces: Apache-2.0"
    )

    blank = tmp_path / "blank.png"
    Image.new("RGB", (128, 128), "gray").save(blank)
    ran = run("generate", blank, "-o", tmp_path / "blank.safetensors", "--model", folder)
    assert ran.code == 2 and "no face was found" in ran.err
    heard, _ = model.encode_photos(torch.full((1, 1, 3, 128, 128), 0.5), allow_no_face=True)
    assert not heard.tokens.any()


def test_methods_are_told_apart(run: Run, bundle: Any, difflora: Path, tmp_path: Path) -> None:
    assert isinstance(load_image_to_lora(difflora), LoraDiffusion)
    assert isinstance(load_image_to_lora(bundle.model), ImageToLora)
    with pytest.raises(ModelLoadError, match="of the method hyperdreambooth, not difflora"):
        load_image_to_lora(bundle.model, "difflora")
    out = tmp_path / "x.safetensors"
    for options, sentence in (
        (["--method", "magic"], "unknown method 'magic'; known: hyperdreambooth, difflora"),
        (
            ["--method", "difflora", "--model", bundle.model],
            "of the method hyperdreambooth, not difflora",
        ),
        (["--model", difflora, "--n", 2, "--batch", bundle.subjects], "leave out --batch"),
    ):
        photo = [] if "--batch" in options else [bundle.photo]
        ran = run("generate", *photo, "-o", out, *options)
        assert ran.code == 2
        assert sentence in ran.err

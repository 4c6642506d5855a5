"""A diffusion over LoRAs in the commands: samples, reranking, scores and errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hyperlora import pretrained
from hyperlora.encoders.ood_detector import OodDetector, pool_features
from hyperlora.encoders.sidecar import compute_encoder_fingerprint
from hyperlora.errors import ModelLoadError
from hyperlora.lora.io.load import load_lora
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.pipelines import generate
from hyperlora.pipelines.auto import load_image_to_lora
from hyperlora.pipelines.config import GenerationConfig, LoraSampling
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.input_checks import check_photos
from hyperlora.pipelines.lora_diffusion import FACE_EMBED_DIM, LoraDiffusion, make_face_analyzer
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.photo_model import SubjectPhotos

RunCommand = Callable[..., Any]


def compute_distance(path_a: Path, path_b: Path) -> float:
    return float(
        (load_lora(path_a).weights - load_lora(path_b).weights).compute_delta_norms().sum()
    )


def test_num_loras_writes_samples_by_seed(
    run: RunCommand, bundle: Any, lora_diffusion_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "me.safetensors"
    result = run(
        "generate",
        bundle.photo,
        "-o",
        out,
        "--model",
        lora_diffusion_dir,
        "--method",
        "lora-diffusion",
        "--num-loras",
        3,
    )
    assert result.code == 0, result
    files = [tmp_path / f"me-{i}.safetensors" for i in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == files
    assert all(str(file) in result.out for file in files)
    assert compute_distance(files[0], files[1]) > 1e-3
    repeated = tmp_path / "again.safetensors"
    assert (
        run(
            "generate", bundle.photo, "-o", repeated, "--model", lora_diffusion_dir, "--seed", 1
        ).code
        == 0
    )  # the method is that of the model
    assert compute_distance(repeated, files[1]) == 0
    for options in (["--lora-sampling-steps", 1], ["--lora-guidance-scale", 3]):
        path_b = tmp_path / "other.safetensors"
        assert (
            run(
                "generate", bundle.photo, "-o", path_b, "--model", lora_diffusion_dir, *options
            ).code
            == 0
        )
        assert compute_distance(path_b, files[0]) > 1e-4


def test_num_candidates_keeps_best_samples(
    run: RunCommand, bundle: Any, lora_diffusion_dir: Path, tmp_path: Path
) -> None:
    model_options = [
        "--model",
        lora_diffusion_dir,
        "--base",
        bundle.base,
        "--judge",
        bundle.evaluator,
    ]
    assert (
        run(
            "generate",
            bundle.photo,
            "-o",
            tmp_path / "s.safetensors",
            *model_options,
            "--num-loras",
            3,
        ).code
        == 0
    )
    result = run(
        "generate",
        bundle.photo,
        "-o",
        tmp_path / "b.safetensors",
        *model_options,
        "--num-candidates",
        3,
        "--num-loras",
        2,
        "--json",
    )
    assert result.code == 0, result
    assert [line["file"] for line in json.loads(result.out)] == [
        "b-1.safetensors",
        "b-2.safetensors",
    ]
    samples = [tmp_path / f"s-{i}.safetensors" for i in (1, 2, 3)]
    indices = [
        [compute_distance(tmp_path / f"b-{i}.safetensors", sample) for sample in samples].index(0)
        for i in (1, 2)
    ]
    assert len({*indices}) == 2


def test_generate_candidates_returns_best_first(lora_diffusion_dir: Path) -> None:
    model = load_image_to_lora(lora_diffusion_dir)
    subjects = [SubjectPhotos(torch.rand(1, 3, 16, 16)) for _ in range(2)]
    features = model.encode_subjects(subjects)
    candidates = [model.generate_from_features(features, LoraSampling(seed)) for seed in range(4)]
    reranker: Any = lambda loras, photos: loras.flatten().sum(-1)  # noqa: E731
    best, second_best = generate.generate_candidates(
        model, features, subjects, GenerationConfig(num_candidates=4, num_loras=2), reranker
    )
    for i in range(2):
        sums = (
            torch.stack([lora.flatten()[i].sum() for lora in candidates])
            .sort(descending=True)
            .values
        )
        torch.testing.assert_close(
            torch.stack([lora.flatten()[i].sum() for lora in (best, second_best)]), sums[:2]
        )


def test_lora_diffusion_samples_independently_of_batch(lora_diffusion_dir: Path) -> None:
    model = load_image_to_lora(lora_diffusion_dir)
    photos = torch.rand(3, 1, 3, 16, 16)
    batch_lora = model.forward(photos, LoraSampling(5))
    single_lora = model.forward(photos[1:2], LoraSampling(5))
    torch.testing.assert_close(
        batch_lora[1].flatten(), single_lora[0].flatten(), rtol=1e-4, atol=1e-5
    )


def test_input_dir_reranks_candidates(
    run: RunCommand, bundle: Any, lora_diffusion_dir: Path, tmp_path: Path
) -> None:
    result = run(
        "generate",
        "--input-dir",
        bundle.subjects,
        "-o",
        tmp_path,
        "--method",
        "lora-diffusion",
        "--model",
        lora_diffusion_dir,
        "--base",
        bundle.base,
        "--judge",
        bundle.evaluator,
        "--num-candidates",
        2,
    )
    assert result.code == 0, result
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_evaluate_scores_lora_diffusion(
    run: RunCommand, bundle: Any, lora_diffusion_dir: Path
) -> None:
    result = run(
        "evaluate",
        bundle.benchmark,
        "--model",
        lora_diffusion_dir,
        "--base",
        bundle.base,
        "--evaluator",
        bundle.evaluator,
        "--steps",
        2,
        "--num-subjects",
        2,
        "--num-candidates",
        2,
        "--json",
    )
    assert result.code == 0, result
    names = [row["name"] for row in json.loads(result.out)["results"]]
    for name in ("base, no LoRA", "one photo", "one photo, best of 2", "2 photos", "mean LoRA"):
        assert name in names
    assert any(name.startswith("shuffled") for name in names)


def test_check_photos_warns_of_unknown_photos(lora_diffusion_dir: Path) -> None:
    model = load_image_to_lora(lora_diffusion_dir)
    torch.manual_seed(0)
    mean_photo = torch.rand(3, 16, 16)
    photos = (mean_photo + 0.02 * torch.randn(40, 1, 3, 16, 16)).clamp(0, 1)
    train_features = model.encode_photos(photos).image
    ood_detector = OodDetector.fit(
        pool_features(train_features)[:, 0],
        pool_features(train_features)[:, 0],
        "faces",
        compute_encoder_fingerprint(model.encoder),
        num_components=8,
    )
    (warnings,) = check_photos(ood_detector, model.encode_photos(1 - mean_photo[None, None]).image)
    assert "not look like the faces" in warnings[0]


@pytest.mark.parametrize(
    "options",
    [["--num-loras", 2], ["--num-candidates", 2], ["--seed", 1], ["--lora-guidance-scale", 2]],
)
def test_generate_refuses_sampling_of_deterministic_model(
    run: RunCommand, bundle: Any, tmp_path: Path, options: list[Any]
) -> None:
    result = run(
        "generate",
        bundle.photo,
        "-o",
        tmp_path / "x.safetensors",
        "--model",
        bundle.model,
        "--base",
        bundle.base,
        "--judge",
        bundle.evaluator,
        *options,
    )
    assert result.code == 2
    assert "this model is deterministic" in result.err
    assert not list(tmp_path.iterdir())


def test_lora_diffusion_embeds_faces_and_saves_pack(
    run: RunCommand, bundle: Any, lora_diffusion_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("insightface")
    from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
    from data_builder.avatars.rendering import render_portrait

    image_model = LoraDiffusion.from_pretrained(lora_diffusion_dir)
    torch.manual_seed(9)
    mixture = MixedImageFeatures(
        FACE_EMBED_DIM, image_model.encoder.width, width=16, num_tokens=2, num_heads=2, mode="face"
    )
    card = ModelCard(resolution=128)
    face_analyzer = make_face_analyzer(pretrained.FACE_PACK_DIR, image_model.encoder, card)
    LoraDiffusion(
        image_model.encoder, mixture, image_model.denoiser, image_model.codec, face_analyzer, card
    ).save_pretrained(tmp_path / "made")
    folder = shutil.move(tmp_path / "made", tmp_path / "moved")
    model = LoraDiffusion.from_pretrained(folder)
    assert (
        model.face_analyzer is not None
        and model.face_analyzer.pack_dir.parent == Path(folder).resolve()
    )
    assert model.photo_size == 128 and image_model.photo_size == 16
    photos = []
    for seed in SPLITS["validation"][:2]:
        photos.append(tmp_path / f"{seed}.png")
        render_portrait(sample_identity(seed), sample_scene(seed, 0)).save(photos[-1])
    files = [tmp_path / f"{photo.stem}.safetensors" for photo in photos]
    for photo, file in zip(photos, files, strict=True):
        assert run("generate", photo, "-o", file, "--model", folder).code == 0
    assert compute_distance(*files) > 1e-4, "face embeddings alone must distinguish subjects"
    metadata = load_lora(files[0]).metadata
    assert metadata.encoder.endswith(", face-pack") and metadata.encoder_license.endswith(
        "faces: Apache-2.0"
    )

    blank = tmp_path / "blank.png"
    Image.new("RGB", (128, 128), "gray").save(blank)
    result = run("generate", blank, "-o", tmp_path / "blank.safetensors", "--model", folder)
    assert result.code == 2 and "no face was found" in result.err
    features = model.encode_photos(torch.full((1, 1, 3, 128, 128), 0.5), allow_no_face=True)
    assert features.face is not None and not features.face.tokens.any()


def test_load_image_to_lora_reads_method(
    run: RunCommand, bundle: Any, lora_diffusion_dir: Path, tmp_path: Path
) -> None:
    assert isinstance(load_image_to_lora(lora_diffusion_dir), LoraDiffusion)
    assert isinstance(load_image_to_lora(bundle.model), ImageToLora)
    with pytest.raises(ModelLoadError, match="of the method hypernetwork, not lora-diffusion"):
        load_image_to_lora(bundle.model, "lora-diffusion")
    out = tmp_path / "x.safetensors"
    for options, sentence in (
        (["--method", "magic"], "unknown method 'magic'; known: hypernetwork, lora-diffusion"),
        (
            ["--method", "lora-diffusion", "--model", bundle.model],
            "of the method hypernetwork, not lora-diffusion",
        ),
        (
            ["--model", lora_diffusion_dir, "--num-loras", 2, "--input-dir", bundle.subjects],
            "leave out --input-dir",
        ),
    ):
        photo = [] if "--input-dir" in options else [bundle.photo]
        result = run("generate", *photo, "-o", out, *options)
        assert result.code == 2
        assert sentence in result.err

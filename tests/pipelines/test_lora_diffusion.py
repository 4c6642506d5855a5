"""``LoraDiffusion``: the features of photos and faces, and the LoRA that the denoiser samples."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidImageError, ModelLoadError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.models.latent_regression import LatentRegression
from hyperlora.models.lora_dit import LoraDiT
from hyperlora.models.lora_pca import LoraPCA
from hyperlora.pipelines import lora_diffusion
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.image_to_lora_base import EncodedPhotos
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import FACE_EMBED_DIM, LoraDiffusion
from hyperlora.pipelines.model_card import ModelCard

LAYOUT = LoraLayout((TargetModule("unet.a", 6, 5), TargetModule("unet.b", 3, 4)), 2, "tiny")
TOKENS, WIDTH = 3, 2  # of the latents
BACKBONE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
IMAGE_SHAPE = (5, 16)  # four patches and the class token


@dataclass
class BrightnessAnalyzer:
    """An analyzer whose embedding is filled with the brightness; a black photo has no face."""

    pack: str = "packs/drawn"
    license: str = "mit"
    embeds: bool = True
    targets: list[Path] = field(default_factory=list)

    def get_face(self, image: Image.Image) -> Any:
        """Detect the face."""
        brightness = np.asarray(image).mean() / 255
        if brightness == 0:
            raise InvalidImageError("no face was found")
        embedding = np.full(FACE_EMBED_DIM, brightness, "float32")
        return SimpleNamespace(embedding=embedding if self.embeds else None)

    def copy_models(self, target_dir: Path) -> None:
        """Remember the folder."""
        self.targets.append(target_dir)


def make_model(
    mode: str = "gate", has_regression: bool = False, analyzer: Any = None, **card: Any
) -> LoraDiffusion:
    torch.manual_seed(0)
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size=16, options=BACKBONE, license="own")
    mixture = MixedImageFeatures(FACE_EMBED_DIM, 16, width=8, num_tokens=2, num_heads=2, mode=mode)
    codec = LoraCodec(LoraNormalizer(LAYOUT), LoraPCA(LAYOUT, TOKENS, WIDTH))
    codec.autoencoder.components.normal_()  # type: ignore[operator, union-attr]
    codec.latent_std.fill_(0.5)
    denoiser = LoraDiT(TOKENS, WIDTH, 8, width=8, depth=1, num_heads=2)
    regression = None
    if has_regression:
        regression = LatentRegression(TOKENS, WIDTH, IMAGE_SHAPE, FACE_EMBED_DIM, 2)
        for buffer in (regression.down, regression.up):
            buffer.normal_(std=0.2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model = LoraDiffusion(
        encoder, mixture, denoiser, codec, analyzer, ModelCard(**card), regression
    )
    return model.eval().requires_grad_(False)


def make_photos(num_subjects: int = 2, num_views: int = 3, size: int = 16) -> Tensor:
    """Paint photos of one gray each, all different."""
    grays = torch.linspace(0.2, 0.8, num_subjects * num_views).view(num_subjects, num_views)
    return grays[..., None, None, None].expand(-1, -1, 3, size, size).clone()


@pytest.mark.parametrize(
    ("has_faces", "resolution", "expected"),
    [(False, 48, 16), (True, 48, 48), (True, 8, 16), (True, None, 16)],
)
def test_photo_size_suits_encoder_and_faces(
    has_faces: bool, resolution: int | None, expected: int
) -> None:
    analyzer = BrightnessAnalyzer() if has_faces else None
    assert make_model(analyzer=analyzer, resolution=resolution).photo_size == expected


def test_encoder_provenance_names_the_face_pack() -> None:
    assert make_model().encoder_provenance == ("vit_tiny_patch16_224", "own")
    assert make_model(analyzer=BrightnessAnalyzer()).encoder_provenance == (
        "vit_tiny_patch16_224, drawn",
        "own; faces: mit",
    )


def test_encode_photos_embeds_image_and_face_of_each_photo() -> None:
    model, photos = make_model(analyzer=BrightnessAnalyzer()), make_photos()
    features = model.encode_photos(photos)
    torch.testing.assert_close(features.image.tokens, model.encoder(photos).tokens)
    assert features.face is not None
    assert features.face.tokens.shape == (2, 3, 1, FACE_EMBED_DIM)
    expected = photos[:, :, :1, 0, :1].expand(-1, -1, -1, FACE_EMBED_DIM)
    torch.testing.assert_close(features.face.tokens, expected, atol=3e-3, rtol=0)
    assert not features.image.tokens.requires_grad


def test_encode_photos_without_analyzer_has_zeros_for_faces() -> None:
    features = make_model().encode_photos(make_photos())
    assert features.face is not None
    assert torch.equal(features.face.tokens, torch.zeros(2, 3, 1, FACE_EMBED_DIM))


def test_encode_photos_needs_faces_unless_allowed() -> None:
    model, photos = make_model(analyzer=BrightnessAnalyzer()), make_photos()
    photos[1, 0] = 0
    with pytest.raises(InvalidImageError, match="no face"):
        model.encode_photos(photos)
    features = model.encode_photos(photos, allow_no_face=True)
    assert features.face is not None
    is_empty = (features.face.tokens == 0).all(-1).squeeze(-1)
    assert is_empty.tolist() == [[False] * 3, [True, False, False]]


def test_encode_photos_needs_a_face_recognizer() -> None:
    model = make_model(analyzer=BrightnessAnalyzer(embeds=False))
    with pytest.raises(ModelLoadError, match="no face recognizer"):
        model.encode_photos(make_photos())


def make_features(batch: int = 2) -> EncodedPhotos:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(batch, 3, *IMAGE_SHAPE, generator=generator)
    face = torch.randn(batch, 3, 1, FACE_EMBED_DIM, generator=generator)
    return EncodedPhotos(ImageFeatures(image), ImageFeatures(face))


@pytest.mark.parametrize("has_regression", [False, True])
@pytest.mark.parametrize(
    ("card", "sampling", "seed", "steps", "guidance"),
    [
        ({}, None, 0, 10, 1.0),
        ({"num_inference_steps": 3, "guidance_scale": 2.5}, LoraSampling(7), 7, 3, 2.5),
        (
            {"num_inference_steps": 3, "guidance_scale": 2.5},
            LoraSampling(7, num_inference_steps=2, guidance_scale=0.0),
            7,
            2,
            0.0,
        ),
    ],
)
def test_generate_samples_from_the_noise_of_the_seed(
    card: dict[str, Any],
    sampling: LoraSampling | None,
    seed: int,
    steps: int,
    guidance: float,
    has_regression: bool,
) -> None:
    model = make_model(has_regression=has_regression, strength=1.5, **card)
    features = make_features()
    assert features.face is not None
    noise = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    latents = model.denoiser.sample(
        model.mixture(features.face, features.image),
        noise.repeat(2, 1, 1),
        steps,
        guidance,
        model.regression(features.face, features.image) if model.regression else None,
    )
    expected = model.codec.decode(latents) * 1.5
    loras = model.generate_from_features(features, sampling)
    torch.testing.assert_close(loras.flatten(), expected.flatten())
    assert loras.batch_shape == (2,)
    assert guidance == 0 or (latents[0] - latents[1]).abs().max() > 1e-3
    if steps < 10:
        longer = replace(sampling or LoraSampling(), num_inference_steps=steps + 2)
        others = model.generate_from_features(features, longer)
        assert (others.flatten() - loras.flatten()).abs().max() > 1e-3


def test_generate_needs_face_features() -> None:
    features = EncodedPhotos(make_features().image)
    with pytest.raises(ValueError, match="face embeddings expected"):
        make_model().generate_from_features(features)


@pytest.mark.parametrize("mode", ["image", "face"])
def test_model_rebuilds_from_its_config(mode: str, tmp_path: Path) -> None:
    has_regression = mode == "face"
    model = make_model(mode, has_regression)
    config = model.to_config()
    assert config["face"] is None
    if not has_regression:
        assert config.pop("regression") is None  # as in the files of older models
    rebuilt = LoraDiffusion.from_config(config, LAYOUT, tmp_path, None)
    assert rebuilt.layout == LAYOUT and rebuilt.face_analyzer is None
    rebuilt.load_state_dict(model.state_dict())
    features = make_features()
    expected = model.generate_from_features(features).flatten()
    torch.testing.assert_close(rebuilt.eval().generate_from_features(features).flatten(), expected)
    assert rebuilt.to_config() == model.to_config()


@pytest.mark.parametrize("place", ["model", "beside", "nowhere"])
def test_face_pack_is_found_in_the_folder_or_beside_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detector gets the size of the photos, rounded up to a multiple of 32."""
    monkeypatch.setattr(lora_diffusion, "FaceAnalyzer", lambda pack, size: (pack, size))
    folder = tmp_path / "model"
    folders = {"model": folder / "face-pack", "beside": tmp_path / "face-pack"}
    if place in folders:
        folders[place].mkdir(parents=True)
    config = make_model(analyzer=BrightnessAnalyzer()).to_config()
    assert config["face"] == "face-pack"
    config["card"] = {"resolution": 40}
    model: Any = LoraDiffusion.from_config(config, LAYOUT, folder, None)
    assert model.face_analyzer == (folders.get(place, "face-pack"), 64)


def test_saved_model_holds_its_face_pack(tmp_path: Path) -> None:
    analyzer = BrightnessAnalyzer()
    make_model(analyzer=analyzer)._save_pretrained(tmp_path)
    assert analyzer.targets == [tmp_path / "face-pack"]
    assert (tmp_path / "config.json").is_file()

"""The mix of face features and image tokens."""

import pytest
import torch

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.models.image_feature_mixer import MixedImageFeatures


def make_features(tokens=5, width=12) -> ImageFeatures:
    return ImageFeatures(torch.randn(3, 2, tokens, width))


def test_mixed_image_features_depend_on_the_inputs_of_their_mode() -> None:
    face, image = make_features(tokens=1, width=6), make_features()
    other_face, other_image = make_features(tokens=1, width=6), make_features()
    used_inputs = {"gate": (1, 1), "average": (1, 1), "face": (1, 0), "image": (0, 1)}
    for mode, uses_face_and_image in used_inputs.items():
        torch.manual_seed(1)
        model = MixedImageFeatures(6, 12, width=8, num_tokens=4, num_heads=2, mode=mode)
        mixed, gate = model.forward_with_gate(face, image)
        assert mixed.tokens.shape == gate.shape == (3, 2, 4, 8)
        has_changed = [
            not torch.equal(mixed.tokens, model(*inputs).tokens)
            for inputs in ((other_face, image), (face, other_image))
        ]
        assert has_changed == [bool(is_used) for is_used in uses_face_and_image]
    with pytest.raises(InvalidArgumentError, match="known: gate, average, face, image"):
        MixedImageFeatures(6, 12, mode="both")


def test_gate_starts_at_one_half_and_follows_its_formula() -> None:
    torch.manual_seed(2)
    face, image = make_features(tokens=1, width=6), make_features()
    model = MixedImageFeatures(6, 12, width=8, num_tokens=4, num_heads=2)
    mixed, gate = model.forward_with_gate(face, image)
    assert gate.unique().tolist() == [0.5]
    experts = {}
    for mode in ("face", "image"):
        expert = MixedImageFeatures(6, 12, width=8, num_tokens=4, num_heads=2, mode=mode)
        expert.load_state_dict(model.state_dict(), strict=False)
        experts[mode] = expert(face, image).tokens
    torch.testing.assert_close(mixed.tokens, (experts["face"] + experts["image"]) / 2)

    torch.nn.init.normal_(model.gate.weight)
    torch.nn.init.normal_(model.gate.bias)
    mixed, gate = model.forward_with_gate(face, image)
    expected = torch.sigmoid(model.gate(torch.cat([experts["face"], experts["image"]], -1)))
    torch.testing.assert_close(gate, expected)
    torch.testing.assert_close(
        mixed.tokens, expected * experts["face"] + (1 - expected) * experts["image"]
    )


def test_default_config() -> None:
    model = MixedImageFeatures(6, 12)
    assert model.config == {
        "face_feature_width": 6,
        "image_feature_width": 12,
        "width": 128,
        "num_tokens": 16,
        "num_heads": 4,
        "mode": "gate",
    }
    assert (model.width, model.mode, model.cross_attn.num_heads) == (128, "gate", 4)
    assert float(model.queries.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("gate", {"face_proj", "image_proj", "queries", "cross_attn", "gate"}),
        ("average", {"face_proj", "image_proj", "queries", "cross_attn"}),
        ("face", {"face_proj"}),
        ("image", {"image_proj", "queries", "cross_attn"}),
    ],
)
def test_mode_has_the_weights_that_it_uses(mode: str, names: set[str]) -> None:
    model = MixedImageFeatures(6, 12, 8, 4, 2, mode)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == names | {"norms"}
    assert len(model.norms) == 2 and model.config["mode"] == model.mode == mode


@pytest.mark.parametrize(("mode", "gate_value"), [("average", 0.5), ("face", 1), ("image", 0)])
def test_gate_of_each_mode_weights_face_against_image(mode: str, gate_value: float) -> None:
    """g E_face + (1 - g) E_image with LayerNorms of their own, per photo."""
    torch.manual_seed(3)
    model = MixedImageFeatures(6, 12, 8, 4, 2, mode)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    face, image = make_features(tokens=1, width=6), make_features()
    expected = torch.zeros(3, 2, 4, 8)
    if mode != "image":
        norm, linear, _ = model.face_proj
        tokens = linear(norm(face.tokens[:, :, 0])).view(3, 2, 4, 8)
        expected += (gate_value or 1) * model.norms[0](tokens)
    if mode != "face":
        norm, linear = model.image_proj
        for i in range(3):
            keys = linear(norm(image.tokens[i]))
            values, _ = model.cross_attn(torch.stack([model.queries] * 2), keys, keys)
            expected[i] += (1 - gate_value) * model.norms[1](values)
    mixed, gate = model.forward_with_gate(face, image)
    torch.testing.assert_close(mixed.tokens, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(gate, torch.full((3, 2, 4, 8), float(gate_value)))
    assert torch.equal(model(face, image).tokens, mixed.tokens)


def test_projections_normalize_their_inputs() -> None:
    """LayerNorm first: the scale of a face vector or of image tokens changes nothing."""
    torch.manual_seed(3)
    model = MixedImageFeatures(6, 12, 8, 4, 2)
    torch.nn.init.normal_(model.gate.weight)
    face, image = make_features(tokens=1, width=6), make_features()
    expected = model(face, image).tokens
    scaled = model(ImageFeatures(face.tokens * 50), ImageFeatures(image.tokens * 50 + 3)).tokens
    torch.testing.assert_close(scaled, expected, atol=1e-3, rtol=1e-3)

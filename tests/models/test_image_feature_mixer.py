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

"""``FaceSimilarity``: the face pack of the bundle on drawn people."""

import pytest
import torch
from torch import Tensor

from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from hyperlora import pretrained
from hyperlora.data.images import to_tensor
from hyperlora.errors import InvalidImageError
from hyperlora.pipelines.face_similarity import FaceSimilarity

pytest.importorskip("insightface")


@pytest.fixture(scope="module")
def similarity() -> FaceSimilarity:
    return FaceSimilarity.from_pack(pretrained.FACE_PACK_DIR, 128)


def draw_portraits(person: int, scenes: range) -> Tensor:
    seed = SPLITS["validation"][person]
    identity = sample_identity(seed)
    portraits = [render_portrait(identity, sample_scene(seed, scene)) for scene in scenes]
    return torch.stack([to_tensor(portrait, 128) for portrait in portraits])


def test_own_portraits_score_above_those_of_others(similarity: FaceSimilarity) -> None:
    for person in range(4):
        photos = draw_portraits(person, range(2))
        own = similarity(photos, draw_portraits(person, range(2, 6)))
        others = torch.cat(
            [similarity(photos, draw_portraits(p, range(2, 4))) for p in range(4) if p != person]
        )
        assert own.mean() > others.mean() + 0.3


def test_score_is_the_mean_cosine_to_the_photos(similarity: FaceSimilarity) -> None:
    photos, images = draw_portraits(0, range(2)), draw_portraits(0, range(2, 4))
    both = similarity(photos, images)
    torch.testing.assert_close(
        both, (similarity(photos[:1], images) + similarity(photos[1:], images)) / 2
    )
    torch.testing.assert_close(similarity(photos[:1], photos[:1]), torch.ones(1))


def test_image_without_a_face_has_the_lowest_score(similarity: FaceSimilarity) -> None:
    photos, blank = draw_portraits(0, range(1)), torch.full((1, 3, 128, 128), 0.5)
    assert similarity(photos, blank).tolist() == [-1.0]
    torch.testing.assert_close(similarity(torch.cat([blank, photos]), photos), torch.ones(1))
    with pytest.raises(InvalidImageError, match="no face was found in the photos"):
        similarity(blank, photos)


@pytest.mark.parametrize(("size", "expected"), [(128, 128), (100, 128), (512, 512), (1024, 640)])
def test_images_have_a_size_that_the_detector_takes(size: int, expected: int) -> None:
    assert FaceSimilarity.from_pack(pretrained.FACE_PACK_DIR, size).image_size == expected

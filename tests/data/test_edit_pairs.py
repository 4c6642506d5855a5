"""Pairs from folders and public layouts of data."""

import json

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from hyperlora.data.edit_pairs import load_edit_pairs
from hyperlora.data.images import read_image
from hyperlora.errors import InvalidArgumentError, InvalidImageError


def make_image(color, size=(6, 4)):
    return Image.new("RGB", size, color)


def read_colors(pair):
    return tuple(read_image(side).getpixel((0, 0)) for side in (pair.before, pair.after))


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_load_edit_pairs_reads_plain_folder(tmp_path):
    for name in ("b_2", "a"):
        make_image(RED).save(tmp_path / f"{name}_before.png")
        make_image(BLUE).save(tmp_path / f"{name}_after.webp", lossless=True)
    (tmp_path / "a.txt").write_text("make it blue\n")
    make_image("green").save(tmp_path / "other.png")
    first_pair, second_pair = load_edit_pairs(tmp_path)
    assert (first_pair.name, first_pair.instruction, second_pair.name, second_pair.instruction) == (
        "a",
        "make it blue",
        "b_2",
        "",
    )
    assert read_colors(first_pair) == (RED, BLUE)


def test_load_edit_pairs_reads_suffixes_and_texts_as_subjects_do(tmp_path):
    make_image(RED).save(tmp_path / "hat_Before.TIFF")
    make_image(BLUE).save(tmp_path / "hat_AFTER.bmp")
    (tmp_path / "hat.caption").write_bytes("\nthe hat’s gone\r\n".encode("cp1252"))
    (pair,) = load_edit_pairs(tmp_path)
    assert read_colors(pair) == (RED, BLUE) and pair.instruction == "the hat’s gone"
    make_image(RED).save(tmp_path / "hat_before.png")
    with pytest.raises(InvalidImageError, match=r"are both the image before: remove one of them"):
        load_edit_pairs(tmp_path)


def test_hub_pairs_are_decoded_by_read_image(tmp_path):
    """Not by ``datasets``, which keeps the colors of a profile as they are."""
    rows = Dataset.from_dict({"before": [make_image(RED)], "after": [make_image(BLUE)]})
    rows.save_to_disk(str(tmp_path / "d"))
    (pair,) = load_edit_pairs(tmp_path / "d")
    assert isinstance(pair.before, bytes) and isinstance(pair.after, bytes)


def test_load_edit_pairs_names_incomplete_pair(tmp_path):
    make_image(RED).save(tmp_path / "a_before.png")
    with pytest.raises(InvalidImageError, match=r"a_before\.png' has no image after beside it"):
        load_edit_pairs(tmp_path)
    (tmp_path / "a_before.png").rename(tmp_path / "a.png")
    with pytest.raises(
        InvalidImageError, match=r"NAME_before\.png and NAME_after\.png are expected"
    ):
        load_edit_pairs(tmp_path)


def test_load_edit_pairs_reads_instruct_pix2pix(tmp_path):
    """The layout of the unpacked clip-filtered-dataset."""
    folder = tmp_path / "0000001"
    folder.mkdir()
    (folder / "prompt.json").write_text(
        json.dumps({"input": "a", "edit": "make it blue", "output": "b"})
    )
    for seed in (11, 12):
        make_image(RED).save(folder / f"{seed}_0.jpg")
        make_image(BLUE).save(folder / f"{seed}_1.jpg")
    (tmp_path / "seeds.json").write_text(json.dumps([["0000001", ["11", "12"]]]))
    pairs = load_edit_pairs(tmp_path)
    assert [(p.name, p.instruction) for p in pairs] == [
        ("0000001/11", "make it blue"),
        ("0000001/12", "make it blue"),
    ]
    before, after = read_colors(pairs[1])
    assert before[0] > 200 and after[2] > 200
    (folder / "prompt.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="fetch the dataset again"):
        load_edit_pairs(tmp_path)


def test_load_edit_pairs_reads_seed_data_edit(tmp_path):
    (tmp_path / "images").mkdir()
    make_image(RED).save(tmp_path / "images" / "1.png")
    make_image(BLUE).save(tmp_path / "images" / "2.png")
    row = {"source_image": "images/1.png", "target_image": "images/2.png", "instruction": "blue"}
    (tmp_path / "part1.jsonl").write_text(json.dumps(row) + "\n\n")
    (pair,) = load_edit_pairs(tmp_path)
    assert read_colors(pair) == (RED, BLUE) and pair.instruction == "blue"
    (tmp_path / "part2.jsonl").write_text('{"source_image": "x.png"}')
    with pytest.raises(
        InvalidArgumentError, match=r"part2\.jsonl', line 1: source_image and target_image expected"
    ):
        load_edit_pairs(tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        ("source_img", "target_img", "instruction"),
        ("original_image", "edited_image", "edit_prompt"),
    ],
)
@pytest.mark.parametrize("kind", ["saved", "split", "parquet"])
def test_load_edit_pairs_reads_hugging_face_datasets(tmp_path, columns, kind):
    """MagicBrush's columns, and those of InstructPix2Pix on the hub."""
    rows = Dataset.from_dict(
        {
            columns[0]: [make_image(RED)] * 3,
            columns[1]: [make_image(BLUE)] * 3,
            columns[2]: ["x"] * 3,
        }
    )
    if kind == "saved":
        rows.save_to_disk(str(tmp_path / "d"))
    elif kind == "split":
        DatasetDict({"train": rows, "dev": rows.select([0])}).save_to_disk(str(tmp_path / "d"))
    else:
        (tmp_path / "d" / "data").mkdir(parents=True)
        rows.to_parquet(str(tmp_path / "d" / "data" / "train-00000-of-00001.parquet"))
    pairs = load_edit_pairs(tmp_path / "d")
    assert len(pairs) == 3 and pairs[2].instruction == "x"
    assert read_colors(pairs[0]) == (RED, BLUE) and len(pairs[1:]) == 2
    if kind == "split":
        assert len(load_edit_pairs(tmp_path / "d", "dev")) == 1
        with pytest.raises(InvalidArgumentError, match="split 'test'"):
            load_edit_pairs(tmp_path / "d", "test")


def test_load_edit_pairs_refuses_dataset_without_images(tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(InvalidArgumentError, match="has the columns text; one of source_img"):
        load_edit_pairs(tmp_path / "d")

"""``data-builder people``: who is drawn, kept and written, and what is refused."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_builder.avatars.identity import Scene, sample_identity
from data_builder.avatars.rendering import render_portrait
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Recipe, read_plan
from data_builder.cli import app
from data_builder.people.config import PeopleConfig
from data_builder.people.draw_people import draw_people, summarize_people
from data_builder.people.draw_person import MAX_REFERENCES, draw_person
from data_builder.people.face_matcher import FaceMatcher, load_face_matcher
from data_builder.people.people_folder import PeopleFolder
from data_builder.people.person_prompt import sample_person_prompt
from data_builder.sources.sources import FolderSource
from hyperlora import pretrained
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.data.subjects import list_subjects
from hyperlora.encoders.face_analysis import FaceAnalyzer
from hyperlora.errors import InvalidArgumentError

FACE_PACK = str(pretrained.FACE_PACK_DIR)
CONFIG = PeopleConfig(base="tiny", images_per_person=4, face_pack=FACE_PACK)
EXPRESSIONS = ("smiling", "serious", "neutral", "laughing")


class PortraitKeeper:
    """Draws real portraits of an avatar for each reference.

    Args:
        num_strangers: Images of each person, the last ones, that show somebody else.
        num_blank: References, from the first, that show no face.
        max_references: References after which the process is killed.
    """

    scenes = EXPRESSIONS

    def __init__(
        self, num_strangers: int = 0, num_blank: int = 0, max_references: int = 1000
    ) -> None:
        self.num_strangers, self.num_blank = num_strangers, num_blank
        self.max_references, self.num_references = max_references, 0

    def make_prompt(self, noun: str, scene: str) -> str:
        return f"a portrait of sks person, {scene}"

    def draw_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        reference: Image.Image | None = None,
    ) -> list[Image.Image]:
        if reference is None:
            if self.num_references == self.max_references:
                raise KeyboardInterrupt
            self.num_references += 1
            self.number = seeds[0] % 1000
            if self.num_references <= self.num_blank:
                return [Image.new("RGB", (128, 128), "white")]
            return [render_portrait(sample_identity(self.number), Scene())]
        first_stranger = len(prompts) - self.num_strangers
        people = [self.number if i < first_stranger else self.number + 5000 + i for i in range(4)]
        return [
            render_portrait(sample_identity(person), Scene(expression=prompt.split(", ")[1]))
            for person, prompt in zip(people, prompts, strict=True)
        ]


@pytest.fixture(scope="module")
def matcher() -> FaceMatcher:
    return FaceMatcher(FaceAnalyzer(FACE_PACK))


def draw(folder: Path, count: int, keeper: Any, matcher: FaceMatcher, **options: Any) -> Any:
    return draw_people(folder, count, replace(CONFIG, **options), lambda: (keeper, matcher))


def read_files(folder: Path) -> dict[str, bytes]:
    """Images, captions, and lines without their seconds."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".png", ".txt", ".part")
    }
    for record in PeopleFolder(folder).read_records():
        files[record.person] = repr(replace(record, duration_s=0)).encode()
    return files


def test_people_depend_on_seed_and_number_alone(matcher: FaceMatcher, tmp_path: Path) -> None:
    draw(tmp_path / "few", 2, PortraitKeeper(), matcher)
    draw(tmp_path / "many", 3, PortraitKeeper(), matcher)
    few, many = read_files(tmp_path / "few"), read_files(tmp_path / "many")
    assert {**few, "sheet.png": b""}.items() <= {**many, "sheet.png": b""}.items()
    assert few["person-00000/0.png"] != few["person-00001/0.png"]
    other_seed = draw_person(1, replace(CONFIG, seed=1), PortraitKeeper(), matcher)
    assert (
        np.asarray(other_seed.images[0]).tobytes()
        != np.asarray(Image.open(tmp_path / "few/person-00001/0.png")).tobytes()
    )


def test_killed_run_continues_to_the_same_files(matcher: FaceMatcher, tmp_path: Path) -> None:
    draw(tmp_path / "whole", 4, PortraitKeeper(), matcher)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        draw(folder, 4, PortraitKeeper(max_references=2), matcher)
    # killed while a line was written, after the folder; and while a folder was written
    shutil.copytree(folder / "person-00000", folder / "person-00002")
    shutil.copytree(folder / "person-00000", folder / ".person-00003.part")
    with (folder / "people.jsonl").open("a") as file:
        file.write('{"person": "person-00002", "kept": tr')
    keeper = PortraitKeeper()
    summary = draw(folder, 4, keeper, matcher)
    assert keeper.num_references == 2 and summary.num_people == 4
    assert read_files(folder) == read_files(tmp_path / "whole")
    draw_people(folder, 4, CONFIG, lambda: pytest.fail("a finished folder loads no model"))


def test_images_of_strangers_are_dropped(matcher: FaceMatcher, tmp_path: Path) -> None:
    summary = draw(tmp_path, 3, PortraitKeeper(num_strangers=1), matcher, min_images=3)
    assert (summary.num_kept, summary.num_images, summary.num_agreeing) == (3, 12, 9)
    for record in PeopleFolder(tmp_path).read_records():
        assert [image.file for image in record.images] == ["1.png", "2.png", "3.png", None]
        assert record.images[3].reason == "similarity below 0.4"
        # the cosine is that of insightface's embeddings of the files
        faces = [
            matcher.analyzer.get_face(Image.open(tmp_path / record.person / f"{i}.png")).embedding
            for i in range(4)
        ]
        cosines = [float(faces[0] @ face) for face in faces[1:]]
        assert cosines == pytest.approx([i.similarity for i in record.images[:3]], abs=1e-3)


def test_people_with_too_few_images_are_dropped(matcher: FaceMatcher, tmp_path: Path) -> None:
    summary = draw(tmp_path, 2, PortraitKeeper(num_strangers=3), matcher)
    assert (summary.num_kept, summary.num_kept_images) == (0, 0)
    assert summary.reasons == {"too few images agree": 2}
    assert not list(tmp_path.glob("person-*")) and not (tmp_path / "sheet.png").exists()
    records = list(PeopleFolder(tmp_path).read_records())
    assert all(image.file is None and image.reason for r in records for image in r.images)
    assert summarize_people(records, CONFIG) == summary
    lenient = draw(tmp_path / "2", 2, PortraitKeeper(3), matcher, min_images=1)
    assert lenient.num_kept == 2


@pytest.mark.parametrize("num_blank", [MAX_REFERENCES - 1, MAX_REFERENCES])
def test_reference_without_face_is_drawn_again(matcher: FaceMatcher, num_blank: int) -> None:
    keeper = PortraitKeeper(num_blank=num_blank)
    record = draw_person(7, CONFIG, keeper, matcher).record
    assert keeper.num_references == record.num_references == MAX_REFERENCES
    assert record.kept == (num_blank < MAX_REFERENCES)
    assert record.reason == ("" if record.kept else "no face in the reference")


def test_plan_reads_people_and_captions(matcher: FaceMatcher, bundle: Any, tmp_path: Path) -> None:
    draw(tmp_path, 2, PortraitKeeper(num_strangers=1), matcher)
    (tmp_path / "build" / "audit").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "build" / "audit" / "0.png")
    with (tmp_path / "people.jsonl").open("a") as file:
        file.write(json.dumps({"person": "person-00002", "kept": False}) + "\n")
    plan = make_plan(FolderSource(str(tmp_path)), Recipe(str(bundle.base)))
    assert [row.subject for row in plan.rows] == ["person-00000", "person-00001"]
    assert not plan.skipped
    captions = [photo.caption for photo in plan.rows[0].photos]
    assert captions[1:] == [f"a portrait of {{}}, {scene}" for scene in EXPRESSIONS[:3]]
    assert captions[0].startswith("a portrait of {}, ") and "hair" not in captions[0]
    shutil.rmtree(tmp_path / "person-00001")
    reasons: list[str] = []
    assert len(list_subjects(tmp_path, reasons)) == 1
    assert reasons == ["1 people of people.jsonl have no folder (person-00001)"]


def run_people(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["people", *map(str, arguments)])


@pytest.mark.slow
def test_fit_gives_a_dataset_of_loras(matcher: FaceMatcher, bundle: Any, tmp_path: Path) -> None:
    draw(tmp_path, 1, PortraitKeeper(), matcher, base=str(bundle.base))
    options = ("--base", bundle.base, "--face-pack", FACE_PACK, "--images-per-person", 4)
    result = run_people("-o", tmp_path, "--count", 1, *options, "--fit")
    assert result.exit_code == 0, result.output
    assert "people kept" in result.stdout and "1 of 1" in result.stdout
    dataset = LoraDataset(tmp_path / "build")
    assert [record.subject for record in dataset.records] == ["person-00000"]
    assert dataset[0].isfinite().all() and dataset[0].count_nonzero() > 1000
    # as `plan` and `run` by hand
    other_plan = ["plan", str(tmp_path), "-o", str(tmp_path / "2"), "--base", str(bundle.base)]
    assert CliRunner().invoke(app, other_plan).exit_code == 0
    assert read_plan(tmp_path / "2") == read_plan(tmp_path / "build")


def test_people_refuses_invalid_arguments(bundle: Any, tmp_path: Path) -> None:
    output, empty = tmp_path / "people", tmp_path / "empty.txt"
    empty.write_text("\n \n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "me.txt").write_text("mine")
    base, pack = ("--base", bundle.base), ("--face-pack", FACE_PACK)
    detector_only = tmp_path / "detector"
    detector_only.mkdir()
    shutil.copy(Path(FACE_PACK) / "rec_avatars.onnx", detector_only)
    for arguments, message in (
        (base, "no face pack for the faces of base"),
        ((*base, *pack), "base 'avatars/base'"),  # the bundled model is for the bundled base
        (("--base", bundle.edit_base, *pack), "generates none from a prompt alone"),
        ((*base, *pack, "--min-images", 9), "--min-images from 1 to --images-per-person 8"),
        ((*base, *pack, "--model", "a", "--ip-adapter", "b"), "give one of them"),
        ((*base, *pack, "--ip-adapter", tmp_path / "x"), "there is no IP-Adapter"),
        ((*base, "--prompts", empty), "holds no line"),
        ((*base, "--scenes", tmp_path / "nowhere.txt"), "cannot be read"),
        ((*base, "--face-pack", detector_only), "has no detector"),
    ):
        result = run_people("-o", output, "--count", 1, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr and result.stderr.count("error: ") == 1, result.stderr
        assert not output.exists()
    used = run_people("-o", tmp_path / "used", "--count", 1, *base, *pack, "--model", bundle.model)
    assert used.exit_code == 2 and "holds files of something else" in used.stderr
    assert run_people("-o", output, "--count", 0).exit_code == 2
    with pytest.raises(InvalidArgumentError, match="--count of at least 1"):
        draw_people(output, 0, CONFIG, lambda: pytest.fail("loads a model"))


def test_base_without_faces_and_changed_settings_are_refused(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["-o", tmp_path, "--base", bundle.base, "--model", bundle.model]
    options += ["--face-pack", FACE_PACK, "--steps", 1, "--count", 2]
    result = run_people(*options)
    assert result.exit_code == 2
    assert "none of 2 people was kept (2 with no face in the reference)" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", "people.jsonl", "settings.json"}
    for changed, message in (
        (["--seed", 1], "was begun with --seed 0, not 1"),
        (["--steps", 2], "was begun with --steps 1, not 2"),
        (["--guidance-scale", 2], "was begun with --guidance-scale its default, not 2.0"),
        (["--images-per-person", 6], "was begun with --images-per-person 8, not 6"),
    ):
        result = run_people(*options, *changed)
        assert result.exit_code == 2 and message in result.stderr, result.output
    monkeypatch.chdir(bundle.base.parent)  # the same base by another path
    assert "none of 2 people" in run_people(*options, "--base", "base").stderr
    scenes = tmp_path.parent / "scenes.txt"
    scenes.write_text("in a park\n")
    assert "was begun with other --scenes" in run_people(*options, "--scenes", scenes).stderr


@pytest.mark.slow
def test_avatars_are_invented_by_the_bundle(tmp_path: Path) -> None:
    options = ["--images-per-person", 2, "--min-images", 1, "--steps", 8, "--min-similarity", -1]
    base = ["--base", pretrained.BASE_DIR]
    result = run_people("-o", tmp_path, "--count", 1, *base, *options)
    assert result.exit_code == 0, result.output
    (record,) = PeopleFolder(tmp_path).read_records()
    assert "haircut" in record.prompt and "sks person" in record.images[0].prompt
    assert Image.open(tmp_path / "person-00000" / "0.png").size == (128, 128)
    assert (tmp_path / "sheet.png").stat().st_size > 5000


def test_prompts_know_the_words_of_the_base() -> None:
    avatar = sample_person_prompt(3, 5, is_avatar=True)
    person = sample_person_prompt(3, 5, is_avatar=False)
    assert "haircut" in avatar.prompt and "-year-old" in person.prompt
    assert person.noun in person.prompt and person.noun not in person.caption
    assert len({sample_person_prompt(3, k, is_avatar=False).prompt for k in range(50)}) > 45
    with pytest.raises(InvalidArgumentError, match="--face-pack"):
        load_face_matcher("stable-diffusion-v1-5/stable-diffusion-v1-5", None)

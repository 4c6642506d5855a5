"""Run LoRAs of unseen subjects over the benchmark's prompts and score what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from hyperlora.data.images import pixels_of
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.text_to_image import render
from hyperlora.encoders.attribute_classifier import Reader, read_in_batches
from hyperlora.errors import BadRequest
from hyperlora.evaluation.benchmark import Benchmark
from hyperlora.evaluation.metrics import IdentityScale, Score, attribute_scores, prompt_score
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


@dataclass(frozen=True)
class Row:
    """One line of the table; ``images`` [subject][prompt], ``seconds`` per LoRA; ``attributes`` is the prompt score of
    each prompted attribute alone."""

    name: str
    identity: Score
    prompt: Score | None
    seconds: float | None = None
    images: Sequence[Sequence[Image.Image]] = field(default=(), repr=False)
    attributes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """A benchmark, the base it is rendered on and the evaluator that scores."""

    base: Base
    reader: Reader
    benchmark: Benchmark
    steps: int = 20
    guidance: float = 3.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Raise ``BadRequest`` if the benchmark asks for what the evaluator cannot read."""
        known = self.reader.attributes
        for prompt in self.benchmark.prompts:
            if odd := [(k, v) for k, v in prompt.truth.items() if v not in known.get(k, ())]:
                raise BadRequest(
                    f"the truth {odd[0][0]} = {odd[0][1]!r} of prompt {prompt.prompt!r} is unknown to the evaluator: "
                    f"correct prompts.json or give another --evaluator"
                )

    @cached_property
    def scale(self) -> IdentityScale:
        """Of the benchmark's real photos."""
        others = self.benchmark.others
        reading = read_in_batches(self.reader, others.flatten(0, 1))
        return IdentityScale.of(reading.identity.unflatten(0, others.shape[:2]))

    def row(self, name: str, loras: LoraWeights | None, seconds: float | None = None) -> Row:
        """Render every prompt for every subject (the same seeds in every row) and score. ``loras`` has one LoRA per
        subject, or no batch axis (one for all), or is None (the base)."""
        subjects, prompts = len(self.benchmark.names), self.benchmark.prompts
        jobs = [(s, p) for s in range(subjects) for p in range(len(prompts))]
        images: list[Image.Image] = []
        chunks = [jobs[i : i + self.batch_size] for i in range(0, len(jobs), self.batch_size)]
        for chunk in track(chunks, name, "images", len(jobs), self.batch_size):
            lora = loras[[s for s, _ in chunk]] if loras is not None and loras.batch else loras
            images += render(
                self.base, [prompts[p].prompt for _, p in chunk], lora,
                seeds=[1000 + len(prompts) * s + p for s, p in chunk], steps=self.steps, guidance=self.guidance,
            )  # fmt: skip
        return self.scored(name, images, seconds)

    def scored(self, name: str, images: Sequence[Image.Image], seconds: float | None = None) -> Row:
        """Score pictures in subject-major order."""
        subjects, n = len(self.benchmark.names), len(self.benchmark.prompts)
        reading = read_in_batches(self.reader, pixels_of(images))
        identity = self.scale.score(reading.identity.unflatten(0, (subjects, n)))
        prompt, attributes = None, {}
        if self.benchmark.has_truth:
            truths: list[Mapping[str, str]] = [p.truth for p in self.benchmark.prompts] * subjects
            prompt = Score.of(prompt_score(self.reader, reading, truths).view(subjects, n).mean(1))
            attributes = attribute_scores(self.reader, reading, truths)
        grid = [list(images[i * n : (i + 1) * n]) for i in range(subjects)]
        return Row(name, Score.of(identity), prompt, seconds, grid, attributes)

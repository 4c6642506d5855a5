"""Builds and folders of photos on a Ray cluster of two nodes, one of which dies."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from data_builder.build.chunk_store import ChunkStore  # noqa: E402
from data_builder.build.make_plan import make_plan  # noqa: E402
from data_builder.build.plan import Recipe, write_plan  # noqa: E402
from data_builder.build.run import run_build  # noqa: E402
from data_builder.build.run_ray import run_build_on_ray  # noqa: E402
from data_builder.sources.sources import AvatarSource  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray_cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": 200_000_000,
                "include_dashboard": False,
            },
        )
        ray.init(address=ray_cluster.address, log_to_driver=False)
        yield ray_cluster
        ray.shutdown()
        ray_cluster.shutdown()


def test_run_build_on_ray_survives_a_dead_node(bundle: Any, cluster: Any, tmp_path: Path) -> None:
    recipe = Recipe(
        str(bundle.base),
        preset="attention",
        rank=2,
        finetune_steps=20,
        subjects_per_batch=1,
        eval_every=10,
    )
    plan = make_plan(AvatarSource(0, 12, portraits_per_identity=2, resolution=16), recipe)
    for name in ("here", "there"):
        write_plan(plan, tmp_path / name)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # as a Ray worker of one CPU computes: sums in another order round otherwise
    try:
        run_build(tmp_path / "here")
    finally:
        torch.set_num_threads(threads)
    second_node = cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
    store, finished_at_kill = ChunkStore(plan, tmp_path / "there"), list[int]()

    def kill_after_first_chunk() -> None:
        while not store.list_finished_chunks():
            time.sleep(0.01)
        cluster.remove_node(second_node, allow_graceful=False)
        finished_at_kill.append(len(store.list_finished_chunks()))

    killer = threading.Thread(target=kill_after_first_chunk)
    killer.start()
    assert run_build_on_ray(tmp_path / "there") == 12
    killer.join()
    assert 0 < finished_at_kill[0] < plan.num_chunks
    for number in range(plan.num_chunks):
        assert (
            store.get_path(number).read_bytes()
            == ChunkStore(plan, tmp_path / "here").get_path(number).read_bytes()
        )
    lines = (tmp_path / "there" / "log.jsonl").read_text().splitlines()
    assert len(lines) == plan.num_chunks, "every chunk was written once"
    assert run_build_on_ray(tmp_path / "there") == 0


def test_generate_folder_on_ray_equals_local(bundle: Any, cluster: Any, tmp_path: Path) -> None:
    from hyperlora.errors import InvalidArgumentError
    from hyperlora.lora.io.load import load_lora
    from hyperlora.pipelines.generate import GenerationConfig
    from hyperlora.pipelines.generate_folder import generate_folder
    from hyperlora.pipelines.generate_ray import make_ray_batch_generator
    from hyperlora.pipelines.image_to_lora import ImageToLora

    model, config = ImageToLora.from_pretrained(bundle.model), GenerationConfig()
    here = generate_folder(model, bundle.subjects, tmp_path / "here", config, batch_size=2)
    wrong_generator = make_ray_batch_generator(
        "local", str(bundle.model), None, config, {"device": "gpu"}
    )
    with pytest.raises(InvalidArgumentError, match="unknown device 'gpu'"):
        generate_folder(
            model, bundle.subjects, tmp_path / "no", config, batch_generator=wrong_generator
        )
    batch_generator = make_ray_batch_generator("local", str(bundle.model), None, config)
    there = generate_folder(
        model,
        bundle.subjects,
        tmp_path / "there",
        config,
        batch_size=2,
        batch_generator=batch_generator,
    )
    assert sorted(m.subject for m in there) == sorted(m.subject for m in here) and all(
        m.config_hash for m in there
    )
    for record in here:
        local, remote = (
            load_lora(tmp_path / name / str(record.file)).weights.flatten()
            for name in ("here", "there")
        )
        assert (local - remote).abs().max() < 1e-6
    assert (
        generate_folder(
            model, bundle.subjects, tmp_path / "there", config, batch_generator=batch_generator
        )
        == there
    )

"""The plan's arithmetic, the probes that feed it, and both against small real runs."""

import pytest
from typer.testing import CliRunner

import cli
from la.data.coco import find_splits, load_coco
from la.errors import InputError
from pipelines.bench.cost import Cluster, Job, Rates, bytes_per_image, images_per_step, job_of, store_bytes
from pipelines.bench.rates import (
    feature_shape,
    made_up_store,
    measure_featurizing,
    measure_reading,
    measure_training,
    photos_drawn,
)
from pipelines.config import PAPER_BATCHES, FeaturizeConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.episodes.episode_shards import ensure_episodes, training_plan
from pipelines.store.reader import FeatureStore
from pipelines.training.run import train
from pipelines.workspace import Workspace
from tests.conftest import TINY
from tools.plan_check.rehearsal import Compared, check_workspace, rehearse

FEATURES = bytes_per_image((30, 30), 768, "float16")
COCO = store_bytes(123_287, FEATURES)
SMALL = ((2, 1, 1), (1, 2, 1))
PHOTOS = images_per_step(PAPER_BATCHES)


def cluster(store: int = 10**9, read_mb: float = 1000, **other) -> Cluster:
    return Cluster(FEATURES, store, read_mb, **other)


def steps(count: int = 1000, step_seconds: float = 0.1, evaluating: float = 0.0) -> Job:
    return Job(count * step_seconds, count * PHOTOS, beside=0.0, evaluating=evaluating)


def test_bytes_are_those_of_coco_at_the_papers_setting():
    assert FEATURES == 30 * 30 * 768 * 2 == 1_382_400
    assert bytes_per_image((30, 30), 768, "int8") == 30 * 30 * (768 + 2)
    assert pytest.approx(170.7e9, rel=1e-3) == COCO
    assert bytes_per_image((30, 30), 768, "int8") <= 0.52 * FEATURES


def test_a_step_reads_queries_and_supports_of_the_mean_batch():
    assert images_per_step(((16, 1, 1),)) == 32
    assert images_per_step(PAPER_BATCHES) == (20 + 18 + 24 + 20 + 20 + 32) / 6


def test_memory_that_holds_the_store_leaves_compute_as_the_bottleneck():
    stage = cluster(store_bytes(10_000, FEATURES), read_mb=1).train("x", [steps()])
    assert stage.bottleneck == "compute"
    assert stage.hours * 3600 == pytest.approx(100)


def test_a_store_larger_than_memory_waits_for_the_disk():
    stage = cluster(COCO, read_mb=100, workers=8, nodes=2).train("x", [steps()])
    missed = PHOTOS * FEATURES * (1 - 0.8 * 64e9 / COCO)
    assert stage.hours * 3600 == pytest.approx(1000 * 4 * missed / 100e6)
    assert stage.bottleneck.startswith("disk: 64 GB of memory cache 30 %")
    twice = cluster(COCO, read_mb=200, workers=8, nodes=2).train("x", [steps()])
    assert twice.hours == pytest.approx(stage.hours / 2)


def test_the_rate_of_a_node_is_what_its_workers_take_together():
    stage = cluster(read_mb=1e5, workers=8, nodes=2).train("x", [steps(step_seconds=0.05)])
    assert stage.read_mb == pytest.approx(4 * PHOTOS * FEATURES / 0.05 / 1e6)


def test_featurizing_is_bound_by_compute_or_by_writing():
    assert cluster(workers=4).featurize(3600, 0.25).hours == pytest.approx(1.0)
    fast = cluster(workers=4).featurize(3600, 1e6)
    assert fast.hours * 3600 == pytest.approx(3600 * FEATURES / 1e9)
    assert fast.bottleneck.startswith("disk")


def test_a_sweep_is_shared_out_and_no_faster_than_its_longest_trial():
    trials = [steps(), steps(), steps(2000)]
    assert cluster(workers=2).train("x", trials, at_once=2).hours * 3600 == pytest.approx(200)
    assert cluster(workers=3).train("x", trials, at_once=3).hours * 3600 == pytest.approx(200)
    assert cluster().train("x", trials).hours * 3600 == pytest.approx(400)
    stage = cluster().train("x", [job._replace(evaluating=500) for job in trials])
    assert stage.hours * 3600 == pytest.approx(400 + 3 * 500)
    assert "evaluation" in stage.bottleneck


def test_a_job_draws_validates_and_evaluates_beside_its_steps():
    config = TrainConfig(workspace="x", batches=SMALL, steps=600, val_every=250, val_episodes=100, train_batches=200)
    job = job_of(config, Rates(step=0.1, photo=0.25, draw=0.01), photos=3, tested=80)
    assert job.steps == pytest.approx(60)
    assert job.photos == 1800
    # 200 batches of 1.5 episodes drawn, and three validations of two photos an episode: at 250, 500 and the end
    assert job.beside == pytest.approx(300 * 0.01 + 3 * 100 * 2 * 0.25)
    assert job.evaluating == pytest.approx(80 * 0.25)
    assert job_of(config, Rates(0.1, 0.25), 3).evaluating == 0


def test_shapes_are_known_without_weights():
    assert feature_shape("vit_base_patch16_224.mae", 480) == ((30, 30), 768)
    assert feature_shape("vit_small_patch14_dinov2", 420) == ((30, 30), 384)
    with pytest.raises(InputError, match="not a multiple of 16"):
        feature_shape("vit_base_patch16_224.mae", 470)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return made_up_store(tmp_path_factory.mktemp("made-up"), TINY["backbone"], TINY["image_size"])


def config_of(workspace, **other) -> TrainConfig:
    return TrainConfig(workspace=workspace, preset="debug", batches=SMALL, threads=1, **other)


def test_a_made_up_store_is_a_store_whose_steps_read_what_the_plan_counts(made_up):
    store = FeatureStore(Workspace(made_up).find_store())
    assert list(store.verify()) == sorted(store.info.shards)
    batches = ((2, 1, 5), (1, 4, 2))
    shards = ensure_episodes(training_plan(TrainConfig(workspace=made_up, batches=batches, train_batches=20)), store)
    for group, (_, ways, shots) in enumerate(batches):
        for episode in (e for place in range(10) for e in shards.batch(group, place)):
            assert len(episode.supports) == ways * shots


def test_photos_of_a_step_are_counted_on_the_annotations(made_up, tmp_path):
    enough = FeatureStore(Workspace(made_up).find_store()).dataset("train")
    assert photos_drawn(config_of(made_up), enough) == images_per_step(SMALL)
    few = draw_scenes(tmp_path, train_images=40, val_images=1)
    file = find_splits(few)["train"][0]
    wanted = TrainConfig(workspace=made_up, batches=((2, 1, 1), (1, 1, 100)))
    photos = photos_drawn(wanted, load_coco(file, None, "train"))
    assert 3 < photos < (4 + 40) / 2  # of forty photos one is the query


def test_the_probes_measure_positive_rates(made_up, tmp_path):
    whole = measure_training(config_of(made_up))
    assert min(whole) > 0
    few = measure_training(config_of(made_up, seed=1), images_per_step(SMALL) / 1000)
    assert few.step < whole.step / 10  # a step goes with its photos
    assert measure_featurizing(tmp_path, TINY["backbone"], TINY["image_size"], threads=1) > 0
    assert measure_reading(tmp_path) > 1


def test_verify_and_check_hold_the_plan_against_runs(tmp_path, tiny_weights):
    scenes = draw_scenes(tmp_path / "scenes", train_images=80, val_images=40)
    featurizing = FeaturizeConfig(workspace=tmp_path, coco_dir=scenes, weights=tiny_weights, threads=1, **TINY)
    short = config_of(tmp_path, steps=30, val_every=30, val_episodes=5)
    found = {one.name: one for one in rehearse(featurizing, short, photos=120)}
    assert set(found) == {"disk", "featurize", "photos read a step", "train", "evaluate"}
    assert abs(found["disk"].error) < 10
    assert all(one.predicted > 0 and one.measured > 0 for one in found.values())

    with pytest.raises(InputError, match="holds no features"):
        check_workspace(tmp_path / "empty")
    from pipelines.store.featurize import featurize

    featurize(featurizing)
    with pytest.raises(InputError, match="no finished training"):
        check_workspace(tmp_path)
    train(short)
    found = {one.name: one for one in check_workspace(tmp_path)}
    assert found["training steps"].measured > 0
    assert abs(found["disk"].error) < 10


def test_the_error_is_in_percent_of_what_was_measured():
    assert Compared("x", 75, 100, "s").error == pytest.approx(-25)


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["plan", *arguments], env={"COLUMNS": "140"})


def test_plan_prints_sizes_stages_and_the_bottleneck():
    rates = ("--featurize-rate", "300", "--steps-per-second", "20", "--read-mb-per-second", "500", "--ram-gb", "64")
    result = run("--workers", "8", *rates)
    assert result.exit_code == 0, result.output
    assert "170.7 GB" in result.output
    assert "22.3 photos, 31 MB" in result.output
    assert "64 GB of memory cache 30 %" in result.output
    half = run("--workers", "8", "--dtype", "int8", *rates)
    assert "85.7 GB" in half.output


def test_the_sweep_is_planned_with_its_own_recipe_whatever_preset_is_trained():
    rates = ("--featurize-rate", "300", "--steps-per-second", "20", "--read-mb-per-second", "500", "--ram-gb", "999")
    paper, hybrid = (run("--preset", preset, *rates).output.splitlines() for preset in ("paper", "hybrid"))
    swept = [next(line for line in lines if "sweep ablations" in line) for lines in (paper, hybrid)]
    assert swept[0] == swept[1]


def test_plan_counts_the_photos_of_a_folder(tmp_path):
    scenes = draw_scenes(tmp_path, train_images=50, val_images=10)
    rates = ("--featurize-rate", "300", "--steps-per-second", "20", "--read-mb-per-second", "500")
    result = run("--coco-dir", str(scenes), *rates)
    assert result.exit_code == 0, result.output
    assert "store of 60 photos" in result.output
    assert "a worker reads in a training step" in result.output
    assert "22.3 photos" not in result.output  # a class has too few for the recipe's shots
    other = run("--coco-dir", str(scenes), "--photos", "1000", *rates)
    assert "store of 1000 photos" in other.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--nodes", "3", "--read-mb-per-second", "1"), "--workers is 1"),
        (("--image-size", "470"), "multiple of 16"),
    ],
)
def test_mistakes_are_told(arguments, told):
    result = run(*arguments)
    assert result.exit_code == 2
    assert told in result.output

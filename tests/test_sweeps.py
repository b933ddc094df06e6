import errno
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_sweep import STEPS, fake_config, fake_evaluate, fake_store, fake_train
from pycocotools import mask as rle_tools
from rich.console import Console

from la.data.coco import Annotation, Dataset, Image
from la.errors import InputError, TooFewImages
from la.predictor.checkpoint import DEMO_CHECKPOINT
from pipelines.bench.random_store import made_up_features
from pipelines.config import TrialPlacement
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import EpisodePlan, pool_of
from pipelines.runs.identity import run_dir_of
from pipelines.store.reader import FeatureStore
from pipelines.tracking.mlflow_runs import Tracker, TrackingError
from pipelines.workspace import Workspace, locked
from sweeps import runner
from sweeps.display import SweepDisplay
from sweeps.paper_tables import paired_difference, tables_of
from sweeps.plan import plan_sweep
from sweeps.records import SweepRuns, over_folds
from sweeps.results import SweepResult, read_result
from sweeps.runner import trial_resources
from sweeps.study import BUILT_IN, FOLDER, Study, find_study
from sweeps.trial import run_trial

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")


def ignore(_):
    pass


def finish(job):
    return run_trial(job, ignore, fake_train, fake_evaluate)


def opened(tracker, plan, config):
    return SweepRuns(tracker, config.study, plan, config.train)


def outcome(config, plan, results, failed):
    return SweepResult(config, plan.name, plan.folder, plan.study, plan.variants, results, failed, False)


@pytest.fixture(autouse=True)
def own_database(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_variant_changes_what_it_names_and_nothing_else(tmp_path):
    jobs = {job.variant.name: job for job in plan_sweep(fake_config(tmp_path, variants=None)).jobs}
    for variant in find_study("ablations").variants:
        if variant.trained:
            of_kind = jobs["hybrid" if variant.name.startswith("hybrid") else "complete"].train
            assert jobs[variant.name].train.model_dump() == of_kind.model_dump() | variant.settings
    assert jobs["prototype"].train is None
    tasks = {name: [(c.fold, c.ways, c.shots, c.prompt) for c in job.evaluations] for name, job in jobs.items()}
    assert all(each == tasks["complete"] for each in tasks.values())
    assert len(tasks["complete"]) == 8


def test_what_changes_a_result_makes_another_sweep_and_nothing_else_does(tmp_path):
    name = plan_sweep(fake_config(tmp_path)).name
    key = fake_store(tmp_path)
    for same in ({"concurrent": 4}, {"threads": 2}, {"gpus": 0.5}, {"device": "cpu"}, {"store": key}):
        assert plan_sweep(fake_config(tmp_path, **same)).name == name
    for other in ({"folds": (1,)}, {"train": {"steps": 31}}, {"episodes": 5}, {"prompts": ("mask",)}):
        assert plan_sweep(fake_config(tmp_path, **other)).name != name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("complete", "no_such")}, "no_such.*Choose from complete"),
        ({"folds": (4,)}, "--folds holds 4"),
        ({"ways": (1, 1)}, "--ways names a value twice"),
        ({"train": {"leraning_rate": 1}}, "'leraning_rate' is not known"),
        ({"train": {"token_pool": False}}, "'token_pool' is set by the sweep"),
        ({"train": {"fold": 1}}, "'fold' is set by the sweep"),
        ({"train": {"lr": -1}}, "'lr' is -1"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        plan_sweep(fake_config(tmp_path, **changes))


def test_a_sweep_has_one_driver(tmp_path):
    with locked(tmp_path, wait=False), pytest.raises(InputError, match="already running"), locked(tmp_path, wait=False):
        pass
    with locked(tmp_path, wait=False):
        pass


@pytest.mark.parametrize("wait", [True, False])
def test_a_file_system_without_locks_is_told_as_such(tmp_path, monkeypatch, wait):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    told = pytest.raises(InputError, match=r"cannot be locked \(No locks available\).* another file system")
    with told, locked(tmp_path, wait):
        pass


def test_a_killed_trial_keeps_its_evaluations(tmp_path):
    job = plan_sweep(fake_config(tmp_path)).jobs[0]
    calls = []

    def dies_at_the_third(config, on_progress):
        calls.append(config)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return fake_evaluate(config, on_progress)

    with pytest.raises(RuntimeError, match="killed"):
        run_trial(job, ignore, fake_train, dies_at_the_third)
    assert [len(read_result(job.file).scores), read_result(job.file).finished] == [2, False]
    result = run_trial(job, ignore, fake_train, dies_at_the_third)
    assert len(calls) == 3 + 6
    assert result.finished
    assert read_result(job.file).model_dump_json() == result.model_dump_json()
    assert {c.checkpoint for c in calls} == {result.checkpoint}


def test_scores_of_an_earlier_checkpoint_are_thrown_away(tmp_path):
    job = plan_sweep(fake_config(tmp_path)).jobs[0]
    finish(job)

    def trained_further(config, on_report):
        return SimpleNamespace(**vars(fake_train(config, on_report)) | {"step": STEPS + 10})

    calls = []
    run_trial(job, ignore, trained_further, lambda *a: calls.append(a) or fake_evaluate(*a))
    assert len(calls) == 8


def test_a_task_without_images_enough_does_not_lose_the_others(tmp_path):
    config = fake_config(tmp_path)
    plan = plan_sweep(config)

    def evaluate(config, on_progress):
        if config.ways == 2:
            raise TooFewImages("2-way needs 2 classes; 1 has them")
        return fake_evaluate(config, on_progress)

    result = run_trial(plan.jobs[0], ignore, fake_train, evaluate)
    assert result.finished
    assert {s.ways for s in result.scores} == {1}
    assert result.impossible["2-way 1-shot mask"] == "2-way needs 2 classes; 1 has them"
    five, _ = tables_of(outcome(config, plan, {plan.jobs[0].name: result}, {}))
    assert five.rows[0][4] == "too few images"


def test_a_given_learning_rate_wins_over_a_variants_own(tmp_path):
    def rates(**train):
        jobs = plan_sweep(fake_config(tmp_path, study="folds", variants=None, folds=(0,), train=train)).jobs
        return {job.variant.name: job.train.lr for job in jobs if job.train}

    assert rates() == {"complete": 3e-4, "official": 1e-4, "hybrid": 3e-3}
    assert rates(lr=7e-6) == {"complete": 7e-6, "official": 7e-6, "hybrid": 7e-6}
    assert rates(recipe="official") == {"complete": 5e-5, "official": 5e-5, "hybrid": 5e-5}


def test_the_hybrid_without_each_ingredient_has_a_table_of_its_own(tmp_path):
    config = fake_config(tmp_path, variants=("hybrid", "hybrid_no_metric", "prototype"))
    plan = plan_sweep(config)
    first, second, prompts = tables_of(outcome(config, plan, {job.name: finish(job) for job in plan.jobs}, {}))
    assert [row[0] for row in first.rows] == ["prototype (no training)"]
    assert [row[0] for row in second.rows] == ["LA, hybrid preset", "w/o object metric"]
    assert prompts.rows[0][0] == "hybrid: masks"


STUDY = """
about = "two settings, two values, two seeds"
folds = [0, 1]
train_seeds = [0, 1]
baseline = "lr=0.1-loss=focal"
ways = [1]
[train]
steps = 30
[grid]
lr = [0.1, 0.2]
loss = ["focal", "iou"]
"""


def test_a_study_of_ones_own_has_means_over_seeds_and_paired_differences(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(STUDY)
    study = find_study(str(file))
    config = fake_config(tmp_path, study=str(file), variants=None, train={"gamma": 1.0}, **study.evaluation())
    plan = plan_sweep(config)
    assert len(plan.jobs) == 2 * 2 * 2 * 2
    assert {(j.train.lr, j.train.loss, j.train.fold, j.train.seed) for j in plan.jobs} == set(
        itertools.product((0.1, 0.2), ("focal", "iou"), (0, 1), (0, 1))
    )
    assert {(j.train.gamma, j.train.steps) for j in plan.jobs} == {(1.0, 30)}
    assert plan.jobs[1].name == "lr=0.1-loss=focal/fold0/seed1"

    def evaluate(config, on_progress):
        """Better by the learning rate, worse by the seed of training."""
        gain = 10 * rates[config.checkpoint.parent.name][0] + rates[config.checkpoint.parent.name][1]
        plain = fake_evaluate(config, on_progress)
        shifted = {"miou": plain.miou + gain, "resampled": tuple(each + gain for each in plain.resampled)}
        return SimpleNamespace(**vars(plain) | shifted)

    rates = {run_dir_of(j.train).name: (j.train.lr, j.train.seed) for j in plan.jobs}
    results = {j.name: run_trial(j, ignore, fake_train, evaluate) for j in plan.jobs}
    first, differences = tables_of(outcome(config, plan, results, {}))
    # folds 25 and 26, seeds 0 and 1 better by one point, a rate of 0.1 by one more
    assert first.rows[0][:2] == ("lr=0.1, loss=focal", f"{25.5 + 0.5 + 1:.1f} ± {0.5**0.5:.1f}")
    assert "± over seeds of training" in first.notes[0]
    assert [row[0] for row in differences.rows] == ["lr=0.1, loss=iou", "lr=0.2, loss=focal", "lr=0.2, loss=iou"]
    assert differences.rows[0][1] == "+0.0 [+0.0, +0.0]"
    assert differences.rows[1][1] == "+1.0 [+1.0, +1.0]"
    three = outcome(config, plan, {n: r for n, r in results.items() if n != plan.jobs[0].name}, {})
    assert tables_of(three)[0].rows[0][1].endswith("(seeds missing)")
    paired = paired_difference(three, "lr=0.2-loss=iou", "lr=0.1-loss=focal", (1, 1, "mask"))
    assert paired == pytest.approx((1, 1, 1)), "the seed that both have"


def test_a_method_without_training_is_compared_with_every_seed(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'train_seeds = [0, 1]\nbaseline = "a"\n[variants.a-b]\n[variants.a]\n[variants.p]\nmethod = "prototype"\n'
    )
    study = find_study(str(file))
    config = fake_config(tmp_path, study=str(file), variants=None, **study.evaluation())
    plan = plan_sweep(config)
    assert study.baseline_of(plan.variants).name == "a"

    def evaluate(config, on_progress):
        """Of the second seed two points better."""
        gain = 2.0 * ("seed1" in str(config.checkpoint))
        plain = fake_evaluate(config, on_progress)
        shifted = {"miou": plain.miou + gain, "resampled": tuple(each + gain for each in plain.resampled)}
        return SimpleNamespace(**vars(plain) | shifted)

    results = {j.name: run_trial(j, ignore, fake_train, evaluate) for j in plan.jobs}
    result = outcome(config, plan, results, {})
    assert paired_difference(result, "p", "a", (1, 1, "mask"))[0] == pytest.approx(-1)
    assert paired_difference(result, "a", "p", (1, 1, "mask"))[0] == pytest.approx(1)
    assert "±" not in tables_of(result)[0].rows[2][1], "it has no deviation over seeds of training"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss = [", "is not a study"),
        ("learning_rate = [1]", "'learning_rate' is not a setting of training. Nearest: "),
        ("fold = [1]", "'fold' is not a setting of training"),
        ("gamma = [1, 1.0]", "a value stands twice in the grid"),
        ("gamma = []", "it has no variants"),
        ('[variants.a]\nmethod = "no_such"', "'no_such' is none of la, prototype"),
        ('[variants."a/b"]', "cannot be the name of a file"),
        ("[space]\ngamma = [1, 2]", "is a search: of one fold"),
        ('[[tables]]\nname = "../a"', "it has a folder in it"),
        ('[[tables]]\nname = "a"\nvariants = ["x"]', "x is not among the variants"),
    ],
)
def test_what_is_wrong_in_a_study_is_told(tmp_path, change, message):
    file = tmp_path / "mine.toml"
    file.write_text(STUDY + change)
    with pytest.raises(InputError, match=message):
        find_study(str(file))


def test_every_value_of_a_grid_has_a_name_of_its_own():
    study = Study(name="mine", grid={"lr": [0.12345678, 0.12345679], "init": ["/a/best.pt", "demo"]})
    assert [v.name for v in study.all_variants()][:2] == ["lr=0.12345678-init=+a+best.pt", "lr=0.12345678-init=demo"]
    assert study.all_variants()[0].settings["init"] == "/a/best.pt"


def test_a_study_in_python_is_that_of_the_file(tmp_path):
    (tmp_path / "broken.py").write_text("def study():\n    return variants")
    with pytest.raises(InputError, match="NameError: name 'variants' is not defined"):
        find_study(str(tmp_path / "broken.py"))
    (tmp_path / "mine.toml").write_text(STUDY)
    (tmp_path / "mine.py").write_text(f"import tomllib\ndef study():\n    return tomllib.loads({STUDY!r})\n")
    assert find_study(str(tmp_path / "mine.py")) == find_study(str(tmp_path / "mine.toml"))


def test_a_sweep_does_not_mix_codes_unless_told_to(tmp_path, monkeypatch):
    plan = plan_sweep(fake_config(tmp_path, variants=("complete", "no_mixer")))
    jobs = {job.name: job for job in plan.jobs}

    def of_code(code):
        return lambda *a: SimpleNamespace(**vars(fake_train(*a)) | {"code": code})

    now = runner.code_now().digest
    for job, code in zip(plan.jobs, ("0ld", now), strict=True):
        run_trial(job, ignore, of_code(code), fake_evaluate)
    with pytest.raises(InputError, match=rf"1 of 2 trials were trained by code 0ld, the code is now {now}.*--again"):
        runner.settle_codes(jobs, "ask")
    kept = runner.settle_codes(jobs, "keep")
    assert kept.keys() == jobs.keys()
    notes = tables_of(outcome(fake_config(tmp_path), plan, kept, {}))[0].notes
    assert "trained by code 0ld: complete/fold0" in notes
    assert runner.settle_codes(jobs, "again").keys() == {"no_mixer/fold0"}
    assert not jobs["complete/fold0"].file.exists()


def test_a_result_that_was_edited_is_the_users_to_mend(tmp_path):
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(InputError, match="delete it"):
        read_result(tmp_path / "r.json")


def test_tables_stand_beside_the_papers_and_say_what_is_missing(tmp_path):
    config = fake_config(tmp_path, folds=(0, 1))
    plan = plan_sweep(config)
    results = {j.name: finish(j) for j in plan.jobs if j.variant.name in ("complete", "prototype")}
    results["no_mixer/fold1"] = finish(next(j for j in plan.jobs if j.name == "no_mixer/fold1"))
    failed = {
        "no_mixer/fold0": "trace\nValueError: [odd] thing",
        "no_token_pool/fold0": "x",
        "no_token_pool/fold1": "x",
    }
    five, six = tables_of(outcome(config, plan, results, failed))
    rows = {row[0]: row[1:] for row in five.rows}
    assert five.columns[1:3] == ("1-way 1-shot", "paper 1-way 1-shot")
    assert rows["complete"] == ("25.5 ± 0.7", "39.2", "-13.7", "20.5 ± 0.7", "30.9", "-10.4")
    assert rows["prototype (no training)"] == ("25.5 ± 0.7", "-", "-", "20.5 ± 0.7", "-", "-")
    assert rows["w/o class-example mixer"][0] == "26.0 (1 of 2 folds)"
    assert rows["w/o token pool"][0] == "failed"
    assert rows["w/o spatial convolutions"][0] == "not run"
    assert [row[0] for row in six.rows] == ["masks", "boxes and points", "boxes", "points"]
    assert six.rows[1][2] == str(plan.study.tables[2].by_prompt["point_box"][1, 1])
    assert "ValueError: [odd] thing" in five.text()
    assert five.csv().splitlines()[1] == "complete,25.5 ± 0.7,39.2,-13.7,20.5 ± 0.7,30.9,-10.4"


def test_the_spread_of_a_single_fold_is_over_seeds_and_no_paper_column_is_invented(tmp_path):
    config = fake_config(tmp_path, shots=(1, 5, 10), prompts=("mask",))
    plan = plan_sweep(config)
    six = tables_of(outcome(config, plan, {plan.jobs[0].name: finish(plan.jobs[0])}, {}))[1]
    assert [c for c in six.columns if "1-way" in c and "paper" in c] == [
        "paper 1-way 1-shot",
        "paper 1-way 5-shot",
    ]
    assert six.rows[0][1] == "25.0 ± 0.5"
    assert "± over seeds" in six.notes[0]


def test_a_table_by_fold_has_intervals_and_the_means_of_the_same_folds(tmp_path):
    config = fake_config(tmp_path, study="folds", variants=("complete", "prototype"), folds=(0, 2), ways=(1, 2))
    config = config.model_copy(update={"prompts": ("mask",), "shots": (1,)})
    plan = plan_sweep(config)
    results = {job.name: finish(job) for job in plan.jobs if job.name != "prototype/fold2"}
    one, two = tables_of(outcome(config, plan, results, {}))
    assert one.columns == ("", "fold 0", "fold 2", "mean", "paper", "difference")
    width = (1 + 1) ** 0.5 / 2
    assert one.rows[0][1:] == ("25.0 [24.0, 26.0]", "27.0 [26.0, 28.0]", f"26.0 ± {width:.1f}", "39.7", "-13.7")
    assert one.rows[1][2] == "not run"
    assert two.rows[0][4] == f"{(30.6 + 32.2) / 2:.1f}"


@pytest.mark.parametrize(
    ("place", "workers", "taken", "at_once"),
    [
        ({}, 0, {"CPU": 1, "GPU": 1}, 2),
        ({"gpus": 0.25}, 0, {"CPU": 1, "GPU": 0.25}, 8),
        ({"gpus": 0.25, "concurrent": 3}, 0, {"CPU": 1, "GPU": 0.25}, 3),
        ({"concurrent": 6}, 0, {"CPU": 1, "GPU": 1}, 2),
        ({"concurrent": 6}, 2, {"memory": 1}, 1),
        ({"device": "cpu", "threads": 4}, 0, {"CPU": 4, "GPU": 0}, 2),
        ({"device": "cpu"}, 3, {"memory": 1}, 2),
        ({}, 2, {"memory": 1}, 1),
    ],
)
def test_trials_share_cpus_and_gpus(monkeypatch, place, workers, taken, at_once):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert trial_resources(TrialPlacement(**place), workers, alone=True) == (taken, at_once)


def test_on_a_cluster_trials_may_wait_for_nodes(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert trial_resources(TrialPlacement(concurrent=6), 0, alone=False)[1] == 6
    assert trial_resources(TrialPlacement(), 0, alone=False)[1] == 2
    assert trial_resources(TrialPlacement(concurrent=6), 2, alone=False)[1] == 1, "those with workers would block them"


@pytest.mark.parametrize(
    ("place", "workers", "message"),
    [
        ({"threads": 9}, 0, "--threads 9, --gpus 1: Ray has 8 CPUs of 9"),
        ({"threads": 3, "device": "cpu"}, 3, "--threads 3, --gpus 0, --workers 3: Ray has 8 CPUs of 9"),
        ({"gpus": 3}, 0, "--gpus 3: Ray has 2 GPUs of 3"),
        ({"gpus": 0.5}, 2, "a Ray Train worker takes one whole GPU"),
        ({}, 3, "--gpus 1, --workers 3: Ray has 2 GPUs of 3"),
        ({"device": "cuda", "gpus": 0}, 0, "--device cuda with no GPU"),
    ],
)
def test_a_trial_that_fits_nowhere_is_refused(monkeypatch, place, workers, message):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    with pytest.raises(InputError, match=message):
        trial_resources(TrialPlacement(**place), workers, alone=True)


READ_A_STORE = """
import sys
from pipelines.store.reader import FeatureStore

def kilobytes():
    lines = [line.split() for line in open("/proc/self/smaps_rollup")]
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}

store = FeatureStore(sys.argv[1])
ids = store.image_ids("train")
store.read_batch(ids[:4])
before = kilobytes()
for first in range(0, len(ids), 4):
    store.read_batch(ids[first : first + 4])
after = kilobytes()
print(*((after[name] - before[name]) // 1024 for name in ("Anonymous", "Rss")))
"""


def test_a_trial_maps_the_features_and_copies_none(tmp_path):
    megabytes = 64
    path = store_of_zeros(tmp_path, images=16 * megabytes)
    code = [sys.executable, "-c", READ_A_STORE, str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(code, capture_output=True, text=True, check=True, env=environment).stdout
    anonymous, resident = map(int, told.split())
    assert anonymous < megabytes / 4, "of its own"
    assert resident > megabytes / 2, "pages of the files count as resident, in every process, though all share them"


def test_a_process_that_runs_many_trials_keeps_one_view_of_the_store(tmp_path):
    path = store_of_zeros(tmp_path, images=8)
    plan = EpisodePlan("la-train", 0, "train", "seen", 0, ((1, 1, 1),), 1, mixed=("mask",))
    assert pool_of(plan, FeatureStore(path)) is pool_of(plan, FeatureStore(path))
    assert FeatureStore(path) != FeatureStore(path.parent / "other")


def test_a_builder_ends_with_its_use_and_not_with_the_next_garbage_collection(tmp_path):
    builder = BatchBuilder(FeatureStore(store_of_zeros(tmp_path, images=8)), "train")
    builder.coverage(1, (1,))
    left = weakref.ref(builder)
    gc.disable()
    try:
        del builder
        assert left() is None
    finally:
        gc.enable()


def store_of_zeros(root, images):
    """A store of photos of 64 kB of features each, with one object on the first."""
    photos = {i: Image(i, f"{i}.jpg", 8, 8) for i in range(1, images + 1)}
    (rle,) = rle_tools.frPyObjects([[1.0, 1.0, 7.0, 1.0, 7.0, 7.0]], 8, 8)
    one = Annotation(1, 1, 1, False, 15, (1.0, 1.0, 7.0, 7.0), rle["counts"])
    annotations = {i: (one,) if i == 1 else () for i in photos}
    dataset = Dataset("train", photos, {c: f"class {c}" for c in range(1, 81)}, annotations)
    zeros = np.zeros((16, 16, 128), np.float16)
    return made_up_features(root, {"train": dataset}, lambda _: zeros, patch_size=1, shard_size=images)


def test_the_built_in_studies_are_the_files_of_their_folder():
    assert sorted((*BUILT_IN, "search")) == sorted(file.stem for file in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_study_plans_runs_and_tells(tmp_path, name):
    study = find_study(name)
    assert Study.model_validate_json(study.model_dump_json()) == study, "as a sweep keeps it"
    config = fake_config(tmp_path, study=name, variants=None, folds=study.folds[:1], ways=(1, 2), shots=study.shots)
    plan = plan_sweep(config)
    tables = tables_of(outcome(config, plan, {job.name: finish(job) for job in plan.jobs}, {}))
    assert tables
    for table in tables:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert "not run" not in table.csv()


def test_means_over_folds_keep_their_names():
    assert over_folds(
        [{"miou/a": 20.0, "statistics/std_seeds/a": 1.0}, {"miou/a": 24.0, "statistics/std_seeds/a": 3.0}]
    ) == {
        "miou/a": 22.0,
        "statistics/std_folds/a": pytest.approx(8**0.5),
        "statistics/std_seeds/a": 2.0,
    }
    assert over_folds([{"miou/a": 20.0}]) == {"miou/a": 20.0}


def test_a_stopped_sweep_closes_all_its_runs_and_the_next_start_takes_them_up(tmp_path):
    config = fake_config(tmp_path, variants=("complete", "prototype"), folds=(0, 1))
    plan = plan_sweep(config)
    tracker = Tracker(Workspace(tmp_path))

    def status():
        found = tracker._client.search_runs([tracker.experiment("ablations")])
        return {run.info.run_name.replace(plan.name, "sweep"): run.info.status for run in found}

    # Killed outright: nothing is closed, and one trial was logged no further than its start.
    runs = opened(tracker, plan, config)
    for job in plan.jobs[:2]:
        runs.started(job)
    assert set(status().values()) == {"RUNNING"}
    # Started again, and stopped by Ctrl-C before any trial starts.
    results = {plan.jobs[0].name: finish(plan.jobs[0])}
    tables = tables_of(outcome(config, plan, results, {}))
    opened(tracker, plan, config).close(results, tables)
    assert status() == {
        "sweep": "KILLED",
        "complete": "KILLED",
        "prototype": "KILLED",
        "complete/fold0": "FINISHED",
        "complete/fold1": "KILLED",
    }
    # Started once more, to the end.
    runs = opened(tracker, plan, config)
    results = {}
    for job in plan.jobs:
        runs.started(job)
        results[job.name] = finish(job)
        runs.finished(job, results[job.name])
    runs.close(results, tables)
    assert set(status().values()) == {"FINISHED"}
    assert len(status()) == 7
    variant = tracker.find("ablations", f"{plan.name}/complete")
    metrics = tracker._client.get_run(variant.id).data.metrics
    assert metrics["miou/1way-1shot-mask"] == 25.5
    assert metrics["statistics/std_folds/1way-1shot-mask"] == pytest.approx(0.5**0.5)


def test_mlflow_shows_a_sweep_with_table_pictures_charts_and_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    config = fake_config(tmp_path, variants=("complete", "no_mixer", "prototype"), folds=(0, 1))
    plan = plan_sweep(config)
    tracker = Tracker(Workspace(tmp_path))
    logged = config.model_dump(mode="json", exclude={"train"}) | config.train
    runs, results = SweepRuns(tracker, config.study, plan, logged), {}
    for job in plan.jobs:
        runs.started(job)
        result = finish(job)
        if job.variant.name == "no_mixer":  # the best of the three
            scores = tuple(score.model_copy(update={"miou": score.miou + 4}) for score in result.scores)
            result = result.model_copy(update={"scores": scores, "checkpoint": DEMO_CHECKPOINT})
        if job.train:
            job.evaluations[0].gallery.write_bytes(b"a picture")
        results[job.name] = result
        runs.finished(job, result)
    time.sleep(0.3)
    runs.close(results, tables_of(outcome(config, plan, results, {})), register="best-of-sweep")

    def run(key=""):
        return tracker._client.get_run(tracker.find("ablations", plan.name + key).id)

    sweep, variant, fold, baseline = run(), run("/no_mixer"), run("/no_mixer/fold1"), run("/prototype/fold0")
    task = "1way-1shot-mask"
    assert sweep.data.metrics[f"miou/{task}"] == 29.5, "the best variant's mean"
    assert sweep.data.metrics[f"variants/{task}/complete"] == 25.5
    assert sweep.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert (variant.data.metrics[f"miou/{task}/fold0"], variant.data.metrics[f"miou/{task}/fold1"]) == (29.0, 30.0)
    assert not any(math.isnan(value) for value in baseline.data.metrics.values())

    description = sweep.data.tags["mlflow.note.content"].splitlines()
    assert description[0] == "**Table 5: parts of the model**"
    assert description[2].startswith("|  | 1-way 1-shot | paper | 2-way 1-shot | paper |")
    assert any(line.startswith("| w/o class-example mixer | 29.5 ± 0.7 | 38.7 |") for line in description)
    kept = {path.name: path for path in Path(sweep.info.artifact_uri).rglob("*")}
    assert kept["no_mixer-fold1.jpg"].parent.name == "pictures"
    assert kept["no_mixer-fold1.jpg"].read_bytes() == b"a picture"
    assert json.loads(kept["config.json"].read_text())["prompts"] == list(config.prompts)
    assert (Path(fold.info.artifact_uri) / "no_mixer-fold1.jpg").exists()

    assert sweep.data.params == {
        "folds": "[0, 1]",
        "train_seeds": "[0]",
        "protocol": "la",
        "seeds": "2",
        "episodes": "4",
        "steps": "30",
    }
    assert baseline.data.params == {"Variant": "prototype", "method": "prototype", "fold": "0"}
    trained = {"preset": "paper", "recipe": "small", "lr": "0.0003", "steps": "30"}
    varies = {"Variant": "no_mixer", "method": "la", "class_example_mixer": "False"}
    assert fold.data.params == trained | varies | {"fold": "1", "seed": "0"}
    assert variant.data.params == trained | varies
    assert json.loads((Path(fold.info.artifact_uri) / "config.json").read_text())["train"]["ema"] == 0.99

    used = {(one.dataset.name, one.dataset.digest) for one in fold.inputs.dataset_inputs}
    assert ("features-vit_fake-480px", plan.store.key) in used
    assert (f"episodes-la-fold1-{task}", "1-1-1-mask") in used
    assert tracker._client.get_model_version("best-of-sweep", "1").run_id == fold.info.run_id, "the best of its folds"
    models = [[model.model_id for model in one.outputs.model_outputs] for one in (sweep, fold)]
    assert models[0] == models[1]
    assert len(models[0]) == 1


def test_a_search_logs_what_has_come_to_vary(tmp_path):
    plan = plan_sweep(fake_config(tmp_path, variants=("complete", "no_mixer")))
    search = SimpleNamespace(name="search-1", store=plan.store, variants=(), jobs=[plan.jobs[0]])
    tracker = Tracker(Workspace(tmp_path))
    runs = SweepRuns(tracker, "search", search, {})
    results = {}
    for job in plan.jobs:
        search.jobs = [*plan.jobs[: len(results) + 1]]
        runs.started(job)
        results[job.name] = finish(job)
        runs.finished(job, results[job.name])
    runs.close(results, [])
    first = tracker._client.get_run(tracker.find("search", "search-1/complete/fold0").id)
    assert first.data.params["class_example_mixer"] == "True", "though it was the only trial when it ended"


def test_a_tracker_that_fails_meanwhile_costs_no_trial(tmp_path, monkeypatch, caplog):
    config = fake_config(tmp_path, variants=("complete",))
    plan = plan_sweep(config)
    tracker = Tracker(Workspace(tmp_path))
    runs = opened(tracker, plan, config)
    with monkeypatch.context() as broken:
        broken.setattr(tracker, "open", lambda *_: (_ for _ in ()).throw(TrackingError("gone")))
        runs.started(plan.jobs[0])
        runs.reported(plan.jobs[0], {"phase": "train", "step": 10, "loss": 1.0})
        result = finish(plan.jobs[0])
        runs.finished(plan.jobs[0], result)
    assert caplog.text.count("MLflow did not take a record") == 1
    runs.close({plan.jobs[0].name: result}, [])
    fold = tracker.find("ablations", f"{plan.name}/complete/fold0")
    assert fold.status == "FINISHED"
    assert len(tracker._client.get_metric_history(fold.id, "loss")) == STEPS // 10


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_follows_trials_on_a_terminal_and_in_a_log(tmp_path, terminal):
    plan = plan_sweep(fake_config(tmp_path))
    console = Console(width=150, force_terminal=terminal, record=True)
    first, second = plan.jobs[:2]
    with SweepDisplay(console, total=5, done=1) as display:
        for job in (first, second):
            display.started(job)
        run_trial(first, lambda metrics: display.reported(first, metrics), fake_train, fake_evaluate)
        display.finished(first, read_result(first.file))
        display.failed(second, "Traceback\nValueError: [red]no[/red]")
    text = console.export_text()
    assert "complete/fold0: mIoU 25.0 (1-way 1-shot mask)" in text
    assert "ValueError: [red]no[/red]" in text
    if not terminal:
        assert "complete/fold0: step 10 of 30  loss 0.100" in text


def test_result_files_are_plain_json(tmp_path):
    job = plan_sweep(fake_config(tmp_path)).jobs[0]
    finish(job)
    content = json.loads(job.file.read_text())
    assert content["finished"]
    assert content["scores"][0]["per_class"]["cat"] == 25.0

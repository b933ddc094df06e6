"""Stores on an S3 server, which moto plays, whole and half made, well and failing."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs
from typer.testing import CliRunner

import cli
from la.errors import InputError
from pipelines.config import FeaturizeConfig, VerifyConfig
from pipelines.remote_path import filesystem, path_or_uri
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.store.remote_store import RemoteStores
from pipelines.store.shard_maker import ShardMaker, encode
from pipelines.store.verify import verify
from tests.conftest import TINY
from tools.drill.s3_server import Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def uri(server: Server, tmp_path: Path) -> str:
    return server.folder("".join(c for c in tmp_path.name.lower() if c.isalnum()))


@pytest.fixture
def config(tiny_coco: Path, tiny_weights: Path, tmp_path: Path) -> FeaturizeConfig:
    return FeaturizeConfig(
        workspace=tmp_path / "ws", coco_dir=tiny_coco, weights=tiny_weights, shard_size=5, threads=1, **TINY
    )


def same(one: Path, other: Path) -> bool:
    files = sorted(p.relative_to(one) for p in one.rglob("[!.]*.*"))
    return files == sorted(p.relative_to(other) for p in other.rglob("[!.]*.*")) and all(
        (one / f).read_bytes() == (other / f).read_bytes() for f in files
    )


@contextmanager
def killed_after(calls: int, owner: type = ShardMaker, method: str = "make") -> Iterator[None]:
    """Inside, this many shards are made, or other calls of a method, before the process dies."""
    call, left = getattr(owner, method), iter(range(calls))

    def dying(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return call(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, dying)
        with pytest.raises(KeyboardInterrupt):
            yield


def otherwise_rounded(*arguments) -> np.ndarray:
    """Features as another machine makes them."""
    return np.nextafter(encode(*arguments), np.float16(9))


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_a_store_comes_back_as_it_was_pushed(config, uri, tmp_path, kind):
    uri = uri if kind == "s3" else (tmp_path / "shared").as_uri()
    store = featurize(config).store
    assert RemoteStores(uri).push(store) == len(list(store.rglob("[!.]*.*")))
    assert RemoteStores(uri).push(store) == 0
    pulled = RemoteStores(uri).pull(tmp_path / "other" / "features")
    assert same(store, pulled)
    assert list(FeatureStore(pulled).verify())


def test_a_run_on_another_machine_goes_on_from_what_was_copied(config, uri, tmp_path):
    whole = featurize(config).store
    cut = config.model_copy(update={"workspace": tmp_path / "cut", "features": uri})
    with killed_after(3):
        featurize(cut)
    with pytest.raises(InputError, match="no finished store"):
        RemoteStores(uri).pull(tmp_path / "early")
    report = featurize(cut.model_copy(update={"workspace": tmp_path / "elsewhere"}))
    assert (report.already, report.made) == (15, 11)
    assert FeatureStore(report.store).info.shards == FeatureStore(whole).info.shards
    assert same(report.store, RemoteStores(uri).pull(tmp_path / "third"))
    finished = featurize(cut.model_copy(update={"workspace": tmp_path / "fourth"}))
    assert (finished.already, finished.made) == (26, 0)


@pytest.mark.parametrize("verb", ["pull", "featurize"])
def test_shards_of_another_run_give_way_to_those_of_the_finished_store(config, tmp_path, verb):
    store = featurize(config).store
    uri = (tmp_path / "shared").as_uri()
    RemoteStores(uri).push(store)
    config.coco_dir.joinpath("train2017/000000000101.jpg").write_bytes(b"broken")
    here = config.model_copy(update={"workspace": tmp_path / "here"})
    with killed_after(2):
        featurize(here.model_copy(update={"skip_bad": True}))
    kept = tmp_path / "here" / "features" / store.name / "train/part-00001.parquet"
    inode = kept.stat().st_ino
    if verb == "pull":
        RemoteStores(uri).pull(tmp_path / "here" / "features")
    else:
        assert featurize(here.model_copy(update={"features": uri})).made == 0
    assert same(store, tmp_path / "here" / "features" / store.name)
    assert kept.stat().st_ino == inode


def test_a_pulled_store_takes_the_place_of_a_finished_one(config, tmp_path, monkeypatch):
    store = featurize(config).store
    uri = (tmp_path / "shared").as_uri()
    RemoteStores(uri).push(store)
    monkeypatch.setattr("pipelines.store.shard_maker.encode", otherwise_rounded)
    other = featurize(config.model_copy(update={"workspace": tmp_path / "other"})).store
    with killed_after(3, RemoteStores, "_fetch"):
        RemoteStores(uri).pull(other.parent)
    assert not (other / "store.json").exists()
    assert same(store, RemoteStores(uri).pull(other.parent))


def test_a_push_takes_the_place_of_another_run_and_goes_on_where_it_was_killed(config, uri, tmp_path, monkeypatch):
    store = featurize(config).store
    files = len(list(store.rglob("[!.]*.*")))
    other = config.model_copy(update={"workspace": tmp_path / "other", "features": uri})
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.store.shard_maker.encode", otherwise_rounded)
        with killed_after(3):
            featurize(other)
        with killed_after(2, RemoteStores, "put"):
            RemoteStores(uri).push(store)
        assert RemoteStores(uri).push(store) == files - 2
        assert same(store, RemoteStores(uri).pull(tmp_path / "first"))

        RemoteStores(uri).push(featurize(other.model_copy(update={"features": None})).store)
    with killed_after(1, RemoteStores, "put"):
        RemoteStores(uri).push(store)
    with pytest.raises(InputError, match="no finished store"):
        RemoteStores(uri).pull(tmp_path / "early")
    assert RemoteStores(uri).push(store) == files - 1
    assert same(store, RemoteStores(uri).pull(tmp_path / "second"))


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_an_interrupted_copy_leaves_nothing(uri, tmp_path, monkeypatch, kind):
    uri = uri if kind == "s3" else (tmp_path / "shared").as_uri()

    class Interrupted(io.BytesIO):
        def read(self, size: int) -> bytes:
            if self.tell():
                raise KeyboardInterrupt
            return super().read(4)

    monkeypatch.setattr("pipelines.store.remote_store.open", lambda *_: Interrupted(b"a whole file"), raising=False)
    with pytest.raises(KeyboardInterrupt):
        RemoteStores(uri).put(tmp_path / "key", "store.json")
    assert RemoteStores(uri)._sizes("key") == {}


def test_a_server_that_fails_for_a_while_is_waited_for(config, uri, server, tmp_path):
    store = featurize(config).store
    server.failing, server.failed = 12, 0
    RemoteStores(uri).push(store)
    assert server.failed == 12
    server.failing = 12
    assert same(store, RemoteStores(uri).pull(tmp_path / "other"))
    assert server.failed == 24


def test_a_server_that_stays_down_is_told(config, uri, server):
    store = featurize(config).store
    server.failing = 10**6
    try:
        with pytest.raises(InputError, match="does not work"):
            RemoteStores(uri, patience=1.0).push(store)
    finally:
        server.failing = 0


def test_a_damaged_shard_is_refused_and_leaves_nothing(config, tmp_path):
    store = featurize(config).store
    there = tmp_path / "shared"
    RemoteStores(there.as_uri()).push(store)
    shard = there / store.name / "train/part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[content.index(FeatureStore(store).read(106).tobytes()) + 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"train/part-00001.parquet of store .* is damaged.*checksum"):
        RemoteStores(there.as_uri()).pull(tmp_path / "other")
    assert not (tmp_path / "other" / store.name / "store.json").exists()
    assert not list((tmp_path / "other").rglob("*part-00001*"))


def test_the_verbs_push_and_pull(config, tmp_path):
    store = featurize(config).store
    shared = (tmp_path / "shared").as_uri()
    run = CliRunner().invoke(cli.app, ["push", shared, "--workspace", str(config.workspace)])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(cli.app, ["pull", shared, "--workspace", str(tmp_path / "other")])
    assert run.exit_code == 0, run.output
    assert same(store, tmp_path / "other" / "features" / store.name)
    assert CliRunner().invoke(cli.app, ["pull", "nonsense://x", "--workspace", str(tmp_path)]).exit_code == 2


@pytest.mark.timeout(240)
def test_photos_are_read_from_a_server_that_fails_for_a_while(config, uri, server, tmp_path):
    here = featurize(config).store
    files, folder = filesystem(uri)
    fs.copy_files(str(config.coco_dir), folder, destination_filesystem=files)
    there = config.model_copy(update={"coco_dir": path_or_uri(uri)})
    assert (path_or_uri(uri) / "train2017" / "a photo #1%20?.jpg")._there[1] == f"{folder}/train2017/a photo #1%20?.jpg"
    for workers in (0, 2):
        server.failing, server.failed = 12, 0
        report = featurize(there.model_copy(update={"workspace": tmp_path / f"by-{workers}", "workers": workers}))
        assert server.failed == 12
        assert FeatureStore(report.store).info.shards == FeatureStore(here).info.shards
    checked = verify(VerifyConfig(workspace=tmp_path / "by-0", weights=config.weights, sample=3, threads=1))
    assert (checked.sampled, checked.difference, checked.bad) == (3, 0.0, {})

    config.coco_dir.joinpath("train2017/000000000107.jpg").unlink()
    files.delete_file(f"{folder}/train2017/000000000107.jpg")
    with pytest.raises(InputError, match=r"000000000107.jpg, which is not in s3://"):
        featurize(there.model_copy(update={"workspace": tmp_path / "again"}))


def test_a_password_in_a_uri_is_refused():
    with pytest.raises(InputError, match="holds a password"):
        path_or_uri("s3://key:secret@bucket/coco").is_dir()


@pytest.mark.parametrize("where", ["s3://no-such-bucket/coco", "nonsense://x", "s3://"])
def test_a_folder_that_cannot_be_reached_is_told(config, where, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("pipelines.remote_path.PATIENCE", 0.1)
    with pytest.raises(InputError, match=re.escape(where)):
        featurize(config.model_copy(update={"coco_dir": path_or_uri(where)}))

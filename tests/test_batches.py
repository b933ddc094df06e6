"""Batches of a store: bit for bit those drawn from the annotations' run lengths, from any thread and any mask file."""

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor

from la.data.coco import decode, drawing_order
from la.episodes.batch import pack
from la.errors import InputError
from pipelines.config import TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import draw, training_plan
from pipelines.store.buffers import Buffers
from pipelines.store.reader import FeatureStore
from tests.test_training import workspace  # noqa: F401


@pytest.fixture
def store(workspace, tmp_path):  # noqa: F811
    """A store of its own without files of small masks, as older versions left them."""
    path = next((workspace / "features").iterdir())
    copy = shutil.copytree(path, tmp_path / "features" / path.name, ignore=shutil.ignore_patterns("masks-*"))
    return FeatureStore(copy)


def episodes_of(store):
    plan = training_plan(TrainConfig(workspace=store.path.parents[1], batches=((3, 2, 2), (2, 4, 1), (4, 1, 3))))
    return [draw(plan, store, group, 0, 4) for group in range(3)]


def from_run_lengths(store, episodes, side):
    """A batch and its truth as they are defined: instances drawn at full size, shrunk, and united."""
    data = store.dataset("train")
    by_id = {one.id: one for found in data.annotations.values() for one in found}
    truth_size = tuple(4 * n for n in store.info.grid)

    def shrunk(image, one, size):
        mask = decode([one], data.images[image].height, data.images[image].width) * np.uint8(255)
        return np.asarray(Pillow.fromarray(mask).resize(size[::-1], Pillow.Resampling.BOX))

    def mask(image, ids):
        size = (side, side) if side else truth_size
        union = sum(shrunk(image, by_id[i], size).astype(np.float32) for i in ids)
        return torch.from_numpy(union.clip(max=255) / 255)

    def truth(episode):
        labels = np.zeros(truth_size, np.int64)
        for one, label in drawing_order(data.annotations[episode.query], episode.classes):
            labels[shrunk(episode.query, one, truth_size) > 127] = label
        return torch.from_numpy(labels)

    def features(ids):
        return torch.from_numpy(np.stack([store.read(i) for i in ids]))

    def size(image):
        return data.images[image].height, data.images[image].width

    return pack(episodes, features, mask, size), torch.stack([truth(e) for e in episodes])


def bits(value):
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if dataclasses.is_dataclass(value):
        return tuple(bits(getattr(value, f.name)) for f in dataclasses.fields(value))
    return value


@pytest.mark.parametrize("side", [None, 20])
def test_batches_are_those_of_the_run_lengths_from_any_thread(store, side):
    drawn = episodes_of(store)
    expected = [tuple(map(bits, from_run_lengths(store, episodes, side))) for episodes in drawn]

    def built(builder, episodes):
        return bits(builder.pack(episodes)), bits(builder.truth(episodes))

    for view in (store, FeatureStore(store.path)):  # makes the masks, then reads them
        builder = BatchBuilder(view, "train", side)
        assert [built(builder, episodes) for episodes in drawn] == expected
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda n: built(builder, drawn[n % 3]), range(30))) == expected * 10


def mask_files(store):
    BatchBuilder(FeatureStore(store.path), "train")
    return {path: path.read_bytes() for path in store.path.glob("masks-*")}


@pytest.mark.parametrize("content", [b"", b"ARROW1", None], ids=["empty", "no table", "cut short"])
def test_a_mask_file_that_cannot_be_read_is_made_again(store, content):
    ((path, whole),) = mask_files(store).items()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert mask_files(store) == {path: whole}


def test_a_mask_file_of_other_annotations_is_made_again(store):
    ((path, whole),) = mask_files(store).items()
    digest = store.dataset("train").digest.encode()
    path.write_bytes(whole.replace(digest, digest[::-1]))
    assert mask_files(store) == {path: whole}


def test_damaged_masks_are_told(store):
    ((path, whole),) = mask_files(store).items()
    view = FeatureStore(store.path)
    masks = view.small_masks("train", tuple(4 * n for n in store.info.grid))
    ids = [one.id for found in view.dataset("train").annotations.values() for one in found]
    content = masks._masks[0].as_py()  # of the first id
    assert whole.count(content) == 1
    path.write_bytes(whole.replace(content, content[:-1] + bytes([content[-1] ^ 1])))
    again = FeatureStore(store.path).small_masks("train", masks._size)
    with pytest.raises(InputError, match=rf"{path.name} is damaged .*Remove it: it is made again"):
        again[min(ids)]
    with pytest.raises(InputError, match="annotation -1 is not in it"):
        again[-1]


def test_a_store_that_cannot_be_written_to_serves_its_masks_from_memory(store):
    ((path, _),) = mask_files(store).items()
    path.unlink()
    path.mkdir()
    episodes = episodes_of(store)[0]
    expected = tuple(map(bits, from_run_lengths(store, episodes, None)))
    builder = BatchBuilder(store, "train")
    assert (bits(builder.pack(episodes)), bits(builder.truth(episodes))) == expected
    assert list(path.iterdir()) == []


def test_memory_is_used_again_only_when_no_tensor_is_left_of_it():
    buffers = Buffers()
    first = buffers.empty(2, 3, 4)
    address, part = first.data_ptr(), first[1:].detach()
    assert buffers.empty(2, 3, 4).data_ptr() != address
    del first
    assert buffers.empty(1, 3, 4).data_ptr() != address, "a part of it is in use"
    del part
    assert buffers.empty(2, 3, 4).data_ptr() == address

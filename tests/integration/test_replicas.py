"""Two replicas of the model on a local Ray: what they answer is one model's, and a replica that dies is not missed."""

import asyncio
import io
import os
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

fastapi_test = pytest.importorskip("fastapi.testclient")
pytest.importorskip("grpc_reflection")  # of the extra `serve`: Ray Serve does without in no other way

from ray import cloudpickle  # noqa: E402

from la.errors import InputError  # noqa: E402
from la.predictor.user_prompts import Box, Points  # noqa: E402
from pipelines.config import ServeConfig  # noqa: E402
from pipelines.demo.scenes import draw_scene  # noqa: E402
from pipelines.serve.api import build_api  # noqa: E402
from pipelines.serve.jobs import Jobs, Refused, Upload  # noqa: E402
from pipelines.serve.replicas import MOST_LEARNED, replicas_queue, share_of  # noqa: E402
from pipelines.serve.service import Service  # noqa: E402

CONFIG = ServeConfig(device="cpu", threads=1, replicas=2)
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas do not know the jobs of this file


@pytest.fixture(scope="module")
def queue():
    with replicas_queue(CONFIG) as queue:
        yield queue


@pytest.fixture(scope="module")
def alone():
    return Jobs(CONFIG)


def scene(number: int) -> Upload:
    file = io.BytesIO()
    Image.fromarray(draw_scene(7, "val2017", number, (120, 160)).image).save(file, "PNG")
    return Upload(f"{number}.png", file.getvalue(), "photo")


SHOWN = [
    (scene(1), {"first": Box(10, 10, 70, 80), "second": Points([(90, 60)], [(5, 5)])}),
    (scene(2), {"second": Box(60, 20, 150, 110)}),
]


def process_of(jobs: Jobs, seconds: float) -> int:
    """A job: the replica's process, after a while."""
    time.sleep(seconds)
    return os.getpid()


def die(jobs: Jobs) -> None:
    """A job that no replica survives."""
    os._exit(1)


def together(queue, *jobs: tuple) -> list:
    """Values, or errors, of jobs that are handed in at once."""

    async def run():
        return await asyncio.gather(*(queue.run(*job) for job in jobs), return_exceptions=True)

    done = asyncio.run(run())
    return [one if isinstance(one, Exception) else one.value for one in done]


def processes(queue) -> set[int]:
    """Of both replicas, as soon as both are there."""
    for _ in range(60):
        found = set(together(queue, *[(process_of, 0.5)] * 2))
        if len(found) == 2:
            return found
    raise AssertionError("there is one replica, not two")


@pytest.mark.timeout(600)
def test_replicas_segment_as_one_model_does_to_the_pixel(queue, alone):
    assert len(processes(queue)) == 2
    (class_set,) = together(queue, (Jobs.show, SHOWN, ("first", "second")))
    assert class_set.learned is None, "the model stays where it is"
    expected = alone.show(SHOWN, ("first", "second"))
    queries = [scene(number) for number in range(1, 13)]
    for query, found in zip(
        queries, together(queue, *((Jobs.segment, class_set, query) for query in queries)), strict=True
    ):
        wanted = alone.segment(expected, query)
        np.testing.assert_array_equal(found.mask, wanted.mask)
        np.testing.assert_array_equal(found.scores, wanted.scores)
    assert together(queue, (Jobs.moved, class_set, found)) == [alone.moved(expected, wanted)]
    (again,) = together(queue, (Jobs.show, class_set.supports.supports[:1]))
    assert again.supports.classes == ("first", "second"), "supports that were read are shown again without their photos"


@pytest.mark.timeout(600)
def test_class_sets_that_replicas_have_forgotten_are_learned_again(queue):
    first, *_ = together(queue, *[(Jobs.show, SHOWN)] * (2 * MOST_LEARNED + 2))
    fresh, old = together(queue, (Jobs.show, SHOWN), (Jobs.segment, first, scene(3)))
    np.testing.assert_array_equal(old.mask, together(queue, (Jobs.segment, fresh, scene(3)))[0].mask)


@pytest.mark.timeout(600)
def test_errors_arrive_as_what_they_are(queue):
    refused, unusable = together(
        queue,
        (Jobs.preview, Upload("a.png", b"text", "photos.1")),
        (Jobs.show, [(scene(1), {"thing": Box(500, 0, 600, 9)})]),
    )
    assert (type(refused), refused.status, refused.code, refused.field) == (Refused, 422, "not_a_photo", "photos.1")
    assert "a.png is not a photo" in str(refused)
    assert type(unusable) is InputError


@pytest.mark.timeout(600)
def test_the_api_answers_from_replicas(queue, alone):
    photo = scene(1)
    annotations = '[{"photo": 0, "class": "thing", "bbox": [10, 10, 60, 70]}]'
    with fastapi_test.TestClient(build_api(Service(CONFIG, queue))) as client:
        files, form = [("photos", ("a.png", photo.data))], {"annotations": annotations}
        made = client.post("/api/class-sets", files=files, data=form)
        assert made.status_code == 201, made.text
        where = f"/api/class-sets/{made.json()['id']}/segment"
        answer = client.post(where, files={"photo": ("a.png", photo.data)}, data={"output": "png"})
        assert float(answer.headers["x-seconds"]) > 0
        assert float(answer.headers["x-queue-seconds"]) > 0
        mask = np.asarray(Image.open(io.BytesIO(answer.content)))
        wrong = client.post(where, files={"photo": ("a.png", b"text")})
        assert (wrong.status_code, wrong.json()["code"], wrong.json()["field"]) == (422, "not_a_photo", "photo")
    wanted = alone.segment(alone.show([(photo, {"thing": Box(10, 10, 70, 80)})]), photo)
    np.testing.assert_array_equal(mask, wanted.mask)


@pytest.mark.timeout(600)
def test_a_user_who_goes_away_leaves_the_queue_in_order(queue):
    async def leave():
        going = [asyncio.create_task(queue.run(process_of, 1.0)) for _ in range(4)]  # two run, two wait
        await asyncio.sleep(0.5)
        for one in going:
            one.cancel()
        await asyncio.gather(*going, return_exceptions=True)
        return (await queue.run(process_of, 0.0)).value

    assert asyncio.run(leave()) in processes(queue)
    assert queue.waiting == 0


@pytest.mark.timeout(600)
def test_a_replica_that_is_killed_is_not_missed_and_comes_back(queue, alone):
    (class_set,) = together(queue, (Jobs.show, SHOWN))
    killed, survivor = processes(queue)

    async def kill_meanwhile():
        running = [asyncio.create_task(queue.run(process_of, 2.0)) for _ in range(2)]
        queued = [asyncio.create_task(queue.run(Jobs.segment, class_set, scene(3))) for _ in range(4)]
        await asyncio.sleep(1.0)
        os.kill(killed, signal.SIGKILL)
        return [one.value for one in await asyncio.gather(*running)], [
            one.value for one in await asyncio.gather(*queued)
        ]

    workers, found = asyncio.run(kill_meanwhile())
    assert survivor in workers
    assert killed not in workers, "its job was done by another"
    wanted = alone.segment(alone.show(SHOWN), scene(3)).mask
    for one in found:
        np.testing.assert_array_equal(one.mask, wanted)
    back = processes(queue)
    assert survivor in back
    assert killed not in back


@pytest.mark.timeout(600)
def test_a_job_that_kills_every_replica_is_refused_and_the_service_goes_on(queue):
    (refused,) = together(queue, (die,))
    assert (type(refused), refused.status, refused.code) == (Refused, 503, "model_lost")
    (class_set,) = together(queue, (Jobs.show, SHOWN))
    assert class_set.supports.classes == ("first", "second")


@pytest.mark.parametrize(
    ("settings", "nodes", "share"),
    [
        ({"replicas": 2}, [{"CPU": 8}], (4, 0)),
        ({"replicas": 3}, [{"CPU": 2}], (0.5, 0)),
        ({"replicas": 3}, [{"CPU": 1}, {"CPU": 1}], (0.5, 0)),
        ({"replicas": 2}, [{"CPU": 32}, {"CPU": 4, "GPU": 2}], (2, 1)),
        ({"replicas": 4}, [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 3}], (2, 1)),
        ({"replicas": 2}, [{"CPU": 8}, {"CPU": 2}], (4, 0)),
        ({"replicas": 4}, [{"CPU": 8}, {"CPU": 8}], (4, 0)),
        ({"replicas": 2, "threads": 3}, [{"CPU": 8}], (3, 0)),
        ({"replicas": 2}, [{"CPU": 8, "GPU": 2}], (4, 1)),
        ({"replicas": 3}, [{"CPU": 9, "GPU": 2}], (3, 0.5)),
        ({"replicas": 2, "device": "cpu"}, [{"CPU": 8, "GPU": 2}], (4, 0)),
        ({"replicas": 3, "threads": 1}, [{"CPU": 2}], "--replicas 3 times --threads 1: Ray has a node of 2 CPUs"),
        ({"replicas": 1, "device": "cuda"}, [{"CPU": 2}], "Ray has no GPU"),
    ],
)
def test_replicas_share_what_the_nodes_have(settings, nodes, share):
    config = ServeConfig(**settings)
    if isinstance(share, tuple):
        assert share_of(config, nodes) == share
    else:
        with pytest.raises(InputError, match=share):
            share_of(config, nodes)

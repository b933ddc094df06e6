"""The HTTP API: what it answers is the predictor's, whatever is handed in, and nobody sees another's classes."""

import io
import json
import socket
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from typer.testing import CliRunner

fastapi_test = pytest.importorskip("fastapi.testclient")

from cli import app  # noqa: E402
from la.predictor.predictor import Predictor  # noqa: E402
from la.predictor.user_prompts import Box, Points  # noqa: E402
from pipelines.config import ServeConfig  # noqa: E402
from pipelines.demo.scenes import draw_scene  # noqa: E402
from pipelines.predict.support_files import read_support_files  # noqa: E402
from pipelines.serve.annotating import AnnotatedPhoto, Session  # noqa: E402
from pipelines.serve.api import build_api  # noqa: E402
from pipelines.serve.jobs import Jobs, Refused, Upload  # noqa: E402
from pipelines.serve.queue import model_queue  # noqa: E402
from pipelines.serve.service import ClassSets, Service, clean_name  # noqa: E402


def png_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rle_of(mask: np.ndarray) -> dict:
    rle = rle_tools.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_checkpoint("demo", "cpu")


@pytest.fixture
def jobs(predictor):
    return Jobs(ServeConfig(max_photos=4, max_classes=3, max_class_sets=10), predictor)


@pytest.fixture
def service(jobs):
    with model_queue(jobs.config, jobs.predictor) as queue:
        yield Service(jobs.config, queue)


@pytest.fixture
def client(service):
    with fastapi_test.TestClient(build_api(service)) as client:
        yield client


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(0, "val2017", number) for number in range(10)]


def create(client, photos: list[bytes], annotations: list[dict] | str, names=None):
    files = [("photos", (name, data)) for name, data in zip(names or ["a.png"] * len(photos), photos, strict=True)]
    text = annotations if isinstance(annotations, str) else json.dumps(annotations)
    return client.post("/api/class-sets", files=files, data={"annotations": text})


def segment(client, number: str, photo: bytes, name: str = "query.png", **fields):
    return client.post(f"/api/class-sets/{number}/segment", files={"photo": (name, photo)}, data=fields)


BOXED = [{"photo": 0, "class": "thing", "bbox": [10, 10, 50, 60]}]


def test_prompts_of_every_kind_give_the_predictors_mask_to_the_pixel(client, predictor, scenes):
    one, two, query = scenes[0], scenes[1], scenes[0]
    annotations = [
        {"photo": 0, "class": "first", "segmentation": rle_of(one.instances == 1)},
        {"photo": 0, "class": "second", "bbox": [5, 10, 50, 60]},
        {"photo": 1, "class": "second", "points": [[40, 50, 1], [5, 5, 0]]},
    ]
    made = create(client, [png_of(one.image), png_of(two.image)], annotations)
    assert made.status_code == 201, made.text
    assert made.json()["classes"] == ["first", "second"]
    assert made.json()["shots"] == {"first": 1, "second": 2}

    supports = predictor.read_supports(
        [one.image, two.image],
        [
            {"first": one.instances == 1, "second": Box(5, 10, 55, 70)},
            {"second": Points([(40, 50)], [(5, 5)])},
        ],
    )
    expected = predictor.segment([query.image], predictor.learn(supports))
    assert set(np.unique(expected.masks[0])) > {0}

    as_png = segment(client, made.json()["id"], png_of(query.image), output="png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(as_png.content))), expected.masks[0])
    assert json.loads(as_png.headers["x-scores"]) == pytest.approx(expected.scores[0], abs=1e-4)
    assert float(as_png.headers["x-seconds"]) > 0

    as_coco = segment(client, made.json()["id"], png_of(query.image)).json()
    mask = np.zeros_like(expected.masks[0])
    for annotation in as_coco["annotations"]:
        found = rle_tools.decode(annotation["segmentation"])
        assert annotation["area"] == found.sum()
        mask[found == 1] = annotation["category_id"]
    np.testing.assert_array_equal(mask, expected.masks[0])


def test_the_coco_answer_is_a_coco_file(client, scenes, tmp_path):
    made = create(client, [png_of(scenes[0].image)], BOXED)
    answer = segment(client, made.json()["id"], png_of(scenes[1].image), name="/etc/../my photo.png")
    path = tmp_path / "result.json"
    path.write_text(answer.text)
    coco = COCO(str(path))
    assert coco.loadImgs(coco.getImgIds())[0]["file_name"] == "my photo.png"
    assert all(coco.annToMask(one).sum() == one["area"] for one in coco.loadAnns(coco.getAnnIds()))


def test_a_deleted_class_set_is_gone(client, scenes):
    number = create(client, [png_of(scenes[0].image)], BOXED).json()["id"]
    assert client.get(f"/api/class-sets/{number}").json()["classes"] == ["thing"]
    assert client.delete(f"/api/class-sets/{number}").status_code == 204
    for answer in (
        client.get(f"/api/class-sets/{number}"),
        client.delete(f"/api/class-sets/{number}"),
        segment(client, number, png_of(scenes[0].image)),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "no_such_class_set")


def test_other_paths_and_methods_of_the_api_are_told_as_problems(client):
    answer = client.get("/api/nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    answer = client.put("/api/class-sets")
    assert (answer.status_code, answer.json()["code"], answer.headers["allow"]) == (405, "method_not_allowed", "POST")
    answer = client.post("/api/class-sets/x")
    assert answer.headers["allow"] == "DELETE, GET"


def huge_png() -> bytes:
    """A PNG whose header says 50,000 x 50,000 and that has few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def large_png() -> bytes:
    """Within Pillow's own limit, beyond the service's."""
    return png_of(np.zeros((5001, 5001), np.uint8))


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
HOSTILE = {
    "bomb": (huge_png, 413, "photo_too_large"),
    "large": (large_png, 413, "photo_too_large"),
    "bytes": (lambda: bytes(10_000_001), 413, "photo_too_large"),
    "text": (lambda: b"this is text", 422, "not_a_photo"),
    "svg": (lambda: SVG, 422, "not_a_photo"),
    "empty": (lambda: b"", 422, "not_a_photo"),
    "cut": (
        lambda: png_of(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:3000],
        422,
        "not_a_photo",
    ),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "not_a_photo"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_photos_are_refused_and_the_service_goes_on(client, scenes, kind):
    data, status, code = HOSTILE[kind]
    good = png_of(scenes[0].image)
    number = create(client, [good], BOXED).json()["id"]
    for answer, field in (
        (create(client, [good, data()], [*BOXED, BOXED[0] | {"photo": 1}], ["a.png", "b.jpg"]), "photos.1"),
        (segment(client, number, data(), "b.jpg"), "photo"),
    ):
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["field"]) == (status, code, field)
        assert "b.jpg" in problem["message"]
    assert segment(client, number, good).status_code == 200


@pytest.mark.parametrize(("count", "status", "code"), [(1000, 413, "too_many_photos"), (1001, 400, "malformed")])
def test_a_thousand_files_are_refused(client, scenes, count, status, code):
    answer = create(client, [png_of(scenes[0].image)] * count, BOXED)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert create(client, [png_of(scenes[0].image)], BOXED).status_code == 201


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_of_too_many_bytes_is_refused(client, chunked):
    parts = [bytes(1_000_000)] * 65
    head = {"content-type": "multipart/form-data; boundary=b"}
    start = b'--b\r\ncontent-disposition: form-data; name="photos"; filename="x"\r\n\r\n'
    body = iter([start, *parts]) if chunked else start + b"".join(parts)
    answer = client.post("/api/class-sets", content=body, headers=head)
    assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("annotations", "code", "field"),
    [
        ("nonsense", "invalid", "annotations"),
        ([{"photo": 0, "class": "x", "bbox": [1, 2, 3]}], "invalid", "annotations.0.bbox"),
        ([{"photo": 0, "class": "", "bbox": [1, 2, 3, 4]}], "invalid", "annotations.0.class"),
        ([{"photo": 7, "class": "x", "bbox": [1, 2, 3, 4]}], "no_such_photo", "annotations.0.photo"),
        ([], "no_annotation", "photos.0"),
        ([{"photo": 0, "class": "x", "bbox": [900, 2, 3, 4]}], "unusable", None),
        ([{"photo": 0, "class": "x", "points": [[1, 2, 0]]}], "unusable", None),
        ([{"photo": 0, "class": "x"}], "unusable", None),
        ([{"photo": 0, "class": "x", "segmentation": {"size": [9, 9], "counts": [81]}}], "unusable", None),
        ([{"photo": 0, "class": "x", "segmentation": [[1e30, 0, 1, 1, 2, 2]]}], "unusable", None),
    ],
)
def test_annotations_that_cannot_be_used_say_where(client, scenes, annotations, code, field):
    answer = create(client, [png_of(scenes[0].image)], annotations)
    assert answer.status_code == 422
    assert (answer.json()["code"], answer.json()["field"]) == (code, field), answer.text


def test_too_many_classes_or_class_sets_are_refused(client, scenes):
    photo = png_of(scenes[0].image)
    answer = create(client, [photo], [BOXED[0] | {"class": f"c{i}"} for i in range(4)])
    assert (answer.status_code, answer.json()["code"]) == (413, "too_many_classes")
    for _ in range(10):
        assert create(client, [photo], BOXED).status_code == 201
    answer = create(client, [photo], BOXED)
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_class_sets")


def test_a_class_set_that_nobody_uses_makes_room():
    now = 0.0
    kept = ClassSets(2, 60, lambda: now)
    first, second = kept.add("first"), kept.add("second")
    now = 50.0
    assert kept.get(first) == "first"
    now = 70.0
    third = kept.add("third")
    assert (kept.get(first), kept.get(third)) == ("first", "third")
    with pytest.raises(Refused, match="no class set"):
        kept.get(second)


def test_sessions_of_eight_users_at_once_are_not_mixed(client, predictor, scenes):
    queries = [png_of(scene.image) for scene in scenes[8:]]

    def expected(user: int) -> list[np.ndarray]:
        supports = predictor.read_supports([scenes[user].image], [{f"of {user}": Box(5 * user, 10, 60 + 5 * user, 90)}])
        return predictor.segment([scene.image for scene in scenes[8:]], predictor.learn(supports)).masks

    wanted = [expected(user) for user in range(8)]
    assert len({masks[0].tobytes() for masks in wanted}) > 4, "the users' classes have to differ for this to tell"
    together = threading.Barrier(8)

    def user(number: int) -> float:
        together.wait()
        annotation = {"photo": 0, "class": f"of {number}", "bbox": [5 * number, 10, 60, 80]}
        made = create(client, [png_of(scenes[number].image)], [annotation]).json()
        waited = 0.0
        for _ in range(3):
            for query, mask in zip(queries, wanted[number], strict=True):
                answer = segment(client, made["id"], query, output="png")
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), mask)
                waited += float(answer.headers["x-queue-seconds"])
        assert client.get(f"/api/class-sets/{made['id']}").json()["classes"] == [f"of {number}"]
        return waited

    with ThreadPoolExecutor(8) as pool:
        waited = list(pool.map(user, range(8)))
    assert max(waited) > 0, "one model serves all, so somebody waited"


def test_more_requests_than_may_wait_are_told_to_come_back(predictor, scenes):
    config = ServeConfig(max_waiting=1)
    holding = threading.Event()
    with (
        model_queue(config, predictor) as queue,
        fastapi_test.TestClient(build_api(Service(config, queue))) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        held = queue._threads.submit(holding.wait)
        first = [pool.submit(create, client, [png_of(scenes[0].image)], BOXED) for _ in range(2)]  # one under way
        while queue.waiting < 2:
            pass
        third = create(client, [png_of(scenes[0].image)], BOXED)
        holding.set()
        assert (third.status_code, third.json()["code"]) == (503, "busy")
        assert [one.result().status_code for one in first] == [201, 201]
        assert held.result()
    assert queue.waiting == 0


def test_a_support_that_alone_shows_a_class_moves_all_of_it(service, jobs, predictor, scenes):
    one, two, query = scenes[0], scenes[1], scenes[0]
    shown = [{"first": one.instances == 1}, {"second": two.instances == 1}]
    uploads = [service.receive("a.png", png_of(scene.image), "photos") for scene in (one, two)]
    class_set = jobs.show(list(zip(uploads, shown, strict=True)), ["first", "second"])
    found = jobs.segment(class_set, service.receive("q.png", png_of(query.image), "photo"))
    moved = jobs.moved(class_set, found)
    alone = predictor.segment([query.image], predictor.learn(predictor.read_supports([two.image], [shown[1]])))
    without_first = np.where(alone.masks[0] > 0, 2, 0)
    either = (found.mask > 0) | (without_first > 0)
    assert moved[0] == pytest.approx((found.mask != without_first).sum() / either.sum())
    assert 0 <= moved[1] < moved[0] <= 1
    only = jobs.show(class_set.supports.supports[:1])
    assert jobs.moved(only, jobs.segment(only, uploads[0])) == [1.0]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\y.png", "y.png"),
        ("..", "photo"),
        (None, "photo"),
        ("a\x00\nb\u202e.jpg", "ab.jpg"),
    ],
)
def test_names_of_files_lose_folders_and_control_characters(given, kept):
    assert clean_name(given) == kept


def test_answers_to_generated_requests_are_as_described(service, scenes):
    """Schemathesis draws requests, fitting and not, from the OpenAPI description, and holds every answer against it."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        negative_data_rejection,
    ]
    api = build_api(service)
    photo = png_of(scenes[0].image)
    with fastapi_test.TestClient(api) as client:
        number = create(client, [photo], BOXED).json()["id"]
    seen = set()
    for found in schemathesis.openapi.from_asgi("/api/openapi.json", api).get_all_operations():
        operation = found.ok()
        cases = [
            operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        ]

        @settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=HealthCheck)
        @given(case=cases[0] | cases[1], real=st.booleans())
        def check(case, real):
            if real and case.path_parameters and case.method == "POST":
                case.path_parameters["class_set_id"] = number
            if real and isinstance(case.body, dict) and isinstance(case.body.get("photo"), str | bytes):
                case.body["photo"] = photo
            seen.add((case.method, case.call_and_validate(checks=checks).status_code))

        check()
    assert seen >= {("POST", 200), ("POST", 404), ("POST", 422), ("GET", 404), ("DELETE", 404)}


def marked_session(scene) -> Session:
    """Two classes on one photo, by every tool."""
    session = Session()
    height, width = scene.image.shape[:2]
    session.photos.append(AnnotatedPhoto(Upload("a.png", png_of(scene.image), "photo"), (height, width), ""))
    session.at = 0
    first, second = session.add_class("first"), session.add_class("<script>")
    photo = session.photo
    photo.add("box", first.number, [(90, 70), (20, -30)], 0)
    photo.add("inside", first.number, [(40, 50)], 0)
    photo.add("outside", first.number, [(5, 5)], 0)
    photo.add("brush", second.number, [(60, 60), (100, 60)], 12)
    photo.add("eraser", second.number, [(60, 60)], 16)
    photo.add("outside", second.number, [(1, 1)], 0)
    return session


def test_marks_become_prompts_in_pixels_of_the_photo(scenes):
    session = marked_session(scenes[0])
    prompts = session.photo.prompts(session.classes)
    assert prompts["first"] == [Box(20, 0, 90, 70), Points([(40, 50)], [(5, 5)])]
    points, mask = prompts["<script>"]
    assert points == Points([], [(1, 1)])
    assert mask[60, 90]
    assert not mask[60, 60], "rubbed out"
    assert not mask[80].any()


def test_a_class_that_is_marked_nowhere_or_removed_is_not_shown(scenes):
    session = marked_session(scenes[0])
    third = session.add_class("third")
    session.photo.add("outside", third.number, [(9, 9)], 0)
    assert session.shown()[0] == ["first", "<script>"]
    session.remove_class(session.classes[0].number)
    names, ((_, prompts),) = session.shown()
    assert names == list(prompts) == ["<script>"]
    assert session.chosen == third.number


def test_names_of_classes_cannot_become_part_of_the_page(scenes):
    session = marked_session(scenes[0])
    drawing = session.photo.drawing(session.classes)
    assert "<script>" not in drawing
    session.photo.add("inside", session.classes[1].number, [(9, 9)], 0)
    assert "&lt;script&gt;" in session.photo.drawing(session.classes)


def test_marks_saved_as_a_coco_file_are_read_by_predict_as_the_page_reads_them(jobs, predictor, scenes, tmp_path):
    session = marked_session(scenes[0])
    (tmp_path / "a.png").write_bytes(session.photo.upload.data)
    (tmp_path / "support.json").write_text(json.dumps(session.support_file()))
    files = read_support_files(tmp_path / "support.json")
    (saved,) = predictor.read_supports(files.photos, files.prompts).supports
    shown = jobs.read_support(session.photo.upload, session.photo.prompts(session.classes))
    assert torch.equal(saved.features, shown.features)
    assert saved.shown.keys() == shown.shown.keys()
    for name, one in shown.shown.items():
        other = saved.shown[name]
        assert (sorted(one.points), sorted(one.boxes)) == (sorted(other.points), sorted(other.boxes))
        assert (one.mask is None and other.mask is None) or torch.equal(one.mask, other.mask)


def test_one_model_in_this_process_needs_no_ray():
    modules = "api", "page", "queue", "server", "service"
    imports = "; ".join(f"import pipelines.serve.{name}" for name in modules)
    subprocess.run([sys.executable, "-c", f"{imports}; import sys; assert 'ray' not in sys.modules"], check=True)


def test_an_address_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "--port", port, "--device", "cpu"])
    assert result.exit_code == 2
    assert f"--port {port} cannot be listened on" in result.stderr

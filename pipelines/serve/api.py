"""The HTTP API: class sets from annotated photos, and photos segmented by them. OpenAPI at /api/openapi.json."""

import asyncio
import json
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, Json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from la.errors import InputError
from pipelines.serve.jobs import ClassSet, Jobs, Refused, Upload
from pipelines.serve.result_files import coco_document, png
from pipelines.serve.service import MB, NAME_LENGTH, Service

Number = Annotated[float, Field(allow_inf_nan=False)]
ClassName = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH, pattern=r"^[^\x00-\x1f\x7f]+$")]


class RunLengths(BaseModel):
    """A mask as COCO writes it: run lengths, background first, column by column, or pycocotools' compressed string."""

    model_config = ConfigDict(extra="forbid")
    size: Annotated[list[int], Field(min_length=2, max_length=2, description="Height and width of the photo.")]
    counts: list[int] | str


class Annotation(BaseModel):
    """Where a class is on a photo: a COCO annotation with `segmentation`, or with `bbox`, or with `points`."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    photo: Annotated[int, Field(ge=0, description="Position of the photo among `photos`, from 0.")]
    class_name: Annotated[ClassName, Field(alias="class")]
    segmentation: Annotated[
        RunLengths | list[list[Number]] | None, Field(description="Run lengths, or polygons [x, y, x, y, ...].")
    ] = None
    bbox: Annotated[
        list[Number] | None, Field(min_length=4, max_length=4, description="Left, top, width, height in pixels.")
    ] = None
    points: Annotated[
        list[tuple[Number, Number, Literal[0, 1]]] | None,
        Field(description="x and y in pixels, and 1 on the object or 0 beside it."),
    ] = None


class ClassSetSummary(BaseModel):
    """A class set: label i + 1 of masks and category id i + 1 are `classes[i]`."""

    id: str
    classes: list[str]
    shots: Annotated[dict[str, int], Field(description="Photos that show each class.")]
    seconds: Annotated[float, Field(description="That making it took; 0 when it is only looked at.")] = 0.0
    queue_seconds: Annotated[float, Field(description="Waited for the model before.")] = 0.0


class CocoImage(BaseModel):
    """COCO's."""

    id: int
    file_name: str
    height: int
    width: int


class CocoCategory(BaseModel):
    """COCO's."""

    id: int
    name: str


class CocoAnnotation(BaseModel):
    """All pixels of one class on the photo."""

    id: int
    image_id: int
    category_id: int
    segmentation: RunLengths
    bbox: list[float]
    area: int
    iscrowd: int
    score: float


class SegmentedPhoto(BaseModel):
    """A COCO instances file of one photo, and beside that the scores of all classes and the time."""

    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]
    scores: Annotated[dict[str, float], Field(description="Mean probability over the class's pixels; 0 without any.")]
    seconds: float
    queue_seconds: float


class Problem(BaseModel):
    """Why a request was not done: a code for programs, a message for people, the field at fault where one is."""

    code: str
    message: str
    field: str | None = None


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


def build_api(service: Service) -> FastAPI:
    """The application with the API alone; the page is put beside it by `pipelines.serve.page`."""
    app = FastAPI(
        title="Label Anything",
        description="Segment photos into classes that a few annotated photos show.",
        version="1",
        openapi_url="/api/openapi.json",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    router = _routes(service)
    app.include_router(router)
    app.mount("/api", partial(_nothing_there, router))  # else the page, which is at /, would answer with a page
    for kind in (InputError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(RequestLimit, max_mb=service.config.max_request_mb)
    return app


def _routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api", tags=["segmentation"])
    config = service.config

    @router.post("/class-sets", status_code=201, responses=_problems(400, 413, 422, 429, 503))
    async def create_class_set(
        photos: Annotated[list[UploadFile], File(description="JPEG, PNG, WebP or BMP.")],
        annotations: Annotated[Json[list[Annotation]], Form(description="What the photos show, as JSON.")],
    ) -> ClassSetSummary:
        """Show classes by annotated photos."""
        names = list(dict.fromkeys(one.class_name for one in annotations))
        _at_most(len(photos), config.max_photos, "photos", "photos")
        _at_most(len(names), config.max_classes, "classes", "annotations")
        service.class_sets.check_room()
        prompts = _of_each_photo(annotations, len(photos))
        uploads = [await _received(service, photo, f"photos.{at}") for at, photo in enumerate(photos)]
        done = await service.queue.run(Jobs.show, list(zip(uploads, prompts, strict=True)), names)
        number = service.class_sets.add(done.value)
        return _summary(number, done.value, seconds=done.seconds, queue_seconds=done.queue_seconds)

    @router.get("/class-sets/{class_set_id}", responses=_problems(404, 422))
    async def get_class_set(class_set_id: str) -> ClassSetSummary:
        """What a class set shows."""
        return _summary(class_set_id, service.class_sets.get(class_set_id))

    @router.delete("/class-sets/{class_set_id}", status_code=204, responses=_problems(404, 422))
    async def delete_class_set(class_set_id: str) -> None:
        """Forget a class set."""
        service.class_sets.delete(class_set_id)

    @router.post(
        "/class-sets/{class_set_id}/segment",
        response_model=SegmentedPhoto,
        responses=_problems(400, 404, 413, 422, 503)
        | {
            200: {
                "description": "The masks. Beside a PNG, whose pixels are labels, scores and times are in headers.",
                "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
                "headers": {
                    "X-Scores": {"schema": {"type": "string"}, "description": "JSON list, in the order of classes."},
                    "X-Seconds": {"schema": {"type": "number"}},
                    "X-Queue-Seconds": {"schema": {"type": "number"}},
                },
            }
        },
    )
    async def segment_photo(
        class_set_id: str,
        photo: Annotated[UploadFile, File(description="JPEG, PNG, WebP or BMP.")],
        output: Annotated[Literal["coco", "png"], Form(description="COCO JSON, or an indexed PNG.")] = "coco",
    ) -> Response:
        """Segment a photo into the classes of a class set."""
        class_set = service.class_sets.get(class_set_id)
        upload = await _received(service, photo, "photo")
        done = await service.queue.run(Jobs.segment, class_set, upload)
        scores = [round(float(score), 4) for score in done.value.scores]
        headers = {
            "X-Scores": json.dumps(scores),
            "X-Seconds": str(done.seconds),
            "X-Queue-Seconds": str(done.queue_seconds),
        }
        if output == "png":
            data = await asyncio.to_thread(png, done.value.mask)
            return Response(data, media_type="image/png", headers=headers)
        classes = class_set.supports.classes
        document = await asyncio.to_thread(coco_document, [(upload.name, done.value.mask, scores)], classes)
        answer = SegmentedPhoto(
            **document,
            scores=dict(zip(classes, scores, strict=True)),
            seconds=done.seconds,
            queue_seconds=done.queue_seconds,
        )
        return JSONResponse(answer.model_dump(), headers=headers)

    return router


def _of_each_photo(annotations: list[Annotation], count: int) -> list[dict[str, list]]:
    prompts: list[dict[str, list]] = [{} for _ in range(count)]
    for at, one in enumerate(annotations):
        if one.photo >= count:
            message = f"annotation {at} is for photo {one.photo}; there are {count} photos, from 0 on."
            raise Refused(422, "no_such_photo", f"annotations.{at}.photo", message)
        prompt = one.model_dump(exclude={"photo", "class_name"}, exclude_none=True)
        prompts[one.photo].setdefault(one.class_name, []).append(prompt)
    if {} in prompts:
        at = prompts.index({})
        message = f"photo {at} has no annotation; say what it shows, or leave it out."
        raise Refused(422, "no_annotation", f"photos.{at}", message)
    return prompts


async def _received(service: Service, file: UploadFile, field: str) -> Upload:
    data = await file.read(service.config.max_photo_mb * MB + 1)
    return service.receive(file.filename, data, field)


def _at_most(found: int, most: int, what: str, field: str) -> None:
    if found > most:
        raise Refused(413, f"too_many_{what}", field, f"there are {found} {what}; at most {most} are taken.")


def _summary(number: str, class_set: ClassSet, **times: float) -> ClassSetSummary:
    return ClassSetSummary(id=number, classes=class_set.supports.classes, shots=class_set.supports.shots, **times)


async def _nothing_there(router: APIRouter, scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI: of paths that are none of the API's, and of methods that a path does not have."""
    matches = ((route, route.matches(scope | {"root_path": ""})[0]) for route in router.routes)
    allowed = sorted({method for route, match in matches if match is Match.PARTIAL for method in route.methods})
    raise HTTPException(405, headers={"Allow": ", ".join(allowed)}) if allowed else HTTPException(404)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    headers = None
    if isinstance(error, Refused):
        status, problem = error.status, Problem(code=error.code, message=str(error), field=error.field)
    elif isinstance(error, InputError):
        status, problem = 422, Problem(code="unusable", message=str(error))
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or None
        status, problem = 422, Problem(code="invalid", message=f"{field}: {first['msg']}.", field=field)
    else:
        assert isinstance(error, HTTPException)
        codes = {400: "malformed", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
        status, headers = error.status_code, error.headers
        problem = Problem(code=codes.get(status, "refused"), message=str(error.detail))
    return JSONResponse(problem.model_dump(), status, headers)


class RequestLimit:
    """ASGI: larger requests end with 413, whether they say their length or not, before they fill the disk."""

    def __init__(self, app: ASGIApp, max_mb: int):
        self._app, self._max_mb = app, max_mb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises HTTPException into what reads a request that does not say its length."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        error = HTTPException(413, f"the request has more than {self._max_mb} MB, the most that is taken at once.")
        if int(Headers(scope=scope).get("content-length", 0)) > self._max_mb * MB:
            return await (await _answer(Request(scope), error))(scope, receive, send)
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            part = await receive()
            taken += len(part.get("body", b""))
            if taken > self._max_mb * MB:
                raise error
            return part

        await self._app(scope, counted, send)

"""What `mlflow.pyfunc.load_model` runs: photos and annotated supports to masks, by `la` alone, which the model carries.

A table has one row a photo. Rows with `prompts` are supports, the others are segmented:

    photo    bytes of a JPEG, PNG, WebP or BMP file
    prompts  JSON, {class: [COCO annotation, ...]}: `segmentation`, `bbox` or `points` [[x, y, 1 or 0], ...] in pixels

The answer has a row for each photo segmented: `mask`, bytes of a grey PNG (0 background, i + 1 for class i), `classes`
as a JSON list, and their `scores` in [0, 1], likewise.
"""

import io
import json
from pathlib import Path

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from la.predictor.predictor import Predictor


class ExampleSegmenter(PythonModel):
    """A checkpoint with its backbone."""

    def load_context(self, context: PythonModelContext) -> None:
        """`model_config` holds the arguments of `Predictor.from_checkpoint`; InputError as there."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        self._predictor = Predictor.from_checkpoint(files.pop("checkpoint"), **(context.model_config | files))

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict | None = None):
        """Raises InputError for photos and prompts that cannot be used, and where no row has prompts."""
        rows = [(Image.open(io.BytesIO(row["photo"])), row.get("prompts")) for row in model_input.to_dict("records")]
        supports = [(photo, json.loads(prompts)) for photo, prompts in rows if isinstance(prompts, str)]
        self._predictor.set_support([photo for photo, _ in supports], [prompts for _, prompts in supports])
        found = self._predictor.segment([photo for photo, prompts in rows if not isinstance(prompts, str)])
        classes = json.dumps(self._predictor.classes)
        answers = [(_png(mask), classes, json.dumps(scores.tolist())) for mask, scores in zip(*found, strict=True)]
        return pd.DataFrame(answers, columns=["mask", "classes", "scores"])


def _png(mask) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


set_model(ExampleSegmenter())

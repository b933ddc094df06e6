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

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from la.data.photos import open_photo
from la.predictor.predictor import Predictor


class ExampleSegmenter(PythonModel):
    """A checkpoint with its backbone."""

    def load_context(self, context: PythonModelContext) -> None:
        """`model_config["predictor"]` holds arguments of `Predictor.from_checkpoint`; InputError as there."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        self._predictor = Predictor.from_checkpoint(**(files | context.model_config["predictor"]))

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict | None = None):
        """Raises InputError for photos and prompts that cannot be used, and where no row has prompts."""
        rows = [(open_photo(io.BytesIO(row["photo"])), row.get("prompts")) for row in model_input.to_dict("records")]
        annotated = [(photo, json.loads(prompts)) for photo, prompts in rows if isinstance(prompts, str)]
        supports = self._predictor.read_supports([photo for photo, _ in annotated], [given for _, given in annotated])
        queries = [photo for photo, prompts in rows if not isinstance(prompts, str)]
        found = self._predictor.segment(queries, self._predictor.learn(supports))
        classes = json.dumps(supports.classes)
        answers = [(_png(mask), classes, json.dumps(scores.tolist())) for mask, scores in zip(*found, strict=True)]
        return pd.DataFrame(answers, columns=["mask", "classes", "scores"])


def _png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


set_model(ExampleSegmenter())

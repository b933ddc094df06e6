"""Segment by an exported ONNX file alone: numpy features in, mask out. Needs numpy, onnxruntime and pillow.

    python cli.py predict --support support.json --images photos --out out --save-prototypes classes.safetensors
    python cli.py export --prototypes classes.safetensors --out heads.onnx      # writes heads.npz beside it
    python examples/onnx_segment.py heads.onnx query.npy --height 480 --width 640 --out mask.png

`query.npy` holds the features (h, w, Dv) of one photo, by whatever runs the backbone; with the product at hand

    numpy.save("query.npy", Predictor.from_checkpoint("demo").encode(["photo.jpg"])[0])
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def segment(heads: Path, features: np.ndarray, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """Features (h, w, Dv) -> mask (height, width) of labels, 0 the background, and the names of labels 1, 2, ..."""
    session = onnxruntime.InferenceSession(heads)
    kept = np.load(heads.with_suffix(".npz"))
    inputs = {one.name: kept[one.name] for one in session.get_inputs() if one.name != "query"}
    logits = session.run(["logits"], inputs | {"query": features[None].astype(np.float32)})[0][0]
    large = [Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR) for one in logits]
    return np.stack([np.asarray(one) for one in large]).argmax(0).astype(np.uint8), kept["classes"].tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", type=Path, help="an .onnx file with its .npz beside it")
    parser.add_argument("features", type=Path, help=".npy with the query's features")
    parser.add_argument("--height", type=int, required=True, help="of the mask, pixels")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help=".png or .npy")
    arguments = parser.parse_args()
    mask, names = segment(arguments.heads, np.load(arguments.features), arguments.height, arguments.width)
    if arguments.out.suffix == ".npy":
        np.save(arguments.out, mask)
    else:
        Image.fromarray(mask).save(arguments.out)
    for label, name in enumerate(names, start=1):
        print(f"{label} {name}: {100 * np.mean(mask == label):.1f} % of the photo")

"""The heads as ONNX and torch.export agree with the model, and the ONNX file runs alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from la.errors import InputError
from la.model.decoder import segment
from la.model.label_anything import build, preset
from la.predictor.fixed_heads import example_inputs, export_onnx, heads_inputs, heads_of
from la.predictor.predictor import Predictor
from pipelines.predict.export import export_heads

ort = pytest.importorskip("onnxruntime", reason="pip install 'label-anything[export]'")
pytest.importorskip("onnxscript", reason="pip install 'label-anything[export]'")
ROOT = Path(__file__).parents[1]
GRID = (8, 8)
TOLERANCE = 1e-4


@pytest.mark.parametrize("ways", [1, 2, 5])
@pytest.mark.parametrize("name", ["paper", "hybrid"])
def test_exported_heads_agree_with_the_model(name, ways, tmp_path):
    torch.manual_seed(0)
    changes = {} if name == "hybrid" else {"dim": 32}
    model = build(preset(name, channels=16, **changes)).requires_grad_(False)
    for weights in model.parameters():  # some start at zero, which would hide what comes before them
        weights += 0.1 * torch.randn_like(weights)
    heads = heads_of(model, ways)
    traced = example_inputs(heads, GRID)
    export_onnx(heads, traced, tmp_path / "heads.onnx")
    session = ort.InferenceSession(tmp_path / "heads.onnx")
    program = torch.export.export(heads, tuple(traced.values())).module()
    for seed in (1, 2):  # other numbers than those it was traced with
        torch.manual_seed(seed)
        inputs = example_inputs(heads, GRID)
        wanted = heads(**inputs).numpy()
        assert wanted.shape == (1, ways + 1, 32, 32)
        assert np.ptp(wanted) > 100 * TOLERANCE
        found = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})[0]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(program(*inputs.values()).numpy(), wanted, rtol=0, atol=TOLERANCE)


def photos():
    return [np.random.default_rng(seed).integers(0, 256, (96, 128, 3), np.uint8) for seed in range(3)]


@pytest.mark.parametrize("most", [10_000, 200])  # each token by itself, and neighbours as one
def test_the_example_segments_with_the_onnx_file_alone(tmp_path, monkeypatch, most):
    """From saved classes to a mask, in a process that has neither torch nor the product."""
    monkeypatch.setattr("la.model.matching.MOST_TOKENS", most)
    predictor = Predictor.from_checkpoint("demo", "cpu")
    mask = np.zeros((96, 128), bool)
    mask[20:70, 30:90] = True
    predictor.set_support(photos()[:2], [{"cat": mask}, {"dog": mask}])
    predictor.save_prototypes(tmp_path / "classes.safetensors")
    export_heads("demo", tmp_path / "heads.onnx", prototypes=[tmp_path / "classes.safetensors"])
    query = predictor.encode(photos()[2:])
    np.save(tmp_path / "query.npy", query[0].numpy())
    command = [sys.executable, "-S", "-c", alone(), tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "mask.npy")
    logits = predictor._learned.logits(query)[0]
    wanted = segment(logits, (96, 128)).numpy()
    assert found.shape == (96, 128)
    assert np.mean(found != wanted) < 1e-3  # ties
    assert "cat" in done.stdout


def alone() -> str:
    """The example, run where `torch` and the product cannot be imported."""
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    return f"""
import sys, runpy
sys.path.append({packages!r})
for name in ("torch", "la", "pipelines", "timm"):
    sys.modules[name] = None
root = sys.argv[1]
sys.argv = ["onnx_segment.py", root + "/heads.onnx", root + "/query.npy", "--height", "96", "--width", "128",
            "--out", root + "/mask.npy"]
runpy.run_path({str(ROOT / "examples" / "onnx_segment.py")!r}, run_name="__main__")
"""


def test_the_number_of_shots_of_the_hybrid_is_fixed(tmp_path):
    predictor = Predictor.from_checkpoint("demo", "cpu")
    mask = np.ones((96, 128), bool)
    predictor.set_support(photos()[:2], [{"cat": mask}, {"cat": mask, "dog": mask}])
    with pytest.raises(InputError, match="2, 1 supports; exported heads of the hybrid take as many of each"):
        heads_inputs(predictor._learned)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--out .*heads\.zip: expected \.onnx or \.pt2"):
        export_heads("demo", tmp_path / "heads.zip", ways=1)
    with pytest.raises(InputError, match="--ways or --prototypes"):
        export_heads("demo", tmp_path / "heads.onnx")

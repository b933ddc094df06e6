"""The official preset: agreement with outputs of the official model, import and export."""

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import cli
from la.episodes.batch import EpisodeBatch, Pairs, ranks
from la.errors import InputError
from la.model.label_anything import LabelAnything, preset
from la.model.official_names import from_official, to_official
from pipelines.runs.official_files import export_official, import_official
from tests.conftest import SHARED

CASES = ("mask_1way_1shot", "mask_2way_1shot_partial", "mask_3way_one_image", "box_point_mask_2way_2shot")
INPUT_PX = 128


@pytest.fixture(scope="module")
def reference():
    path = SHARED / "parity" / "official_tiny.safetensors"
    if not path.exists():
        pytest.skip(f"no outputs of the official model at {path}")
    return safetensors.torch.load_file(path)


def under(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def packed(case) -> EpisodeBatch:
    """The pairs of a case that are annotated, and the background's on every support."""
    flags = {kind: case[f"flag_{kind}"].bool() for kind in ("masks", "points", "bboxes")}
    b, m, c = flags["masks"].shape
    annotated = flags["masks"] | flags["points"].any(-1) | flags["bboxes"].any(-1)
    kept = annotated.clone()
    kept[..., 0] = True
    assert torch.equal(kept, case["flag_examples"].bool())
    episode, support, slot = kept.nonzero().unbind(1)
    at = (episode, support, slot)
    has_mask = flags["masks"][at]
    sparse = flags["points"][at].any(-1) | flags["bboxes"][at].any(-1)
    any_sparse = (flags["points"].any(-1) | flags["bboxes"].any(-1)).flatten(1).any(1)
    pair_support = episode * m + support
    # the official batch has a place for points and boxes only where any pair of it has one
    points = flags["points"].shape[-1] if flags["points"].any() else 0
    boxes = flags["bboxes"].shape[-1] if flags["bboxes"].any() else 0
    return EpisodeBatch(
        query=case["embeddings"][:, 0].permute(0, 2, 3, 1),
        support=case["embeddings"][:, 1:].flatten(0, 1).permute(0, 2, 3, 1),
        support_counts=(m,) * (b * m),
        pairs=Pairs.of(torch.ones(b, c, dtype=torch.bool), episode * c + slot),
        pair_support=pair_support,
        pair_place=ranks(pair_support),
        most_places=int(ranks(pair_support).max()) + 1,
        mask_pair=has_mask.nonzero()[:, 0],
        masks=case["prompt_masks"][at][has_mask],
        points=(case["prompt_points"][at][:, :points] + 0.5) / INPUT_PX,
        point_labels=torch.where(flags["points"][at], 1, -1)[:, :points],
        boxes=(case["prompt_bboxes"][at][:, :boxes] + 0.5) / INPUT_PX,
        box_valid=flags["bboxes"][at][:, :boxes],
        sparse_pair=sparse.nonzero()[:, 0],
        other_pair=(~sparse).nonzero()[:, 0],
        any_mask=flags["masks"].flatten(1).any(1),
        any_sparse=any_sparse,
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_official_model(reference, name):
    model = from_official(under(reference, "state/")).eval()
    case = under(reference, f"{name}/in/")
    expected = under(reference, f"{name}/out/")
    model.prompt_encoder.pool.fixed = lambda episodes, slots: reference["rows"][:slots].expand(episodes, -1)
    with torch.inference_mode():
        low = model(packed(case))
    for ours, theirs in (
        (low, expected["logits_low"]),
        (F.interpolate(low, (INPUT_PX, INPUT_PX), mode="bilinear", align_corners=False), expected["logits"]),
    ):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.std()


def test_import_export_import_changes_nothing(reference):
    state = under(reference, "state/")
    model = from_official(state)
    exported = to_official(model)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)
    again = from_official(exported).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


TINY = {"channels": 12, "dim": 32, "two_way_ffn": 24, "block_ffn": 40}


@pytest.mark.parametrize("switch", ["token_pool", "class_example_mixer", "spatial_convs"])
def test_the_importer_sees_which_parts_a_file_has(switch):
    made = LabelAnything(preset("official", **TINY, **{switch: False}))
    found = from_official({f"model.{name}": t for name, t in to_official(made).items()}, absent_pairs=False)
    assert found.config == made.config
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in made.state_dict().items())


def test_what_does_not_fit_is_listed():
    state = to_official(LabelAnything(preset("official", **TINY)))
    state["mask_decoder.extra"] = torch.zeros(1)
    state["image_encoder.blocks.0.weight"] = torch.zeros(1)
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 5)
    del state["neck.3.bias"], state["prompt_encoder.point_embeddings.2.weight"]
    with pytest.raises(InputError) as raised:
        from_official(state)
    told = str(raised.value).splitlines()[1:]
    assert [line.strip() for line in told] == [
        "missing: neck.3.bias",
        "prompt_encoder.no_mask_embed.weight: shape (1, 5), expected (32,)",
        "missing: prompt_encoder.point_embeddings.2.weight",
        "left over: mask_decoder.extra",
    ]
    with pytest.raises(InputError, match=r"it has no neck\.0\.weight"):
        from_official({"fc.weight": torch.zeros(3)})


def test_other_presets_have_no_official_form():
    with pytest.raises(InputError, match="official preset"):
        to_official(LabelAnything(preset("debug")))


@pytest.fixture
def released(tmp_path):
    """A file as official training scripts leave it."""
    torch.manual_seed(0)
    made = LabelAnything(preset("official", **TINY))
    path = tmp_path / "released.pt"
    torch.save({"model": {f"module.{name}": t for name, t in to_official(made).items()}, "epoch": 3}, path)
    return path


def test_a_file_becomes_a_checkpoint_and_a_file_again(released, tmp_path):
    ours, theirs, again = tmp_path / "runs" / "best.pt", tmp_path / "exported.safetensors", tmp_path / "again.pt"
    model = import_official(str(released), 2, ours)
    saved = torch.load(ours, weights_only=True)
    assert (saved["fold"], saved["store"]) == (2, None)
    assert model.config.absent_pairs
    export_official(ours, theirs)
    import_official(str(theirs), 2, again)
    states = [torch.load(path, weights_only=True)["state"] for path in (ours, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_shell_imports_and_exports(released, tmp_path):
    ours, theirs = tmp_path / "best.pt", tmp_path / "out.safetensors"
    imported = CliRunner().invoke(cli.app, ["import-official", str(released), "--fold", "1", "--out", str(ours)])
    assert imported.exit_code == 0, imported.output
    assert "token_pool: yes" in imported.output
    exported = CliRunner().invoke(cli.app, ["export-official", str(ours), str(theirs)])
    assert exported.exit_code == 0, exported.output
    refused = CliRunner().invoke(cli.app, ["import-official", str(tmp_path / "no.pt"), "--fold", "1"])
    assert refused.exit_code == 2


def test_a_hub_is_asked_for_the_weights_of_a_repository(released, tmp_path, monkeypatch):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(released)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    import_official("hf://someone/label-anything", 0, tmp_path / "a.pt")
    import_official("hf://someone/label-anything/fold0/weights.pt", 0, tmp_path / "b.pt")
    assert asked == [("someone/label-anything", "model.safetensors"), ("someone/label-anything", "fold0/weights.pt")]
    with pytest.raises(InputError, match="owner/name"):
        import_official("hf://alone", 0, tmp_path / "c.pt")


class Sly:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Sly(), "more than tensors"),
        ([1, 2], "holds list"),
        (None, "is not there"),
        (b"not a checkpoint", "cannot be read|more than tensors"),
    ],
)
def test_a_source_that_is_no_checkpoint_is_refused_unrun(content, message, tmp_path, capsys):
    path = tmp_path / "odd.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        import_official(str(path), 0, tmp_path / "out.pt")
    assert "code was run" not in capsys.readouterr().out
    assert not (tmp_path / "out.pt").exists()

"""Pre-trains the demo's vision transformer on scenes of made-up objects: about ten minutes on one core.

The scenes are drawn as those of ``draw_scenes`` are, but of other objects: 300 random outlines and 300
random textures in place of the data set's ten shapes and eight textures, so that neither an image nor a
label of the eighty classes is seen; nor is there any other class.  From each patch token of the final norm,
linear heads tell which of the outlines and textures the object it lies on has, measures of both (see
``tools.demo_pretrain.other_objects``), where that object's visible part is centred and how large it is, which pixels of
the patch belong to any object, which patches near by are of the same object, and the patch's own pixels
and spectrum.  For most of the run more than half of the tokens, drawn at random, are left
out, as masked autoencoders do, for speed.

    python -m tools.demo_pretrain.pretrain --out la/predictor/vit_demo.safetensors
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import la.backbone.vit_demo  # noqa: F401  (makes the model known to timm)
from pipelines.demo.drawing import compose
from tools.demo_pretrain.other_objects import (
    measure_outline,
    measure_texture,
    random_outline,
    random_texture,
    standardised,
)

MODEL = "vit_demo_patch8_128"
SIZE, PATCH = 128, 8
GRID = SIZE // PATCH
OUTLINES, TEXTURES = 300, 300
MOST_OBJECTS = 6
# Tokens kept per image, and for which part of the run; after it all 256 are.
KEPT, KEPT_PART = 96, 0.85
# How many patches to each side the silhouette around a patch reaches.
REACH = 4
UNCLEAR = 255
# The 8 x 5 frequencies of a patch without the constant one.
SPECTRUM = list(range(1, PATCH * (PATCH // 2 + 1)))


def patch_objects(instances: np.ndarray) -> np.ndarray:
    """(H, W) object numbers -> (H / 8, W / 8): the object of most of the patch, 0 for none at all.

    A patch that lies on objects, but on none by a half, is ``UNCLEAR``.
    """
    patches = instances.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    counts = (patches[..., None] == np.arange(1, MOST_OBJECTS + 1)).sum(2)
    best = np.where(counts.max(-1) >= PATCH * PATCH // 2, counts.argmax(-1) + 1, UNCLEAR)
    return np.where(patches.any(-1), best, 0).astype(np.uint8)


def draw_pool(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Draw ``count`` scenes of the random kinds.

    Returns images (N, 128, 128, 3) uint8, covered (N, 128, 128) bool, objects (N, 16, 16) uint8 (see
    ``patch_objects``), kinds (N, 7, 2) int64: outline and texture of each object number, and the
    standardised measures of the kinds: outlines (300, K) and textures (300, L).
    """
    rng = np.random.default_rng([seed, 0])
    outlines = [random_outline(rng) for _ in range(OUTLINES)]
    textures = [random_texture(rng) for _ in range(TEXTURES)]
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    covered = np.empty((count, SIZE, SIZE), bool)
    objects = np.empty((count, GRID, GRID), np.uint8)
    kinds = np.zeros((count, MOST_OBJECTS + 1, 2), np.int64)
    for n in range(count):
        rng = np.random.default_rng([seed, 1, n])
        wanted = [(int(rng.integers(OUTLINES)), int(rng.integers(TEXTURES))) for _ in range(rng.integers(2, 5))]
        scene = compose(rng, wanted, (SIZE, SIZE), outlines, textures)
        images[n], covered[n], objects[n] = scene.image, scene.instances > 0, patch_objects(scene.instances)
        for k, thing in enumerate(scene.things, start=1):
            kinds[n, k] = thing.shape, thing.texture
    return {
        "images": torch.from_numpy(images),
        "covered": torch.from_numpy(covered),
        "objects": torch.from_numpy(objects),
        "kinds": torch.from_numpy(kinds),
        "outlines": torch.from_numpy(standardised(np.stack([measure_outline(o) for o in outlines]))),
        "textures": torch.from_numpy(standardised(np.stack([measure_texture(t) for t in textures]))),
    }


def draw_batch(
    pool: dict[str, torch.Tensor], picks: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes ``picks`` of the pool, flipped, turned by quarters and recoloured, the same for the batch.

    Returns images (B, 3, 128, 128) in -1..1, covered, objects and kinds as in ``draw_pool``.
    """
    images = pool["images"][picks].permute(0, 3, 1, 2).float() / 127.5 - 1
    covered, objects = pool["covered"][picks], pool["objects"][picks]
    turns, mirror = int(rng.integers(4)), rng.random() < 0.5
    turned = [torch.rot90(x.flip(-1) if mirror else x, turns, (-2, -1)) for x in (images, covered, objects)]
    count = len(picks)
    gain = rng.choice([-1, 1], (count, 1, 1, 1)) * rng.uniform(0.7, 1.1, (count, 3, 1, 1))
    images = (turned[0][:, rng.permutation(3).tolist()] * torch.from_numpy(gain).float()).clamp(-1, 1)
    return images, turned[1], turned[2], pool["kinds"][picks]


class Pretraining(nn.Module):
    """The backbone with its linear heads on every patch token."""

    def __init__(self, outline_measures: int, texture_measures: int) -> None:
        super().__init__()
        self.backbone = timm.create_model(MODEL)
        width = self.backbone.embed_dim
        with torch.no_grad():
            self.backbone.pos_embed[:, 1:] = sine_positions(width)
            for block in self.backbone.blocks:
                # Equal queries and keys: attention starts on tokens near by and alike, which is half the
                # way to objects; from unrelated ones a run this short does not get there.
                queries = torch.randn(width, width) * 0.8 / math.sqrt(width)
                block.attn.qkv.weight[: 2 * width] = queries.repeat(2, 1)
        self.parts = {
            "outline": outline_measures,
            "texture": texture_measures,
            "which_outline": OUTLINES,
            "which_texture": TEXTURES,
            "extent": 3,
            "covered": PATCH * PATCH,
            "pixels": 3 * PATCH * PATCH,
            "spectrum": len(SPECTRUM),
            "silhouette": (2 * REACH + 1) ** 2,
        }
        self.head = nn.Linear(width, sum(self.parts.values()))

    def forward(self, images: torch.Tensor, kept: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """(B, 3, 128, 128) and the kept token positions (B, K), or None for all 256 -> (B, K, ...) each."""
        vit = self.backbone
        tokens = vit._pos_embed(vit.patch_embed(images))
        if kept is not None:
            first = torch.zeros_like(kept[:, :1])
            index = torch.cat([first, kept + 1], dim=1)[..., None]
            tokens = tokens.gather(1, index.expand(-1, -1, tokens.shape[-1]))
        tokens = vit.norm(vit.blocks(vit.norm_pre(tokens)))[:, 1:]
        return dict(zip(self.parts, self.head(tokens).split(list(self.parts.values()), dim=-1), strict=True))


def sine_positions(width: int) -> torch.Tensor:
    """Sines and cosines of the row and of the column, (256, width): where the position embedding starts."""
    rates = 1 / 30 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)], dim=2)
    return 0.5 * grid.reshape(GRID * GRID, width)


def silhouettes(objects: torch.Tensor) -> torch.Tensor:
    """(B, 16, 16) -> (B, 256, 81): which patches up to REACH to each side are of the patch's own object."""
    around = F.unfold(objects[:, None].float(), 2 * REACH + 1, padding=REACH).transpose(1, 2)
    return (around == objects.flatten(1)[..., None]).float()


def extents(objects: torch.Tensor) -> torch.Tensor:
    """(B, 16, 16) -> (B, 256, 3): from each patch to its object's centre (x, y), and the object's width.

    In units of eight patches; the width is the root of the number of patches.
    """
    flat = objects.flatten(1).long()
    member = (flat[..., None] == torch.arange(MOST_OBJECTS + 1)).float()
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    place = torch.stack([columns, rows], dim=-1).reshape(1, -1, 2).float()
    number = member.sum(1).clamp(min=1)
    centre = torch.einsum("bpk,pc->bkc", member, place[0]) / number[..., None]
    return torch.cat([member @ centre - place, member @ number.sqrt()[..., None]], dim=-1) / 8


def whiten_patches(backbone: nn.Module, images: torch.Tensor) -> None:
    """Start the patch embedding at the whitened principal components of the patches of (N, 3, 128, 128).

    From random weights a patch's mean colour, which tells nothing of the kind, hides its texture.
    """
    patches = F.pixel_unshuffle(images, PATCH).transpose(1, 2).transpose(2, 3).reshape(-1, 3 * PATCH * PATCH)
    mean = patches.mean(0)
    variance, components = torch.linalg.eigh((patches - mean).T.cov())
    width = backbone.embed_dim
    # The floor keeps the drawing's pixel noise from being blown up to the size of the texture.
    rows = (components[:, -width:] / (variance[-width:] + 0.04).sqrt()).T * 0.7
    projection = backbone.patch_embed.proj
    with torch.no_grad():
        projection.weight.copy_(rows.reshape(projection.weight.shape))
        projection.bias.copy_(-rows @ mean)


def spectra(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, 128, 128) -> (B, 256, K): log power of each patch's grey values at the frequencies SPECTRUM."""
    patches = F.pixel_unshuffle(images.mean(1, keepdim=True), PATCH).flatten(2).transpose(1, 2)
    power = torch.fft.rfft2(patches.reshape(*patches.shape[:2], PATCH, PATCH), norm="ortho").abs().square()
    return ((power.flatten(2)[..., SPECTRUM] + 0.01).log() + 3) / 1.5


def losses(
    out: dict[str, torch.Tensor],
    images: torch.Tensor,
    covered: torch.Tensor,
    objects: torch.Tensor,
    kinds: torch.Tensor,
    pool: dict[str, torch.Tensor],
    kept: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The loss of each head: the mean over the tokens that it is defined on."""

    def chosen(x: torch.Tensor) -> torch.Tensor:
        if kept is None:
            return x
        return x.gather(1, kept.reshape(*kept.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

    number = chosen(objects.flatten(1).long())
    on_object = (number > 0) & (number != UNCLEAR)
    kind = kinds.gather(1, number.where(on_object, 0)[..., None].expand(-1, -1, 2))[on_object]
    pixels = F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)
    inside = F.pixel_unshuffle(covered[:, None].float(), PATCH).flatten(2).transpose(1, 2)
    return {
        "outline": F.mse_loss(out["outline"][on_object], pool["outlines"][kind[:, 0]]),
        "texture": F.mse_loss(out["texture"][on_object], pool["textures"][kind[:, 1]]),
        "which_outline": F.cross_entropy(out["which_outline"][on_object], kind[:, 0]),
        "which_texture": F.cross_entropy(out["which_texture"][on_object], kind[:, 1]),
        "extent": F.smooth_l1_loss(out["extent"][on_object], chosen(extents(objects))[on_object], beta=0.1),
        "silhouette": F.binary_cross_entropy_with_logits(
            out["silhouette"][on_object], chosen(silhouettes(objects))[on_object]
        ),
        "covered": F.binary_cross_entropy_with_logits(out["covered"], chosen(inside)),
        "pixels": F.mse_loss(out["pixels"], chosen(pixels)),
        "spectrum": F.mse_loss(out["spectrum"], chosen(spectra(images))),
    }


WEIGHTS = {
    "outline": 1.0,
    "texture": 1.0,
    "which_outline": 0.3,
    "which_texture": 0.5,
    "extent": 3.0,
    "covered": 1.0,
    "pixels": 1.0,
    "spectrum": 0.3,
    "silhouette": 2.0,
}


def train(*, steps: int, scenes: int, batch: int, seed: int, out: Path, rate: float = 1.5e-3) -> None:
    """Pre-train for ``steps`` batches on a pool of ``scenes`` scenes; prints a line every hundred steps.

    The backbone is written to ``out`` (fp16, timm's names) every five hundred steps and at the end.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    begin = time.monotonic()
    pool = draw_pool(scenes, seed)
    print(f"drew {scenes} scenes in {time.monotonic() - begin:.0f} s", flush=True)
    model = Pretraining(pool["outlines"].shape[1], pool["textures"].shape[1])
    first, _, _, _ = draw_batch(pool, torch.arange(min(scenes, 500)), rng)
    whiten_patches(model.backbone, first)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
    )
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    running: dict[str, float] = {}
    for step in range(steps):
        picks = torch.from_numpy(rng.integers(scenes, size=batch))
        images, covered, objects, kinds = draw_batch(pool, picks, rng)
        kept = None
        if step < KEPT_PART * steps:
            kept = torch.rand(batch, GRID * GRID).argsort(dim=1)[:, :KEPT]
        terms = losses(model(images, kept), images, covered, objects, kinds, pool, kept)
        loss = sum(WEIGHTS[name] * terms[name] for name in WEIGHTS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in terms.items():
            running[name] = running.get(name, value.item()) * 0.98 + value.item() * 0.02
        if (step + 1) % 100 == 0:
            line = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"step {step + 1}/{steps}  {time.monotonic() - begin:.0f} s  {line}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = model.backbone.state_dict()
            save_file({name: value.half().contiguous() for name, value in state.items()}, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write (fp16)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--scenes", type=int, default=4000, help="drawn once, seen again augmented")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    # One core, and the same order of additions on every machine with the same kernels.
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    train(**vars(arguments))


if __name__ == "__main__":
    main()

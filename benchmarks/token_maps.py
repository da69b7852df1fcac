"""What can be learned from the published tokens of 97 lung pairs, whose decoder was not published?

    python -m benchmarks.token_maps --data DIR --run FOLDER --json book/results/token_maps.json

The vessels of ten of these pairs are public, so a new decoder can be learned from tokens and vessels. Two of the ten
are left out of its training. The motions of other patients, known as points, test it on the rest. Then a denoiser
learns the maps, and two short trainings of the registration network show what the decoded vessels are worth. This takes
about 45 minutes on one core; an interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.moved import moved_pairs
from pairdiff_core import absorbing, fields, metrics
from pairdiff_core.data.breathing import box_of, box_of_vessels, read_motions
from pairdiff_core.data.lung250m import CORRESPONDENCES, find_lung250m, read_correspondences
from pairdiff_core.data.lung_frame import FRAME
from pairdiff_core.pairs import PairSet, depth_maps, pack_labels
from pairdiff_core.pipeline import Run, images_with_themselves, train_registration
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import evaluate, register, summarise
from pairdiff_core.storage import Progress, Saving, provenance, write_json
from pairdiff_core.training import Samples, best_device, fit, generator, new_fabric

TOKEN_MAPS = "lung250_3d_vqae_model_dilated.pth"
GRID, CELL = (16, 13, 16), 8  # of the tokens; voxels of 2 mm per token
NOT_TRAINING = (2, 8, 54, 55, 56, 94, 97)  # of the case numbers 0 to 103
LEFT_OUT = ("case_040", "case_041")  # not seen by the decoder
CROP, HIDDEN = 8, 0.2  # tokens a side of a training patch; share of them that is hidden
STEPS, RATE = 400, 3e-3  # of the decoder
SHORT = 300  # steps of the registration networks
BREATHS = (7, 33, 61)  # motions that the moved pairs follow
SHARDS = 12  # of eight sampled maps
SHOWN = 6  # decoded and sampled images that are stored as pictures


def read_token_maps(folder: Path) -> dict[str, torch.Tensor]:
    """The published tokens of the training pairs by case, int64 GRID, renumbered 0 to K - 1 by the codes that occur."""
    maps = torch.load(folder / TOKEN_MAPS, weights_only=True, map_location="cpu")
    cases = [f"case_{number:03d}" for number in range(104) if number not in NOT_TRAINING]
    tokens = torch.stack([torch.as_tensor(each) for each in maps]).unflatten(1, GRID)
    return dict(zip(cases, tokens.unique(return_inverse=True)[1], strict=True))


def explained(tokens: torch.Tensor, share: torch.Tensor) -> float:
    """R2 of the share of vessel in each cell (L,) as a function of its token (L,): the mean of the cells with it."""
    cells = tokens.bincount().clamp_min(1)
    mean = torch.zeros(len(cells)).index_add(0, tokens, share) / cells
    return float(1 - (share - mean[tokens]).var() / share.var())


def match(maps: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    """:func:`explained` for each of the pairs (N, 2, *spatial) by each of the token maps (M, *GRID), N lists of M."""
    shares = F.avg_pool3d((labels > 0).float().mean(1, keepdim=True), CELL).flatten(1)  # (N, 1, *GRID) -> (N, L)
    return [[explained(each, share) for each in maps.flatten(1)] for share in shares]


class TokenEmbedding(nn.Embedding):
    """Tokens int64 (N, *grid) as float (N, width, *grid), the layout of convolutions."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed the tokens."""
        return super().forward(tokens).movedim(-1, 1)  # (N, *grid, width) -> (N, width, *grid)


class ResidualBlock(nn.Module):
    """Residual block of two normalised convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.GroupNorm(8, width), nn.GELU(), nn.Conv3d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv3d(width, width, 1),
        )  # fmt: skip

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Float (N, width, *grid), before and after."""
        return grid + self.change(grid)


def new_decoder(codes: int, width: int = 64) -> nn.Module:
    """From tokens int64 (N, *grid), where ``codes`` means hidden, to logits of vessel (N, 2, *spatial)."""

    def doubled(channels: int, fewer: int) -> list[nn.Module]:
        return [nn.ConvTranspose3d(channels, fewer, 4, 2, 1), nn.GroupNorm(4, fewer), nn.GELU()]

    return nn.Sequential(
        TokenEmbedding(codes + 1, width), ResidualBlock(width), *doubled(width, width), *doubled(width, width // 2),
        *doubled(width // 2, width // 4), nn.Conv3d(width // 4, 2, 3, padding=1),
    )  # fmt: skip


def train_decoder(tokens: torch.Tensor, labels: torch.Tensor, codes: int, path: Path) -> nn.Module:
    """Train the decoder on tokens (N, *GRID) and pairs (N, 2, *spatial), on random patches with some tokens hidden."""
    samples = Samples(len(tokens), 2, 0)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        shown, targets = [], []
        for index, random in zip(samples.chosen(step), samples.generators(step, "patch"), strict=True):
            first = [int(torch.randint(size - CROP + 1, (1,), generator=random)) for size in GRID]
            here = [slice(start, start + CROP) for start in first]
            voxels = [slice(CELL * start, CELL * (start + CROP)) for start in first]
            patch = tokens[(index, *here)]
            hidden = torch.rand(patch.shape, generator=random) < HIDDEN
            shown.append(patch.masked_fill(hidden, codes))
            targets.append(labels[(index, slice(None), *voxels)] > 0)
        return torch.stack(shown), torch.stack(targets).float()

    def loss(model: nn.Module, parts: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits, target = model(parts[0]), parts[1]
        vessel, axes = logits.sigmoid(), (0, 2, 3, 4)
        overlap = 2 * (vessel * target).sum(axes) / (vessel + target).sum(axes).clamp_min(1)
        weight = torch.tensor(2.5)  # of vessel voxels, as in the loss of the autoencoder
        entropy = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
        return {"loss": entropy + (1 - overlap).mean()}

    torch.manual_seed(0)
    model = new_decoder(codes)
    settings = replace(get_profile("laptop", 3).vqae, steps=STEPS, batch=2, learning_rate=RATE)
    fit(model, loss, batch, settings, progress=Progress(path, {"steps": STEPS}, Saving()), description="decoder")
    return model.eval()


@torch.no_grad()
def decoded(model: nn.Module, tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Pairs uint8 (N, 2, *spatial): in each image, the ``share`` of the voxels with the highest logits is vessel."""
    images = []
    for each in tokens.split(1):
        logits = model(each).flatten(2)  # (1, 2, *spatial) -> (1, 2, voxels)
        lowest = logits[..., ::7].quantile(1 - share, dim=-1, keepdim=True)  # of every seventh voxel, which is faster
        images.append((logits > lowest).unflatten(2, [CELL * size for size in GRID]).byte())
    return torch.cat(images)


def on_vessels(points: torch.Tensor, image: torch.Tensor) -> float:
    """The share of points (K, 3) that lie on vessels of an image (H, W, D), the box of one moved to that of the other.

    The whole volume of most patients is not public, so their points cannot be placed more exactly.
    """
    (low, high), (first, last) = box_of(points), box_of_vessels(image)
    placed = (points - low) * ((last - first) / (high - low)) + first
    voxels = fields.resize_points(placed, FRAME, image.shape).round().long()
    inside = ((voxels >= 0) & (voxels < torch.tensor(image.shape))).all(1)
    return float(image[tuple(voxels[inside].T)].float().mean())


def points_on_vessels(folder: Path, images: dict[str, torch.Tensor], known: Sequence[str]) -> dict[str, float]:
    """Mean share of fixed points on the decoded vessels: of the same case, of another, and in the box by chance."""
    cases = [case for case in images if case not in known and (folder / CORRESPONDENCES / f"{case}.csv").exists()]
    points = {case: read_correspondences(folder / CORRESPONDENCES / f"{case}.csv")[:, 0] for case in cases}
    others = dict(zip(cases, [*cases[1:], cases[0]], strict=True))

    def by_chance(image: torch.Tensor) -> float:
        low, high = fields.resize_points(box_of_vessels(image), FRAME, image.shape).long()
        return float(image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].float().mean())

    shares = {
        "same_case": [on_vessels(points[case], images[case]) for case in cases],
        "another_case": [on_vessels(points[case], images[others[case]]) for case in cases],
        "chance": [by_chance(images[case]) for case in cases],
    }
    return {"cases": len(cases)} | {name: sum(values) / len(values) for name, values in shares.items()}


def train_denoiser(tokens: torch.Tensor, codes: int, run: Run) -> absorbing.Denoiser:
    """The denoiser of `laptop` on token maps (N, *GRID), four at a time."""
    settings = replace(run.profile.denoiser, batch=4, given=0.0)
    samples, sequences = Samples(len(tokens), settings.batch, run.seed), tokens.flatten(1)

    def batch(step: int) -> absorbing.Batch:
        return absorbing.training_batch(sequences[samples.chosen(step)], codes, samples.generators(step, "mask"))

    torch.manual_seed(run.seed)
    model = absorbing.Denoiser(settings, codes, GRID)
    progress = Progress(run.path / "denoiser-of-maps.progress", {"steps": settings.steps}, Saving())
    fit(model, absorbing.training_loss, batch, settings, fabric=new_fabric(True), progress=progress)
    return model.eval()


def look(pairs: torch.Tensor) -> dict[str, float]:
    """Connected components of an image, and Dice of fixed with moving, means over pairs (N, 2, *spatial)."""
    components = metrics.compare_components(pairs, pairs)["real"]
    overlap = float(metrics.mean_dice(pairs[:, 0], pairs[:, 1], 2).mean())
    return {"components": components["number"], "pair_dice": overlap}


def measure(run: Run) -> dict[str, Any]:
    """Measure all parts that the module names."""
    folder, pairs = find_lung250m(run.data), run.train
    maps = read_token_maps(folder)
    cases, tokens = list(maps), torch.stack(list(maps.values()))
    codes = int(tokens.max()) + 1
    known = [name[:8] for name in pairs.names]
    seen = [index for index, case in enumerate(known) if case not in LEFT_OUT]
    left = [index for index, case in enumerate(known) if case in LEFT_OUT]
    of_pairs = torch.stack([maps[case] for case in known])
    share = float((pairs.labels[seen] > 0).float().mean())
    run.path.mkdir(parents=True, exist_ok=True)
    decoder = train_decoder(of_pairs[seen], pairs.labels[seen], codes, run.path / "decoder.progress")
    again = decoded(decoder, of_pairs, share)
    dice = torch.stack([metrics.dice(again[:, i], pairs.labels[:, i], 2).flatten() for i in (0, 1)], 1)  # (N, 2)
    everyone = decoded(decoder, tokens, share)
    held = list(range(5, len(tokens), 10))
    learned = [index for index in range(len(tokens)) if index not in held]
    denoiser = train_denoiser(tokens[learned], codes, run)
    with torch.no_grad(), new_fabric(True).autocast():
        bits = {
            name: float(
                absorbing.bits_per_token(denoiser, tokens[which].flatten(1), codes, generator(0, "bits")).mean()
            )
            for name, which in {"learned": learned[:20], "held_out": held}.items()
        }
        drawn = torch.cat([
            absorbing.sample(denoiser, 8, denoiser.length, codes, generator(0, "shard", shard), 64, 0.9, "cosine")
            for shard in range(SHARDS)
        ])  # fmt: skip
    sampled = decoded(decoder, drawn.unflatten(1, GRID), share)
    motions = read_motions(folder)
    test = moved_pairs(pairs, motions, BREATHS)
    profile = replace(run.profile, registration=replace(run.profile.registration, steps=SHORT))
    short, rows = replace(run, profile=profile), []
    for name, images in {"decoded": everyone, "sampled": sampled}.items():
        names = tuple(f"{name}_{index:02d}_fixed~{name}_{index:02d}_moving" for index in range(len(images)))
        training = images_with_themselves(PairSet(images, pairs.label_names, pairs.spacing, names))
        network = train_registration(short, training, name, warped=True, motions=motions).model
        method = partial(register, profile=profile, network=network, instance=False)
        row = summarise(list(evaluate(test, method)), test.label_names)
        parts: dict[str, list[float]] = {"left_out": [], "others": []}
        for case in row["cases"]:
            parts["left_out" if case["name"][:8] in LEFT_OUT else "others"].append(case["tre_mm"])
        rows.append({"training": name, "steps": SHORT, "tre_mm": row["tre_mm"]}
                    | {f"tre_mm_{part}": sum(values) / len(values) for part, values in parts.items()})  # fmt: skip
        print(rows[-1], flush=True)
    entropy = torch.distributions.Categorical(probs=tokens[learned].flatten().bincount().double()).entropy()
    some = [index for index, case in enumerate(cases) if case not in known][:: len(cases) // SHOWN][:SHOWN]
    pictures = {
        "real": pairs.labels[left, 0], "decoded": again[left, 0], "others": everyone[some, 0],
        "sampled": sampled[:SHOWN, 0],
    }  # fmt: skip
    return {
        "cases": cases,
        "known": known,
        "codes": codes,
        "match": match(tokens, pairs.labels),
        "entropy": float(entropy) / float(torch.tensor(2.0).log()),
        "dice": {"seen": dice[seen].mean(0).tolist(), "left_out": dice[left].mean(0).tolist()},
        "points": points_on_vessels(folder, dict(zip(cases, everyone[:, 0], strict=True)), known),
        "points_real": points_on_vessels(folder, dict(zip(known, pairs.labels[:, 0], strict=True)), ()),
        "look": {"real": look(pairs.labels), "decoded": look(everyone), "sampled": look(sampled)},
        "bits_per_token": bits,
        "registration": rows,
        "pictures": {name: pack_labels(depth_maps(images)) for name, images in pictures.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_maps", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_DATA")
    parser.add_argument("--run", type=Path, required=True, help="folder for the trainings' progress")
    parser.add_argument("--json", type=Path, default=Path("book/results/token_maps.json"))
    chosen = parser.parse_args()
    run = Run("lung250m", get_profile("laptop", 3), folder=chosen.run, data=chosen.data)
    measured = measure(run)
    write_json(chosen.json, measured | {"provenance": provenance("laptop", run.seed, best_device())})
    print({name: measured[name] for name in ("dice", "points", "points_real", "look", "bits_per_token")})


if __name__ == "__main__":
    main()

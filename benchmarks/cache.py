"""The teacher's cache: seconds and bytes to fill, passes until it pays, and whether its targets are the teacher's own.

    python benchmarks/cache.py DATA OUT.json [--images 128] [--rounds 2]

DATA holds class folders of JPEGs. Teachers with random weights at 224 px, batches of 32, views that crop and mirror:
ResNet-50's logits (5 numbers), its embedding (2,048) and its last map but one (1,024 x 14 x 14), ViT-S's tokens
(384 x 14 x 14). A pass over the images is timed, the teacher's answers alone (the views are drawn before): asked
(``online``), asked and kept (``filling``), read (``reading``), in turns. Beside it the bytes on disk, in float32 and in
float16.

It pays after ``filling / (online - reading)`` passes, if the same views come again that often: a cache of V views
has paid after V times as many epochs.

Equality: bits of what is read against the teacher asked again, in the same batches and in batches of another order (a
matrix product may choose another way for another batch), and the largest difference of float16 relative to the
deviation of the values.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import leave, processor, spread
from training import versions

KINDS = {
    "logits": ("resnet50", "logits"),
    "embedding": ("resnet50", "pooled"),
    "map": ("resnet50", "stage4"),
    "tokens": ("vit_small_patch16_224", "stage12"),
}
CLASSES, SIZE, BATCH = 5, 224, 32


def main() -> None:
    from histill.data import Augment, pack, read_images
    from histill.machine import at_speed, launch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, at_speed(launch("cpu", "auto", (), Path())):
        folder = Path(scratch)
        for place in sorted(p for p in arguments.data.iterdir() if p.is_dir() and any(p.glob("*.jp*g")))[:CLASSES]:
            (folder / "data" / place.name).mkdir(parents=True)
            for file in sorted(place.glob("*.jp*g"))[: -(-arguments.images // CLASSES)]:
                shutil.copyfile(file, folder / "data" / place.name / file.name)
        os.environ["HISTILL_CACHE"] = str(folder / "home")
        packed = pack(read_images(folder / "data"), SIZE)
        kind = {"augment": Augment(vflip=False, zoom=0.46, shift=0.14), "seed": 0}
        count = min(arguments.images, len(packed.images)) // BATCH * BATCH

        def batches(order: np.ndarray) -> list[Any]:
            return [packed.batch(order[at : at + BATCH], **kind) for at in range(0, count, BATCH)]

        order = np.random.default_rng(0).permutation(count)
        first, other = batches(order), batches(np.random.default_rng(1).permutation(count))
        kinds = {name: measure(*KINDS[name], first, other, folder / name, arguments.rounds) for name in arguments.kinds}
    found = {
        "command": "python benchmarks/cache.py DATA OUT.json",
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions("torch", "timm", "numpy"),
        "images": count,
        "kinds": kinds,
        "seconds": time.monotonic() - began,
    }
    leave(arguments.out, found, table(found))


def measure(network: str, output: str, first: list[Any], other: list[Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Of one output of one teacher."""
    from histill.models import Timm
    from histill.teachers import Cached, Frozen

    torch.manual_seed(0)
    teacher = Frozen(Timm(network, CLASSES))
    images = sum(len(batch.ids) for batch in first)
    made = iter(range(1000))

    def cached(dtype: torch.dtype = torch.float32) -> Cached:
        place = folder / str(next(made))
        place.mkdir(parents=True)
        numbers = int(max(batch.ids.max() for batch in first)) + 1
        return Cached(teacher, place, images=numbers, views=1, identity={}, outputs=(output,), dtype=dtype)

    def ask(who: Callable[[Any], Any], batches: list[Any]) -> list[torch.Tensor]:
        return [who(batch)[output] for batch in batches]

    teacher(first[0])  # warm-up
    seconds: dict[str, list[float]] = {"online": [], "filling": [], "reading": []}
    for number in range(rounds):
        kept = cached()

        def filling(kept: Any = kept) -> None:
            ask(kept, first)
            kept.flush()

        def reading(kept: Any = kept) -> None:
            if not kept.asked:
                filling()
            ask(kept, first)

        ways = {"online": lambda: ask(teacher, first), "filling": filling, "reading": reading}
        for name in ways if number % 2 == 0 else ("filling", "reading", "online"):
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    bits = {}
    for name, batches in (("same batches", first), ("other batches", other)):
        pairs = list(zip(ask(kept, batches), ask(teacher, batches)))
        bits[name] = {
            "share_of_equal_values": float(np.mean([float((a == b).float().mean()) for a, b in pairs])),
            "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
        }
    half = cached(torch.float16)
    ask(half, first)
    half.flush()
    deviation = float(torch.cat(ask(kept, first)).std())
    error = max(float((a - b).abs().max()) for a, b in zip(ask(half, first), ask(kept, first)))
    online, fill, read = (float(np.median(seconds[name])) for name in seconds)
    return {
        "teacher": network,
        "output": output,
        "shape": list(ask(kept, first[:1])[0].shape[1:]),
        "images_per_second": {name: spread([images / s for s in its]) for name, its in seconds.items()},
        "fill_s_per_1000_images": 1000 * fill / images,
        "bytes_per_view": size(kept.folder, output) / images,
        "bytes_per_view_float16": size(half.folder, output) / images,
        "passes_until_it_pays": fill / (online - read) if online > read else None,
        "equality": bits,
        "float16_largest_difference_of_deviation": error / deviation,
    }


def size(folder: Path, output: str) -> int:
    return (folder / f"{output}.npy").stat().st_size + (folder / "known.npy").stat().st_size


def table(found: dict[str, Any]) -> str:
    rows = [
        f"{found['images']} images, {found['machine']['processor']}, {found['machine']['cores']} cores",
        "",
        f"{'what':10s} {'shape':>16s} {'online':>8s} {'filling':>8s} {'reading':>9s} {'bytes/view':>11s} "
        f"{'float16':>10s} {'pays after':>11s} {'equal, same':>12s} {'other batches':>14s}",
        f"{'':10s} {'':16s} {'images/s':>8s} {'images/s':>8s} {'images/s':>9s} {'':11s} {'':10s} {'passes':>11s}",
    ]
    for name, one in found["kinds"].items():
        rate = {way: its["median"] for way, its in one["images_per_second"].items()}
        shape = " x ".join(map(str, one["shape"]))
        pays = one["passes_until_it_pays"]
        equal = [one["equality"][b]["share_of_equal_values"] for b in ("same batches", "other batches")]
        rows.append(
            f"{name:10s} {shape:>16s} {rate['online']:8.1f} {rate['filling']:8.1f} {rate['reading']:9.0f} "
            f"{one['bytes_per_view']:11,.0f} {one['bytes_per_view_float16']:10,.0f} "
            f"{'never' if pays is None else f'{pays:.2f}':>11s} {equal[0]:12.2%} {equal[1]:14.2%}"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()

"""From a slide file to everything on disk: minutes, and where they go, on the real slides and on a large mosaic of one.

    python benchmarks/real_slides.py DATA [--side 50176]

DATA holds ``CMU-1-Small-Region.svs`` (Aperio, JPEG tiles, 0.499 um/px) and ``TCGA-CR-7395-01A-01-TS1.svs`` (JPEG 2000,
which is read by OpenSlide; its file names no resolution, and 0.5 um/px is assumed). The mosaic is that of
`benchmarks/slides.py`, ``--side`` pixels wide and high. The network is its ResNet-18 with random weights, in bf16 and
in int8; tissue is found by Histill; the results are what `histill slide` leaves: table, heatmap, DeepZoom, outlines,
page. One slide that is not counted goes before. Memory is the largest sum over the processes, sampled twice a second
(PSS). Writes benchmarks/results/real_slides.json and .txt.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, leave, processor
from slides import SECTION, UNIT, Memory, read_region, write_case, write_models

from histill.slides import open_slide, predict_slides

ASSUMED = {"TCGA-CR-7395-01A-01-TS1": 0.5}
"""um/px, where the file is silent."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("run", {"precision": "bf16"}),
    "int8": ("model.int8.onnx", {}),
}


def looked(model: Path, options: dict[str, Any], slide: Path, out: Path) -> dict[str, Any]:
    """Seconds from the model's file to the results on disk, by what they went into."""
    memory, start = Memory(os.getpid()), time.perf_counter()
    found = predict_slides(
        model, [slide], out, slide_mpp=ASSUMED.get(slide.stem), mpp=0.5, lesions=("tumour",), **options
    )
    seconds = time.perf_counter() - start
    (said,) = found["slides"].values()
    with open_slide(slide, mpp=ASSUMED.get(slide.stem)) as opened:
        about = {"dimensions": list(opened.dimensions), "mpp": opened.mpp, "reader": opened.reader}
    spent = {"seconds": seconds, "timing": said["timing"], "peak_bytes": memory.found()}
    return {**about, "tiles": said["tiles"]["looked_at"], **spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--side", type=int, default=28 * UNIT, help=f"of the mosaic, in whole {UNIT} px (default: 50,176)"
    )
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        region = read_region(arguments.data / "CMU-1-Small-Region.svs")
        warm = write_case(folder / "warm", region, 2 * UNIT, 2.0)
        large = write_case(folder / "mosaic", region, arguments.side, SECTION)
        models = write_models(folder / "models", warm)
        slides = [arguments.data / f"{name}.svs" for name in ("CMU-1-Small-Region", "TCGA-CR-7395-01A-01-TS1")]
        for name, (file, options) in MODELS.items():
            looked(models / file, options, Path(warm["slide"]), folder / f"warm-{name}")
            for slide in (*slides, Path(large["slide"])):
                found = looked(models / file, options, slide, folder / f"{slide.stem}-{name}")
                rows.append({"slide": slide.stem, "model": name, **found})
    machine = {"processor": processor(), "cores": os.cpu_count()}
    found = {"command": "python benchmarks/real_slides.py DATA", "machine": machine, "rows": rows}
    leave(RESULTS / "real_slides.json", found, table(found))


def table(found: dict[str, Any]) -> str:
    parts = list(found["rows"][0]["timing"])
    lines = [f"{found['machine']['processor']}, {found['machine']['cores']} cores; seconds, and GB at most"]
    lines.append(f"{'slide':<26}{'pixels':>17}{'model':>7}{'tiles':>8}{'seconds':>9}{'tiles/s':>9}")
    lines[-1] += "".join(f"{part:>13}" for part in parts) + f"{'memory':>9}"
    for row in found["rows"]:
        width, height = row["dimensions"]
        line = f"{row['slide']:<26}{f'{width:,} x {height:,}':>17}{row['model']:>7}{row['tiles']:>8,}"
        line += f"{row['seconds']:>9.1f}{row['tiles'] / row['seconds']:>9.1f}"
        line += "".join(f"{row['timing'][part]['wall_s']:>13.1f}" for part in parts)
        lines.append(f"{line}{row['peak_bytes'] / 1e9:>9.2f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""The main job on phantom tissue, so that anyone can see it work without an image of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from histill.data.phantom import write_images
from histill.distill import distill
from histill.errors import BadInput
from histill.files import write_json
from histill.progress import say

__all__ = ["demo"]

TISSUE: dict[str, Any] = {"patients": 120, "images_per_patient": 6, "size": 64, "mpp": 1.0}
STUDENT: dict[str, Any] = {"image_size": 64, "epochs": 40, "views": 8, "positive": "malignant"}
TEACHER: dict[str, Any] = {"network": "resnet18", "weights": "none", "lr": 1e-3, "epochs": 20, "image_size": 64}


def demo(out: Path, *, seed: int = 0) -> tuple[dict[str, Any], Path]:
    """Draw phantom tissue, train a teacher, a student alone and a distilled student, and write the report.

    The tissue is small and the teacher a ResNet-18 from random weights, so that two cores take a few minutes; the
    recipe is DSNet's.

    Returns:
        What ``summary.json`` holds, and the report's path.

    Raises:
        BadInput: ``out`` holds something already.
    """
    if (out / "summary.json").exists() or (out / "distill.json").exists():
        raise BadInput(f"{out} holds a demo already; give another --out, or remove it")
    tissue = out / "phantom"
    if not tissue.exists():
        say("drawing phantom tissue")
        write_images(tissue, seed=seed, **TISSUE)
    write_json(
        out / "distill.json", {"recipe": "dsnet", "arguments": {"data": str(tissue / "manifest.csv"), "seed": seed}}
    )
    summary = distill(
        "dsnet",
        tissue / "manifest.csv",
        out,
        seed=seed,
        val=0.2,
        test=0.3,
        student_arguments=STUDENT,
        teacher_arguments=TEACHER | {"positive": STUDENT["positive"]},
    )
    return summary, out / "report.html"

"""The main job on phantom tissue, so that anyone can see it work without an image of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from histill.data.phantom import write_images
from histill.distill import distill
from histill.errors import BadInput
from histill.files import read_json, write_json
from histill.progress import say

__all__ = ["demo"]

TISSUE: dict[str, Any] = {
    "kinds": ("benign", "malignant", "gland", "vacuolated"),
    "patients": 144,
    "images_per_patient": 8,
    "size": 48,
    "mpp": 1.0,
    "difficulty": 0.3,
}
STUDENT: dict[str, Any] = {
    "image_size": 48,
    "epochs": 24,
    "batch_size": 32,
    "views": 8,
    "temperature": 4.0,
    "t_squared": True,
}
TEACHER: dict[str, Any] = {
    "network": "resnet10t",
    "weights": "none",
    "image_size": 48,
    "epochs": 10,
    "batch_size": 32,
    "lr": 1e-3,
}


def demo(out: Path, *, seed: int = 0) -> tuple[dict[str, Any], Path]:
    """Draw phantom tissue, train a teacher, a student alone and a distilled student, and write the report.

    The pictures are small and the teacher a ResNet-10 from random weights, so that two cores take a few minutes; the
    recipe is DSNet's, at T = 4 with T squared.

    Interrupted, it goes on where it was; done, it is not done again.

    Returns:
        What ``summary.json`` holds, and the report's path.

    Raises:
        BadInput: ``out`` holds another distillation.
    """
    arguments = {"seed": seed, "val": 0.15, "test": 0.35, **STUDENT}
    arguments |= {f"teacher_{name}": value for name, value in TEACHER.items()}
    record = {"recipe": "dsnet", "arguments": {"data": str(tissue := out / "phantom" / "manifest.csv"), **arguments}}
    if begun := (out / "distill.json").exists():
        if read_json(out / "distill.json") != record:
            raise BadInput(f"{out} holds another distillation; give another --out, or remove it")
        if (out / "summary.json").exists():
            return read_json(out / "summary.json"), out / "report.html"
    if not tissue.exists():
        say("drawing phantom tissue")
        write_images(tissue.parent, seed=seed, **TISSUE)
    write_json(out / "distill.json", record)
    split = {name: arguments[name] for name in ("seed", "val", "test")}
    summary = distill("dsnet", tissue, out, resume=begun, student_arguments=STUDENT, teacher_arguments=TEACHER, **split)
    return summary, out / "report.html"

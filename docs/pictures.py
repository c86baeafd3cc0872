"""The pictures of ``docs/concepts``, from phantom tissue: ``python docs/pictures.py`` writes ``docs/images/*.png``.

Every number in them is computed here, on images that anybody can draw again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import nn

from histill.data import Augment, pack, read_images, split
from histill.data.phantom import write_images
from histill.evaluate import Scores, figures_with_intervals, paired_gain
from histill.evaluate.calibration import fit_temperature
from histill.evaluate.figures import BLUE, MUTED, VERMILION, _drawing, reliability
from histill.evaluate.finish import tempered
from histill.evaluate.metrics import reliability as bins_of
from histill.teachers import Cached, Frozen
from histill.types import Outputs

OUT = Path(__file__).parent / "images"
AUGMENT = Augment(rotate=180, zoom=0.15, shift=0.05, brightness=0.15, contrast=0.15, saturation=0.15, hue=0.04)


class Asked(nn.Module):
    """Any network will do to count questions."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> Outputs:
        return Outputs(logits=self.head(images.mean((2, 3))))


def views(packed: Any, path: Path) -> None:
    """Views of two images, as a student at 48 pixels and a teacher at 96 see them."""
    rows = [int(packed.images.rows("train")[i]) for i in (0, 9)]
    numbers = [0, 1, 2, 3, 4]
    with _drawing(path, 7.6, 5.7) as figure:
        axes = figure.subplots(4, 1 + len(numbers))
        for block, row in enumerate(rows):
            at = np.array([row] * len(numbers))
            batch = packed.batch(at, torch.tensor(numbers), augment=AUGMENT, seed=0)
            for line, size in ((2 * block, 48), (2 * block + 1, 96)):
                here = axes[line]
                who = "student, 48 px" if size == 48 else "teacher, 96 px"
                original = packed.sized(size).batch(np.array([row])).images
                pictures = [original[0], *batch.at(size)]
                for column, (ax, picture) in enumerate(zip(here, pictures, strict=True)):
                    ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
                    ax.set(xticks=[], yticks=[])
                    ax.spines[:].set_visible(False)
                    if line % 2 == 0:
                        title = f"image {block}" if column == 0 else f"view {numbers[column - 1]}"
                        ax.set_title(title, fontsize=9, fontweight="normal")
                here[0].set_ylabel(who, fontsize=8)


def cache(packed: Any, path: Path) -> None:
    """How often the teacher is asked in each epoch, with four views and a cache, by two students."""
    rows = np.array(packed.images.rows("train"))
    asked: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for student in range(2):
            torch.manual_seed(0)  # the same teacher
            teacher = Cached(Frozen(Asked()), Path(folder), images=len(packed.labels), views=4, identity={"seed": 0})
            for epoch in range(8):
                before = teacher.asked
                order = np.random.default_rng([student, epoch]).permutation(len(rows))
                for part in np.array_split(order, 4):
                    teacher(packed.batch(rows[part], torch.full((len(part),), epoch % 4), augment=AUGMENT))
                asked.append(teacher.asked - before)
            teacher.flush()
    with _drawing(path, 6.4, 2.6) as figure:
        ax = figure.subplots()
        places = np.arange(16) + (np.arange(16) >= 8)
        read = [len(rows) - one for one in asked]
        ax.bar(places, asked, 0.8, color=VERMILION, label="the teacher is asked")
        ax.bar(places, read, 0.8, bottom=asked, color=BLUE, label="its answer is read")
        ax.set_xticks(places, [str(i % 8 + 1) for i in range(16)])
        ax.set(ylabel="answers an epoch", xlabel="first student, epochs 1 to 8       second student, epochs 1 to 8")
        figure.legend(loc="outside upper center", ncols=2)


def guesses(packed: Any, regularity: float) -> tuple[Scores, Scores, Scores]:
    """A classifier: a regression on 12 x 12 pixels; what it says of validation, test, and test by image."""
    frame = packed.images.frame
    small = packed.pixels[packed.stored].reshape(-1, 12, 4, 12, 4, 3).mean((2, 4)).reshape(len(frame), -1) / 255
    labels = packed.labels.numpy()
    parts = {name: np.array(packed.images.rows(name)) for name in ("train", "val", "test")}
    model = LogisticRegression(C=regularity, max_iter=2000).fit(small[parts["train"]], labels[parts["train"]])

    def judged(name: str, units: NDArray[Any]) -> Scores:
        return Scores(labels[parts[name]], model.predict_proba(small[parts[name]]), units[parts[name]])

    patients = frame["patient"].to_numpy()
    return judged("val", patients), judged("test", patients), judged("test", np.arange(len(frame)))


def calibration(val: Scores, test: Scores, path: Path) -> None:
    """Confidence against accuracy before and after the temperature that validation chose."""
    temperature = fit_temperature(np.log(np.clip(val.probabilities, 1e-12, None)), val.labels)
    after = tempered(test, temperature)
    reliability({"as it says": bins_of(test), f"logits / {temperature:.1f}": bins_of(after)}, path)


def intervals(test: Scores, by_image: Scores, other: Scores, path: Path) -> None:
    """One accuracy with its interval over images and over patients; two networks, and their paired difference."""
    rows = [
        ("network A, images taken as independent", figures_with_intervals(by_image)["accuracy"], MUTED),
        ("network A, over patients", figures_with_intervals(test)["accuracy"], BLUE),
        ("network B, over patients", figures_with_intervals(other)["accuracy"], VERMILION),
    ]
    gain = paired_gain(test, other, names=["accuracy"])["accuracy"]
    with _drawing(path, 7.2, 2.7) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[2, 1])
        for place, (_, found, colour) in enumerate(rows):
            left.hlines(-place, 100 * found["low"], 100 * found["high"], color=colour, linewidth=3)
            left.plot(100 * found["value"], -place, "o", color=colour, markersize=7)
        left.set_yticks([0, -1, -2], [name for name, _, _ in rows])
        left.set(xlabel="accuracy, %", ylim=(-2.6, 0.6))
        left.grid(True, axis="x")
        right.hlines(0, 100 * gain["low"], 100 * gain["high"], color=BLUE, linewidth=3)
        right.plot(100 * gain["value"], 0, "o", color=BLUE, markersize=7)
        right.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        right.set(yticks=[], ylim=(-1, 1), xlabel="points", title="B minus A, paired")
        right.grid(True, axis="x")


def main() -> None:
    """Draw them all."""
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_images(
            Path(folder) / "tissue", kinds=("benign", "gland"), patients=72, images_per_patient=6, size=96, seed=1
        )
        images = split(read_images(manifest), val=0.2, test=0.4, seed=0)
        packed = pack(images, 48, folder=Path(folder) / "packed")
        views(packed, OUT / "views.png")
        cache(packed, OUT / "cache.png")
        val, test, by_image = guesses(packed, 1.0)
        calibration(val, test, OUT / "calibration.png")
        intervals(test, by_image, guesses(packed, 0.01)[1], OUT / "intervals.png")


if __name__ == "__main__":
    main()

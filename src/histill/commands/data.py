"""Commands about images: look, fetch, unpack, enhance, draw."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from histill.commands import Count, data_app, show
from histill.errors import BadInput


@data_app.command
def check(data: Path, *, patient: str | None = None, out: Path | None = None, strict: bool = False) -> None:
    """Classes, sizes, copies across splits, unreadable files, a contact sheet.

    Args:
        data: a folder of class folders or of images/ and masks/, or a CSV manifest.
        patient: regular expression that reads the patient off an image's path.
        out: a folder for check.json and the contact sheet images.png.
        strict: an unreadable image is an error.
    """
    from histill.data import read_images, read_masks
    from histill.data.check import check as work
    from histill.data.masks import has_masks

    found = work((read_masks if has_masks(data) else read_images)(data, patient=patient), out)
    show(found)
    problems = [*found.errors, *(found.summary["unreadable"] if strict else [])]
    if problems:
        raise BadInput(problems[0])


@data_app.command
def enhance(
    images: Path,
    out: Path,
    *,
    weights: Path | None = None,
    scale: Count | None = None,
    tile: Count = 512,
    device: str = "auto",
    strict: bool = False,
) -> None:
    """Enlarge images before training, by a super-resolution network or plain resampling; goes on where it stopped.

    Args:
        images: a folder (searched through) or a CSV manifest.
        out: a folder for the PNG files, which lie in it as the images lie in theirs, and for the manifest.
        weights: a .safetensors or .pth file of any network that spandrel knows, such as Real-ESRGAN; without it the
            images are resampled.
        scale: how many times as wide and high (default: the network's own; 2 without one).
        tile: side in pixels of what the network sees at once.
        device: auto, cpu, cuda or mps.
        strict: an unreadable image is an error; otherwise it is named and left out.
    """
    from histill.data.enhance import enhance as work

    show(work(images, out, weights=weights, scale=scale, tile=tile, device=device, strict=strict))


@data_app.command
def cifar(archive: Path, out: Path) -> None:
    """CIFAR-100 as class folders, from its binary archive.

    Args:
        archive: cifar-100-binary.tar.gz.
        out: a folder for train/ and test/.
    """
    from histill.data.cifar import unpack_cifar

    show(unpack_cifar(archive, out))


@data_app.command
def fetch(
    name: str | None = None, *, out: Path | None = None, by: Literal["patient", "image", "eva"] = "patient"
) -> None:
    """A published data set by name: download, verify, unpack, manifest; without a name the list of them.

    Args:
        name: which one.
        out: its folder (default: called like it); run again, it goes on where it stopped.
        by: patient keeps everybody in one split; image is the protocol of the literature, patients not looked at; eva
            has the splits of the eva benchmark, its validation part as the test.
    """
    from histill.data.fetch import fetch as work
    from histill.data.fetch import next_command
    from histill.data.sets import SETS, chosen, listing

    if name is None:
        show(listing(SETS.values()))
        return
    path = work(name, out, by=by)
    show(f"{path}\nnext: {next_command(chosen(SETS[name], by), path)}")


@data_app.command
def manifest(name: str, folder: Path, *, by: Literal["patient", "image", "eva"] = "patient") -> None:
    """The manifest of a published data set that is there already, in its published layout.

    Args:
        name: which one (histill data fetch lists them).
        folder: where it lies; the manifest is written into it.
        by: patient keeps everybody in one split; image is the protocol of the literature, patients not looked at; eva
            has the splits of the eva benchmark, its validation part as the test.
    """
    from histill.data.fetch import next_command
    from histill.data.sets import chosen, get
    from histill.data.sets import manifest as work

    path = work(get(name), folder, by=by)
    show(f"{path}\nnext: {next_command(chosen(get(name), by), path)}")


@data_app.command
def unpack(archive: Path, out: Path) -> None:
    """A zip or tar archive into a new folder; whatever would leave it, or swell beyond measure, is refused.

    Args:
        archive: the .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz file.
        out: the folder.
    """
    from histill.data.archives import unpack as work

    show(f"{work(archive, out)} files in {out}")


@data_app.command
def phantom(
    out: Path,
    *,
    patients: int = 60,
    images_per_patient: int = 8,
    size: int = 96,
    kinds: list[str] | None = None,
    unlabelled: int = 0,
    masks: bool = False,
    slide: bool = False,
    seed: int = 0,
) -> None:
    """Phantom tissue: H&E-like images with patients, scanners and masks, or a whole pyramidal slide.

    Args:
        out: a folder for the images and manifest.csv, or with --slide a .tiff file.
        patients: how many.
        images_per_patient: how many of each.
        size: height and width in pixels.
        kinds: tissue kinds (default: benign and malignant).
        unlabelled: how many further images without labels.
        masks: also nucleus masks.
        slide: one slide instead of images.
        seed: of everything.
    """
    from histill.data import phantom as draw

    if slide:
        if out.exists():
            raise BadInput(f"{out} is there already; give another name")
        show(draw.write_slide(out, seed=seed))
        return
    chosen = tuple(kinds) if kinds else ("benign", "malignant")
    show(
        draw.write_images(
            out,
            kinds=chosen,
            patients=patients,
            images_per_patient=images_per_patient,
            size=size,
            unlabelled=unlabelled,
            masks=masks,
            seed=seed,
        )
    )

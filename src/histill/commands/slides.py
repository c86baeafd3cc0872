"""Commands about whole slides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from histill.commands import Count, app, show


@app.command
def slide(
    model: Path,
    *slides: Path,
    out: Path,
    mpp: float | None = None,
    slide_mpp: float | None = None,
    tile: int | None = None,
    overlap: int = 0,
    min_tissue: float = 0.1,
    batch_size: Count = 32,
    threads: Count | None = None,
    mask: Path | None = None,
    truth: Path | None = None,
    truth_classes: list[str] | None = None,
    lesions: list[str] | None = None,
    threshold: float | None = None,
    min_area_um2: float | None = None,
    coarse_to_fine: float | None = None,
    coarse_factor: float = 2.0,
    coarse_model: Path | None = None,
    features: bool = False,
    segment: list[str] | None = None,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16"] = "auto",
    runtime: Literal["auto", "torch"] = "auto",
    code: Path | None = None,
    resume: bool = True,
    ray: str | None = None,
) -> None:
    """Tiles, heatmap, lesions, GeoJSON and a page of whole slides; goes on where it stopped.

    Args:
        model: a run, an .onnx, OpenVINO or TorchScript file, or the folder of an export with early exit.
        slides: files that OpenSlide reads, OME-TIFF, or plain images.
        out: a folder; each slide gets one in it, and summary.json lies beside them.
        mpp: microns per pixel at which the model looks (default: what it was trained at).
        slide_mpp: those of the slides' finest level, where files do not say; taken for every slide, and said where a
            file says another.
        tile: side of a tile in pixels at --mpp (default: the model's image size).
        overlap: pixels at --mpp that a tile shares with the next.
        min_tissue: share of a tile that must be tissue.
        batch_size: tiles at once.
        threads: readers (default: the machine's cores, 8 at most); with --ray the cores of each worker (default: 1).
        mask: where to look: GeoJSON, an image over the slide, or a folder of them named like the slides.
        truth: reference masks in the same ways, for IoU, Dice and lesion FROC.
        truth_classes: names of a mask image's values 1, 2, ... (default: the model's classes; 0 and 1: any lesion).
        lesions: the classes that are lesions (default: the positive class, else all that do not sound healthy).
        threshold: of a lesion's probability (default: above every other class).
        min_area_um2: smaller lesions and holes are left out (default: a quarter of a tile).
        coarse_to_fine: a confidence, such as 0.95, at which the answer for a wider tile stands for all in it.
        coarse_factor: how many times as wide.
        coarse_model: what looks at the wider tiles (default: the same model).
        features: also features.h5, as CLAM reads it.
        segment: CLASS=MODEL, the network that outlines what was taken for that class; lesions are then of its mask.
        device: where a run computes: auto, cpu, cuda or mps; exported files compute on the CPU.
        precision: of a run: auto is bf16 where the machine computes it.
        runtime: of a run: auto is OpenVINO on a CPU, where the extra openvino is installed, else PyTorch.
        code: the Python file of a network that is not Histill's.
        resume: go on with what an earlier call left; --no-resume starts anew.
        ray: share the slides among a Ray cluster's workers: HOST:PORT, or auto for that of RAY_ADDRESS, else one of
            this machine's cores.
    """
    from histill.slides.options import by_class
    from histill.slides.predict import predict_slides, summary_lines

    summary = predict_slides(
        model,
        slides,
        out,
        device=device,
        precision=precision,
        runtime=runtime,
        code=code,
        mpp=mpp,
        slide_mpp=slide_mpp,
        tile=tile,
        overlap=overlap,
        min_tissue=min_tissue,
        batch_size=batch_size,
        threads=threads,
        mask=mask,
        truth=truth,
        truth_classes=tuple(truth_classes or ()),
        lesions=tuple(lesions or ()),
        threshold=threshold,
        min_area_um2=min_area_um2,
        coarse_to_fine=coarse_to_fine,
        coarse_factor=coarse_factor,
        coarse_model=coarse_model,
        features=features,
        segment=by_class(segment or []),
        resume=resume,
        ray=ray,
    )
    show(summary_lines(summary, out))


@app.command
def view(
    folder: Path,
    *,
    against: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
) -> None:
    """Slides, maps and lesions in a browser, until interrupted.

    Args:
        folder: what histill slide wrote with --out, or one slide's folder in it.
        against: the same of another model: its maps beside, and where the two disagree.
        host: where to listen; off this machine a token is required, and made where none is given.
        port: 0 for any that is free.
        token: required of every request.
    """
    from histill.slides.view import view as work

    def ready(address: str) -> None:
        show(address)
        sys.stdout.flush()

    work(folder, against=against, host=host, port=port, token=token, ready=ready)


@app.command
def tiles(
    *slides: Path,
    out: Path,
    masks: Path | None = None,
    preset: Literal["lesion", "pretrain"] | None = None,
    mpp: float | None = None,
    slide_mpp: float | None = None,
    tile: Count | None = None,
    stride: Count | None = None,
    share: float | None = None,
    min_tissue: float | None = None,
    min_kb: float | None = None,
    background: str | None = None,
    classes: list[str] | None = None,
    label: str | None = None,
    patient: str | None = None,
    site: str | None = None,
    workers: Count | None = None,
) -> None:
    """Training patches from slides, with a manifest.csv that distill takes; goes on where it stopped.

    Args:
        slides: slides, or folders of them.
        out: a folder for the patches, which lie in class folders, and manifest.csv.
        masks: a folder with a mask image (values are classes, 0 is none) or QuPath GeoJSON called like each slide.
        preset: lesion (512 px at 20x, half overlapping, more than 3/4 of one class; with masks) or pretrain (1024 px at
            20x side by side, without labels).
        mpp: microns per pixel of a patch (presets: 0.5, which is 20x).
        slide_mpp: the slides' own microns per pixel, where files do not say; it stands for every slide, and is
            told where a file says another.
        tile: side of a patch in pixels.
        stride: pixels from one patch to the next (lesion: half of --tile; pretrain: all of it).
        share: a patch belongs to a class that covers more than this share of it (lesion: 0.75).
        min_tissue: the share of a patch that must be tissue (lesion: 0.5; pretrain: not asked for).
        min_kb: kilobytes that its PNG must have (lesion: 330, for 512 px; pretrain: any).
        background: the label of patches in which nothing is marked; empty: they are left out.
        classes: names of a mask's values from 1 on, or which classes of the GeoJSON are used.
        label: regular expression that reads a slide's class off its path, for masks that only say where a lesion is.
        patient: regular expression that reads the patient off a slide's path (default: a TCGA barcode's, or its name).
        site: regular expression that reads the site off a slide's path (default: a TCGA barcode's).
        workers: patches encoded at once (default: one per processor).
    """
    from histill.slides.cut import cut_slides

    found = cut_slides(
        slides,
        out,
        masks=masks,
        preset=preset,
        classes=classes or (),
        label=label,
        patient=patient,
        site=site,
        slide_mpp=slide_mpp,
        workers=workers,
        mpp=mpp,
        tile=tile,
        stride=stride,
        share=share,
        min_tissue=min_tissue,
        min_kb=min_kb,
        background=background,
    )
    show(found)

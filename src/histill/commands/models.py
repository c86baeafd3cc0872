"""Commands about runs, models and what there is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Literal

from histill.commands import Count, Seconds, app, show

Format = Literal["onnx", "openvino", "torchscript", "qupath"]


@app.command
def demo(*, out: Path = Path("demo"), seed: int = 0) -> None:
    """The main job on phantom tissue: teacher, student alone, distilled student, comparison, export, report.

    Args:
        out: where the results go.
        seed: of the phantom tissue and the trainings.
    """
    from histill.demo import demo as work
    from histill.distill_verb import summary_lines

    summary, page = work(out, seed=seed)
    show(summary_lines(summary))
    show(f"report: {page}")


@app.command
def evaluate(
    run: Path,
    *,
    data: Path | None = None,
    patient: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    code: Path | None = None,
) -> None:
    """Figures of a run with 95 % intervals.

    Args:
        run: a run folder.
        data: other labelled images to judge it on (a folder of class folders or a manifest).
        patient: regular expression that reads the patient off an image's path.
        out: a JSON file for the figures.
        device: where the images of --data are judged: auto, cpu, cuda or mps.
        code: the Python file of a network that is not Histill's.
    """
    from histill.evaluate.finish import table_of
    from histill.evaluate.judge import judge
    from histill.files import write_json

    figures = judge(run, data, patient=patient, device=device, code=code)
    if out is not None:
        write_json(out, figures)
    show(table_of(figures))


@app.command
def compare(*runs: Path, split: Literal["test", "val"] = "test", out: Path | None = None) -> None:
    """Runs side by side on the same images, with paired differences from the first.

    Args:
        runs: run folders, two or more.
        split: the split that is compared.
        out: a folder for summary.json.
    """
    from histill.comparison import compare as work
    from histill.files import write_json

    found = work(*runs, split=split)
    if out is not None:
        write_json(out / "summary.json", found.summary)
    show(found)


@app.command
def predict(
    model: Path,
    images: Path,
    *,
    out: Path,
    batch_size: Count = 32,
    strict: bool = False,
    device: str = "auto",
    code: Path | None = None,
) -> None:
    """Class and probabilities of every image in a folder, or its mask where the model outlines.

    A model that outlines writes, beside OUT.csv, OUT.masks/ (a PNG of each image at its own size: class numbers, or
    numbers of nuclei) and OUT.outlines/ (the image with outlines). The table then has each class's share of the pixels,
    its area where the microns per pixel are known, the number of nuclei, and the mean confidence.

    Args:
        model: a run, an .onnx, OpenVINO's .xml or a TorchScript file, or the folder of an export with early exit.
        images: an image, a folder (searched through) or a CSV manifest with a column path (and, where known, mpp).
        out: a .csv or .parquet file.
        batch_size: images at once.
        strict: an unreadable image is an error; otherwise it is named and left out.
        device: where a run computes: auto, cpu, cuda or mps; exported files compute on the CPU.
        code: the Python file of a network that is not Histill's.
    """
    from histill.deploy.serve import predict as work

    work(model, images, out, batch_size=batch_size, strict=strict, device=device, code=code)


@app.command
def export(
    run: Path,
    *,
    format: Format = "onnx",
    out: Path | None = None,
    int8: bool = False,
    early_exit: float | None = None,
    mpp: float | None = None,
    code: Path | None = None,
) -> None:
    """The student for deployment, checked against its run on validation images.

    Args:
        run: a run folder.
        format: onnx, openvino (an .xml with its .bin), torchscript, or qupath (the folder that QuPath's WSInfer
            extension loads).
        out: the file or folder (default: beside the run's weights).
        int8: also a static int8 file, ONNX or OpenVINO, calibrated on validation images.
        early_exit: accuracy (a share, such as 0.01) that may be lost on validation where images leave a network with
            exits at the first that is sure; writes a folder with an ONNX file per exit.
        mpp: microns per pixel of the training images, which qupath needs.
        code: the Python file of a network that is not Histill's.
    """
    from histill.deploy.deliver import export as work

    for line in work(run, out, format=format, int8=int8, early_exit=early_exit, mpp=mpp, code=code).lines():
        show(line)


@app.command
def bench(
    *models: Path,
    out: Path | None = None,
    batch_size: Count = 16,
    seconds: Seconds = 3.0,
    device: str = "cpu",
    code: Path | None = None,
) -> None:
    """Parameters, MACs, file size, memory (of .onnx files), latency and images per second, side by side.

    ``histill bench read SLIDE`` times the reading of a slide beside OpenSlide's.

    Args:
        models: runs, .onnx, .xml or TorchScript files; or the word read and a slide.
        out: a folder for summary.json.
        batch_size: images at once, beside single images.
        seconds: how long each model is timed, warm-up apart.
        device: where runs are timed: auto, cpu, cuda or mps; exported files are timed on the CPU.
        code: the Python file of a network that is not Histill's.
    """
    if models and str(models[0]) == "read":
        from histill.slides.bench import bench_command

        show(bench_command(models[1:], out=out, seconds=seconds))
        return
    from histill.deploy.deliver import bench as work
    from histill.files import write_json

    summary, table = work(models, batch_size=batch_size, seconds=seconds, device=device, code=code)
    if out is not None:
        write_json(out / "summary.json", summary)
    show(table)


@app.command
def recipes() -> None:
    """The recipes, their parts and what they are."""
    from histill.experiment import load_recipe, parts
    from histill.experiment import recipes as names

    for name in names():
        module, _ = load_recipe(name)
        show(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}")
        for part in parts(module):
            show(f"  {name}.{part}: {(inspect.getdoc(getattr(module, part)) or '').splitlines()[0]}")


@app.command
def losses() -> None:
    """The losses: when to use which, what it costs, what it needs of the two networks."""
    from histill.losses.guide import table

    show(table())


@app.command
def teachers() -> None:
    """Pathology foundation models as teachers: width, size, licence, access, when to use which."""
    from histill.models.foundation import table

    show(table())

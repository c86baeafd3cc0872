"""The command line. Thin: the flags of a recipe come from its signature, heavy imports happen inside commands."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import cyclopts

from histill.errors import BadInput, HistillError

__all__ = ["main"]

app = cyclopts.App(
    name="histill",
    help="Distil large medical-image models into small ones, and prove what was gained and lost.\n\n"
    "For research use only. Not for diagnosis.",
    version_flags=["--version"],
    default_parameter=cyclopts.Parameter(negative_iterable=(), consume_multiple=True),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
data_app = cyclopts.App(
    name="data", help="Look at images, fetch published data sets, make phantom tissue.", result_action="return_value"
)
app.command(data_app)

Format = Literal["onnx", "torchscript", "qupath"]
Count = Annotated[int, cyclopts.Parameter(validator=cyclopts.validators.Number(gte=1))]
Seconds = Annotated[float, cyclopts.Parameter(validator=cyclopts.validators.Number(gt=0))]
Interrupted = 130
_BAD_PATH = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


VERBS = {
    "distill": "Teacher, student alone, distilled student; comparison, export, report.",
    "train": "Run one experiment, such as dsnet.teacher.",
    "study": "A paper's whole set of experiments, beside its own numbers.",
}
"""Commands whose flags are those of the recipe or the study that is named."""

for _verb, _what in VERBS.items():
    app.command(cyclopts.App(name=_verb, help=_what))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 it failed, 2 bad input or arguments, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(tokens: list[str]) -> int:
    """Run a command and return its exit status; what goes wrong is one line on stderr."""
    try:
        if tokens and tokens[0] in VERBS:
            from histill.verbs import recipe_command

            verb, command = recipe_command(tokens, VERBS[tokens[0]])
            del app[verb]
            app.command(command, name=verb)
        app(tokens, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        return _fail(2, " ".join(str(error).split()), "see histill --help")
    except HistillError as error:
        return _fail(error.status, str(error))
    except KeyboardInterrupt:
        return _fail(Interrupted, "interrupted; what was done is kept, go on with --resume where a run was under way")
    except OSError as error:
        where = f"{error.strerror}: {error.filename or ''}" if error.strerror else f"{type(error).__name__}: {error}"
        return _fail(2 if isinstance(error, _BAD_PATH) else 1, where.rstrip(": "))
    except Exception as error:  # noqa: BLE001 - whatever it is, the user sees one line
        kind = type(error).__name__
        if kind in ("MemoryError", "OutOfMemoryError"):  # the second is torch's, which is not imported here
            return _fail(1, "out of memory; use a smaller --batch-size or --image-size")
        return _fail(
            1, f"{kind}: {(str(error).strip().splitlines() or [''])[0]}", "unforeseen; HISTILL_DEBUG=1 shows where"
        )
    return 0


def _fail(status: int, line: str, hint: str = "") -> int:
    if os.environ.get("HISTILL_DEBUG"):
        traceback.print_exc()
    print(f"histill: {' '.join(line.split())}{f' ({hint})' if hint else ''}", file=sys.stderr)  # noqa: T201
    return status


def _print(value: object) -> None:
    print(value)  # noqa: T201


@app.command
def demo(*, out: Path = Path("demo"), seed: int = 0) -> None:
    """The main job on phantom tissue: teacher, student alone, distilled student, comparison, export, report.

    Args:
        out: where the results go.
        seed: of the phantom tissue and the trainings.
    """
    from histill.demo import demo as work
    from histill.verbs import summary_lines

    summary, page = work(out, seed=seed)
    _print(summary_lines(summary))
    _print(f"report: {page}")


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
    _print(table_of(figures))


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
    _print(found)


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
    """Class and probabilities of every image in a folder.

    Args:
        model: a run, an .onnx or a TorchScript file, or the folder of an export with early exit.
        images: an image, a folder (searched through) or a CSV manifest with a column path.
        out: a .csv or .parquet file.
        batch_size: images at once.
        strict: an unreadable image is an error; otherwise it is named and left out.
        device: where a run computes: auto, cpu, cuda or mps; exported files compute on the CPU.
        code: the Python file of a network that is not Histill's.
    """
    from histill.deploy.serve import predict as work

    work(model, images, out, batch_size=batch_size, strict=strict, device=device, code=code)


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
    code: Path | None = None,
    resume: bool = True,
) -> None:
    """Tiles, heatmap, lesions, GeoJSON and a page of whole slides; goes on where it stopped.

    Args:
        model: a run, an .onnx or a TorchScript file, or the folder of an export with early exit.
        slides: files that OpenSlide reads, OME-TIFF, or plain images.
        out: a folder; each slide gets one in it, and summary.json lies beside them.
        mpp: microns per pixel at which the model looks (default: what it was trained at).
        slide_mpp: those of the slides' finest level, where their files do not say.
        tile: side of a tile in pixels at --mpp (default: the model's image size).
        overlap: pixels at --mpp that a tile shares with the next.
        min_tissue: share of a tile that must be tissue.
        batch_size: tiles at once.
        threads: readers (default: the machine's cores, 8 at most).
        mask: where to look: GeoJSON, an image over the slide, or a folder of them named like the slides.
        truth: reference masks in the same ways, for IoU, Dice and lesion FROC.
        lesions: the classes that are lesions (default: the positive class, else all that do not sound healthy).
        threshold: of a lesion's probability (default: above every other class).
        min_area_um2: smaller lesions and holes are left out (default: a quarter of a tile).
        coarse_to_fine: a confidence, such as 0.95, at which the answer for a wider tile stands for all in it.
        coarse_factor: how many times as wide.
        coarse_model: what looks at the wider tiles (default: the same model).
        features: also features.h5, as CLAM reads it.
        segment: CLASS=MODEL, the network that outlines what was taken for that class.
        device: where a run computes: auto, cpu, cuda or mps; exported files compute on the CPU.
        precision: of a run: auto is bf16 where the machine computes it.
        code: the Python file of a network that is not Histill's.
        resume: go on with what an earlier call left; --no-resume starts anew.
    """
    from histill.slides.options import by_class
    from histill.slides.predict import predict_slides, summary_lines

    summary = predict_slides(
        model,
        slides,
        out,
        device=device,
        precision=precision,
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
        lesions=tuple(lesions or ()),
        threshold=threshold,
        min_area_um2=min_area_um2,
        coarse_to_fine=coarse_to_fine,
        coarse_factor=coarse_factor,
        coarse_model=coarse_model,
        features=features,
        segment=by_class(segment or []),
        resume=resume,
    )
    _print(summary_lines(summary, out))


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
        format: onnx, torchscript, or qupath (the folder that QuPath's WSInfer extension loads).
        out: the file or folder (default: beside the run's weights).
        int8: also a static int8 ONNX file, calibrated on validation images.
        early_exit: accuracy (a share, such as 0.01) that may be lost on validation where images leave a network with
            exits at the first that is sure; writes a folder with an ONNX file per exit.
        mpp: microns per pixel of the training images, which qupath needs.
        code: the Python file of a network that is not Histill's.
    """
    from histill.deploy.deliver import export as work

    for line in work(run, out, format=format, int8=int8, early_exit=early_exit, mpp=mpp, code=code).lines():
        _print(line)


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
        models: runs, .onnx or TorchScript files; or the word read and a slide.
        out: a folder for summary.json.
        batch_size: images at once, beside single images.
        seconds: how long each model is timed, warm-up apart.
        device: where runs are timed: auto, cpu, cuda or mps; exported files are timed on the CPU.
        code: the Python file of a network that is not Histill's.
    """
    if models and str(models[0]) == "read":
        from histill.slides.bench import bench_command

        _print(bench_command(models[1:], out=out, seconds=seconds))
        return
    from histill.deploy.deliver import bench as work
    from histill.files import write_json

    summary, table = work(models, batch_size=batch_size, seconds=seconds, device=device, code=code)
    if out is not None:
        write_json(out / "summary.json", summary)
    _print(table)


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
        _print(address)
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
        slide_mpp: the slides' own microns per pixel, where the files do not say.
        tile: side of a patch in pixels.
        stride: pixels from one patch to the next.
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
    _print(found)


@app.command
def recipes() -> None:
    """The recipes, their parts and what they are."""
    from histill.experiment import load_recipe, parts
    from histill.experiment import recipes as names

    for name in names():
        module, _ = load_recipe(name)
        _print(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}")
        for part in parts(module):
            _print(f"  {name}.{part}: {(inspect.getdoc(getattr(module, part)) or '').splitlines()[0]}")


@app.command
def losses() -> None:
    """The losses: when to use which, what it costs, what it needs of the two networks."""
    from histill.losses.guide import table

    _print(table())


@app.command
def teachers() -> None:
    """Pathology foundation models as teachers: width, size, licence, access, when to use which."""
    from histill.models.foundation import table

    _print(table())


@data_app.command
def check(data: Path, *, patient: str | None = None, out: Path | None = None, strict: bool = False) -> None:
    """Classes, sizes, copies across splits, unreadable files, a contact sheet.

    Args:
        data: a folder of class folders or a CSV manifest.
        patient: regular expression that reads the patient off an image's path.
        out: a folder for check.json and the contact sheet images.png.
        strict: an unreadable image is an error.
    """
    from histill.data import read_images
    from histill.data.check import check as work

    found = work(read_images(data, patient=patient), out)
    _print(found)
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

    _print(work(images, out, weights=weights, scale=scale, tile=tile, device=device, strict=strict))


@data_app.command
def cifar(archive: Path, out: Path) -> None:
    """CIFAR-100 as class folders, from its binary archive.

    Args:
        archive: cifar-100-binary.tar.gz.
        out: a folder for train/ and test/.
    """
    from histill.data.cifar import unpack_cifar

    _print(unpack_cifar(archive, out))


@data_app.command
def fetch(name: str | None = None, *, out: Path | None = None, by: Literal["patient", "image"] = "patient") -> None:
    """A published data set by name: download, verify, unpack, manifest; without a name the list of them.

    Args:
        name: which one.
        out: its folder (default: called like it); run again, it goes on where it stopped.
        by: patient keeps everybody in one split; image is the protocol of the literature, patients not looked at.
    """
    from histill.data.fetch import fetch as work
    from histill.data.fetch import next_command
    from histill.data.sets import SETS, listing

    if name is None:
        _print(listing(SETS.values()))
        return
    path = work(name, out, by=by)
    _print(f"{path}\nnext: {next_command(SETS[name], path)}")


@data_app.command
def manifest(name: str, folder: Path, *, by: Literal["patient", "image"] = "patient") -> None:
    """The manifest of a published data set that is there already, in its published layout.

    Args:
        name: which one (histill data fetch lists them).
        folder: where it lies; the manifest is written into it.
        by: patient keeps everybody in one split; image is the protocol of the literature, patients not looked at.
    """
    from histill.data.fetch import next_command
    from histill.data.sets import get
    from histill.data.sets import manifest as work

    path = work(get(name), folder, by=by)
    _print(f"{path}\nnext: {next_command(get(name), path)}")


@data_app.command
def unpack(archive: Path, out: Path) -> None:
    """A zip or tar archive into a new folder; whatever would leave it, or swell beyond measure, is refused.

    Args:
        archive: the .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz file.
        out: the folder.
    """
    from histill.data.archives import unpack as work

    _print(f"{work(archive, out)} files in {out}")


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
        _print(draw.write_slide(out, seed=seed))
        return
    chosen = tuple(kinds) if kinds else ("benign", "malignant")
    _print(
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

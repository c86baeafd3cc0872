"""One tool over one slide, in a process of its own: what `benchmarks/slides.py` starts.

    PYTHON benchmarks/slides_tools.py JOB.json

PYTHON has that tool installed, Histill or not: nothing is imported before the tool is known. A job names the tool, the
folder of models, a small slide to warm up on, and trials: settings, slides and folders. Each trial is timed from the
model's file to the results on disk, in this process, after the small slide was done once. What the tool said of each
tile is left in ``said.npz`` beside the times, in ``found.json``.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

TILE = 224
MPP = 0.499
BATCH = 32
CLASSES = ("glass", "stroma", "tumour", "lymphocytes")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = (
    "histill",
    "tiatoolbox",
    "wsinfer",
    "torch",
    "onnxruntime",
    "openvino",
    "openslide-python",
    "openslide-bin",
    "numpy",
)
LIMIT_S = 3.0

Case = dict[str, str]
"""``slide``, ``mask`` (PNG) and ``tiles`` (npy of x and y): the same places in two ways."""

Trial = Callable[[Case, Path, dict[str, Any]], Any]
Said = tuple[Any, Any]
"""Places ``(N, 2)`` of level-0 (x, y) and probabilities ``(N, C)``."""


def histill(models: Path, how: str) -> tuple[Trial, Callable[[Path], Said]]:
    import pandas as pd

    from histill.slides import predict_slides

    runtime, precision = "torch" if "torch" in how else "auto", how.split()[-1]
    model = models / ("model.int8.onnx" if precision == "int8" else "run")
    asked = {"precision": {"int8": "auto", "fp32": "32-true", "bf16": "bf16"}[precision], "runtime": runtime}

    def trial(case: Case, out: Path, setting: dict[str, Any]) -> Any:
        options = {"mpp": MPP, "mask": Path(case["mask"]), "min_tissue": 0.5, "lesions": ("tumour",)}
        found = predict_slides(model, [case["slide"]], out, batch_size=BATCH, **asked, **options)
        return {name: spent["wall_s"] for name, spent in next(iter(found["slides"].values()))["timing"].items()}

    def said(out: Path) -> Said:
        table = pd.read_parquet(next(out.glob("*/tiles.parquet")))
        return table[["x", "y"]].to_numpy(), table[[f"prob_{name}" for name in CLASSES]].to_numpy()

    return trial, said


def tiatoolbox(models: Path) -> tuple[Trial, Callable[[Path], Said]]:
    import torch
    import zarr
    from tiatoolbox.models.architecture.vanilla import CNNModel
    from tiatoolbox.models.engine.patch_predictor import PatchPredictor
    from torchvision import transforms

    normalised = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    places = {"conv1": "feat_extract.0", "bn1": "feat_extract.1", "fc": "classifier"}
    places |= {f"layer{k}": f"feat_extract.{k + 3}" for k in range(1, 5)}

    def preprocess(image: Any) -> Any:
        return normalised(image).permute(1, 2, 0)

    def trial(case: Case, out: Path, setting: dict[str, Any]) -> Any:
        weights = torch.load(models / "weights.pt", weights_only=True)
        network = CNNModel("resnet18", num_classes=len(CLASSES))
        network.load_state_dict(
            {f"{places[name.split('.')[0]]}.{name.split('.', 1)[1]}": value for name, value in weights.items()}
        )
        network.preproc_func = preprocess
        engine = PatchPredictor(network, BATCH, setting["workers"], device="cpu", verbose=False)
        engine.run(
            [Path(case["slide"])],
            masks=[Path(case["mask"])],
            patch_mode=False,
            patch_input_shape=(TILE, TILE),
            stride_shape=(TILE, TILE),
            input_resolutions=[{"units": "mpp", "resolution": MPP}],
            save_dir=out,
            output_type="zarr",
            return_probabilities=True,
        )

    def said(out: Path) -> Said:
        group = zarr.open(str(next(out.glob("*.zarr"))), mode="r")
        return np.asarray(group["coordinates"])[:, :2], np.asarray(group["probabilities"])

    return trial, said


def wsinfer(models: Path) -> tuple[Trial, Callable[[Path], Said]]:
    import h5py
    import pandas as pd
    from wsinfer.modellib.models import LocalModelTorchScript
    from wsinfer.modellib.run_inference import run_inference
    from wsinfer_zoo.client import ModelConfiguration

    configuration = {
        "spec_version": "1.0",
        "architecture": "resnet18",
        "num_classes": len(CLASSES),
        "class_names": list(CLASSES),
        "patch_size_pixels": TILE,
        "spacing_um_px": MPP,
        "transform": [
            {"name": "Resize", "arguments": {"size": TILE}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": list(MEAN), "std": list(STD)}},
        ],
    }

    def trial(case: Case, out: Path, setting: dict[str, Any]) -> Any:
        (out / "patches").mkdir(parents=True)
        with h5py.File(out / "patches" / f"{Path(case['slide']).stem}.h5", "w") as file:
            places = file.create_dataset("/coords", data=np.load(case["tiles"]))
            places.attrs.update({"patch_size": TILE, "patch_level": 0, "patch_spacing_um_px": MPP})
        info = LocalModelTorchScript(
            config=ModelConfiguration.from_dict(configuration), model_path=str(models / "plain.pt")
        )
        with contextlib.redirect_stdout(sys.stderr):
            failed = run_inference(
                Path(case["slide"]).parent, out, info, BATCH, setting["workers"], speedup=setting["speedup"]
            )
        if any(failed):
            raise RuntimeError(f"wsinfer failed on {failed}")

    def said(out: Path) -> Said:
        table = pd.read_csv(next((out / "model-outputs-csv").glob("*.csv")))
        return table[["minx", "miny"]].to_numpy(), table[[f"prob_{name}" for name in CLASSES]].to_numpy()

    return trial, said


def limit(models: Path, case: Case) -> dict[str, dict[str, float]]:
    """Tiles per second of the model alone, on one batch that lies ready in memory, by precision and way."""
    import copy

    import torch

    from histill.deploy import open_model
    from histill.run import Run
    from histill.slides import open_slide
    from histill.slides.engine import load_model

    with open_slide(case["slide"]) as slide:
        pixels = np.stack([slide.read(int(x), int(y), TILE, TILE) for x, y in np.load(case["tiles"])[:BATCH]])
    images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    plain, network = torch.from_numpy(images), Run.open(models / "run").network()
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    half = copy.deepcopy(last).bfloat16()
    wide = plain.contiguous(memory_format=torch.channels_last)
    narrow = wide.bfloat16()
    onnx = open_model(models / "model.int8.onnx")
    fast = {name: load_model(models / "run", precision=name).fast for name in ("32-true", "bf16")}

    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return last(wide)

    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "fp32": {"as stored": lambda: network(plain), "channels last": lambda: last(wide)},
        "bf16": {"autocast, channels last": autocast, "weights in bf16, channels last": lambda: half(narrow)},
        "int8": {"onnxruntime": lambda: onnx.logits(images)},
    }
    for precision, name in (("fp32", "32-true"), ("bf16", "bf16")):
        if fast[name] is not None:
            ways[precision]["openvino"] = partial(fast[name], images)
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for precision, its in ways.items():
            found[precision] = {}
            for name, look in its.items():
                look(), look()
                start, count = time.perf_counter(), 0
                while (spent := time.perf_counter() - start) < LIMIT_S:
                    look()
                    count += len(images)
                found[precision][name] = count / spent
    return found


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def timed(trial: Trial, said: Callable[[Path], Said], each: dict[str, Any], folder: Path, file: Path) -> dict[str, Any]:
    """One trial's seconds, or its error: a setting that does not work here is no reason not to try the next."""
    start = time.perf_counter()
    try:
        more = trial(each["case"], folder, each["setting"])
    except Exception as error:  # noqa: BLE001 - each tool has errors of its own
        traceback.print_exc()
        return {"setting": each["setting"], "error": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - start
    places, probabilities = said(folder)
    np.savez(file, places=places, probabilities=probabilities)
    return {"setting": each["setting"], "seconds": seconds, "tiles": len(places), "timing": more}


def main() -> None:
    began = time.perf_counter()
    job = json.loads(Path(sys.argv[1]).read_text())
    out, models = Path(job["out"]), Path(job["models"])
    found: dict[str, Any] = {"versions": versions()}
    if job["tool"] == "limit":
        found["limit"] = limit(models, job["trials"][0]["case"])
    else:
        name, _, precision = job["tool"].partition(" ")
        make = {"histill": histill, "tiatoolbox": tiatoolbox, "wsinfer": wsinfer}[name]
        trial, said = make(models, precision) if precision else make(models)
        imported = time.perf_counter()
        trial(job["warm"], out / "warm", job["trials"][0]["setting"])
        found |= {"import_s": imported - began, "warm_s": time.perf_counter() - imported, "trials": []}
        for number, each in enumerate(job["trials"]):
            found["trials"].append(timed(trial, said, each, out / f"trial{number}", out / "said.npz"))
    if "torch" in sys.modules:
        found["threads"] = sys.modules["torch"].get_num_threads()
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""What strangers may send, bent and broken at random, and the readers that must either take it or refuse it in a line.

`TARGETS` are fuzzed briefly by the tests and at length by ``benchmarks/fuzz.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import fuzz_seeds as seeds
import numpy as np
import onnx
import pandas as pd
import tifffile
from conftest import write_classes
from fuzz_values import OUTLINES, TABLES, Values, bend, bent, changes, swapped
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from slide_files import picture

from histill.data.archives import unpack
from histill.data.decode import decode
from histill.data.images import Images, complete, read_images
from histill.data.splits import split
from histill.deploy.early_exit import open_exits
from histill.deploy.predictor import _read_card
from histill.embeddings import Embeddings
from histill.errors import BadInput
from histill.evaluate.judge import judge
from histill.files import write_json
from histill.models import DSNet
from histill.models.weights import read_weights
from histill.run import Run
from histill.slides.geojson import read_geojson, write_geojson
from histill.slides.regions import paint
from histill.slides.slide import open_slide
from histill.slides.view.library import Library


@dataclass(frozen=True)
class Target:
    """A reader under fuzzing.

    Attributes:
        values: what it is given, drawn by hypothesis.
        run: ``(value, folder) -> None``: writes the value into the folder, which it may reuse, and reads it.
        what: in words.
    """

    values: Values
    run: Callable[[Any, Path], None]
    what: str


TARGETS: dict[str, Target] = {}


def _write(path: Path, data: bytes) -> Path:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


# Manifests.

_MANIFESTS = [
    b"path,label,patient,split\na/0.png,a,p0,train\nb/2.png,b,p2,train\na/1.png,a,p1,test\nb/3.png,b,p3,test\n",
    b"path,label,mpp,slide,site\n"
    + b"".join(b"%s/%d.png,%s,0.5,s%d,x\n" % (c, n, c, n) for n, c in enumerate([b"a"] * 2 + [b"b"] * 2)),
    b'"path","label"\r\n"a/0.png","a, or b"\r\n"b/2.png","b"\r\n',
]


def _manifest(value: Any, folder: Path) -> None:
    if not (folder / "b").exists():
        for n, name in enumerate("aabb"):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(picture(9, 9, n)).save(folder / name / f"{n}.png")
    if value[0] == "table":
        columns, rows, comma, encoding = value[1]
        text = "\n".join(comma.join(row) for row in [columns, *rows])
        data = text.encode(encoding, "replace")
    else:
        seed, edits = value[1]
        data = bend(_MANIFESTS[seed], edits)
    images = read_images(_write(folder / "m.csv", data))
    images.save(folder / "saved.csv")
    assert Images.load(folder / "saved.csv").hash == images.hash
    try:
        split(images, val=0.25, test=0.25, seed=0)
    except BadInput as error:  # too few to be divided
        assert_line(error)


TARGETS["manifest"] = Target(
    st.one_of(st.tuples(st.just("table"), TABLES), st.tuples(st.just("bytes"), bent(len(_MANIFESTS), most=3))),
    _manifest,
    "read_images of a CSV manifest, its table saved and read again, split",
)


# Slides.


_SLIDES = 19


def _tiles(value: Any, folder: Path) -> None:
    (seed, edits), where, suffix = value
    data, directory = seeds.slides()[seed]
    within = {"directory": directory, "anywhere": None, "header": (0, 16)}[where]
    path = _write(folder / f"s{suffix}", bend(data, edits, within))
    with open_slide(path) as slide:
        width, height = slide.dimensions
        for level in range(min(len(slide.level_dimensions), 3)):
            for x, y in ((0, 0), (width // 2, height // 3), (width - 1, height - 1), (-30, 40)):
                try:
                    assert slide.read(x, y, 96, 64, level).shape == (64, 96, 3)
                except BadInput as error:
                    assert_line(error)
        if width * height < 1 << 22:
            slide.thumbnail(50)
        assert len(slide.digest) == 64


TARGETS["tiles"] = Target(
    st.tuples(
        bent(_SLIDES, most=6),
        st.sampled_from(["directory", "directory", "anywhere", "header"]),
        st.sampled_from([".tiff", ".svs", ".ome.tiff"]),
    ),
    _tiles,
    "open_slide of TIFFs (ten compressions; OME-TIFF, SVS, BigTIFF), regions, thumbnail",
)


# Outlines.

_SQUARE = [[0, 0], [40, 0], [40, 40], [0, 40], [0, 0]]
_OUTLINES = [
    json.dumps(
        {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "geometry": {"type": "Polygon", "coordinates": [_SQUARE, [[5, 5], [9, 5], [9, 9]]]},
                    "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
                }
            ],
        }
    ).encode(),
]


def _geojson(value: Any, folder: Path) -> None:
    kind, said = value
    data = bend(_OUTLINES[0], said[1]) if kind == "bytes" else json.dumps(said).encode()
    features = read_geojson(_write(folder / "a.geojson", data))
    assert all(feature.shape.is_valid and feature.shape.area > 0 for feature in features)
    paint(np.zeros((64, 64), np.uint8), [feature.shape for feature in features], (2.0, 2.0))
    write_geojson(folder / "b.geojson", features, slide="s")
    read_geojson(folder / "b.geojson")


TARGETS["geojson"] = Target(
    st.one_of(
        st.tuples(st.just("value"), OUTLINES),
        st.tuples(st.just("bytes"), bent(1)),
    ),
    _geojson,
    "read_geojson, what it read painted, written and read again",
)


# What JSON says beside a model or a slide.

_CARD = '{"classes": ["a", "b"], "image_size": 8, "mpp": 0.5}'


@cache
def _exits(folder: Path) -> str:
    """Two small exits in ``folder``, and their ``exits.json``."""
    from histill.files import file_digest

    files = []
    for n in (1, 2):
        pool = helper.make_node("GlobalAveragePool", ["images"], ["p"])
        flat = helper.make_node("Flatten", ["p"], ["f"])
        cut = helper.make_node("Slice", ["f", "zero", "two", "one"], ["logits"])
        on = helper.make_node("Identity", ["images"], ["on"])
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])]
        outputs += [helper.make_tensor_value_info("on", TensorProto.FLOAT, ["N", 3, "H", "W"])] if n == 1 else []
        numbers = [
            helper.make_tensor(name, TensorProto.INT64, [1], [v]) for name, v in (("zero", 0), ("two", 2), ("one", 1))
        ]
        taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, "H", "W"])
        graph = helper.make_graph([pool, flat, cut, on], "exit", [taken], outputs, numbers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, folder / f"exit{n}.onnx")
        files.append({"file": f"exit{n}.onnx", "sha256": file_digest(folder / f"exit{n}.onnx")})
    return json.dumps({"classes": ["a", "b"], "image_size": 8, "mpp": None, "threshold": 0.5, "exits": files})


def _slide_json(folder: Path) -> str:
    return json.dumps(
        {
            "name": "case",
            "path": str(folder / "slide.png"),
            "mpp": 0.5,
            "dimensions": [60, 50],
            "classes": ["benign", "malignant"],
            "colors": {"benign": [0, 158, 115], "malignant": [213, 94, 0]},
            "settings": {"threshold": 0.5, "lesions": ["malignant"]},
        }
    )


def _config(value: Any, folder: Path) -> None:
    kind, changes, edits = value
    if kind == "card":
        card = _read_card(bend(swapped(_CARD, changes).encode(), edits[1]).decode("utf-8", "replace"), Path("m.onnx"))
        assert not card or all(isinstance(name, str) for name in card["classes"])
    elif kind == "exits":
        text = bend(swapped(_exits(folder), changes).encode(), edits[1])
        predictor = open_exits(_write(folder / "exits.json", text).parent, threads=1)
        predictor(np.zeros((2, 3, predictor.image_size, predictor.image_size), np.float32))
    else:
        place = folder / "view" / "case"
        if not place.exists():
            place.mkdir(parents=True)
            Image.fromarray(picture(50, 60)).save(folder / "slide.png")
            tifffile.imwrite(
                place / "heatmap.ome.tiff", np.zeros((2, 16, 16), np.uint8), tile=(16, 16), photometric="minisblack"
            )
        _write(place / "slide.json", bend(swapped(_slide_json(folder), changes).encode(), edits[1]))
        for entry in Library(folder / "view").entries.values():
            json.dumps(entry.describe(), allow_nan=False)


TARGETS["config"] = Target(
    st.tuples(st.sampled_from(["card", "card", "exits", "slide", "slide"]), changes(), bent(1, most=2)),
    _config,
    "the card of an exported model, exits.json, slide.json",
)


# Runs.


@cache
def run_folder(folder: Path) -> dict[str, bytes]:
    """A finished run of a small network, file by file; nothing is trained for it."""
    images = split(
        read_images(write_classes(folder / "data", {"benign": 8, "malignant": 8})), val=0.25, test=0.25, seed=0
    )
    run = folder / "run"
    run.mkdir()
    images.save(run / "data.csv")
    build = partial(DSNet, classes=2, image_size=18)
    save_file(build().state_dict(), run / "model.safetensors")
    frame = images.frame
    table = frame.loc[frame["split"] != "train", ["path", "patient", "split", "label"]].rename(
        columns={"path": "image"}
    )
    table = table.reset_index(drop=True)
    share = np.linspace(0.2, 0.8, len(table))
    table["prediction"] = np.where(share > 0.5, "malignant", "benign")
    table["prob_benign"], table["prob_malignant"] = 1 - share, share
    table.to_parquet(run / "predictions.parquet")
    (run / "log.csv").write_text("epoch,lr,loss,val/loss\n0,0.1,1.0,0.9\n1,0.1,0.8,0.7\n")
    write_json(run / "metrics.json", {"test": {"accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}}})
    write_json(
        run / "run.json",
        {
            "status": "finished",
            "recipe": {"name": "dsnet.student", "arguments": {"lr": 0.1}},
            "network": {"function": "histill.models.dsnet:DSNet", "arguments": build.keywords},
            "classes": ["benign", "malignant"],
            "positive": "malignant",
            "image_size": 18,
            "mpp": None,
            "select": "last",
            "teacher": None,
            "data": {"root": str(images.root), "hash": images.hash, "split_hash": images.split_hash, "masks": ""},
        },
    )
    return {path.name: path.read_bytes() for path in sorted(run.iterdir())}


def _run(value: Any, folder: Path) -> None:
    where, changes, (_, edits) = value
    files = run_folder(folder)
    run = folder / "run"
    for name, data in files.items():
        if (run / name).read_bytes() != data:
            _write(run / name, data)
    data = files[where]
    if where.endswith(".json"):
        data = swapped(data.decode(), changes).encode()
    _write(run / where, bend(data, edits))
    opened = Run.open(run)
    for look in (
        lambda: opened.classes,
        lambda: opened.image_size,
        lambda: opened.finished,
        lambda: opened.data,
        lambda: opened.log,
        lambda: opened.metrics,
        lambda: opened.predictions,
        lambda: opened.last,
        lambda: opened.network(),
        lambda: judge(opened),
    ):
        try:
            look()
        except BadInput as error:
            assert_line(error)


TARGETS["run"] = Target(
    st.tuples(
        st.sampled_from(
            ["run.json"] * 4
            + ["data.csv"] * 2
            + ["log.csv", "metrics.json", "predictions.parquet", "model.safetensors"]
        ),
        changes(),
        bent(1, most=3),
    ),
    _run,
    "Run.open of a run folder with one file bent, and everything that it can be asked for",
)


# Weights, embeddings, archives and pictures.


def _weight(value: Any, folder: Path) -> None:
    suffix, data = seeds.weights()[value[0]]
    read = read_weights(_write(folder / f"w{suffix}", bend(data, value[1])))
    assert all(isinstance(name, str) for name in read)


TARGETS["weights"] = Target(bent(7), _weight, "read_weights of .pt and .safetensors files")


def _embedding(value: Any, folder: Path) -> None:
    suffix, data = seeds.embeddings()[value[0]]
    (folder / "e.txt").write_text("a\nb\nc\nd\n")
    read = Embeddings(_write(folder / f"e{suffix}", bend(data, value[1])))
    images = Images(complete(pd.DataFrame({"path": list(read._where)[:2]})), folder, ())
    read.of(images)


TARGETS["embeddings"] = Target(bent(4), _embedding, "Embeddings of .h5, .parquet and .npy files")


def _archive(value: Any, folder: Path) -> None:
    out = folder / "in" / "out"
    shutil.rmtree(folder / "in", ignore_errors=True)
    (folder / "in").mkdir()
    source = _write(folder / "a.bin", bend(seeds.archives()[value[0]], value[1]))
    try:
        unpack(source, out)
    finally:
        assert {path.name for path in folder.iterdir()} <= {"in", "a.bin"}  # nothing got out
        assert not any(path.is_symlink() for path in folder.rglob("*"))


TARGETS["archives"] = Target(bent(11), _archive, "unpack of zip and tar (gz, bz2, xz) archives")


def _picture(value: Any, folder: Path) -> None:
    decoded, _ = decode(_write(folder / "p.png", bend(seeds.pictures()[value[0]], value[1])))
    assert decoded.mode == "RGB"


TARGETS["pictures"] = Target(bent(12), _picture, "decode of PNG, JPEG, BMP, TIFF and WebP files")


def assert_line(error: BaseException) -> None:
    """One line, of a length that one reads, with nothing in it that a terminal would obey."""
    said = str(error)
    assert said.strip(), "an error without a word"
    assert len(said) < 4000, f"{len(said)} characters"
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in said), f"control characters: {said!a}"


__all__ = ["TARGETS", "Target", "assert_line", "run_folder"]

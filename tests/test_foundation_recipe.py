"""Pretraining on embeddings: the objective is its equation, the experiment what was asked for, and the run learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import no_page, table
from torch import nn
from torch.nn import functional as F

import histill as hs
from histill import cli
from histill.data import Images, pack, read_unlabelled
from histill.errors import BadInput
from histill.evaluate.probe import embed
from histill.losses import hint, rkd_distance
from histill.models import Foundation, Timm
from histill.recipes.foundation import Matched, last_map, pretrain
from histill.run import Run
from histill.teachers import Embeddings, Frozen, Several
from histill.types import Batch, NoOutput, Outputs, total

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("images") / "data"
    table(home, 24, size=40)
    return home


@pytest.fixture
def images(folder: Path) -> Images:
    return read_unlabelled(folder)


def teacher(seed: int = 0, width: int = 12) -> Frozen:
    torch.manual_seed(seed)
    network = Foundation("kaiko-vits16", weights=None, img_size=SIZE, depth=1, embed_dim=width, num_heads=2)
    return Frozen(network, image_size=SIZE)


def quick(images: Images, teachers: Any, **changes: Any) -> hs.Experiment:
    chosen = {"network": "test_resnet", "image_size": SIZE, "epochs": 2, "batch_size": 8, "views": 2, "seed": 3}
    return pretrain(images, teachers, **chosen | changes)


def outputs(**values: Any) -> Outputs:
    return Outputs({n: torch.as_tensor(v, dtype=torch.float32) for n, v in values.items()})


BATCH: Batch = None  # type: ignore[assignment]


def test_the_objective_is_the_mean_over_teachers_of_the_sum_over_widths() -> None:
    torch.manual_seed(0)
    objective = Matched(6, None, [4, 5], match="mse", nested=[3])
    z, e = torch.randn(7, 6), [torch.randn(7, 4), torch.randn(7, 5)]
    terms = objective(outputs(pooled=z), outputs(pooled0=e[0], pooled1=e[1]), BATCH)
    assert {n: w for n, (w, _) in terms.items()} == {"embedding0": 0.5, "embedding1": 0.5}
    assert objective.projection is not None
    expected = [sum(hint(w(z[:, :m]), e[t]) for m, w in zip((3, 6), objective.projection.maps[t])) for t in (0, 1)]  # type: ignore[arg-type]
    assert total(terms).item() == pytest.approx(sum(x.item() for x in expected) / 2, rel=1e-5)  # type: ignore[union-attr]


def test_relations_need_no_map_and_see_every_width() -> None:
    objective = Matched(6, None, [4], match="relation", nested=[2])
    assert not list(objective.parameters())
    z, e = torch.randn(7, 6), torch.randn(7, 4)
    ((weight, loss),) = objective(outputs(pooled=z), outputs(pooled0=e), BATCH).values()
    assert weight == 1
    assert loss.item() == pytest.approx(rkd_distance(z[:, :2], e).item() + rkd_distance(z, e).item())


def test_tokens_are_compared_at_the_smaller_map() -> None:
    torch.manual_seed(0)
    objective = Matched(6, 3, [4], [5])
    last, tokens = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8)
    said = outputs(pooled0=torch.randn(2, 4), tokens0=tokens)
    terms = objective(outputs(stage1=torch.randn(2, 9, 16, 16), stage2=last, pooled=torch.randn(2, 6)), said, BATCH)
    weight = objective.maps[0].weight[:, :, 0, 0]  # type: ignore[union-attr, index]
    projected = torch.einsum("oc,bchw->bohw", weight, last) + objective.maps[0].bias[:, None, None]  # type: ignore[union-attr, index]
    expected = F.smooth_l1_loss(projected, F.avg_pool2d(tokens, 2))
    torch.testing.assert_close(terms["tokens0"][1], expected)
    with pytest.raises(BadInput, match="no tokens can be matched"):
        last_map(outputs(pooled=torch.zeros(2, 6)))


def test_tokens_alone_need_no_embedding(images: Images) -> None:
    torch.manual_seed(0)
    objective = Matched(6, 3, [], [5, 5])
    assert objective.projection is None
    said = outputs(tokens0=torch.randn(2, 5, 4, 4), tokens1=torch.randn(2, 5, 4, 4))
    terms = objective(outputs(stage1=torch.randn(2, 3, 4, 4), pooled=torch.randn(2, 6)), said, BATCH)
    assert {name: weight for name, (weight, _) in terms.items()} == {"tokens0": 0.5, "tokens1": 0.5}
    assert quick(images, teacher(), targets="tokens").cache_outputs == ("tokens0",)
    with pytest.raises(BadInput, match="--nested is of embeddings"):
        quick(images, teacher(), targets="tokens", nested=(8,))
    with pytest.raises(BadInput, match="--targets cls: pooled, tokens or both"):
        quick(images, teacher(), targets="cls")


def test_a_student_that_is_a_rotation_of_the_teacher_has_nothing_left_to_learn() -> None:
    torch.manual_seed(0)
    objective = Matched(4, None, [4])
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    assert objective.projection is not None
    layer = objective.projection.maps[0][0]  # type: ignore[index]
    assert isinstance(layer, nn.Linear)
    layer.weight.data, layer.bias.data = rotation, torch.zeros(4)
    z = torch.randn(9, 4)
    assert total(objective(outputs(pooled=z), outputs(pooled0=3 * z @ rotation.T), BATCH)).item() < 1e-6


def test_the_experiment_is_what_was_asked_for(images: Images) -> None:
    made = quick(images, [teacher(0), teacher(1, 16)], targets="both", nested=(8, 32), weights="none", lr=0.01)
    assert made.cache_outputs == ("pooled0", "tokens0", "pooled1", "tokens1")
    assert (made.select, made.views, made.data.classes) == ("last", 2, ())
    assert isinstance(made.teacher, Several)
    assert made.recipe["name"] == "foundation.pretrain"
    assert made.recipe["arguments"]["nested"] == [8, 32]
    objective = made.objective
    assert isinstance(objective, Matched)
    assert objective.widths[:2] == [8, 32]
    assert [m.out_channels for m in objective.maps] == [12, 16]  # type: ignore[union-attr]
    packed = pack(images, SIZE)
    said = made.teacher(packed.batch(np.arange(len(images))))
    for t, width in enumerate((12, 16)):
        assert said[f"pooled{t}"].shape == (24, width)
        torch.testing.assert_close(said[f"pooled{t}"].mean(0), torch.zeros(width), atol=1e-4, rtol=0)
        torch.testing.assert_close(said[f"pooled{t}"].std(0, unbiased=False), torch.ones(width), atol=1e-3, rtol=0)


def test_what_cannot_be_is_one_line(images: Images, folder: Path) -> None:
    with pytest.raises(BadInput, match="give --teacher uni2-h"):
        quick(images, None)
    with pytest.raises(BadInput, match="--match l7: cosine, mse or relation"):
        quick(images, teacher(), match="l7")
    with pytest.raises(BadInput, match="nested widths 4096"):
        quick(images, teacher(), nested=(4096,))
    with pytest.raises(BadInput, match="images without labels"):
        quick(hs.read_images(folder), teacher())
    with pytest.raises(BadInput, match="neither a run, nor embeddings"):
        quick(images, "uni3")
    torch.manual_seed(0)
    with pytest.raises(NoOutput, match="no output named 'tokens'"):
        quick(images, Frozen(Timm("test_resnet", 3)), targets="both")


def test_a_run_learns_embeddings_resumes_nothing_lost_and_starts_another(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histill.evaluate.unjudged.finish", no_page)
    run = hs.train(quick(images, teacher(), epochs=6, targets="both", nested=(16,), lr=3e-3), tmp_path / "run")
    log = run.log
    assert log["raw/embedding0"].iloc[-1] < 0.8 * log["raw/embedding0"].iloc[0]
    assert log["raw/tokens0"].iloc[-1] < log["raw/tokens0"].iloc[0]
    assert not any(name.startswith(("projection", "maps", "objective")) for name in run.network().state_dict())
    # The embedding can be told again from the folder alone, and another recipe starts from it.
    again = Run.open(run.path)
    packed = pack(images, SIZE)
    assert np.isfinite(embed(again.network(), packed, np.arange(3))).all()
    started = Timm("test_resnet", 2, weights=str(run.path))
    body = {n: t for n, t in started.state_dict().items() if "conv" in n and t.ndim == 4}
    assert body
    assert all(torch.equal(t, again.network().state_dict()[n]) for n, t in body.items())


@pytest.mark.parametrize("match", ["mse", "relation"])
def test_saved_embeddings_of_two_files_teach_by_every_match(
    match: str, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histill.evaluate.unjudged.finish", no_page)
    colours = np.stack([p.mean((0, 1)) for p in pack(images, SIZE).pixels]).astype(np.float32)
    for name, values in (("colour", colours), ("other", np.cos(colours[:, :2]))):
        (tmp_path / name).mkdir()
        frame = pd.DataFrame({"image": images.frame["path"], "features": list(values)})
        frame.to_parquet(tmp_path / name / "e.parquet")
    made = quick(images, [str(tmp_path / "colour"), Embeddings(tmp_path / "other")], match=match, lr=3e-3, epochs=6)
    log = hs.train(made, tmp_path / "run").log
    term = "relation0" if match == "relation" else "embedding0"
    assert log[f"raw/{term}"].iloc[-1] < log[f"raw/{term}"].iloc[0]


def test_the_command_line_takes_saved_embeddings(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histill.evaluate.unjudged.finish", no_page)
    values = np.random.default_rng(0).normal(size=(len(images), 5)).astype(np.float32)
    np.save(tmp_path / "e.npy", values)
    (tmp_path / "e.txt").write_text("\n".join(images.frame["path"]))
    words = ["train", "foundation.pretrain", "--unlabelled", str(images.root), "--teacher", str(tmp_path / "e.npy")]
    words += ["--network", "test_resnet", "--image-size", str(SIZE), "--nested", "8", "16", "--epochs", "1"]
    assert cli.run([*words, "--out", str(tmp_path / "run")]) == 0
    run = Run.open(tmp_path / "run")
    assert run.finished
    assert run.info["recipe"]["arguments"]["nested"] == [8, 16]
    assert cli.run([*words, "--out", str(tmp_path / "other"), "--match", "l7"]) == 2
    assert not (tmp_path / "other").exists()

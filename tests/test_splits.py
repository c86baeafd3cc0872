"""No patient in two splits, every class in every split, shares kept, and the same again with the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import MakeFolder
from hypothesis import given, settings
from hypothesis import strategies as st

from histill.data import Images, read_images, split
from histill.data.images import COLUMNS
from histill.errors import BadInput


def table(rows: Sequence[tuple[str, str]], splits: Sequence[str] | None = None, copies: int = 1) -> Images:
    """A table of ``(label, patient)`` rows whose contents repeat after ``copies``, without files."""
    frame = pd.DataFrame(dict.fromkeys(COLUMNS, ""), index=range(len(rows)))
    frame["label"], frame["patient"] = zip(*rows)
    frame["path"] = [f"{row}.png" for row in range(len(rows))]
    frame["content"] = [f"content{row // copies}" for row in range(len(rows))]
    if splits is not None:
        frame["split"] = list(splits)
    return Images(frame, Path("nowhere"), tuple(sorted(set(frame["label"]))))


def counted(parts: Images) -> pd.DataFrame:
    """Images by class and split."""
    return pd.crosstab(parts.frame["label"], parts.frame["split"]).reindex(
        columns=["train", "val", "test"], fill_value=0
    )


def undivided(parts: Images, column: str) -> bool:
    return bool(parts.frame.groupby(column)["split"].nunique().max() == 1)


SHARES = st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.3])
OF_ONE_CLASS = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=20), min_size=2, max_size=4)


@given(classes=OF_ONE_CLASS, val=SHARES, test=SHARES, seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_patients_of_one_class_are_divided_in_proportion(
    classes: list[list[int]], val: float, test: float, seed: int
) -> None:
    rows = [(f"c{c}", f"p{c}-{p}") for c, sizes in enumerate(classes) for p, n in enumerate(sizes) for _ in range(n)]
    parts = split(table(rows), val=val, test=test, seed=seed)
    assert undivided(parts, "patient")
    held = counted(parts)
    assert (held > 0).all().all()
    for c, sizes in enumerate(classes):
        for name, share in (("train", 1 - val - test), ("val", val), ("test", test)):
            over = held.loc[f"c{c}", name] - share * sum(sizes)
            assert -2 * max(sizes) < over < max(sizes)
    assert split(table(rows), val=val, test=test, seed=seed).frame.equals(parts.frame)


@given(
    patients=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=2, max_size=25),
    val=SHARES,
    test=SHARES,
)
@settings(max_examples=25, deadline=None)
def test_patients_of_several_classes_are_never_divided(patients: list[list[str]], val: float, test: float) -> None:
    rows = [(label, f"p{number}") for number, labels in enumerate(patients) for label in labels]
    try:
        parts = split(table(rows), val=val, test=test)
    except BadInput as error:
        assert "too few patients" in str(error)  # noqa: PT017
        return
    assert undivided(parts, "patient")
    assert (counted(parts) > 0).all().all()
    assert parts.frame.drop(columns="split").equals(table(rows).frame.drop(columns="split"))


def test_shares_come_out_where_patients_are_many() -> None:
    rows = [(label, f"{label}{p}") for label, n in (("a", 300), ("b", 100)) for p in range(n) for _ in range(1 + p % 4)]
    held = counted(split(table(rows), val=0.15, test=0.2)).to_numpy()
    assert np.abs(held / held.sum(1, keepdims=True) - [0.65, 0.15, 0.2]).max() < 0.01


def test_another_seed_is_another_split() -> None:
    rows = [("ab"[p % 2], f"p{p}") for p in range(40) for _ in range(3)]
    seen = {split(table(rows), seed=seed).split_hash for seed in range(10)}
    assert len(seen) == 10


def test_without_patients_images_are_divided_and_copies_stay_together() -> None:
    parts = split(table([("ab"[i // 60], "") for i in range(120)], copies=3))
    assert undivided(parts, "content")
    assert counted(parts).to_numpy().tolist() == [[42, 9, 9]] * 2


def test_what_the_data_brings_is_kept_and_what_is_missing_is_cut_from_train() -> None:
    rows = [("ab"[p % 2], f"p{p}") for p in range(40)]
    brought = ["test" if p < 10 else "train" for p in range(40)]
    data = table(rows, brought)
    for seed in range(3):
        parts = split(data, val=0.2, seed=seed)
        assert parts.rows("test") == data.rows("test")
        assert set(parts.rows("val")) < set(data.rows("train"))
        assert len(parts.rows("val")) == 6
    whole = ["test" if p < 10 else "val" if p < 20 else "train" for p in range(40)]
    assert split(table(rows, whole), val=0.4, test=0.4).frame["split"].tolist() == whole


def test_a_brought_part_without_a_class_is_told_once() -> None:
    rows = [("abc"[p % 3], f"p{p}") for p in range(30)]
    brought = ["train" if p < 15 or p % 3 == 2 else "val" if p < 22 else "test" for p in range(30)]
    parts = split(table(rows, brought))
    said = "no image of c in the {} split: means over classes there leave it out"
    assert split(parts).notices == parts.notices == (said.format("val"), said.format("test"))
    assert split(table(rows)).notices == ()


def test_a_part_of_no_share_is_left_out() -> None:
    rows = [("ab"[p % 2], f"p{p}") for p in range(20)]
    assert set(split(table(rows), val=0.2, test=0).frame["split"]) == {"train", "val"}
    assert set(split(table(rows), val=0, test=0).frame["split"]) == {"train"}


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (0.9, 0.2), (-0.1, 0.2), (0.2, 1.0), (float("nan"), 0.1)])
def test_impossible_shares_are_refused(val: float, test: float) -> None:
    with pytest.raises(BadInput, match="shares must be"):
        split(table([("a", "p"), ("b", "q")]), val=val, test=test)


def test_too_few_patients_are_refused_by_class_and_split() -> None:
    rows = [("a", f"p{p}") for p in range(9)] + [("b", "q"), ("b", "r")]
    with pytest.raises(BadInput, match="no image of b in the test split: too few patients"):
        split(table(rows))
    with pytest.raises(BadInput, match="too few images"):
        split(table([("a", ""), ("b", "")]))
    with pytest.raises(BadInput, match="test but no train"):
        split(table([("a", ""), ("b", "")], ["test", "test"]))
    with pytest.raises(BadInput, match="seed=-1"):
        split(table(rows), seed=-1)


def test_one_picture_of_two_patients_that_are_divided_is_a_leak() -> None:
    data = table([("ab"[p % 2], f"p{p}") for p in range(40)])
    data.frame["content"] = ["same" if p < 30 and p % 2 == 0 else f"c{p}" for p in range(40)]
    with pytest.raises(BadInput, match=r"leak: 1 images are in two splits: 0\.png"):
        split(data)


def test_whole_sites_are_divided_where_asked_for() -> None:
    images = table([("benign", f"p{i}") for i in range(30)] + [("malignant", f"q{i}") for i in range(30)])
    sited = images.with_frame(images.frame.assign(site=[f"s{i % 10}" for i in range(60)]))
    parts = split(sited, val=0.2, test=0.2, by="site")
    assert undivided(parts, "site")
    assert not undivided(split(sited, val=0.2, test=0.2, by="patient"), "site")
    assert counted(parts).to_numpy().tolist() == [[18, 6, 6], [18, 6, 6]]
    with pytest.raises(BadInput, match="60 images have no site"):
        split(images, by="site")
    with pytest.raises(BadInput, match="patient or site"):
        split(images, by="scanner")  # type: ignore[arg-type]
    one = sited.with_frame(sited.frame.assign(patient="everyone"))
    with pytest.raises(BadInput, match="1 patients are in two splits"):
        split(one, val=0.2, test=0.2, by="site")


def test_a_folder_from_the_disk(folder: MakeFolder) -> None:
    data = read_images(folder({"a": 24, "b": 24}, per_patient=4), patient=r"p\d+")
    parts = split(data, val=0.2, test=0.2, seed=3)
    assert undivided(parts, "patient")
    assert counted(parts).to_numpy().min() >= 4
    assert parts.hash == data.hash
    assert parts.split_hash != data.split_hash

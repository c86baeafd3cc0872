"""A folder or a manifest becomes one table; what would make its figures worthless is refused in one line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pytest
from conftest import MakeFolder, picture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from histill.data import Images, read_images, read_unlabelled
from histill.data.images import COLUMNS, few, read_paths
from histill.errors import BadInput


def manifest(root: Path, text: str | bytes, name: str = "manifest.csv") -> Path:
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / name


def small(tmp_path: Path) -> Path:
    """``a.png`` to ``d.png``, distinct."""
    for seed, name in enumerate("abcd"):
        Image.fromarray(picture(seed)).save(tmp_path / f"{name}.png")
    return tmp_path


def refused(source: Path, *words: str, patient: str | None = None) -> None:
    with pytest.raises(BadInput) as error:
        read_images(source, patient=patient)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_class_folders_become_a_table(folder: MakeFolder) -> None:
    root = folder({"benign": 3, "malignant": 2})
    images = read_images(root)
    assert images.classes == ("benign", "malignant")
    assert list(images.frame.columns) == list(COLUMNS)
    assert images.frame["path"].tolist() == [
        "benign/p000_0.png",
        "benign/p001_1.png",
        "benign/p002_2.png",
        "malignant/p003_0.png",
        "malignant/p004_1.png",
    ]
    assert images.frame["label"].tolist() == ["benign"] * 3 + ["malignant"] * 2
    assert set(images.frame["split"]) == set(images.frame["patient"]) == {""}
    assert images.notices == ()
    for path, content in zip(images.paths(), images.frame["content"]):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == content
    assert not images.has_patients
    assert images.units.tolist() == images.frame["content"].tolist()


def test_images_are_found_below_class_folders_and_other_files_are_not_taken(folder: MakeFolder) -> None:
    root = folder({"a": 1, "a/deeper/still": 1, "b": 1})
    (root / "a" / "notes.txt").write_text("no picture")
    (root / "a" / "._p000_0.png").write_bytes(b"what macOS leaves")
    (root / ".git").mkdir()
    assert len(read_images(root)) == 3
    assert read_images(root).classes == ("a", "b")


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "validation", "TEST"), ("train", "valid", "test")]
)
def test_split_folders_are_kept(folder: MakeFolder, names: tuple[str, str, str]) -> None:
    root = folder({f"{split}/{label}": 2 for split in names for label in ("a", "b")})
    images = read_images(root)
    assert [len(images.rows(split)) for split in ("train", "val", "test")] == [4, 4, 4]
    assert images.classes == ("a", "b")
    for split, name in zip(("train", "val", "test"), names):
        assert all(images.frame["path"][row].startswith(name) for row in images.rows(split))


def test_split_folders_beside_class_folders_are_refused(folder: MakeFolder) -> None:
    refused(folder({"train/a": 2, "train/b": 2, "c": 2}), "c beside train")


def test_a_manifest_becomes_the_same_kind_of_table(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "d.png").rename(tmp_path / "sub" / "d.png")
    text = (
        "\ufeffPath, Label ,patient,split,mask,site,stain\n"
        "a.png,x,p1,train,,s1,he\n"
        'b.png , x,"p1 ",training,,s1,he\n'
        "./c.png,y,p2,Training,a.png,s2,he\n"
        "sub/../sub/d.png,y,p3,test,,s2,he\n"
    )
    images = read_images(manifest(tmp_path, text))
    assert images.root == tmp_path
    assert images.frame["path"].tolist() == ["a.png", "b.png", "c.png", "sub/d.png"]
    assert images.frame["split"].tolist() == ["train", "train", "train", "test"]
    assert images.frame["patient"].tolist() == ["p1", "p1", "p2", "p3"]
    assert images.frame["mask"].tolist() == ["", "", "a.png", ""]
    assert images.frame["site"].tolist() == ["s1", "s1", "s2", "s2"]
    assert images.has_patients
    assert images.units.tolist() == images.frame["patient"].tolist()


def test_a_label_that_pandas_takes_for_missing_stays_a_label(tmp_path: Path) -> None:
    small(tmp_path)
    images = read_images(manifest(tmp_path, "path,label\na.png,NA\nb.png,null\nc.png,001\nd.png,1\n"))
    assert images.classes == ("001", "1", "NA", "null")


def test_patients_are_read_off_paths(folder: MakeFolder) -> None:
    root = folder({"a": 4, "b": 2}, per_patient=2)
    assert read_images(root, patient=r"(p\d+)_").frame["patient"].tolist() == ["p000"] * 2 + ["p001"] * 2 + ["p002"] * 2
    assert read_images(root, patient=r"p\d+").frame["patient"].tolist() == ["p000"] * 2 + ["p001"] * 2 + ["p002"] * 2
    refused(root, "--patient", "not a regular expression", patient="p(")
    refused(root, "finds no patient in 2 images", "b/p002_0.png", patient="a/p")
    refused(root, "finds no patient in 6 images", patient=r"q*")  # it matches nothing, everywhere
    refused(root, "finds no patient in 6 images", patient=r"p\d+|(q)")  # its group takes no part


def test_some_images_without_a_patient_are_named(tmp_path: Path) -> None:
    small(tmp_path)
    images = read_images(manifest(tmp_path, "path,label,patient\na.png,x,p\nb.png,y,\nc.png,x,p\nd.png,y,q\n"))
    assert images.notices == ("1 images have no patient, each is taken alone: b.png",)
    assert images.units.tolist() == ["p", images.frame["content"][1], "p", "q"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["not a CSV manifest"]),
        ("\n\n", ["not a CSV manifest"]),
        ("path,label\n", ["no rows"]),
        ("path,class\na.png,x\n", ["no column label", "path, class; rename"]),
        ("path,label\na.png,x,more\n", ["not a CSV manifest", "line 2"]),
        ('path,label\n"a.png,x\n', ["not a CSV manifest"]),
        ("path,label,label\na.png,x,y\n", ["column label", "twice"]),
        ("path,label\na.png,x\n,y\n", ["empty path or label in row 3"]),
        ("path,label\na.png,x\nb.png\n", ["empty path or label in row 3"]),
        ("path,label\na.png,x\n../x.png,y\n", ["row 3", "'../x.png'", "outside"]),
        ("path,label\na.png,x\nsub/../../x.png,y\n", ["row 3", "outside"]),
        ("path,label\na.png,x\n/etc/hostname,y\n", ["row 3", "outside"]),
        ("path,label\na.png,x\n.,y\n", ["row 3", "outside"]),
        ("path,label\na.png,x\nhttps://x.org/b.png,y\n", ["row 3", "not a file's path"]),
        ("path,label\na.png,x\nb\x00.png,y\n", ["row 3", "not a file's path"]),
        ('path,label\na.png,x\n"b\n.png",y\n', ["row 3", "not a file's path"]),
        ("path,label,mask\na.png,x,\nb.png,y,../m.png\n", ["row 3", "'../m.png'", "outside"]),
        ("path,label\na.png,x\ngone.png,y\n", ["1 images do not exist", "gone.png"]),
        (f"path,label\na.png,x\n{'b' * 300}.png,y\n", ["1 images do not exist"]),
        ("path,label,split\na.png,x,train\nb.png,y,holdout\n", ["unknown split 'holdout'", "train, val or test"]),
        ("path,label,split\na.png,x,train\nb.png,y,\n", ["unknown split ''"]),
        ("path,label\na.png,x\nb.png,x\n", ["one class only (x)"]),
        ("path,label\na.png,x\nb.png,y\na.png,y\n", ["1 images are listed with two labels", "a.png"]),
        ("path,label,patient\na.png,x,p\nb.png,y,q\na.png,x,r\n", ["two labels, splits or patients", "a.png"]),
        ("path,label,split\na.png,x,train\nb.png,y,train\nc.png,z,test\n", ["labels that no training image has: z"]),
        (
            "path,label,patient,split\na.png,x,p,train\nb.png,y,q,train\nc.png,x,p,test\nd.png,y,r,test\n",
            ["leak: 1 patients are in two splits: p"],
        ),
        ("path,label,split\na.png,x,train\nb.png,y,train\na.png,x,test\nd.png,y,test\n", ["two labels, splits"]),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(manifest(small(tmp_path), text), *words)


def test_a_manifest_in_another_encoding_is_refused(tmp_path: Path) -> None:
    small(tmp_path)
    refused(manifest(tmp_path, "path,label\na.png,gutartig\nb.png,bösartig\n".encode("latin-1")), "not UTF-8", "byte")
    refused(manifest(tmp_path, "path,label\na.png,x\nb.png,y\n".encode("utf-16")), "manifest.csv")


def test_bad_folders_are_refused(tmp_path: Path, folder: MakeFolder) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no class folders")
    root = folder({"a": 1, "b": 1})
    (root / "c").mkdir()
    refused(root, "c: empty class folder")
    refused(folder({"only": 3}, name="one"), "one class only (only)")
    (tmp_path / "one" / "manifest.csv").write_text("path,label\n")
    refused(tmp_path / "one", "one class only (only)", f"give {tmp_path / 'one' / 'manifest.csv'}")
    (tmp_path / "splits" / "train").mkdir(parents=True)
    refused(tmp_path / "splits", "no class folders under train")
    refused(folder({"train/a": 1, "train/b": 1, "test/a": 1, "test/c": 1}, name="unseen"), "no training image has: c")


def test_a_file_name_that_is_not_utf8_is_refused(folder: MakeFolder) -> None:
    root = folder({"a": 1, "b": 1})
    try:
        (root / "a" / "p000_0.png").rename(root / "a" / "x\udcff.png")
    except OSError:
        pytest.skip("this file system has no such names")
    refused(root, "file names are not UTF-8", "udcff")


def test_the_same_file_in_two_splits_is_a_leak(folder: MakeFolder) -> None:
    root = folder({f"{split}/{label}": 2 for split in ("train", "test") for label in ("a", "b")})
    (root / "test" / "a" / "copy.png").write_bytes((root / "train" / "a" / "p000_0.png").read_bytes())
    refused(root, "leak: 1 images are in two splits", "train/a/p000_0.png", "test/a/copy.png")


def test_copies_within_a_split_are_a_notice_and_with_two_labels_an_error(folder: MakeFolder) -> None:
    root = folder({"a": 2, "b": 2})
    content = (root / "a" / "p000_0.png").read_bytes()
    (root / "a" / "copy.png").write_bytes(content)
    images = read_images(root)
    assert len(images) == 5
    assert images.notices == ("2 files are copies of one another within a split: a/copy.png, a/p000_0.png",)
    (root / "b" / "copy.png").write_bytes(content)
    refused(root, "1 images have two labels", "a/copy.png", "b/copy.png")


def test_a_row_listed_twice_is_kept_once_and_said(tmp_path: Path) -> None:
    images = read_images(manifest(small(tmp_path), "path,label\na.png,x\nb.png,y\n./a.png,x\n"))
    assert images.frame["path"].tolist() == ["a.png", "b.png"]
    assert images.notices == ("1 images are listed more than once, kept once: a.png",)


def test_unlabelled_images_and_plain_lists(tmp_path: Path, folder: MakeFolder) -> None:
    root = folder({"more": 2, "more/sub": 1})
    images = read_unlabelled(root)
    assert (len(images), images.classes, set(images.frame["label"]), set(images.frame["split"])) == (
        3,
        (),
        {""},
        {"train"},
    )
    small(tmp_path)
    assert read_paths(manifest(tmp_path, "path\nb.png\na.png\n")) == [tmp_path / "b.png", tmp_path / "a.png"]
    (tmp_path / "none").mkdir()
    for bad in ("none", "gone"):
        with pytest.raises(BadInput, match="--unlabelled"):
            read_unlabelled(tmp_path / bad)


def test_the_hash_is_of_contents_and_not_of_where_or_in_which_order_they_lie(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "twin.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows = ["a.png,x,p", "b.png,y,q", "c.png,x,r", "twin.png,x,s"]
    first = read_images(manifest(tmp_path, "\n".join(["path,label,patient", *rows])))
    again = read_images(manifest(tmp_path, "\n".join(["path,label,patient", *rows[::-1]]), "again.csv"))
    other = read_images(
        manifest(tmp_path, "\n".join(["path,label,patient", *rows]).replace("b.png,y", "b.png,z"), "o.csv")
    )
    assert first.hash == again.hash
    assert first.split_hash == again.split_hash
    assert first.hash != other.hash


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    rows=st.lists(st.lists(TEXT, min_size=len(COLUMNS), max_size=len(COLUMNS)), min_size=1, max_size=5),
    classes=st.lists(TEXT, min_size=1, max_size=4),
)
@example(
    rows=[["a\r\nb", "\r", "\t", '"', "#", "NA", " ", *[""] * (len(COLUMNS) - 7)]],
    classes=["tab\tin it", "line\nin it", " "],
)
@settings(max_examples=40, deadline=None)
def test_a_saved_table_loads_equal(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], classes: list[str]
) -> None:
    path = tmp_path_factory.mktemp("table") / "data.csv"
    before = Images(pd.DataFrame(rows, columns=list(COLUMNS), dtype=str), path.parent, tuple(classes))
    before.save(path)
    after = Images.load(path)
    assert after.frame.values.tolist() == before.frame.values.tolist()
    assert (after.root, after.classes) == (before.root.resolve(), before.classes)
    assert after.hash == before.hash
    assert [p.name for p in path.parent.iterdir()] == ["data.csv"]


@pytest.mark.parametrize("text", ["", "path,label\n", "# {}\npath\n", "# {bad\n", '# {"root": 1, "classes": 2}\nx\n'])
def test_a_damaged_table_is_bad_input(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput, match=r"data\.csv"):
        Images.load(manifest(tmp_path, text, "data.csv"))
    with pytest.raises(BadInput, match="does not exist"):
        Images.load(tmp_path / "gone.csv")


def test_whatever_is_in_place_of_a_table_is_one_line(tmp_path: Path) -> None:
    whole = Images(pd.DataFrame([["é"] * len(COLUMNS)], columns=list(COLUMNS)), tmp_path, ("é", "b"))
    whole.save(tmp_path / "whole.csv")
    raw = (tmp_path / "whole.csv").read_bytes()
    path = tmp_path / "data.csv"
    for text in (b"# " + b"[" * 100_000, raw.replace("é".encode(), b"\xff"), raw[:-3], raw + b'"a","b"\n"', b"\0" * 99):
        path.write_bytes(text)
        with pytest.raises(BadInput, match=r"data\.csv: not a table of images") as caught:
            Images.load(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadInput, match=r"data\.csv: not a table of images \(.*directory"):
        Images.load(path)


FIELD = st.one_of(
    st.sampled_from(
        ["a.png", "b.png", "x", "y", "train", "test", "p1", "", '"', "../a.png", ".", "a.png/", "\x00", "http://x"]
    ),
    TEXT,
)
HEADER = st.lists(st.sampled_from([*COLUMNS, " Path", "LABEL", "other", ""]), min_size=1, max_size=5)
TABLE = st.tuples(st.one_of(st.just(["path", "label"]), HEADER), st.lists(st.lists(FIELD, max_size=5), max_size=6)).map(
    lambda table: "\n".join(",".join(row) for row in [table[0], *table[1]])
)


@given(
    content=st.one_of(
        TABLE.map(str.encode), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")), st.binary(max_size=60)
    )
)
@example(content=b"path,label\na.png,x\nb.png,y\n")
@settings(max_examples=150, deadline=None)
def test_whatever_a_manifest_holds_it_is_read_or_bad_input(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzz"
    root.mkdir(exist_ok=True)
    if not (root / "a.png").exists():
        small(root)
    try:
        images = read_images(manifest(root, content))
    except BadInput as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert len(images.classes) >= 2
        assert all(path.is_file() and path.resolve().is_relative_to(root.resolve()) for path in images.paths())


def test_few_names_the_first_and_counts_the_rest() -> None:
    assert few(["a", "b"]) == "a, b"
    assert few("abcdefg") == "a, b, c, d, e and 2 more"
    assert few([1, 2, 3], most=1) == "1 and 2 more"
    assert few(["a" * 400, "b" * 200 + "c" * 5000 + "d" * 200]) == f"{'a' * 400}, {'b' * 150}…{'d' * 150}"


def test_a_slide_stands_for_its_patient_where_none_is_named(tmp_path: Path) -> None:
    rows = "a.png,x,,s1\nb.png,y,p2,s1\nc.png,x,,\nd.png,y,,s2\n"
    images = read_images(manifest(small(tmp_path), "path,label,patient,slide\n" + rows))
    assert images.frame["patient"].tolist() == ["s1", "p2", "", "s2"]


def test_a_manifest_in_a_folder_that_is_given_is_not_passed_over_in_silence(folder: MakeFolder) -> None:
    root = folder({"images": 2, "unlabelled": 2}, name="made")
    assert read_images(root).notices == ()
    (root / "manifest.csv").write_text("path,label\n")
    assert [line for line in read_images(root).notices if f"{root / 'manifest.csv'} is not read" in line]

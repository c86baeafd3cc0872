"""In a real browser the viewer shows tissue under a map, zooms, pans, toggles and flies to a lesion.

On a phantom, and on every slide that the environment names: ``HISTILL_SLIDES=a.svs:b.tiff make test``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, Browser
from numpy.typing import NDArray
from slides_tiny import model
from viewing import COLORS, MAP_PX, serving, square, write_result

from histill.data.phantom import write_slide
from histill.slides.predict import predict_slide
from histill.slides.view.library import Library

REAL = [Path(name) for name in os.environ.get("HISTILL_SLIDES", "").split(os.pathsep) if name]


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")
def test_a_phantom_in_chromium(tmp_path: Path) -> None:
    size = (1024, 768)
    slide = write_slide(tmp_path / "phantom.tiff", width=size[0], height=size[1], mpp=0.5, seed=2)
    maps = np.zeros((2, size[1] // MAP_PX, size[0] // MAP_PX), np.uint8)
    maps[0, :, :32], maps[1, :, 32:] = 230, 230  # benign on the left, malignant on the right
    calmer = np.stack([np.full_like(maps[0], 230), np.zeros_like(maps[1])])
    lesion = square(600, 300, 60)
    write_result(tmp_path / "student", slide, size, maps, [square(100, 100, 20), lesion])
    write_result(tmp_path / "teacher", slide, size, calmer, [])
    calm = "histill.plane._run == null && histill.plane.layers.every((l) => !l.visible || l.waiting === 0)"
    with (
        serving(Library(tmp_path / "student", tmp_path / "teacher"), token="tt") as viewer,
        Browser(tmp_path / "profile", 1000, 600) as page,
    ):

        def seen() -> NDArray[np.float64]:
            page.wait(calm)
            time.sleep(0.1)  # painted after the last tile came
            return page.picture()[:, 280:].astype(np.float64)  # beside the panel

        def share(picture: NDArray[np.float64], column: slice) -> float:
            """How much more red than blue there is, where there is colour."""
            part = picture[150:450, column]
            coloured = np.ptp(part, axis=-1) > 25
            return float((part[..., 0] - part[..., 2])[coloured].mean())

        page.go(viewer.address)
        page.wait("document.querySelector('.card img')?.naturalWidth > 0")
        assert page.run("location.search") == ""  # the token does not stay in sight
        page.click(".card")
        page.wait("document.documentElement?.dataset.ready === 'yes'")
        with_map = seen()
        left, right = slice(120, 340), slice(380, 600)
        tissue = (np.ptp(with_map, axis=-1) > 25).mean()
        assert 0.2 < tissue < 0.9
        assert share(with_map, right) > share(with_map, left) + 30  # the map is orange
        page.click("[data-layer=malignant]")
        assert abs(share(seen(), right) - share(seen(), left)) < 15
        page.click("[data-layer=malignant]")
        assert share(seen(), right) > share(seen(), left) + 30
        page.run("document.querySelector('#opacity').value = 0")
        page.run("document.querySelector('#opacity').dispatchEvent(new Event('input'))")
        bare = seen()
        assert abs(share(bare, right) - share(bare, left)) < 15

        def slide_to(name: str, percent: int) -> None:
            page.run(f"document.querySelector('#{name}').value = {percent}")
            page.run(f"document.querySelector('#{name}').dispatchEvent(new Event('input'))")
            time.sleep(0.2)  # the threshold waits for the hand to rest

        slide_to("opacity", 60)
        assert share(seen(), right) > share(seen(), left) + 30
        slide_to("threshold", 95)  # above 230 / 255
        assert np.abs(seen() - bare).mean() < 1
        page.run("document.querySelectorAll('details').forEach((box) => { box.open = true; })")
        page.click("[data-layer=disagreement]")  # to the other model all is benign
        apart = np.abs(seen() - bare)
        assert apart[150:450, right].mean() > 15
        assert apart[150:450, left].mean() < 1
        page.click("[data-layer=disagreement]")
        slide_to("opacity", 0)

        fit = page.run("histill.plane.camera")
        label = page.run("document.querySelector('#scale-label').textContent")
        assert label.endswith("µm")
        length = float(label.split()[0]) / 0.5 / fit["scale"]
        assert page.run("document.querySelector('#scale-bar').getBoundingClientRect().width") == pytest.approx(
            length, abs=0.1
        )

        under = page.run("histill.plane.under([500, 200])")
        page.wheel(280 + 500, 200, -240)
        page.wait("histill.plane._run != null || histill.plane.camera.scale < 1")
        page.wait(calm)
        assert page.run("histill.plane.camera")["scale"] == pytest.approx(fit["scale"] / 2, rel=0.01)
        np.testing.assert_allclose(page.run("histill.plane.under([500, 200])"), under, atol=1)  # it stays where it was
        assert np.abs(seen() - bare).mean() > 5

        before = page.run("histill.plane.camera")
        page.drag(700, 300, -100, -50)
        page.wait(calm)
        after = page.run("histill.plane.camera")
        assert after["x"] - before["x"] == pytest.approx(100 * before["scale"], rel=0.15)
        assert after["y"] - before["y"] == pytest.approx(50 * before["scale"], rel=0.15)

        page.key("0")
        page.wait(f"Math.abs(histill.plane.camera.scale - {fit['scale']}) < 1e-6")
        page.key("+")
        page.wait(f"Math.abs(histill.plane.camera.scale - {fit['scale'] / 2}) < 0.01")
        page.key("n")  # the largest lesion first
        page.wait("histill.chosen === 0 && histill.plane._run == null")
        there = page.run("histill.plane.camera")
        assert (there["x"], there["y"]) == pytest.approx((630, 330), abs=1)
        orange = np.abs(seen() - COLORS["malignant"]).max(axis=-1) < 30
        assert orange.sum() > 300  # its outline
        page.click("#show-lesions")
        assert (np.abs(seen() - COLORS["malignant"]).max(axis=-1) < 30).sum() < orange.sum() / 3
        assert not page.console


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("slide", REAL, ids=lambda path: path.name)
def test_a_real_slide_in_chromium(slide: Path, tmp_path: Path) -> None:
    said = predict_slide(model(tmp_path / "purple.pt"), slide, tmp_path / "out", slide_mpp=0.5)
    calm = "histill.plane._run == null && histill.plane.layers.every((l) => !l.visible || l.waiting === 0)"
    with serving(Library(tmp_path / "out"), token="tt") as viewer, Browser(tmp_path / "profile", 1000, 600) as page:

        def seen() -> NDArray[np.float64]:
            page.wait(calm)
            time.sleep(0.2)
            return page.picture()[:, 280:].astype(np.float64)

        page.go(viewer.address)
        page.wait("document.querySelector('.card img')?.naturalWidth > 0")
        page.click(".card")
        page.wait("document.documentElement?.dataset.ready === 'yes'")
        with_map = seen()
        assert (np.ptp(with_map, axis=-1) > 25).mean() > 0.1  # tissue has colour, glass and paper have none
        page.click("[data-layer=tumour]")
        bare = seen()
        apart = np.abs(with_map - bare).max(-1) > 8
        assert apart.mean() > 0.01  # the map lies over tissue
        assert np.ptp(bare[apart], axis=-1).mean() > np.ptp(bare[~apart], axis=-1).mean()
        page.click("[data-layer=tumour]")
        assert np.abs(seen() - with_map).mean() < 1
        scale = page.run("histill.plane.camera.scale")
        page.wheel(280 + 360, 300, -240)
        page.wait(f"histill.plane.camera.scale < {scale / 1.9}")
        close = seen()
        assert np.abs(close - with_map).mean() > 5
        page.drag(700, 300, -150, -80)
        assert np.abs(seen() - close).mean() > 3
        if said["lesions"]["count"]:
            page.key("n")
            page.wait("histill.chosen === 0 && histill.plane._run == null")
        assert not page.console

"""In a real browser the viewer shows tissue under a map, zooms, pans, toggles and flies to a lesion."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, Browser
from numpy.typing import NDArray
from viewing import COLORS, MAP_PX, serving, square, write_result

from histill.data.phantom import write_slide
from histill.slides.view.library import Library


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")
def test_a_phantom_in_chromium(tmp_path: Path) -> None:
    size = (1024, 768)
    slide = write_slide(tmp_path / "phantom.tiff", width=size[0], height=size[1], mpp=0.5, seed=2)
    maps = np.zeros((2, size[1] // MAP_PX, size[0] // MAP_PX), np.uint8)
    maps[1, :, 32:] = 255  # the right half
    lesion = square(600, 300, 60)
    write_result(tmp_path / "student", slide, size, maps, [square(100, 100, 20), lesion])
    write_result(tmp_path / "teacher", slide, size, 255 - maps, [])
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

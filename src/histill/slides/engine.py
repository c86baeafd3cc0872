"""A model as it looks at tiles: probabilities, and where asked and known exits, features and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from histill.deploy.deliver import open_any
from histill.deploy.predictor import Leaving, Pixels, Predictor, TorchPredictor
from histill.errors import BadInput, Failed
from histill.files import digest, file_digest
from histill.machine import computes_bf16
from histill.memory import Fits
from histill.models.mac_resnet import attention_mask
from histill.run import Run
from histill.slides.compiled import compiled

__all__ = ["Model", "answers", "device_of", "load_model"]


@dataclass(frozen=True)
class Model:
    """A predictor and what is known of it.

    Attributes:
        predictor: images to probabilities.
        name: of its file or folder.
        digest: of its weights and its card.
        mpp: microns per pixel at which it was trained, None for plain images.
        bf16: whether it computes in bfloat16, with channels last.
        fast: the same network compiled for this CPU, which gives probabilities alone and takes tiles of the model's own
            size; None where it is not.
        temperature: that calibrates its tiles, fitted on the run's validation images; None where there is none.
        positive: the run's positive class.
        about: what is said of it on the page.
        fits: how many tiles memory holds at once.
    """

    predictor: Predictor
    name: str
    digest: str
    mpp: float | None = None
    bf16: bool = False
    fast: Predictor | None = None
    temperature: float | None = None
    positive: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    fits: Fits = field(default_factory=lambda: Fits("looking at tiles"), repr=False, compare=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the columns."""
        return self.predictor.classes

    @property
    def runtime(self) -> str:
        """What computes its probabilities."""
        return type(self.fast or self.predictor).__name__.removesuffix("Predictor")

    @property
    def device(self) -> str:
        """Where it computes."""
        return device_of(self.predictor)

    def look(self, images: Pixels, *, features: bool = False) -> dict[str, NDArray[Any]]:
        """``(B, 3, H, W)`` in [0, 1] -> ``probabilities (B, C)`` float32, ``exits (B,)`` where images leave early.

        With ``features`` also ``features (B, D)``, the network's ``pooled`` output. Where memory does not hold the
        batch, it is looked at in pieces.

        Raises:
            BadInput: features of what is no run, or of a network without them.
            Failed: memory does not hold a single image, or an answer is not a number.
        """
        found = _joined(self.fits(partial(self._look, features=features), images))
        if lost := int(np.isnan(found["probabilities"]).reshape(len(images), -1).any(axis=1).sum()):
            raise Failed(f"{self.name} answers {lost} of {len(images)} tiles with what is not a number")
        return found

    def _look(self, images: Pixels, *, features: bool) -> dict[str, NDArray[Any]]:
        if isinstance(self.predictor, Leaving) and not features:
            probabilities, exits = self.predictor.leave(images)
            return {"probabilities": probabilities.astype(np.float32), "exits": exits.astype(np.uint8)}
        quick = self.predictor if not self.bf16 else None
        if self.fast is not None and images.shape[-1] == self.fast.image_size:
            quick = self.fast
        if quick is not None and not features:
            return {"probabilities": quick(images).astype(np.float32)}
        outputs = self._outputs(images)
        found = {"probabilities": softmax(outputs["logits"], axis=1)}
        if features:
            if "pooled" not in outputs:
                raise BadInput(f"{self.name}: its network gives no features (an output named pooled)")
            found["features"] = outputs["pooled"].reshape(len(images), -1)
        return found

    def outputs(self, images: Pixels) -> dict[str, NDArray[np.float32]]:
        """Everything that a run's network says of images, by name."""
        return _joined(self.fits(self._outputs, images))

    def _outputs(self, images: Pixels) -> dict[str, NDArray[np.float32]]:
        if not isinstance(self.predictor, TorchPredictor):
            raise BadInput(f"{self.name}: features and attention need a run; an exported file gives logits alone")
        network = self.predictor.network
        device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
        tensor = torch.from_numpy(images).to(device)
        if self.bf16:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        precise = torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with torch.inference_mode(), precise:
            said = network(tensor)
        return {name: value.float().cpu().numpy() for name, value in said.items() if torch.is_tensor(value)}


def answers(model: Model, images: Pixels) -> dict[str, NDArray[np.float32]]:
    """Where a run's network answers, by the name of its outputs that are maps: each ``(B, H, W)`` in [0, 1].

    Of attention its mean, of features the mean of their magnitudes, enlarged to the images and stretched from the least
    to the most of each image. Empty of an exported file, which gives logits alone.
    """
    if not hasattr(model.predictor, "network"):
        return {}
    maps = {name: value for name, value in model.outputs(images).items() if value.ndim == 4}
    maps.pop("logits", None)
    means = {name: value if name == "attention" else np.abs(value) for name, value in maps.items()}
    return {
        name: attention_mask(torch.from_numpy(value).mean(1), images.shape[-2:])[0].numpy()
        for name, value in means.items()
    }


def load_model(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    runtime: str = "auto",
    code: Path | None = None,
) -> Model:
    """Open a run, an exported file, or a folder of exit segments, for slides.

    Args:
        path: what is opened.
        device: where a run computes.
        precision: ``auto`` (bf16 for a run where the machine computes it), ``32-true`` or ``bf16``.
        runtime: of a run: ``auto`` (OpenVINO on a CPU where it is installed, else PyTorch) or ``torch``.
        code: the Python file of a network that is not Histill's.

    Raises:
        BadInput: no model there, or ``bf16`` of an exported file.
    """
    path = Path(path)
    if precision not in ("auto", "32-true", "bf16"):
        raise BadInput(f"--precision {precision}: one of auto, 32-true, bf16")
    if runtime not in ("auto", "torch"):
        raise BadInput(f"--runtime {runtime}: auto or torch")
    predictor = open_any(path, device=device, code=code)
    if not isinstance(predictor, TorchPredictor):
        if precision == "bf16":
            raise BadInput(f"{path}: an exported file computes in its own precision; --precision bf16 is for runs")
        return Model(
            predictor,
            path.name,
            _digest(path),
            mpp=predictor.mpp,
            temperature=predictor.temperature,
            about={"kind": type(predictor).__name__},
        )
    kind = device_of(predictor)
    bf16 = precision == "bf16" or (precision == "auto" and computes_bf16(kind))
    if bf16:
        predictor.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = Run.open(path, code=code)
    name, weights = path.resolve().name, _digest(path)
    fast = compiled(run, predictor.network, weights, bf16=bf16) if runtime == "auto" and kind == "cpu" else None
    return Model(
        predictor,
        name,
        weights,
        mpp=_trained_mpp(run.info, predictor.mpp),
        bf16=bf16,
        fast=fast,
        temperature=predictor.temperature,
        positive=run.info.get("positive"),
        about={"kind": "run", "recipe": (run.info.get("recipe") or {}).get("name"), "commit": run.info.get("commit")},
    )


def device_of(predictor: Predictor) -> str:
    """Where a predictor computes: an exported file on the CPU, a run where its weights are."""
    network = getattr(predictor, "network", None)
    return "cpu" if network is None else next((weight.device.type for weight in network.parameters()), "cpu")


def _joined(pieces: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _trained_mpp(info: Mapping[str, Any], otherwise: float | None) -> float | None:
    arguments = (info.get("recipe") or {}).get("arguments") or {}
    for said in (info.get("mpp"), (info.get("data") or {}).get("mpp"), arguments.get("mpp")):
        if isinstance(said, (int, float)) and said > 0:
            return float(said)
    return otherwise


def _digest(path: Path) -> str:
    """Of the weights and the classes; a run's times do not matter."""
    if path.is_file():
        return file_digest(path)
    if (path / "exits.json").is_file():
        return file_digest(path / "exits.json")
    run = Run.open(path)
    return digest([file_digest(path / "model.safetensors"), run.info["network"], list(run.classes), run.image_size])

"""Any network of timm, as a Histill network."""

from __future__ import annotations

import difflib
from typing import Any

import histill.models._torchvision  # noqa: F401 (before timm)

import timm  # isort: skip
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.parts import Normalize
from histill.models.weights import hub, load_weights
from histill.types import Outputs

__all__ = ["Timm", "create", "intermediates", "known"]

_HUBS = ("hf-hub:", "hf_hub:")


class Timm(nn.Module):
    """A timm network by name.

    Args:
        name: What `timm.list_models` lists, with or without a tag of weights (``"resnet50"``,
            ``"resnet50.a1_in1k"``), or ``"hf-hub:owner/model"``.
        classes: Number of classes; 0 leaves the head out, and then ``logits`` are the pooled features.
        weights: None, ``"imagenet"`` (the weights that timm publishes for this name, with whatever they were
            trained on), or anything that `load_weights` takes.
        arguments: Passed to `timm.create_model`, for instance ``img_size=448`` or ``drop_path_rate=0.1``;
            layers may be given by their name in `timm.layers` (``mlp_layer="SwiGLUPacked"``).

    Attributes:
        input_size: Side in pixels of the images that its published weights expect. A convolutional network
            takes other sizes too.

    Outputs: ``stage1``, ``stage2``, ... (B, C, H, W) in the order of timm's ``feature_info`` (a ResNet's stage1
    is its stem, a transformer has one per block), where timm names them; ``pooled`` (B, D), what the classifier
    sees; ``logits`` (B, classes).

    Raises:
        BadInput: Unknown name or argument, or weights that do not fit.
        Failed: Weights that cannot be fetched.
    """

    def __init__(self, name: str, classes: int, weights: str | None = None, **arguments: Any) -> None:
        super().__init__()
        self.network = create(name, classes, pretrained=weights == "imagenet", **arguments)
        source = self.network.pretrained_cfg
        self.normalize = Normalize(source["mean"], source["std"])
        size = arguments.get("img_size", source["input_size"][-1])
        self.input_size = int(size if isinstance(size, int) else size[-1])
        if weights != "imagenet":
            heads = source.get("classifier") or ()
            heads = (heads,) if isinstance(heads, str) else heads
            load_weights(self.network, weights, fresh=[f"{head}.*" for head in heads])

    def forward(self, images: Tensor) -> Outputs:
        last, outputs = intermediates(self.network, self.normalize(images))
        pooled = self.network.forward_head(last, pre_logits=True)
        classifier = self.network.get_classifier()
        # Several classifiers, or one that is a convolution: only the network knows how they are put together.
        alone = isinstance(classifier, nn.Linear | nn.Identity) and not hasattr(self.network, "aux_head")
        outputs["logits"] = classifier(pooled) if alone else self.network.forward_head(last)
        outputs["pooled"] = pooled
        return outputs


def create(name: str, classes: int, *, pretrained: bool, **arguments: Any) -> Any:
    """A bare timm network, or an error that says which names there are."""
    if not name.startswith(_HUBS):
        _check(name, pretrained)
    if "checkpoint_path" in arguments:
        raise BadInput("weights come from --weights, which reads tensors only, not from timm's checkpoint_path")
    arguments = {key: _layer(key, value) for key, value in arguments.items()}
    try:
        if not pretrained and not name.startswith(_HUBS):
            return timm.create_model(name, num_classes=classes, **arguments)
        with hub(name):
            return timm.create_model(name, pretrained=pretrained, num_classes=classes, **arguments)
    except TypeError as error:
        raise BadInput(f"timm's {name} does not take these arguments: {error}") from error


def known(name: str) -> bool:
    """Whether timm has a network of this name, or would look for it on the hub."""
    return name.startswith(_HUBS) or bool(timm.is_model(name.partition(".")[0]))


def intermediates(network: Any, images: Tensor) -> tuple[Tensor, Outputs]:
    """The last features of a timm network, and its stages by name."""
    if not hasattr(network, "forward_intermediates"):
        return network.forward_features(images), Outputs()
    last, stages = network.forward_intermediates(images, output_fmt="NCHW")
    return last, Outputs({f"stage{number}": stage for number, stage in enumerate(stages, 1)})


def _check(name: str, pretrained: bool) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        names = timm.list_models()
        close = difflib.get_close_matches(architecture, names, 3) or [n for n in names if architecture in n][:3]
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has them all"
        raise BadInput(f"timm has no network named {architecture!r}: {hint}")
    full = (whole.partition(".") for whole in timm.list_pretrained(f"{architecture}*"))
    tags = [its_tag for its_architecture, _, its_tag in full if its_architecture == architecture]
    if tag and tag not in tags:
        raise BadInput(f"timm has no weights {tag!r} of {architecture}: it has {', '.join(tags) or 'none'}")
    if pretrained and not tags:
        raise BadInput(f"timm has no weights of {architecture}: give --weights FILE or --weights none")


def _layer(argument: str, value: Any) -> Any:
    """A layer by its name, so that a run's arguments stay JSON."""
    if argument.endswith("_layer") and isinstance(value, str):
        return getattr(timm.layers, value, value)
    return value

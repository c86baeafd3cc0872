"""Where weights come from: a file, a run, an address with its checksum, or ImageNet by way of timm.

Nothing is unpickled but tensors, and nothing is fetched unless an address or ``"imagenet"`` asks for it.
"""

from __future__ import annotations

import hashlib
import math
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from histill.errors import BadInput, Failed
from histill.files import atomic, cache_dir

__all__ = ["fill", "hub", "imagenet", "load_weights", "local", "read_weights"]

_TIMEOUT_S = 5
_MOST_BYTES = 64 << 30  # of a download
_DIGITS = {"sha256": 64, "md5": 32}
_MOST_TIMES = 4
_SMALL_BYTES = 1 << 20
_MOST_WRAPPED = 8
_WRAPPERS = ("module.", "_orig_mod.", "backbone.", "network.")


def load_weights(
    module: nn.Module,
    weights: str | Path | None,
    *,
    fresh: Sequence[str] = (),
    pretrained: str | None = None,
) -> None:
    """Fill ``module`` with weights of the same names and shapes.

    Args:
        module: The network to fill.
        weights: None or ``"none"`` (nothing happens), a ``.safetensors`` or ``.pt`` file, a run's folder,
            ``"https://...#sha256=..."`` (or ``#md5=``, where no other was published), or ``"imagenet"``.
        fresh: Glob patterns of names that may keep their initial values: the head, and parts that are new.
        pretrained: The timm network whose ImageNet weights fit, where there is one.

    Names are compared without what wrappers put in front of them (``network.``, ``backbone.``, ``module.``), so that
    a bare network, one inside an adapter and the backbone of a decoder can start from each other.

    Raises:
        BadInput: A file that is missing, unreadable or unsafe, or leaves anything but ``fresh`` unfilled.
        Failed: The weights could not be fetched.
    """
    if weights is None or weights == "none":
        return
    if weights == "imagenet":
        if pretrained is None:
            raise BadInput(f"there are no ImageNet weights for {type(module).__name__}: give --weights FILE or none")
        given = imagenet(pretrained)
    else:
        given = read_weights(weights)
    fill(module, given, source=str(weights), fresh=fresh)


def fill(
    module: nn.Module, given: dict[str, Tensor], *, source: str, fresh: Sequence[str] = (), assign: bool = False
) -> None:
    """Give ``module`` the tensors of the same names and shapes, as `load_weights` does.

    A vision transformer's positions are resampled where the image size is another.

    Args:
        module: The network to fill.
        given: Named tensors.
        source: Where they are from, for the error.
        fresh: See `load_weights`.
        assign: Take the tensors themselves, for a module on the meta device, which has no memory of its own.

    Raises:
        BadInput: They leave anything but ``fresh`` unfilled.
    """
    given = {_bare(name): tensor for name, tensor in given.items()}
    own = module.state_dict()
    fresh = (*fresh, "*num_batches_tracked")
    found = {name: _placed(module, name, given[_bare(name)]) for name in own if _bare(name) in given}
    fitting = {name: tensor for name, tensor in found.items() if tensor.shape == own[name].shape}
    unfilled = [
        f"{name} {_shape(own[name])}" + (f" (file: {_shape(found[name])})" if name in found else "")
        for name in own
        if name not in fitting and not any(fnmatchcase(name, pattern) for pattern in fresh)
    ]
    if unfilled or not fitting:
        more = f" and {len(unfilled) - 3} more" if len(unfilled) > 3 else ""
        raise BadInput(
            f"{source} does not fit {type(module).__name__}: "
            f"it has no {', '.join(unfilled[:3]) or 'weight of the same name and shape'}{more}"
        )
    try:
        module.load_state_dict(fitting, strict=False, assign=assign)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"{source} does not fit {type(module).__name__}: {why}") from None


def _placed(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A transformer's learnt positions, resampled where it looks at images of another size (timm's bicubic)."""
    home, _, last = name.rpartition(".")
    owner = module.get_submodule(home)
    grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)
    if last != "pos_embed" or grid is None or tensor.ndim != 3:
        return tensor
    prefix = 0 if getattr(owner, "no_embed_class", False) else int(getattr(owner, "num_prefix_tokens", 1))
    places = max(tensor.shape[1] - prefix, 0)
    side = math.isqrt(places)
    if side == 0 or side**2 != places or tuple(grid) == (side, side):
        return tensor
    from timm.layers import resample_abs_pos_embed  # timm is there: the network is one of its own

    placed: Tensor = resample_abs_pos_embed(tensor, list(grid), num_prefix_tokens=prefix)
    return placed


def read_weights(weights: str | Path) -> dict[str, Tensor]:
    """The named tensors of a file, a run's folder or an address; see `load_weights`."""
    path = local(weights)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise BadInput(f"there is no weight file {path}: give a .safetensors or .pt file, a run's folder, or none")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            _check_unpacked(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except BadInput:
        raise
    except Exception:  # noqa: BLE001 - safetensors, zip and the unpickler raise what the damage leads to
        raise BadInput(
            f"{path} is damaged or not a safe weight file: give .safetensors, or .pt with tensors only"
        ) from None
    for _ in range(_MOST_WRAPPED):  # a dict may hold itself
        inner = next((k for k in ("state_dict", "model") if k in state), None) if isinstance(state, dict) else None
        if inner is None:
            break
        state = state[inner]
    if not isinstance(state, dict) or inner is not None:
        raise BadInput(f"{path} holds no named tensors: save a network's state_dict()")
    return {name: value for name, value in state.items() if isinstance(name, str) and _plain(value)}


def _plain(value: Any) -> bool:
    """Whether it is a tensor of numbers in the memory that it says; others cannot be copied into a network."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized and not value.is_meta


def _check_unpacked(path: Path) -> None:
    """Refuse a ``.pt`` archive that unpacks to more than it is; torch packs nothing."""
    if not zipfile.is_zipfile(path):
        return  # of before 2020, which is not packed
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > _MOST_TIMES * size + _SMALL_BYTES:
        raise BadInput(f"{path}: {unpacked:,} bytes packed into {size:,}; weights are not packed, save them again")


def imagenet(name: str) -> dict[str, Tensor]:
    """The ImageNet weights that timm publishes under ``name``."""
    import histill.models._torchvision  # noqa: F401 (before timm)

    import timm  # isort: skip

    with hub(name):
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    return state


@contextmanager
def hub(what: str, *, remedy: str = "give --weights FILE or --weights none (a teacher: NAME=FILE)") -> Iterator[None]:
    """Let timm fetch ``what``: from the hub where it can be reached, from its local cache where it cannot.

    The hub's client retries for minutes where there is no network, so one short request is tried first.

    Raises:
        Failed: Not there, not allowed or not reachable.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline = was_offline or not _reachable(constants.ENDPOINT)
    try:
        yield
    except (OSError, EntryNotFoundError) as error:
        if isinstance(error, GatedRepoError | RepositoryNotFoundError):
            reason = f"{host} does not give it to you: accept its terms there and set HF_TOKEN"
        elif offline:
            reason = f"{host} cannot be reached and it is not in the local cache"
        else:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Failed(f"cannot fetch the weights of {what}: {reason}; {remedy}") from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _reachable(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return error.code in (401, 403, 405, 429)  # it is there; another error is a gateway's
    except OSError:
        return False
    return True


def local(weights: str | Path) -> Path:
    """The file or folder that ``weights`` names; of an address (``https://...#sha256=...``) what was fetched there."""
    text = str(weights)
    return _download(text) if text.startswith(("https://", "http://")) else Path(weights)


def _download(address: str) -> Path:
    """Fetch a file once into the cache, under its checksum."""
    url, _, fragment = address.partition("#")
    kind, _, expected = fragment.lower().partition("=")
    if len(expected) != _DIGITS.get(kind) or set(expected) - set("0123456789abcdef"):
        raise BadInput(
            f"{address} has no checksum: write it as URL#sha256=<64 hex digits>, or #md5=<32> if that is known"
        )
    path = cache_dir("weights") / f"{expected}{Path(urllib.parse.urlsplit(url).path).suffix}"
    if path.exists():
        return path
    hashed = hashlib.new(kind)
    try:
        with atomic(path) as temporary:
            with urllib.request.urlopen(url, timeout=4 * _TIMEOUT_S) as answer, temporary.open("wb") as file:
                while chunk := answer.read(1 << 20):
                    hashed.update(chunk)
                    if file.write(chunk) and file.tell() > _MOST_BYTES:
                        raise BadInput(f"{url} sends more than {_MOST_BYTES:,} bytes: it is no weight file")
            if hashed.hexdigest() != expected:
                raise BadInput(f"{url} has another checksum ({kind}={hashed.hexdigest()}): check it at its source")
    except OSError as error:
        raise Failed(f"cannot fetch {url}: {getattr(error, 'reason', error)}; give --weights FILE") from error
    return path


def _bare(name: str) -> str:
    """A weight's name without what wrappers put in front of it."""
    while prefix := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(prefix)
    return name


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"

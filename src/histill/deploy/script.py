"""What a TorchScript file would do besides arithmetic, read off its code before anything of it runs.

TorchScript is a program. libtorch runs no Python pickle, but its language writes and maps files (``torch.save``,
``torch.from_file``), and a class's ``__setstate__`` runs while the file is loaded. The code lies in the file as text,
in which every operator stands by its name, so that those which a classifier has no use for can be found there.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from histill.errors import BadInput

__all__ = ["check_script"]

_MOST_CODE = 64 << 20
_FILES = re.compile(r"\b(?:save|from_file)\b")
_OPS = re.compile(r"\bops\b(?:\s*\.\s*(\w+))?")
_CLASSES = re.compile(r"\btorch\s*\.\s*classes\b(?:\s*\.\s*(\w+))?")
_KNOWN = frozenset({"aten", "prim", "prims", "quantized", "quantization", "torchvision"})
"""Families of operators that compute; others talk to other processes, or are not for files."""


def check_script(path: Path) -> None:
    """Refuse a file whose code names anything that reaches beyond its own tensors.

    The records are read by the reader that will load them, so that both see the same ones.

    Raises:
        BadInput: such a file, or no TorchScript archive.
    """
    with path.open("rb") as file:
        head = file.read(8)
    try:
        if not head.startswith(b"PK\x03\x04") or head[4:] == b"PTMF":  # the latter is taken for a FlatBuffer
            raise RuntimeError("not an archive")
        reader = torch._C.PyTorchFileReader(str(path))
        names = list(reader.get_all_records())
        if "model.json" in names:  # of 2019, which has its code elsewhere
            raise RuntimeError("of a version that is not read")
        code = [name for name in names if name.startswith("code/") and not name.endswith(".debug_pkl")]
        texts = []
        for name in code:
            texts.append(reader.get_record(name).decode())
            if sum(map(len, texts)) > _MOST_CODE:
                raise RuntimeError("its code is too long")
    except (RuntimeError, ValueError) as error:
        line = (str(error).strip().splitlines() or ["damaged"])[0].rstrip(".")
        raise BadInput(f"{path} is not a usable TorchScript model ({line})") from None
    for text in texts:
        if found := _beyond(text):
            raise BadInput(f"{path}: its code names {found}, which no classifier needs; it was not loaded")


def _beyond(text: str) -> str:
    """The first name that reaches beyond arithmetic; empty where there is none."""
    if found := _FILES.search(text):
        return f"torch.{found.group()}"
    for pattern in (_OPS, _CLASSES):
        for found in pattern.finditer(text):
            if found[1] not in _KNOWN:
                return " ".join(found.group().split())
    return ""

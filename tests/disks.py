"""Small and write-protected disks, for a process that may mount them: root, or anyone where the kernel lets them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

NO_MOUNTS = 77
"""The exit status of a process that may not mount."""

_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _RECURSIVE, _PRIVATE = 1, 32, 1 << 14, 1 << 18


def own_mounts() -> None:
    """From now on what this process mounts is seen by it alone, and goes with it; it ends where it may not."""
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS if uid == 0 else _NEW_MOUNTS | _NEW_USER):
        os._exit(NO_MOUNTS)
    try:
        if uid != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        _mount("none", Path("/"), "", _RECURSIVE | _PRIVATE, "")
    except OSError:
        os._exit(NO_MOUNTS)


def disk(folder: Path, kilobytes: int) -> None:
    """A disk of this size at ``folder``, which is empty."""
    folder.mkdir()
    try:
        _mount("tmpfs", folder, "tmpfs", 0, f"size={kilobytes}k")
    except OSError:
        os._exit(NO_MOUNTS)


def resize(folder: Path, kilobytes: int) -> None:
    """Another size; what lies there stays."""
    _mount("tmpfs", folder, "tmpfs", _REMOUNT, f"size={kilobytes}k")


def protect(folder: Path) -> None:
    """No more writing."""
    _mount("tmpfs", folder, "tmpfs", _REMOUNT | _READ_ONLY, "")


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))

"""Do the readers of strangers' files take them or refuse them in one line, whatever is in them?

    python benchmarks/fuzz.py [TARGET ...] [--minutes 60] [--add] [--out benchmarks/results/fuzz.json]
                              [--page docs/security.md]

Hypothesis draws what each target of tests/fuzz_targets.py is given. It must come back in time, within memory, and with
a value, `BadInput` or `Failed`; any other exception, a dead process, more than `SLOW_S` processor seconds or more
than `MOST_MB` above what the process had is a finding. Readers run in processes of their own, since libraries below
them may end one. Each finding is reported once, with the value that led to it. Linux only.

Minutes are the processor's, so that a busy machine fuzzes no less. A target's entry in the results is replaced when it
is fuzzed again, or with ``--add`` continued: counts and minutes add up, findings stay. Status 1 where there are
findings. ``--page`` writes the table of results between the marks in a page,
and fuzzes what is named beside it, or nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HISTILL_QUIET", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import hypothesis  # noqa: E402
import torch  # noqa: E402
from fuzz_targets import TARGETS, Target, assert_line  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

from histill.errors import HistillError  # noqa: E402
from histill.files import read_json, write_json, write_text  # noqa: E402
from histill.record import versions  # noqa: E402

SLOW_S = 5.0
MOST_MB = 1024
HUNG_S = 30.0
"""A reader that has taken so many processor seconds is ended."""
ASLEEP_S = 1800.0
"""So is one from which nothing has been heard for so long, by the clock on the wall."""
MARKS = "<!-- fuzzing -->\n", "<!-- end -->\n"
CHUNK = 400
"""Examples that a process looks at before the next one takes over."""


class _Slow(Exception):
    pass


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=60.0, help="for each target")
    parser.add_argument("--add", action="store_true", help="to what the results hold of a target")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fuzz.json")
    parser.add_argument("--page", type=Path, help="a page whose table is written anew")
    given_ = parser.parse_args()
    torch.set_num_threads(1)
    found_any = False
    for name in given_.targets or ([] if given_.page else TARGETS):
        result = fuzz(name, TARGETS[name], given_.minutes)
        found_any |= bool(result["findings"])
        whole = read_json(given_.out) if given_.out.exists() else {}
        limits = {"seconds": SLOW_S, "megabytes": MOST_MB}
        whole |= {"what": (__doc__ or "").splitlines()[0], "limits": limits}
        before = whole.get("targets", {})
        if given_.add and name in before:
            result = added(before[name], result)
        whole["targets"] = {**before, name: result}
        write_json(given_.out, whole)
        print(
            f"{name}: {result['executions']:,} executions in {result['minutes']} minutes, "
            f"{result['read']:,} read, {len(result['findings'])} findings",
            flush=True,
        )
    if given_.page:
        before, _, rest = given_.page.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        write_text(given_.page, f"{before}{MARKS[0]}{table(read_json(given_.out)['targets'])}{MARKS[1]}{after}")
    return int(found_any)


def added(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """One entry of two."""
    sums = ("minutes", "minutes_on_the_wall", "executions", "read", "refused")
    most = ("slowest_s", "memory_mb")
    known = {finding["where"]: finding for finding in (*before["findings"], *now["findings"])}
    return (
        now
        | {name: round(before[name] + now[name], 2) for name in sums}
        | {name: max(before[name], now[name]) for name in most}
        | {"findings": list(known.values())}
    )


def table(targets: dict[str, Any]) -> str:
    """The results in Markdown."""
    head = "| target | what | minutes | of a processor | executions | read | slowest, s | memory, MB | findings |\n"
    lines = [head, "|---|---|---|---|---|---|---|---|---|\n"]
    for name, r in targets.items():
        share = f"{100 * r['read'] / max(1, r['executions']):.0f} %"
        lines.append(
            f"| {name} | {r['what']} | {r['minutes_on_the_wall']:.0f} | {r['minutes']:.1f} | {r['executions']:,} | "
            f"{share} | {r['slowest_s']:.2f} | {r['memory_mb']:,} | {len(r['findings'])} |\n"
        )
    return "".join(lines)


def fuzz(name: str, target: Target, minutes: float) -> dict[str, Any]:
    """One target for so many minutes: how often it ran, what came of it, and what was found."""
    end = _children() + 60 * minutes
    first, began = _children(), time.monotonic()
    total = {"executions": 0, "read": 0, "refused": 0, "slowest_s": 0.0, "memory_mb": 0.0}
    findings: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder, seed = Path(place), int.from_bytes(os.urandom(4), "big")
        while (left := end - _children()) > 0:
            seed += 1
            said = _in_a_process(target, seed, folder, left)
            for key in ("executions", "read", "refused"):
                total[key] += said.get(key, 0)
            for key in ("slowest_s", "memory_mb"):
                total[key] = max(total[key], said.get(key, 0))
            if (finding := said.get("finding")) and finding["where"] not in findings:
                findings[finding["where"]] = finding
                print(f"{name}: {finding['where']}: {finding['error']}\n  {finding['value'][:300]}", flush=True)
            if finding:
                findings[finding["where"]]["times"] = findings[finding["where"]].get("times", 0) + 1
    return {
        "what": target.what,
        "minutes": round((_children() - first) / 60, 2),
        "minutes_on_the_wall": round((time.monotonic() - began) / 60, 2),
        **total,
        "slowest_s": round(total["slowest_s"], 2),
        "memory_mb": round(total["memory_mb"]),
        "findings": list(findings.values()),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, one used",
        "versions": versions() | {"hypothesis": hypothesis.__version__},
    }


def _children() -> float:
    """Processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _in_a_process(target: Target, seed: int, folder: Path, left: float) -> dict[str, Any]:
    """A chunk of examples in a child; if it dies, the example that it died of is in the journal."""
    work, journal, answer = folder / "work", folder / "journal", folder / "answer.json"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    answer.unlink(missing_ok=True)
    journal.write_text("")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            answer.write_text(json.dumps(_chunk(target, seed, work, journal, left)))
            status = 0
        finally:
            os._exit(status)
    state = _waited(child, journal)
    if answer.exists() and state == 0:
        return dict(json.loads(answer.read_text()))
    number, _, value = journal.read_text(errors="replace").partition("\n")
    died = (
        signal.Signals(os.WTERMSIG(state)).name
        if os.WIFSIGNALED(state)
        else f"status {os.waitstatus_to_exitcode(state)}"
    )
    died = f"no answer after {HUNG_S:g} processor seconds" if died == "SIGKILL" else f"the process ended: {died}"
    return {"executions": int(number or 0), "finding": {"where": died, "error": died, "value": value[:2000]}}


def _waited(child: int, journal: Path) -> int:
    """Its status, once it has ended or been ended; it may be stopped for a while and go on."""
    heard, used = 0.0, 0.0
    while True:
        done, state = os.waitpid(child, os.WNOHANG)
        if done:
            return state
        if (now := journal.stat().st_mtime) != heard:
            heard, used = now, _used(child)
        if _used(child) - used > HUNG_S or time.time() - heard > ASLEEP_S:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.05)


def _used(process: int) -> float:
    """Processor seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _chunk(target: Target, seed: int, work: Path, journal: Path, left: float) -> dict[str, Any]:
    said: dict[str, Any] = {"executions": 0, "read": 0, "refused": 0, "slowest_s": 0.0}
    ctypes.CDLL(None).mallopt(-8, 1)  # one arena: each thread's own would count as memory
    before = _megabytes()
    limit = (_address_space() + MOST_MB) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    last: list[Any] = [None]

    @hypothesis.seed(seed)
    @settings(
        max_examples=CHUNK,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(value=target.values)
    def look(value: Any) -> None:
        if time.process_time() > left:
            return
        last[0] = value
        said["executions"] += 1
        journal.write_text(f"{said['executions']}\n{value!r}", errors="replace")
        began = time.process_time()  # the machine may have other work
        try:
            target.run(value, work)
            said["read"] += 1
        except HistillError as error:
            assert_line(error)
            said["refused"] += 1
        finally:
            took = time.process_time() - began
            said["slowest_s"] = max(said["slowest_s"], took)
        if took > SLOW_S:
            raise _Slow(f"{took:.1f} s")

    try:
        look()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/histill/" in f.filename] or [
            f for f in traceback.extract_tb(error.__traceback__) if "fuzz_targets" in f.filename
        ]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        line = (str(error).splitlines() or [""])[0][:300]
        kind = type(error).__name__
        said["finding"] = {"where": f"{where} {kind}", "error": f"{kind}: {line}", "value": repr(last[0])[:2000]}
    said["memory_mb"] = max(0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)
    return said


def _megabytes() -> float:
    return _status("VmRSS")


def _address_space() -> int:
    return int(_status("VmSize"))


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())

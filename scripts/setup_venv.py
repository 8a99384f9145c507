"""Make .venv ready for a make target: `python3 scripts/setup_venv.py dev eval` (extras of pyproject.toml).

Needs only the standard library. Returns at once when nothing changed since the last time: each extra leaves a stamp
`.venv/.ready-EXTRA` that holds what it was made from (pyproject.toml, constraints.txt) and what was then installed.
An environment that cannot be trusted (interrupted installation, lost files, moved folder, other Python) is built anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
INSTALLING = VENV / ".installing"  # exists only while pip runs; found at the start: pip was killed half-way


def main(extras: list[str]) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (this file also runs where the package does not)
        sys.exit(
            f"dittocache needs Python 3.10 or newer, this is {version(sys.version_info)}: make PYTHON=python3.12 ..."
        )
    lock = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once take turns; released when this process ends
    trouble = defect()
    missing = [extra for extra in ["core", *extras] if trouble or not is_ready(extra)]
    if not missing:
        return
    if trouble:
        create(trouble)
    install(missing[1:] if missing[0] == "core" else missing)
    for extra in missing:
        stamp(extra).write_text("\n".join([fingerprint(), *sorted(contents())]) + "\n")


def defect() -> str | None:
    """Why the environment has to be built anew, or None."""
    if not VENV.exists():
        return "there is none yet"
    if INSTALLING.exists():
        return "its last installation was interrupted"
    activate = VENV / "bin" / "activate"
    home = re.compile(rf"""^\s*(?:export )?VIRTUAL_ENV=['"]?{re.escape(str(VENV))}['"]?\s*$""", re.MULTILINE)
    if not activate.exists() or not home.search(activate.read_text()):
        return "it is incomplete or was made for another folder"
    asked = [PYTHON, "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"]
    answer = subprocess.run(asked, capture_output=True, text=True) if PYTHON.exists() else None
    if answer is None or answer.returncode != 0:
        return "its Python or pip does not start"
    if answer.stdout.strip() != version(sys.version_info):
        return f"it has Python {answer.stdout.strip()}"
    recorded = {name for ready in VENV.glob(".ready-*") for name in ready.read_text().splitlines()[1:]}
    lost = {name for name in recorded - contents() if not name.endswith(".dist-info")}
    return f"files of it are lost: {', '.join(sorted(lost)[:3])}" if lost else None


def stamp(extra: str) -> Path:
    return VENV / f".ready-{extra}"


def is_ready(extra: str) -> bool:
    if not stamp(extra).exists():
        return False
    made_from, *recorded = stamp(extra).read_text().splitlines()
    return made_from == fingerprint() and contents() >= set(recorded)


def fingerprint() -> str:
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def contents() -> set[str]:
    """Packages and their versions, as the names in site-packages."""
    return {path.name for path in VENV.glob("lib/python*/site-packages/*") if path.name != "__pycache__"}


def create(why: str) -> None:
    base = getattr(sys, "_base_executable", sys.executable)  # not .venv's own Python, should that be active
    say(f"making .venv with Python {version(sys.version_info)} ({why})")
    if subprocess.run([base, "-m", "venv", "--clear", VENV]).returncode != 0:
        sys.exit("could not make .venv: is the venv module of this Python installed (python3-venv on Debian, Ubuntu)?")


def install(extras: list[str]) -> None:
    target = f".[{','.join(extras)}]" if extras else "."
    say(f"installing {target} (minutes the first time, seconds after that)")
    begin, said = time.monotonic(), []
    command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--constraint", "constraints.txt", "--editable", target]
    options = {"cwd": ROOT, "env": {**os.environ, "PIP_USER": "0"}, "text": True}
    INSTALLING.touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as pip:
        for line in pip.stdout:
            said.append(line)
            if large := re.search(r"Downloading ([^-/]+)-([^-]+)-.*\((\d+\.?\d* ?GB|\d{2,}\.?\d* ?MB)\)", line):
                say("  downloading {} {} ({})".format(*large.groups()))
            elif line.startswith("Installing collected packages:"):
                say(f"  unpacking {line.count(',') + 1} packages")
    (VENV / "install.log").write_text("".join(said))
    INSTALLING.unlink()
    if pip.returncode != 0:
        print(*said[-15:], sep="", file=sys.stderr)
        sys.exit(f"pip could not install {target} (.venv/install.log has all of it; `make distclean` starts afresh)")
    say(f"ready after {time.monotonic() - begin:.0f} s")


def version(info: tuple) -> str:
    return f"{info[0]}.{info[1]}"


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("[setup] interrupted; the next run starts over")

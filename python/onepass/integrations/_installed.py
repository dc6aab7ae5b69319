"""Whether another package is there, and new enough."""

from __future__ import annotations

from importlib import metadata


def installed_version(package: str, least: tuple[int, ...]) -> str:
    """The package's version.

    Raises:
        ImportError: it is missing, or older than `least`.
    """
    wanted = ".".join(str(part) for part in least)
    needs = f"onepass.integrations.{package} needs {package} {wanted} or newer"
    mend = f"pip install '{package}>={wanted}'"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needs}: none found; {mend}") from None
    parts = version.split(".")[: len(least)]
    if tuple(int(part) for part in parts if part.isdigit()) < least:
        raise ImportError(f"{needs}: found {version}; {mend}")
    return version

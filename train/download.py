"""Downloads of MNIST and Fashion-MNIST, checked by SHA-256. The tests use a local server: no real mirror is tested."""

from pathlib import Path

import pooch

from train.config import DataName, UserError
from train.idx import NAMES

MIRRORS: dict[DataName, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}
# SHA-256 of the gzip files, in the order of NAMES.
ARCHIVES: dict[DataName, tuple[str, ...]] = {
    "mnist": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion-mnist": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}


def download(data: DataName, folder: Path) -> dict[str, Path]:
    """The four files of ``data``, fetched into ``folder`` unless they are there already, by name."""
    return {
        name: _fetch(f"{name}-ubyte.gz", sha256, MIRRORS[data], folder)
        for name, sha256 in zip(NAMES, ARCHIVES[data], strict=True)
    }


def _fetch(file: str, sha256: str, mirrors: tuple[str, ...], folder: Path) -> Path:
    """The file from the first mirror that serves the right bytes."""
    failures = []
    for mirror in mirrors:
        try:
            return Path(pooch.retrieve(mirror + file, f"sha256:{sha256}", file, folder))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong SHA-256 is a ValueError
            failures.append(f"{mirror}: {error}")
    raise UserError(f"{file}: no mirror served it; fetch it yourself and pass --data-dir. {'; '.join(failures)}")

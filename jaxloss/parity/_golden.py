"""Golden files: an original, recorded in one safetensors file that is refused unless it is whole and as it was.

The header's metadata holds a JSON manifest that says which array is what. It begins with the SHA-256 of all bytes of
the file, taken with zeros in place of the digest's own 64 characters.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxloss.parity._masks import Drop
from jaxloss.parity._recording import LayerCall, ModuleFacts, Noise, Recording, Source, State, Trajectory

VERSION = 1
_KEY = "jaxloss.parity"  # of the manifest in the metadata
_ARRAY = "$array"  # marks the name of an array in the manifest
_COMPLEX = "$complex128"  # and the array of the two parts of one that safetensors does not know
_UNSIGNED = "0" * 64
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_PLAIN = ("name", "parameter_dtypes", "loss", "optimizer", "optimizer_given", "steps", "train", "seed")  # of a Source


def write(
    path: str | os.PathLike[str],
    source: Source,
    dtypes: Sequence[str],
    versions: Mapping[str, str],
    progress: Callable[[str], None],
) -> None:
    """Records a source in float64 and the given dtypes, whole or not at all."""
    target = Path(path).resolve()  # what a symbolic link leads to is replaced, not the link
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {target.parent}.")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{path} cannot be written: it is a folder, a device or a pipe.")
    part = target.with_name(f"{target.name}.{os.getpid()}.part")  # of this process: another may write the same file
    try:
        part.touch()  # where nothing can be written, nothing need be run
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {error.strerror}.") from error
    try:
        arrays = _Arrays()
        manifest = {
            "sha256": _UNSIGNED,
            "version": VERSION,
            "versions": {"python": platform.python_version(), "numpy": np.__version__, **versions},
            **_pack_source(source, dict.fromkeys(("float64", *dtypes)), arrays, progress),
        }
        progress("writing")
        _save(part, arrays.named, json.dumps(manifest, allow_nan=False))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _save(path: Path, arrays: Mapping[str, np.ndarray], manifest: str) -> None:
    """Writes the arrays and the manifest, and signs them."""
    from safetensors.numpy import save_file

    mode = path.stat().st_mode
    save_file(dict(arrays), path, {_KEY: manifest})
    path.chmod(mode)  # safetensors lets nobody else read it
    with path.open("r+b") as file:
        header = _read_header(path)
        file.seek(8 + header.index(_UNSIGNED.encode()))
        file.write(_digest(path, header).encode())
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path, header: bytes) -> str:
    """The SHA-256 of a file, with this header."""
    digest = hashlib.sha256(len(header).to_bytes(8, "little"))
    digest.update(header)
    with path.open("rb") as file:
        file.seek(8 + len(header))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Arrays:
    """Arrays by name, equal ones once."""

    def __init__(self) -> None:
        self.named: dict[str, np.ndarray] = {}
        self._names: dict[object, str] = {}

    def pack(self, value: Any, name: str) -> Any:
        """A value as JSON has it, with references to the arrays in it."""
        if isinstance(value, np.ndarray) and value.dtype == np.complex128:
            return {_COMPLEX: self.pack(np.stack([value.real, value.imag], -1), name)}
        if isinstance(value, np.ndarray):
            return {_ARRAY: self._keep(value, name)}
        if isinstance(value, dict):
            return {key: self.pack(each, f"{name}/{key}") for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.pack(each, f"{name}/{i}") for i, each in enumerate(value)]
        return value

    def _keep(self, array: np.ndarray, name: str) -> str:
        array = np.asarray(array, order="C")  # safetensors writes the wrong elements of another
        content = hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
        kept = self._names.setdefault((array.dtype.name, array.shape, content), name)
        if kept == name:
            self.named[name] = array
        return kept


def _pack_source(
    source: Source, dtypes: Mapping[str, Any], arrays: _Arrays, progress: Callable[[str], None]
) -> dict[str, Any]:
    recordings, trajectories = {}, {}
    trains = source.steps > 0
    for dtype in dtypes:
        progress(f"recording in {dtype}")
        recording = source.recording(dtype)
        trains &= bool(recording.parameter_gradients)
        recordings[dtype] = arrays.pack(_pack_recording(recording), dtype)
        if trains:
            progress(f"optimizer steps in {dtype}")
            packed = _pack_trajectory(source.trajectory(dtype), with_noise=dtype == "float64")
            trajectories[dtype] = arrays.pack(packed, f"{dtype}/steps")
    state = {name: arrays.pack(source.state.given(name), f"state/{name}") for name in source.state}
    return {
        **{name: getattr(source, name) for name in _PLAIN},
        "notes": list(source.notes),
        "modules": {name: facts._asdict() for name, facts in source.modules.items()},
        "inputs": arrays.pack(source.inputs, "inputs"),
        "tied": source.state.tied,
        "state": state,
        "recordings": recordings,
        "trajectories": trajectories,
    }


def _pack_recording(recording: Recording) -> dict[str, Any]:
    return vars(recording) | {
        "calls": [vars(call) for call in recording.calls],
        "masks": list(map(_pack_mask, recording.masks)),
        "flattened": [[*call, shape] for call, shape in recording.flattened.items()],
    }


def _pack_trajectory(trajectory: Trajectory, *, with_noise: bool) -> dict[str, Any]:
    noise = trajectory.noise() if with_noise else []
    return {
        "sketches": trajectory.sketches,
        "masks": [list(map(_pack_mask, masks)) for masks in trajectory.masks],
        # In hexadecimal, because JSON has no NaN.
        "noise": [{k: {n: x.hex() for n, x in named.items()} for k, named in step.items()} for step in noise],
    }


def _pack_mask(mask: np.ndarray) -> dict[str, Any]:
    return {"shape": mask.shape, "bits": np.packbits(mask)}


def read(path: str | os.PathLike[str]) -> tuple[Source, list[str], str]:
    """A recorded source, the dtypes that it was recorded in, and the version of PyTorch that it was recorded with.

    Raises:
        ValueError: the file is none, of another version, cut off, changed, or lacks an array.
    """
    path = Path(path)
    manifest, names = _read_manifest(path)
    if missing := sorted(set(_references(manifest)) - names):
        raise ValueError(f"{path} lacks the array {missing[0]}: record it anew.")
    reader = _Reader(path, manifest)
    with _well_formed(path):
        return reader.source(), list(manifest["recordings"]), str(manifest["versions"]["torch"])


def _read_manifest(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The manifest of a file that is as it was written, and the names of its arrays."""
    none = ValueError(f"{path} is no golden file: pass one that parity.record wrote.")
    header = _read_header(path)
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        manifest = json.loads(metadata[_KEY])
        version, digest = manifest["version"], manifest["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise none from error
    if version != VERSION:
        raise ValueError(
            f"{path} is a golden file of version {version}, this jaxloss reads version {VERSION}: record it anew, or "
            "install the jaxloss that wrote it."
        )
    if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise none
    if _digest(path, header.replace(digest.encode(), _UNSIGNED.encode(), 1)) != digest:
        raise ValueError(
            f"{path} is not as it was recorded, its SHA-256 is another one: fetch it again, or record it anew."
        )
    return manifest, set(entries)


def _read_header(path: Path) -> bytes:
    """What is read of a file whose length it says itself: no more than there is."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{path} is cut off or no golden file: its header would have {length} bytes, the file has {size}. "
                "Fetch it again, or record it anew."
            )
        return file.read(length)


def _references(value: Any) -> Iterator[str]:
    """The names of all arrays in a manifest."""
    if isinstance(value, dict):
        if isinstance(name := value.get(_ARRAY), str):
            yield name
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


@contextmanager
def _well_formed(path: Path) -> Iterator[None]:
    """Turns what is raised where a manifest is not what it should be into a line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} has a manifest that is not a golden file's ({what}): record it anew.") from error


class _Reader:
    """Reads the arrays of a file when they are asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        from safetensors import SafetensorError, safe_open

        self._path, self._manifest = path, manifest
        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors, {error}: record it anew.") from error

    def source(self) -> Source:
        """The original."""
        found = self._manifest
        state = found["state"]
        return Source(
            **{name: found[name] for name in _PLAIN},
            modules={name: ModuleFacts(**facts) for name, facts in found["modules"].items()},
            state=State(
                {name: self._shape(reference) for name, reference in state.items()},
                lambda name: self._unpack(state[name]),
                found["tied"],
            ),
            inputs=self._unpack(found["inputs"]),
            notes=list(found["notes"]),
            storages={},
            recording=self._recording,
            trajectory=self._trajectory,
        )

    def _recording(self, dtype: str) -> Recording:
        with _well_formed(self._path):
            found = self._unpack(self._manifest["recordings"][dtype])
            drops = [Drop(w, rate, whole, flat and tuple(flat)) for w, rate, whole, flat in found["drops"]]
            return Recording(
                **found
                | {
                    "calls": [LayerCall(**call) for call in found["calls"]],
                    "masks": list(map(_unpack_mask, found["masks"])),
                    "drops": drops,
                    "flattened": {(name, index): tuple(shape) for name, index, shape in found["flattened"]},
                }
            )

    def _trajectory(self, dtype: str) -> Trajectory:
        with _well_formed(self._path):
            found = self._unpack(self._manifest["trajectories"][dtype])
            masks = [list(map(_unpack_mask, masks)) for masks in found["masks"]]
            noise: Noise = [
                {k: {n: float.fromhex(x) for n, x in named.items()} for k, named in step.items()}
                for step in found["noise"]
            ]
            return Trajectory(found["sketches"], masks, lambda: noise)

    def _shape(self, reference: dict[str, Any]) -> tuple[int, ...]:
        if _COMPLEX in reference:
            return self._shape(reference[_COMPLEX])[:-1]
        return tuple(self._file.get_slice(reference[_ARRAY]).get_shape())

    def _unpack(self, value: Any) -> Any:
        if isinstance(value, dict):
            name = value.get(_ARRAY)
            if isinstance(name, str):
                return self._file.get_tensor(name)
            if _COMPLEX in value:
                return self._unpack(value[_COMPLEX]).view(np.complex128)[..., 0]
            return {key: self._unpack(each) for key, each in value.items()}
        return [self._unpack(each) for each in value] if isinstance(value, list) else value


def _unpack_mask(mask: dict[str, Any]) -> np.ndarray:
    size = int(np.prod(mask["shape"]))
    if mask["bits"].size != -(-size // 8):
        raise ValueError("a mask has another size than its bits")
    return np.unpackbits(mask["bits"], count=size).astype(bool).reshape(mask["shape"])

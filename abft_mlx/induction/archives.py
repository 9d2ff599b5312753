"""Reading NumPy archives of unknown origin: plain numbers alone, and no more than was promised."""

from __future__ import annotations

import zipfile
import zlib
from tokenize import TokenError

import numpy as np

MOST_BYTES = 2_000_000_000
_PLAIN = "biuf"
_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (RuntimeError, NotImplementedError, SyntaxError, TokenError, MemoryError, zlib.error)


def arrays(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """Every array of an ``.npz``, by name.

    Sizes are read from the archive's directory and each array's header, and compared, before any
    memory is taken; pickled objects are refused by their type, unread.

    Raises:
        ValueError: it holds something else, or unpacks to more than MOST_BYTES.
        zipfile.BadZipFile: it is no archive that is whole.
    """
    members = archive.infolist()
    whole = sum(member.file_size for member in members)
    if whole > MOST_BYTES:
        raise ValueError(f"it unpacks to {whole:,} bytes, more than {MOST_BYTES:,}")
    found: dict[str, np.ndarray] = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name in found or name == member.filename or member.compress_type not in _KINDS:
            raise ValueError(f"member {member.filename!r} is no array, or is there twice")
        try:
            found[name] = _array(archive, member)
        except _BROKEN as error:
            raise ValueError(f"{member.filename}: {error}") from error
    return found


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, by_column, dtype = np.lib.format.read_array_header_2_0(stream)
        if dtype.kind not in _PLAIN:
            raise ValueError(f"{member.filename} holds {dtype}, not numbers")
        count = 1
        for one in shape:
            if one < 0:
                raise ValueError(f"{member.filename} has the shape {shape}")
            count *= one
        wanted = count * dtype.itemsize
        if wanted > member.file_size:
            raise ValueError(f"{member.filename} promises {wanted:,} bytes and does not hold them")
        content = stream.read(wanted + 1)
    if len(content) != wanted:
        raise ValueError(f"{member.filename} holds {len(content):,} bytes and promises {wanted:,}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_column else "C")

"""Image formats: what a file is by its first bytes, and which decoder reads it.

Decoders are called by name. Without ``Image.open``, PIL's other fifty never run, nor does its
warning about large images, which only a filter for the whole process could silence.
"""

import importlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, cast

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

Decoder = Callable[[io.BytesIO], Image.Image]
RAW_FORMAT: Final = "camera RAW"
UPLOAD_FORMATS: Final = frozenset({"PNG", "JPEG", "WEBP"})
"""Formats of which strangers may send files: few decoders, each well tried."""
_DECODERS: Final[Mapping[str, tuple[str, str]]] = {
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "JPEG": ("PIL.JpegImagePlugin", "jpeg_factory"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "JPEG 2000": ("PIL.Jpeg2KImagePlugin", "Jpeg2KImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "HEIC": ("pillow_heif", "HeifImageFile"),
}
"""Module and function that decode a format."""
IMAGE_FORMATS: Final = frozenset(_DECODERS)
"""Formats of files on the user's own disk."""
_SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "JPEG 2000": (".jp2", ".j2k", ".jpx", ".jpf"),
    "AVIF": (".avif", ".avifs"),
    "HEIC": (".heic", ".heif", ".hif", ".heics"),
    RAW_FORMAT: (
        *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf"),
        *(".rw2", ".pef", ".srw", ".3fr", ".iiq", ".x3f"),
    ),
    "JPEG XL": (".jxl",),
    "Photoshop": (".psd", ".psb"),
}
_FORMAT_BY_SUFFIX: Final = {
    suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes
}
IMAGE_SUFFIXES: Final = frozenset(
    suffix for suffix, name in _FORMAT_BY_SUFFIX.items() if name in IMAGE_FORMATS
)
"""Suffixes, in lower case, of files that are read."""
PHOTO_SUFFIXES: Final = frozenset(_FORMAT_BY_SUFFIX)
"""Suffixes, in lower case, of files that hold photos, read or not."""
_MAGIC_NUMBERS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"FUJIFILMCCD-RAW", RAW_FORMAT),
    (b"IIRO", RAW_FORMAT),
    (b"IIRS", RAW_FORMAT),
    (b"IIU\0", RAW_FORMAT),
    (b"FOVb", RAW_FORMAT),
    (b"\0\x05\x16\x07", "macOS resource"),
    (b"version https://git-lfs", "Git LFS pointer"),
)
_TIFF_MAGIC_NUMBERS: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF_BRANDS: Final = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif"}
)
_NEW_SUBFILE_TYPE, _PHOTOMETRIC, _DNG_VERSION = 254, 262, 50706
_CFA_PHOTOMETRICS: Final = (32803, 34892)
"""Color filter array, and linear raw (DNG)."""
_MARKUP: Final = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(!doctype html|html|svg)")


def detect_format(data: bytes) -> str:
    """Detect what a file is by its content.

    Args:
        data: The file.

    Returns:
        The name of a format, also of some that are not read; empty if it is unknown.
    """
    for start, name in _MAGIC_NUMBERS:
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(_TIFF_MAGIC_NUMBERS):
        return RAW_FORMAT if _is_raw_tiff(data) else "TIFF"
    if data[4:8] == b"ftyp":
        return _detect_media_format(data)
    if markup := _MARKUP.match(data[:2000].removeprefix(b"\xef\xbb\xbf").lower()):
        return "SVG" if markup[1] == b"svg" else "HTML"
    return ""


def get_format_of_suffix(path: Path) -> str:
    """Return the format that a file name promises, such as HEIC; empty if it is none of photos."""
    return _FORMAT_BY_SUFFIX.get(path.suffix.lower(), "")


def find_decoder(name: str) -> Decoder | None:
    """Find the decoder of a format.

    Args:
        name: A format of ``IMAGE_FORMATS``.

    Returns:
        A function of an open file; None if this installation has none.
    """
    module_name, attribute = _DECODERS[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return None
    if not getattr(module, "SUPPORTED", True):  # PIL's codecs are optional when it is built
        return None
    return cast(Decoder, getattr(module, attribute))


def format_kind(name: str) -> str:
    """Format the name of a format with its article, such as ``a HEIC image``."""
    article = "an" if name[0] in "AHS" and name not in ("HEIC",) else "a"
    noun = {"PDF": " file", "HTML": " page", "Git LFS pointer": "", "video": ""}
    is_file = name in (RAW_FORMAT, "Photoshop", "macOS resource")
    return f"{article} {name}{' file' if is_file else noun.get(name, ' image')}"


def explain_format(name: str) -> str:
    """Say why this installation does not read a format, and what to do.

    Args:
        name: A format that ``detect_format`` knows.

    Returns:
        The end of a sentence; empty if it is read.
    """
    if name in IMAGE_FORMATS:
        if find_decoder(name) is not None:
            return ""
        if name == "HEIC":
            return "which needs the extra heif: pip install 'hyperlora[heif]', or save it as JPEG"
        return "which this build of Pillow does not read: update Pillow, or save it as JPEG"
    if name == RAW_FORMAT:
        return "which a camera's program must develop first: export it as JPEG or PNG"
    return "which is not read: save it as PNG, JPEG or WEBP"


def _detect_media_format(data: bytes) -> str:
    """Tell AVIF, HEIC, Canon's CR3 and videos apart by the brands of an ISO media file."""
    size = min(int.from_bytes(data[:4], "big"), 256)
    major, rest = data[8:12], data[16:size]
    brands = {major, *(rest[i : i + 4] for i in range(0, len(rest), 4))}
    if major == b"crx ":
        return RAW_FORMAT
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIC" if brands & _HEIF_BRANDS else "video"


def _is_raw_tiff(data: bytes) -> bool:
    """Whether a TIFF is a camera's raw file, whose first image is a thumbnail or a mosaic."""
    if data[8:10] == b"CR":  # Canon's CR2
        return True
    try:
        tags = ImageFileDirectory_v2(data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        is_thumbnail = bool(int(tags.get(_NEW_SUBFILE_TYPE, 0)) & 1)
        is_mosaic = tags.get(_PHOTOMETRIC) in _CFA_PHOTOMETRICS
    except Exception:  # the decoder says what is wrong
        return False
    return is_thumbnail or is_mosaic or _DNG_VERSION in tags

"""Images from files, uploads and PIL, read safely: 8-bit RGB, or an ``InvalidImageError``."""

import hashlib
import io
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import ExifTags, Image, ImageOps

from hyperlora.data.color import convert_to_rgb
from hyperlora.data.image_formats import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    UPLOAD_FORMATS,
    detect_format,
    explain_format,
    find_decoder,
    format_kind,
    get_format_of_suffix,
)
from hyperlora.data.image_limits import check_parts
from hyperlora.errors import InvalidImageError, format_reason
from hyperlora.paths import find_path

if TYPE_CHECKING:  # processes that only decode images import neither of these
    import numpy as np
    from torch import Tensor

MAX_PIXELS: Final = 25_000_000
"""The largest image that is decoded."""
MAX_BYTES: Final = 50_000_000
"""The largest image file that is read."""
_IGNORED_NAMES: Final = frozenset(
    {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"}
)
"""What operating systems and servers put into folders, besides hidden files."""
_HEADER_SIZE_FORMATS: Final = frozenset({"PNG", "JPEG", "WEBP"})
"""Formats whose header has size and orientation; decoders of others may turn the image."""
_FIRST_SIDEWAYS_ORIENTATION: Final = 5
"""EXIF orientations from 5 to 8 exchange width and height."""
_MAX_PIXELS_MESSAGE: Final = f"at most {MAX_PIXELS // 10**6} megapixels are read"
ImageSource = str | os.PathLike[str] | bytes | Image.Image


def read_image(source: ImageSource, formats: Collection[str] = IMAGE_FORMATS) -> Image.Image:
    """Read an image as it is meant to be seen.

    The result is upright, the first frame, in sRGB, with transparency over white, in 8-bit RGB,
    without EXIF, GPS or ICC. The size is read from the header before anything is decoded.

    Args:
        source: A file, the bytes of one, or a PIL image. Files and bytes have a format by content,
            and at most ``MAX_BYTES`` and ``MAX_PIXELS``. A PIL image may have any format and is
            not changed.
        formats: Formats that are read, of ``IMAGE_FORMATS``; ``UPLOAD_FORMATS`` for uploads.

    Returns:
        The image.

    Raises:
        InvalidImageError: The image is missing, damaged, too large or of another format.
    """
    if isinstance(source, Image.Image):
        return _decode_image(source, "the given image")
    data = _read_bytes(source)
    image, source_name = _open_image(data, source, formats)
    return _decode_image(image, source_name)


def read_image_size(data: bytes) -> tuple[int, int]:
    """Read width and height of an upright image, where possible from its header.

    Args:
        data: The file.

    Returns:
        Width and height in pixels.

    Raises:
        InvalidImageError: ``read_image`` would not read it.
    """
    if detect_format(data) not in _HEADER_SIZE_FORMATS:
        return read_image(data).size
    image, _ = _open_image(data, data, IMAGE_FORMATS)
    width, height = image.size
    is_sideways = _read_orientation(image) >= _FIRST_SIDEWAYS_ORIENTATION
    return (height, width) if is_sideways else (width, height)


def list_image_files(folder: str | os.PathLike[str], *, root_dir: Path | None = None) -> list[Path]:
    """List the image files directly in a folder, by their suffix.

    Args:
        folder: The folder; hidden files are skipped.
        root_dir: Links that lead out of this folder are skipped; ``folder`` itself if None.

    Returns:
        The files, sorted.

    Raises:
        InvalidImageError: There is none, or the folder cannot be read.
    """
    folder = find_path(Path(folder))
    root = root_dir or folder
    paths = [
        p
        for p in list_entries(folder)
        if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and is_within(p, root)
    ]
    if not paths:
        raise InvalidImageError(
            f"{str(folder)!r} holds no image, such as PNG, JPEG, WEBP or HEIC: "
            "put at least one there (no links elsewhere)"
        )
    return paths


def list_entries(folder: Path) -> list[Path]:
    """List what a folder contains, without hidden names and those of operating systems.

    Args:
        folder: The folder.

    Returns:
        The paths, sorted.

    Raises:
        InvalidImageError: The path is no folder, or it cannot be read.
    """
    try:
        return sorted(
            p
            for p in folder.iterdir()
            if not p.name.startswith(".") and p.name not in _IGNORED_NAMES
        )
    except FileNotFoundError as error:
        raise InvalidImageError(f"there is no folder {str(folder)!r}: check the path") from error
    except NotADirectoryError as error:
        raise InvalidImageError(
            f"{str(folder)!r} is a file, a folder of images was expected: name its folder"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidImageError(
            f"the folder {str(folder)!r} cannot be read ({_format_reason(error)}): "
            "check its permissions"
        ) from error


def is_within(path: Path, root: Path) -> bool:
    """Check whether a path lies below a folder once all links are followed.

    Args:
        path: The path.
        root: The folder.

    Returns:
        Whether it does; a link that leads back to itself is where its name is.
    """
    # unlike ``Path.resolve``, ``realpath`` raises nothing for links that lead back to themselves
    return Path(os.path.realpath(root)) in Path(os.path.realpath(path)).parents


def to_tensor(image: Image.Image, size: int) -> "Tensor":
    """Convert an image to a square tensor: the center square, resized (bicubic, antialiased).

    Args:
        image: An image of any size; what is not plain RGB is converted as ``read_image`` does.
        size: Pixels per side.

    Returns:
        [3, size, size] in [0, 1].
    """
    import numpy as np
    import torch

    # an image that ``read_image`` returned has no profile and no EXIF
    rgb = image if image.mode == "RGB" and not image.info else read_image(image)
    square = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float().div(255)


def to_image(tensor: "Tensor") -> Image.Image:
    """Convert a tensor to a PIL image. Undoes ``to_tensor`` on a square image of its size.

    Args:
        tensor: [3, h, w] in [0, 1]; other values are clamped.

    Returns:
        An RGB image.
    """
    pixels = tensor.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def stack_images(images: Sequence[Image.Image]) -> "Tensor":
    """Stack PIL images of one size as a tensor [n, 3, h, w] in [0, 1]."""
    import numpy as np

    return array_to_tensor(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def array_to_tensor(images: "np.ndarray") -> "Tensor":
    """Convert uint8 images [n, h, w, 3], also memory-mapped ones, to [n, 3, h, w] in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def compute_sha256(source: str | os.PathLike[str] | bytes) -> str:
    """Compute the SHA-256 of an image file.

    Args:
        source: The file, or its bytes.

    Returns:
        64 hexadecimal digits.

    Raises:
        InvalidImageError: ``read_image`` would not open the file.
    """
    return hashlib.sha256(_read_bytes(source)).hexdigest()


def _read_bytes(source: str | os.PathLike[str] | bytes) -> bytes:
    source_name = _format_source_name(source)
    if isinstance(source, bytes):
        data = source
    else:
        path = find_path(Path(source))
        try:
            if path.is_dir():
                raise InvalidImageError(
                    f"{source_name} is a folder, one image file was expected: name a file in it"
                )
            if (
                not path.is_file()
            ):  # neither missing files nor pipes and devices, which may never end
                raise InvalidImageError(
                    f"there is no file {source_name}, an image was expected: check the path"
                )
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise InvalidImageError(
                f"{source_name} cannot be read ({_format_reason(error)}): "
                "check its name and permissions"
            ) from error
    if len(data) > MAX_BYTES:
        raise InvalidImageError(
            f"{source_name} is larger than the {MAX_BYTES // 10**6} MB an image may have: "
            "save it smaller"
        )
    return data


def _format_source_name(source: str | os.PathLike[str] | bytes) -> str:
    return (
        f"the image ({len(source)} bytes)" if isinstance(source, bytes) else repr(str(Path(source)))
    )


def _open_image(
    data: bytes, source: str | os.PathLike[str] | bytes, formats: Collection[str]
) -> tuple[Image.Image, str]:
    """Open an image with the decoder of its content; return it with a name for messages."""
    source_name = _format_source_name(source)
    format_name = detect_format(data)
    if not format_name and not isinstance(source, bytes):
        format_name = get_format_of_suffix(Path(source))
        format_name = "" if format_name in IMAGE_FORMATS else format_name
    if not format_name or format_name not in formats:
        raise InvalidImageError(_format_refusal(source_name, data, format_name, formats))
    decoder = find_decoder(format_name)
    if decoder is None:
        raise InvalidImageError(
            f"{source_name} is {format_kind(format_name)}, {explain_format(format_name)}"
        )
    source_name = f"{source_name}, {format_kind(format_name).removesuffix(' image')} file,"
    check_parts(data, format_name, source_name)
    try:
        return decoder(io.BytesIO(data)), source_name
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:  # some decoders check by themselves
        raise InvalidImageError(
            f"{source_name} is huge, {_MAX_PIXELS_MESSAGE}: scale it down"
        ) from error
    except Exception as error:  # decoders raise anything on hostile bytes
        raise _make_damaged_error(source_name, error) from error


def _format_refusal(
    source_name: str, data: bytes, format_name: str, formats: Collection[str]
) -> str:
    """Say which kind of file was found in place of an image."""
    if format_name and format_name not in IMAGE_FORMATS and formats is not UPLOAD_FORMATS:
        return f"{source_name} is {format_kind(format_name)}, {explain_format(format_name)}"
    problem = "is another kind of file"
    if not data:
        problem = "is empty"
    elif format_name:
        problem = f"is {format_kind(format_name)}"
    return (
        f"{source_name} {problem}, a PNG, JPEG or WEBP image was expected: save it as one of these"
    )


def _decode_image(image: Image.Image, source_name: str) -> Image.Image:
    width, height = image.size
    if not width or not height:
        raise InvalidImageError(
            f"{source_name} is {width}×{height}, at least one pixel was expected: "
            "choose another image"
        )
    if width * height > MAX_PIXELS:
        raise InvalidImageError(
            f"{source_name} is {width}×{height}, {_MAX_PIXELS_MESSAGE}: scale it down"
        )
    try:
        image.load()
        rgb = convert_to_rgb(image, source_name)
        return _apply_orientation(rgb, _read_orientation(image))
    except InvalidImageError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise _make_damaged_error(source_name, error) from error


def _read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 to 8."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels are good even if EXIF is not
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _apply_orientation(rgb: Image.Image, orientation: int) -> Image.Image:
    """Rotate an image upright, with its orientation as the only EXIF field.

    ``exif_transpose`` fails on fields that it cannot write back.
    """
    if orientation != 1:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _make_damaged_error(source_name: str, error: Exception) -> InvalidImageError:
    if isinstance(error, MemoryError):
        return InvalidImageError(
            f"{source_name} needs more memory to decode than there is: scale it down"
        )
    if str(error) == "unknown pixel mode":  # a whole file, such as TIFF of float RGB
        return InvalidImageError(
            f"{source_name} has a kind of pixels that is not read, 8 bits per channel expected: "
            "export it as PNG or JPEG"
        )
    return InvalidImageError(
        f"{source_name} is damaged or cut off ({_format_reason(error)}), "
        "a whole image was expected: export it again"
    )


def _format_reason(error: Exception) -> str:
    """Format an error for a sentence, without the path of an ``OSError``."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return format_reason(error).rstrip(".") or type(error).__name__

"""One function that reads an image as people see it, and one that frames it for the model.

Reading: EXIF orientation applied, colour profile taken to sRGB, 16 bits scaled (not clipped), transparency laid on
white, always fully decoded. Framing: the short side is scaled to the resolution (Lanczos), then a square is cut out.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from contextlib import suppress

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lora_trainer.data.folders import AVIF, HEIF
from lora_trainer.models.family import View

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(("AVIF",) if AVIF else ()))
_PNG, _TELLING_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT")
MAX_PIXELS = 200_000_000
MAX_SCALED_PIXELS = 50_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow only warns at its limit; ours is an error, checked before decoding

_DECODER_FAULTS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(MemoryError, OverflowError, LookupError, TypeError, AttributeError, ImportError),
)


class ImageFault(ValueError):
    """A file that cannot be taken as a training image; the message says why."""


def decode(data: bytes) -> Image.Image:
    """The file's bytes as an RGB image.

    Raises:
        ImageFault: the bytes are no whole still image of a known format.
    """
    try:
        return _decode(data)
    except ImageFault:
        raise
    except UnidentifiedImageError as error:
        raise ImageFault(_what_it_is(data)) from error
    except _DECODER_FAULTS as error:
        raise ImageFault(_cut_off(data) or str(error).strip() or type(error).__name__) from error


def frame(size: tuple[int, int], resolution: int, place: tuple[float, float] = (0.5, 0.5)) -> View:
    """Scale the short side of `size` (width, height) to `resolution` px and cut a square at `place` (0..1, 0..1)."""
    scale = resolution / min(size)
    width, height = (max(resolution, round(side * scale)) for side in size)
    left, top = round((width - resolution) * place[0]), round((height - resolution) * place[1])
    return View(size, (width, height), left, top, resolution)


def lost_share(view: View) -> float:
    """Share of the picture's area that the cut leaves out."""
    return 1 - view.resolution**2 / math.prod(view.scaled_size)


def apply_frame(image: Image.Image, view: View, *, mirrored: bool = False) -> np.ndarray:
    """The framed square as uint8 [resolution, resolution, 3], mirrored left-right where asked."""
    right, bottom = view.left + view.resolution, view.top + view.resolution
    if math.prod(view.scaled_size) <= MAX_SCALED_PIXELS:
        scaled = image.resize(view.scaled_size, Image.Resampling.LANCZOS).crop((view.left, view.top, right, bottom))
    else:  # a long strip: only the part that is shown is scaled, with fractions of a pixel at its edges
        x, y = image.width / view.scaled_size[0], image.height / view.scaled_size[1]
        part = (view.left * x, view.top * y, min(right * x, image.width), min(bottom * y, image.height))
        scaled = image.resize((view.resolution, view.resolution), Image.Resampling.LANCZOS, box=part)
    square = np.asarray(scaled)
    return np.ascontiguousarray(square[:, ::-1]) if mirrored else square.copy()


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise ImageFault("the file is empty")
    if is_heif := HEIF and _is_heic(data):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with Image.open(io.BytesIO(_without_remarks(data)), formats=("HEIF",) if is_heif else FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ImageFault(f"{opened.width} x {opened.height} px is more than {MAX_PIXELS:,} px")
        if getattr(opened, "is_animated", False) and opened.format in ("PNG", "WEBP", "AVIF"):
            num_frames = getattr(opened, "n_frames", 2)
            raise ImageFault(f"it is an animation of {num_frames} frames; save one frame as an image")
        opened.load()
        image = opened.copy()
        with suppress(*_DECODER_FAULTS):  # a record of the camera that cannot be read turns nothing
            image = ImageOps.exif_transpose(opened)
        profile = opened.info.get("icc_profile")
    image = _eight_bits(image)
    colour = _to_srgb(image, profile)
    if not image.has_transparency_data:
        return colour
    white = Image.new("RGB", image.size, (255, 255, 255))
    return Image.composite(colour, white, image.convert("RGBA").getchannel("A"))


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")


def _without_remarks(data: bytes) -> bytes:
    """A PNG without texts and other chunks that change no pixel, which may be huge or damaged."""
    if not data.startswith(_PNG):
        return data
    parts, start = [_PNG], len(_PNG)
    while start < len(data):
        end, kind = start + 12 + int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        if kind[:1].isupper() or kind in _TELLING_CHUNKS:
            parts.append(data[start:end])
        start = end
    return b"".join(parts)


def _cut_off(data: bytes) -> str | None:
    """That a JPEG breaks off, which viewers do not say."""
    if data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-64:]:
        return "it breaks off before the end of the JPEG; viewers show what is there: fetch it again, or save it anew"
    return None


def _what_it_is(data: bytes) -> str:
    """What bytes are that no decoder takes."""
    if data.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; `git lfs pull` fetches the picture"
    if data.lstrip()[:1] == b"<":
        return "it is a page of text (HTML or XML), not a picture"
    if _is_heic(data):
        return "it is HEIC, " + ("but not whole" if HEIF else "which is read after pip install pillow-heif")
    return "its content is no whole picture of a known kind"


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray scaled to 8 bits; Pillow's own conversion clips it to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    if image.mode == "I":
        raise ImageFault("its pixels are 32-bit numbers; save it with 8 or 16 bits")
    if image.mode.startswith("F"):
        raise ImageFault("its pixels are floating-point numbers; save it with 8 or 16 bits")
    values = np.asarray(image, dtype=np.float64)
    gray = Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))
    if not isinstance(transparent := image.info.get("transparency"), int):
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB; an unusable profile is treated as no profile, as viewers do."""
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")
    if profile:
        with suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or image.convert("RGB")
    return image.convert("RGB")

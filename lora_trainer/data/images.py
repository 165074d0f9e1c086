"""One function that reads an image as people see it, and one that frames it for the model.

Reading: EXIF orientation applied, colour profile taken to sRGB, 16 bits scaled (not clipped), transparency laid on
white, always fully decoded. Framing: the short side is scaled to the resolution (Lanczos), then a square is cut out.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 200_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow only warns at its limit; ours is an error, checked before decoding

_DECODER_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    MemoryError,
    OverflowError,
    LookupError,
    TypeError,
    AttributeError,
)


class ImageFault(ValueError):
    """A file that cannot be taken as a training image; the message says why."""


@dataclass(frozen=True, slots=True)
class Framing:
    """How an image becomes a square: scaled to `scaled_size`, then cut at `left`, `top`."""

    scaled_size: tuple[int, int]
    left: int
    top: int
    resolution: int
    lost_share: float
    """Share of the picture's area that the cut leaves out."""
    upscale: float
    """Factor by which the picture is enlarged; 1 or less is no enlargement."""


def decode(data: bytes) -> Image.Image:
    """The file's bytes as an RGB image.

    Raises:
        ImageFault: the bytes are no whole still image of a known format.
    """
    try:
        return _decode(data)
    except ImageFault:
        raise
    except _DECODER_FAULTS as error:
        raise ImageFault(str(error).strip() or type(error).__name__) from error


def frame(size: tuple[int, int], resolution: int, place: tuple[float, float] = (0.5, 0.5)) -> Framing:
    """Scale the short side of `size` (width, height) to `resolution` px and cut a square at `place` (0..1, 0..1)."""
    width, height = size
    scale = resolution / min(width, height)
    scaled = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    return Framing(
        scaled_size=scaled,
        left=round((scaled[0] - resolution) * place[0]),
        top=round((scaled[1] - resolution) * place[1]),
        resolution=resolution,
        lost_share=1 - resolution**2 / (scaled[0] * scaled[1]),
        upscale=scale,
    )


def apply_frame(image: Image.Image, framing: Framing, *, mirrored: bool = False) -> np.ndarray:
    """The framed square as uint8 [resolution, resolution, 3], mirrored left-right where asked."""
    scaled = image.resize(framing.scaled_size, Image.Resampling.LANCZOS)
    box = (framing.left, framing.top, framing.left + framing.resolution, framing.top + framing.resolution)
    square = np.asarray(scaled.crop(box))
    return np.ascontiguousarray(square[:, ::-1]) if mirrored else square.copy()


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise ImageFault("the file is empty")
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ImageFault(f"{opened.width} x {opened.height} px is more than {MAX_PIXELS:,} px")
        if getattr(opened, "is_animated", False) and opened.format in ("PNG", "WEBP"):
            raise ImageFault(
                f"it is an animation of {getattr(opened, 'n_frames', 2)} frames; save one frame as an image"
            )
        opened.load()
        image = ImageOps.exif_transpose(opened)
        profile = opened.info.get("icc_profile")
    image = _eight_bits(image)
    transparent = image.has_transparency_data
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    colour = _to_srgb(image, profile)
    if alpha is None:
        return colour
    white = Image.new("RGB", image.size, (255, 255, 255))
    return Image.composite(colour, white, alpha)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray scaled to 8 bits; Pillow's own conversion clips it to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB; an unusable profile is treated as no profile, as viewers do."""
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            return image.convert("RGB")
        if converted is not None:
            return converted
    return image.convert("RGB")

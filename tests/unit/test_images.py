"""Photos as people see them: orientation, transparency, depth and profile; and no broken file slips through."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_trainer.data import images
from lora_trainer.data.folders import EXTENSIONS
from lora_trainer.data.images import ImageFault, apply_frame, decode, frame, lost_share


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def corner_picture() -> Image.Image:
    """8 x 4 px, red in the upper left corner, blue elsewhere."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[:2, :2] = (255, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = corner_picture()
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode(encoded(stored, exif=exif))
    assert shown.size == (8, 4)
    assert np.array_equal(np.asarray(shown), np.asarray(upright))


def test_transparency_lies_on_white() -> None:
    for image in (
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)),
        Image.new("LA", (4, 4), (0, 0)),
    ):
        assert decode(encoded(image)).getpixel((0, 0)) == (255, 255, 255)
    half = decode(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))).getpixel((0, 0))
    assert half == (255, 127, 127)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert decode(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(palette)).getpixel((0, 0)) == (10, 20, 30)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    gray = Image.fromarray(np.full((4, 4), 30000, np.uint16))
    assert decode(encoded(gray)).getpixel((0, 0)) == (117, 117, 117)
    assert decode(encoded(gray, transparency=30000)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    shown = decode(encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert shown.mode == "RGB"
    assert min(shown.getpixel((1, 1))) > 250


def test_a_colour_profile_is_taken_to_srgb() -> None:
    swapped = Image.new("RGB", (4, 4), (200, 50, 50))
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(encoded(swapped, icc_profile=lab_like)).getpixel((0, 0)) == (200, 50, 50)
    assert decode(encoded(swapped, icc_profile=b"no profile")).getpixel((0, 0)) == (200, 50, 50)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_a_fault(format: str, share: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(pixels), format)
    with pytest.raises(ImageFault):
        decode(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_flipped_bytes_never_crash(format: str) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = np.frombuffer(encoded(Image.fromarray(pixels), format), np.uint8)
    faults = 0
    for _ in range(60):
        broken = whole.copy()
        broken[rng.integers(0, len(broken), 16)] ^= rng.integers(1, 256, 16).astype(np.uint8)
        try:
            assert decode(broken.tobytes()).mode == "RGB"
        except ImageFault:
            faults += 1
    assert faults > 0


@pytest.mark.parametrize("data", [b"", b"hello, I am text", b"<html>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_a_fault(data: bytes) -> None:
    with pytest.raises(ImageFault):
        decode(data)


def test_animations_and_other_formats() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    with pytest.raises(ImageFault, match="animation"):
        decode(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(gif).getpixel((0, 0)) == (255, 0, 0)
    for data, said in ((b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"<html>", "HTML")):
        with pytest.raises(ImageFault, match=said):
            decode(data)
    with pytest.raises(ImageFault, match="floating-point"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"))
    for known in ("TIFF", *(["AVIF"] if ".avif" in EXTENSIONS else [])):
        assert decode(encoded(Image.new("RGB", (8, 8), (200, 50, 50)), known)).getpixel((0, 0))[0] > 190


def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    header = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ImageFault, match="is more than"):
        decode(bomb)


def test_framing_keeps_the_aspect_and_says_what_is_lost() -> None:
    wide = frame((300, 100), 64)
    assert wide.scaled_size == (192, 64)
    assert (wide.left, wide.top) == (64, 0)
    assert lost_share(wide) == pytest.approx(2 / 3)
    assert frame((300, 100), 64, (1.0, 0.5)).left == 128
    assert lost_share(frame((64, 64), 64)) == 0
    assert frame((32, 64), 64).scaled_size == (64, 128)


def test_applying_a_frame_cuts_and_mirrors() -> None:
    picture = corner_picture().resize((128, 64), Image.Resampling.NEAREST)
    left = apply_frame(picture, frame(picture.size, 64, (0.0, 0.5)))
    assert left.shape == (64, 64, 3)
    assert left[5, 5].tolist() == [255, 0, 0]
    mirrored = apply_frame(picture, frame(picture.size, 64, (0.0, 0.5)), mirrored=True)
    assert np.array_equal(mirrored, left[:, ::-1])


def test_a_long_strip_is_framed_at_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    strip = Image.new("RGB", (1, 20_000), (10, 20, 30))
    assert apply_frame(strip, frame(strip.size, 512)).shape == (512, 512, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    views = [frame(picture.size, 64, (0.5, place)) for place in (0.0, 0.4, 1.0)]
    whole = [apply_frame(picture, view) for view in views]
    monkeypatch.setattr(images, "MAX_SCALED_PIXELS", 0)
    for view, expected in zip(views, whole, strict=True):
        assert np.abs(apply_frame(picture, view).astype(int) - expected).max() <= 1


def test_a_jpeg_that_breaks_off_is_told() -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)), "JPEG")
    for length in (len(whole) - 2, len(whole) // 2):
        with pytest.raises(ImageFault, match="breaks off before the end"):
            decode(whole[:length])


def test_heic_is_read_with_the_package_for_it_and_named_without() -> None:
    head = b"\0\0\0\x1cftypheic" + bytes(16)
    if ".heic" not in EXTENSIONS:
        with pytest.raises(ImageFault, match="pip install pillow-heif"):
            decode(head)
        pytest.skip("pillow-heif is not installed")
    import pillow_heif

    pillow_heif.register_heif_opener()
    picture = corner_picture().resize((128, 64), Image.Resampling.NEAREST)
    data = encoded(picture, "HEIF", quality=95)
    shown = decode(data)
    assert shown.size == (128, 64)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(picture)).mean() < 8
    for damaged in (head, data[: len(data) // 2], b""):
        with pytest.raises(ImageFault):
            decode(damaged)


@pytest.mark.parametrize(
    "chunk",
    [b"zTXt" + b"a\0\0" + zlib.compress(bytes(2**21)), b"pHYs", b"gAMA\1", b"tEXtno separator", b"eXIfgarbage"],
)
def test_what_surrounds_the_pixels_of_a_png_does_not_count(chunk: bytes) -> None:
    plain = encoded(Image.new("RGB", (8, 8), (200, 50, 50)), "PNG")
    for check in (zlib.crc32(chunk), 7):
        if check == 7 and chunk.startswith(b"eXIf"):
            continue
        remark = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", check)
        assert np.array_equal(np.asarray(decode(plain[:33] + remark + plain[33:])), np.asarray(decode(plain)))


def test_32_bit_numbers_are_no_gray() -> None:
    with pytest.raises(ImageFault, match="32-bit"):
        decode(encoded(Image.fromarray(np.full((4, 4), 200, np.int32)), "TIFF"))

"""Every mode of Pillow, in files of the formats that have it: equals numpy's arithmetic, or is refused by path."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atdiag.data import decoding
from atdiag.data.decoding import DARK, SEVERAL, TRANSPARENT, TURNED, BrokenImageError, as_rgb, decode

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 12), np.uint8)
COLOUR = RNG.integers(0, 256, (9, 12, 3), np.uint8)
FOUR = RNG.integers(0, 256, (9, 12, 4), np.uint8)
WIDE = np.linspace(0, 65535, 108).astype(np.uint16).reshape(9, 12)
WIDE[0, :4] = 128, 129, 65406, 65407  # next to the halves between two grey values


def three(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, -1)


def by_257(wide):
    return three(np.rint(np.asarray(wide, np.float64) / 257))


def saved(picture, path, **options):
    picture.save(path, **options)
    return path


def pixels(path, remarks=None):
    return np.asarray(decode(path, None, remarks))


def tiff(path, data, shape, bits, order="<", photometric=1, kind=1):
    """Write an uncompressed TIFF from packed samples; kind: 1 unsigned, 2 signed, 3 float."""
    height, width, samples = shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: samples, 278: height, 339: kind}
    count = len(tags) + 2
    end = 8 + 2 + 12 * count + 4
    entries = {tag: (3, 1, struct.pack(order + "HH", value, 0)) for tag, value in tags.items()}
    if samples == 3:
        for tag, value in ((258, bits), (339, kind)):
            entries[tag] = (3, 3, struct.pack(order + "I", end))
            data_of = struct.pack(order + "HHH", *[value] * 3)
            end += 6
            entries[tag] += (data_of,)
    extra = b"".join(entry[3] for _, entry in sorted(entries.items()) if len(entry) == 4)
    entries[273] = (4, 1, struct.pack(order + "I", end))
    entries[279] = (4, 1, struct.pack(order + "I", len(data)))
    body = b"".join(struct.pack(order + "HHI", tag, e[0], e[1]) + e[2] for tag, e in sorted(entries.items()))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", count)
    path.write_bytes(head + body + bytes(4) + extra + data)
    return path


def png16(path, array, colour_type, extra=b""):
    """Write a PNG of 16 bits a channel: array [H, W, C]."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    sbit = chunk(b"sBIT", extra) if extra else b""
    chunks = chunk(b"IHDR", header) + sbit + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


# --- ordinary images: the pixels of before ----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "gif", "tif", "ppm", "jp2"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_ordinary_images_decode_as_before(tmp_path, ending, mode):
    picture = Image.fromarray(COLOUR).convert(mode)
    if (ending, mode) in (("jpg", "P"), ("webp", "P"), ("ppm", "P"), ("jp2", "P"), ("jp2", "1")):
        pytest.skip(f"no {ending} has mode {mode}")
    path = saved(picture, tmp_path / f"x.{ending}")
    with Image.open(path) as opened:
        before = np.asarray(opened.convert("RGB"))
    remarks = set()
    assert np.array_equal(pixels(path, remarks), before)
    assert before.dtype == np.uint8 and before.shape == (9, 12, 3) and not remarks
    if ending in ("png", "bmp", "tif"):  # lossless, and the mode stays
        assert np.array_equal(before, np.asarray(picture.convert("RGB")))


def test_8_bit_modes_are_numpys_arithmetic(tmp_path):
    assert np.array_equal(pixels(saved(Image.fromarray(GREY), tmp_path / "l.png")), three(GREY))
    black = Image.fromarray(GREY > 127)
    for ending in ("png", "tif", "pbm", "bmp"):
        assert np.array_equal(pixels(saved(black, tmp_path / f"1.{ending}")), three(255 * (GREY > 127)))
    palette = RNG.integers(0, 256, (256, 3), np.uint8)
    indexed = Image.fromarray(GREY)
    indexed.putpalette(palette.tobytes())
    for ending in ("png", "tif", "gif", "bmp"):
        assert np.array_equal(pixels(saved(indexed, tmp_path / f"p.{ending}")), palette[GREY])
    # Alpha is dropped, whatever is transparent.
    for ending in ("png", "tif"):
        assert np.array_equal(pixels(saved(Image.fromarray(FOUR), tmp_path / f"rgba.{ending}")), FOUR[..., :3])
        la = Image.fromarray(np.ascontiguousarray(FOUR[..., :2]))
        assert la.mode == "LA"
        assert np.array_equal(pixels(saved(la, tmp_path / f"la.{ending}")), three(FOUR[..., 0]))
    indexed.save(tmp_path / "clear.png", transparency=int(GREY[0, 0]))
    assert np.array_equal(pixels(tmp_path / "clear.png"), palette[GREY])
    pa = Image.fromarray(GREY)
    pa.putpalette(palette.tobytes())
    pa = pa.convert("PA")
    pa.putalpha(Image.fromarray(FOUR[..., 3]))
    assert pa.mode == "PA" and np.array_equal(np.asarray(as_rgb(pa)), palette[GREY])
    rgbx = Image.frombytes("RGBX", (12, 9), FOUR.tobytes())
    assert np.array_equal(np.asarray(as_rgb(rgbx)), FOUR[..., :3])


def test_cmyk_and_ycbcr_are_their_formulas_to_a_rounding(tmp_path):
    def near(path, expected):
        assert np.abs(pixels(path).astype(float) - np.clip(expected, 0, 255)).max() <= 1

    ink = FOUR.astype(float)
    cmyk = saved(Image.frombytes("CMYK", (12, 9), FOUR.tobytes()), tmp_path / "cmyk.tif")
    near(cmyk, (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255)
    y, cb, cr = (COLOUR[..., i].astype(float) - (128 if i else 0) for i in range(3))
    matrix = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    near(saved(Image.frombytes("YCbCr", (12, 9), COLOUR.tobytes()), tmp_path / "ycc.tif"), matrix)


def test_premultiplied_alpha_is_divided_out():
    alpha = np.maximum(FOUR[..., 3:], 1)
    small = FOUR[..., :3].astype(int) * alpha // 255
    rgba = Image.frombytes("RGBa", (12, 9), np.concatenate([small, alpha], -1).astype(np.uint8).tobytes())
    la = Image.frombytes("La", (12, 9), np.stack([small[..., 0], alpha[..., 0]], -1).astype(np.uint8).tobytes())
    expected = np.minimum(255 * small // alpha, 255)
    assert np.array_equal(np.asarray(as_rgb(rgba)), expected)
    assert np.array_equal(np.asarray(as_rgb(la)), three(expected[..., 0]))


# --- more than 8 bits -------------------------------------------------------------------------------------------------


def test_grey_of_16_bits_is_divided_by_257(tmp_path):
    wide = Image.fromarray(WIDE)
    assert wide.mode == "I;16"
    written = {
        "png": saved(wide, tmp_path / "a.png"),
        "raw tiff": saved(wide, tmp_path / "a.tif"),
        "lzw tiff": saved(wide, tmp_path / "b.tif", compression="tiff_lzw"),
        "little": tiff(tmp_path / "c.tif", WIDE.astype("<u2").tobytes(), (9, 12, 1), 16),
        "big": tiff(tmp_path / "d.tif", WIDE.astype(">u2").tobytes(), (9, 12, 1), 16, order=">"),
        "jp2": saved(wide, tmp_path / "a.jp2"),
    }
    for name, path in written.items():
        assert np.array_equal(pixels(path), by_257(WIDE)), name
    with Image.open(written["big"]) as opened:
        assert opened.mode == "I;16B"
    header = b"12 9\n65535\n"
    (tmp_path / "a.pgm").write_bytes(b"P5 " + header + WIDE.astype(">u2").tobytes())
    (tmp_path / "b.pgm").write_bytes(b"P2 " + header + " ".join(map(str, WIDE.ravel())).encode())
    assert all(np.array_equal(pixels(tmp_path / f"{name}.pgm"), by_257(WIDE)) for name in "ab")
    # An image's own minimum and maximum do not matter.
    half = saved(Image.fromarray(WIDE // 2), tmp_path / "half.png")
    assert np.array_equal(pixels(half), by_257(WIDE // 2))
    assert pixels(half).max() == 127


def test_white_is_zero_tiffs_are_inverted_at_every_depth(tmp_path):
    for bits, values, grey in ((16, WIDE.astype("<u2"), by_257(WIDE)), (8, GREY, three(GREY))):
        path = tiff(tmp_path / f"{bits}.tif", values.tobytes(), (9, 12, 1), bits, photometric=0)
        assert np.array_equal(pixels(path), 255 - grey)


def test_declared_12_bit_images_are_scaled_from_12_bits(tmp_path):
    values = np.linspace(0, 4095, 108).astype(np.uint16).reshape(9, 12)
    a, b = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8)
    remarks = set()
    expected = three(np.rint(values / 4095 * 255))
    assert np.array_equal(pixels(tiff(tmp_path / "x.tif", packed.tobytes(), (9, 12, 1), 12), remarks), expected)
    (tmp_path / "x.pgm").write_bytes(b"P5 12 9\n4095\n" + values.astype(">u2").tobytes())
    assert (
        np.abs(pixels(tmp_path / "x.pgm", remarks).astype(int) - expected).max() <= 1
    )  # Pillow rounds to 16 bits first
    assert not remarks
    # A JPEG 2000 of 12 bits, which Pillow shifts up to 16: the depth in the header of a lossless one of 16.
    middle = values.astype(np.uint16) + 2**15 - 2**11
    content = saved(Image.fromarray(middle), tmp_path / "x.j2k").read_bytes()
    at = content.index(b"\xff\x51") + 4 + 36  # Ssiz, the depth less one
    assert content[at] == 15
    (tmp_path / "x.j2k").write_bytes(content[:at] + b"\x0b" + content[at + 1 :])
    assert np.array_equal(pixels(tmp_path / "x.j2k"), by_257(values.astype(int) << 4))
    # Read as 16 bits they are dark, and a check reports that.
    for path in (
        saved(Image.fromarray(values), tmp_path / "dark.png"),
        saved(Image.fromarray(values), tmp_path / "dark.tif"),
        png16(tmp_path / "sbit.png", values[..., None], 0, extra=b"\x0c"),
        tiff(tmp_path / "white.tif", (65535 - values).astype("<u2").tobytes(), (9, 12, 1), 16, photometric=0),
    ):
        remarks = set()
        assert np.array_equal(pixels(path, remarks), by_257(values)), path
        assert remarks == {DARK}
    remarks = set()
    pixels(saved(Image.fromarray(values * 2 + 200), tmp_path / "dim.png"), remarks)
    assert not remarks


def test_colour_of_16_bits_keeps_its_upper_8(tmp_path):
    wide = RNG.integers(0, 2**16, (9, 12, 4)).astype(np.uint16)
    rgb = np.ascontiguousarray(wide[..., :3])
    assert np.array_equal(pixels(png16(tmp_path / "rgb.png", rgb, 2)), rgb >> 8)
    assert np.array_equal(pixels(png16(tmp_path / "rgba.png", wide, 6)), rgb >> 8)
    assert np.array_equal(pixels(png16(tmp_path / "la.png", wide[..., :2], 4)), three(wide[..., 0] >> 8))
    for order in "<>":
        path = tiff(tmp_path / "x.tif", rgb.astype(order + "u2").tobytes(), (9, 12, 3), 16, order, photometric=2)
        assert np.array_equal(pixels(path), rgb >> 8)
    assert np.abs((rgb >> 8).astype(float) - rgb / 257).max() <= 1


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda p: saved(Image.fromarray(GREY.astype(np.float32)), p), "floating-point numbers"),
        (lambda p: saved(Image.fromarray(GREY.astype(np.int32)), p), "32-bit integers"),
        (lambda p: tiff(p, WIDE.astype("<u4").tobytes(), (9, 12, 1), 32), "32-bit integers"),
        (lambda p: tiff(p, GREY.astype("<i2").tobytes(), (9, 12, 1), 16, kind=2), "signed or 32-bit"),
        (lambda p: saved(Image.frombytes("LAB", (12, 9), COLOUR.tobytes()), p), "mode LAB"),
        (lambda p: p.write_bytes(b"Pf\n12 9\n-1.0\n" + GREY.astype("<f4").tobytes()), "floating-point numbers"),
    ],
)
def test_modes_without_a_rule_are_refused_by_path(tmp_path, write, says):
    path = tmp_path / "x.tif"
    write(path)
    with pytest.raises(BrokenImageError, match=f"x.tif can't be read: .*{says}.*; save it as 8-bit RGB or as grey"):
        decode(path)


def test_no_format_gives_hsv_and_hsv_would_be_refused():
    with pytest.raises(decoding._NoRuleError, match="mode HSV"):
        as_rgb(Image.fromarray(COLOUR).convert("HSV"))


def test_the_documented_table_names_every_mode_of_pillow_and_is_true():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = text.partition("| mode | rule |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    table = dict(re.fullmatch(r"\| (.+?) \| (.+) \|", line).groups() for line in lines)
    rule = {mode: rule for modes, rule in table.items() for mode in modes.split(", ")}
    wide = rule.pop("I;16 in either byte order")
    rule |= dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), wide)
    assert rule.pop("all others").startswith("refused")
    assert set(rule) >= set(Image.MODES), "Pillow has a mode without a rule: it is refused, and the table says so"
    for mode, says in rule.items():
        picture = Image.new(mode, (4, 4))
        if says.startswith("refused") or mode == "I":  # I: from a PGM alone
            with pytest.raises(decoding._NoRuleError):
                as_rgb(picture)
        else:
            assert as_rgb(picture).mode == "RGB", mode


# --- what may surprise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_the_first_of_several_frames_is_used(tmp_path, ending):
    frames = [Image.new("RGB", (12, 9), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if ending == "webp" else {}
    path = saved(frames[0], tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **options)
    remarks = set()
    assert np.array_equal(pixels(path, remarks), np.asarray(frames[0]))
    assert remarks == {SEVERAL}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_orientation_is_ignored_and_a_tiffs_own_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    remarks = set()
    path = saved(Image.fromarray(COLOUR), tmp_path / "x.png", exif=exif)
    assert np.array_equal(pixels(path, remarks), COLOUR) and remarks == {TURNED}
    remarks = set()
    for name, array, expected in (("c", COLOUR, COLOUR), ("g", GREY, three(GREY)), ("w", WIDE, by_257(WIDE))):
        path = saved(Image.fromarray(array), tmp_path / f"{name}.tif", tiffinfo={274: 6})
        assert np.array_equal(pixels(path, remarks), np.rot90(expected, -1))
    assert not remarks
    path = saved(Image.fromarray(COLOUR), tmp_path / "bad.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert pixels(path, remarks).shape == (9, 12, 3) and not remarks  # a fault in EXIF spoils no image


def test_transparency_is_reported_only_if_a_pixel_has_it(tmp_path):
    opaque = FOUR.copy()
    opaque[..., 3] = 255
    indexed = Image.fromarray(GREY // 2)
    indexed.putpalette(bytes(range(256)) * 3)
    for name, picture, options, seen in (
        ("rgba", Image.fromarray(FOUR), {}, True),
        ("opaque", Image.fromarray(opaque), {}, False),
        ("palette", indexed, {"transparency": int(GREY[0, 0]) // 2}, True),
        ("unused", indexed, {"transparency": 200}, False),
        ("colour key", Image.fromarray(COLOUR), {"transparency": tuple(map(int, COLOUR[0, 0]))}, True),
    ):
        remarks = set()
        pixels(saved(picture, tmp_path / f"{name}.png", **options), remarks)
        assert remarks == ({TRANSPARENT} if seen else set()), name


def test_a_stereo_photograph_is_one_image(tmp_path):
    both = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    path = saved(both[0], tmp_path / "x.mpo", save_all=True, append_images=both[1:])
    first = io.BytesIO()
    both[0].save(first, "JPEG")
    remarks = set()
    assert np.array_equal(pixels(path, remarks), np.asarray(Image.open(first))) and not remarks

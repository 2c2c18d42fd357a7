"""Which files count as images, by file ending. Imports nothing heavy, since planning lists folders.

Every file in a class folder is an image that is read (``READ``), an image that is refused (``UNREAD``,
``DOCUMENTS``), or another file, which is counted and named. Endings decide what is listed; the content of a listed
file decides how it is decoded.
"""

from __future__ import annotations

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
"""The formats that are read, by Pillow's names, and their endings. Not all that Pillow opens: for EPS it would run
Ghostscript, an ICO holds several sizes, and not every build of Pillow reads AVIF."""

READ = tuple(ending for endings in FORMATS.values() for ending in endings)

UNREAD = (
    *(".avif", ".avifs", ".heic", ".heif", ".jxl", ".ico", ".icns", ".cur", ".psd", ".tga", ".dds", ".pcx", ".qoi"),
    *(".sgi", ".rgb", ".rgba", ".bw", ".ras", ".xbm", ".xpm", ".exr", ".hdr", ".pfm", ".fits", ".dcm", ".dicom"),
    *(".nii", ".nii.gz", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
"""Endings of images in formats that are not read."""

DOCUMENTS = (".eps", ".ps", ".pdf", ".ai", ".svg", ".svgz", ".wmf", ".emf")
"""Endings of documents that have to be rendered: they have no pixels of their own."""


def is_image(name: str) -> bool:
    """Return whether a file of this name is read as an image; the case of the ending does not matter."""
    return name.lower().endswith(READ)


def is_refused(name: str) -> bool:
    """Return whether a file of this name is an image or document in a format that is not read."""
    return name.lower().endswith(UNREAD + DOCUMENTS)

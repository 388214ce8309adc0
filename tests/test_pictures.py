"""Image files that people have: read the same way everywhere, or refused in the same words."""

import io
import os
import struct
import sys
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dermnb.audit.hashes import fingerprint
from dermnb.core import ConfigError
from dermnb.data.files import image_fault, list_files
from dermnb.data.images import build_store, read_pixels, resize_image
from dermnb.data.decoding import IMAGE_SUFFIXES, file_name, open_picture, shown, unread_kind
from dermnb.serve.inputs import find_images, read_image


def photo(side=40):
    blocks = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3))
    return Image.fromarray(np.kron(blocks, np.ones((4, 4, 1))).astype(np.uint8))


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def gray(bits=16, low=False):
    "A gray ramp to the top of so many bits, left in the lowest of 16 or not."
    ramp = np.linspace(0, 2**bits - 1, 1600).astype(np.uint16).reshape(40, 40)
    return Image.fromarray(ramp if low else ramp << (16 - bits))


def with_depth(png, bits):
    body = b"sBIT" + bytes([bits])
    chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[33:]


def color16(top):
    "A PNG of 16 bits a channel, which Pillow cannot write."
    values = np.linspace(0, top, 40 * 40 * 3).astype(">u2").reshape(40, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80)
READ = {
    "a.jpg": encoded(photo(), "JPEG"),
    "a.jfif": encoded(photo(), "JPEG"),
    "a.JPE": encoded(photo(), "JPEG"),
    "a.webp": encoded(photo(), "WEBP"),
    "a.dib": encoded(photo(), "BMP"),
    "a.tif": encoded(photo(), "TIFF"),
    "a.mpo": encoded(photo(), "MPO", save_all=True, append_images=[photo(20)]),
    "is_a_png.jpg": encoded(photo()),
    "is_a_jpeg.heic": encoded(photo(), "JPEG"),
    "flat.png": encoded(Image.new("RGB", (40, 40))),
    "cmyk.jpg": encoded(photo().convert("CMYK"), "JPEG"),
    "palette.png": encoded(photo().convert("P")),
    "alpha.png": encoded(photo().convert("RGBA")),
    "sixteen.png": encoded(gray()),
    "sixteen.tif": encoded(gray(), "TIFF"),
    "twelve_stated.png": with_depth(encoded(gray(12, low=True)), 12),
    "twelve_filled.png": with_depth(encoded(gray(12)), 12),
    "color16.png": color16(65535),
}
REFUSED = {
    "is_a_gif.jpg": (encoded(photo(), "GIF"), "of the format GIF"),
    "telephone.HEIC": (HEIC, "of the format HEIC"),
    "is_a_heic.jpg": (HEIC, "of the format HEIC"),
    "avif.jpg": (b"\0\0\0\x20ftypavif" + bytes(80), "of the format AVIF"),
    "raw.nef": (encoded(photo(), "TIFF"), "of the format camera raw"),
    "page.jpg": (b"<!DOCTYPE html><html></html>", "is a web page"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "zip.png": (b"PK\3\4" + bytes(80), "is an archive"),
    "text.png": (b"no image", "not an image in one of the formats"),
    "empty.png": (b"", "is empty"),
    "cut.jpg": (encoded(photo(), "JPEG")[:-300], "ends too early"),
    "cut.png": (encoded(photo())[:-300], "cannot be decoded"),
    "small.png": (encoded(photo().resize((15, 40))), "has 15 x 40 pixels"),
    "film.png": (encoded(photo(), save_all=True, append_images=[photo()]), "holds 2"),
    "film.webp": (encoded(photo(), "WEBP", save_all=True, append_images=[gray()]), "holds 2"),
    "pages.tif": (encoded(photo(), "TIFF", save_all=True, append_images=[photo()]), "holds 2"),
    "ten.png": (encoded(gray(10, low=True)), "seems to hold 10 bits"),
    "twelve.tif": (encoded(gray(12, low=True), "TIFF"), "seems to hold 12 bits"),
    "fourteen.png": (encoded(gray(14, low=True)), "seems to hold 14 bits"),
    "color12.png": (color16(4095), "would be all but black"),
    "float.tif": (encoded(gray().convert("F"), "TIFF"), "floating-point"),
    "int.tif": (encoded(Image.fromarray(np.full((40, 40), 70_000, np.int32)), "TIFF"), "70,000"),
}  # fmt: skip


def test_every_part_reads_and_refuses_the_same_files_in_the_same_words(tmp_path):
    files = READ | {name: data for name, (data, _) in REFUSED.items()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (1e9, 1e9))
    paths = find_images([tmp_path])
    assert sorted(map(file_name, paths)) == sorted(files)  # none is passed over
    table = pd.DataFrame({"image_id": [file_name(p) for p in paths], "path": paths})
    store = build_store(table, 16, "crop", tmp_path / "stores", on_problem="exclude")
    for name, path in zip(table["image_id"], paths, strict=True):
        fault = image_fault(path)
        try:
            read_image(path).rgb()
            asked = ""
        except ConfigError as error:
            asked = str(error).rstrip(".")
        assert fault == asked == store.unreadable.get(name, "")
        assert (
            bool(fault) == (fingerprint(files[name], name)["pixels"] is None) == (name in REFUSED)
        )
        if fault:
            assert REFUSED[name][1] in fault and fault.startswith(name)
            with pytest.raises(ConfigError):
                read_pixels(path, 16)
    by_ending = {image.name for image in list_files(tmp_path).images}
    assert by_ending == set(files) - {"telephone.HEIC", "raw.nef", "is_a_jpeg.heic"}
    assert unread_kind("telephone.HEIC") == "HEIC" and not unread_kind("metadata.csv")
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)


def test_depth_is_the_files_own():
    ramp = np.linspace(0, 255, 1600).reshape(40, 40)
    files = {"sixteen.png", "sixteen.tif", "twelve_stated.png", "twelve_filled.png"}
    for name in files:
        values = np.asarray(open_picture(READ[name], name).rgb())[..., 0].astype(float)
        assert np.abs(values - ramp).max() <= 1, name
    assert np.asarray(open_picture(READ["color16.png"]).rgb()).max() == 255
    # A dark photograph that fills its 16 bits is none of 12.
    half = Image.fromarray((np.asarray(gray()) // 3).astype(np.uint16))
    assert np.asarray(open_picture(encoded(half)).rgb()).max() == 85


def test_a_camera_s_preview_is_no_second_picture():
    small = Image.new("RGB", (20, 20))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    pages = encoded(photo(), "TIFF", save_all=True, append_images=[small])
    assert open_picture(pages).rgb().size == (40, 40)


def test_ordinary_files_give_the_pixels_that_pillow_gives():
    "What is stored and published rests on them."
    data = encoded(photo(200), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as image:
        whole = np.asarray(image.convert("RGB"))
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (48, 48))
        part = image.convert("RGB").resize((24, 24), Image.Resampling.BICUBIC, reducing_gap=3.0)
    assert np.array_equal(np.asarray(open_picture(data).rgb()), whole)
    assert np.array_equal(resize_image(data, 24, "stretch"), np.asarray(part))


def test_names_that_are_no_text_can_be_shown():
    name = os.fsdecode(b"caf\xe9.jpg")
    assert shown(name) == r"caf\udce9.jpg" and shown("naïve") == "naïve"
    with pytest.raises(ConfigError) as error:
        open_picture(b"", name)
    str(error.value).encode("utf-8")


def dicom(pixels, colors, bits=8, frames=1, jpeg=None):
    "A DICOM file as a dermoscope writes it, by pydicom itself."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

    data, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.file_meta, data.PhotometricInterpretation = meta, colors
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PixelRepresentation = 1 if pixels.ndim == 2 else 3, 0
    data.BitsStored, data.HighBit = bits, bits - 1
    data.BitsAllocated = 8 if bits <= 8 else 16
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    if frames > 1:
        data.NumberOfFrames = frames
    data.PixelData = encapsulate([jpeg]) if jpeg else pixels.tobytes()
    data["PixelData"].is_undefined_length = bool(jpeg)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_dicom():
    pytest.importorskip("pydicom")
    color = np.asarray(photo())
    bright = color[..., 0].copy()
    jpeg = encoded(photo(), "JPEG", quality=95)
    plain = open_picture(dicom(color, "RGB"), "a.dcm")
    assert plain.size == (40, 40) and not plain.notes
    assert np.array_equal(np.asarray(plain.rgb()), color)
    packed = open_picture(dicom(color, "YBR_FULL_422", jpeg=jpeg)).rgb()
    assert np.abs(np.asarray(packed).astype(int) - open_picture(jpeg).rgb()).mean() < 2
    for data in (
        dicom(bright, "MONOCHROME2"),
        dicom(bright.astype(np.uint16) * 16, "MONOCHROME2", 12),
        dicom(4095 - bright.astype(np.uint16) * 16, "MONOCHROME1", 12),
    ):
        picture = open_picture(data, "b.dcm")
        assert np.abs(np.asarray(picture.rgb())[..., 1].astype(int) - bright).max() <= 1
        assert "no window was applied" in picture.notes[-1]
    for data, said in (
        (dicom(color, "RGB", frames=2), "holds 2 pictures"),
        (dicom(color, "RGB")[:-900], "cannot be decoded"),
        (bytes(128) + b"DICM" + bytes(20), "cannot be decoded|holds no image"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_picture(data, "c.dcm").rgb()


def test_dicom_without_pydicom_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    path = tmp_path / "a.dcm"
    path.write_bytes(bytes(128) + b"DICM" + bytes(20))
    assert "pip install 'dermnb[dicom]'" in image_fault(str(path))
    assert find_images([tmp_path]) == [str(path)]

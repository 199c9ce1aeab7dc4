"""Every kind of image from pre-training to an exported file, by the command: it is read alike on the whole way.

The last step is held to an own computation: ONNX Runtime, fed with the file's values by the ranges and statistics that the
exported folder states, gives the vectors that `simmim embed` wrote.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from simmim.cli import main
from simmim.cli.train import study_settings
from simmim.data import hold_out, open_images, open_source, read_labeled_images
from simmim.data.held_out import number_files
from simmim.finetune.classification.folds import hold_out_fold
from simmim.finetune.registry import study_of
from simmim.messages import Notice, without_notices
from simmim.reading import AUTO, Reading

SIDE_PX = 32  # of images and of crops, so that nothing is resized where a whole image is seen
PER_CLASS = 6
TOY = '{"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}'
BANDS, NODATA = 13, 0
CHANNELS = ("DAPI", "GFP", "RFP", "Cy5", "BF")


def values_of(number, *shape, low=200, high=4000):
    """Smooth noise in 12 bits, which is brighter in odd images."""
    chance = np.random.default_rng(number)
    values = np.sort(chance.integers(low, high, (*shape, SIDE_PX, SIDE_PX)), axis=-1)
    return (values // (1 if number % 2 else 2)).astype(np.uint16)


def write_ome(folder, number):
    """An OME-TIFF of five named channels."""
    values = values_of(number, 5)
    metadata = {"axes": "CYX", "Channel": {"Name": list(CHANNELS)}}
    tifffile.imwrite(folder / f"{number}.ome.tif", values, ome=True, photometric="minisblack", metadata=metadata)
    return {f"{number}.ome.tif": values}


def write_channel_files(folder, number):
    """Five PNG files, one a channel, as a microscope writes them."""
    values = values_of(number, 5)
    for channel, plane in enumerate(values):
        Image.fromarray(plane).save(folder / f"A{number}_s1_w{channel + 1}.png")
    return {f"A{number}_s1_w1.png": values}


def write_stack(folder, number):
    """Three pages that nothing explains, of which each is an image."""
    values = values_of(number, 3)
    tifffile.imwrite(folder / f"{number}.tif", values, photometric="minisblack", metadata=None)
    return {f"{number}.tif#page={page}": plane[None] for page, plane in enumerate(values)}


def write_geotiff(folder, number):
    """13 bands with georeference, and a corner without data."""
    values = values_of(number, BANDS)
    values[:, :8, : 8 + number] = NODATA
    tags = [
        (42113, "s", 0, str(NODATA), True),
        (33550, "d", 3, (10.0, 10.0, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, 500_000.0, 5_000_000.0, 0.0), True),
    ]
    options = {"planarconfig": "separate", "tile": (16, 16), "extratags": tags, "metadata": None}
    tifffile.imwrite(folder / f"{number}.tif", values, photometric="minisblack", **options)
    return {f"{number}.tif": np.where(values == NODATA, np.nan, values.astype(np.float32))}


def write_dicom(folder, number):
    """A slice of a CT in Hounsfield units."""
    pydicom = pytest.importorskip("pydicom", reason="DICOM needs the extra dicom")
    stored = values_of(number, 1)[0]
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.Modality, dataset.InstanceNumber = "CT", number
    dataset.Rows = dataset.Columns = SIDE_PX
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.PixelData = stored.tobytes()
    dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return {f"{number}.dcm": stored[None].astype(np.float32) - 1024}


def write_ome_zarr(folder, number):
    """Two planes of five named channels in an OME-Zarr, of which each is an image."""
    import zarr_files

    values = values_of(number, 2, 5)
    zarr_files.write_ome_zarr(folder / f"{number}.ome.zarr", values, "zcyx", names=CHANNELS)
    return {f"{number}.ome.zarr#page={page}": plane for page, plane in enumerate(values)}


@dataclass(frozen=True)
class Kind:
    """A kind of images.

    Args:
        write: a file, or the files of an image, into a folder by number; gives the values of its images, (channels, height,
            width), NaN where there is no data, by the names that their paths end in, without those of further files.
        channels: of an image.
        words: further ones of pre-training.
        images: in what `write` writes.
    """

    write: Callable
    channels: int
    words: tuple[str, ...] = ()
    images: int = 1


KINDS = {
    "five channels in an OME-TIFF": Kind(write_ome, 5),
    "five channels in files of their own": Kind(
        write_channel_files, 5, ("--data.channel_files", "{well}_s{site}_w{channel}")
    ),
    "pages of a TIFF stack": Kind(write_stack, 1, ("--data.pages", "images"), images=3),
    "a GeoTIFF of 13 bands": Kind(write_geotiff, BANDS),
    "a DICOM series": Kind(write_dicom, 1, ("--data.turns", "true")),
    "planes of an OME-Zarr": Kind(write_ome_zarr, 5, images=2),
}


def write_labeled(folder, kind):
    """Images of two classes in folders, and the values of each by its path, as of `Kind.write`."""
    values = {}
    for label, name in enumerate(("dark", "bright")):
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            written = kind.write(folder / name, 2 * number + label)
            values |= {str(folder / name / key): stored for key, stored in written.items()}
    return values


def run(*words):
    with without_notices():
        assert main([str(word) for word in words]) == 0, words


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stated_input(exported, values):
    """Values as an exported folder says that they go into the encoder, (1, channels, height, width) float32."""
    preprocessing = json.loads((exported / "config.json").read_text(encoding="utf-8"))["simmim"]["preprocessing"]
    low, high = np.array(preprocessing["reading"]["range"], np.float64).T[..., None, None]
    mean, std = (np.array(preprocessing[name])[:, None, None] for name in ("mean", "std"))
    shares = ((values - low) / (high - low)).clip(0, 1)
    return np.nan_to_num((shares - mean) / std, nan=0.0)[None].astype(np.float32)


def outputs_of(exported, values):
    """What ONNX Runtime computes of an image's values."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: stated_input(exported, values)})[0][0]


@pytest.mark.parametrize("name", KINDS)
def test_from_pretraining_to_an_exported_file(tmp_path, name):
    import pyarrow.parquet

    kind, folder = KINDS[name], tmp_path / "images"
    values = write_labeled(folder, kind)
    assert len(values) == 2 * PER_CLASS * kind.images
    pretrained, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    of_run = ("--epochs", 1, "--batch-size", len(values) // 2, "--workers", 0)
    encoder = ("--preset", "nano", "--model.encoder", TOY, "--image-size", SIDE_PX)
    run("pretrain", "--data", folder, "--out", pretrained, *encoder, *of_run, *kind.words)
    run("reconstruct", "--run", pretrained, "--images", folder, "--out", tmp_path / "grid.png", "--count", 2)
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 0
    run("finetune", "classification", "--data", folder, "--init", pretrained, "--out", tuned, *of_run)
    # Once and whole, as the exported file sees them.
    whole = ("--views", 1, "--crop", 1)
    run("predict", "--run", tuned, "--images", folder, "--out", tmp_path / "classes.csv", "--workers", 0, *whole)
    run("embed", "--run", pretrained, "--images", folder, "--out", tmp_path / "vectors.parquet", "--workers", 0)
    run("export", "--run", pretrained, "--out", tmp_path / "encoder", "--format", "onnx")
    run("export", "--run", tuned, "--out", tmp_path / "classifier", "--format", "onnx", "--form", "classifier")

    embedded = pyarrow.parquet.read_table(tmp_path / "vectors.parquet").to_pydict()
    classes = {row["path"]: row for row in read_csv(tmp_path / "classes.csv")}
    assert classes.keys() == set(embedded["path"])
    found = {path.split("|")[0]: (path, vector) for path, vector in zip(embedded["path"], embedded["vector"])}
    assert found.keys() == values.keys()
    for path in list(values)[:: len(values) // 3]:
        address, vector = found[path]
        assert values[path].shape == (kind.channels, SIDE_PX, SIDE_PX)
        np.testing.assert_allclose(outputs_of(tmp_path / "encoder", values[path]), vector, atol=1e-4)
        logits = torch.from_numpy(outputs_of(tmp_path / "classifier", values[path]))
        bright, dark = (float(classes[address][f"probability {label}"]) for label in ("bright", "dark"))
        assert logits.softmax(dim=0).tolist() == pytest.approx([bright, dark], abs=1e-4)


# --- from scratch -------------------------------------------------------------------------------------------------------


def reading_of(run_folder):
    return json.loads((run_folder / "encoder" / "config.json").read_text(encoding="utf-8"))["preprocessing"]["reading"]


def test_values_are_given_from_scratch_and_an_encoder_brings_its_own(tmp_path, capsys):
    """What a run reads is stored with it and printed; values on another scale than the encoder's are refused in a line."""
    folder, out = tmp_path / "images", tmp_path / "scratch"
    write_labeled(folder, KINDS["pages of a TIFF stack"])
    of_run = ("--epochs", 1, "--batch-size", 18, "--workers", 0, "--image-size", SIDE_PX)
    scratch = ("finetune", "classification", "--data", folder, "--init", "none", "--encoder.preset", "nano", *of_run)
    pages, ranges = ("--data.pages", "images"), ("--data.range", "[[100, 5000]]")
    run(*scratch, "--out", out, *pages, *ranges, "--data.transform", "sqrt")
    stored = reading_of(out)
    assert stored["range"] == [[100, 5000]] and stored["transform"] == "sqrt" and stored["pages"] == "images"
    assert "\nvalues   100 to 5000, sqrt\n" in capsys.readouterr().out

    like = ("--init", "none", "--encoder.like", out)
    again = [word for word in scratch if word not in ("--init", "none", "--encoder.preset", "nano")]
    run(*again, *like, "--out", tmp_path / "like", "--data.range", "[[0, 4095]]")
    assert reading_of(tmp_path / "like") == stored | {"range": [[0, 4095]]}
    run(*again, "--init", out, "--out", tmp_path / "tuned", *ranges)
    assert reading_of(tmp_path / "tuned") == stored
    capsys.readouterr()
    for words, line in (
        (("--init", out, "--data.range", "[[0, 4095]]"), "data.range is ((0.0, 4095.0),), and the encoder in "),
        (("--init", out, "--data.transform", "log"), "was trained with values 100 to 5000, sqrt, which its weights expect"),
        (
            ("--init", "none", "--encoder.preset", "nano", *pages, "--data.range", "[[0, 9], [0, 9]]"),
            "data.range has 2 ranges and the images have",
        ),
        (("--init", "none", "--encoder.preset", "nano", *pages, "--data.range", "wide"), "data.range is 'wide': give auto"),
    ):
        assert main([str(word) for word in (*again, *words, "--out", tmp_path / "wrong")]) == 2
        assert line in capsys.readouterr().err.strip().splitlines()[-1]


def write_gray(folder, dtype, factor):
    """Gray images of two classes whose levels of 8 bits are multiplied."""
    for label, name in enumerate(("dark", "bright")):
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            levels = np.random.default_rng(2 * number + label).integers(0, 128 + 127 * label, (SIDE_PX, SIDE_PX))
            Image.fromarray((levels * factor).astype(dtype)).save(folder / name / f"{number}.png")
    return folder


def test_the_range_of_the_type_is_the_encoder_s_where_the_numbers_are(tmp_path, capsys):
    """Of 16-bit images it is 0 to 65535, and of 8-bit ones their levels, however the encoder's range was settled."""
    deep, shallow = write_gray(tmp_path / "deep", np.uint16, 257), write_gray(tmp_path / "shallow", np.uint8, 1)
    of_run = ("--epochs", 1, "--batch-size", 12, "--workers", 0, "--image-size", SIDE_PX)
    scratch = ("--init", "none", "--encoder.preset", "nano", *of_run)
    by_type = ("--data.range", "type")
    command = ("finetune", "classification", "--data")
    run(*command, deep, *scratch, "--out", tmp_path / "of-type", *by_type)
    run(*command, deep, *scratch, "--out", tmp_path / "of-range", "--data.range", "[[100, 5000]]")
    run(*command, shallow, *scratch, "--out", tmp_path / "of-levels")
    assert reading_of(tmp_path / "of-type")["range"] == [[0, 65535]]
    assert reading_of(tmp_path / "of-levels")["range"] == "image"
    for number, (folder, init) in enumerate(((deep, "of-type"), (shallow, "of-levels"))):
        out = tmp_path / f"tuned-{number}"
        run(*command, folder, "--init", tmp_path / init, "--out", out, *of_run, *by_type)
        assert reading_of(out) == reading_of(tmp_path / init)
    capsys.readouterr()
    trained = "and the encoder in {init} was trained with {values}, which its weights expect: leave out data.range"
    for folder, init, given, values in (
        (deep, "of-range", "'type', of these images values 0 to 65535", "values 100 to 5000"),
        (shallow, "of-type", "'type', which leaves these images' 8-bit values as they are", "values 0 to 65535"),
        (deep, "of-levels", "'type', of these images the whole range of uint16", "data.range image"),
    ):
        words = (*command, folder, "--init", tmp_path / init, "--out", tmp_path / "wrong", *of_run, *by_type)
        assert main([str(word) for word in words]) == 2
        [line] = [text for text in capsys.readouterr().err.splitlines() if "data.range" in text]
        assert f"data.range is {given}, {trained.format(init=tmp_path / init, values=values)}" in line
        assert not (tmp_path / "wrong").exists()


# --- channels in files of their own, and in one ------------------------------------------------------------------------


def write_unexplained(folder, number):
    """Five pages that nothing explains."""
    values = values_of(number, 5)
    tifffile.imwrite(folder / f"{number}.tif", values, photometric="minisblack", metadata=None)
    return {f"{number}.tif": values}


def number_of(path):
    """Of an image that one of the writers has written."""
    return int(re.search(r"/A?(\d+)[_.]", path.split("|")[0])[1])


def test_an_encoder_of_channel_files_takes_single_files(tmp_path, capsys):
    """The same images in one file each, explained by OME or by nothing: the same vectors and classes, and a line. A pattern
    that is given is of these images, and is refused where it matches nothing."""
    import pyarrow.parquet

    folders, pattern = {}, "{well}_s{site}_w{channel}"
    for name, write in (("files", write_channel_files), ("ome", write_ome), ("pages", write_unexplained)):
        folders[name] = tmp_path / name
        write_labeled(folders[name], Kind(write, 5))
    of_run = ("--epochs", 1, "--batch-size", 6, "--workers", 0)
    pretrained, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    encoder = ("--preset", "nano", "--model.encoder", TOY, "--image-size", SIDE_PX)
    run("pretrain", "--data", folders["files"], "--out", pretrained, *encoder, *of_run, "--data.channel_files", pattern)
    finetune = ("finetune", "classification", "--init", pretrained, *of_run)
    run(*finetune, "--data", folders["files"], "--out", tuned)
    vectors, classes = {}, {}
    for name, folder in folders.items():
        capsys.readouterr()
        words = ("embed", "--run", pretrained, "--images", folder, "--out", tmp_path / f"{name}.parquet", "--workers", 0)
        assert main([str(word) for word in words]) == 0
        line = f"the encoder's images have their channels in files of their own, {pattern}, and no file here is one"
        assert (line in capsys.readouterr().err) == (name != "files")
        run("predict", "--run", tuned, "--images", folder, "--out", tmp_path / f"{name}.csv", "--workers", 0)
        rows = pyarrow.parquet.read_table(tmp_path / f"{name}.parquet").to_pydict()
        vectors[name] = {number_of(path): vector for path, vector in zip(rows["path"], rows["vector"])}
        classes[name] = {number_of(row["path"]): row["probability dark"] for row in read_csv(tmp_path / f"{name}.csv")}
    assert vectors["ome"] == vectors["files"] == vectors["pages"] and len(vectors["ome"]) == 2 * PER_CLASS
    assert classes["ome"] == classes["files"] == classes["pages"]

    run(*finetune, "--data", folders["pages"], "--out", tmp_path / "again")
    assert reading_of(tmp_path / "again") == reading_of(pretrained) | {"channel_files": None, "pages": "channels"}
    words = (*finetune, "--data", folders["ome"], "--data.channel_files", pattern, "--out", tmp_path / "wrong")
    assert main([str(word) for word in words]) == 2
    assert "matches none of 12 files" in capsys.readouterr().err.strip().splitlines()[-1]


# --- pages of one file --------------------------------------------------------------------------------------------------


def files_in(images):
    return {record["path"].split("#")[0] for record in images["image"]}


def test_pages_of_a_file_are_held_out_together(tmp_path):
    """In pre-training, in the fifth of labeled images that validates, and in cross-validation."""
    folder = tmp_path / "images"
    write_labeled(folder, KINDS["pages of a TIFF stack"])
    reading = Reading("auto", pages="images")
    with without_notices():
        source = open_source(str(folder), reading=reading)
    for seed in range(5):
        with pytest.warns(Notice, match="data.validation holds out 6 images in place of 4: all of 2 files"):
            train, validation = hold_out(source, 4, seed)
        assert train.num_images == 30 and len(validation) == 6
        assert not files_in(train.images) & files_in(validation)
    assert len(hold_out(source, 0.25, 0).images) == 9, "no notice where the number is that asked for"
    with pytest.raises(ValueError, match="are pages of 12 files, which are held out whole: nothing is left to train on"):
        hold_out(source, 34, 0)

    with without_notices():
        labels = read_labeled_images(folder, None, 0, reading=reading)
    folds = [hold_out_fold(labels, part, 2, 0) for part in range(2)]
    for images in (labels, *folds):
        assert not files_in(images.train) & files_in(images.validation)
        assert len(set(images.validation["label"])) == 2
    assert len(labels.validation) == 6


def test_a_study_of_pages_says_which_classes_some_parts_lack(tmp_path, encoder_folder):
    """Once, whatever the number of arms and rates; and refuses what leaves no file to choose by, before a trial is run."""
    for part, per_class in (("train", {"dark": 3, "bright": 2, "other": 3}), ("test", {"dark": 1, "bright": 1, "other": 1})):
        for name, count in per_class.items():
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                write_stack(tmp_path / part / name, number)
    size = {"labels": "1,all", "seeds": 2, "folds": 3, "data.pages": "images", "data.path": str(tmp_path)}
    words = [f"--{name}={value}" for name, value in {**size, "init": encoder_folder, "out": tmp_path / "out"}.items()]
    with without_notices():
        opened = study_of("classification").open_labels(study_settings(words))
        with pytest.raises(ValueError, match=r"pages of 4 files, held out whole, .* by 3 parts; give more files"):
            for name, number in itertools.product(("dark", "other"), (1, 2)):
                (tmp_path / "train" / name / f"{number}.tif").unlink()
            study_of("classification").open_labels(study_settings(words))
        single = study_settings([*words, "--lr_factors=[1]", "--layer_decays=[]"])
        assert study_of("classification").open_labels(single).notes == ()
    assert opened.notes == (
        "Pages of one file are held out together to choose rates. With all labels per class some classes are pages of fewer "
        "files than there are parts, and missing in some of them; a class of one file is never held out.",
    )


def test_a_class_of_one_file_is_not_divided(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_stack(tmp_path / name, 0)
    with without_notices(), pytest.raises(ValueError, match=r"class 'a' has 3 images, pages of 1 file, .* at least 2 files"):
        read_labeled_images(tmp_path, None, 0, reading=Reading("auto", pages="images"))


def test_files_are_numbered_by_their_pages(tmp_path):
    """Also those in memory, which have one name or none; and not at all where each row is a file."""
    import datasets

    paths = ["a.tif#page=0", "a.tif#page=1", "b.tif", "#page=0", "#page=1", "#page=0", "#page=1#tile=0,0,0,8,8"]
    rows = [{"image": {"bytes": b"x" * 9, "path": path}} for path in paths]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    images = datasets.Dataset.from_list(rows, features=features)
    assert number_files(images).tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert number_files(images.select([2, 4, 3])).tolist() == [0, 1, 2]
    assert number_files(images.select([2])) is None
    write_ome(tmp_path, 0)
    assert number_files(open_images(tmp_path, reading=AUTO)) is None


# --- what check-data says ------------------------------------------------------------------------------------------------

ADVICE = {
    "five channels in an OME-TIFF": "turns        12 micrographs by their metadata, which have no up: --data.turns true",
    "five channels in files of their own": None,
    "pages of a TIFF stack": None,
    "a GeoTIFF of 13 bands": "turns        12 georeferenced images by their metadata, which have no up: --data.turns true",
    "a DICOM series": None,
    "planes of an OME-Zarr": "turns        24 micrographs by their metadata, which have no up: --data.turns true",
}


def printed_by(capsys, code, *words):
    capsys.readouterr()
    with without_notices():
        assert main([str(word) for word in ("check-data", *words, "--workers", 0)]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", KINDS)
def test_turns_are_suggested_by_metadata_alone(tmp_path, capsys, name):
    kind, folder = KINDS[name], tmp_path / "images"
    write_labeled(folder, kind)
    words = [word.replace("--data.", "--") for word in kind.words if kind.words[0] != "--data.turns"]
    printed = printed_by(capsys, 0, folder, *words)
    command = printed.strip().splitlines()[-1]
    assert ("--data.turns true" in command) == (ADVICE[name] is not None)
    assert ADVICE[name] in printed if ADVICE[name] else "turns  " not in printed
    assert kind.words[0] in command if words else True


def test_slides_and_few_micrographs(tmp_path, capsys):
    """Aperio's files and DICOM's slide microscopy are slides; where most images may have an up, none is turned."""
    values = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3)).astype(np.uint8)
    description = "Aperio Image Library v11.2.1 |AppMag = 20|MPP = 0.5"
    tifffile.imwrite(tmp_path / "a.svs", values, tile=(16, 16), description=description, metadata=None, photometric="rgb")
    printed = printed_by(capsys, 0, tmp_path)
    assert "turns        1 slide by their metadata" in printed and "--data.turns true" in printed.splitlines()[-1]
    for number in range(2):
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    printed = printed_by(capsys, 0, tmp_path)
    assert "the other images may have one" in printed and "--data.turns" not in printed


def test_ranges_are_shown_with_a_transform(tmp_path, capsys):
    """Its histogram is of transformed values; the command has the transform."""
    write_labeled(tmp_path, KINDS["a DICOM series"])
    plain, log = (printed_by(capsys, 0, tmp_path, "--transform", transform) for transform in ("none", "log"))
    heading = "values       one range a channel for all images, as --data.range auto takes it"
    assert f"{heading}\n" in plain and f"{heading}; histograms after log\n" in log
    assert "--data.transform" not in plain and log.strip().endswith("--data.transform log")
    line, of_log = (text.split(heading)[1].splitlines()[1] for text in (plain, log))
    assert line.split(" to ")[0] == of_log.split(" to ")[0] and line != of_log
    given = printed_by(capsys, 0, tmp_path, "--range", "[[-1024, 3071]]")
    assert "as --data.range is given" in given and "-1,024 to 3,071" in given


def test_pages_that_are_asked_for_come_with_the_command(tmp_path, capsys):
    write_stack(tmp_path, 0)
    printed = printed_by(capsys, 1, tmp_path)
    assert printed.endswith(f"\nnext         simmim check-data {tmp_path} --pages images (or channels, first)\n")

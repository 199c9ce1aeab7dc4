"""Images from anywhere to batches: sources, decoding, views, order."""

from simmim.data.decode import UNREADABLE, Picture, open_picture, read_image, reason
from simmim.data.index import EXTENSIONS, find_images, image_dataset, index_folder
from simmim.data.labels import LabeledImages, LabeledSource, labeled_images, labeled_source
from simmim.data.samples import ImageSamples, InOrder, SampleStream, StreamSamples, batches, collate, cores, worker_count
from simmim.data.sources import Source, open_images, open_source
from simmim.data.survey import IMAGENET_MEAN, IMAGENET_STD, Survey, survey
from simmim.data.views import CenterView, RandomView, normalize

__all__ = [
    "EXTENSIONS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "UNREADABLE",
    "CenterView",
    "ImageSamples",
    "InOrder",
    "LabeledImages",
    "LabeledSource",
    "Picture",
    "RandomView",
    "SampleStream",
    "Source",
    "StreamSamples",
    "Survey",
    "batches",
    "collate",
    "cores",
    "find_images",
    "image_dataset",
    "index_folder",
    "labeled_images",
    "labeled_source",
    "normalize",
    "open_images",
    "open_picture",
    "open_source",
    "read_image",
    "reason",
    "survey",
    "worker_count",
]

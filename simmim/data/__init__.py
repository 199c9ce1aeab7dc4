"""Images from any source to batches: sources → records → pictures → views → batches.

A source is opened by its reader (`readers`) as rows with an undecoded column of records (`records`); `decode` opens a record
as a picture (`pictures`), of which a view (`views`) is a crop; `samples`, `batch_order` and `loading` make batches of views.
`labels` and `label_maps` read labeled sources; `check` reads all images of a source once.
"""

from simmim.data.batch_order import EndlessBatchSampler, SequentialBatchSampler
from simmim.data.decode import Picture, open_picture, read_image
from simmim.data.growing import GrowingSamples, GrowingStream
from simmim.data.held_out import HeldOut, hold_out
from simmim.data.image_statistics import ImageStatistics, measure_for_encoder, measure_images
from simmim.data.index import EXTENSIONS, dataset_from_paths, find_images, index_folder
from simmim.data.labels import LabeledImages, LabeledSource, open_labeled_source, read_labeled_images
from simmim.data.loading import available_cores, build_loader, collate, default_num_workers
from simmim.data.pillow_guard import UNREADABLE, describe_error
from simmim.data.samples import ImageSamples, IndexedSamples, StreamedSamples
from simmim.data.sources import Source, open_images, open_source
from simmim.data.views import (
    SEVERAL_VIEWS_CROP,
    EvaluationView,
    RandomView,
    check_num_views,
    evaluation_views,
    normalize,
    valid_pixels,
    without_holes,
)

__all__ = [
    "EXTENSIONS",
    "SEVERAL_VIEWS_CROP",
    "UNREADABLE",
    "EndlessBatchSampler",
    "EvaluationView",
    "GrowingSamples",
    "GrowingStream",
    "HeldOut",
    "ImageSamples",
    "ImageStatistics",
    "IndexedSamples",
    "LabeledImages",
    "LabeledSource",
    "Picture",
    "RandomView",
    "SequentialBatchSampler",
    "Source",
    "StreamedSamples",
    "available_cores",
    "build_loader",
    "check_num_views",
    "collate",
    "dataset_from_paths",
    "default_num_workers",
    "describe_error",
    "evaluation_views",
    "find_images",
    "hold_out",
    "index_folder",
    "measure_for_encoder",
    "measure_images",
    "normalize",
    "open_images",
    "open_labeled_source",
    "open_picture",
    "open_source",
    "read_image",
    "read_labeled_images",
    "valid_pixels",
    "without_holes",
]

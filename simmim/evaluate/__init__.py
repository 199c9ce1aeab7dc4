"""Evaluation of frozen encoders: embeddings, k-NN, linear probe, and the choice of the best stage.

`features` defines the vectors of an image, `embeddings` computes them, `parquet` writes them to a file. `neighbors` and
`probe` turn vectors and labels into accuracies, `scores` compares the features by them, `labeled` draws labels, and `report`
joins all of it. Functions take and return values; only `write_…` functions write files.
"""

from simmim.evaluate.attentive import Tokens, attentive_probe
from simmim.evaluate.contest import Contest, check_scipy, names_of, write_contest
from simmim.evaluate.embeddings import (
    EmbeddedBatch,
    Embeddings,
    EncoderPass,
    ViewBatch,
    check_any_readable,
    collect_embeddings,
    embed_batches,
    encode_views,
    load_views,
    record_unreadable,
)
from simmim.evaluate.facts import EncoderFacts, facts_of, facts_of_checkpoint, facts_table
from simmim.evaluate.features import AnyFeature, Feature, Pixels, all_features, select_features
from simmim.evaluate.labeled import Draw, LabeledRows, Pools, Split, draw_labels, embed_pools, pool_draws, subsample
from simmim.evaluate.neighbors import held_out_knn_accuracy, knn_accuracy, knn_predict
from simmim.evaluate.parquet import WrittenEmbeddings, write_embeddings
from simmim.evaluate.probe import (
    DEFAULT_STRENGTH,
    STRENGTHS,
    CrossValidated,
    ProbeResult,
    check_scikit_learn,
    linear_probe,
)
from simmim.evaluate.report import Comparison, Report, check_report_file, compare, compare_vectors, write_report
from simmim.evaluate.scaling import SCALINGS, scaled_split, scaling_named
from simmim.evaluate.scores import FeatureScore, FeatureScores, score_features, scores_table
from simmim.evaluate.single_files import see_crops
from simmim.evaluate.untrained import score_untrained, untrained_encoder
from simmim.evaluate.vectors import VectorFile, read_vectors
from simmim.evaluate.verdict import verdict

__all__ = [
    "DEFAULT_STRENGTH",
    "SCALINGS",
    "STRENGTHS",
    "AnyFeature",
    "Comparison",
    "Contest",
    "CrossValidated",
    "Draw",
    "EmbeddedBatch",
    "Embeddings",
    "EncoderFacts",
    "EncoderPass",
    "Feature",
    "FeatureScore",
    "FeatureScores",
    "LabeledRows",
    "Pixels",
    "Pools",
    "ProbeResult",
    "Report",
    "Split",
    "Tokens",
    "VectorFile",
    "ViewBatch",
    "WrittenEmbeddings",
    "all_features",
    "attentive_probe",
    "check_any_readable",
    "check_report_file",
    "check_scikit_learn",
    "check_scipy",
    "collect_embeddings",
    "compare",
    "compare_vectors",
    "draw_labels",
    "embed_batches",
    "embed_pools",
    "encode_views",
    "facts_of",
    "facts_of_checkpoint",
    "facts_table",
    "held_out_knn_accuracy",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "load_views",
    "names_of",
    "pool_draws",
    "read_vectors",
    "record_unreadable",
    "scaled_split",
    "scaling_named",
    "score_features",
    "score_untrained",
    "scores_table",
    "see_crops",
    "select_features",
    "subsample",
    "untrained_encoder",
    "verdict",
    "write_contest",
    "write_embeddings",
    "write_report",
]

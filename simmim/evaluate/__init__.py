"""What a frozen encoder is worth: embeddings, k-NN, linear probe, and the stage whose features serve best.

From images to a verdict: which vector stands for an image (`features`), images to vectors (`vectors`), vectors to a file
(`parquet`) or, with labels, to accuracies (`neighbors`, `probe`), of every stage (`stages`) and over several draws of
labels (`labeled`), which `report` puts together. Functions take and return values; what writes a file is named for it.
"""

from simmim.evaluate.features import Feature, Pixels, all_features, chosen_features
from simmim.evaluate.labeled import Draw, Pools, Split, draw, embed_pools, pooled
from simmim.evaluate.neighbors import knn, knn_held_out, knn_predict
from simmim.evaluate.parquet import EmbedResult, embed
from simmim.evaluate.probe import DEFAULT_STRENGTH, STRENGTHS, CrossValidated, ProbeResult, linear_probe
from simmim.evaluate.report import Comparison, Report, check_out, compare, write_report
from simmim.evaluate.stages import StageScore, StageScores, knn_stages, probe_stages, stages_table
from simmim.evaluate.vectors import EmbeddedBatch, Embeddings, EncoderPass, embedded_batches, embeddings

__all__ = [
    "DEFAULT_STRENGTH",
    "STRENGTHS",
    "Comparison",
    "CrossValidated",
    "Draw",
    "EmbedResult",
    "EmbeddedBatch",
    "Embeddings",
    "EncoderPass",
    "Feature",
    "Pixels",
    "Pools",
    "ProbeResult",
    "Report",
    "Split",
    "StageScore",
    "StageScores",
    "all_features",
    "check_out",
    "chosen_features",
    "compare",
    "draw",
    "embed",
    "embed_pools",
    "embedded_batches",
    "embeddings",
    "knn",
    "knn_held_out",
    "knn_predict",
    "knn_stages",
    "linear_probe",
    "pooled",
    "probe_stages",
    "stages_table",
    "write_report",
]

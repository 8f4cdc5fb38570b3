"""Evaluation: ranking statistics, contrasts, bias correction, video metrics, drift, Frechet distances, scorer calibration,
plots and reports."""

from worldline.eval.calibration import (
    ScorerCalibration,
    platt,
    scorer_calibration,
    success_threshold,
    threshold_interval,
)
from worldline.eval.contrasts import PolicyContrasts, letter_display, policy_contrasts
from worldline.eval.drift import drift_curve, moving_frames
from worldline.eval.excess import Excess, ExcessRatio, excess_error, excess_ratio, excess_ratio_of_reports
from worldline.eval.frechet import FrechetDistance, frechet_distance, latent_frechet_distance, pooled_latents
from worldline.eval.intervals import (
    Interval,
    PairedDifference,
    clopper_pearson,
    newcombe_independent,
    newcombe_paired,
    paired_interval,
    wilson,
)
from worldline.eval.plots import action_curves, horizon_curves, ranking_scatter, reliability_diagram, success_bars
from worldline.eval.prediction_powered import (
    LeaveOneOutCalibration,
    PredictionPowered,
    leave_one_policy_out,
    prediction_powered_rate,
)
from worldline.eval.protocol import HORIZONS, PROTOCOL, EvaluationProtocol
from worldline.eval.rank_violation import PerfectModel, mean_maximum_rank_violation
from worldline.eval.ranking_statistics import RankStatistics, rank_statistics
from worldline.eval.report import REPORT_KEYS, Report
from worldline.eval.video_frechet import frechet_video_distance, load_i3d
from worldline.eval.video_metrics import (
    Lpips,
    VideoMetrics,
    compare_videos,
    copy_context,
    lpips_distance,
    moved_pixels,
)
from worldline.eval.videos import encode_mp4, side_by_side, video_grid, write_mp4

__all__ = [
    "HORIZONS",
    "PROTOCOL",
    "REPORT_KEYS",
    "EvaluationProtocol",
    "Excess",
    "ExcessRatio",
    "FrechetDistance",
    "Interval",
    "LeaveOneOutCalibration",
    "Lpips",
    "PairedDifference",
    "PerfectModel",
    "PolicyContrasts",
    "PredictionPowered",
    "RankStatistics",
    "Report",
    "ScorerCalibration",
    "VideoMetrics",
    "action_curves",
    "clopper_pearson",
    "compare_videos",
    "copy_context",
    "drift_curve",
    "encode_mp4",
    "excess_error",
    "excess_ratio",
    "excess_ratio_of_reports",
    "frechet_distance",
    "frechet_video_distance",
    "horizon_curves",
    "latent_frechet_distance",
    "leave_one_policy_out",
    "letter_display",
    "load_i3d",
    "lpips_distance",
    "mean_maximum_rank_violation",
    "moved_pixels",
    "moving_frames",
    "newcombe_independent",
    "newcombe_paired",
    "paired_interval",
    "platt",
    "policy_contrasts",
    "pooled_latents",
    "prediction_powered_rate",
    "rank_statistics",
    "ranking_scatter",
    "reliability_diagram",
    "scorer_calibration",
    "side_by_side",
    "success_bars",
    "success_threshold",
    "threshold_interval",
    "video_grid",
    "wilson",
    "write_mp4",
]

"""Evaluation: ranking statistics, contrasts, bias correction, video metrics, scorer calibration, plots and reports."""

from worldline.eval.calibration import (
    ScorerCalibration,
    platt,
    scorer_calibration,
    success_threshold,
    threshold_interval,
)
from worldline.eval.contrasts import PolicyContrasts, letter_display, policy_contrasts
from worldline.eval.intervals import (
    Interval,
    PairedDifference,
    clopper_pearson,
    newcombe_independent,
    newcombe_paired,
    paired_interval,
    wilson,
)
from worldline.eval.plots import horizon_curves, ranking_scatter, reliability_diagram, success_bars
from worldline.eval.prediction_powered import (
    LeaveOneOutCalibration,
    PredictionPowered,
    leave_one_policy_out,
    prediction_powered_rate,
)
from worldline.eval.rank_violation import PerfectModel, mean_maximum_rank_violation
from worldline.eval.ranking_statistics import RankStatistics, rank_statistics
from worldline.eval.report import REPORT_KEYS, Report
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
    "REPORT_KEYS",
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
    "clopper_pearson",
    "compare_videos",
    "copy_context",
    "encode_mp4",
    "horizon_curves",
    "leave_one_policy_out",
    "letter_display",
    "lpips_distance",
    "mean_maximum_rank_violation",
    "moved_pixels",
    "newcombe_independent",
    "newcombe_paired",
    "paired_interval",
    "platt",
    "policy_contrasts",
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

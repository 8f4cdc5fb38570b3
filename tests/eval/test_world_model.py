"""What the evaluation concludes from its tables."""

from worldline.eval.world_model import worst_gains


def row(horizon: int, gain: float, *, half: float = 1.0, camera: str = "rgb", baseline: str = "copy-first") -> dict:
    interval = {"low": gain - half, "high": gain + half}
    return {"baseline": baseline, "camera": camera, "horizon": horizon, "gain_db": gain, **interval}


def test_worst_gains_count_intervals_above_zero_from_the_second_frame_on() -> None:
    found = worst_gains([row(1, -3.0), row(2, 2.0), row(3, 0.5), row(4, 1.5), row(2, -4.0, camera="wrist")])
    assert [(r["camera"], r["horizons"], r["above"]) for r in found] == [("rgb", 3, 2), ("wrist", 1, 0)]
    assert found[0]["smallest"]["horizon"] == 3  # not frame 1, where hardly anything has moved
    # an interval that lies below zero excludes it too, and does not count
    assert found[1]["smallest"]["gain_db"] == -4.0


def test_worst_gains_keep_baselines_apart_and_skip_those_without_later_frames() -> None:
    found = worst_gains([row(2, 5.0), row(2, 1.5, baseline="action-free"), row(1, 1.0, camera="wrist")])
    assert [(r["baseline"], r["above"]) for r in found] == [("copy-first", 1), ("action-free", 1)]

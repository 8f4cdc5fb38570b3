"""Reports: self-contained pages, stable JSON, playable videos, figures."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from worldline.errors import WorldlineError
from worldline.eval import (
    REPORT_KEYS,
    Report,
    encode_mp4,
    horizon_curves,
    rank_statistics,
    ranking_scatter,
    reliability_diagram,
    scorer_calibration,
    side_by_side,
    success_bars,
    video_grid,
    wilson,
    write_mp4,
)

STATISTICS = rank_statistics([0.1, 0.4, 0.9], [0.2, 0.3, 0.8], names=["a", "b", "c"], lineages=["x", "x", "y"])


def video(colour: tuple[int, int, int], t: int = 5, h: int = 33, w: int = 47) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].repeat(t, 1, h, w)


def decode(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def full_report() -> Report:
    report = Report("Ranking <of six>", command="worldline rank --out runs/a", provenance={"world model": "3f2a"})
    report.text("# Heading\n\nSome **bold** and `code` with <script>alert(1)</script>.\n\n- one\n- two")
    report.warning("The scorer is *not* audited.")
    report.table("Rates", ["policy", "rate", "n"], [["a", 0.51234, 40], ["b", None, 40]], note="n: episodes")
    report.plot("Ranking", ranking_scatter(STATISTICS))
    report.video("Episode 0", side_by_side(video((200, 30, 30)), video((30, 200, 30))), 10)
    report.video("Cameras", {"corner": video((9, 9, 9)), "wrist": video((9, 9, 9))}, 12.5)
    report.image("Still", video((1, 2, 3))[0])
    return report


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "poster", "data")]


def test_page_is_self_contained(tmp_path: Path) -> None:
    full_report().write(tmp_path, {})
    page = (tmp_path / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) >= 5 and all(link.startswith("data:") for link in links.found)
    assert not re.search(r"url\(|@import|https?://", page)
    assert links.tags.count("video") == 2 and links.tags.count("img") == 2 and links.tags.count("table") == 1
    assert "script" not in links.tags, "text is escaped"
    assert (
        "<strong>bold</strong>" in page
        and "<li>two</li>" in page
        and "0.512" in page
        and "Ranking &lt;of six&gt;" in page
    )


def test_json_keys_are_stable(tmp_path: Path) -> None:
    data = {"rank": STATISTICS, "array": np.arange(2), "tensor": torch.tensor(0.5), "path": Path("a/b"), "none": None}
    full_report().write(tmp_path / "new" / "folder", data)
    found = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert tuple(found) == REPORT_KEYS
    assert REPORT_KEYS == ("title", "created", "command", "worldline_version", "provenance", "warnings", "results")
    assert found["results"]["rank"] == STATISTICS.to_dict()
    assert (
        found["results"]["array"] == [0, 1] and found["results"]["tensor"] == 0.5 and found["results"]["path"] == "a/b"
    )
    assert found["warnings"] == ["The scorer is *not* audited."]


def test_nan_is_refused_by_its_path_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(WorldlineError, match=r"results\.psnr\[1\] is nan"):
        full_report().write(tmp_path, {"psnr": np.array([1.0, np.nan])})
    assert not list(tmp_path.iterdir())
    with pytest.raises(WorldlineError, match=r"results\.thing"):
        full_report().write(tmp_path, {"thing": object()})


def test_table_rows_must_fit() -> None:
    with pytest.raises(WorldlineError, match="2 cells a row"):
        Report("x").table("t", ["a", "b"], [[1, 2, 3]])


@pytest.mark.parametrize("colour", [(220, 40, 40), (30, 60, 230), (255, 255, 255)])
def test_mp4_keeps_frames_and_colours(colour: tuple[int, int, int]) -> None:
    frames = decode(encode_mp4(video(colour), 7.5))
    assert len(frames) == 5
    height, width = frames[0].shape[:2]
    assert height % 2 == width % 2 == 0 and (height, width) == (7 * 33 + 1, 7 * 47 + 1)
    assert np.abs(frames[2].astype(int) - np.array(colour)).max() <= 4


def test_mp4_is_h264_for_browsers(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", video((1, 2, 3), h=300, w=260), 30)
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.height, stream.width) == (300, 260) and stream.average_rate == 30


def test_side_by_side_puts_real_left_and_cameras_below() -> None:
    real = {"corner": video((200, 0, 0)), "wrist": video((0, 200, 0), h=20, w=20)}
    imagined = {"corner": video((0, 0, 200)), "wrist": video((90, 90, 90), h=20, w=20)}
    grid = side_by_side(real, imagined, cell=66)
    middle = grid.shape[3] // 2
    at = lambda y, x: grid[0, :, y, x].tolist()  # noqa: E731
    assert grid.dtype == torch.uint8 and len(grid) == 5
    assert at(60, 10) == [200, 0, 0] and at(60, middle + 20) == [0, 0, 200]
    assert at(-10, 10) == [0, 200, 0]
    header = grid[0, :, :20]
    assert int(header.max()) > 150, "a label is drawn"


def test_grid_takes_grey_video_and_refuses_mismatches() -> None:
    grey = video((7, 7, 7))[:, :1]
    assert video_grid({"a": grey, "b": grey, "c": grey}).shape[1] == 3
    with pytest.raises(WorldlineError, match="same number of frames"):
        side_by_side(video((0, 0, 0)), video((0, 0, 0), t=4))
    with pytest.raises(WorldlineError, match="cameras"):
        side_by_side({"a": grey}, {"b": grey})
    with pytest.raises(WorldlineError, match="at least one"):
        video_grid({})


def test_a_long_label_fits_over_a_narrow_video() -> None:
    black = {"gripperPOV": video((0, 0, 0), h=64, w=64)}
    grid = video_grid({"shuffled actions": black, "real": black}, cell=128)
    strip, background = grid[0, :, :20].permute(1, 2, 0), torch.tensor((24, 28, 36))
    inked = (strip[:, :128] != background).any(-1).any(0)
    assert inked.any() and not inked[-5:].any()  # nothing cut off at the right edge


def test_horizon_curve_shows_the_mean_of_defined_episodes() -> None:
    values = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, torch.nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    line = horizon_curves({"model": values}, ylabel="dB", masks={"model": mask}).axes[0].lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [1, 2] and np.asarray(line.get_ydata()).tolist() == [2.0, 3.0]
    with pytest.raises(WorldlineError, match="mask"):
        horizon_curves({"model": values}, ylabel="dB")


def test_scatter_has_a_point_and_a_name_per_policy() -> None:
    intervals = [wilson(rate * 20, 20) for rate in STATISTICS.real]
    axes = ranking_scatter(STATISTICS, real_intervals=intervals, imagined_intervals=intervals).axes[0]
    assert {text.get_text() for text in axes.texts} == {"a", "b", "c"} and len(axes.containers) == 3
    assert axes.containers[0].lines[0].get_color() == axes.containers[1].lines[0].get_color(), "one lineage, one colour"  # type: ignore[attr-defined]


def test_other_figures_render() -> None:
    calibration = scorer_calibration(torch.rand(50), torch.rand(50) < 0.5)
    bars = success_bars({"real": STATISTICS.real}, {"real": [wilson(2, 5)] * 3}, ["a", "b", "c"])
    for figure in (reliability_diagram(calibration), bars):
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), format="png")

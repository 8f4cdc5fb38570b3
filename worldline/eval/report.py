"""Reports: `report.json` for programs, `report.html` for people, always both.

The page is one self-contained file: figures, images and videos are embedded, nothing is fetched. The JSON has stable
keys (`REPORT_KEYS`); what a command measured is under "results".

    report = Report("Policy ranking", command="worldline rank ...", provenance={"world model": "3f2a..."})
    report.text("**Six** policies, 40 episodes each.")
    report.table("Success", columns=["policy", "real"], rows=[["a", 0.5]])
    report.plot("Ranking", figure)
    report.write("runs/ranking", {"rank": statistics.to_dict()})
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from worldline import __version__
from worldline.checkpoint import to_json, write_atomic, write_json
from worldline.errors import WorldlineError
from worldline.eval.videos import Video, encode_mp4, video_grid

REPORT_KEYS = ("title", "created", "command", "worldline_version", "provenance", "warnings", "results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One piece of the page. `kind` chooses how the template shows it; `body` is what it shows."""

    kind: str
    title: str = ""
    note: str = ""
    body: Any = None


class Report:
    """Collects what a command found, in reading order, and writes it as a page and as JSON."""

    def __init__(self, title: str, *, command: str = "", provenance: Mapping[str, Any] | None = None) -> None:
        self.title = title
        self.command = command
        self.provenance = dict(provenance or {})
        self.created = datetime.now(UTC).isoformat(timespec="seconds")
        self.blocks: list[Block] = []

    def text(self, text: str) -> None:
        """Paragraphs apart by empty lines; "# " and "## " headings, "- " lists, **bold**, *italic* and `code`."""
        self.blocks.append(Block(kind="text", body=_markup(text)))

    def warning(self, text: str) -> None:
        """Something the reader must know before trusting the rest; also under "warnings" in the JSON."""
        self.blocks.append(Block(kind="warning", note=text, body=_inline(text)))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """Numbers are right-aligned, floats shown to three decimals, None as a dash.

        Raises:
            WorldlineError: a row of another length than `columns`.
        """
        for row in rows:
            if len(row) != len(columns):
                raise WorldlineError(
                    f"table {title!r}: {len(columns)} cells a row required ({list(columns)}), got {list(row)}."
                )
        cells = [[(_cell(value), _numeric(value)) for value in row] for row in rows]
        numeric = [bool(cells) and all(row[i][1] or row[i][0] == "–" for row in cells) for i in range(len(columns))]
        body = {"columns": list(zip(columns, numeric)), "rows": cells}
        self.blocks.append(Block(kind="table", title=title, note=note, body=body))

    def plot(self, title: str, figure: Figure, note: str = "") -> None:
        """A matplotlib figure, as SVG (text as paths, so it looks the same everywhere)."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        self.blocks.append(Block(kind="plot", title=title, note=note, body=_data("image/svg+xml", buffer.getvalue())))

    def image(self, title: str, image: UInt8[Tensor, "c h w"], note: str = "") -> None:
        """One still, enlarged by whole pixels as videos are."""
        self.blocks.append(Block(kind="image", title=title, note=note, body=_still(image)))

    def video(self, title: str, frames: Video, fps: float | int, note: str = "") -> None:
        """Frames "t c h w", or camera -> frames (shown one below the other). Neighbouring videos share a row."""
        shown = video_grid({"": frames}) if isinstance(frames, Mapping) else frames
        self.blocks.append(Block(kind="video", title=title, note=note, body=_data("video/mp4", encode_mp4(shown, fps))))

    def write(self, folder: str | Path, data: Mapping[str, Any] | None = None) -> None:
        """Write `report.json` and `report.html` into `folder`, each atomically.

        Args:
            data: the results, of JSON types, dataclasses, arrays and tensors.

        Raises:
            WorldlineError: a NaN, an infinity or an unknown type in `data`, named by its path.
        """
        folder = Path(folder)
        warnings = [block.note for block in self.blocks if block.kind == "warning"]
        values = (
            self.title,
            self.created,
            self.command,
            __version__,
            plain(self.provenance, "provenance"),
            warnings,
            plain(data or {}, "results"),
        )
        page = self.html()
        write_json(folder / "report.json", dict(zip(REPORT_KEYS, values)))
        write_atomic(folder / "report.html", page)

    def html(self) -> str:
        """The page as one string."""
        source = files("worldline.eval").joinpath("report.html.j2").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(source).render(
            title=self.title,
            created=self.created,
            command=self.command,
            version=__version__,
            provenance=self.provenance,
            groups=_grouped(self.blocks),
        )


def plain(value: Any, path: str = "data") -> Any:
    """`value` as JSON types. Raises `WorldlineError` naming the path of what JSON cannot hold."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WorldlineError(f"report: {path} is {value}; reports hold finite numbers or None with a reason.")
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(to_json(value), path)
    raise WorldlineError(
        f"report: {path}: JSON types, arrays, tensors or dataclasses required, got {type(value).__name__}."
    )


def _grouped(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Runs of neighbouring videos, plots or images share a grid; everything else stands alone."""
    groups: list[tuple[str, list[Block]]] = []
    for block in blocks:
        if groups and block.kind in ("video", "plot", "image") and groups[-1][0] == block.kind:
            groups[-1][1].append(block)
        else:
            groups.append((block.kind, [block]))
    return groups


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _still(image: UInt8[Tensor, "c h w"]) -> str:
    rgb = image.detach().cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous()
    factor = max(1, 256 // min(rgb.shape[:2]))
    buffer = io.BytesIO()
    Image.fromarray(rgb.numpy()).resize((rgb.shape[1] * factor, rgb.shape[0] * factor), Image.Resampling.NEAREST).save(
        buffer, format="PNG"
    )
    return _data("image/png", buffer.getvalue())


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        number = float(value)
        if number == 0 or 1e-3 <= abs(number) < 1e5:
            return f"{number:.3f}"
        return f"{number:.2e}"
    return str(value)


def _inline(text: str) -> Markup:
    line = str(escape(text))
    line = re.sub(r"`([^`]+)`", r"<code>\1</code>", line)
    line = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", line)
    return Markup(re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"<em>\1</em>", line))


def _markup(text: str) -> Markup:
    """The small subset of Markdown that `Report.text` names; everything else is escaped."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        heading = re.match(r"(#{1,3}) (.+)", lines[0]) if lines else None
        if heading:
            level = len(heading[1]) + 1
            parts.append(f"<h{level}>{_inline(heading[2])}</h{level}>")
            lines = lines[1:]
        if lines and all(line.startswith("- ") for line in lines):
            parts.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        elif lines:
            parts.append(f"<p>{_inline(' '.join(lines))}</p>")
    return Markup("\n".join(parts))

"""Decoded frames kept in memory: whole episodes, least recently used dropped first.

Decoding an episode from its start is about three times faster a frame than seeking to windows, so an episode is decoded
whole while the dataset fits the budget; of a dataset that does not fit, windows are decoded alone instead of throwing
decoded episodes away again and again.
"""

from collections import OrderedDict

from jaxtyping import Int, UInt8
from torch import Tensor

from worldline.data.lerobot_read import LeRobotDataset


class FrameStore:
    """Decoded frames of `dataset` within `budget_bytes` of memory. One per process."""

    def __init__(self, dataset: LeRobotDataset, budget_bytes: int = 2 * 2**30) -> None:
        self.dataset = dataset
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self._kept: OrderedDict[tuple[int, str], Tensor] = OrderedDict()
        pixels = sum(3 * c.height * c.width for c in dataset.spec.cameras)
        self.fits = pixels * sum(dataset.length(i) for i in dataset.episode_table.index) <= budget_bytes

    def frames(self, episode: int, camera: str) -> UInt8[Tensor, "t c h w"]:
        """All frames of one camera of one episode. Raises `DatasetError` as decoding does."""
        key = (episode, camera)
        if key not in self._kept:
            decoded = self.dataset.frames(episode)[camera][:]
            self._kept[key] = decoded
            self.bytes += decoded.numel()
            while self.bytes > self.budget_bytes and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self.bytes -= dropped.numel()
        self._kept.move_to_end(key)
        return self._kept[key]

    def rows(self, episode: int, camera: str, chosen: Int[Tensor, " n"]) -> UInt8[Tensor, "n c h w"]:
        """The frames numbered of one camera of one episode; of data that do not fit no more is decoded than lies between them."""
        first, last = int(chosen.min()), int(chosen.max())
        return self.window(episode, camera, slice(first, last + 1))[chosen - first]

    def window(self, episode: int, camera: str, frames: slice) -> UInt8[Tensor, "t c h w"]:
        """Some frames of one camera of one episode."""
        if self.fits or (episode, camera) in self._kept:
            return self.frames(episode, camera)[frames].contiguous()
        return self.dataset.frames(episode)[camera][frames]

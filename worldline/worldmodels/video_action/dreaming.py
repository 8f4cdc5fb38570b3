"""A dream of a unified model, frame by frame or in chunks (`state` says from what each frame is imagined)."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from worldline.worldmodels.video_action.queries import FORWARD, VIDEO, Query, require_learned
from worldline.worldmodels.video_action.state import Dreamt, after
from worldline.worldmodels.video_action.tokens import Draw, Future

if TYPE_CHECKING:
    from worldline.worldmodels.video_action.model import VideoActionModel
else:
    VideoActionModel = Any  # which delegates to this module


def next_frame(model: VideoActionModel, dreamt: Dreamt, block: Tensor | None, seeds: Tensor) -> tuple[Dreamt, Future]:
    """One frame, by all blocks since the frame it is imagined from. `block` "n 1 k*a", normalised; None: not told."""
    config, told = model.config, block is not None
    dreamt = dreamt.begun((dreamt.since == config.reach) | (dreamt.told != told))
    later = dreamt.then(dreamt.known, None if block is None else block[:, 0])
    query = _asked(model, told).at(config.horizon)
    roles = query.rows(len(seeds)).to(model.device).upto(later.since)
    given = replace(model.given(VIDEO.at(config.horizon), len(seeds)), actions=later.blocks)
    draw = Draw(seeds=seeds, frame=dreamt.frame - dreamt.since, steps=config.solver_steps)
    made = model.answer(dreamt.start, given, roles, draw).at(dreamt.since)
    return replace(later, known=after(dreamt.known, model.guess_pose, made, told=told)), made


def next_chunk(model: VideoActionModel, dreamt: Dreamt, blocks: Tensor | None, seeds: Tensor) -> tuple[Dreamt, Future]:
    """A chunk of frames in one pass, from the frame before it. `blocks` "n chunk k*a"."""
    config, told = model.config, blocks is not None
    given = model.given(VIDEO.at(config.horizon), len(seeds))
    if blocks is not None:
        given.actions[:, : config.chunk] = blocks
    query = _asked(model, told).first(config.chunk, config.horizon)
    draw = Draw(seeds=seeds, frame=dreamt.frame, steps=config.solver_steps)
    made = model.answer(dreamt.known, given, query.rows(len(seeds)), draw).first(config.chunk)
    known = after(dreamt.known, model.guess_pose, made, told=told)
    return Dreamt.at(known, dreamt.frame + config.chunk, config.horizon), made


def _asked(model: VideoActionModel, told: bool) -> Query:
    """The query that a dream asks. Raises `SpecMismatch` if the model never learned it."""
    query = FORWARD if told else VIDEO
    require_learned(query, model.config.shares, model.also_learned)
    return query

"""A unified video-action model: one network, a sampling function that takes a `Query`, and the `WorldModel` that its forward query is.

Everything physical stays outside the network: latents are whitened, actions and poses normalised by statistics saved here. As a world model
it imagines `chunk` frames a call from the last `history` frames, by the forward query: the coming blocks are given, their frames are
asked for, and what lies beyond is absent, as in training.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer, normalizers_from_json, normalizers_to_json
from worldline.diffusion import add_noise, linear_path
from worldline.errors import SpecMismatch
from worldline.tokenizers.whitening import unwhiten, whiten
from worldline.types import Clip, Imagination, LatentSpec, TensorState, WorldSpec
from worldline.worldmodels.autoregressive import body_of
from worldline.worldmodels.doubled_pass import first_frames
from worldline.worldmodels.guesses import PoseGuess
from worldline.worldmodels.language import text_encoder
from worldline.worldmodels.traces import TracedSampling
from worldline.worldmodels.trajectories.config import Guidance
from worldline.worldmodels.video_action import traced
from worldline.worldmodels.video_action.config import VideoActionConfig
from worldline.worldmodels.video_action.dreaming import next_chunk, next_frame
from worldline.worldmodels.video_action.errors import Errors
from worldline.worldmodels.video_action.guided import steering
from worldline.worldmodels.video_action.motion import Moves, guess_miss, moves_in
from worldline.worldmodels.video_action.queries import Query, Role, Roles, VideoActions, draw_roles, require_learned
from worldline.worldmodels.video_action.state import Dreamt
from worldline.worldmodels.video_action.tokens import Draw, Future, Known, led
from worldline.worldmodels.video_action.uva import UnifiedVideoAction
from worldline.worldmodels.video_action.uwm import UnifiedWorld

KIND = "video-action"
SAMPLING = ("solver_steps", "chunk", "span", "decode_rounds")


class VideoActionModel(TracedSampling, nn.Module):
    """A `WorldModel` that is also a policy, an inverse model and a video generator.

    Args:
        config: design, sizes and levels.
        spec: what it models; `spec.latent` is required.
        action_normalizer, pose_normalizer: fitted on the training episodes.
    """

    tracing = traced

    def __init__(
        self,
        config: VideoActionConfig,
        spec: WorldSpec,
        *,
        action_normalizer: RobustNormalizer,
        pose_normalizer: RobustNormalizer,
    ) -> None:
        super().__init__()
        self.config, self.spec = config, replace(spec, chunk=config.chunk)
        self.action_normalizer, self.pose_normalizer = action_normalizer, pose_normalizer
        body, encoder = body_of(spec), text_encoder(config.text)
        design = UnifiedWorld if config.design == "uwm" else UnifiedVideoAction
        text = 0 if encoder is None else encoder.dim
        self.network = design(config, body, text)
        self.also_learned: tuple[
            str, ...
        ] = ()  # queries of no share that its data asked for all the same, as of video alone

    @property
    def latent_spec(self) -> LatentSpec:
        assert self.spec.latent is not None
        return self.spec.latent

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def guess_pose(self) -> PoseGuess | None:
        """Foretells where given blocks take the arm."""
        return self.network.tokens.guess_pose

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices inside the trunk's blocks: what Muon may train."""
        named = self.network.trunk.blocks.named_parameters()
        return [p for name, p in named if p.ndim == 2 and min(p.shape) > 2 and "modulation" not in name]

    def fit_aims(self, episodes: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Before training: how far commands lead, from episodes of this robot, as poses "t p" and blocks "t-1 k a" in physical units."""
        if self.guess_pose is not None:
            self.guess_pose.fit_gain(
                (self.pose_normalizer.normalize(p), self.action_normalizer.normalize(a).flatten(1)) for p, a in episodes
            )

    # --- units --------------------------------------------------------------------------------------------------------

    def known(self, clip: Clip) -> Known:
        """The last `history` frames of a clip of raw latents, in the network's units. All of it tells how the arm moves."""
        missing = sorted(c for c, there in clip.present.items() if not there.all())
        missing = missing or sorted(set(self.latent_spec.shapes) - set(clip.frames))
        if missing:
            raise SpecMismatch(
                f"cameras {sorted(self.latent_spec.shapes)} are required by this {KIND} model, {missing} are missing"
            )
        return self._known_at(clip, self._moves(clip), clip.poses.shape[1] - 1)

    def _known_at(self, clip: Clip, moves: Moves, now: int) -> Known:
        """What is known at frame `now` of a clip."""
        h, n = self.config.history, len(clip.poses)
        seen, short = slice(max(0, now + 1 - h), now + 1), max(0, h - now - 1)
        frames = {c: clip.frames[c][:, seen].to(self.device, torch.float32) for c in self.latent_spec.shapes}
        return Known(
            frames={c: led(x, short) for c, x in whiten(frames, self.latent_spec).items()},
            poses=led(moves.poses[:, seen], short),
            count=(now + 1 - first_frames(clip)).clamp(max=h).to(self.device),
            motion=moves.motion[:, now],
            aim=moves.aims[:, now],
            text=self._text(clip.instruction, n),
        )

    def _moves(self, clip: Clip) -> Moves:
        """How the arm moves in a clip and its lead. Blocks that are not finite are taken as not known."""
        self._check_size(clip.actions)
        poses = self.pose_normalizer.normalize(clip.poses.to(self.device))
        blocks = self.action_normalizer.normalize(clip.actions.to(self.device)).flatten(2)
        return moves_in(self.guess_pose, poses, blocks, first_frames(clip).to(self.device))

    def _text(self, instruction: tuple[str, ...], n: int) -> Tensor | None:
        encoder = text_encoder(self.config.text)
        if encoder is None:
            return None
        if len(instruction) != n:
            raise SpecMismatch(
                f"this model is told the instruction: one for each of {n} rows required, got {len(instruction)}"
            )
        return encoder(instruction).to(self.device)

    def _blocks(self, actions: Tensor) -> Tensor:
        """Normalised flattened blocks "n f k*a". Raises `SpecMismatch` for blocks of another size or that are not finite."""
        self._check_size(actions)
        if not torch.isfinite(actions).all():
            bad = int((~torch.isfinite(actions)).sum())
            raise SpecMismatch(f"finite actions required, got NaN or infinity in {bad} of {actions.numel()} numbers")
        return self.action_normalizer.normalize(actions.to(self.device)).flatten(2)

    def _check_size(self, actions: Tensor) -> None:
        wanted = (self.spec.control_steps, self.spec.action.dim)
        if tuple(actions.shape[2:]) != wanted:
            raise SpecMismatch(
                f"action blocks of {wanted[0]} control steps of {wanted[1]} dimensions ({', '.join(self.spec.action.names)}) required, "
                f"got {tuple(actions.shape[2:])}"
            )

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(
        self,
        clip: Clip,
        generator: torch.Generator | None = None,
        *,
        acted: Bool[Tensor, " b"] | None = None,
        imitated: Bool[Tensor, " b"] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a clip of raw latents with history + horizon frames after its lead, and detached metrics.

        What is asked of each row, which of its frames are known, levels and noise are drawn on the CPU from `generator`.

        Args:
            acted: rows whose actions are known; the others are asked for video, and their actions are never looked at.
            imitated: rows whose actions are what to do; the others are never asked that, only what their actions lead to.
        """
        config, h, f = self.config, self.config.history, self.config.horizon
        if clip.poses.shape[1] != clip.lead + h + f:
            raise SpecMismatch(
                f"clips of {h + f} frames (history and horizon) required, got {clip.poses.shape[1] - clip.lead}"
            )
        if acted is None:
            self._blocks(clip.actions)  # raises for what is not finite
        elif not bool(acted.all()):
            unknown = torch.full((), float("nan"))
            clip = replace(clip, actions=torch.where(acted[:, None, None, None], clip.actions, unknown))
        # at the start of an episode less is known than `history` frames: so the frame that is now is one of the first h
        n, now = len(clip.poses), clip.lead + int(torch.randint(h, (), generator=generator))
        moves = self._moves(clip)
        known = self._known_at(clip, moves, now)
        # a policy may have seen less
        fewer = (1 + torch.rand(n, generator=generator).to(self.device) * known.count).long()
        drawn = torch.rand(n, generator=generator).to(self.device) < 0.5
        known = self._noisy(replace(known, count=torch.where(drawn, fewer, known.count)), generator)
        coming = {c: clip.frames[c][:, now + 1 : now + 1 + f].to(self.device, torch.float32) for c in known.frames}
        truth = Future(
            frames=whiten(coming, self.latent_spec),
            poses=moves.poses[:, now + 1 : now + 1 + f],
            actions=moves.actions[:, now : now + f],
        )
        sparse = config.targets == "end"
        roles = draw_roles(config.shares, n, f, generator, sparse=sparse, acted=acted, imitated=imitated)
        loss, metrics = self._errors(known, truth, roles.to(self.device), generator).loss(config)
        if self.guess_pose is None:
            return loss, metrics
        missed = guess_miss(self.guess_pose, moves, known, now, f)
        return loss + missed, metrics | {"guess_error": missed.detach()}

    def _errors(self, known: Known, truth: Future, roles: Roles, generator: torch.Generator | None) -> Errors:
        """Rows without frames and rows with some in two passes: the first are short."""
        with_frames = roles.with_frames
        parts = []
        for rows in (with_frames.nonzero().flatten(), (~with_frames).nonzero().flatten()):
            if len(rows):
                parts.append(self.network.errors(known.index(rows), truth.index(rows), roles.index(rows), generator))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _noisy(self, known: Known, generator: torch.Generator | None) -> Known:
        """History as dreams have it: at a noise level that the network is told."""
        level = self.config.history_levels.sample(tuple(known.poses.shape[:2]), generator).to(self.device)
        frames = {
            c: add_noise(linear_path, x, torch.randn(x.shape, generator=generator).to(x), level)
            for c, x in known.frames.items()
        }
        return replace(known, frames=frames, level=level)

    # --- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        seen: Clip,
        query: Query,
        *,
        seeds: Int[Tensor, " n"],
        frames: Mapping[str, Float[Tensor, "n _given c _h _w"]] | None = None,
        actions: Float[Tensor, "n _given k a"] | None = None,
        steps: int | None = None,
        guidance: Guidance | None = None,
        score: Callable[[Tensor], Tensor] | None = None,
    ) -> VideoActions:
        """Answer `query` from the frames seen so far (raw latents "n t c h w", t >= 1).

        Args:
            frames, actions: what the query says is given, in order: as many frames and blocks as have that role.
            steps: of the solver, instead of the config's. Raises `ValueError` for levels that training never showed.
            guidance, score: move the estimate of the blocks that are asked for, in every step but the last, along the gradient of a
                policy's log-density, blocks "n g k a" to "n g k a" (policy-guided diffusion).

        Raises `SpecMismatch` for a query not learned, for givens of another number or size, and for actions that are not finite.
        """
        query = query.at(self.config.horizon)
        require_learned(query, self.config.shares, self.also_learned)
        f = [i for i, role in enumerate(query.frames) if role != Role.ABSENT]
        if self.config.targets == "end" and len(f) > 1:
            raise SpecMismatch(
                f"a query of one coming frame at most is required by a model trained with targets='end', got {len(f)}: Query.first(1, ...)"
            )
        config = self.config
        if steps is not None:
            config = replace(
                config, solver_steps=steps, action_steps=steps
            )  # raises for levels that training never showed
        steps = config.action_steps if query.decides else config.solver_steps
        known = self.known(seen)
        given = self.given(query, len(seeds), frames, actions)
        draw = Draw(seeds=seeds, frame=torch.full_like(seeds, seen.poses.shape[1] - 1), steps=steps)
        if guidance is not None and score is not None:
            draw = replace(draw, steer=steering(self.physical, query, guidance, score, steps))
        made = self.answer(known, given, query.rows(len(seeds)), draw)
        g = [i for i, role in enumerate(query.actions) if role != Role.ABSENT]
        return VideoActions(
            latents=unwhiten({c: x[:, f] for c, x in made.frames.items()}, self.latent_spec),
            poses=self.pose_normalizer.denormalize(made.poses[:, f]),
            actions=self.physical(made.actions[:, g]),
        )

    def physical(self, blocks: Tensor) -> Tensor:
        """Normalised blocks "n g k*a" as actions "n g k a"."""
        return self.action_normalizer.denormalize(blocks.unflatten(2, (self.spec.control_steps, self.spec.action.dim)))

    def answer(self, known: Known, given: Future, roles: Roles, draw: Draw) -> Future:
        """`sample` in the network's units."""
        draw = replace(draw, seeds=draw.seeds.to(self.device), frame=draw.frame.to(self.device))
        draw = replace(draw, warm=self.config.warm_level, rounds=self.config.decode_rounds)
        return self.network.sample(known, given, roles.to(self.device), draw)

    def given(
        self, query: Query, n: int, frames: Mapping[str, Tensor] | None = None, actions: Tensor | None = None
    ) -> Future:
        """What is given in the network's units, zeros elsewhere. Raises `SpecMismatch` for another number than the query's."""
        f, spec = self.config.horizon, self.latent_spec
        found = {c: torch.zeros(n, f, *shape, device=self.device) for c, shape in spec.shapes.items()}
        blocks = torch.zeros(n, f, self.spec.control_steps * self.spec.action.dim, device=self.device)
        places = [i for i, role in enumerate(query.frames) if role == Role.GIVEN]
        got = {c: x.shape[1] for c, x in (frames or {}).items()}
        if places or got:
            if set(got) != set(found) or set(got.values()) != {len(places)}:
                raise SpecMismatch(
                    f"{len(places)} given frames of each camera {sorted(found)} required, got {got or 'none'}"
                )
            assert frames is not None
            white = whiten({c: frames[c].to(self.device, torch.float32) for c in found}, spec)
            for c, x in found.items():
                x[:, places] = white[c]
        places = [i for i, role in enumerate(query.actions) if role == Role.GIVEN]
        count = 0 if actions is None else actions.shape[1]
        if count != len(places):
            raise SpecMismatch(f"{len(places)} given action blocks required, got {count}")
        if actions is not None and places:
            blocks[:, places] = self._blocks(actions)
        poses = torch.zeros(n, f, len(self.spec.pose_names), device=self.device)
        return Future(frames=found, poses=poses, actions=blocks)

    # --- as a world model ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, clip: Clip) -> TensorState:
        """The last frames of real ones (raw latents "n t c h w", t >= 1) as a state. Raises `SpecMismatch` for a missing camera."""
        n, t = clip.poses.shape[:2]
        return Dreamt.at(self.known(clip), torch.full((n,), t - 1), self.config.horizon).state()

    @torch.no_grad()
    def imagine(
        self, state: TensorState, actions: Float[Tensor, "n f k a"] | None, *, seeds: Int[Tensor, " n"]
    ) -> tuple[TensorState, Imagination]:
        """The f frames that follow. Actions in physical units; latents come back raw, poses in physical units.

        With a chunk of 1 each in a pass of its own, up to `span` of them from the same known frame (`state`). With a longer chunk so many
        a pass, from the frame before them; raises `SpecMismatch` if f is no multiple. Without actions one chunk of whatever may follow.
        Raises it too for a model that has not learned that (the video query), or with actions the forward query.
        """
        chunk = self.config.chunk
        count = chunk if actions is None else actions.shape[1]
        if count % chunk:
            raise SpecMismatch(f"blocks in whole chunks of {chunk} required, got {count}")
        blocks = None if actions is None else self._blocks(actions)
        dreamt, made = Dreamt.of(state), []
        for begin in range(0, count, chunk):
            part = None if blocks is None else blocks[:, begin : begin + chunk]
            dreamt, future = (next_frame if chunk == 1 else next_chunk)(self, dreamt, part, seeds)
            made.append(future)
        frames = {c: torch.cat([x.frames[c] for x in made], 1) for c in self.latent_spec.shapes}
        poses = self.pose_normalizer.denormalize(torch.cat([x.poses for x in made], 1))
        return dreamt.state(), Imagination(latents=unwhiten(frames, self.latent_spec), poses=poses)

    def traced_chunk(self) -> int:
        """Frames that are denoised together where log-probabilities are wanted: all that are imagined from one known frame."""
        return self.config.chunk if self.config.chunk > 1 else self.config.reach

    # --- storage ------------------------------------------------------------------------------------------------------

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of sampling, by name, as `with_sampling` takes them."""
        return {name: getattr(self.config, name) for name in SAMPLING}

    @property
    def reads_instructions(self) -> bool:
        return self.config.text != "none"

    def with_sampling(self, **changes: Any) -> "VideoActionModel":
        """The same weights with other sampling settings, checked against training. Raises `ValueError`."""
        if unknown := sorted(set(changes) - {*SAMPLING, "action_steps", "warm_level", "execute"}):
            raise ValueError(f"sampling of a {KIND} model: some of {', '.join(SAMPLING)} required, got {unknown}")
        other = object.__new__(VideoActionModel)
        config = replace(self.config, **changes)
        other.__dict__ = self.__dict__ | {"config": config, "spec": replace(self.spec, chunk=config.chunk)}
        return other

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        checkpoint.save_part(
            folder,
            part="world-model",
            kind=KIND,
            config=self.to_config(),
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint says of it beside its weights."""
        normalizers = normalizers_to_json(self.action_normalizer, self.pose_normalizer)
        return {"model": checkpoint.to_json(self.config), "also_learned": list(self.also_learned), **normalizers}

    @classmethod
    def from_config(cls, config: Any, spec: WorldSpec, source: str) -> "VideoActionModel":
        """The model, untrained, that `to_config` tells of."""
        settings = checkpoint.from_json(VideoActionConfig, config["model"], source=source)
        model = cls(settings, spec, **normalizers_from_json(config, source=source))
        model.also_learned = tuple(config.get("also_learned", ()))
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VideoActionModel":
        return checkpoint.load_part(folder, part="world-model", kind=KIND, build=cls.from_config)

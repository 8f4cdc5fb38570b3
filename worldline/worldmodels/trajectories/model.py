"""`TrajectoryDiffusion`: whole trajectories under the behaviour's distribution, moved on-policy by a policy's score.

Policy-Guided Diffusion (PGD, 2404.06356) with EDM's preconditioning and samplers (2206.00364), sigma_data = 1. Samples are of
p(trajectory) * prod pi(action | observation)^lambda: the behaviour's own density stays in, which keeps them plausible.

Two defects of the released code are not here: a gradient of zero moves nothing (it was divided by its norm before 1e-8 was added), and the
step after added noise starts from the state that has it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from worldline import checkpoint
from worldline.data.trajectories import Trajectories
from worldline.diffusion import EDMPath, add_noise, edm_levels, loss_weight, precondition, row_noise, sample_edm
from worldline.errors import WorldlineError
from worldline.types import WorldSpec
from worldline.worldmodels.trajectories.config import Guidance, TrajectoryConfig, TrajectorySolver
from worldline.worldmodels.trajectories.layout import Layout, Windows, as_trajectories
from worldline.worldmodels.trajectories.networks import RewardReader, TemporalTransformer, TemporalUNet

PART, KIND = "trajectory-model", "trajectory-diffusion"
SIGMA_DATA = 1.0
_FAR = 4.0  # times the farthest value of the data: beyond this a sampled number has left it
_MOST_FAR = 0.02  # share of sampled numbers that may have

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""(observations "n t o", actions "n t a"), physical, to the gradient of the policy's log-density by the actions "n t a"."""


class TrajectoryDiffusion(nn.Module):
    """A `TrajectoryModel` of recorded behaviour.

    Args:
        config: sizes, noise, solver.
        spec: what the steps are of.
    """

    def __init__(self, config: TrajectoryConfig, spec: WorldSpec) -> None:
        super().__init__()
        self.config, self.spec, self.layout = config, spec, Layout(spec, changes=config.changes, squash=config.squash)
        width = self.layout.width
        if config.network == "unet":
            self.network: nn.Module = TemporalUNet(width, config.width, config.depth)
        else:
            self.network = TemporalTransformer(width, config.width, config.depth, config.heads, config.length)
        self.reader = RewardReader(self.layout.transition_width) if config.rewards == "read" else None
        self.path = EDMPath(largest=config.sigmas.high, rho=config.rho)

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, windows: Windows, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """EDM's weighted squared error of the denoised steps (equation 8), and the squared error of the rewards read off clean transitions if
        they are. Each is 1 for a network that answers nothing; they share no weights."""
        clean = self.layout.pack(windows)
        sigma = self.config.sigmas.sample((len(clean),), generator).to(clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        level = self.path.level(sigma)
        denoised = self.denoise(add_noise(self.path, clean, noise, level), level)
        error = (loss_weight(sigma, SIGMA_DATA)[:, None, None] * (denoised - clean).square()).mean()
        if self.reader is None:
            return error
        known = windows.terminal.clone()
        known[:, :-1] = True  # of the last step the next observation is not known, unless it is terminal
        known[:, 1:] &= ~windows.terminal[:, :-1]  # what is repeated after an end is no step
        reward = self.layout.o + self.layout.a
        read = self.reader(self.layout.transitions(windows))[..., 0]
        return error + (read - clean[..., reward])[known].square().mean()

    def denoise(self, x: Float[Tensor, "n t d"], level: Float[Tensor, " n"]) -> Float[Tensor, "n t d"]:
        """The clean trajectory to be expected behind a noised one, both normalised."""
        sigma = self.path(level).sigma
        c = precondition(sigma, SIGMA_DATA)
        skip, out, into = (v[:, None, None] for v in (c.skip, c.out, c.into))
        return skip * x + out * self.network(into * x, c.noise)

    # --- sampling -----------------------------------------------------------------------------------------------------

    def sample(
        self,
        seeds: Int[Tensor, " n"],
        *,
        length: int | None = None,
        guidance: Guidance | None = None,
        score: ScoreFunction | None = None,
    ) -> Float[Tensor, "n length d"]:
        """Trajectories in physical units, a step's numbers in the order [observation, action, reward, terminal 0 or 1].

        A row's trajectory is a function of its seed (and of the policy) alone. Raises `WorldlineError` if guidance has driven them off.
        """
        w = self.sample_windows(seeds, length=length, guidance=guidance, score=score)
        return torch.cat([w.observations, w.actions, w.rewards[..., None], w.terminal[..., None].to(w.rewards)], -1)

    def generate(
        self,
        seeds: Int[Tensor, " n"],
        *,
        guidance: Guidance | None = None,
        score: ScoreFunction | None = None,
        provenance: Mapping[str, str] | None = None,
        batch: int = 1024,
        progress: bool = False,
    ) -> Trajectories:
        """As `sample`, as episodes of up to length - 1 transitions that begin anywhere; each says what it came of."""
        parts = []
        with tqdm(total=len(seeds), unit="trajectory", disable=not progress) as bar:
            for some in seeds.split(batch):
                parts.append(self.sample_windows(some, guidance=guidance, score=score))
                bar.update(len(some))
        windows = Windows(*(torch.cat(x).cpu() for x in zip(*parts)))
        about = tuple({**(provenance or {}), "seed": str(int(seed))} for seed in seeds)
        return as_trajectories(windows, self.spec, about)

    @torch.no_grad()
    def sample_windows(
        self,
        seeds: Int[Tensor, " n"],
        *,
        length: int | None = None,
        guidance: Guidance | None = None,
        score: ScoreFunction | None = None,
    ) -> Windows:
        """As `sample`, by name."""
        config = self.config
        length = config.length if length is None else length
        config.check_length(length)
        by = guidance if guidance is not None and guidance.coefficient > 0 else None
        if by is not None and score is None:
            raise ValueError(f"guidance by {by.coefficient} requires a policy's score, got none")
        solver, shape = config.solver, (length, self.layout.width)
        device = self.layout.mean.device
        seeds = seeds.to(device)

        def noise(step: int) -> Tensor:
            return row_noise(seeds, 0, step, shape)

        def move(step: int, z: Tensor) -> Tensor:
            assert by is not None and score is not None
            return self._moved(z, by, score, step, solver.steps)

        z = sample_edm(
            self.denoise,
            config.sigmas.high * noise(0),
            edm_levels(solver.steps, self.path, config.sigmas.high, config.sigmas.low).to(device),
            self.path,
            churn=solver.churn,
            churned=solver.churned,
            inflate=solver.inflate,
            heun=solver.heun,
            noise=noise,
            nudge=move if by is not None and by.on == "noised" else None,
            correct=move if by is not None and by.on == "denoised" else None,
        )
        self._require_near(z, by)
        made = self.layout.unpack(z)
        return made if self.reader is None else made._replace(rewards=self._rewards(made))

    def _rewards(self, windows: Windows) -> Float[Tensor, "n t"]:
        """What the transitions earn, in physical units; that of the last step, whose next observation is not known, counts for nothing."""
        assert self.reader is not None
        at = self.layout.o + self.layout.a
        return self.reader(self.layout.transitions(windows))[..., 0] * self.layout.std[at] + self.layout.mean[at]

    def _moved(self, z: Tensor, guidance: Guidance, score: ScoreFunction, step: int, steps: int) -> Tensor:
        """Normalised trajectories after one step's guidance: only their actions have moved."""
        at = self.layout.unpack(z)
        slope = score(at.observations, at.actions) * self.layout.slope(z)
        if not slope.isfinite().all():
            raise WorldlineError(
                f"a finite score of the policy is required, got NaN or infinity in solver step {step} of {steps}. "
                "Its standard deviation may have collapsed; its observations may be others than the model's."
            )
        moved = z.clone()
        moved[..., self.layout.o : self.layout.o + self.layout.a] += guidance.move(slope, step, steps)
        return moved

    def _require_near(self, z: Float[Tensor, "n t d"], guidance: Guidance | None) -> None:
        """Raise `WorldlineError` if samples are not finite, or many numbers are far outside all that the data held."""
        far = ~(z.abs() <= _FAR * self.layout.reach.clamp(min=1.0))  # NaN is far
        o, a = self.layout.o, self.layout.a
        # actions apart: only they are pushed, and they may be few among the numbers
        share = max(float(part.float().mean()) for part in far.split([o, a, self.layout.width - o - a], dim=-1))
        if share > _MOST_FAR or not z.isfinite().all():
            worst = self.layout.names[int(far.float().mean((0, 1)).argmax())]
            by = f"guidance coefficient {guidance.coefficient}" if guidance is not None else "no guidance"
            raise WorldlineError(
                f"sampled trajectories near the data are required, got {share:.0%} of some of their numbers more than {_FAR:g} times farther out "
                f"than any of the data ({worst} most often), with {by} and {self.config.solver.steps} solver steps. "
                "Use a smaller coefficient or more steps; without guidance, train the model for longer."
            )

    def with_solver(self, solver: TrajectorySolver) -> "TrajectoryDiffusion":
        """The same weights with another solver."""
        other = object.__new__(TrajectoryDiffusion)
        other.__dict__ = self.__dict__ | {"config": replace(self.config, solver=solver)}
        return other

    # --- storage ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        checkpoint.save_part(
            folder,
            part=PART,
            kind=KIND,
            config=checkpoint.to_json(self.config),
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TrajectoryDiffusion":
        """Raises `CheckpointError` if the folder holds something else."""
        return checkpoint.load_part(
            folder,
            part=PART,
            build=lambda config, spec, source: cls(checkpoint.from_json(TrajectoryConfig, config, source=source), spec),
        )

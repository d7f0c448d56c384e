"""The training loop: lengths grow by wall clock, answers are the loss."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from needle.config import ModelShape, Plan
from needle.data import TASK_NAMES, Batch, BatchSource, jumping_positions
from needle.evaluate import mixed_precision
from needle.model import NeedleModel
from needle.optim import Optimiser

WARM_UP_LR_STEPS = 60
LOWEST_LR_SCALE = 0.02
METER_EVERY = 10
# A stage never ends before this share of its time, however accurate the model is.
SHORTEST_STAGE = 0.25


@dataclass(slots=True)
class Curriculum:
    """Which stage is on.

    Parameters
    ----------
    plan : Plan
        Stages and time.
    began : float
        Start of the training, in seconds of `time.monotonic`.
    """

    plan: Plan
    began: float
    stage: int = 0
    stage_began: float = field(init=False)

    def __post_init__(self) -> None:
        self.stage_began = self.began

    @property
    def ends(self) -> float:
        """When the training ends."""
        return self.began + self.plan.minutes * 60

    def lengths(self) -> list[int]:
        """Row lengths of the stages up to the current one."""
        return [length for length, _ in self.plan.stages[: self.stage + 1]]

    def advance(self, now: float, accuracy: float) -> bool:
        """Go on to the next stage when its time is used, or earlier when the accuracy is reached.

        Time that a stage leaves unused goes to the later ones.
        """
        if self.stage + 1 == len(self.plan.stages):
            return False
        share = self.plan.stages[self.stage][1]
        left = sum(later for _, later in self.plan.stages[self.stage :])
        used = now - self.stage_began
        time_is_up = used > (self.ends - self.stage_began) * share / left
        learned = accuracy > self.plan.advance_at and used > SHORTEST_STAGE * share * self.plan.minutes * 60
        if not (time_is_up or learned):
            return False
        self.stage += 1
        self.stage_began = now
        return True


@dataclass(slots=True)
class Meters:
    """Smoothed token accuracy, by task and for the current stage."""

    by_task: dict[str, float] = field(default_factory=dict)
    stage: float = 0.0

    def update(self, right: Tensor, task: Tensor, *, current: bool) -> None:
        """Take in one batch.

        Parameters
        ----------
        right : Tensor
            float32 `(n,)`: 1 for an answer token that was the argmax.
        task : Tensor
            int64 `(n,)`: its task.
        current : bool
            The batch has the current stage's length.
        """
        n = len(TASK_NAMES)
        hits = torch.bincount(task, weights=right, minlength=n).tolist()
        counts = torch.bincount(task, minlength=n).tolist()
        seen = {TASK_NAMES[i]: hits[i] / counts[i] for i in range(n) if counts[i]}
        for name, accuracy in seen.items():
            self.by_task[name] = 0.7 * self.by_task.get(name, accuracy) + 0.3 * accuracy
        if current:
            self.stage = 0.85 * self.stage + 0.15 * sum(seen.values()) / len(seen)

    def __str__(self) -> str:
        return " ".join(f"{name}={accuracy:.2f}" for name, accuracy in self.by_task.items())


def losses(model: NeedleModel, batch: Batch, positions: Tensor, lm_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a batch: mean over the answers, plus a little language modelling on random tokens.

    Parameters
    ----------
    model : NeedleModel
        In training mode.
    batch : Batch
        Rows.
    positions : Tensor
        int64 `(B, T)`.
    lm_weight : float
        Weight of the language-model loss.

    Returns
    -------
    loss : Tensor
        Scalar to minimise.
    right : Tensor
        float32 `(n_answer_tokens,)`: 1 where the argmax is right.
    task : Tensor
        int64 `(n_answer_tokens,)`.
    """
    tokens = batch.tokens
    hidden = model.hidden(tokens, positions)
    row, place = (batch.queries > 0).nonzero(as_tuple=True)
    logits = model.logits(hidden[row, place - 1]).float()
    loss = functional.cross_entropy(logits, tokens[row, place])
    n_lm = max(64, tokens.numel() // 32)
    lm_row = torch.randint(0, tokens.shape[0], (n_lm,), device=tokens.device)
    lm_place = torch.randint(1, tokens.shape[1], (n_lm,), device=tokens.device)
    lm_logits = model.logits(hidden[lm_row, lm_place - 1]).float()
    loss = loss + lm_weight * functional.cross_entropy(lm_logits, tokens[lm_row, lm_place])
    right = (logits.detach().argmax(-1) == tokens[row, place]).float()
    return loss, right, batch.task[row]


def lr_scale(step: int, progress: float, decay: float) -> float:
    """Linear warm-up by steps, linear decay over the last share `decay` of the time."""
    return min(1.0, (step + 1) / WARM_UP_LR_STEPS) * max(LOWEST_LR_SCALE, min(1.0, (1 - progress) / decay))


def train(shape: ModelShape, plan: Plan, device: torch.device) -> tuple[NeedleModel, dict[str, float]]:
    """Train a model from scratch.

    Parameters
    ----------
    shape : ModelShape
        What to train.
    plan : Plan
        How, and how long. As stages end by wall clock, two runs of one seed differ.
    device : torch.device
        Where.

    Returns
    -------
    model : NeedleModel
        Trained.
    facts : dict
        Steps, tokens, minutes, and the mean loss of the first and last 20 steps.
    """
    torch.manual_seed(plan.seed)
    model = NeedleModel(shape).to(device)
    source = BatchSource(device, plan)
    optimiser = Optimiser(model, plan.muon_lr, plan.adam_lr)
    curriculum, meters = Curriculum(plan, time.monotonic()), Meters()
    history: list[Tensor] = []
    step, n_tokens, log_every = 0, 0, 100 if device.type == "cuda" else 20
    while (now := time.monotonic()) < curriculum.ends:
        if curriculum.advance(now, meters.stage):
            print(f"== to length {curriculum.lengths()[-1]} at {now - curriculum.began:.0f} s, step {step}", flush=True)
            meters.stage *= 0.8
            source.discard()
            continue
        batch = source.next(curriculum.lengths(), step)
        rows, length = batch.tokens.shape
        positions = jumping_positions(source.draw, rows, length, shape.max_positions, plan.jump_share)
        with mixed_precision(device):
            loss, right, task = losses(model, batch, positions, plan.lm_weight)
        loss.backward()
        progress = (now - curriculum.began) / (plan.minutes * 60)
        optimiser.step(lr_scale(step, progress, plan.decay))
        history.append(loss.detach())
        step, n_tokens = step + 1, n_tokens + rows * length
        if step % METER_EVERY == 0:
            meters.update(right, task, current=length == curriculum.lengths()[-1])
        if step % log_every == 0:
            print(
                f"{now - curriculum.began:6.0f} s step {step} T={length} loss {float(loss):.3f} | {meters}", flush=True
            )
    first, last = (float(torch.stack(part).mean()) for part in (history[:20], history[-20:]))
    facts = {"steps": step, "tokens": n_tokens, "minutes": plan.minutes, "loss_first": first, "loss_last": last}
    return model.eval(), facts

"""One trial: an adapter, its optimizer and its LR schedule. `train` runs one of them, a sweep runs many."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from lora_trainer.config.schema import RunConfig
from lora_trainer.models.adapters.targets import assign_param_groups, can_pack
from lora_trainer.planning.run_plan import ParamGroup
from lora_trainer.training.optimizers import build_optimizer, evaluated_weights

Tensors = dict[str, torch.Tensor]
MAX_OVERFLOWS_IN_A_ROW = 30  # fp16's scale halves at each: more than enough to come down from 2**16
OVERFLOW = "fp16 overflow"
SETTLING_MARGIN = 4.0  # other batches have larger gradients, and A has none before B moves


@dataclass(frozen=True, slots=True)
class BestProbe:
    """The smallest held-out loss so far, relative to the base, and the update after which it was measured."""

    step: int
    relative: float


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a trial ended before the others of its group, after `step` updates."""

    step: int
    status: Literal["failed", "stopped"]
    """`failed`: its numbers were not finite. `stopped`: a rule of `sweep.prune` said so."""
    reason: str


@dataclass
class Skips:
    """Updates that were not applied because a number was not finite."""

    total: int = 0
    faults_in_a_row: int = 0
    overflows_in_a_row: int = 0
    """fp16 gradients beyond the loss scale, which then halves: no fault of the trial."""


class Trial:
    """Adapter, optimizer, schedule and average of one trial, moved on one update at a time.

    Args:
        adapter: its name in the bank.
        parameters: fp32, by name.
        param_groups: learning rates; the first has the weights that no other takes.
        scaler: the trial's own loss scale, so that an overflow touches no other trial; enabled under fp16 alone.
    """

    def __init__(
        self,
        config: RunConfig,
        adapter: str,
        parameters: Mapping[str, nn.Parameter],
        param_groups: Sequence[ParamGroup],
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.name, self.config, self.adapter, self.scaler = config.name, config, adapter, scaler
        self.parameters, self.param_groups = dict(parameters), tuple(param_groups)
        self.best: BestProbe | None = None
        self.ending: Ending | None = None
        """Where it ended before its group; its weights stay those after its last update."""
        self.skips = Skips()
        self.has_scale = not scaler.is_enabled()
        """Whether its loss scale is settled; without fp16 there is none to settle."""
        self.parent: Trial | None = None
        """The trial whose updates this one still shares."""
        self._branches_at = 0
        patterns = {group.name: group.match for group in config.optimizer.groups}
        members = assign_param_groups(list(self.parameters), patterns, self.param_groups[0].name)
        self._order = [name for group in self.param_groups for name in members[group.name]]
        self.param_group_of = {name: group for group in self.param_groups for name in members[group.name]}
        """The LR group of each parameter."""
        grouped = [[self.parameters[name] for name in members[group.name]] for group in self.param_groups]
        self.optimizer = build_optimizer(config.optimizer, grouped, self.param_groups[0].schedule.horizon)
        self.average: Tensors | None = None
        """Exponential moving average of the parameters, fp32, where `train.ema_decay` asks for one."""
        if config.train.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def is_live(self) -> bool:
        """Whether it is still trained."""
        return self.ending is None

    @property
    def computed_by(self) -> Trial:
        """The trial whose gradients stand for this one's: itself, or the parent whose updates it shares."""
        return self if self.parent is None else self.parent.computed_by

    def share(self, parent: Trial, until: int) -> None:
        """Take the updates before number `until` from a trial that makes the same ones."""
        self.parent, self._branches_at = parent, until

    def branch_off_if_due(self, k: int) -> None:
        """Before update k: leave the parent with a copy of all its state, where the shared updates end."""
        if self.parent is not None and k >= self._branches_at:
            parts, plain = copy.deepcopy(self.state())
            self.load_state(parts, plain)
            self.parent = None  # not before the copy is whole

    def clip(self) -> torch.Tensor:
        """Take the loss scale off and scale the gradients down to the norm allowed; the norm before, on the device."""
        self.scaler.unscale_(self.optimizer)  # nothing where the scaler is off, as are `update` and `load_state_dict`
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        limit = self.config.train.max_grad_norm
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, norm)
        return norm

    def fault(self, loss: float, norm: float) -> str | None:
        """What is not finite of an update's numbers, the more telling first."""
        if not math.isfinite(loss):
            return "loss"
        if not math.isfinite(norm):
            return OVERFLOW if self.scaler.is_enabled() else "gradient"
        return None

    def apply_update(self, k: int) -> dict[str, float]:
        """One optimizer step with the LRs of update k, which are returned by group; then the average follows."""
        lrs = {group.name: group.lr(k) for group in self.param_groups}
        for param_group, lr in zip(self.optimizer.param_groups, lrs.values(), strict=True):
            param_group["lr"] = lr
        self.optimizer.step()
        self._move_average(k)
        self.scaler.update()
        self.skips.faults_in_a_row = self.skips.overflows_in_a_row = 0
        return lrs

    @torch.no_grad()
    def _move_average(self, k: int) -> None:
        """By 1 - min(decay, (1 + k) / (10 + k)), as TensorFlow's and diffusers' EMA: the start is forgotten soon."""
        if self.average is not None and self.config.train.ema_decay is not None:
            decay = min(self.config.train.ema_decay, (1 + k) / (10 + k))
            parameters = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)

    def skip(self, k: int, fault: str, files: Sequence[str], max_faults: int) -> None:
        """Leave everything as it was before update k; fail where that happens too often in a row."""
        overflow, skips = fault == OVERFLOW, self.skips
        skips.total += 1
        skips.overflows_in_a_row = skips.overflows_in_a_row + 1 if overflow else 0
        skips.faults_in_a_row = 0 if overflow else skips.faults_in_a_row + 1
        if self.parent is None:
            self.scaler.update()
        if skips.overflows_in_a_row >= MAX_OVERFLOWS_IN_A_ROW or skips.faults_in_a_row >= max_faults:
            times = skips.overflows_in_a_row or skips.faults_in_a_row
            often = "" if times == 1 else f" in {times} updates in a row"
            self.ending = Ending(k + 1, "failed", f"its {fault} was not finite{often}; images {', '.join(files)}")

    def settle_scale(self, *, has_halved: bool) -> bool:
        """Whether the gradients are finite under this loss scale; it halves where they are not.

        Args:
            has_halved: they were not before: the largest scale that fits one batch would overflow in the next.
        """
        fits = math.isfinite(float(self.clip()))
        self.scaler.update()
        if fits and has_halved:
            self.scaler.update(self.scaler.get_scale() / SETTLING_MARGIN)
        self.has_scale = fits
        return fits

    def weights(self) -> Tensors:
        """What is exported, sampled and validated: the average where one is kept, else the adapter itself."""
        if self.parent is not None:
            return self.computed_by.weights()
        if self.average is not None:
            return self.average
        evaluated = evaluated_weights(self.optimizer)
        if evaluated is not None:
            return dict(zip(self._order, evaluated, strict=True))
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def state(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """All that a resume needs: tensors by part and name, and JSON values."""
        source = self.computed_by
        tensors, optimizer = source._optimizer_state()
        adapter = {name: p.detach() for name, p in source.parameters.items()}
        parts = {"adapter": adapter, "optimizer": tensors}
        if source.average is not None:
            parts["average"] = source.average
        feedback = [None if g.schedule.feedback is None else g.schedule.feedback.state() for g in self.param_groups]
        return parts, {
            "optimizer": optimizer,
            "feedback": feedback,
            "best": None if self.best is None else asdict(self.best),
            "ending": None if self.ending is None else asdict(self.ending),
            "skips": asdict(self.skips),
            "scaler": source.scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, parts: Mapping[str, Tensors], plain: Mapping[str, Any]) -> None:
        """The inverse of `state`; a part that holds no tensor may be missing."""
        for part, tensors in ("adapter", self.parameters), ("average", self.average or {}):
            for name, tensor in tensors.items():
                tensor.copy_(parts[part][name])
        self._load_optimizer_state(parts.get("optimizer", {}), plain["optimizer"])
        self.best = None if plain["best"] is None else BestProbe(**plain["best"])
        self.ending = None if plain["ending"] is None else Ending(**plain["ending"])
        self.skips = Skips(**plain["skips"])
        if plain["scaler"]:  # none where it was saved in another precision
            self.scaler.load_state_dict(plain["scaler"])
            self.has_scale = True
        for group, state in zip(self.param_groups, plain["feedback"], strict=True):
            if group.schedule.feedback is not None and state is not None:
                group.schedule.feedback.load(state)

    def _optimizer_state(self) -> tuple[Tensors, dict[str, Any]]:
        """The optimizer's tensors by `<parameter>/<key>`, and its plain values."""
        state = self.optimizer.state_dict()
        tensors: Tensors = {}
        values: dict[str, Any] = {}
        for index, entries in state["state"].items():
            for key, value in entries.items():
                (tensors if isinstance(value, torch.Tensor) else values)[f"{self._order[index]}/{key}"] = value
        groups = [{k: _to_json(v) for k, v in group.items() if k != "params"} for group in state["param_groups"]]
        return tensors, {"values": values, "groups": groups}

    def _load_optimizer_state(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        indices = {name: index for index, name in enumerate(self._order)}
        entries: dict[int, dict[str, Any]] = {}
        for place, value in [*tensors.items(), *plain["values"].items()]:
            name, _, key = place.rpartition("/")
            entries.setdefault(indices[name], {})[key] = value
        written = {"params", *type(self.config.optimizer).model_fields}  # the config decides, not the checkpoint
        groups = [
            {k: _from_json(v) for k, v in saved.items()} | {k: v for k, v in current.items() if k in written}
            for saved, current in zip(plain["groups"], self.optimizer.state_dict()["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def passes_of(trials: Sequence[Trial], trials_per_pass: int) -> tuple[tuple[Trial, ...], ...]:
    """The trials of each forward: in their order, `trials_per_pass` at a time; those that cannot be packed alone."""
    packable = [trial for trial in trials if trials_per_pass > 1 and can_pack(trial.config.adapter)]
    alone = [(trial,) for trial in trials if trial not in packable]
    packed = [tuple(packable[first : first + trials_per_pass]) for first in range(0, len(packable), trials_per_pass)]
    return (*packed, *alone)


def _to_json(value: Any) -> Any:
    """A group's value for JSON, which has no infinities."""
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value

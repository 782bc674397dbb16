"""A rank's slice of the model in one allocation of its device, which ranks of one GPU share.

:class:`WeightArena` is where each tensor of a :class:`~disagg_mpi.engine.weights.ModelPlan` lies in it: pure,
and the same for every rank that holds the same slice, so one of them fills the allocation and the others open
it. Matrices that are multiplied with the same rows (Q, K and V; gate and up) lie together and can be
multiplied as one.
"""

from __future__ import annotations

import math

import msgspec
import torch

from disagg_mpi.engine.gpu.device import Device
from disagg_mpi.engine.weights import DTYPES, ModelPlan, fill_buffers, mapped_tensors, set_tensor

# Places begin at so many bytes: what the widest loads and the copy engine of a GPU ask for.
_ALIGNED = 256

# Matrices that lie right behind the one that their module defines before them.
_JOINED = ("k_proj", "v_proj", "up_proj")

# Of random weights: what transformers' own configurations begin with, so that activations stay finite.
_RANDOM_DEVIATION = 0.02


class Place(msgspec.Struct, frozen=True):
    """One tensor in the allocation."""

    offset: int
    """In bytes."""
    shape: tuple[int, ...]
    is_parameter: bool


class WeightArena:
    """The places of all tensors of a plan; ``num_bytes`` of an allocation hold them."""

    def __init__(self, plan: ModelPlan) -> None:
        self._dtype = DTYPES[plan.dtype]
        self._plan = plan
        self.places: dict[str, Place] = {}
        self._same: dict[str, str] = {}
        parameters = dict(plan.module.named_parameters(remove_duplicate=False))
        homes: dict[int, str] = {}
        end = 0
        state = plan.module.state_dict(keep_vars=True)
        for name in sorted(state, key=lambda name: (_module_of(name), state[name].dim() < 2)):
            tensor = state[name]
            if id(tensor) in homes:  # tied: one tensor under two names
                self._same[name] = homes[id(tensor)]
                continue
            homes[id(tensor)] = name
            part = plan.slices.get(name)
            shape = list(tensor.shape)
            if part is not None:
                shape[part.dim] = part.end - part.start
            if name.split(".")[-2] not in _JOINED or tensor.dim() < 2:
                end = -(-end // _ALIGNED) * _ALIGNED
            self.places[name] = Place(end, tuple(shape), name in parameters)
            end += math.prod(shape) * self._dtype.itemsize
        self.num_bytes = -(-end // _ALIGNED) * _ALIGNED

    def fill_from_files(self, memory: torch.Tensor) -> None:
        """Copy the rank's slices out of the checkpoint. Raises :class:`ModelError` for files that do not
        fit."""
        for name, tensor in mapped_tensors(self._plan):
            if name in self.places:
                self._view(memory, name).copy_(tensor)

    def fill_randomly(self, memory: torch.Tensor) -> None:
        """Norms become 1, all else is drawn: for measurements."""
        torch.manual_seed(0)
        for name in self.places:
            view = self._view(memory, name)
            if view.dim() < 2:
                view.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                view.normal_(0.0, _RANDOM_DEVIATION)

    def attach(self, memory: torch.Tensor, device: Device) -> None:
        """Make the allocation the plan's module's own, with the buffers that are in no file."""
        module = self._plan.module
        for name, place in self.places.items():
            set_tensor(module, name, self._view(memory, name), is_parameter=place.is_parameter)
        for name, home in self._same.items():
            set_tensor(module, name, self._view(memory, home), is_parameter=self.places[home].is_parameter)
        fill_buffers(module, self._plan.config)
        for each in module.modules():
            for name, buffer in each.named_buffers(recurse=False):
                if buffer.device != device.place:
                    setattr(each, name, buffer.to(device.place))
        module.eval().requires_grad_(False)

    def _view(self, memory: torch.Tensor, name: str) -> torch.Tensor:
        place = self.places[name]
        end = place.offset + math.prod(place.shape) * self._dtype.itemsize
        return memory[place.offset : end].view(self._dtype).view(place.shape)


def _module_of(name: str) -> str:
    """Sorts the tensors of one attention, or one MLP, together, and leaves the rest in order."""
    return ".".join(name.split(".")[:-2])

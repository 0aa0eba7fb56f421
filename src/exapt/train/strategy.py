"""Where and how a model runs: Fabric, its processes, sharding, precision, training mode."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.errors import InputError
from exapt.core.layers import BATCH_NORM, is_quantised
from exapt.core.roles import roles
from exapt.core.state import adapters
from exapt.train.config import FitConfig


def fabric_of(config: FitConfig) -> Any:
    """Returns a launched Fabric for the processes that there are: this one, or those that ``torchrun`` started."""
    try:
        import lightning_fabric
    except ImportError as e:
        raise InputError('training needs lightning-fabric; pip install "exapt[train]"') from e
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    world = int(os.environ.get("WORLD_SIZE", 1)) if under_torchrun else 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if under_torchrun else 1
    if config.devices > 1 and config.devices != world:
        where = f"torchrun started {world}" if under_torchrun else "this is one process"
        raise InputError(f"train.devices is {config.devices}, but {where}; run it under torchrun --nproc_per_node={config.devices}")
    if config.strategy == "fsdp2" and not under_torchrun:
        raise InputError("train.strategy fsdp2 shards over processes; run it under torchrun --nproc_per_node=N")
    strategy: Any = "auto"
    if config.strategy == "fsdp2":
        from lightning_fabric.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(parallelize_fn=shard, data_parallel_size=world, tensor_parallel_size=1)
    elif world > 1:
        from lightning_fabric.strategies import DDPStrategy

        strategy = DDPStrategy(find_unused_parameters=True)  # a method may leave a parameter out of a batch (experts, unused poolers)
    precision: Any = "bf16-mixed" if config.precision == "bf16-mixed" else "32-true"
    try:
        fabric = lightning_fabric.Fabric(
            accelerator=config.accelerator, strategy=strategy, devices=local, num_nodes=max(world // local, 1), precision=precision
        )
    except (ValueError, RuntimeError, lightning_fabric.utilities.exceptions.MisconfigurationException) as e:
        raise InputError(f'train.accelerator "{config.accelerator}" cannot be used here: {str(e).splitlines()[0]}') from e
    fabric.launch()
    return fabric


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2: every block is a unit of its own, the rest belongs to the root."""
    from torch.distributed.fsdp import fully_shard

    for name, role in roles(model).items():
        if role == "block":
            fully_shard(model.get_submodule(name), mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def whole(t: Tensor) -> Tensor:
    """A sharded tensor gathered from every process; others as they are."""
    gather = getattr(t, "full_tensor", None)
    return gather() if gather is not None else t


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded; a buffer that changes its size in training takes the value's."""
    if target.shape != value.shape and not isinstance(target, torch.nn.Parameter):
        target.data = value.to(target.device, target.dtype)
        return
    target.copy_(sharded_like(value.to(target.device), target))


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, distributed as ``like`` is."""
    if not hasattr(like, "full_tensor") or value.dim() == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def to_bfloat16(model: nn.Module) -> None:
    """Casts the base's floating-point parameters in place; adapters, batch norms and quantised weights stay as they are."""
    spared = {id(p) for m in model.modules() if isinstance(m, BATCH_NORM) for p in m.parameters()}
    for name, p in model.named_parameters():
        if ".exapt." not in f".{name}" and p.is_floating_point() and not is_quantised(p) and id(p) not in spared:
            p.data = p.data.to(torch.bfloat16)


def training_mode(model: nn.Module) -> None:
    """Training mode; with adapters on it, the running statistics of batch norms stay the base's: an adapter file does not hold them."""
    model.train()
    if adapters(model):
        for module in model.modules():
            if isinstance(module, BATCH_NORM):
                module.eval()


def world_of() -> tuple[int, int]:
    """(rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def summed(values: list[float], device: torch.device) -> list[float]:
    """Numbers added up over all processes."""
    if world_of()[1] == 1:
        return values
    t = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    torch.distributed.all_reduce(t)
    return t.tolist()

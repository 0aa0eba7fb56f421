"""Which axes of a model's tensors count the same hidden units: what can be permuted without changing the function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from exapt.core.errors import InputError
from exapt.core.sites import Site, sites

Tree = Mapping[str, Tensor]
Permutations = Mapping[str, Tensor]
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardtanh, nn.Softplus,
    nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class UnitSpec:
    """Ties axes of tensors to named permutations of hidden units.

    Attributes:
        axes: For each tensor what each of its axes counts: a permutation's name, or None. Tensors that are left out do not change.
        sizes: Number of units of permutations whose units take several places on every axis (attention heads); the others' are read from the
            tensors, as the length of their shortest axis. On a longer axis each unit is a block of neighbours (a flattened feature map).

    >>> UnitSpec({"w0": ("h", None), "b0": ("h",), "w1": (None, "h")}).places()
    {'h': [('w0', 0), ('b0', 0), ('w1', 1)]}
    """

    axes: Mapping[str, tuple[str | None, ...]]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def places(self) -> dict[str, list[tuple[str, int]]]:
        """For each permutation the tensors and axes that it acts on."""
        found: dict[str, list[tuple[str, int]]] = {}
        for name, axes in self.axes.items():
            for axis, unit in enumerate(axes):
                if unit is not None:
                    found.setdefault(unit, []).append((name, axis))
        return found

    def counts(self, tree: Tree) -> dict[str, int]:
        """Number of units of each permutation, after a look at the tensors.

        Raises:
            InputError: for a tensor that is missing or has other axes, or lengths that are no multiples of the number of units.
        """
        if not self.places():
            raise InputError("the specification ties no axis to a permutation; there is nothing to permute")
        for name, axes in self.axes.items():
            if name not in tree or tree[name].dim() != len(axes):
                said = "is missing" if name not in tree else f"has {tree[name].dim()} axes, the specification {len(axes)}"
                raise InputError(f"{name} {said}; give tensors by the names of the specification")
            if len({a for a in axes if a is not None}) < sum(a is not None for a in axes):
                raise InputError(f"{name}: one permutation on two axes of a tensor cannot be matched; give them names of their own")
        found = {}
        for unit, places in self.places().items():
            lengths = {f"{name} axis {axis}": tree[name].shape[axis] for name, axis in places}
            n = self.sizes.get(unit, min(lengths.values()))
            odd = next((k for k, length in lengths.items() if n < 1 or length % n), None)
            if odd is not None:
                raise InputError(f'permutation "{unit}": {odd} has length {lengths[odd]}, no multiple of {n} units')
            found[unit] = n
        return found


def sequential_units(model: nn.Sequential) -> UnitSpec:
    """The specification of a plain chain: Linear, convolution, batch and layer norm, elementwise activations, pooling, Flatten, Dropout.

    Every Linear and convolution but the last has a permutation of its outputs, called by the layer's name.

    Args:
        model: The chain; it may hold chains.

    Raises:
        InputError: for a module through which hidden units cannot be followed, or a chain without two layers.

    >>> sequential_units(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).axes
    {'0.weight': ('0', None), '0.bias': ('0',), '2.weight': (None, '0'), '2.bias': (None,)}
    """
    everything = list(model.named_modules(remove_duplicate=False))
    odd = next((m for n, m in everything if type(m).forward is not nn.Sequential.forward and (not n or isinstance(m, nn.Sequential))), None)
    if odd is not None:
        raise InputError(f"sequential_units: {type(odd).__name__} is no plain nn.Sequential; give a UnitSpec by hand")
    chain = [(n, m) for n, m in everything if not isinstance(m, nn.Sequential)]
    layers = [n for n, m in chain if isinstance(m, (nn.Linear, *_CONV))]
    weighted = [m for _, m in chain if m._parameters]
    if len({id(m) for m in weighted}) < len(weighted):
        raise InputError("sequential_units: one layer stands in the chain twice, so that its units cannot be permuted freely; give a UnitSpec by hand")
    if len(layers) < 2:
        raise InputError(f"sequential_units: {len(layers)} layers with weights have no hidden units between them")
    axes: dict[str, tuple[str | None, ...]] = {}
    before: str | None = None
    for name, module in chain:
        if isinstance(module, (nn.Linear, *_CONV)):
            if getattr(module, "groups", 1) != 1:
                raise InputError(f"sequential_units: {name} is a grouped convolution, whose channels cannot be permuted freely; give a UnitSpec by hand")
            after = None if name == layers[-1] else name
            axes[f"{name}.weight"] = (after, before, *[None] * (module.weight.dim() - 2))
            if module.bias is not None:
                axes[f"{name}.bias"] = (after,)
            before = after
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            own = module.state_dict()
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
                raise InputError(f"sequential_units: {name} normalises {len(module.normalized_shape)} dimensions; give a UnitSpec by hand")
            axes |= {f"{name}.{k}": (before,) for k, t in own.items() if t.dim() == 1}
        elif isinstance(module, nn.PReLU):
            axes[f"{name}.weight"] = (before if module.num_parameters > 1 else None,)
        elif not isinstance(module, _ELEMENTWISE):
            raise InputError(f"sequential_units: {name} is a {type(module).__name__}, through which hidden units cannot be followed; give a UnitSpec by hand")
    return UnitSpec(axes)


def feed_forward_units(model: nn.Module) -> UnitSpec:
    """The specification of a transformer's feed-forward networks, found by the roles of its sites: "mlp.up", "mlp.gate", "mlp.down" of each block.

    Every block has a permutation, called by the block's name; the residual stream stays as it is.

    Args:
        model: A model whose blocks hold one feed-forward network each.

    Raises:
        InputError: for a model without such blocks, or a fused or expert layer among them.

    >>> block = lambda: nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
    >>> feed_forward_units(nn.Sequential(block(), block())).axes["0.fc2.weight"]
    (None, '0')
    """
    found = sites(model)
    axes: dict[str, tuple[str | None, ...]] = {}
    for block in (s for s in found if s.role == "block"):
        inside = [s for s in found if s.name.startswith(f"{block.name}.")]
        ins, outs = [s for s in inside if s.role in ("mlp.up", "mlp.gate")], [s for s in inside if s.role == "mlp.down"]
        if not ins and not outs:
            continue
        if len(outs) != 1 or not ins or any(s.shape[0] != outs[0].shape[1] for s in ins) or any(s.layer and s.layer.stacked for s in inside):
            raise InputError(f"feed_forward_units: {block.name} does not hold one plain feed-forward network; give a UnitSpec by hand")
        for site in ins:
            axes |= _site_axes(site, (block.name, None))
        axes |= _site_axes(outs[0], (None, block.name))
    if not axes:
        raise InputError("feed_forward_units: no block with mlp.up and mlp.down is found; see exapt sites, or give a UnitSpec by hand")
    return UnitSpec(axes)


def _site_axes(site: Site, units: tuple[str | None, str | None]) -> dict[str, tuple[str | None, ...]]:
    """Axes of a site's weight and bias, whichever way the weight is stored; ``units`` are those of its outputs and inputs."""
    layer = site.layer
    assert layer is not None
    prefix = f"{site.module_name}." if site.module_name else ""
    turned = layer.kind == "conv1d_hf"
    if layer.kind not in ("linear", "conv1d_hf") or site.quantised:
        raise InputError(f"feed_forward_units: {site.name} is a {layer.kind}{' and quantised' if site.quantised else ''}; give a UnitSpec by hand")
    axes: dict[str, tuple[str | None, ...]] = {f"{prefix}{layer.parameter}": units[::-1] if turned else units}
    return axes | ({f"{prefix}{layer.bias}": (units[0],)} if layer.bias and site.bias is not None else {})


def permuted(t: Tensor, axes: tuple[str | None, ...], perms: Permutations, skip: int | None = None) -> Tensor:
    """One tensor with its axes permuted, all but ``skip``."""
    for axis, unit in enumerate(axes):
        if unit is not None and axis != skip:
            order = perms[unit].to(t.device)
            n = len(order)
            t = t.index_select(axis, order) if t.shape[axis] == n else t.unflatten(axis, (n, -1)).index_select(axis, order).flatten(axis, axis + 1)
    return t


def checked_permutations(perms: Permutations, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The permutations themselves.

    Raises:
        InputError: for one that is missing, unknown or no permutation of its units.
    """
    odd = sorted(counts.keys() ^ perms.keys())
    if odd:
        raise InputError(f'permutations {", ".join(sorted(perms))} are given, {", ".join(counts)} are asked for; "{odd[0]}" is on one side only')
    for unit, n in counts.items():
        p = perms[unit]
        if p.is_floating_point() or p.shape != (n,) or not torch.equal(p.sort().values.cpu(), torch.arange(n, dtype=p.dtype)):
            raise InputError(f'permutation "{unit}" is no order of 0 to {n - 1}')
    return dict(perms)

"""Direction on real data: two networks fine-tuned from one base, each on half of the digits, merged without training."""

import copy
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.algebra.rules.pcb import competition_balanced
from exapt.algebra.rules.regmean import regression_mean_in_depth
from exapt.algebra.statistics import diagonal_fisher, gram_matrices, layer_scores, logit_distances, sensitivities, unit_norm
from exapt.algebra.tensors import merge_tensors

Split = tuple[Tensor, Tensor]


def trained(model: nn.Module, data: Split, steps: int, lr: float) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (64,))
        loss = F.cross_entropy(model(data[0][rows]), data[1][rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


class Halves:
    """The base, both experts, their data and the test set of all ten digits."""

    def __init__(self) -> None:
        datasets = pytest.importorskip("sklearn.datasets")
        torch.manual_seed(0)
        x, y = (torch.as_tensor(t) for t in datasets.load_digits(return_X_y=True))
        order = torch.randperm(len(x))
        x, y = x[order].float() / 16, y[order]
        self.test = x[1200:], y[1200:]
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.base = trained(net, (x[:100], y[:100]), 30, 1e-2)
        sets = [(x[:1200][own], y[:1200][own]) for own in (y[:1200] < 5, y[:1200] >= 5)]
        self.models = [trained(copy.deepcopy(self.base), s, 200, 2e-3) for s in sets]
        self.inputs, self.rows = [[s[0]] for s in sets], [[(s[0][:60], s[1][:60])] for s in sets]
        self.trees, self.still = [m.state_dict() for m in self.models], self.base.state_dict()

    def accuracy(self, found: nn.Module | Mapping[str, Tensor]) -> float:
        model = found if isinstance(found, nn.Module) else copy.deepcopy(self.base)
        if not isinstance(found, nn.Module):
            model.load_state_dict(found)
        with torch.no_grad():
            return float((model(self.test[0]).argmax(1) == self.test[1]).float().mean())


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves()


def test_regmean_beats_the_average_and_regmean_plusplus_regmean(halves: Halves) -> None:
    experts = [halves.accuracy(m) for m in halves.models]
    average = halves.accuracy(merge_tensors("average", halves.trees))
    grams = [gram_matrices(m, x) for m, x in zip(halves.models, halves.inputs, strict=True)]
    regmean = halves.accuracy(merge_tensors("regmean", halves.trees, statistics=grams))
    plusplus = halves.accuracy(regression_mean_in_depth(halves.models, halves.inputs))
    assert max(experts) < 0.6 < halves.accuracy(halves.base) < average  # each has forgotten the other's digits
    assert average + 0.01 < regmean <= plusplus


def test_statistics_of_real_models_serve_the_rules(halves: Halves) -> None:
    fishers = [unit_norm(diagonal_fisher(m, [x[0][:60]])) for m, x in zip(halves.models, halves.inputs, strict=True)]
    fisher = halves.accuracy(merge_tensors("fisher", halves.trees, statistics=fishers))
    nll = [sensitivities(m, rows, lambda net, b: F.cross_entropy(net(b[0]), b[1])) for m, rows in zip(halves.models, halves.rows, strict=True)]
    tau = logit_distances(halves.models, halves.inputs).tolist()
    sens = halves.accuracy(merge_tensors("sens_merging", halves.trees, halves.still, tau, statistics=[layer_scores(s) for s in nll], scale=0.5))
    assert min(fisher, sens) > max(halves.accuracy(m) for m in halves.models) + 0.2


@pytest.mark.parametrize("key", ["tsv", "iso_c", "iso_cts", "wudi", "widen"])
def test_rules_without_data_join_what_the_experts_know(halves: Halves, key: str) -> None:
    assert halves.accuracy(merge_tensors(key, halves.trees, halves.still)) > max(halves.accuracy(m) for m in halves.models) + 0.2


def test_pcb_joins_what_the_experts_know(halves: Halves) -> None:
    assert halves.accuracy(competition_balanced(halves.trees, halves.still)) > halves.accuracy(halves.base)

"""Compressed files: as small as their codes, read back as they were, refused where they are damaged; transforms; the search."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import exapt
from exapt.algebra.compress.codec import codec
from exapt.algebra.compress.compressing import compress, plain_bytes
from exapt.algebra.compress.file import coded, read_compressed, write_compressed
from exapt.algebra.compress.search import CANDIDATES, smallest
from exapt.core import file as core_file
from exapt.core.file import AdapterFile

KEYS = ("lossless", "cast", "bitdelta", "compeft", "precision_codebook", "uniform_groups")


class Net(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def base(width: int = 96) -> nn.Module:
    torch.manual_seed(5)
    return Net(width).eval()


def saved(path: Path, rules: Any = None, width: int = 96) -> Path:
    """An adapter away from its start; by default two LoRAs, a whole head and chosen entries of a weight."""
    rules = rules or {"first": exapt.LoRA(rank=4), "second": exapt.LoRA(rank=2, scaling="rs"), "head": exapt.method("full")}
    model = exapt.attach(base(width), rules)
    with torch.no_grad():
        for i, p in enumerate(exapt.trainable(model).values()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return exapt.save(model, path, metrics={"accuracy": 0.75}, provenance={"seed": 3})


def loaded(path: Path, file: AdapterFile, width: int = 96) -> nn.Module:
    return exapt.load(base(width), core_file.write(file, path))


def same(a: AdapterFile, b: AdapterFile) -> bool:
    return {k: v for k, v in vars(a).items() if k not in ("tensors", "codec")} == {k: v for k, v in vars(b).items() if k not in ("tensors", "codec")}


@pytest.mark.parametrize("key", KEYS)
def test_file_comes_back(key: str, tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))
    made = compress(source, key)
    found = read_compressed(made.save(tmp_path / "small"))
    assert same(found, source)
    assert found.tensors.keys() == source.tensors.keys()
    for k, t in source.tensors.items():
        assert (found.tensors[k].dtype, found.tensors[k].shape) == (t.dtype, t.shape)
        assert torch.equal(found.tensors[k], made.file.tensors[k])
        if key == "lossless" or k not in coded(source):
            assert torch.equal(found.tensors[k], t), k
    assert [k for k in source.tensors if "head" in k]
    assert not [k for k in coded(source) if "head" in k]
    assert (made.error == 0) == (key == "lossless")
    assert made.before == (tmp_path / "a.safetensors").stat().st_size == plain_bytes(source)
    assert made.bytes == (tmp_path / "small.safetensors").stat().st_size < made.before


def test_outputs_are_those_of_the_decoded_tensors(tmp_path: Path) -> None:
    path, x = saved(tmp_path / "a"), torch.randn(4, 96)
    exact = compress(path, "lossless")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "b", exact.file)(x), exapt.load(base(), path)(x))
        errors = [float((loaded(tmp_path / f"c{b}", compress(path, "uniform_groups", bits=b).file)(x) - exapt.load(base(), path)(x)).norm()) for b in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.skipif(not hasattr(core_file, "UNPACK"), reason="exapt.core.file does not read compressed files yet")
def test_load_reads_a_compressed_file_like_any_other(tmp_path: Path) -> None:
    path, x = saved(tmp_path / "a"), torch.randn(4, 96)
    made = compress(path, "compeft", density=0.2)
    small = made.save(tmp_path / "small.safetensors")
    model = exapt.load(base(), small)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(tmp_path / "b.safetensors", made.file)(x))
    assert exapt.read(small).codec == {"codec": "compeft", "density": 0.2, "alpha": None, "per": "adapter"}
    again = exapt.save(model, tmp_path / "again")
    assert not exapt.read(again).codec
    assert all(torch.equal(t, made.file.tensors[k]) for k, t in exapt.read(again).tensors.items())
    with pytest.raises(exapt.InputError, match="made for base"):
        exapt.load(Net().eval(), small)


def test_the_file_is_as_small_as_its_codes(tmp_path: Path) -> None:
    rules = {"first": exapt.LoRA(rank=32), "second": exapt.LoRA(rank=32)}
    source = exapt.read(saved(tmp_path / "a", rules, 256))
    n = sum(t.numel() for t in source.tensors.values())
    p = 0.05
    entropy = n * (p - p * np.log2(p) - (1 - p) * np.log2(1 - p)) / 8
    small = compress(source, "compeft", density=p).bytes
    assert entropy < small < 1.08 * entropy + 1000  # a thousand bytes of header
    assert n / 8 < compress(source, "bitdelta").bytes < n / 8 + 1000
    assert n / 4 < compress(source, "precision_codebook", bits=2).bytes < n / 4 + 1000
    assert compress(source, "compeft", density=p).ratio > 45


def test_indices_are_packed_without_loss(tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))
    index = torch.randperm(96 * 96, generator=torch.Generator().manual_seed(0))[:500].sort().values
    shuffled = index.flip(0).int()
    source.tensors |= {"0:first/index": index, "0:first/shuffled": shuffled, "0:first/signed": -index}
    source.manifest |= {k: [list(t.shape), False] for k, t in source.tensors.items() if k not in source.manifest}
    made = compress(source, "lossless")
    assert all(torch.equal(made.file.tensors[k], t) for k, t in source.tensors.items())
    assert made.file.tensors["0:first/shuffled"].dtype == torch.int32
    assert made.bytes < made.before - (8 + 4) * 500 + (1 + 2) * 500  # of eight bytes one is left, of four unordered ones two


def test_quantised_codes_take_their_bits(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", {"first": exapt.Quantised(exapt.LoRA(rank=32), bits=1)}, 256)
    made = compress(path, "lossless")
    n = 2 * 32 * 256
    assert n / 8 < made.bytes < n / 8 + 1200
    x = torch.randn(4, 256)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "b", made.file, 256)(x), exapt.load(base(256), path)(x))


def _changed(path: Path, **changes: Any) -> Path:
    """The file with other entries of its header."""
    with safe_open(path, framework="pt") as f:
        note, tensors = json.loads(f.metadata()["exapt"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    for k, v in changes.items():
        if isinstance(v, torch.Tensor):
            tensors[k] = v
        else:
            note[k] = v
    target = path.with_name("changed.safetensors")
    safetensors.torch.save_file(tensors, target, metadata={"exapt": json.dumps(note)})
    return target


@pytest.mark.parametrize("key", ["compeft", "precision_codebook", "lossless"])
def test_damaged_files_are_refused(key: str, tmp_path: Path) -> None:
    path = compress(saved(tmp_path / "a"), key).save(tmp_path / "b.safetensors")
    with safe_open(path, framework="pt") as f:
        note, stream = json.loads(f.metadata()["exapt"]), f.get_tensor("streams")
    wrong: list[dict[str, Any]] = [
        {"bytes": note["bytes"] - 1}, {"bytes": note["bytes"] + 5}, {"streams": stream[:-3]}, {"header": stream[:20]}, {"bytes": "many"},
        {"deflated": not note["deflated"]}, {"bytes": -1},
    ]  # fmt: skip
    if key != "lossless":
        wrong += [{"codec": {"codec": "of tomorrow"}}, {"codec": {"codec": key, "wide": 1}}, {"codec": {}}, {"codec": {"codec": "bitdelta"}}]
    for changes in wrong:
        with pytest.raises(exapt.InputError, match=r"changed\.safetensors: "):
            read_compressed(_changed(path, **changes))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(exapt.InputError, match="it is damaged, truncated"):
        read_compressed(path)


def test_flipped_bytes_never_do_worse_than_a_refusal(tmp_path: Path) -> None:
    path = compress(saved(tmp_path / "a"), "compeft").save(tmp_path / "b.safetensors")
    with safe_open(path, framework="pt") as f:
        parts = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        name = ("header", "streams")[int(rng.integers(2))]
        wrong = parts[name].clone()
        wrong[int(rng.integers(len(wrong)))] ^= int(rng.integers(1, 256))
        try:
            read_compressed(_changed(path, **{name: wrong}))
        except exapt.InputError:
            refused += 1
    assert refused > 20


def test_nan_is_named_before_anything_is_written(tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))
    source.tensors["0:first/A"][0, 0] = float("nan")
    with pytest.raises(exapt.InputError, match="0:first/A holds NaN"):
        write_compressed(source, tmp_path / "b", codec("compeft"))
    assert not (tmp_path / "b.safetensors").exists()


def updates(file: AdapterFile) -> dict[str, np.ndarray]:
    """Each site's update, in NumPy, by the formula of LoRA."""
    found = {}
    for i, rule in enumerate(file.rules):
        m = rule["method"]
        if m["method"] == "lora":
            for site in rule["sites"]:
                a, b = (file.tensors[f"{i}:{site}/{k}"].double().numpy() for k in ("A", "B"))
                found[site] = m["alpha"] / (m["rank"] ** 0.5 if m["scaling"] == "rs" else m["rank"]) * b @ a
    return found


@pytest.mark.parametrize(("settings", "ranks"), [({"error": 0.5}, None), ({"rank": 1}, [1, 1]), ({"error": 0.0}, [4, 2])])
def test_svd_truncation_is_the_best_of_its_rank_with_the_error_it_says(settings: dict[str, Any], ranks: list[int] | None, tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))
    made = compress(source, "svd_truncation", **settings)
    before, after = updates(source), updates(made.file)
    assert before.keys() == after.keys() == {"first", "second"}
    for site, delta in before.items():
        s = np.linalg.svd(delta, compute_uv=False)
        r = np.linalg.matrix_rank(after[site], tol=1e-6)
        assert np.linalg.norm(after[site] - delta) == pytest.approx(np.sqrt((s[r:] ** 2).sum()), rel=1e-4, abs=1e-6)
        assert made.errors[site] == pytest.approx(np.linalg.norm(after[site] - delta) / np.linalg.norm(delta), rel=1e-5, abs=1e-6)
        if settings.get("error"):
            assert np.sqrt((s[r:] ** 2).sum()) <= settings["error"] * np.linalg.norm(delta) < np.sqrt((s[r - 1 :] ** 2).sum())
    if ranks:
        assert sorted(rule["method"]["rank"] for rule in made.file.rules if rule["method"]["method"] == "lora") == sorted(ranks)[: len(made.file.rules) - 1]
    model, x = loaded(tmp_path / "b", made.file), torch.randn(3, 96)
    head = {k: t for k, t in source.tensors.items() if "head" in k}
    assert len([k for k, t in made.file.tensors.items() if "head" in k]) == len(head)
    if settings == {"error": 0.0}:
        with torch.no_grad():
            torch.testing.assert_close(model(x), exapt.load(base(), tmp_path / "a.safetensors")(x), rtol=1e-4, atol=1e-5)


def test_seeded_bases_are_nola_and_say_their_error(tmp_path: Path) -> None:
    rules = {"first": exapt.LoRA(rank=2), "head": exapt.method("full")}
    source = exapt.read(saved(tmp_path / "a", rules, 24))
    delta = updates(source)["first"]
    errors = []
    for k in (8, 48):
        made = compress(source, "seeded_bases", num_basis=k, rounds=30)
        model = loaded(tmp_path / f"b{k}", made.file, 24)  # checks the seeds' digests
        found = copy.deepcopy(model)
        exapt.merge(found)
        shift = (found.first.weight - base(24).first.weight).detach().double().numpy()
        assert np.linalg.norm(shift - delta) / np.linalg.norm(delta) == pytest.approx(made.errors["first"], rel=1e-3, abs=1e-4)
        errors.append(made.errors["first"])
    assert errors[1] < 1e-3 < errors[0] < 1  # as many matrices as numbers of a factor span it


def test_seeded_bases_find_what_they_span(tmp_path: Path) -> None:
    model = exapt.attach(base(), exapt.NOLA(rank=2, alpha=2.0, num_basis=6), where="first")
    with torch.no_grad():
        for i, p in enumerate(exapt.trainable(model).values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    merged = copy.deepcopy(model)
    exapt.merge(merged)
    u, s, v = torch.linalg.svd((merged.first.weight - base().first.weight).detach())
    lora = exapt.read(saved(tmp_path / "a", {"first": exapt.LoRA(rank=2, alpha=2.0)}))
    lora.tensors["0:first/A"], lora.tensors["0:first/B"] = v[:2].contiguous(), (u[:, :2] * s[:2]).contiguous()
    assert compress(lora, "seeded_bases", num_basis=6, rounds=200).errors["first"] < 0.1
    assert compress(lora, "seeded_bases", num_basis=6, rounds=200, seed=1).errors["first"] > 0.8


def test_methods_and_their_order_are_checked(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    ia3 = saved(tmp_path / "b", {"first": exapt.method("ia3")})
    for file, method, settings, said in (
        (path, "compft", {}, 'did you mean "compeft"'), (path, "svd_truncation", {"ranks": 1}, 'did you mean "rank"'),
        (path, "lossless", {"a": 1}, "no settings"),
        (path, [("cast", {}), ("bitdelta", {})], {}, '"cast" ends a compression'), (path, [("cast", {})], {"dtype": "float16"}, "settings beside them"),
        (ia3, "svd_truncation", {}, "this adapter has none"), (ia3, "seeded_bases", {}, "this adapter has none"),
        (path, "svd_truncation", {"error": 1.0}, "error=1.0"),
        (path, "seeded_bases", {"rounds": 0}, "rounds=0"), (tmp_path / "none", "cast", {}, "no such file"),
    ):  # fmt: skip
        with pytest.raises(exapt.InputError, match=said):
            compress(file, method, **settings)  # type: ignore[arg-type]


def test_search_finds_the_smallest_that_passes(tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))
    made = [compress(source, s) for s in CANDIDATES]

    def closeness(file: AdapterFile) -> float:
        both = updates(source), updates(file)
        return -max(float(np.linalg.norm(both[1][k] - both[0][k]) / np.linalg.norm(both[0][k])) for k in both[0])

    passing = [c.bytes for c in made if -closeness(c.file) <= 0.25]
    found = smallest(source, closeness, 0.25)
    assert found.found.bytes <= min(passing) <= max(c.bytes for c in made)
    assert found.drop <= 0.25
    assert found.interval is None
    own = [t.bytes for t in found.tried if "alpha" not in t.name]
    assert own == sorted(own)
    assert all(t.drop > 0.25 for t in found.tried[:-1])
    exact = smallest(source, closeness, 0.0)
    assert (exact.found.error, exact.drop) == (0.0, 0.0)


def test_search_tunes_alpha_where_the_default_fails(tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))

    def strength(file: AdapterFile) -> float:
        return float(file.tensors["0:first/B"].abs().max())  # an invented score that only a large alpha keeps

    found = smallest(source, strength, 0.01, [(("compeft", {"density": 0.1}),)])
    assert found.found.steps[-1][1]["alpha"] >= 2.0
    assert len(found.tried) > 1
    assert len({t.bytes // 40 for t in found.tried}) <= 2  # alpha does not change the size, but for its digits in the header


def test_search_walks_uphill_and_stops_where_it_falls(tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))
    sigma = float(torch.cat([t.flatten() for k, t in source.tensors.items() if k in coded(source)]).std())
    for best in (1.0, 3.0, 8.0):

        def near(file: AdapterFile, best: float = best) -> float:
            return 0.0 if file is source else -abs(float(file.tensors["0:first/B"].abs().max()) / sigma - best) - 1  # an invented score with one top

        found = smallest(source, near, 0.0, [(("compeft", {"density": 0.1}),)])
        alphas = [float(t.name.partition("alpha=")[2].rstrip(")")) for t in found.tried[1:]]
        assert max(found.tried[1:], key=lambda t: t.score).name.endswith(f"alpha={best})")
        assert len(alphas) == len(set(alphas)) < 9
        assert alphas[0] == 4.0


def test_search_takes_few_bits_of_a_low_rank_where_the_rest_is_noise(tmp_path: Path) -> None:
    model = exapt.attach(base(), {"first": exapt.LoRA(rank=8), "second": exapt.LoRA(rank=8)})
    with torch.no_grad():
        for i, p in enumerate(exapt.trainable(model).values()):
            p.mul_(0.0).add_(0.002 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            g, axes = torch.Generator().manual_seed(10 + i), torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(i // 2)))[0]
            (p if p.shape[0] == 8 else p.mT).add_(axes[:, :2] @ (0.3 * torch.randn(2, 96, generator=g)))  # of rank 2, along no axis
    source = exapt.read(exapt.save(model, tmp_path / "noisy"))
    dense = updates(source)

    def closeness(file: AdapterFile) -> float:
        new = updates(file)
        return -max(float(np.linalg.norm(new[k] - dense[k]) / np.linalg.norm(dense[k])) for k in dense)

    found = smallest(source, closeness, 0.3)
    assert [k for k, _ in found.found.steps] == ["svd_truncation", "uniform_groups"]
    assert found.found.steps[0][1].get("rank", 2) == 2
    one_step = [s for s in CANDIDATES if len(s) == 1]
    assert found.found.bytes < 0.7 * smallest(source, closeness, 0.3, one_step).found.bytes


def test_search_gives_the_drop_an_interval_over_rows(tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))
    rng = np.random.default_rng(0)
    right, lost = (rng.random(400) < 0.9).astype(float), rng.random(400) < 0.03

    def rows(file: AdapterFile) -> np.ndarray:
        return right if file is source else np.where(lost, 0.0, right)

    found = smallest(source, rows, 0.1, [(("compeft", {}),)])
    assert found.score == pytest.approx(right.mean())
    assert found.drop == pytest.approx((right * lost).mean())
    low, high = found.interval or (0, 0)
    se = (right * lost).std() / 20
    assert (found.drop - low, high - found.drop) == pytest.approx((1.96 * se, 1.96 * se), rel=0.3)
    strict = smallest(source, rows, found.drop + 1e-9, [(("compeft", {"alpha": 1.0}),)], certain=True)
    assert strict.found.steps[-1][0] == "lossless"


def test_search_refuses_scores_that_are_none(tmp_path: Path) -> None:
    source = exapt.read(saved(tmp_path / "a"))
    for score, options, said in (
        (lambda f: float("nan"), {}, "a score is a finite number"), (lambda f: [], {}, "a score is a finite number"),
        (lambda f: 1.0, {"certain": True}, "score for each row"),
        (lambda f: [1.0] * (2 + (f is source)), {}, "the same rows"), (lambda f: 1.0, {"max_drop": -1}, "max_drop is -1"),
        (lambda f: 1.0, {"candidates": [(("compft", {}),)]}, "none of 1 candidates fits"),
    ):  # fmt: skip
        with pytest.raises(exapt.InputError, match=said):
            smallest(source, score, **{"max_drop": 0.1, **options})  # type: ignore[arg-type]

"""HyperTuning: a hypermodel reads examples and emits the adapter (Phang et al., ICML 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError


@component("hypertuning", kind="hypernetwork", paper="HyperTuning: Toward Adapting Large Language Models without Back-propagation")
class HyperTuning(nn.Module):
    r"""Emits prefixes or LoRAs from encoded few-shot examples: a decoder turns learned token embeddings into one state for each prefix token,
    or each component of the rank, and small networks turn the states into that token's keys and values, or that component's factors:

    .. math:: [s_1 \dots s_n] = \mathrm{Decoder}([e_1 \dots e_n], \mathrm{Encoder}(\text{examples})), \qquad
        \theta_{k, i} = W_k^{(2)} \tanh(W_k^{(1)} s_i + b_k^{(1)}) + b_k^{(2)}

    :math:`\theta_{k,i}` is the i-th slice of the adapter's tensor k along its token axis, of size n: a row of ``A``, a column of ``B``, a key
    or a value. The encoder is any model that makes states of the examples (the paper's is T5's, and its decoder T5's; here it is a plain
    transformer decoder). It trains by the downstream model's loss on the examples' task,
    through :func:`~exapt.algebra.hyper.emitted.call_with`, after a pretraining on plain text cut by :func:`segments`. What it emits also starts
    fine-tuning (:func:`~exapt.algebra.hyper.emitted.install`).

    Args:
        targets: The adapter's tensors, ``exapt.trainable(model)``.
        tokens: Number n of states: the prefix's length, or the rank.
        width: Features of the encoded examples.
        hidden: Width of the networks that emit.
        layers: Layers of the decoder.
        heads: Its heads.
        around: Whether the adapter's present values are added, so that it starts from them: the last layers start at zero.

    Raises:
        InputError: for a tensor without an axis of that size.

    References:
        Phang, Mao, He and Chen, "HyperTuning: Toward Adapting Large Language Models without Back-propagation", ICML 2023.

    >>> import exapt
    >>> model = exapt.attach(nn.Linear(4, 3), exapt.LoRA(rank=2), where="all")
    >>> hyper = HyperTuning(exapt.trainable(model), tokens=2, width=8, heads=2)
    >>> {n: tuple(t.shape) for n, t in hyper(torch.randn(5, 8)).items()}
    {'exapt.default.A': (2, 4), 'exapt.default.B': (3, 2)}
    """

    def __init__(
        self, targets: Mapping[str, Tensor], tokens: int, width: int, *, hidden: int = 64, layers: int = 2, heads: int = 4, around: bool = True
    ) -> None:
        super().__init__()
        self.names, self.axes, self.shapes = list(targets), [], [tuple(t.shape) for t in targets.values()]
        self.emitters = nn.ModuleList()
        for name, t in targets.items():
            axis = next((i for i, n in enumerate(t.shape) if n == tokens), None)
            if axis is None:
                raise InputError(f"hypertuning: {name} of shape {tuple(t.shape)} has no axis of {tokens} tokens; give its rank or prefix length")
            self.axes.append(_axis(name, t, tokens, axis))
            last = nn.Linear(hidden, t.numel() // tokens)
            if around:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            self.emitters.append(nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), last))
        for i, t in enumerate(targets.values()):
            self.register_buffer(f"start_{i}", t.detach().clone() if around else torch.zeros_like(t))
        self.tokens = nn.Parameter(torch.randn(tokens, width))
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        """Emits the adapter.

        Args:
            states: Encoded examples (n, width), of all of them one after the other.

        Returns:
            Tensors by their names in the model.
        """
        s = self.decoder(self.tokens[None], states[None])[0]
        emitted = {}
        for i, (name, axis, shape, emitter) in enumerate(zip(self.names, self.axes, self.shapes, self.emitters, strict=True)):
            rest = [n for k, n in enumerate(shape) if k != axis]
            emitted[name] = self.get_buffer(f"start_{i}") + emitter(s).view(-1, *rest).movedim(0, axis)
        return emitted


def _axis(name: str, t: Tensor, tokens: int, first: int) -> int:
    """The token axis; a square factor ``B`` (d_out, r) has it last."""
    return t.dim() - 1 if t.shape[-1] == tokens and name.endswith(".B") else first


def segments(ids: Tensor, prompt: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts plain text for the pretraining (context-augmented conditional language modelling): what lies around goes to the hypermodel, the
    downstream model sees the second part and learns to continue with the third.

    Args:
        ids: Token ids (length,).
        prompt: Tokens that the downstream model sees.
        target: Tokens that it is to continue with.

    Returns:
        The first and the last part, joined, for the hypermodel; the prompt; the target.

    Raises:
        InputError: for a text that leaves the hypermodel nothing.

    >>> [part.tolist() for part in segments(torch.arange(8), 2, 2)]
    [[0, 1, 6, 7], [2, 3], [4, 5]]
    """
    around = len(ids) - prompt - target
    if around < 2 or min(prompt, target) < 1:
        raise InputError(f"segments: a text of {len(ids)} tokens cannot be cut to a prompt of {prompt}, a target of {target} and two parts around them")
    a = around // 2
    b, c = a + prompt, a + prompt + target
    return torch.cat([ids[:a], ids[c:]]), ids[a:b], ids[b:c]

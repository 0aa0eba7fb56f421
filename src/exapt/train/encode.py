"""From values in rows to tensors: tokens padded to the longest of a batch, images normalised, labels counted."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.errors import InputError, did_you_mean


def tokenizer_of(given: Any) -> Any:
    """A tokenizer as it is, or loaded from its folder or name."""
    if not isinstance(given, (str, os.PathLike)):
        return given
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise InputError('loading a tokenizer needs transformers; pip install "exapt[hf]"') from e
    try:
        return AutoTokenizer.from_pretrained(given)
    except (OSError, ValueError) as e:
        raise InputError(f"{given}: no tokenizer could be loaded from it ({str(e).splitlines()[0]})") from e


def encode(tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    """Texts to tensors (batch, longest)."""
    return pad(tokenizer(texts, truncation=True, max_length=max_length), tokenizer)


def pad(encoded: Mapping[str, Any], tokenizer: Any) -> dict[str, Tensor]:
    """Lists of different lengths to tensors (batch, longest), padded on the right; a mask is added where there is none."""
    lists = {k: v for k, v in encoded.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    ids = lists["input_ids"]
    lists.setdefault("attention_mask", [[1] * len(row) for row in ids])
    longest = max(map(len, ids))
    filler = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0}
    return {k: torch.tensor([[*row, *[filler.get(k, 0)] * (longest - len(row))] for row in rows]) for k, rows in lists.items()}


def label_index(labels: Sequence[str], value: Any, number: int, column: str) -> int:
    """The place of a label: by its name, or a whole number as the place itself."""
    if isinstance(value, (Tensor, np.generic)):
        value = value.item()
    text = str(value)
    if text in labels:
        return labels.index(text)
    try:
        place = operator.index(value)
    except TypeError:
        place = -1
    if isinstance(value, bool) or not 0 <= place < len(labels):
        shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        raise InputError(f'row {number}: the {column} "{text}" is not one of the task\'s labels{did_you_mean(text, labels)} (they are {shown})')
    return place


def pixels(image: Any, number: int, mean: Sequence[float], std: Sequence[float], size: int | None) -> Tensor:
    """An image as a normalised (C, H, W) tensor of floats."""
    if isinstance(image, (str, os.PathLike)):
        from PIL import Image

        try:
            with Image.open(image) as opened:
                image = np.asarray(opened.convert("RGB"))
        except OSError as e:
            raise InputError(f"row {number}: {image} is not a readable image ({e})") from e
    x = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if x.dim() == 2:
        x = x[None]
    elif x.dim() == 3 and (x.dtype == torch.uint8 or x.shape[0] not in (1, 3, 4)) and x.shape[-1] in (1, 3, 4):
        x = x.movedim(-1, 0)
    if x.dim() != 3:
        raise InputError(f"row {number}: an image has height, width and channels; this has the shape {tuple(x.shape)}")
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if size is not None and x.shape[-2:] != (size, size):
        x = F.interpolate(x[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    centre, spread = torch.tensor(mean), torch.tensor(std)
    if len(centre) != x.shape[0] or len(spread) != x.shape[0]:
        if x.shape[0] != 1 or len(set(mean)) > 1 or len(set(std)) > 1:
            raise InputError(f"row {number}: the image has {x.shape[0]} channels, mean and std have {len(centre)} and {len(spread)}")
        centre, spread = centre[:1], spread[:1]
    return (x - centre[:, None, None]) / spread[:, None, None]

"""Steps of random graphs: stacks of matrices and Einsum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder


def stack(b: Builder) -> bool:
    """A product with a constant of three or four axes, on either side."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    shape = b.shape(x)
    batch = [size if b.choose.chance(0.7) else 1 for size in shape[:-2]]
    if not batch or (all(size == 1 for size in batch) and b.choose.chance(0.7)):
        batch = [b.choose.integer(2, 3)]
        if b.rank(x) == 4 or (b.rank(x) == 3 and shape[0] not in {1, batch[0]}):
            return False
    out, front = b.choose.integer(2, 6), b.choose.chance(0.3)
    inner = shape[-2] if front else shape[-1]
    matrix = (out, inner) if front else (inner, out)
    axis = len(batch)
    weight = b.weight((*batch, *matrix), inner, out=axis + (not front), column=axis + front)
    if b.choose.chance(0.5):  # other channels for each matrix
        array = (b.random.standard_normal((*batch, *matrix)) / np.sqrt(inner)).astype(np.float32)
        for place in np.ndindex(*batch):
            array[place][b.dead(out) if front else (slice(None), b.dead(out))] = 0
        weight = b.initializer(array)
    return b.add(b.emit("MatMul", [weight, x] if front else [x, weight]))


def einsum(b: Builder) -> bool:
    """An equation with a constant, or of two computed tensors, or of one."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    letters, shape = "abcd"[: b.rank(x)], b.shape(x)
    kind = b.choose.integer(0, 2)
    if kind == 0:
        turned = "".join(b.random.permutation(list(letters)))
        return b.add(b.emit("Einsum", [x], equation=f"{letters}->{turned}"))
    if kind == 1:
        y = b.choose.one_of([name for name in b.pool if b.shape(name) == shape])
        other = f"{letters[:-2]}e{letters[-1]}"
        # letters that both have are contracted, too, or stay
        both = [letter for letter in letters[:-2] if b.choose.chance(0.7)]
        out = "".join(b.random.permutation([*both, letters[-2], "e"]))
        return b.add(b.emit("Einsum", [x, y], equation=f"{letters},{other}->{out}"))
    sizes = dict(zip(letters, shape, strict=True)) | {"o": b.choose.integer(2, 6)}
    shared = [letter for letter in letters[:-1] if b.choose.chance(0.3)]
    own = [str(item) for item in b.random.permutation([*shared, letters[-1], "o"])]
    out = b.random.permutation([*letters[:-1], "o"])
    weight = b.weight(
        tuple(sizes[letter] for letter in own),
        shape[-1],
        out=own.index("o"),
        column=own.index(letters[-1]),
    )
    return b.add(b.emit("Einsum", [x, weight], equation=f"{letters},{''.join(own)}->{''.join(out)}"))


STEPS = (stack, einsum)

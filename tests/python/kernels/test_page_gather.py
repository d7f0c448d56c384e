"""The kernel that lays live tokens of pages one behind the other, in the interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_gather import page_gather, page_gather_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(counts, dim=64, dtype=torch.float32, seed=0, width=1):
    """Pages of heads: their memory (rows of `width` keys and values), words, starts, and the table of the reference."""
    generator = torch.Generator().manual_seed(seed)
    n_pages = sum(counts) + 3
    memory = torch.randn(n_pages, width * 2 * 16 * dim, generator=generator).to(dtype)
    if DEVICE == "cuda":
        memory = memory.pin_memory()
    order = iter(torch.randperm(n_pages, generator=generator).tolist())
    table, words, starts = [], [], []
    for n in counts:
        lives = [int(torch.randint(1, 1 << 16, (), generator=generator)) for _ in range(n)]
        lives[1::3] = [0xFFFF] * len(lives[1::3])
        table.append([(next(order), live) for live in lives])
        before = 0
        for page, live in table[-1]:
            address = memory.data_ptr() + page * memory[0].numel() * memory.element_size()
            words.append((live << 48 | address) - (1 << 64 if live >> 15 else 0))
            starts.append(before)
            before += live.bit_count()
    tensors = torch.tensor(words, device=DEVICE), torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    return memory, *tensors, table


def spans(table, first, n_tokens):
    """Pages of each head that hold tokens ``first .. first + n_tokens``, and rows of the heads before."""
    out, base = [], 0
    for words in table:
        ends = torch.tensor([live.bit_count() for _, live in words]).cumsum(0)
        out.append([base + int((ends <= first).sum()), base + int((ends < first + n_tokens).sum()) + 1])
        base += len(words)
    return torch.tensor(out, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "pages_at_once"), [(64, 4), (80, 1), (128, 8)])
def test_live_tokens_come_out_one_behind_the_other_bit_for_bit(dim, pages_at_once, dtype):
    memory, words, starts, table = make([6, 9], dim, dtype)
    first, n = 11, 35
    keys, values = (torch.full((2, n, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    page_gather(words, starts, spans(table, first, n), keys, values, first, pages_at_once=pages_at_once, programs=6)
    expected = page_gather_ref(memory.view(-1, 2, 16, dim), table, first, n)
    assert torch.equal(keys.cpu(), expected[0])
    assert torch.equal(values.cpu(), expected[1])


def test_pieces_are_the_whole_and_nothing_outside_of_a_piece_is_written():
    memory, words, starts, table = make([6, 6])
    total = min(sum(live.bit_count() for _, live in head) for head in table)
    room = torch.full((2, 2, total + 6, 64), 7.0, device=DEVICE)
    for first in range(0, total, 17):
        n = min(17, total - first)
        piece = room[:, :, 3 + first : 3 + first + n]
        page_gather(words, starts, spans(table, first, n), piece[0], piece[1], first, pages_at_once=2)
    expected = page_gather_ref(memory.view(-1, 2, 16, 64), table, 0, total)
    assert torch.equal(room[:, :, 3 : 3 + total].cpu(), torch.stack(expected))
    assert (room[:, :, :3] == 7).all()
    assert (room[:, :, 3 + total :] == 7).all()


def test_keys_and_values_may_lie_anywhere_in_the_rows_of_a_page():
    """Rows ``[K0]`` and then ``[V0 | K1 | V1]``: a layer that shares the pages of another one."""
    memory, words, starts, table = make([5, 6], width=2)
    d, n = 64, 30
    keys, values = (torch.zeros(2, n, d, device=DEVICE) for _ in range(2))
    strides = (16 * d + d, 3 * d, 16 * d + 2 * d, 3 * d)
    page_gather(words, starts, spans(table, 0, n), keys, values, 0, page_strides=strides, pages_at_once=2)
    rows = memory[:, 16 * d :].view(-1, 16, 3 * d)
    own = torch.stack([rows[..., d : 2 * d], rows[..., 2 * d :]], 1)
    expected = page_gather_ref(own, table, 0, n)
    assert torch.equal(keys.cpu(), expected[0])
    assert torch.equal(values.cpu(), expected[1])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: (c[0].int(), *c[1:]), "words"),
        (lambda c: (c[0], c[1][1:], *c[2:]), "starts"),
        (lambda c: (*c[:2], c[2][:1], *c[3:]), "spans"),
        (lambda c: (*c[:3], c[3].transpose(1, 2), c[4].transpose(1, 2)), "keys"),
        (lambda c: (*c[:4], c[4].half()), "values"),
    ],
)
def test_a_wrong_argument_is_named(change, name):
    _, words, starts, table = make([4, 4])
    keys = torch.zeros(2, 8, 64, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{name}:"):
        page_gather(*change((words, starts, spans(table, 0, 8), keys, keys.clone())), 0)

"""The mailbox kernels with a thread as the other side."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from icecache.kernels.mailbox import mailbox_post, mailbox_wait

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATIENCE_S = 30.0


def _host(*shape, dtype=torch.int32):
    return torch.zeros(*shape, dtype=dtype, pin_memory=DEVICE == "cuda")


def _word(value, *, on_host=False):
    word = torch.tensor([value], dtype=torch.int32)
    return word.pin_memory() if on_host and DEVICE == "cuda" else word if on_host else word.to(DEVICE)


def _sync():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 4, 128), (3, 2, 7, 80)])
def test_a_post_delivers_the_queries_and_then_the_ticket(shape, dtype):
    q = torch.randn(shape).to(dtype).to(DEVICE)
    box, request = _host(*shape, dtype=dtype), _host(1)
    mailbox_post(q, box, request, _word(7))
    _sync()
    assert request.item() == 7
    assert torch.equal(box, q.cpu())


def test_an_answer_that_is_there_is_copied_without_waiting():
    answer = _host(2, 3, 5, dtype=torch.int64)
    answer.copy_(torch.arange(30).view(2, 3, 5) << 40)
    table, timeout = torch.zeros(2, 3, 5, dtype=torch.int64, device=DEVICE), _host(1)
    mailbox_wait(_word(9, on_host=True), answer, timeout, _word(9), table, max_polls=0)
    _sync()
    assert torch.equal(table.cpu(), answer)
    assert timeout.item() == 0


@pytest.mark.parametrize("stale", [0, 8, 10, -(2**31)])
def test_without_the_answer_to_this_ticket_the_wait_ends_and_the_table_stays(stale):
    answer, timeout = _host(1, 2, 4, dtype=torch.int64), _host(1)
    table = torch.full((1, 2, 4), 5, dtype=torch.int64, device=DEVICE)
    mailbox_wait(_word(stale, on_host=True), answer, timeout, _word(9), table, max_polls=20)
    _sync()
    assert timeout.item() == 9
    assert (table == 5).all()


def _answer(box, request, answered, answer, tickets):
    """A worker: for each ticket, answer with the first query element, then publish."""
    deadline = time.monotonic() + PATIENCE_S
    for ticket in tickets:
        while request.item() != ticket:
            if time.monotonic() > deadline:
                return
            time.sleep(0)
        answer.fill_(int(box.flatten()[0]))
        answered.fill_(ticket)


def test_a_worker_answers_round_after_round():
    """In the interpreter the two sides alternate: post, let the thread answer, wait."""
    box, request, answered = _host(1, 2, 2, 16, dtype=torch.float32), _host(1), _host(1)
    answer, timeout = _host(1, 2, 4, dtype=torch.int64), _host(1)
    table = torch.zeros(1, 2, 4, dtype=torch.int64, device=DEVICE)
    tickets = list(range(1, 9))
    worker = threading.Thread(target=_answer, args=(box, request, answered, answer, tickets))
    worker.start()
    for ticket in tickets:
        q, word = torch.full((1, 2, 2, 16), float(100 + ticket), device=DEVICE), _word(ticket)
        mailbox_post(q, box, request, word)
        mailbox_wait(answered, answer, timeout, word, table, max_polls=10**6)
        _sync()
        assert timeout.item() == 0
        assert (table == 100 + ticket).all()
    worker.join(PATIENCE_S)
    assert not worker.is_alive()


def test_a_wrong_argument_is_named():
    q, box, word = torch.zeros(1, 2, 2, 16, device=DEVICE), _host(1, 2, 2, 8), _word(1)
    with pytest.raises(ValueError, match=r"^box:"):
        mailbox_post(q, box, _host(1), word)
    with pytest.raises(ValueError, match=r"^request:"):
        mailbox_post(q, _host(*q.shape, dtype=q.dtype), _host(1, dtype=torch.int64), word)
    table = torch.zeros(1, 2, 4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"^answer:"):
        mailbox_wait(_host(1), _host(1, 2, 3, dtype=torch.int64), _host(1), word, table)


@pytest.mark.gpu
def test_rounds_inside_a_captured_graph_reach_a_worker():
    n_layers, steps = 8, 20
    box, request, answered = _host(1, 2, 2, 16, dtype=torch.float32), _host(1), _host(1)
    answer, timeout = _host(1, 2, 4, dtype=torch.int64), _host(1)
    q = torch.zeros(1, 2, 2, 16, device=DEVICE)
    tables = [torch.zeros(1, 2, 4, dtype=torch.int64, device=DEVICE) for _ in range(n_layers)]
    ticket = _word(0)

    def rounds():
        for table in tables:
            ticket.add_(1)
            q.copy_(ticket.float().expand_as(q))
            mailbox_post(q, box, request, ticket)
            mailbox_wait(answered, answer, timeout, ticket, table)

    answered.fill_(1)  # loads the kernels before anything has to wait for them
    rounds()
    _sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rounds()
    ticket.zero_(), request.zero_(), answered.zero_(), timeout.zero_()
    _sync()
    tickets = range(1, n_layers * steps + 1)
    worker = threading.Thread(target=_answer, args=(box, request, answered, answer, tickets))
    worker.start()
    for step in range(steps):
        graph.replay()
        _sync()
        assert timeout.item() == 0
        assert [int(table[0, 0, 0]) for table in tables] == list(range(step * n_layers + 1, (step + 1) * n_layers + 1))
    worker.join(PATIENCE_S)

import http.server
import json
import threading

import numpy as np
import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.distillation.cached import Cached, FromModel
from quant_methods.distillation.heads import Head
from quant_methods.distillation.in_memory import InMemory
from quant_methods.distillation.served import Served
from quant_methods.training.losses import buckets, forward_kl

TOKENS = torch.randint(4, 8000, (5, 12), generator=torch.Generator().manual_seed(0))
VOCABULARY = 8192


@pytest.fixture(scope="module")
def memory(teacher):
    return InMemory(teacher, "cpu")


@pytest.fixture(scope="module")
def logits(memory):
    with torch.no_grad():
        return memory.model(TOKENS).logits[:, :-1]


def cached(folder, memory, **changes):
    settings = {"k": 7, "temperatures": (1.0, 2.0), "vocabulary": VOCABULARY, "description": {"teacher": "tiny"}}
    return Cached(folder, FromModel(memory, "tiny"), TOKENS, **{**settings, **changes})


def pairs(*teachers):
    return list(zip(*(teacher.targets(torch.arange(5), TOKENS).rows for teacher in teachers), strict=True))


def other_logits(rows):
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_in_memory_says_what_the_model_does(memory, logits, temperature):
    targets = memory.targets(torch.tensor([2, 4]), TOKENS[[2, 4]])
    student = other_logits(22)
    found, own = targets.pair(student, temperature, *targets.rows)
    torch.testing.assert_close(found, (logits[[2, 4]].flatten(0, 1) / temperature).log_softmax(-1))
    torch.testing.assert_close(own, (student / temperature).log_softmax(-1))


def test_a_head_that_does_more_than_multiply_is_left_with_its_model(memory):
    assert memory.head.apart
    logits = memory.model(TOKENS[:1]).logits
    real = type(memory.model).forward

    def capped(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(memory.model), "forward", capped)
        head = Head(memory.model)
        assert not head.apart
        with head.removed():
            states = memory.model(TOKENS[:1]).logits
        torch.testing.assert_close(head.logits(states), 2 * torch.tanh(logits / 2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_says_the_same_of_its_tokens_and_of_the_rest(tmp_path, memory, logits, temperature):
    teacher = cached(tmp_path, memory)
    targets = teacher.targets(torch.tensor([3, 1]), TOKENS[[3, 1]])
    student = other_logits(22)
    found, own = targets.pair(student, temperature, *targets.rows)
    whole = (logits[[3, 1]].flatten(0, 1) / temperature).log_softmax(-1)
    ids = whole.topk(7).indices
    # Log-probabilities are kept in 16 bits.
    torch.testing.assert_close(found, buckets(whole, ids), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(22))
    torch.testing.assert_close(own, buckets((student / temperature).log_softmax(-1), ids))
    exact = forward_kl(whole, (student / temperature).log_softmax(-1))
    assert (forward_kl(found, own) <= exact + 0.01).all()


def test_a_cache_has_the_size_that_it_states_and_is_read_again(tmp_path, memory):
    first = cached(tmp_path, memory)
    first.fill(first.missing)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) == first.shape.size
    again = cached(tmp_path, memory)
    assert not again.missing
    again.producer = None
    assert all(torch.equal(one, two) for one, two in pairs(first, again))


def test_a_cache_that_was_being_written_asks_again_for_what_it_lacks(tmp_path, memory):
    cached(tmp_path, memory).fill([0, 1, 2])
    done = np.memmap(tmp_path / "done.bin", np.uint8, "r+")
    assert list(done) == [1, 1, 1, 0, 0]
    ids = np.memmap(tmp_path / "ids.bin", np.uint16, "r+")
    ids[-7 * 11 :] = 5  # Half a sequence was written, and its mark was not.
    ids.flush()
    again = cached(tmp_path, memory)
    assert again.missing == [3, 4]
    fresh = cached(tmp_path / "fresh", memory)
    assert all(torch.equal(one, two) for one, two in pairs(again, fresh))


def test_a_cache_of_something_else_is_refused_and_left_alone(tmp_path, memory):
    cached(tmp_path, memory).fill([0])
    with pytest.raises(ParetoError, match=r"another teacher, text or --top-k gave \(k differs"):
        cached(tmp_path, memory, k=8)
    assert cached(tmp_path, memory).missing == [1, 2, 3, 4]
    with pytest.raises(ParetoError, match="not between 1 and the vocabulary's 8,192"):
        cached(tmp_path / "other", memory, k=0)
    with pytest.raises(ParetoError, match="temperature of 4"):
        cached(tmp_path, memory).check((1.0, 4.0), hidden=False)
    with pytest.raises(ParetoError, match="hidden states are not kept"):
        cached(tmp_path, memory).check((1.0,), hidden=True)


@pytest.fixture
def server(memory):
    """Answers as vLLM does: the k most likely tokens, and the one that follows if it is not among them."""

    class Handler(http.server.BaseHTTPRequestHandler):
        asked = 0

        def log_message(self, *args):
            pass

        def say(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.say(200, {"data": [{"id": "tiny"}]})

        def do_POST(self):
            Handler.asked += 1
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            k = body["prompt_logprobs"]
            if k > 20:
                self.say(400, {"error": {"message": "Requested prompt logprobs of 21, greater than max allowed: 20"}})
                return
            tokens = torch.tensor([body["prompt"]])
            with torch.no_grad():
                whole = memory.model(tokens).logits[0].log_softmax(-1)
            found = [None]
            for row, following in zip(whole[:-1], tokens[0, 1:].tolist(), strict=True):
                order = row.argsort(descending=True).tolist()
                chosen = order[:k] + [following] * (following not in order[:k])
                found.append({str(t): {"logprob": row[t].item(), "rank": order.index(t) + 1} for t in chosen})
            self.say(200, {"choices": [{"prompt_logprobs": found}]})

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", Handler
    listening.shutdown()
    listening.server_close()


def test_a_served_teacher_says_what_one_in_memory_does_and_is_asked_once(tmp_path, memory, server):
    url, handler = server
    served = Served(url + "/v1")
    options = {"k": 7, "temperatures": (1.0,), "vocabulary": VOCABULARY, "description": served.description}
    teacher = Cached(tmp_path / "served", served, TOKENS, **options)
    own = cached(tmp_path / "own", memory, temperatures=(1.0,))
    for _ in range(2):
        rows = [x.targets(torch.arange(5), TOKENS).rows for x in (teacher, own)]
        assert torch.equal(rows[0][0], rows[1][0])
        torch.testing.assert_close(rows[0][1], rows[1][1], rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(rows[0][2], rows[1][2], rtol=1e-3, atol=1e-4)
    assert handler.asked == 5


def test_what_a_server_cannot_say_is_told_in_one_line(tmp_path, server):
    url, _ = server
    with pytest.raises(ParetoError, match="give --temperature 1"):
        Served(url).top(TOKENS[:1], 5, (1.0, 2.0))
    with pytest.raises(ParetoError, match=r"HTTP 400: .*max allowed: 20.*; start the server with --max-logprobs"):
        Served(url).top(TOKENS[:1], 21, (1.0,))
    with pytest.raises(ParetoError, match="is a vLLM server running there"):
        Served("http://127.0.0.1:9")

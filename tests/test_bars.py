"Progress bars: late, only where somebody watches, and gone at the end; messages where there is no fastai"
import io, logging, sys

import pytest, torch
from torch import nn

from fasterai_clone.all import Sparsifier
from fasterai_clone.core import bars
from fasterai_clone.core.log import log_text
from fasterai_clone.prune.thin import thin
from fasterai_clone.sparse.batches import batches
from fasterai_clone.sparse.tickets_callback import find_ticket
from helpers import learner

class Terminal(io.StringIO):
    encoding = 'utf-8'
    def isatty(self): return True

def shown(monkeypatch, out, seconds=0.):
    monkeypatch.setattr(bars, 'SECONDS', seconds)
    monkeypatch.setattr(sys, 'stdout', out)
    made = []
    class Bar:
        def __init__(self, seen): self.seen = seen
        def update(self, i): self.seen.append(i)
        def on_iter_end(self): self.seen.append('end')
    def bar(total, what):
        made.append((total, what, []))
        return Bar(made[-1][2])
    monkeypatch.setattr(bars, 'new_bar', bar)
    return made

def test_a_long_loop_on_a_terminal_has_a_bar(monkeypatch):
    made = shown(monkeypatch, Terminal(), -1.)
    assert [*bars.with_bar('abc', 'Reading')] == ['a', 'b', 'c'] and made == [(3, 'Reading', [1, 2, 'end'])]
    assert [*bars.with_bar(iter('ab'), 'Reading', 2)] == ['a', 'b'] and made[1][0] == 2
    assert bars.length(iter('ab')) is None

@pytest.mark.parametrize('why', ['short', 'no terminal', 'switched off'])
def test_no_bar(why, monkeypatch):
    made = shown(monkeypatch, io.StringIO() if why == 'no terminal' else Terminal(), 60. if why == 'short' else -1.)
    if why == 'switched off': monkeypatch.setenv('FASTERAI_CLONE_PROGRESS', '0')
    assert [*bars.with_bar('abc', 'Reading')] == ['a', 'b', 'c'] and not made

def test_a_loop_that_is_left_early_ends_its_bar(monkeypatch):
    made  = shown(monkeypatch, Terminal(), -1.)
    found = batches([(torch.ones(2), torch.ones(1))]*2, torch.device('cpu'))
    next(found)
    found.close()
    assert made == [(2, 'Reading batches', ['end'])]

def test_steps_can_pause_for_a_line(monkeypatch):
    "... and never count further than their total"
    made = shown(monkeypatch, Terminal(), -1.)
    with bars.Steps(3, 'Training') as steps:
        steps.to(1)
        steps.pause()
        assert steps.bar is None
        steps.to(2)
        steps.to(9)
    assert [m[2] for m in made] == [[1, 'end'], [2, 3, 'end']]

def net(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

def test_tracing_and_thinning_show_the_layers_that_have_run(monkeypatch):
    made, model, x = shown(monkeypatch, Terminal(), -1.), net(), torch.randn(2, 1, 8, 8)
    with torch.no_grad(): model[0].weight[:2], model[0].bias[:2] = 0, 0
    assert thin(model, x)[0].out_channels == 2
    assert made == [(5, 'Tracing', [1, 2, 3, 4, 5, 'end'])] + [(5, 'Comparing outputs', [1, 2, 3, 4, 5, 'end'])]*4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_a_model_that_fails_ends_its_bar(monkeypatch):
    made = shown(monkeypatch, Terminal(), -1.)
    with pytest.raises(ValueError, match='does not run on `example_inputs`'): thin(net(), torch.randn(2, 1, 9, 9))
    assert made == [(5, 'Tracing', [1, 2, 3, 'end'])]

def test_a_search_for_a_ticket_counts_the_steps_of_all_runs(monkeypatch):
    out, learn = Terminal(), learner()
    made, n = shown(monkeypatch, out, -1.), len(learn.dls.train)
    find_ticket(learn, 2, sparsity=50, rounds=1, controls='random', seed=0)
    assert {m[:2] for m in made} == {(3*2*n, 'Training')} and 'Tracing' not in out.getvalue()
    assert [i for m in made for i in m[2] if i != 'end'] == [*range(1, 6*n + 1)]
    assert [m[2][-1] for m in made] == ['end']*3  # a bar for each line that is printed
    del made[:]
    find_ticket(learn, 1, sparsity=50, rounds=1, controls=(), seed=0, verbose=False)
    assert made == []

def test_the_real_bar_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(bars, 'SECONDS', -1.)
    out = Terminal()
    monkeypatch.setattr(sys, 'stdout', out)
    assert [*bars.with_bar(range(5), 'Reading')] == [*range(5)]
    assert '4/5' in out.getvalue() and 'Reading' in out.getvalue() and out.getvalue().endswith('\r')

def test_control_codes_are_escaped_in_the_log(caplog):
    caplog.set_level(logging.INFO, 'fasterai_clone')
    log_text('a\x1b[2J\nb')
    assert caplog.messages == ['a\\x1b[2J\nb']
    assert [*map(type, logging.getLogger('fasterai_clone').handlers)].count(logging.NullHandler) == 1

@pytest.mark.parametrize('granularity', ['head', 'unit'])
def test_heads_and_units_of_linear_layers(granularity):
    "Hugging Face's attention is made of linear layers: the message asks for inputs; coupled filters are the same"
    T = pytest.importorskip('transformers')
    net = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                                           num_key_value_heads=4, intermediate_size=32)).eval()
    kind = 'LlamaAttention' if granularity == 'head' else 'LlamaMLP'
    for layer_type in (nn.Linear, kind):
        with pytest.raises(ValueError, match='needs inputs to run the model with: pass `example_inputs`'):
            Sparsifier(net, granularity, layer_type=layer_type)
    where = '*self_attn*' if granularity == 'head' else '*mlp*'
    sp = Sparsifier(net, 'filter', coupled=True, layer_type=nn.Linear, include=where,
                    example_inputs=torch.randint(20, (2, 6)))
    sp.sparsify_model(50)
    block = net.model.layers[0].self_attn if granularity == 'head' else net.model.layers[0].mlp
    if granularity == 'head':
        dead = [(m.weight.view(4, 4, 16) == 0).all(2).all(1) for m in (block.q_proj, block.k_proj, block.v_proj)]
        assert int(dead[0].sum()) == 2 and all(torch.equal(d, dead[0]) for d in dead)  # two whole heads of four
    else:
        dead = [(m.weight == 0).all(1) for m in (block.gate_proj, block.up_proj)]
        assert int(dead[0].sum()) == 16 and torch.equal(*dead)

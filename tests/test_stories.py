"""Five guides, each with one task from beginning to end: they prune in no more lines than other libraries, and each
states how many. (`test_notebooks.py` runs them.)"""
import ast, importlib.util, json, re
from pathlib import Path

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

root = Path(__file__).resolve().parent.parent

# The same cell with another library: (its name in the text, what to import, code)
PEERS = dict(
    prune_a_vision_learner=('fasterai', 'fasterai', '''
from fasterai.sparse.all import SparsifyCallback, large_final, agp

learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
learn.recorder.add_time = False
learn.unfreeze()
cb = SparsifyCallback(0.8, 'weight', 'global', large_final, agp)
learn.fit_one_cycle(5, 2e-3, cbs=cb)
'''),
    warm_up_then_prune=('torch.nn.utils.prune', 'torch', '''
from torch.nn.utils import prune

torch.manual_seed(42)
model  = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
opt    = torch.optim.AdamW(model.parameters(), lr=3e-3)
warmup = LinearLR(opt, start_factor=0.1, total_iters=len(loader))
layers = [(m, 'weight') for m in model if isinstance(m, nn.Linear)]
epochs, history = 20, []
for epoch in range(epochs):
    for i,(xb,yb) in enumerate(loader):
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
        warmup.step()
        done = (epoch + (i+1)/len(loader))/epochs
        pos = min(max((done - 0.25)/0.45, 0), 1)
        for layer,name in layers:
            if prune.is_pruned(layer): prune.remove(layer, name)
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.9*(1 - (1 - pos)**3))
for layer,name in layers:
    prune.remove(layer, name)
'''),
    half_the_filters_to_onnx=('Torch-Pruning', 'torch_pruning', '''
import torch_pruning as tp

pruner = tp.pruner.BasePruner(model, x[:1], tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
                              ignored_layers=[model[-1]])
pruner.step()
'''),
    bert_2_4_with_trainer=('torch.ao.pruning', 'transformers', '''
from torch.ao.pruning import WeightNormSparsifier
from transformers import TrainerCallback

class Prune(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        names = [n for n,m in model.named_modules() if isinstance(m, nn.Linear) and 'bert.encoder' in n]
        self.sparsifier = WeightNormSparsifier(0., (1, 4), 2)
        self.sparsifier.prepare(model, [dict(tensor_fqn=f'{n}.weight') for n in names])
    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step/(0.7*state.max_steps)
        for group in self.sparsifier.groups: group['sparsity_level'] = 1 - max(1 - done, 0)**3
        self.sparsifier.step()
    def on_train_end(self, args, state, control, **kwargs):
        self.sparsifier.squash_mask()

sparse = trainer([Prune()])
sparse.train()
'''),
    your_own_criterion_and_schedule=('fasterai', 'fasterai', '''
from fasterai.sparse.all import Criteria, Schedule, SparsifyCallback

def relative(w): return w.abs()/w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

def square_root(start, end, pos): return start + (end - start)*pos**0.5

cb = SparsifyCallback(0.8, 'weight', 'global', Criteria(relative),
                      Schedule(square_root, start_pct=0.2, end_pct=0.7))
learn.fit_one_cycle(8, 1e-2, cbs=cb)
'''))
LIBRARIES = 'fasterai_clone fasterai torch.nn.utils torch_pruning torch.ao.pruning'.split()
each = pytest.mark.parametrize('name', PEERS)

def cells(name):
    nb = json.loads((root/'nbs'/'tutorials'/f'{name}.ipynb').read_text(encoding='utf-8'))
    return {c['id']: ''.join(c['source']) for c in nb['cells']}

def loaded(node): return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}

def made(node):
    "The names that a statement defines"
    if isinstance(node, (ast.Import, ast.ImportFrom)): return {a.asname or a.name for a in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return {node.name}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

blocks = ast.For, ast.If, ast.With

def statements(body):
    "Simple statements, definitions as a whole, and the loops that contain nothing else than one of them"
    for n in body:
        if not isinstance(n, blocks): yield n
        elif len(inside := [*statements(n.body)]) > 1: yield from inside
        else: yield n

def is_import_of_library(node):
    names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, 'names', ())]
    return isinstance(node, (ast.Import, ast.ImportFrom)) and any(
        n == l or n.startswith(f'{l}.') for n in names for l in LIBRARIES)

def pruning_lines(code):
    "The number of lines with names of a library, with what comes from it, or with what only serves these lines"
    tree  = ast.parse(code)
    parts = [*statements(tree.body)]
    ours  = [n for n in parts if is_import_of_library(n)]
    known = set().union(*map(made, ours))
    while True:
        before = len(ours)
        for n in parts:
            if n in ours: continue
            rest = set().union(*(loaded(o) for o in parts if o not in ours and o is not n), *(
                loaded(o.iter) | loaded(o.target) for o in ast.walk(tree) if isinstance(o, ast.For) and o not in parts))
            serves = made(n) and made(n) & set().union(*map(loaded, ours)) and not made(n) & rest
            if loaded(n) & known or serves: ours.append(n)
            if n not in ours: continue
            is_call = isinstance(n, ast.Assign) and isinstance(n.value, ast.Call) and loaded(n.value.func) & known
            if is_call or isinstance(n, ast.ClassDef): known |= made(n)
        if len(ours) == before: break
    used = {i for n in ours for i in range(n.lineno, n.end_lineno + 1)}
    lines = [l.strip() for i,l in enumerate(code.splitlines(), 1) if i in used]
    return sum(bool(l) and not l.startswith('#') for l in lines)

def test_lines_are_counted_as_a_person_would():
    code = cells('warm_up_then_prune')['prune']
    assert pruning_lines(code) == 6 and pruning_lines(re.sub('fasterai_clone', 'another', code)) == 0
    assert pruning_lines(PEERS['half_the_filters_to_onnx'][2]) == 4

@each
def test_pruning_takes_no_more_lines_than_elsewhere_and_the_page_states_how_many(name):
    peer, _, code = PEERS[name]
    ours, theirs, text = pruning_lines(cells(name)['prune']), pruning_lines(code), cells(name)['end']
    assert ours <= theirs
    line = next(l for l in text.splitlines() if l.startswith('Pruning takes'))
    assert peer in line and [int(n) for n in re.findall(r'\b\d+\b', re.sub(r'`.*?`', '', line))] == [ours, theirs]

@each
def test_a_guide_states_its_purpose_first_and_what_happened_last(name):
    found = cells(name)
    lines = found['title'].splitlines()
    assert lines[0].startswith('# ') and lines[2].startswith('> ') and len(lines) == 3
    assert found['end'].startswith('## What happened') and '.ipynb)' in found['end']

def test_the_readme_and_the_first_page_link_to_them():
    readme, landing = ((root/p).read_text(encoding='utf-8') for p in ('README.md', 'docs/landing.md'))
    for name in PEERS:
        assert f'tutorials/{name}.html' in readme
        assert f'tutorials/{name}.ipynb' in landing

# The code of the others does what the page says: it is run here, for a shorter time

def peer(name, **space):
    _, module, code = PEERS[name]
    if not importlib.util.find_spec(module): pytest.skip(f'{module} is not installed')
    torch.manual_seed(0)
    exec(code.replace('epochs, history = 20', 'epochs, history = 2'), space)
    return space

def test_the_loop_with_torch_prune():
    x, y = torch.randn(256, 64), torch.randint(10, (256,))
    space = peer('warm_up_then_prune', torch=torch, nn=nn, F=F, LinearLR=LinearLR,
                 loader=DataLoader(TensorDataset(x, y), batch_size=64))
    weights = torch.cat([m.weight.flatten() for m in space['model'] if isinstance(m, nn.Linear)])
    assert int((weights == 0).sum()) == pytest.approx(0.9*len(weights), abs=1)

def test_half_of_the_filters_with_torch_pruning():
    model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(2048, 10))
    space = peer('half_the_filters_to_onnx', model=model, x=torch.randn(2, 1, 8, 8))
    assert space['model'][0].out_channels == 16

def test_bert_with_torch_ao(tmp_path):
    T = pytest.importorskip('transformers')
    config = T.BertConfig(vocab_size=10, hidden_size=16, num_hidden_layers=1, num_labels=2, num_attention_heads=2,
                          intermediate_size=16)
    rows = [dict(input_ids=i, labels=(i.sum() > 36).long()) for i in torch.randint(10, (64, 8))]
    def trainer(callbacks):
        args = T.TrainingArguments(str(tmp_path), num_train_epochs=2, per_device_train_batch_size=16, use_cpu=True,
                                   report_to=[], save_strategy='no', disable_tqdm=True, logging_strategy='no')
        return T.Trainer(T.BertForSequenceClassification(config), args, train_dataset=rows, callbacks=callbacks)
    space  = peer('bert_2_4_with_trainer', trainer=trainer, nn=nn)
    layers = [m for m in space['sparse'].model.bert.encoder.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 6 and all((m.weight.reshape(-1, 4) == 0).sum(1).ge(2).all() for m in layers)

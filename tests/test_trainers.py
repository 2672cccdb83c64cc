"Hugging Face's Trainer, Lightning and Accelerate: the schedule by steps, zeros that hold, states that resume"
import logging, math, shutil, subprocess, sys

import pytest, torch, torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai_clone.all import Masks, Sparsifier, agp, iterative

T = pytest.importorskip('transformers')
L = pytest.importorskip('lightning.pytorch')
accelerate = pytest.importorskip('accelerate')
from fasterai_clone.trainers.huggingface import STATE_FILE, SparsifyTrainerCallback
from fasterai_clone.trainers.lightning import SparsifyLightningCallback
from fasterai_clone.trainers.steps import SparsifyBySteps

pytestmark = [pytest.mark.filterwarnings('ignore::UserWarning:lightning'),
              pytest.mark.filterwarnings('ignore::UserWarning:torch')]
logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
T.utils.logging.disable_progress_bar()

def floor(n, percent): return math.floor(n * percent / 100 + 1e-9)
def zeros(w): return int((w == 0).sum())
def equal(a, b): return all(map(torch.equal, a.parameters(), b.parameters()))

def test_the_shared_part_needs_no_trainer_and_no_fastai():
    code = '''import sys
for name in ("fastai", "transformers", "lightning", "accelerate"): sys.modules[name] = None
import fasterai_clone.trainers.steps'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Hugging Face

def bert():
    torch.manual_seed(0)
    return T.BertForSequenceClassification(T.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_labels=2, num_attention_heads=2, intermediate_size=16))

def sentences(n=48):
    ids = torch.randint(20, (n, 6), generator=torch.Generator().manual_seed(0))
    return [dict(input_ids=i, labels=(i > 9).sum().gt(2).long()) for i in ids]

class Watch(T.TrainerCallback):
    "Count the zeros of one layer when the callbacks of users see them, and the steps at the end of each epoch"
    def __init__(self): self.zeros, self.evaluated, self.ends = [], [], []
    def weight(self, model): return model.bert.encoder.layer[0].intermediate.dense.weight  # 128 numbers
    def on_optimizer_step(self, *args, model=None, **kwargs): self.zeros.append(zeros(self.weight(model)))
    def on_evaluate(self, *args, model=None, **kwargs): self.evaluated.append(zeros(self.weight(model)))
    def on_epoch_end(self, args, state, control, **kwargs): self.ends.append(state.global_step)

def trainer(folder, *callbacks, **kwargs):
    args = dict(num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
                use_cpu=True, report_to=[], disable_tqdm=True, save_strategy='epoch', seed=0) | kwargs
    t = T.Trainer(bert(), T.TrainingArguments(str(folder), **args), train_dataset=sentences(),
                  eval_dataset=sentences(8), callbacks=[*callbacks])
    t.remove_callback(T.PrinterCallback)
    return t

@pytest.mark.parametrize('kwargs', [{}, dict(bf16=True, max_grad_norm=0.01), dict(optim='sgd', weight_decay=0.1),
                                    dict(gradient_accumulation_steps=5)], ids=['plain', 'bf16', 'sgd', 'uneven'])
def test_trainer_follows_the_schedule_by_optimizer_steps(kwargs, tmp_path):
    cb, watch = SparsifyTrainerCallback(90, end_pct=0.7), Watch()
    trainer(tmp_path, cb, watch, save_strategy='no', **kwargs).train()
    n = len(watch.zeros)
    assert n in ((6, 9) if 'gradient_accumulation_steps' in kwargs else (18,))  # as transformers splits the rest
    assert watch.zeros == [floor(128, agp(end_pct=0.7).sparsity((i + 1)/n, 90)) for i in range(n)]
    assert [r.zeros for r in cb.report.rows] == [floor(r.params, 90) for r in cb.report.rows]
    assert not cb.active
    assert [row['step'] for row in cb.history] == watch.ends  # transformers 4.51 stops after two uneven epochs of three
    assert watch.ends in ([n//3, 2*n//3, n], [3, 6])

def test_epochs_end_exactly_before_trainer_evaluates(tmp_path):
    cb, watch = SparsifyTrainerCallback(90, every=4, schedule='lin'), Watch()
    trainer(tmp_path, cb, watch, save_strategy='no', eval_strategy='epoch').train()
    assert watch.evaluated == [floor(128, p) for p in (30, 60, 90)]
    assert watch.zeros[:6] == [0, 0, 0, *[floor(128, 20)]*3]  # updates in steps 4, 8, 12, ...

def test_the_log_has_the_counted_sparsity(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'fasterai_clone')
    cb = SparsifyTrainerCallback(50, schedule='one_shot', include='bert.encoder.*')
    t  = trainer(tmp_path, cb, save_strategy='no', logging_steps=6)
    t.train()
    assert [row['sparsity'] for row in t.state.log_history] == [0., 50., 50., 50.]
    lines = [r.message for r in caplog.records if r.name == 'fasterai_clone']
    assert lines[0] == 'Pruning of weight until a sparsity of [50]%'
    assert 'Sparsity after 2 epochs, step 12 of 18: [50.0]%' in lines
    assert lines[-1].startswith('Final Sparsity: [50.0]%\n\nSparsity Report:')
    caplog.clear()
    trainer(tmp_path, SparsifyTrainerCallback(50, verbose=False), save_strategy='no', max_steps=1).train()
    assert not [r for r in caplog.records if r.name == 'fasterai_clone']

@pytest.mark.parametrize('criteria', ['large_final', 'movement', 'gradient', 'updating_movement'])
@pytest.mark.parametrize('kwargs,step', [({}, 12), (dict(save_strategy='steps', save_steps=5), 10)],
                         ids=['epoch', 'middle'])
def test_trainer_resumes_bit_for_bit(criteria, kwargs, step, tmp_path):
    def make(): return SparsifyTrainerCallback(80, criteria=criteria, exclude='classifier')
    whole, resumed = trainer(tmp_path, a := make(), **kwargs), trainer(tmp_path, b := make(), **kwargs)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path/f'checkpoint-{step}'))
    assert equal(whole.model, resumed.model) and a.history == b.history and a.sparsifier.masks == b.sparsifier.masks
    assert str(a.report) == str(b.report)

def test_a_checkpoint_elsewhere(tmp_path):
    whole = trainer(tmp_path/'a', SparsifyTrainerCallback(80))
    whole.train()
    moved = shutil.move(tmp_path/'a'/'checkpoint-12', tmp_path/'moved')
    resumed = trainer(tmp_path/'b', cb := SparsifyTrainerCallback(80))
    cb.load_state(moved)
    resumed.train(resume_from_checkpoint=str(moved))
    assert equal(whole.model, resumed.model)
    with pytest.raises(FileNotFoundError, match='There is no fasterai_clone.pt in'): cb.load_state(tmp_path)

def test_a_state_of_other_weights_is_refused(tmp_path):
    trainer(tmp_path/'a', SparsifyTrainerCallback(80)).train()
    trainer(tmp_path/'b', SparsifyTrainerCallback(80, criteria='random')).train()
    shutil.copy(tmp_path/'b'/'checkpoint-12'/STATE_FILE, tmp_path/'a'/'checkpoint-12')
    def resume():
        t = trainer(tmp_path/'a', SparsifyTrainerCallback(80))
        t.train(resume_from_checkpoint=str(tmp_path/'a'/'checkpoint-12'))
    with pytest.raises(ValueError, match='is the state of another checkpoint: .* are not zero in the model'): resume()
    (tmp_path/'a'/'checkpoint-12'/STATE_FILE).write_bytes(b'PK\3\4 broken')
    with pytest.raises(ValueError, match=f'{STATE_FILE} is incomplete'): resume()

def test_a_checkpoint_without_a_state(tmp_path, caplog):
    "As if it was saved without the callback: zeros stay, and the end is exact"
    caplog.set_level(logging.INFO, 'fasterai_clone')
    trainer(tmp_path, SparsifyTrainerCallback(80)).train()
    (tmp_path/'checkpoint-12'/STATE_FILE).unlink()
    trainer(tmp_path, cb := SparsifyTrainerCallback(80)).train(resume_from_checkpoint=str(tmp_path/'checkpoint-12'))
    assert 'No state was loaded: pruning begins anew at step 12' in caplog.text
    assert [r.zeros for r in cb.report.rows] == [floor(r.params, 80) for r in cb.report.rows]

def test_a_run_that_stops_early_stays_as_it_is(tmp_path):
    class Stop(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 9
    trainer(tmp_path, cb := SparsifyTrainerCallback(80, schedule='lin'), Stop()).train()
    assert [r.zeros for r in cb.report.rows] == [floor(r.params, 40) for r in cb.report.rows]

def test_the_best_model_is_masked_again(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'fasterai_clone')
    t = trainer(tmp_path, cb := SparsifyTrainerCallback(80, schedule='lin'), eval_strategy='epoch',
                load_best_model_at_end=True, metric_for_best_model='eval_loss', greater_is_better=True)
    losses, evaluate = iter([3., 2., 1.]), t.evaluate
    def scripted(*args, **kwargs): return evaluate(*args, **kwargs) | dict(eval_loss=next(losses))
    t.evaluate = scripted
    t.train()  # the best is the first, with a third of the zeros
    assert 'pruned weights had come back at the end of training' in caplog.text
    assert [r.zeros for r in cb.report.rows] == [floor(r.params, 80) for r in cb.report.rows]

def test_two_callbacks_and_a_second_run(tmp_path):
    a, b = SparsifyTrainerCallback(50, include='bert.encoder.*'), SparsifyTrainerCallback(90, include='bert.pooler*')
    t = trainer(tmp_path, a, b, save_strategy='no', max_steps=4)
    t.train()
    t.train()  # masks hold from its first step
    assert [r.sparsity for r in a.report.rows] == [50.]*6 and b.report.zeros == floor(64, 90)

@pytest.mark.parametrize('kwargs,error', [
    (dict(sparsity=0.9), 'For 90'), (dict(sparsity=90, end_pct=70), 'end_pct'), (dict(sparsity=90, every=0), 'every'),
    (dict(sparsity=90, part=3), '`part` must be'), (dict(sparsity=90, start_sparsity=0.5), 'start_sparsity')])
def test_wrong_arguments_are_refused_at_once(kwargs, error):
    for kind in SparsifyTrainerCallback, SparsifyLightningCallback:
        with pytest.raises((TypeError, ValueError)) as e: kind(**kwargs)
        assert error.lower() in str(e.value).lower() or '90' in str(e.value)

@pytest.mark.parametrize('kwargs,error', [(dict(include='bart.*'), 'bert'),
                                          (dict(criteria='wanda', context='output'), 'pass `data`'),
                                          (dict(part=nn.Linear(2, 2)), 'no module of the model')])
def test_what_cannot_work_is_refused_before_the_first_step(kwargs, error, tmp_path):
    watch = Watch()
    with pytest.raises(ValueError, match=error):
        trainer(tmp_path, SparsifyTrainerCallback(50, **kwargs), watch).train()
    assert not watch.zeros

def test_calibration_data(tmp_path):
    batch = {k: torch.stack([d[k] for d in sentences(8)]) for k in ('input_ids', 'labels')}
    cb = SparsifyTrainerCallback(50, criteria='wanda', context='output', data=batch, schedule='one_shot')
    trainer(tmp_path, cb, max_steps=4, save_strategy='no').train()
    assert all(r.zeros == r.params // 2 for r in cb.report.rows)

@pytest.mark.parametrize('kind,n', [('head', 2), ('unit', 16)])
def test_heads_and_units_are_found_with_the_first_batch_of_trainer(kind, n, tmp_path):
    "It is read beside the run: with nothing to prune the weights end as in a dense one, dropout and order included"
    def run(*callbacks):
        t = trainer(tmp_path, *callbacks, save_strategy='no', max_steps=2)
        t.train()
        return t.model
    def pruned(sparsity): return SparsifyTrainerCallback(sparsity, kind, schedule='one_shot', include='bert.encoder.*')
    assert equal(run(pruned(0)), run())
    run(cb := pruned(50))
    assert [r.zero_groups for r in cb.report.rows if r.groups] == [n//2]

def test_a_batch_that_the_model_cannot_take(tmp_path):
    class Own(T.Trainer):
        def compute_loss(self, model, inputs, **kwargs): return model(input_ids=inputs['ids']).logits.square().mean()
    def run(*args):
        cb   = SparsifyTrainerCallback(50, *args)
        data = [dict(ids=d['input_ids']) for d in sentences(8)]
        args = T.TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
                                   save_strategy='no', remove_unused_columns=False)
        Own(bert(), args, train_dataset=data, callbacks=[cb]).train()
        return cb
    assert run().report.sparsity == 50  # no run was needed
    with pytest.raises(ValueError, match='does not run on the first batch .*: pass `example_inputs`'): run('head')


# Lightning

class Net(L.LightningModule):
    def __init__(self, lr=1e-2, opt=torch.optim.Adam):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
        self.lr, self.opt, self.zeros, self.validated = lr, opt, [], []
    def training_step(self, batch, i):
        x, y = batch
        return nn.functional.cross_entropy(self.body(x), y)
    def validation_step(self, batch, i):
        self.log('val', float(zeros(self.body[0].weight)))
        if not self.trainer.sanity_checking: self.validated.append(zeros(self.body[0].weight))
    def on_before_zero_grad(self, optimizer): self.zeros.append(zeros(self.body[0].weight))
    def configure_optimizers(self): return self.opt(self.parameters(), lr=self.lr)

def batches(shuffle=True, n=64, bs=4):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=bs, shuffle=shuffle)

def fitted(*callbacks, net=None, valid=False, **kwargs):
    fit = {k: kwargs.pop(k) for k in ('ckpt_path',) if k in kwargs}
    t = L.Trainer(**(dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
                          enable_checkpointing=any(isinstance(c, L.callbacks.ModelCheckpoint) for c in callbacks),
                          max_epochs=3, callbacks=[*callbacks]) | kwargs))
    net = Net() if net is None else net
    torch.manual_seed(1)
    t.fit(net, batches(), batches(False, 8) if valid else None, **fit)
    return net, t

@pytest.mark.parametrize('kwargs,n', [({}, 48), (dict(accumulate_grad_batches=3, gradient_clip_val=0.01,
                                                      precision='bf16-mixed'), 18), (dict(max_steps=7), 7)])
def test_lightning_follows_the_schedule_by_optimizer_steps(kwargs, n):
    cb = SparsifyLightningCallback(90, schedule='lin', end_pct=0.7)
    net, t = fitted(cb, **kwargs)
    if not kwargs.get('accumulate_grad_batches'):  # zeros are counted where the next step begins
        assert net.zeros == [floor(128, min(90*i/n/0.7, 90)) for i in range(n)]
    assert t.global_step == n and [r.zeros for r in cb.report.rows] == [floor(128, 90), floor(64, 90)]
    if 'max_steps' not in kwargs: assert [row['step'] for row in cb.history] == [n//3, 2*n//3, n]

def test_epochs_end_exactly_before_lightning_validates():
    cb = SparsifyLightningCallback(90, every=7, schedule='lin')
    net, t = fitted(cb, valid=True)
    assert sorted(set(net.validated)) == [floor(128, p) for p in (30, 60, 90)]
    assert float(t.callback_metrics['sparsity']) == pytest.approx(100*(115 + 57)/192)

@pytest.mark.parametrize('criteria', ['large_final', 'movement', 'gradient'])
def test_lightning_resumes_bit_for_bit(criteria, tmp_path):
    def make(): return SparsifyLightningCallback(80, criteria=criteria)
    def saver(): return L.callbacks.ModelCheckpoint(tmp_path, '{epoch}', save_top_k=-1)
    whole, _   = fitted(a := make(), saver(), valid=True)
    resumed, _ = fitted(b := make(), saver(), valid=True, ckpt_path=tmp_path/'epoch=0.ckpt')
    assert equal(whole, resumed) and a.history == b.history and str(a.report) == str(b.report)
    saved = torch.load(tmp_path/'epoch=0.ckpt', weights_only=True)['callbacks'][a.state_key]
    assert saved['steps'] == 16 and saved['history'][0]['epoch'] == 1

def test_gradients_are_those_of_a_plain_loop():
    "Lightning computes them inside of the optimizer's step"
    def net(): return Net(opt=torch.optim.SGD).eval()
    cb, mine = SparsifyLightningCallback(50, criteria='gradient', schedule=iterative(start_pct=0.)), net()
    theirs = net()
    t = L.Trainer(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
                  enable_checkpointing=False, callbacks=[cb])
    for m in (mine, theirs): m.body[2].p = 0.
    t.fit(theirs, batches(False))
    sp  = Sparsifier(mine, criteria='gradient', layer_type=nn.Linear)
    opt = torch.optim.SGD(mine.parameters(), lr=1e-2)
    sp.hold(opt)
    for i,(x,y) in enumerate([*batches(False)]*2):
        opt.zero_grad()
        nn.functional.cross_entropy(mine.body(x), y).backward()
        opt.step()
        wanted = iterative(start_pct=0.).sparsity((i + 1)/32, 50)
        if wanted != iterative(start_pct=0.).sparsity(i/32, 50): sp.sparsify_model(wanted)
    assert equal(mine, theirs) and cb.report.zeros == 96

def test_units_are_found_with_the_first_batch_of_lightning():
    "If the module can be called; shuffling and dropout stay as they are"
    class Called(Net):
        def forward(self, x): return self.body(x)
    x = next(iter(batches(False)))[0]
    (a, _), (b, _), (c, _), (dense, _) = (fitted(*cb, net=Called()) for cb in (
        [SparsifyLightningCallback(50, 'unit')], [SparsifyLightningCallback(50, 'unit', example_inputs=x)],
        [SparsifyLightningCallback(0, 'unit')], []))
    assert equal(a, b) and int((a.body[0].weight == 0).all(1).sum()) == 8
    assert equal(c, dense) and not equal(a, c)
    with pytest.raises(ValueError, match='pass `example_inputs`'): fitted(SparsifyLightningCallback(50, 'unit'))

def test_two_optimizers_stepped_by_hand():
    "The schedule counts the steps of the one that trains the pruned layer"
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
        def training_step(self, batch, i):
            loss = super().training_step(batch, i)
            a, b = self.optimizers()
            self.manual_backward(loss)
            for o in (a, b): o.step()
            for o in (a, b): o.zero_grad()
        def configure_optimizers(self):
            return [torch.optim.SGD(self.body[3].parameters(), lr=1e-2), torch.optim.Adam(self.body[0].parameters())]
    cb = SparsifyLightningCallback(90, schedule='lin', include='body.0')
    net, t = fitted(cb, net=Two())
    assert [row['step'] for row in cb.history] == [16, 32, 48] and cb.report.zeros == floor(128, 90)

def test_an_exception_and_a_second_run_leave_nothing_behind():
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 20: raise RuntimeError('of the user')
    cb, net = SparsifyLightningCallback(60, schedule='lin'), Net()
    with pytest.raises(RuntimeError, match='of the user'): fitted(cb, Fail(), net=net)
    assert not cb.active and zeros(net.body[0].weight) == floor(128, 60*20/48)
    fitted(cb, net=net)
    assert zeros(net.body[0].weight) == floor(128, 60)

def test_early_stopping_and_runs_without_end():
    stop = L.callbacks.EarlyStopping('val', mode='min', patience=1)  # the zeros only grow
    _, t = fitted(cb := SparsifyLightningCallback(60, schedule='lin'), stop, valid=True, max_epochs=6)
    assert t.current_epoch == 2 and cb.report.rows[0].zeros == floor(128, 20)
    with pytest.raises(ValueError, match='set `max_epochs` or `max_steps`'):
        fitted(SparsifyLightningCallback(60), max_epochs=-1)

def test_states_of_several_callbacks_have_different_keys():
    a, b = SparsifyLightningCallback(60, include='a'), SparsifyLightningCallback(70, include='b')
    assert a.state_key != b.state_key and a.state_key == SparsifyLightningCallback(90, include='a').state_key


# Accelerate

def test_a_loop_with_accelerate(tmp_path):
    "As the tutorial has it: `hold` and `register_for_checkpointing` are enough"
    def train(first):
        torch.manual_seed(0)
        accelerate.state.AcceleratorState._reset_state(True)  # what `Trainer` has set
        acc = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision='bf16')
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        net, opt, dl = acc.prepare(net, torch.optim.Adam(net.parameters(), 1e-2), batches(False))
        sp = Sparsifier(net, layer_type=nn.Linear, criteria='movement')
        acc.register_for_checkpointing(sp)
        if first: acc.load_state(str(tmp_path))
        sp.hold(opt)
        seen, step, n_steps = [], first*len(dl)//2, 3*len(dl)//2
        for epoch in range(first, 3):
            for x,y in dl:
                with acc.accumulate(net):
                    acc.backward(nn.functional.cross_entropy(net(x), y))
                    if acc.sync_gradients: acc.clip_grad_norm_(net.parameters(), 1.)
                    opt.step()
                    opt.zero_grad()
                if acc.sync_gradients:
                    step += 1
                    sp.sparsify_model(80, schedule=agp, done=step/n_steps)
                    seen.append(zeros(net[0].weight))
            if not first and epoch == 1: acc.save_state(str(tmp_path))
        assert seen == [floor(128, agp.sparsity((i + 1)/24, 80)) for i in range(8*first, 24)]
        return net, sp
    (a, sp), (b, resumed) = train(0), train(2)
    assert equal(a, b) and sp.masks == resumed.masks and Masks.of(b) == sp.masks

def test_the_arguments_are_those_of_the_fastai_callback():
    import inspect
    from fasterai_clone.all import SparsifyCallback
    theirs = inspect.signature(SparsifyCallback).parameters
    ours   = inspect.signature(SparsifyBySteps).parameters
    fastai = {'lth', 'rewind_epoch', 'reset_end', 'save_tickets', 'rewind_step', 'live', 'compact',
              'max_drop', 'metric'}  # of its own
    renamed = dict(start_epoch='start_pct', end_epoch='end_pct', model='part')
    assert {renamed.get(k, k) for k in theirs.keys() - fastai} <= ours.keys()
    assert [k for k in ours][:5] == [k for k in theirs][:5]
